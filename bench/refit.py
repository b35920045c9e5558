"""`python -m bench.refit RUN … --csv FILE`: what one step of EM after training is worth to a prior.

Each prior as trained, after one step with its own variances, after one with full covariances and after five,
and a hundred Gaussians of full covariance fitted to the same codes. Rows are those of `bench.expost`, with
log p(x) of the first test images and the seconds that the mixture took."""

import time

import torch
from tqdm.auto import tqdm

from csrae_nb.evaluation import expost_mixture, run_codes, write_table
from csrae_nb.files import generator
from csrae_nb.results import read_rows

from .expost import images_to_compare, measured
from .rulers import asked, described, parser_of

IMAGES, DRAWS, FITTED = 1000, 500, 100  # test images and draws of log p(x); components that are fitted
KEY = "dataset", "model", "prior", "components", "objective", "queue", "latent_dim"
KEY += "weight", "epochs", "seed", "source"


def mixtures(run, codes):
    "What samples are drawn from: its name, and a function that gives it."
    prior = run.model.prior
    yield "prior", prior
    if len(prior().logw) > 1:
        yield "diagonal step", lambda: prior.refit(codes)
        yield "full step", lambda: prior.refit(codes, full=True)
        yield "five full steps", lambda: prior.refit(codes, 5, full=True)
    yield "full, fitted", lambda: expost_mixture(codes, FITTED, run.cfg.seed, full=True)


def log_likelihoods(run, data, source):
    "Mean log p(x) of the first test images, in nats."
    x, g = data.fixed("test")[:IMAGES], generator(run.cfg.seed, "log-likelihood")
    return run.model.log_likelihood(x, DRAWS, g, prior=source).mean().item()


@torch.no_grad()
def main():
    o, runs, data = asked(parser_of(__doc__))
    against = images_to_compare(data)
    rows = read_rows(o.csv, KEY)
    done = {tuple(r[k] for k in KEY) for r in rows}
    for run in tqdm(runs):
        codes, val = (run_codes(run, data, part) for part in ("train", "val"))
        for name, make in mixtures(run, codes):
            row = described(run) | dict(epochs=run.cfg.epochs, source=name)
            if tuple(row[k] for k in KEY) in done:
                continue
            began = time.perf_counter()
            source = make()
            row["seconds"] = round(time.perf_counter() - began, 1)
            row["log_density"] = round(source.log_prob(val).mean().item(), 3)
            row["log_likelihood"] = round(log_likelihoods(run, data, source), 3)
            rows.append(row | measured(run, source, *against))
            write_table(o.csv, rows)


if __name__ == "__main__":
    main()
