"Draws with gradients from mixtures: batches, dtypes, torch's distributions, transforms, values far apart."

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch import nn
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from csrae_nb import mixtures
from csrae_nb.aggregate import Aggregate
from csrae_nb.likelihoods import Bernoulli, Gaussian, Units
from csrae_nb.mixtures import GMM, FullGMM, Share, _moved, rsample
from csrae_nb.models import CSRAE, VAE
from csrae_nb.networks import Decoder, Encoder
from csrae_nb.priors import MoGPrior, Prior, StandardNormal, VampPrior, em_step, full_em, kmeans

torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def parts(*batch, N=3, D=2, dtype=torch.float64, seed=0):
    g = generator(seed)
    r = lambda *s: torch.randn(*batch, *s, generator=g, dtype=dtype)
    return r(N), r(N, D), (0.3 * r(N, D)).exp()


def mixture(logits, mu, sd):
    return GMM(logits.log_softmax(-1), mu, sd**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_every_draw_moves_with_the_means(batch, dtype):
    logits, mu, sd = (t.requires_grad_() for t in parts(*batch, dtype=dtype))
    z = mixture(logits, mu, sd).rsample(generator())
    assert z.shape == (*batch, 2) and z.dtype == dtype
    eps = 1e-3 if dtype == torch.float32 else 1e-9
    for d in range(2):
        moves, stretches = torch.autograd.grad(z[..., d].sum(), (mu, sd), retain_graph=True)
        wanted = torch.eye(2, dtype=dtype)[d].expand(*batch, 2)
        torch.testing.assert_close(moves.sum(-2), wanted, rtol=eps, atol=eps)
        whole = (moves * mu + stretches * sd).sum((-1, -2))
        torch.testing.assert_close(whole, z[..., d], rtol=eps, atol=10 * eps)


def test_the_gradient_to_the_weights_is_that_of_the_quantile():
    "In one dimension z is the u-quantile, which bisection finds."
    logits, mu, sd = parts(N=3, D=1)
    z = mixture(logits, mu, sd).rsample(generator(3))

    def quantile(logits, u):
        cdf = lambda z: (logits.softmax(-1) * Normal(mu[:, 0], sd[:, 0]).cdf(z)).sum()
        low, high = torch.tensor([-50.0, 50.0], dtype=torch.float64)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if cdf(middle) < u else (low, middle)
        return low

    u = (logits.softmax(-1) * Normal(mu[:, 0], sd[:, 0]).cdf(z)).sum()
    found = grad(lambda l: mixture(l, mu, sd).rsample(generator(3)).sum())(logits)
    for k in range(3):
        step = 1e-5 * torch.eye(3, dtype=torch.float64)[k]
        wanted = (quantile(logits + step, u) - quantile(logits - step, u)) / 2e-5
        torch.testing.assert_close(found[k], wanted, rtol=1e-5, atol=1e-7)


def test_one_component_draws_as_ever():
    mu, var = torch.randn(5, 3, generator=generator()), torch.rand(5, 3, generator=generator(1))
    z = GMM.gaussian(mu, var).rsample(generator(2))
    assert torch.equal(z, mu + var.sqrt() * torch.randn(5, 3, generator=generator(2)))


def test_draws_have_the_moments_of_the_mixture():
    g = mixture(*parts())
    z = rsample(g, (200_000,), generator())
    again = g.sample(200_000, generator(1))
    torch.testing.assert_close(z.mean(0), g.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(z.T.cov(), again.T.cov(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("event", [(), (2,)])
@pytest.mark.parametrize("batch", [(), (4,)])
def test_mixtures_of_torch_are_drawn_from_in_their_shape(batch, event):
    logits, mu, sd = parts(*batch, D=event[0] if event else 1)
    if not event:
        mu, sd = mu[..., 0], sd[..., 0]
    logits.requires_grad_()
    normals = Independent(Normal(mu, sd), 1) if event else Normal(mu, sd)
    d = MixtureSameFamily(Categorical(logits=logits), normals)
    z = rsample(d, (7,), generator())
    assert z.shape == d.sample((7,)).shape == (7, *batch, *event)
    assert torch.autograd.grad(z.sum(), logits)[0].abs().sum() > 0
    with pytest.raises(NotImplementedError):
        d.rsample()


def test_components_far_apart_give_finite_gradients():
    logits = torch.zeros(2, requires_grad=True)
    mu = torch.tensor([[-1e4, 0.0], [1e4, 0.0]], requires_grad=True)
    z = rsample(GMM(logits.log_softmax(-1), mu, torch.ones(2, 2)), (50,), generator())
    found = torch.autograd.grad(z.sum(), (logits, mu))
    assert all(t.isfinite().all() for t in found)


def test_processes_share_the_draws_of_a_batch():
    p = mixture(*parts(6))
    whole = p.rsample(generator())
    for i in range(3):
        own = GMM(p.logw[i::3], p.mu[i::3], p.var[i::3]).rsample(Share(generator(), i, 3))
        torch.testing.assert_close(own, whole[i::3])


def test_transforms_give_what_autograd_gives():
    logits, mu, sd = parts()

    def draw(logits, mu, sd):
        return mixture(logits, mu, sd).rsample(generator()).square().sum()

    wanted = torch.autograd.grad(draw(*(t.requires_grad_() for t in (logits, mu, sd))), (logits, mu, sd))
    found = grad(draw, (0, 1, 2))(*(t.detach() for t in (logits, mu, sd)))
    torch.testing.assert_close(found, wanted)
    batched = [t.detach().expand(4, *t.shape) for t in (logits, mu, sd)]
    each = vmap(lambda *p: mixture(*p).rsample(), randomness="different")(*batched)
    assert each.shape == (4, 2) and len(each[:, 0].unique()) == 4


@pytest.mark.parametrize("kind", [GMM, FullGMM])
def test_the_stratified_estimate_of_a_constant_has_no_noise(kind):
    g = kind.of(mixture(*parts(4))) if kind is FullGMM else mixture(*parts(4))
    torch.testing.assert_close(
        g.expect(lambda z: 0 * z[..., 0] + 5, generator()), torch.full((4,), 5.0).double()
    )


@pytest.mark.parametrize("deviation", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("apart", [3.0, 10.0])
def test_narrow_components_in_single_precision(deviation, apart):
    "Their log densities may be as low as −5·10⁷, against which a coordinate's own is not lost."
    mu = [[0.0, 0.0], [0.5 * deviation, apart]]
    found = []
    for dtype in (torch.float32, torch.float64):
        logw, means = torch.tensor([0.3, 0.7], dtype=dtype).log(), torch.tensor(mu, dtype=dtype)
        leaves = [t.requires_grad_() for t in (logw, means, torch.full_like(means, deviation**2))]
        at = deviation * torch.tensor([0.7, 0.3], dtype=dtype)
        z = _moved(*leaves, at) @ torch.tensor([1.0, 2.0], dtype=dtype)
        found.append(torch.autograd.grad(z, leaves))
    for single, double in zip(*found):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5 * double.abs().max().item())


def test_second_derivatives_are_refused():
    logits, mu, sd = parts()
    draw = lambda mu: mixture(logits, mu, sd).rsample(generator()).square().sum()
    assert jvp(draw, (mu,), (mu,))[1].isclose((grad(draw)(mu) * mu).sum())
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad(lambda mu: grad(draw)(mu).sum())(mu)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        jvp(grad(draw), (mu,), (mu,))
    leaf = mu.clone().requires_grad_()
    (first,) = torch.autograd.grad(draw(leaf), leaf, create_graph=True)
    torch.testing.assert_close(first, grad(draw)(mu))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), leaf)
    z = mixture(logits, mu, sd).rsample(generator())
    own = lambda mu: _moved(logits.log_softmax(-1), mu, sd**2, z).square().sum()
    for f in (jacfwd, jacrev):
        torch.testing.assert_close(f(own)(mu), grad(draw)(mu))
    for f in (jacfwd(jacrev(own)), jacrev(jacrev(own))):
        with pytest.raises(RuntimeError, match="first derivatives only"):
            f(mu)


def test_what_is_no_tensor_is_refused_and_trees_are_taken(shapes_unchecked):
    p = mixture(*parts())
    with pytest.raises(ValueError, match="three tensors, logw, mu and var; got ndarray, Tensor, Tensor"):
        GMM(p.logw.numpy(), p.mu, p.var)
    with pytest.raises(ValueError, match=r"one number; got ndarray \(3,\) and float \(\)"):
        GMM.gaussian(torch.zeros(3).numpy(), 1.0)
    many, z = mixture(*parts(4)), torch.ones(5, 2, dtype=torch.float64)
    torch.testing.assert_close(vmap(lambda g: g.mean)(many), many.mean)
    each = vmap(lambda g, z: g.log_prob(z), in_dims=(None, 0))(p, z)
    torch.testing.assert_close(each, p.log_prob(z))


class Full(Prior):
    def forward(self):
        return FullGMM(torch.zeros(1), torch.zeros(1, 2), torch.eye(2)[None])


ROWS = [[0.0] * 6] * 3


def small_model():
    return VAE(
        Encoder((6,), nn.Linear(6, 4)), Decoder(nn.Linear(2, 6), (1, 6)), StandardNormal(2), Bernoulli()
    )


@pytest.mark.parametrize(
    "do, says",
    [
        (lambda: MoGPrior(2.5, 3), "components=2.5, latent_dim=3; expected whole numbers from 1"),
        (lambda: StandardNormal(0), "latent_dim=0; expected a whole number from 1"),
        (lambda: VampPrior(nn.Identity(), (4,)), "pseudo_inputs is of type tuple; expected a tensor"),
        (
            lambda: MoGPrior(2, 2).init_from_codes(mixture(*parts(9))),
            "codes is of type GMM; expected a tensor",
        ),
        (
            lambda: MoGPrior(2, 2).init_from_codes(torch.ones(9)),
            r"codes have shape \(9,\); expected \(n, D\)",
        ),
        (lambda: kmeans(torch.ones(9, 2).long(), 2, 0), "codes are of type torch.int64; expected floats"),
        (
            lambda: full_em(mixture(*parts()), torch.ones(9, 2), np.ones((3, 2))),
            "held_out is of type ndarray",
        ),
        (lambda: mixture(*parts()).log_prob(np.ones((3, 2))), "z is of type ndarray; expected a tensor"),
        *(
            (
                lambda name=name, x=x: getattr(small_model(), name)(x),
                f"x is of type {type(x).__name__}; expected",
            )
            for name in ("encode", "decode", "loss", "reconstruct", "log_likelihood")
            for x in (ROWS, np.array(ROWS), None)
        ),
    ],
)
def test_what_is_given_is_named_where_it_is_refused(shapes_unchecked, do, says):
    with pytest.raises(ValueError, match=says):
        do()


def test_a_prior_with_full_covariances(shapes_unchecked):
    "It trains with the divergence of each example, and EM refits it; the aggregate wants variances."
    model = CSRAE(Encoder((3,), nn.Linear(3, 4)), Decoder(nn.Linear(2, 3), (1, 3)), Full(), Bernoulli())
    x = torch.rand(5, 3, generator=generator()).round()
    assert model(x).loss.isfinite() and model.log_likelihood(x, samples=5).isfinite().all()
    codes = torch.randn(50, 2, generator=generator())
    assert model.prior.refit(codes).log_prob(codes).mean() > model.prior.log_prob(codes).mean()
    for term in (Aggregate(2), Aggregate(2, queue=3)):
        model.batch_terms["aggregate"] = term
        with pytest.raises(ValueError, match="a FullGMM has full covariances; expected diagonal ones"):
            model(x)


@pytest.mark.parametrize(
    "q",
    [
        GMM.gaussian(torch.zeros(3), torch.ones(3)),
        FullGMM(torch.zeros(1), torch.zeros(1, 3), torch.eye(3)[None]),
    ],
)
def test_a_shape_in_place_of_a_generator_is_told_where_it_belongs(q, shapes_unchecked):
    "As torch's distributions take it."
    with pytest.raises(ValueError, match=r"generator=\(5,\); expected a torch.Generator.*mixtures.rsample"):
        q.rsample((5,))
    assert rsample(q.to_distribution(), (5,)).shape == (5, 3)


def test_numbers_of_numpy_are_told_what_a_model_takes(shapes_unchecked):
    units = Units(torch.ones(3), torch.ones(3))
    for likelihood in Gaussian(), Gaussian(units=units):
        decoder = Decoder(nn.Linear(2, 6), (2, 3))
        model = CSRAE(Encoder((3,), nn.Linear(3, 4)), decoder, StandardNormal(2), likelihood)
        with pytest.raises(ValueError, match="x is of type ndarray; expected a tensor"):
            model.encode(np.zeros((2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_component_is_drawn_in_half_precision(dtype):
    K, n = 500, 50_000
    p = GMM(
        torch.full((K,), -math.log(K)).to(dtype),
        torch.arange(K).to(dtype)[:, None],
        torch.ones(K, 1).to(dtype),
    )
    times = mixtures._choice(p.logw.expand(n, K), torch.Generator().manual_seed(0)).bincount(minlength=K)
    assert times.min() > 0.5 * n / K and times.max() < 1.6 * n / K


def test_codes_that_are_alike_leave_variances_as_they_were():
    p = GMM.mixture(torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 0.0], [4.0, 4.0]]), torch.ones(2, 2))
    for codes in (torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0], [1.0, 3.0]])):
        found = em_step(p, codes)
        assert (found.var[0, 0] == 1) and found.log_prob(codes).mean() > p.log_prob(codes).mean()
    assert found.var[0, 1] < 0.3  # in which they differ


def test_samples_have_no_gradients():
    "As of torch's distributions; rsample has them."
    prior = MoGPrior(4, 2, learned_weights=True)
    for drawn in (
        prior.sample(3),
        prior().sample(3),
        FullGMM.of(prior()).sample(3),
        prior().sample(3, None, 1),
    ):
        assert not drawn.requires_grad
    assert prior().rsample().requires_grad
    with pytest.raises(ValueError, match="no components"):
        prior().only([])


@pytest.mark.usefixtures("shapes_unchecked")
def test_several_components_are_drawn_from_by_only():
    with pytest.raises(ValueError, match=r"expected 0 to 3; of several: only"):
        MoGPrior(4, 2).sample(3, component=[1, 2])


def test_a_prior_starts_as_a_mixture():
    p = GMM.mixture(torch.tensor([0.2, 0.8]), torch.randn(2, 3), torch.rand(2, 3) + 0.1)
    prior, again = MoGPrior.of(p), MoGPrior(2, 3, learned_weights=True)
    again.load_state_dict(prior.state_dict())
    for found in (prior(), again()):
        for a, b in zip((found.logw, found.mu, found.var), (p.logw, p.mu, p.var)):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="not a batch"):
        MoGPrior.of(GMM.gaussian(torch.zeros(4, 2), 1.0))


def test_autocast_changes_no_clusters_and_no_draws():
    x = 0.05 * torch.randn(1000, 4, generator=generator()) + torch.tensor([100.0, 0, 0, 0])
    p = FullGMM(torch.zeros(1), 100 * torch.ones(1, 4), torch.eye(4)[None] + 0.5)
    for f in (lambda: kmeans(x, 5, 0), lambda: p.sample(20, generator())):
        plain = f()
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(f(), plain, rtol=0, atol=0)


class Lines(nn.Linear):
    "An encoder of one-dimensional distributions, a batch of (B, D)."

    def forward(self, x):
        return Normal(super().forward(x), 1.0)


def test_an_encoder_of_other_distributions_is_told():
    model = VAE(Lines(4, 2), Decoder(nn.Linear(2, 4), (1, 4)), StandardNormal(2), Bernoulli())
    with pytest.raises(ValueError, match=r"a Normal of batch \(3, 2\) for 3 examples; .* Independent"):
        model.loss(torch.rand(3, 4).round())
