"""`python -m bench.expost RUN … --csv FILE`: mixtures of full covariance fitted to codes after training.

The tables' fitted mixtures are diagonal, as the priors are. Ghosh et al. (2020) fit ten components of full
covariance, which know more of codes that hang together: here both, of several sizes, beside the prior as
trained. `log_density` is of the validation images' codes, by which a size can be chosen without samples."""

import time
from functools import partial

import torch
from tqdm.auto import tqdm

from csrae_nb.evaluation import expost_mixture, real_images, run_codes, write_table
from csrae_nb.metrics import classifier_features, feature_statistics, frechet_distance, precision_and_coverage
from csrae_nb.results import read_rows

from .rulers import asked, described, parser_of

SIZES = dict(full=(1, 10, 100), diagonal=(10, 100, 400))
SAMPLES, NEAR = 10_000, 5_000
KEY = ("dataset", "model", "prior", "components", "objective", "queue", "latent_dim")
KEY += ("weight", "epochs", "seed", "source", "fitted")


def sources(run, codes):
    "What samples are drawn from: what a row says of it, and a function that gives it."
    prior, seed = run.model.prior, run.cfg.seed
    yield dict(source="prior", fitted=len(prior().logw)), prior
    for K in SIZES["diagonal"]:
        yield dict(source="diagonal", fitted=K), partial(expost_mixture, codes, K, seed)
    for K in SIZES["full"]:
        yield dict(source="full", fitted=K), partial(expost_mixture, codes, K, seed, full=True)


def images_to_compare(data):
    "The data that samples are compared with, features, and the test images' statistics and features."
    real = real_images(data)
    features = classifier_features(real)
    order = torch.randperm(len(real.x_test), generator=torch.Generator().manual_seed(0))
    images = feature_statistics(features.of, (real.x_test[i] for i in order[:SAMPLES].split(500)))
    near = torch.cat([features.of(real.x_test[i]) for i in order[:NEAR].split(500)])
    return real, features, images, near


def measured(run, source, real, features, images, near):
    "Distance, precision, recall and coverage of samples."
    g = torch.Generator().manual_seed(run.cfg.seed)
    xs = (run.model.sample(500, g, prior=source) for _ in range(0, SAMPLES, 500))
    seen = [features.of((x > 0.5).to(x.dtype) if binary(real) else x) for x in xs]
    distance = frechet_distance(feature_statistics(lambda f: f, seen), images)
    return dict(distance=round(distance, 4)) | precision_and_coverage(near, torch.cat(seen)[:NEAR])


def binary(real):
    "Whether pictures are compared in black and white."
    return real.likelihood == "bernoulli" and not real.dynamic


@torch.no_grad()
def fill(doc, key, sources, more=lambda run, data, mixture, seconds: {}):
    "A table of runs and of what samples are drawn from: the rows that it lacks, with what `more` says."
    o, runs, data = asked(parser_of(doc))
    against = images_to_compare(data)
    rows = read_rows(o.csv, key)
    done = {tuple(r[k] for k in key) for r in rows}
    for run in tqdm(runs):
        codes, val = (run_codes(run, data, part) for part in ("train", "val"))
        for source, make in sources(run, codes):
            row = described(run) | dict(epochs=run.cfg.epochs) | source
            if tuple(row[k] for k in key) in done:
                continue
            began = time.perf_counter()
            mixture = make()
            row |= more(run, data, mixture, time.perf_counter() - began)
            row["log_density"] = round(mixture.log_prob(val).mean().item(), 3)
            rows.append(row | measured(run, mixture, *against))
            write_table(o.csv, rows)


if __name__ == "__main__":
    fill(__doc__, KEY, sources)
