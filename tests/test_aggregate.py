"A prior that learns from the aggregate posterior: stopped and resumed, in a fleet, in two processes."

import numpy as np
import pytest

from csrae_nb import Config, fit
from csrae_nb.fleet import fit_fleet

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
    labelled = config("labels", labels=30, network="mlp", labelled_batch=5)
    with pytest.raises(ValueError, match="with labels the prior learns from each image"):
        fit(labelled, dict(x=X.reshape(-1, 2, 3), y=y), progress=False)
