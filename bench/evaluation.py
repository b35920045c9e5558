"Log-likelihood, pythae's in a process of its own, and Fréchet distance."

import contextlib
import io
from copy import deepcopy

import torch
from scipy.linalg import sqrtm

from csrae_nb.catalogue import load_data
from csrae_nb.metrics import Statistics, frechet_distance
from csrae_nb.process import cpu_threads

from .interleaved import Elsewhere, Work
from .pythae_models import like
from .training import SHAPE, config, epoch, images


def nll_of_pythae(model, x):
    "pythae's estimate of log p(x) as a function."
    theirs = like(model, SHAPE).eval()

    def run():
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            return theirs.get_nll(x, 5000, 100)

    return run


def statistics(F, n=10_000):
    x = (
        torch.randn(n, F, generator=torch.Generator().manual_seed(0))
        @ torch.randn(F, F, generator=torch.Generator().manual_seed(1))
        / F**0.5
    )
    x = x.double()
    return Statistics(x.mean(0), x.T.cov(), n)


def matrix_root(a, b):
    "As pytorch-fid does it."
    return (
        (a.mean - b.mean).square().sum()
        + a.cov.trace()
        + b.cov.trace()
        - 2 * torch.from_numpy(sqrtm((a.cov @ b.cov).numpy()).real).trace()
    ).item()


def works():
    x = load_data(images(), "bernoulli")
    model = epoch(config("MixtureCSRAE", prior="vamp"), x)[1].eval()
    few = x.x_test[:2]
    other = Elsewhere(nll_of_pythae, deepcopy(model), few)

    def ours():
        with cpu_threads(1):
            return model.log_likelihood(few, 5000).mean().item()

    a, b = ours(), other()
    assert abs(a - b) < 1, f"log-likelihoods differ: {a} and {b}"
    yield Work(
        "log p(x) of 2 images, S=5000, vamp K=400", ours, {"pythae's get_nll": (other, 10.0)}, rounds=5
    )
    s, t = statistics(2048), statistics(2048, 9000)
    assert abs(frechet_distance(s, t) - matrix_root(s, t)) < 1e-3 * frechet_distance(s, t)
    yield Work(
        "Fréchet distance, 2,048 features",
        lambda: frechet_distance(s, t),
        {"scipy's sqrtm": (lambda: matrix_root(s, t), 5.0)},
        rounds=3,
    )
