"A constraint in place of a weight: met on validation images, resumed, in a fleet; and where it is none."

import math
import warnings

import pytest
import torch

from sklearn.datasets import load_wine

from csrae_nb import Config, CSRAEEmbedding, fit, load_run
from csrae_nb.config import resolve, run_name
from csrae_nb.constraint import TOLERANCE, Constraint, Multiplier
from csrae_nb.evaluation import complete_run, results_table
from csrae_nb.files import runs_folder
from csrae_nb.fleet import fit_fleet, fleets

from small_runs import ROWS, TINY, differences, stopped_after_two_epochs, tiny

FIELDS = TINY | dict(epochs=4, constraint="divergence<=0.5")


def config(name, **fields):
    return Config(**FIELDS | fields, name=name)


def trained(name, **fields):
    return tiny(name, **dict(epochs=4, constraint="divergence<=0.5") | fields)


@pytest.mark.parametrize("text", ["divergence<=3", "reconstruction<=22"])
@pytest.mark.parametrize("model", ["CSRAE", "VAE"])
def test_it_is_met_on_validation_images(text, model, own_runs):
    run = fit(Config(model=model, constraint=text, latent_dim=8, epochs=60, lr=1e-3), progress=False)
    c, row = Constraint.read(text), run.history[run.best_epoch - 1]
    assert c.is_met(row)
    last = [r[f"val_{c.term}"] for r in run.history[-10:]]
    assert sum(last) / 10 == pytest.approx(c.bound, rel=0.04)
    lams = [r["weight_divergence"] for r in run.history]
    assert all(math.isfinite(w) and w > 0 for w in lams) and len(set(lams)) == len(lams)
    met = [r for r in run.history if c.is_met(r)]
    other = "val_reconstruction" if c.term == "divergence" else "val_divergence"
    assert row[other] == min(r[other] for r in met)


def test_it_goes_on_where_it_was_stopped(own_runs, monkeypatch):
    fields = dict(epochs=4, constraint="divergence<=0.5")
    whole, stopped, off = stopped_after_two_epochs(monkeypatch, **fields)
    assert not any(off.values())
    assert [r["weight_divergence"] for r in whole.history] == [
        r["weight_divergence"] for r in stopped.history
    ]


def test_a_fleet_is_its_members_whatever_their_bounds(own_runs):
    bounds = ("divergence<=0.5", "divergence<=0.2")
    alone = [trained(f"alone{s}", seed=s, constraint=c) for s, c in enumerate(bounds)]
    configs = [config(f"together{s}", seed=s, constraint=c) for s, c in enumerate(bounds)]
    for a, b in zip(alone, fit_fleet(configs, dict(x=ROWS), progress=False), strict=True):
        assert max(differences(a, b).values()) < 1e-4
        for k, v in a.history[-1].items():
            assert k == "seconds" or b.history[-1][k] == pytest.approx(v, abs=1e-4), k
    other = config("other", constraint="reconstruction<=4")
    assert fleets([*configs, other], 64) == [list(map(resolve, configs))]


def test_one_that_cannot_be_met_says_how_near_it_came(own_runs):
    with pytest.warns(UserWarning, match=r"reconstruction<=1 was not met: the nearest epoch, \d, has"):
        run = trained("impossible", constraint="reconstruction<=1")
    misses = [r["val_reconstruction"] for r in run.history]
    assert misses[run.best_epoch - 1] == min(misses)


def test_it_is_kept_with_the_run(own_runs):
    run = trained("kept")
    again = load_run(run.path)
    weight = again.model.weights["divergence"]
    assert (
        isinstance(weight, Multiplier) and weight.bound == 0.5 and not any(differences(run, again).values())
    )
    assert weight().item() == pytest.approx(run.history[run.best_epoch - 1]["weight_divergence"])
    assert run_name(Config(constraint="divergence <= 5.0")) == run_name(Config(constraint="divergence<=5"))
    assert run_name(Config(constraint="divergence<=5")) != run_name(Config())


def test_rows_of_tables_tell_constraints_and_posteriors_apart(own_runs):
    fields = (dict(), dict(constraint="divergence<=2"), dict(posterior_components=2))
    usual = FIELDS | dict(dataset="digits", network="mlp", epochs=1, warmup=0, constraint=None)
    configs = [Config(**usual | f, ll_samples=0, fid_layer=0, expost_components=2) for f in fields]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for c in configs:
            complete_run(c, progress=False)
    wanted = ["", "constraint=divergence<=2 ", "posterior_components=2 "]
    wanted = [w + "kmeans_epoch=1 batch_size=20" for w in wanted]
    assert [r["settings"] for r in results_table([runs_folder() / run_name(c) for c in configs])] == wanted


def test_an_estimator_takes_one():
    x = load_wine().data
    fields = dict(epochs=200, batch_size=20, random_state=0, model="CSRAE", network="pinwheel")
    found = {}
    for bound in (0.5, 2):
        est = CSRAEEmbedding(**fields, config=dict(constraint=f"divergence<={bound}")).fit(x)
        found[bound] = est.history_[est.best_epoch_ - 1]["val_divergence"]
    assert found[0.5] <= 0.5 * (1 + TOLERANCE) and 1 < found[2] <= 2 * (1 + TOLERANCE)


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(constraint="kl<=3"), "expected divergence<=NUMBER"),
        (dict(constraint="divergence<=-1"), "expected divergence<=NUMBER, above 0"),
        (dict(lam=0.0), "lam=0; the multiplier of a constraint starts from a number above 0"),
        (dict(model="VAE", beta=0.0), "beta=0; the multiplier"),
        (dict(labels=10), "is for autoencoders without labels"),
        (dict(model="Supervised", labels=10), "is for autoencoders without labels"),
    ],
)
def test_what_cannot_be_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        config("none", **fields)


def test_the_controller_does_not_wind_up():
    "A term that stays far from its bound for long moves λ so far and no further."
    weight = Multiplier(Constraint("divergence", 1.0))
    for _ in range(5000):
        weight.update(dict(divergence=torch.tensor(100.0)))
    high = weight().item()
    assert math.log(high) == pytest.approx(weight.REACH + weight.NOW)
    for _ in range(600):
        weight.update(dict(divergence=torch.tensor(0.0)))
    assert weight().item() < high / 1e4


def test_a_multiplier_that_is_set_goes_on_from_there():
    m = Multiplier(Constraint.read("divergence<=2"), 2.0)
    m.full = 10.0
    m.update(dict(divergence=torch.tensor(2.0)))  # as it should be
    assert m().item() == pytest.approx(10.0)
    for value in (-3.0, math.nan, 0.0):
        with pytest.raises(ValueError, match="a number"):
            m.full = value
    assert m.full == 10.0
