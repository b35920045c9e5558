"torch.func and torch.compile over the divergence and the models, against autograd."

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch.autograd.functional import hessian as known_hessian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import csrae_nb
from csrae_nb import kernels
from csrae_nb.aggregate import Aggregate
from csrae_nb.divergence import cs_divergence, kl_bounds, kl_divergence, log_overlap
from csrae_nb.layers import layered_networks, two_layers
from csrae_nb.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian
from csrae_nb.mixtures import GMM, FullGMM, pairwise_log_overlap
from csrae_nb.models import CSRAE, IWAE, VAE, MixtureCSRAE, MixtureVAE, VampPriorVAE
from csrae_nb.networks import Decoder, Encoder, mlp
from csrae_nb.posterior import cs_each
from csrae_nb.priors import MoGPrior, StandardNormal, VampPrior

torch.set_num_threads(1)
IN_ONE = Version(torch.__version__) >= Version("2.10")  # graph, which a context manager does not break then
SIZES = {
    "small": (5, 4, 3),
    "loops": (30, 60, 40),
}  # B, K, D; the larger is for numba's loops, if it is there


def close(a, b, eps=1e-9):
    torch.testing.assert_close(a, b, rtol=eps, atol=eps)


@pytest.fixture(params=SIZES)
def sides(request):
    "Of a batch of posteriors and a prior: means, log variances, and logits of the prior."
    (B, K, D), g = SIZES[request.param], torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    return r(B, D), r(B, D) / 4 - 1, r(K, D), r(K, D) / 4, r(K)


def prior(nu, logtau2, logits):
    return GMM(logits.log_softmax(-1), nu, logtau2.exp())


def divergence(mu, logvar, *p):
    return cs_divergence(GMM.gaussian(mu, logvar.exp()), prior(*p))


def log_density(mu, logvar, *p):
    return prior(*p).log_prob(mu)


def self_overlap(mu, logvar, *p):
    return log_overlap(*[prior(*p)] * 2) + 0 * mu.sum(-1)


def reversed_divergence(mu, logvar, *p):
    return cs_divergence(prior(*p), GMM.gaussian(mu, logvar.exp()))


def full(mu, logvar, *p):
    return cs_divergence(FullGMM.of(GMM.gaussian(mu, logvar.exp())), prior(*(t[:4] for t in p)))


def estimate(mu, logvar, *p):
    return kl_divergence(GMM.gaussian(mu, logvar.exp()), prior(*p), mu + 1)


def bound(mu, logvar, *p):
    return kl_bounds(GMM.gaussian(mu, logvar.exp()), prior(*p))[1]


def of_each(mu, logvar, *p):
    return cs_each(GMM.gaussian(mu, logvar.exp()), prior(*p))


each_function = [divergence, log_density, self_overlap, reversed_divergence, full, estimate, bound, of_each]
functions = pytest.mark.parametrize("f", each_function)


def known_gradients(f, sides):
    leaves = [t.clone().requires_grad_() for t in sides]
    grads = torch.autograd.grad(f(*leaves).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(sides, grads)]


@functions
def test_grad_and_vjp(f, sides):
    known = known_gradients(f, sides)
    for a, b in zip(grad(lambda *t: f(*t).sum(), argnums=(0, 1, 2, 3, 4))(*sides), known):
        close(a, b)
    with torch.no_grad():
        value, pull = vjp(f, *sides)
        for a, b in zip(pull(torch.ones_like(value)), known):
            close(a, b)


@functions
def test_vmap(f, sides):
    mu, logvar, *p = sides
    close(vmap(f, in_dims=(0, 0, None, None, None))(*sides), f(*sides))
    close(vmap(f, in_dims=(0, 0, None, None, None), chunk_size=2)(*sides), f(*sides))
    each = [grad(lambda *t: f(*t).sum(), argnums=2)(m[None], l[None], *p) for m, l in zip(mu[:3], logvar)]
    by_image = vmap(grad(f, argnums=2), in_dims=(0, 0, None, None, None))
    close(by_image(mu[:3], logvar[:3], *p), torch.stack(each))
    shifted = p[0] + torch.arange(2.0).double()[:, None, None]  # over the prior, too
    by_prior = lambda nu: f(mu, logvar, nu, *p[1:])
    close(vmap(by_prior)(shifted), torch.stack([by_prior(nu) for nu in shifted]))


@functions
def test_jacobians_and_directions(f, sides):
    mu, logvar, *p = sides[0][:3], sides[1][:3], *sides[2:]
    known = known_gradients(f, (mu, logvar, *p))
    for jacobian in jacrev, jacfwd:
        J = jacobian(lambda mu: f(mu, logvar, *p))(mu)  # an image's value depends on that image
        close(J.diagonal().mT, known[0])
        assert J.sum((0, 2)).sub(known[0].sum(1)).abs().max() < 1e-9
    with torch.no_grad():
        close(jacrev(lambda mu: f(mu, logvar, *p))(mu).diagonal().mT, known[0])
    at = tuple(torch.ones_like(t) for t in (mu, logvar, *p))
    close(jvp(f, (mu, logvar, *p), at)[1].sum(), sum(g.sum() for g in known))


@functions
def test_hessian(f):
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    mu, *rest = r(2, 3), r(2, 3), r(4, 3), r(4, 3), r(4)
    close(hessian(lambda mu: f(mu, *rest).sum())(mu), known_hessian(lambda mu: f(mu, *rest).sum(), mu))
    by_nu = lambda nu: f(mu, rest[0], nu, *rest[2:]).sum()
    known = known_hessian(by_nu, rest[1])
    close(hessian(by_nu)(rest[1]), known)
    close(jacrev(jacrev(by_nu))(rest[1]), known)


def test_what_is_asked_of_unequal_batches():
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    q = GMM(r(4, 1, 2).log_softmax(-1), r(2, 3), r(4, 1, 2, 3).exp())
    p = GMM(r(5, 3).log_softmax(-1), r(3, 3), r(3, 3).exp())
    f = lambda mu: pairwise_log_overlap(GMM(q.logw, mu, q.var), p)
    close(vmap(f)(q.mu[None])[0], f(q.mu))
    assert f(q.mu).shape == (4, 5, 2, 3)
    unequal = lambda z: cs_divergence(*(GMM.gaussian(t, t.exp()) for t in (z, z[:2])))
    with pytest.raises(ValueError, match="D=3, p has D=2"):
        vmap(unequal)(r(5, 3))


def models():
    g = torch.Generator().manual_seed(0)
    enc, dec = Encoder((3, 3), mlp(9, 8, 2 * 2, generator=g)), Decoder(mlp(2, 8, 9, generator=g), (1, 3, 3))
    mog, normal = MoGPrior(5, 2, generator=g, learned_weights=True), StandardNormal(2)
    vamp = VampPrior(enc, torch.rand(4, 3, 3, generator=g))
    kinds = {
        VAE: [normal],
        IWAE: [normal],
        CSRAE: [normal],
        MixtureVAE: [mog],
        VampPriorVAE: [vamp],
        MixtureCSRAE: [mog, vamp],
    }
    for model, priors in kinds.items():
        for p in priors:
            yield model(enc, dec, p, Bernoulli())
    for kind, p, skip in ((VAE, normal, True), (MixtureCSRAE, mog, False)):
        encoder, decoder, lower = layered_networks("pinwheel", (3, 3), 2, 3, 1, g, skip)
        yield two_layers(kind)(encoder, decoder, p, Bernoulli(), lower=lower)


@pytest.mark.parametrize("model", [*models()], ids=lambda m: f"{type(m).__name__}-{type(m.prior).__name__}")
def test_models(model):
    "The gradient in the weights, all at once and an image at a time, and the Jacobian of an encoder."
    params = {k: v.detach() for k, v in model.named_parameters()}
    x = torch.randint(2, (6, 3, 3), generator=torch.Generator().manual_seed(1)).float()

    def terms(params, x):
        return functional_call(model, params, (x,), dict(generator=torch.Generator().manual_seed(2)))

    known = torch.autograd.grad(terms({}, x).loss, list(model.parameters()))
    for a, b in zip(grad(lambda p: terms(p, x).loss)(params).values(), known):
        close(a, b, 1e-5)

    def at_mean(params, x):  # without a draw: vmap has no generators
        of_encoder = {k.removeprefix("encoder."): v for k, v in params.items() if k.startswith("encoder.")}
        q = functional_call(model.encoder, of_encoder, (x[None],))
        return model.divergence(q, model.prior(), q.mu[:, 0])[0]

    each = vmap(grad(at_mean), in_dims=(None, 0))(params, x)
    alone = [grad(at_mean)(params, xi) for xi in x]
    for k, v in each.items():
        close(v, torch.stack([a[k] for a in alone]), 1e-5)
    encode = lambda xi: model.encode(xi[None]).mu[0, 0]
    known = torch.stack([torch.autograd.functional.jacobian(encode, xi) for xi in x])
    close(vmap(jacrev(encode))(x), known, 1e-5)


def compile_the_divergence(B, K, D):
    "Compiled before anything else has run, with gradients; and a transform compiled."
    g = torch.Generator().manual_seed(0)
    torch._dynamo.reset()
    shapes = (B, D), (B, D), (K, D), (K, D), (K,)
    sides = [torch.randn(*s, generator=g).div(2).requires_grad_() for s in shapes]
    grads = torch.autograd.grad(torch.compile(divergence, backend="aot_eager")(*sides).sum(), sides)
    for a, b in zip(grads, torch.autograd.grad(divergence(*sides).sum(), sides)):
        close(a, b, 1e-4)
    sides = [t.detach() for t in sides]
    by_func = grad(lambda *t: divergence(*t).sum(), argnums=(0, 2))
    by_func = torch.compile(by_func, backend="aot_eager")(*sides)
    for a, b in zip(by_func, (grads[0], grads[2])):
        close(a, b, 1e-4)


def in_one_graph(f, *inputs, other=None):
    "A function compiled, without a break by torch 2.10 on, against itself, or one like it that has a state."
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="eager", fullgraph=IN_ONE)
    for x in inputs:
        values = []
        for by in (compiled, other or f):
            torch.manual_seed(0)
            values.append(by(x))
        close(*values, 1e-5)


def compile_models():
    g = torch.Generator().manual_seed(1)
    batches = [torch.rand(n, 3, 3, generator=g).round() for n in (6, 10)]
    for model in [*models()][-4:]:
        in_one_graph(lambda x: model(x).loss, *batches)


def compile_parts():
    "A prior, densities and draws, each beside what else may be somebody's own."
    batches = [torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(n)) for n in (100, 37, 52)]
    for p in MoGPrior(20, 8), StandardNormal(8):
        in_one_graph(lambda x: cs_divergence(GMM.gaussian(x[:, 0], x[:, 1].exp()), p()), *batches)
        in_one_graph(lambda x: p.log_prob(x[:, 0]), *batches)
    in_one_graph(lambda x: GMM.gaussian(x[:, 0], x[:, 1].exp()).rsample(), *batches)
    in_one_graph(lambda x: Gaussian().sample(x), *batches)
    in_one_graph(lambda x: DiscretizedLogistic().sample(x), *batches)
    in_one_graph(lambda x: Bernoulli().sample(x[:, :1]), *batches)


def compile_divergence_of_any_batch():
    "In one graph for sizes on either side of the loops', more of them than dynamo compiles one by one."
    for D, K in ((8, 20), (20, 50), (40, 400)):
        p, sizes = MoGPrior(K, D), (100, 97, 64, 33, 50, 20, 10, 7, 3, 150)
        batches = [torch.randn(n, 2, D, generator=torch.Generator().manual_seed(n)) for n in sizes]
        in_one_graph(lambda x: cs_divergence(GMM.gaussian(x[:, 0], x[:, 1].exp()), p()), *batches)
        torch._dynamo.reset()
        value = lambda x: cs_divergence(GMM.gaussian(x[:, 0], x[:, 1].exp()), p()).sum()
        compiled = torch.compile(value, backend="aot_eager", dynamic=True)
        for x in batches:
            by = [torch.autograd.grad(f(x.requires_grad_()), (x, p.mu, p.logvar)) for f in (compiled, value)]
            for a, b in zip(*by):
                close(a, b, 1e-5)


def compile_aggregate():
    "Its queue is of the model's state."
    g = torch.Generator().manual_seed(1)
    batches = [torch.rand(n, 3, 3, generator=g).round() for n in (6, 10, 7)]
    for queue in (0, 20):
        net = mlp(9, 8, 2 * 2, generator=g), mlp(2, 8, 9, generator=g)
        enc, dec = Encoder((3, 3), net[0]), Decoder(net[1], (1, 3, 3))
        model = MixtureCSRAE(enc, dec, MoGPrior(5, 2, generator=g), Bernoulli())
        model.batch_terms["aggregate"] = Aggregate(2, queue)
        model.loss(batches[0])
        like = deepcopy(model)  # for a queue remembers
        in_one_graph(lambda x: model(x).loss, *batches, other=lambda x: like(x).loss)


def compile_draws():
    "Of a mixture, with gradients, by either way."
    g = torch.Generator().manual_seed(0)
    shapes = (5, 3), (5, 3, 2), (5, 3, 2)
    for draw in (lambda p: p.rsample(), lambda p: p.expect(lambda z: z.square().sum(-1))):
        torch._dynamo.reset()
        sides = [torch.randn(*s, generator=g).div(2).requires_grad_() for s in shapes]

        def value(logits, mu, logvar):
            return draw(GMM(logits.log_softmax(-1), mu, logvar.exp())).sum()

        grads = []
        for f in (torch.compile(value, backend="eager"), value):
            torch.manual_seed(0)
            grads.append(torch.autograd.grad(f(*sides), sides))
        for a, b in zip(*grads):
            close(a, b, 1e-5)


class Assigned(torch.nn.Module):
    "Of x: the components' shares in the code's mean, its density under the prior, and the divergence."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        q, p = self.model.encode(x), self.model.prior()
        return p.responsibilities(q.mean), p.log_prob(q.mean), cs_divergence(q, p)


def write_down():
    "By torch.jit.trace, and by torch.export where it takes context managers; for batches of any size."
    g = torch.Generator().manual_seed(0)
    enc, dec = Encoder((3, 3), mlp(9, 8, 2 * 2, generator=g)), Decoder(mlp(2, 8, 9, generator=g), (1, 3, 3))
    asked = Assigned(MixtureCSRAE(enc, dec, MoGPrior(5, 2, generator=g), Bernoulli()).eval())
    x = torch.rand(12, 3, 3, generator=g)
    if IN_ONE:  # a mixture is a tree of tensors
        q = torch.export.export(enc, (torch.rand(2, 3, 3, generator=g),)).module()(x[:2])
        close(q.mu, enc(x[:2]).mu, 1e-6)
    written = [torch.jit.trace(asked, x[:6])]
    if IN_ONE:
        batch = ({0: torch.export.Dim("batch")},)
        written.append(torch.export.export(asked, (x[:6],), dynamic_shapes=batch).module())
    for f in written:
        for n in (2, 3, 12, 1)[
            : 4 if f is written[0] else 3
        ]:  # torch.export takes one row for a case of its own
            for a, b in zip(f(x[:n]), asked(x[:n])):
                close(a, b, 1e-5)


@pytest.mark.parametrize("same", [False, True])
def test_the_operation_for_compilers(same):
    "As torch asks of one: its shapes, its gradients, and that nothing is changed in place."
    r = lambda *s: torch.rand(2, *s, 3, generator=torch.Generator().manual_seed(0)).add(0.5).requires_grad_()
    mu, var = r(4), r(4)
    others = (mu, var) if same else (r(5), r(5))
    torch.library.opcheck(kernels._log_z_operation, (mu, var, *others, same))


def test_compile():
    "In a process of its own: cold, and without the enforcement of shapes, which no compiler can see through."
    env = {k: v for k, v in os.environ.items() if k != "CSRAE_TYPECHECK"}
    env["PYTHONPATH"] = str(Path(csrae_nb.__file__).parents[1])
    command = [sys.executable, "-W", "error:numba", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "compiled\n", done.stdout + done.stderr


if __name__ == "__main__":
    for size in reversed(SIZES.values()):
        compile_the_divergence(*size)
    compile_models()
    compile_parts()
    compile_divergence_of_any_batch()
    compile_aggregate()
    compile_draws()
    write_down()
    print("compiled")
