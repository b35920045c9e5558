"""`python -m bench.refit RUN … --csv FILE`: what one step of EM after training is worth to a prior.

Each prior as trained, after one step with its own variances, after one with full covariances and after five,
and a hundred Gaussians of full covariance fitted to the same codes. Rows are those of `bench.expost`, with
log p(x) of the first test images and the seconds that the mixture took."""

from functools import partial

from csrae_nb.evaluation import expost_mixture
from csrae_nb.files import generator

from .expost import fill

IMAGES, DRAWS, FITTED = 1000, 500, 100  # test images and draws of log p(x); components that are fitted
KEY = "dataset", "model", "prior", "components", "objective", "queue", "latent_dim"
KEY += "weight", "epochs", "seed", "source"


def mixtures(run, codes):
    "What samples are drawn from: its name, and a function that gives it."
    prior = run.model.prior
    yield dict(source="prior"), prior
    if len(prior().logw) > 1:
        yield dict(source="diagonal step"), partial(prior.refit, codes)
        yield dict(source="full step"), partial(prior.refit, codes, full=True)
        yield dict(source="five full steps"), partial(prior.refit, codes, 5, full=True)
    yield dict(source="full, fitted"), partial(expost_mixture, codes, FITTED, run.cfg.seed, full=True)


def likelihood(run, data, mixture, seconds):
    "Mean log p(x) of the first test images, in nats, and how long the mixture took."
    x, g = data.fixed("test")[:IMAGES], generator(run.cfg.seed, "log-likelihood")
    log_p = run.model.log_likelihood(x, DRAWS, g, prior=mixture).mean().item()
    return dict(seconds=round(seconds, 1), log_likelihood=round(log_p, 3))


if __name__ == "__main__":
    fill(__doc__, KEY, mixtures, likelihood)
