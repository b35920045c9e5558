"A prior that learns from the aggregate posterior: stopped and resumed, in a fleet, in two processes."

import numpy as np
import pytest
import torch

from csrae_nb import Config, fit
from csrae_nb.aggregate import Aggregate
from csrae_nb.divergence import cs_divergence
from csrae_nb.fleet import fit_fleet
from csrae_nb.likelihoods import Bernoulli
from csrae_nb.mixtures import GMM
from csrae_nb.models import CSRAE, IWAE, VAE, BatchTerm
from csrae_nb.networks import make_networks
from csrae_nb.priors import MoGPrior

from small_runs import ROWS, TINY, differences, stopped_after_two_epochs, tiny

X = ROWS
FIELDS = TINY | dict(epochs=4, warmup=1, learned_weights=True, prior_objective="aggregate")


def config(name, **fields):
    return Config(**FIELDS | fields, name=name)


def trained(name, **fields):
    return tiny(name, **FIELDS | fields)


@pytest.mark.parametrize("queue", [0, 30])
def test_it_goes_on_where_it_was_stopped(queue, own_runs, monkeypatch):
    *_, off = stopped_after_two_epochs(monkeypatch, **FIELDS | dict(queue=queue))
    assert not any(off.values())


@pytest.mark.parametrize("fields", [dict(), dict(queue=30), dict(model="MixtureVAE", beta=0.5)])
def test_a_fleet_is_its_members(fields, own_runs):
    alone = [trained(f"alone{s}", seed=s, **fields) for s in range(2)]
    configs = [config(f"together{s}", seed=s, **fields) for s in range(2)]
    for a, b in zip(alone, fit_fleet(configs, dict(x=X), progress=False), strict=True):
        assert max(differences(a, b).values()) < 1e-5
        assert a.history[-1].keys() == b.history[-1].keys() and "val_aggregate" in a.history[-1]
        for k, v in a.history[-1].items():
            assert b.history[-1][k] == pytest.approx(v, abs=1e-4), k


@pytest.mark.parametrize("queue", [0, 30])
def test_shared_work_changes_no_run(queue, own_runs, monkeypatch):
    together = trained("together", queue=queue)
    monkeypatch.setattr(CSRAE, "sharing_term", lambda model: None)
    apart = trained("apart", queue=queue)
    assert max(differences(together, apart).values()) < 1e-5
    for k, v in apart.history[-1].items():
        assert together.history[-1][k] == pytest.approx(v, abs=1e-4), k


class Twice(CSRAE):
    "A model with a divergence of its own."

    def divergence(self, q, p, z, generator=None):
        return 2 * super().divergence(q, p, z, generator)


class Attracting(Aggregate):
    "A term from which the encoder learns, too."

    def forward(self, q, p):
        return cs_divergence(q.aggregate(), p)


class Spread(BatchTerm):
    def forward(self, q, p):
        return q.var.mean()


def test_work_is_shared_with_the_divergence_that_it_is_of_only(own_runs):
    model, x = trained("plain").model.train(), torch.as_tensor(X[:10])
    loss = lambda model: model.loss(x, torch.Generator().manual_seed(0))
    plain, parts = loss(model), (model.encoder, model.decoder, model.prior, model.likelihood)
    assert model.sharing_term() == "aggregate"
    other = Twice(*parts).train()
    other.batch_terms["aggregate"] = model.batch_terms["aggregate"]
    assert other.sharing_term() is None
    torch.testing.assert_close(loss(other).divergence, 2 * plain.divergence)
    frozen = model.batch_terms["aggregate"].eval()
    assert model.sharing_term() is None
    torch.testing.assert_close(loss(model).divergence, plain.divergence)
    frozen.train()
    model.batch_terms["aggregate"] = Attracting(plain.q.mu.shape[-1])
    assert model.sharing_term() is None
    model.batch_terms["aggregate"] = frozen
    model.batch_terms["spread"] = Spread()
    both = loss(model)
    assert model.sharing_term() is None and both.whole["spread"] > 0
    torch.testing.assert_close(both.whole["aggregate"], plain.whole["aggregate"])
    torch.testing.assert_close(both.divergence, plain.divergence)


@pytest.mark.parametrize("queue", [0, 5, 30])
@pytest.mark.parametrize("R, N", [((), 1), ((), 3), ((2,), 2)])
def test_one_pass_gives_what_two_give(queue, R, N):
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*R, *shape, generator=g, dtype=torch.float64, requires_grad=True)
    leaves = [r(6, N), r(6, N, 4), r(6, N, 4), r(5), r(5, 4), r(5, 4)]
    q, p = (GMM(a.log_softmax(-1), b, c.exp()) for a, b, c in (leaves[:3], leaves[3:]))
    one, two = Aggregate(4, queue).double(), Aggregate(4, queue).double()
    for term in (one, two):
        for name, kept in term.named_buffers():
            setattr(term, name, kept.expand(*R, *kept.shape).clone())
    for step in range(3):  # the queue fills
        each, whole = one.with_each(q, p)
        fixed = GMM(p.logw[..., None, :].detach(), *(t[..., None, :, :].detach() for t in (p.mu, p.var)))
        held = cs_divergence(q, fixed)
        apart = two(q, p)
        torch.testing.assert_close(each, held)
        torch.testing.assert_close(whole, apart)
        wanted = torch.autograd.grad(held.sum() + 2 * apart.sum(), leaves, retain_graph=True)
        found = torch.autograd.grad(each.sum() + 2 * whole.sum(), leaves, retain_graph=True)
        torch.testing.assert_close(found, wanted)


def test_components_of_a_posterior_keep_their_weights_in_the_queue():
    g = torch.Generator().manual_seed(0)
    logw = torch.tensor([[0.9, 0.1]]).log().expand(4, 2)
    q = GMM(logw, torch.randn(4, 2, 3, generator=g), torch.ones(4, 2, 3))
    p = GMM.gaussian(torch.zeros(3), torch.ones(3))
    term = Aggregate(3, queue=8)
    term(q, p)
    both = GMM(*(torch.cat([t, t]) for t in (q.logw, q.mu, q.var)))
    torch.testing.assert_close(term(q, p), Aggregate(3)(both, p))


def test_the_queue_is_kept_in_the_order_of_the_batches(own_runs):
    run = trained("queue", queue=30)
    term = run.model.batch_terms["aggregate"]
    assert term.logits.tolist() == [0.0] * 30 and (term.var > 0).all()
    longer = trained("longer", queue=1000).model.batch_terms["aggregate"]
    filled = 20 * (len(run_rows()) // 20) * FIELDS["epochs"]
    assert (longer.logits == 0).sum() == filled and (longer.logits[filled:] < -1e3).all()


def run_rows():
    "The training part of the data, as a run splits them."
    from csrae_nb.catalogue import load_data

    return load_data(dict(x=X)).x_train


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(model="VAE"), "prior_objective='aggregate' has no effect on this VAE; it is for a mog prior"),
        (dict(prior="vamp"), "it is for a mog prior"),
        (dict(prior_objective="image", queue=9), "it is for prior_objective='aggregate'"),
        (dict(prior_objective="all"), "expected one of image, aggregate"),
    ],
)
def test_where_it_has_no_effect_it_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        config("none", **fields)


def test_labels_have_none(own_runs):
    y = np.arange(len(X)) % 3
    with pytest.raises(ValueError, match="with labels the prior learns from each image"):
        labelled = config("labels", labels=30, network="mlp", labelled_batch=5)
        fit(labelled, dict(x=X.reshape(-1, 2, 3), y=y), progress=False)


@pytest.mark.parametrize("kind", [VAE, IWAE, CSRAE])
def test_the_prior_learns_from_the_aggregate_alone(kind):
    class Nothing(BatchTerm):
        trains_prior = True

        def forward(self, q, p):
            return q.mu.sum() * 0

    encoder, decoder = make_networks("mlp", (3, 3), 2, 1)
    m = kind(encoder, decoder, MoGPrior(4, 2), Bernoulli())
    m.batch_terms["aggregate"] = Nothing()
    m(torch.rand(5, 3, 3).round()).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in m.prior.parameters())
    assert any(p.grad.any() for p in m.encoder.parameters())
