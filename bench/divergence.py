"D_CS of a batch of posteriors to a mixture, with its gradients."

import math
from unittest.mock import patch

import torch

from csrae_nb import kernels
from csrae_nb.divergence import cs_divergence
from csrae_nb.kernels import log_sum_exp
from csrae_nb.mixtures import GMM

from .interleaved import Work


def mixtures(B, K, D):
    "B posteriors about where an encoder would put them, a prior of K components; float32, leaves of a graph."
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, D, generator=g), torch.randn(B, D, generator=g) / 4 - 2
    p = torch.randn(K, D, generator=g), torch.randn(K, D, generator=g) / 4
    return [t.requires_grad_() for t in (*q, *p)]


def ours(mu, logvar, nu, logtau2):
    q, p = (
        GMM.gaussian(mu, logvar.exp()),
        GMM(nu.new_full(nu.shape[:1], -math.log(len(nu))), nu, logtau2.exp()),
    )
    return cs_divergence(q, p).mean()


def broadcast(mu, logvar, nu, logtau2):
    "The plain form: every pair by broadcasting, autograd for the rest."

    def log_z(m, v, n, w):
        s = v[:, None] + w
        return -0.5 * ((m[:, None] - n) ** 2 / s + (2 * math.pi * s).log()).sum(-1)

    var, tau2, logk = logvar.exp(), logtau2.exp(), math.log(len(nu))
    cross = log_z(mu, var, nu, tau2).logsumexp(1) - logk
    own = log_z(nu, tau2, nu, tau2).logsumexp((0, 1)) - 2 * logk
    return (-cross - 0.25 * (4 * math.pi * var).log().sum(1) + 0.5 * own).mean()


def distributions(mu, logvar, nu, logtau2):
    "As above, by torch.distributions."

    def log_z(m, v, n, w):
        return (
            torch.distributions.Normal(n, (v[:, None] + w).sqrt(), validate_args=False)
            .log_prob(m[:, None])
            .sum(-1)
        )

    var, tau2, logk = logvar.exp(), logtau2.exp(), math.log(len(nu))
    cross, own = (
        log_z(mu, var, nu, tau2).logsumexp(1) - logk,
        log_z(nu, tau2, nu, tau2).logsumexp((0, 1)) - 2 * logk,
    )
    return (-cross - 0.25 * (4 * math.pi * var).log().sum(1) + 0.5 * own).mean()


def with_gradients(loss, leaves):
    return lambda: torch.autograd.grad(loss(*leaves), leaves)


def sums(f):
    "A sum of f over rows of terms of which the smallest are e⁻²⁰⁰ of the largest, with its gradient."
    x = (-200 * torch.rand(400, 400, generator=torch.Generator().manual_seed(0))).requires_grad_()
    return lambda: torch.autograd.grad(f(x).sum(), x)


def without_numba(f):
    def run():
        with patch.object(kernels, "_compiled", lambda kind: None):
            return f()

    return run


def works():
    def both(*size, aim=None, rounds=15):
        leaves, (B, K, D) = mixtures(*size), size
        return Work(
            f"D_CS and gradients, B={B} K={K} D={D}",
            with_gradients(ours, leaves),
            {"broadcasting": (with_gradients(broadcast, leaves), aim)},
            rounds,
            dict(B=B, K=K, D=D),
            warm=True,
        )

    yield both(100, 400, 40, aim=5.0)
    leaves = mixtures(100, 400, 40)
    yield Work(
        "D_CS and gradients, B=100 K=400 D=40, by torch.distributions",
        with_gradients(ours, leaves),
        {"torch.distributions": (with_gradients(distributions, leaves), None)},
        warm=True,
    )
    yield Work(
        "D_CS and gradients, B=100 K=400 D=40, ours without numba",
        without_numba(with_gradients(ours, leaves)),
        {"broadcasting": (with_gradients(broadcast, leaves), 1.6)},
        warm=True,
    )
    yield both(100, 1000, 128, aim=25.0, rounds=3)
    yield Work(
        "log-sum-exp and gradients, 400 × 400, terms far apart",
        sums(log_sum_exp),
        {"torch.logsumexp": (sums(lambda x: x.logsumexp(-1)), None)},
        warm=True,
    )
    for K in (50, 100, 200, 800):
        yield both(100, K, 40, rounds=5)
    for D in (5, 10, 20, 80, 160):
        yield both(100, 200, D, rounds=5)
    for B in (25, 50, 400, 800):
        yield both(B, 200, 40, rounds=5)
