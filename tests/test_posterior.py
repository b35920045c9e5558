"Posteriors of several Gaussians: every model learns with them, goes on where it stopped, and is measured."

import warnings

import numpy as np
import pytest
import torch

from csrae_nb import Config, load_run
from csrae_nb.catalogue import load_data
from csrae_nb.config import resolve, run_name
from csrae_nb.evaluation import evaluate
from csrae_nb.fleet import fleets
from csrae_nb.models import CSRAE
from csrae_nb.likelihoods import Bernoulli
from csrae_nb.networks import make_networks
from csrae_nb.priors import StandardNormal

from small_runs import ROWS, TINY, stopped_after_two_epochs, tiny

FIELDS = dict(epochs=3, warmup=1, posterior_components=3)


def config(name, **fields):
    return Config(**TINY | FIELDS | fields, name=name)


def trained(name, **fields):
    return tiny(name, **FIELDS | fields)


@pytest.mark.parametrize("draws", ["stratified", "implicit"])
@pytest.mark.parametrize("model", ["VAE", "IWAE", "MixtureVAE", "VampPriorVAE", "CSRAE", "MixtureCSRAE"])
def test_every_model_learns_and_comes_back(model, draws, own_runs):
    run = trained("run", model=model, posterior_draws=draws)
    q = load_run(run.path).model.encode(torch.from_numpy(ROWS))
    assert q.mu.shape == (120, 3, 2) and q.logw.exp().std(-1).max() > 0
    first, last = run.history[0], run.history[-1]
    assert all(1 <= r["posterior_used"] <= 3 for r in run.history)
    assert last["train_reconstruction"] < first["train_reconstruction"] + 0.1
    assert torch.isfinite(run.model.log_likelihood(torch.from_numpy(ROWS[:5]), 20)).all()


def test_it_goes_on_where_it_was_stopped(own_runs, monkeypatch):
    *_, off = stopped_after_two_epochs(monkeypatch, **FIELDS)
    assert not any(off.values())


def test_the_stratified_error_is_the_mean_over_components():
    encoder, decoder = make_networks("mlp", (4, 4), 2, 1, torch.Generator().manual_seed(0), 3)
    model = CSRAE(encoder, decoder, StandardNormal(2), Bernoulli())
    x = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(1)).round()
    q, g = model.encode(x), lambda: torch.Generator().manual_seed(2)
    z = q.mu + q.var.sqrt() * torch.randn(q.mu.shape, generator=g())
    by_hand = sum(q.logw[:, n].exp() * -model.likelihood.log_prob(x, model.decode(z[:, n])) for n in range(3))
    torch.testing.assert_close(model.error(x, q, z[:, 0], g()), by_hand)


def test_it_is_evaluated_as_any_other(own_runs):
    run = trained("run", ll_samples=10, fid_layer=0)
    found = evaluate(run, load_data(dict(x=ROWS)), progress=False)
    assert np.isfinite(found["log_likelihood"]) and np.isfinite(found["divergence"])


def test_the_divergence_of_the_whole_mixture_warns(own_runs):
    with pytest.warns(UserWarning, match="objective='cs_each' asks each of its Gaussians"):
        trained("whole", model="CSRAE", epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="objective=")
        run = trained("each", model="CSRAE", epochs=1, objective="cs_each")
    assert run.cfg.objective == "cs_each"


def test_names_and_groups():
    assert run_name(Config(posterior_components=1)) == run_name(Config())
    assert run_name(Config(posterior_components=2)) != run_name(Config())
    two = [resolve(Config(posterior_components=2, seed=s)) for s in range(2)]
    assert fleets(two, 64) == [two]


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(posterior_components=0), "posterior_components=0; expected at least 1"),
        (dict(posterior_components=1, posterior_draws="implicit"), "is for posterior_components above 1"),
        (dict(posterior_draws="all"), "expected one of stratified, implicit"),
        (dict(model="WAE"), "is for models of Gaussian codes"),
        (dict(labels=10), "without labels"),
        (dict(prior_objective="aggregate", queue=10), "queue=10 takes posteriors of one Gaussian"),
        (dict(objective="paper_eq21"), "objective='paper_eq21' takes posteriors of one Gaussian"),
    ],
)
def test_what_cannot_be_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        config("none", **fields)
