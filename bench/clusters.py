"""`python -m bench.clusters RUN … --csv FILE`: ten clusters of the codes of runs, against the classes.

Training codes are laid out and parted; test codes join their neighbours. Beside them stand the components of
the run's prior, as they are and joined, and clusters of the pixels, with three seeds. Rows that the table
has are not made again."""

import torch
from tqdm.auto import tqdm

from csrae_nb.clusters import cluster_codes
from csrae_nb.evaluation import write_table
from csrae_nb.metrics import clustering, knn_error
from csrae_nb.priors import merge_components, merged_labels
from csrae_nb.results import read_rows
from csrae_nb.tasks import mean_codes

from .rulers import asked, described, parser_of

KEY = (
    "dataset",
    "model",
    "network",
    "prior",
    "components",
    "objective",
    "queue",
    "latent_dim",
    "weight",
    "epochs",
    "seed",
)
NO_PRIOR = dict(purity=None, joined_accuracy=None, joined_nmi=None, joined_ari=None)


def of_codes(data, codes, seed):
    "How clusters of codes, by split, agree with the classes, and the error of five neighbours."
    C = len(data.y_test.unique())
    found = cluster_codes(codes["train"], C, seed)
    theirs = clustering(data.y_test, found.predict(codes["test"]))
    near = knn_error(codes["train"], data.y_train, codes["test"], data.y_test, (5,))[5]
    return {k: theirs[f"cluster_{k}"] for k in ("accuracy", "nmi", "ari")} | dict(knn5=near)


def of_components(data, prior, z):
    "How the components of a prior, as they are and joined, agree with the classes of test codes."
    if len(prior.logw) == 1:
        return NO_PRIOR
    C = len(data.y_test.unique())
    joined = clustering(data.y_test, merged_labels(prior, merge_components(prior, C), z))
    purity = clustering(data.y_test, prior.responsibilities(z).argmax(1))["cluster_purity"]
    return dict(purity=purity, **{f"joined_{k}": joined[f"cluster_{k}"] for k in ("accuracy", "nmi", "ari")})


@torch.no_grad()
def of_run(data, run):
    "Everything of a run; its codes are the means of q(z|x) of the images as they are."
    codes = {part: mean_codes(run.model, getattr(data, f"x_{part}")) for part in ("train", "test")}
    return of_codes(data, codes, run.cfg.seed) | of_components(data, run.model.prior(), codes["test"])


def of_pixels(data, seed):
    codes = dict(train=data.x_train.flatten(1), test=data.x_test.flatten(1))
    return of_codes(data, codes, seed) | NO_PRIOR


def main():
    o, runs, data = asked(parser_of(__doc__))
    rows = read_rows(o.csv, KEY)
    done = {tuple(r[k] for k in KEY) for r in rows}
    of = dict(
        model="pixels",
        network=None,
        prior=None,
        components=1,
        objective=None,
        queue=0,
        latent_dim=data.x_test[0].numel(),
    )
    pixels = [dict(dataset=runs[0].cfg.dataset, **of, weight=0, epochs=0, seed=s) for s in range(3)]
    todo = [(described(r) | dict(epochs=r.cfg.epochs), r) for r in runs] + [(row, None) for row in pixels]
    for row, run in tqdm([(row, run) for row, run in todo if tuple(row[k] for k in KEY) not in done]):
        rows.append(row | (of_run(data, run) if run else of_pixels(data, row["seed"])))
        write_table(o.csv, rows)


if __name__ == "__main__":
    main()
