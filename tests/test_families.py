"Overlaps of other families than Gaussians, and families of one's own."

import math

import pytest
import torch
from torch.distributions import Categorical, Cauchy, Independent, Laplace, MixtureSameFamily
from torch.distributions import MultivariateNormal, Normal, Uniform

from bench import factors
from csrae_nb.divergence import OVERLAPS, cs_divergence, log_overlap, register_overlap
from csrae_nb.mixtures import GMM, pairwise_log_overlap
from csrae_nb.priors import full_em_step


def laplaces(q, p):
    "log ∫ qp of Laplace densities of different scales."
    d, a, b = (q.loc - p.loc).abs(), q.scale, p.scale
    return ((a * (-d / a).exp() - b * (-d / b).exp()) / (2 * (a**2 - b**2))).log()


def test_a_family_of_ones_own(monkeypatch):
    "Registered by its overlap on the line, it has D_CS of products and mixtures, against a grid."
    monkeypatch.setattr("csrae_nb.divergence.OVERLAPS", dict(OVERLAPS))
    q, p = Laplace(torch.tensor([0.0, 2.0]).double(), 0.5), Laplace(torch.tensor([1.0, -1.0]).double(), 0.7)
    with pytest.raises(
        ValueError, match="overlap of Laplace with Laplace is not known; register_overlap adds"
    ):
        log_overlap(q, p)
    register_overlap(Laplace, Laplace)(laplaces)
    x = torch.linspace(-30, 30, 600_001).double()
    mixed = [MixtureSameFamily(Categorical(logits=torch.tensor([0.0, 1.0]).double()), d) for d in (q, p)]
    a, b = (d.log_prob(x).exp() for d in mixed)
    assert log_overlap(*mixed).exp().item() == pytest.approx(torch.trapezoid(a * b, x).item(), rel=1e-6)
    whole = log_overlap(Independent(q, 1), Independent(p, 1))
    assert whole.item() == pytest.approx(laplaces(q, p).sum().item(), rel=1e-12)


def test_gradients_and_batches_of_other_families():
    "Of a Gaussian to a box and to Cauchy mixtures: autograd against differences, vmap against a loop."

    def boxed(mu, s, low):
        return log_overlap(Normal(mu, s, validate_args=False), Uniform(low, low + 2, validate_args=False))

    def heavy(mu, s, low):
        shares = Categorical(logits=torch.stack([mu, low]), validate_args=False)
        q = MixtureSameFamily(
            shares, Cauchy(torch.stack([mu, low]), s, validate_args=False), validate_args=False
        )
        return cs_divergence(q, Cauchy(low, 0.5 + s, validate_args=False))

    at = [torch.tensor([0.3, -9.0, 40.0]), torch.tensor([0.7, 1.0, 2.0]), torch.tensor([-0.5, 1.0, 3.0])]
    at = [t.double().requires_grad_() for t in at]
    for f in (boxed, heavy):
        together = torch.func.vmap(f)(*at)
        for i, row in enumerate(zip(*at)):
            assert together[i].item() == pytest.approx(f(*row).item(), rel=1e-12)
            assert torch.autograd.gradcheck(f, row)
    low, far = torch.tensor([0.0]), torch.tensor([5.0])
    apart = cs_divergence(Uniform(low, low + 1), Uniform(far, far + 1))
    assert apart.item() == float("inf")  # they share nothing


def test_what_has_no_overlap_is_refused():
    full = MultivariateNormal(torch.zeros(2), torch.eye(2))
    box = Independent(Uniform(torch.zeros(2), torch.ones(2)), 1)
    with pytest.raises(ValueError, match="overlap of MultivariateNormal with Uniform is not known"):
        cs_divergence(full, box)
    with pytest.raises(ValueError, match="events of shape \\(3,\\), p of \\(2,\\)"):
        cs_divergence(GMM.gaussian(torch.zeros(3), torch.ones(3)), box)
    mixture = GMM.gaussian(torch.zeros(2), torch.ones(2))
    assert log_overlap(mixture, box).item() == pytest.approx(2 * math.log(0.3413447), rel=1e-5)


def test_stretched_gaussians_against_full_covariances():
    "The overlaps that `bench.factors` trains with, and a step of EM from there, which raises the density."
    stretched = factors.Stretched(7, 3, torch.Generator().manual_seed(0)).double()
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    with torch.no_grad():
        stretched.U.copy_(draw(7, 20, 3))
        stretched.logvar.copy_(draw(7, 20))
        stretched.logits.copy_(draw(7))
    mu, var, (logw, *parts), p = draw(5, 20), draw(5, 20).exp(), stretched(), stretched.mixture()
    pairs = pairwise_log_overlap(GMM.gaussian(mu, var).aggregate(), p)
    torch.testing.assert_close(factors.to_each(mu, var, *parts), pairs.T)
    torch.testing.assert_close(factors.of_pairs(logw, *parts), log_overlap(p, p))
    codes = draw(3000, 20)
    before, after = (m.log_prob(codes.to(m.mu.dtype)).mean() for m in (p, full_em_step(p, codes)))
    assert after > before
