"""`python -m bench.rulers RUN … --csv FILE`: distances of runs by other rulers.

The distances in the tables are of the features of one classifier. Here the same images of the same runs are
seen by classifiers of other seeds, and without any: by the 50 principal components of the test images."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from csrae_nb.catalogue import load_data
from csrae_nb.config import divergence_weight, prior_kind
from csrae_nb.data import Dataset
from csrae_nb.evaluation import frechet_distances, real_images, run_codes, sample_sources, write_table
from csrae_nb.metrics import Features, accuracy, train_classifier
from csrae_nb.runs import load_run

DIMENSIONS = 50
SETS = ("reconstructions", "samples", "samples_expost")


def principal_components(data: Dataset) -> Features:
    "The leading principal components of the test images: a ruler that no label has a part in."
    x = data.x_test.flatten(1)
    centre = x.mean(0)
    axes = torch.linalg.svd(x - centre, full_matrices=False)[2][:DIMENSIONS].T
    return Features(f"{DIMENSIONS} components", lambda images: (images.flatten(1) - centre) @ axes)


def rulers(data: Dataset, seeds: int) -> Iterator[tuple[Features, float | None]]:
    "Features, and what part of the test images their classifier gets right, in percent."
    yield principal_components(data), None
    for seed in range(seeds):
        net = train_classifier(data, seed=seed)
        yield Features(f"classifier {seed}", net.features), round(100 * accuracy(net, data, "test"), 2)


def described(run):
    "What a row says of a run."
    c, prior = run.cfg, prior_kind(run.cfg)
    components = 1 if prior == "normal" else c.components
    of = dict(dataset=c.dataset, model=c.model, network=c.network, prior=prior, components=components)
    of |= dict(objective=c.prior_objective, queue=c.queue, latent_dim=c.latent_dim)
    return of | dict(weight=divergence_weight(c), seed=c.seed)


def parser_of(doc):
    "A parser of finished runs and of the table that they go into."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs of one data set")
    p.add_argument("--csv", type=Path, required=True, help="the table")
    return p


def asked(parser):
    "Options, finished runs and their data, on one thread; the parser's error for runs of several data sets."
    o = parser.parse_args()
    torch.set_num_threads(1)
    runs = [load_run(f) for f in o.runs]
    if len(names := {r.cfg.dataset for r in runs}) != 1:
        parser.error(f"runs of {', '.join(sorted(names))}; expected one data set")
    return o, runs, load_data(runs[0].cfg.dataset)


def main():
    p = parser_of(__doc__)
    p.add_argument("--seeds", type=int, default=3, help="classifiers (3)")
    o, runs, data = asked(p)
    real, rows = real_images(data), []
    codes = [[run_codes(r, data, part) for part in ("train", "val")] for r in runs]
    sources = [sample_sources(r, *of, SETS[1:]) for r, of in zip(runs, codes)]
    for features, right in rulers(real, o.seeds):
        for run, drawn in zip(runs, sources):
            found = frechet_distances(run, data, real, features, drawn, 10_000, progress=False)
            distances = {f"distance_{s}": round(found[s], 4) for s in (*SETS, "floor")}
            rows.append(described(run) | dict(ruler=features.name, accuracy=right) | distances)
            print(*rows[-1].values(), flush=True)
            write_table(o.csv, rows)


if __name__ == "__main__":
    main()
