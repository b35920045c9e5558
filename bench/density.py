"""CSRAEEmbedding as a density, beside mixtures and kernels, and for outliers: `python -m bench.density`
writes results/density.csv, a row a data set, a model and a seed, and goes on where it was stopped."""

import argparse
import dataclasses
import tempfile
import time
import warnings
from functools import partial
from itertools import chain, product
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KernelDensity, LocalOutlierFactor
from sklearn.preprocessing import StandardScaler

from csrae_nb import Config, CSRAEEmbedding, fit
from csrae_nb.evaluation import write_table
from csrae_nb.results import read_rows

FILE = Path(__file__).parents[1] / "results" / "density.csv"
SEEDS = range(5)
STEPS = 1500  # of a training, at most
FLOORS = 1e-4, 1e-2, 3e-2, 0.1, 0.3  # of a variance; the first is the library's
SETS = dict(
    wine=load_wine,
    breast_cancer=load_breast_cancer,
    diabetes=partial(load_diabetes, scaled=False),
    digits=load_digits,
)


def read(name):
    """A data set's numbers and its classes, without constant columns. Each value gets uniform noise as wide
    as the smallest step of its column: a density of values on a grid has no upper bound."""
    data, rng = SETS[name](), np.random.default_rng(0)
    x = data.data[:, data.data.std(0) > 0]
    steps = [np.diff(np.unique(column.round(9))).min() for column in x.T]
    return x + steps * rng.uniform(-0.5, 0.5, x.shape), None if name == "diabetes" else data.target


def parts(x, seed):
    "60 % to train, 20 % to choose by, 20 % to report; columns of the first have mean 0 and variance 1."
    rest, test = train_test_split(x, test_size=0.2, random_state=seed)
    train, val = train_test_split(rest, test_size=0.25, random_state=seed)
    scaler = StandardScaler().fit(train)
    return [scaler.transform(part) for part in (train, val, test)]


# --- densities: (train, val, seed) to something with score_samples, and what was chosen by val


def best(candidates, train, val):
    "Of unfitted models the one whose density of the validation rows is highest."
    fitted = {name: model.fit(train) for name, model in candidates.items()}
    name = max(fitted, key=lambda k: fitted[k].score_samples(val).mean())
    return fitted[name], name


def gmm(kind, train, val, seed):
    sizes = [K for K in (1, 2, 3, 5, 8, 12, 20, 40) if K <= len(train)]
    grid = {
        f"K={K} floor={f}": GaussianMixture(K, covariance_type=kind, reg_covar=f, random_state=seed)
        for K, f in product(sizes, (1e-6, 1e-2, 0.1))
    }
    return best(grid, train, val)


def kde(train, val, seed):
    return best({f"h={h:.3g}": KernelDensity(bandwidth=h) for h in np.geomspace(0.05, 2, 15)}, train, val)


def as_it_comes(train, val, seed):
    rows = np.concatenate([train, val])
    return CSRAEEmbedding(random_state=seed, validation_fraction=0.25).fit(rows), ""


def with_floor(est, floor):
    "A fitted estimator whose p(x|z) has another smallest variance."
    est.model_.likelihood = dataclasses.replace(est.model_.likelihood, min_var=floor)
    return est


def trained(train, val, seed, refit=False, **kw):
    """A model that stops by the validation rows; the floor of its likelihood is chosen by them, too.
    With `refit`, its prior is fitted to the codes of the training rows afterwards."""
    copies = max(1, STEPS // len(train))  # an epoch of many steps
    x = np.concatenate([train] * copies)
    epochs = round(STEPS / (len(x) // 50))
    fields = dict(dataset="arrays", likelihood="gaussian", network="mlp", latent_dim=10, components=10)
    fields |= dict(
        batch_size=50, epochs=epochs, warmup=epochs // 5, patience=10, lr=2e-3, labels=0, seed=seed
    )
    with tempfile.TemporaryDirectory() as folder:
        arrays = dict(x_train=x, x_val=val, x_test=val)
        run = fit(Config(**fields | kw), arrays, False, folder, checkpoints=False)
        est = CSRAEEmbedding.from_run(run)
    if refit:
        est.refit_prior(train)
    floor = max(FLOORS, key=lambda f: with_floor(est, f).score_samples(val, 64).mean())
    return with_floor(est, floor), f"floor={floor} epoch={est.best_epoch_} of {est.n_iter_}"


class Whitened:
    "A density of rows that a single Gaussian, whose floor is chosen, brings to covariance 1."

    def __init__(self, density, train, val, seed):
        grid = {f: GaussianMixture(1, reg_covar=f) for f in (1e-6, 1e-3, *FLOORS[1:])}
        full, floor = best(grid, train, val)
        self.mean, self.root = full.means_[0], full.precisions_cholesky_[0]
        self.density, chosen = density(self.rows(train), self.rows(val), seed)
        self.chosen = f"white={floor} {chosen}"

    def rows(self, x):
        return (x - self.mean) @ self.root

    def score_samples(self, x, *draws):
        return self.density.score_samples(self.rows(x), *draws) + np.log(np.diag(self.root)).sum()


def whitened(density, train, val, seed):
    white = Whitened(density, train, val, seed)
    return white, white.chosen


REFITTED = "MixtureCSRAE, refitted"  # its prior fitted to the codes afterwards
LARGE, SMALL = dict(network="mlp", latent_dim=10), dict(network="pinwheel", latent_dim=5)


def ours(name, **kw):
    "The training that validation rows preferred, of the first seed, which has both: large for the most rows."
    return (
        partial(trained, **LARGE | kw)
        if name == "digits"
        else partial(whitened, partial(trained, **SMALL | kw))
    )


def densities(name, seed):
    "The densities that a data set's rows are given, by the name of each."
    found = {
        "GaussianMixture, full": partial(gmm, "full"),
        "GaussianMixture, diag": partial(gmm, "diag"),
        "KernelDensity": kde,
        "KernelDensity, whitened": partial(whitened, kde),
        "MixtureCSRAE": ours(name),
    }
    if seed == 0:
        found["CSRAEEmbedding, as it comes"] = as_it_comes
        if name == "digits":
            found["MixtureCSRAE, small, whitened"] = partial(whitened, partial(trained, **SMALL))
        else:
            found["MixtureCSRAE, large"] = partial(trained, **LARGE)
    return found


def variants(name):
    "What else could be trained in its place; for the first seed."
    return {
        "MixtureCSRAE, aggregate": ours(name, prior_objective="aggregate", learned_weights=True),
        "CSRAE": ours(name, model="CSRAE"),
        "VAE": ours(name, model="VAE"),
    }


# --- outliers


def forest(train, val, seed):
    return IsolationForest(random_state=seed).fit(np.concatenate([train, val])), ""


def neighbours(train, val, seed):
    return LocalOutlierFactor(novelty=True).fit(np.concatenate([train, val])), ""


def detectors(name):
    "What finds the outliers of a data set, by name."
    found = {"IsolationForest": forest, "LocalOutlierFactor": neighbours} | densities(name, None)
    return {k: v for k, v in found.items() if k != "KernelDensity"}


def held_out(y, seed):
    "The class that is an outlier: another one each seed, as far as there are."
    return int(np.unique(y)[2 * seed % len(np.unique(y)) if len(np.unique(y)) > 2 else seed % 2])


def scores(fitted, x, draws):
    "log p(x) of rows; draws are for ours."
    ours = isinstance(getattr(fitted, "density", fitted), CSRAEEmbedding)
    return fitted.score_samples(x, *([draws] if ours else []))


def density_row(dataset, model, seed):
    train, val, test = parts(read(dataset)[0], seed)
    every = densities(dataset, seed) | variants(dataset) | {REFITTED: ours(dataset, refit=True)}
    fitted, chosen = every[model](train, val, seed)
    of = dict(validation=scores(fitted, val, 256), log_likelihood=scores(fitted, test, 512))
    return {k: float(v.mean()) for k, v in of.items()} | dict(chosen=chosen)


def outlier_row(dataset, model, seed, outlier):
    x, y = read(dataset)
    rest, test = train_test_split(x[y != outlier], test_size=0.2, random_state=seed)
    train, val = train_test_split(rest, test_size=0.25, random_state=seed)
    scaler = StandardScaler().fit(train)
    fitted, chosen = detectors(dataset)[model](scaler.transform(train), scaler.transform(val), seed)
    seen = scaler.transform(np.concatenate([test, x[y == outlier]]))
    auc = roc_auc_score(np.arange(len(seen)) < len(test), scores(fitted, seen, 64))
    return dict(auc=float(auc), chosen=chosen)


def of_seed(seed):
    "What is to be measured with a seed: a function, and what it is called with."
    for name in SETS:
        for model in densities(name, seed):
            yield density_row, dict(dataset=name, model=model, seed=seed)
        if name != "diabetes":
            outlier = held_out(read(name)[1], seed)
            for model in detectors(name):
                yield outlier_row, dict(dataset=name, model=model, seed=seed, outlier=outlier)


def work():
    "Three seeds come first, then the variants, then the other seeds, and refitted priors."
    yield from chain.from_iterable(map(of_seed, SEEDS[:3]))
    for name in reversed(SETS):
        for model in variants(name):
            yield density_row, dict(dataset=name, model=model, seed=0)
    yield from chain.from_iterable(map(of_seed, SEEDS[3:]))
    for name, seed in product(SETS, SEEDS):
        yield density_row, dict(dataset=name, model=REFITTED, seed=seed)


COLUMNS = "dataset model seed outlier validation log_likelihood auc chosen seconds".split()


def main():
    argparse.ArgumentParser("python -m bench.density", description=__doc__).parse_args()
    warnings.simplefilter("ignore")
    rows = [{k: "" if v is None else v for k, v in r.items()} for r in read_rows(FILE, COLUMNS)]
    done = {tuple(r[k] for k in COLUMNS[:4]) for r in rows}
    for measure, named in work():
        if tuple(named.get(k, "") for k in COLUMNS[:4]) in done:
            continue
        start = time.perf_counter()
        found = named | measure(**named)
        found["seconds"] = time.perf_counter() - start
        rows.append({k: found.get(k, "") for k in COLUMNS})
        write_table(FILE, rows)
        print(*rows[-1].values(), flush=True)


if __name__ == "__main__":
    main()
