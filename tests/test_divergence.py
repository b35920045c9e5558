"The divergence against oracles and properties that need many cases, or more memory than a notebook takes."

import math
import re
import sys
import warnings
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import quad
from torch.distributions import (
    Categorical,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from csrae_nb import kernels
from csrae_nb.divergence import cs_divergence, kl_divergence, log_overlap
from csrae_nb.kernels import BLOCK
from csrae_nb.mixtures import GMM, FullGMM, as_gmm, as_mixture, pairwise_log_overlap, unchecked

torch.set_num_threads(1)
compiled = kernels._compiled.__wrapped__


@pytest.fixture(params=["blocks", "loops"], autouse=True, scope="module")
def form(request):
    "Everything is tested twice: by torch in blocks, and by numba's loops whatever the size."
    if request.param == "loops":
        pytest.importorskip("numba")
    with pytest.MonkeyPatch.context() as m:
        if request.param == "blocks":
            m.setattr(kernels, "_compiled", lambda kind: None)
        m.setattr(kernels, "SMALL", 1)
        yield request.param


@st.composite
def mixtures(draw, D, batch=()):
    "A mixture of 1 to 5 components, weights down to e⁻⁸, variances from 1e-4 to 1e4, means within 100."
    N, g = draw(st.integers(1, 5)), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    u = lambda *s: torch.rand(*batch, *s, generator=g, dtype=torch.float64)
    return GMM(
        (8 * u(N)).log_softmax(-1),
        (u(N, D) - 0.5) * 10 ** draw(st.floats(-1, 2)),
        10 ** (draw(st.floats(-3, 3)) + 2 * u(N, D) - 1),
    )


pairs = st.integers(1, 6).flatmap(lambda D: st.tuples(mixtures(D), mixtures(D)))


def close(a, b, scale=1.0):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * (1 + float(scale)))


def size(q, p):
    return max(log_overlap(a, b).abs().max() for a, b in ((q, p), (q, q), (p, p)))


@given(pairs)
@settings(max_examples=200, deadline=None)
def test_it_is_a_divergence(qp):
    q, p = qp
    D, s = cs_divergence(q, p), size(*qp)
    close(D, cs_divergence(p, q), s)  # symmetric
    assert D >= -1e-9 * (1 + s)  # not negative
    close(cs_divergence(q, q), torch.zeros_like(D), s)  # zero at equality
    if D < 1e-12:
        close(
            q.log_prob(q.mu), p.log_prob(q.mu), 1e4 * (1 + s)
        )  # and only there: D grows with the square of a small difference


@given(pairs, st.floats(-50, 50), st.floats(-3, 3), st.randoms())
@settings(max_examples=200, deadline=None)
def test_what_it_does_not_depend_on(qp, shift, log_a, rnd):
    q, p = qp
    D, s, a = cs_divergence(q, p), size(*qp), math.exp(log_a)
    moved = [GMM(g.logw, a * g.mu + shift, a * a * g.var) for g in qp]
    close(cs_divergence(*moved), D, 1e3 * (s + size(*moved)))  # units and origin of x
    order = list(range(len(p.logw)))
    rnd.shuffle(order)
    close(cs_divergence(q, GMM(p.logw[order], p.mu[order], p.var[order])), D, s)  # the order of components
    halves = GMM(torch.cat([p.logw, p.logw]) - math.log(2), p.mu.repeat(2, 1), p.var.repeat(2, 1))
    close(cs_divergence(q, halves), D, s)  # how a density is written as a mixture


@given(st.tuples(mixtures(3, (4, 1)), mixtures(3, (5,))))
@settings(max_examples=50, deadline=None)
def test_a_batch_is_its_elements(qp):
    q, p = qp
    D = cs_divergence(q, p)
    assert D.shape == (4, 5)
    at = lambda g, *i: GMM(g.logw[i], g.mu[i], g.var[i])
    close(D[2, 3], cs_divergence(at(q, 2, 0), at(p, 3)), size(q, p))


@pytest.mark.parametrize("seed", range(5))
def test_two_dimensions_by_quadrature(seed):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)
    q, p = (GMM(r(N).log_softmax(-1), 6 * r(N, 2) - 3, 0.2 + r(N, 2)) for N in (2, 3))
    x = torch.linspace(-12, 12, 601, dtype=torch.float64)
    xy = torch.cartesian_prod(x, x)
    dq, dp = (d.to_distribution().log_prob(xy).exp() for d in (q, p))
    integral = lambda f: f.sum().log() + 2 * math.log(24 / 600)
    torch.testing.assert_close(
        cs_divergence(q, p),
        -integral(dq * dp) + 0.5 * integral(dq * dq) + 0.5 * integral(dp * dp),
        rtol=1e-8,
        atol=1e-8,
    )


EQ30 = GMM(
    torch.tensor([0.5, 0.5], dtype=torch.float64).log(),
    torch.tensor([[-3.0], [3.0]], dtype=torch.float64),
    torch.ones(2, 1, dtype=torch.float64),
)


def even(mu, var):
    return GMM.mixture(mu.new_full(mu.shape[:-1], 1 / mu.shape[-2]), mu, var)


def gaussian(mean, std):
    return GMM.gaussian(
        torch.tensor([mean], dtype=torch.float64), torch.tensor([std**2], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "mean, std, value", [(0.0, 4.24916, 0.293382), (2.99924, 1.00227, 0.346510), (0.0, 10**0.5, 0.339307)]
)
def test_known_values_of_eq30(mean, std, value):
    "Best single Gaussian, the local optimum beside it, and the moment-matched one."
    assert abs(cs_divergence(gaussian(mean, std), EQ30).item() - value) < 1e-6


@pytest.mark.parametrize(
    "mean, std, value", [(0.0, 4.24916, 0.293382), (2.99924, 1.00227, 0.346510), (0.0, 10**0.5, 0.339307)]
)
def test_known_values_of_eq30_with_matrices(mean, std, value):
    q = MultivariateNormal(
        torch.tensor([mean], dtype=torch.float64), torch.tensor([[std**2]], dtype=torch.float64)
    )
    p = MixtureSameFamily(Categorical(logits=EQ30.logw), MultivariateNormal(EQ30.mu, EQ30.var.diag_embed()))
    for a in (q, gaussian(mean, std)):
        for b in (p, EQ30):
            assert abs(cs_divergence(a, b).item() - value) < 1e-6


def test_one_dimension_by_adaptive_quadrature():
    q = gaussian(1.0, 0.7)
    f = lambda g, x: g.log_prob(torch.tensor([x], dtype=torch.float64)).exp().item()
    i = lambda a, b: math.log(quad(lambda x: f(a, x) * f(b, x), -15, 15, limit=200)[0])
    assert abs(cs_divergence(q, EQ30).item() - (-i(q, EQ30) + 0.5 * i(q, q) + 0.5 * i(EQ30, EQ30))) < 1e-8


def test_monte_carlo_in_many_dimensions():
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    q, p = (GMM(r(N).log_softmax(-1), r(N, 10), (0.3 * r(N, 10)).exp()) for N in (3, 4))
    for a, b in ((q, p), (p, p)):
        w = b.log_prob(a.sample(200_000, g)).exp()
        assert abs(w.mean() - log_overlap(a, b).exp()) < 4 * w.std() / len(w) ** 0.5


def test_gradients_of_everything():
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True)
    leaves = r(2, 3), r(2, 3, 2), r(2, 3, 2), r(4), r(4, 2), r(4, 2)

    def D(lq, mq, sq, lp, mp, sp):
        return cs_divergence(GMM(lq.log_softmax(-1), mq, sq.exp()), GMM(lp.log_softmax(-1), mp, sp.exp()))

    assert torch.autograd.gradcheck(D, leaves)


def test_second_derivatives():
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True)

    def D(mq, sq, mp, sp):
        return cs_divergence(GMM.gaussian(mq, sq.exp()), GMM(mp.new_full((4,), -math.log(4)), mp, sp.exp()))

    assert torch.autograd.gradgradcheck(D, (r(3, 2), r(3, 2), r(4, 2), r(4, 2)))
    mu, one = (
        r(2),
        torch.ones(2, dtype=torch.float64),
    )  # −log ∫ q p of two unit Gaussians is |μ|²/4, and a constant
    hessian = torch.autograd.functional.hessian(
        lambda mu: -log_overlap(GMM.gaussian(mu, one), GMM.gaussian(0 * one, one)), mu
    )
    torch.testing.assert_close(hessian, torch.eye(2, dtype=torch.float64) / 2)


def test_what_loops_do_again_in_the_plain_way(form):
    "Variances that are too large for a product of four, 0 or negative, and gradients that are infinite."
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g)
    q, p = even(r(3, 6), r(3, 6).exp()), even(r(5, 6), r(5, 6).exp())
    p.var[1], q.var[2, :2], p.var[2, :2] = 1e20, -9.0, 0.0
    z = pairwise_log_overlap(q, p)
    plain = (
        torch.distributions.Normal(p.mu, (q.var[:, None] + p.var).double().sqrt(), validate_args=False)
        .log_prob(q.mu[:, None])
        .sum(-1)
    )
    torch.testing.assert_close(z, plain.float(), equal_nan=True)
    assert z[2].isnan().tolist() == [True, False, True, True, True] and z[:2].isfinite().all()
    mu = q.mu[:2].clone().requires_grad_()
    out = pairwise_log_overlap(even(mu, q.var[:2]), p)
    (grad,) = torch.autograd.grad(out, mu, torch.tensor([[math.inf, 1.0, 1.0, 1.0, 1.0], [1.0] * 5]))
    assert not grad[0].isfinite().any() and grad[1].isfinite().all()


def test_loops_of_rows_are_the_blocks(form):
    "One row, pairs of rows and an odd one; few and many pairs that count, and others of each side."
    if form == "blocks":
        pytest.skip("these are what the loops are compared with")
    r = torch.Generator().manual_seed(0)
    normal = lambda *s: torch.randn(*s, generator=r, dtype=torch.float64)
    some = lambda share, *s: normal(*s) * (torch.rand(*s, generator=r) < share)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    for (N, M), share in product([(1, 1), (1, 40), (2, 3), (3, 40), (5, 5), (40, 41)], (0.01, 0.2, 1)):
        left, right = ((normal(2, n, 6), normal(2, n, 6).exp()) for n in (N, M))
        right[1][1] *= 1e60  # of the batch's second element only
        args = *left, *right
        close(kernels._log_z_by_loops(*args, False), kernels._log_z(*args, False))
        for sides in (1, 2):
            g = some(share, sides, 2, N, M)
            close(kernels._gradients_by_loops(*args, g, False), kernels._log_z_gradients(*args, g, False))
        args = *left, *left, some(share, 1, 2, N, N), True
        loops, blocks = kernels._gradients_by_loops(*args), kernels._log_z_gradients(*args)
        for i in (0, 1):  # of means and of variances, which are both sides'
            close(loops[i] + loops[i + 2], blocks[i] + blocks[i + 2])


def test_variances_whose_product_leaves_double_precision(form):
    q, p = (
        GMM(
            torch.zeros(1, dtype=torch.float64),
            torch.zeros(1, 8, dtype=torch.float64),
            torch.full((1, 8), v, dtype=torch.float64),
        )
        for v in (1e-60, 1e60)
    )
    for a in (q, p):
        torch.testing.assert_close(
            log_overlap(a, a).item(), -4 * math.log(4 * math.pi * a.var[0, 0].item()), rtol=1e-12, atol=0
        )


def test_what_is_not_finite_shows_in_value_and_gradient():
    mu = torch.zeros(3, 4).index_fill(0, torch.tensor([1]), math.nan).requires_grad_()
    p = even(torch.zeros(5, 4), torch.ones(5, 4))
    with unchecked():  # which would refuse them
        q = GMM.gaussian(mu, torch.ones(3, 4))
    value = log_overlap(q, p)
    value.sum().backward()
    assert value.isnan().tolist() == [False, True, False] and mu.grad.isnan().any(1).tolist() == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("Bq, Bp", [((0,), ()), ((0,), (0,)), ((3, 0), (1,)), ((2,), ())])
def test_empty_batches_and_strided_tensors(Bq, Bp):
    g = torch.Generator().manual_seed(0)
    make = lambda *B: even(torch.randn(*B, 2, 3, generator=g).mT, torch.rand(*B, 2, 3, generator=g).mT + 0.1)
    q, p = make(*Bq), make(*Bp)
    mu = q.mu.requires_grad_()
    D = cs_divergence(q, p)
    D.sum().backward()
    assert D.shape == torch.broadcast_shapes(Bq, Bp) and mu.grad.shape == mu.shape and D.isfinite().all()


def test_a_broken_numba_is_said_and_done_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", type(sys)("numba"))  # a numba without njit
    with pytest.warns(UserWarning, match="numba is installed but does not work"):
        assert compiled("f4") is None
    monkeypatch.setitem(sys.modules, "numba", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled("f4") is None


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_truncated_numba_cache_is_said_and_done_without(form, suffix, tmp_path, monkeypatch):
    if form == "blocks":
        pytest.skip("the loops only")
    monkeypatch.setattr(pytest.importorskip("numba").config, "CACHE_DIR", str(tmp_path))
    compiled("f4")
    files = [*tmp_path.rglob(f"*_loops-*.{suffix}")]
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.warns(
        UserWarning, match=f"cannot use what it has compiled before.*{files[0].parent}"
    ) as said:
        loops = compiled("f4")
    assert len(said) == 1 and loops
    g = torch.Generator().manual_seed(0)
    q, p = (even(torch.randn(5, 7, generator=g), torch.rand(5, 7, generator=g) + 0.1) for _ in range(2))
    monkeypatch.setattr(kernels, "_compiled", lambda kind: loops)
    by_loops = cs_divergence(q, p)
    monkeypatch.setattr(kernels, "_compiled", lambda kind: None)
    torch.testing.assert_close(by_loops, cs_divergence(q, p))


HALVES = [-math.log(2)] * 2


@pytest.mark.parametrize(
    "logw, var, says",
    [
        ([0.25, 0.75], 1.0, "exp(logw) sums to 3.401"),
        ([0.0, 0.0], 1.0, "sums to 2"),
        ([math.nan, 0.0], 1.0, "logw holds 1 NaN among 2 numbers"),
        ([-math.inf] * 2, 1.0, "sums to 0"),
        (HALVES, -1.0, "the least of these is -1"),
        (HALVES, 0.0, "the least of these is 0"),
        (HALVES, math.nan, "var holds 2 NaN among 6 numbers"),
        (HALVES, math.inf, "the largest of these is inf"),
    ],
)
def test_a_mixture_that_is_none_is_refused(logw, var, says):
    sides = torch.tensor(logw), torch.zeros(2, 3), torch.ones(2, 3).index_fill(1, torch.tensor([1]), var)
    full = {"var holds": "cov holds 2 NaN", "the": "infinite or not positive definite"}
    full = next((v for k, v in full.items() if says.startswith(k)), says)
    with pytest.raises(ValueError, match=re.escape(says)):
        GMM(*sides)
    with pytest.raises(ValueError, match=re.escape(full)):
        FullGMM(*sides[:2], sides[2].diag_embed())
    with unchecked():
        assert GMM(*sides).var is sides[2]
    with pytest.raises(ValueError, match=re.escape(says.split(" holds")[0])):
        GMM(*(t.expand(4, *t.shape) for t in sides))


def test_weights_that_are_nearly_one_are_taken():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for N in (1, 3, 1000):
            GMM(torch.linspace(-3, 3, N).log_softmax(-1).to(dtype), torch.zeros(N, 1), torch.ones(N, 1))


@pytest.mark.parametrize(
    "make, w",
    [
        (GMM, [0.0, -math.inf, -math.inf]),
        (GMM.mixture, [1.0, 0.0, 0.0]),
        (lambda logits, mu, var: GMM(logits.log_softmax(-1), mu, var), [1.0, -math.inf, -math.inf]),
    ],
)
def test_a_weight_of_zero_has_finite_gradients(make, w):
    leaf = lambda t: torch.as_tensor(t, dtype=torch.float64).requires_grad_()
    leaves = leaf(w), leaf(torch.zeros(3, 1)), leaf(torch.ones(3, 1))
    q, p, z = gaussian(1.0, 1.0), make(*leaves), torch.ones(4, 1, dtype=torch.float64)
    for value in (cs_divergence(q, p), cs_divergence(p, q), p.log_prob(z).sum(), log_overlap(p, p)):
        assert value.isfinite()
        for grad in torch.autograd.grad(value, leaves, retain_graph=True):
            assert grad.isfinite().all() and grad[1:].abs().max() < 1e-20


def test_the_mean_of_a_mixture():
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    one = GMM.gaussian(r(5, 3), r(5, 3).exp())
    assert torch.equal(one.mean, one.mu[..., 0, :]) and torch.equal(FullGMM.of(one).mean, one.mean)
    p = GMM.mixture(weights=r(6, 4).softmax(-1), mu=r(4, 3), var=r(4, 3).exp())
    assert p.mean.shape == (6, 3)
    close(p.mean, p.to_distribution().mean)
    close(FullGMM.of(p).mean, p.mean)


def test_draws_of_full_covariances_have_their_moments():
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    p = FullGMM(r(3).log_softmax(-1), 2 * r(3, 2), matrices(g, 3, 2))
    off = p.mu - p.mean
    within_and_between = p.cov + off[:, :, None] * off[:, None]
    cov = (p.logw.exp()[:, None, None] * within_and_between).sum(0)
    for z, mean, cov in (
        (p.sample(400_000, g), p.mean, cov),
        (p.sample(400_000, g, component=2), p.mu[2], p.cov[2]),
    ):
        assert z.shape == (400_000, 2)
        torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.01 * cov.trace().sqrt().item())
        torch.testing.assert_close(z.T.cov(), cov, rtol=0, atol=0.01 * cov.trace().item())
    with pytest.raises(ValueError, match="expected 0 to 2"):
        p.sample(1, component=3)
    with pytest.raises(ValueError, match="not a batch"):
        FullGMM(p.logw.expand(2, 3), p.mu, p.cov).sample(1)


def test_distributions_in_and_out():
    q = Independent(Normal(torch.randn(5, 3), torch.rand(5, 3) + 0.1), 1)
    p = MixtureSameFamily(
        Categorical(torch.tensor([0.2, 0.8])),
        Independent(Normal(torch.randn(2, 3), torch.rand(2, 3) + 0.1), 1),
    )
    D = cs_divergence(q, p)
    assert D.shape == torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    torch.testing.assert_close(D, cs_divergence(as_gmm(q), as_gmm(p)))
    torch.testing.assert_close(as_gmm(p).to_distribution().log_prob(q.mean), p.log_prob(q.mean))
    std = Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
    torch.testing.assert_close(kl_divergence(q, std), torch.distributions.kl_divergence(q, std))


def matrices(g, *shape):
    A = torch.randn(*shape, shape[-1], generator=g, dtype=torch.float64)
    return A @ A.mT + 0.3 * torch.eye(shape[-1])


@pytest.mark.parametrize("Bq, Bp", [((), ()), ((5,), ()), ((), (5,)), ((4, 1), (5,))])
def test_full_covariances_by_monte_carlo_and_element_by_element(Bq, Bp):
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    D = 3
    q, p = (
        MixtureSameFamily(
            Categorical(logits=r(*B, N)), MultivariateNormal(r(*B, N, D), matrices(g, *B, N, D))
        )
        for B, N in ((Bq, 2), (Bp, 3))
    )
    value = cs_divergence(q, p)
    assert value.shape == torch.broadcast_shapes(Bq, Bp)
    at = lambda m, i: FullGMM(
        *(t.expand(*value.shape, *t.shape[-n:])[i] for t, n in zip(vars(as_mixture(m)).values(), (1, 2, 3)))
    )
    for i in ((0,) * value.ndim, (-1,) * value.ndim):
        close(value[i], cs_divergence(at(q, i), at(p, i)))
    first = lambda m: MixtureSameFamily(
        Categorical(logits=at(m, i).logw), MultivariateNormal(at(m, i).mu, at(m, i).cov)
    )
    torch.manual_seed(0)
    w = first(p).log_prob(first(q).sample((200_000,))).exp()
    assert abs(w.mean() - log_overlap(at(q, i), at(p, i)).exp()) < 4 * w.std() / len(w) ** 0.5
    z = r(7, D)
    torch.testing.assert_close(at(p, i).log_prob(z), first(p).log_prob(z))


def test_full_and_diagonal_covariances_meet():
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    q, p = (GMM(r(N).log_softmax(-1), r(N, 4), r(N, 4).exp()) for N in (2, 3))
    full = FullGMM.of(p)
    close(cs_divergence(q, full), cs_divergence(q, p))
    close(cs_divergence(full, p), torch.zeros((), dtype=torch.float64))
    low = LowRankMultivariateNormal(r(4), r(4, 1), r(4).exp())
    close(cs_divergence(low, p), cs_divergence(MultivariateNormal(low.loc, low.covariance_matrix), full))
    close(cs_divergence(Independent(low, 0), p), cs_divergence(low, p))
    one = MultivariateNormal(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    close(kl_divergence(low, one), torch.distributions.kl_divergence(low, one))
    close(kl_divergence(low, p, z := r(4)), low.log_prob(z) - p.log_prob(z))
    with pytest.raises(ValueError, match="q has D=4, p has D=2"):
        cs_divergence(full, MultivariateNormal(torch.zeros(2), torch.eye(2)))
    with pytest.raises(ValueError, match="no mixture of Gaussians"):
        cs_divergence(Independent(MultivariateNormal(torch.zeros(5, 4), torch.eye(4)), 1), p)


def test_gradients_of_full_covariances():
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True)
    leaves = r(2), r(2, 3), r(2, 3, 3), r(4), r(4, 3), r(4, 3)

    def D(lq, mq, A, lp, mp, sp):
        return cs_divergence(
            FullGMM(lq.log_softmax(-1), mq, A @ A.mT + 0.3 * torch.eye(3)),
            GMM(lp.log_softmax(-1), mp, sp.exp()),
        )

    assert torch.autograd.gradcheck(D, leaves)


@pytest.mark.parametrize("K, D", [(1000, 1000), (1, 1000), (1000, 1)])
def test_extremes_are_finite_in_single_precision(K, D):
    "Means 1e4 apart, variances from 1e-10 to 1e10, a thousand components in a thousand dimensions."
    g = torch.Generator().manual_seed(0)
    u = lambda *s: torch.rand(*s, generator=g)
    logw, mu, logvar = u(K).log_softmax(-1), 1e4 * u(K, D), math.log(10) * (20 * u(K, 1) - 10 + 0 * u(K, D))
    q_mu, q_logvar = 1e4 * u(3, D), math.log(10) * torch.tensor([-10.0, 0.0, 10.0])[:, None].expand(3, D)
    leaves = [t.clone().requires_grad_() for t in (logw, mu, logvar, q_mu, q_logvar)]
    w, m, v, qm, qv = leaves
    value = cs_divergence(GMM.gaussian(qm, qv.exp()), GMM(w, m, v.exp()))
    value.sum().backward()
    assert value.isfinite().all() and all(t.grad.isfinite().all() for t in leaves)


@pytest.mark.parametrize("K, D", [(400, 40), (300, 128)])
def test_single_precision_against_double(K, D):
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g)
    sides = r(100, D), r(100, D) / 4 - 2, r(K, D), r(K, D) / 4

    def value_and_gradients(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in sides]
        mu, logvar, nu, logtau2 = leaves
        q, p = GMM.gaussian(mu, logvar.exp()), GMM(nu.new_full((K,), -math.log(K)), nu, logtau2.exp())
        D = cs_divergence(q, p)
        return (
            max(log_overlap(q, p).abs().max(), log_overlap(q, q).abs().max()),
            D,
            torch.autograd.grad(D.sum(), leaves),
        )

    (largest, D64, g64), (_, D32, g32) = map(value_and_gradients, (torch.float64, torch.float32))
    assert (D32 - D64).abs().max() < 1e-6 * largest
    for a, b in zip(g32, g64):
        assert (a - b).abs().max() < 2e-5 * b.abs().max()


class Largest(TorchDispatchMode):
    "Sees every tensor that is made, forwards and backwards, and remembers the largest."

    numel = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_the_self_term_takes_no_K2D_memory():
    "numba's loops make nothing that torch does not see but three rows."
    K, D = 600, 50  # K²D is 18 million
    mu, var = torch.randn(K, D, requires_grad=True), torch.rand(K, D, requires_grad=True)
    with Largest() as seen:
        log_overlap(*[GMM(torch.full((K,), -math.log(K)), mu, var + 0.1)] * 2).backward()
    assert seen.numel <= max(K * K, BLOCK)


def test_a_normal_is_of_one_dimension_and_the_error_says_what_is_not():
    many = Normal(torch.zeros(5, 3), 1.0)
    p = GMM.gaussian(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="both must live in one space; a Normal is of one dimension, Indep"):
        cs_divergence(many, p)
    assert cs_divergence(Independent(many, 1), p).shape == (5,)
