"""Steps of a fleet that are recorded once and replayed, as a CUDA graph does it, on a processor.

A replay repeats the operations on the same tensors: a number that Python worked out stays what it was in the
recording, and nothing may wait for a value or bring one from the processor."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from csrae_nb import fleet, kernels
from csrae_nb.catalogue import load_data
from csrae_nb.config import Config
from csrae_nb.few_labels import LabelTask
from csrae_nb.fleet import fit_fleet
from test_fleet import ANSWERS, FIELDS, X, Y, weights

WAITS = {torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default}
MAKERS = _device_constructors()


class Operations(TorchDispatchMode):
    "The operations of a step, in their order; RuntimeError for one that waits for a value."

    def __init__(self):
        super().__init__()
        self.all = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        masks = f.overloadpacket is torch.ops.aten.index and any(
            i.dtype == torch.bool for i in args[1] if i is not None
        )
        if f in WAITS or masks:
            raise RuntimeError(f"{f} waits for a value while a step is recorded")
        out = f(*args, **kwargs)
        self.all.append((f, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self):
        for f, args, kwargs, out in self.all:
            again = f(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class OnTheDevice(TorchFunctionMode):
    "RuntimeError for a tensor, of more than a number, that is made without saying on which device."

    def __torch_function__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if f in MAKERS and (kwargs or {}).get("device") is None and out.ndim:
            raise RuntimeError(f"{f.__name__} makes a tensor on the processor while a step is recorded")
        return out


class Recorded:
    "What stands for a CUDA graph: the first call is made as it is, the second recorded."

    made = 0

    def __init__(self, f, noise):
        self.f, self.calls = f, 0
        Recorded.made += 1

    def __call__(self):
        self.calls += 1
        if self.calls == 1:
            return self.f()
        if self.calls == 2:
            self.operations = Operations()
            with OnTheDevice(), self.operations:
                self.out = self.f()
        else:
            self.operations.replay()
        return self.out


class Called(Recorded):
    "Each step one operation at a time."

    def __call__(self):
        return self.f()


def validated_both_ways(validate, together, ts, failed):
    "Members validated together, as on a GPU, after a look at what each gives by itself."
    rows = validate(together, ts, failed)
    for row, t in zip(rows, ts, strict=True):
        assert row == pytest.approx(t.task.validate(t.model.eval(), t.data, t.val), rel=1e-4, abs=1e-5)
    return rows


@pytest.fixture(autouse=True)
def as_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(fleet, "_recordable", lambda data: True)
    monkeypatch.setattr(kernels, "_for_loops", lambda mu, nu: False)  # of which torch knows nothing
    monkeypatch.setattr(fleet, "_validate", partial(validated_both_ways, fleet._validate))


def trained(graph, monkeypatch, x=X, y=None, levels=2, **fields):
    "Two seeds, trained with a kind of graph: their weights."
    monkeypatch.setattr(fleet, "_Graph", graph)
    Recorded.made = 0
    data = replace(load_data(dict(x=x) if y is None else dict(x=x, y=y), "bernoulli"), levels=levels)
    usual = FIELDS | dict(epochs=4, warmup=2, kmeans_epoch=0) | fields
    configs = [Config(**usual, seed=s, name=f"{graph.__name__}{s}") for s in range(2)]
    return torch.stack([*map(weights, fit_fleet(configs, data, progress=False))])


IMAGES = (np.random.default_rng(3).random((80, 3, 8, 8)) < 0.5).astype(np.float32)
LABELS = dict(labels=30, network="mlp", labelled_batch=5)
KINDS = {
    "VAE": dict(model="VAE"),
    "IWAE": dict(model="IWAE"),
    "RAE": dict(model="RAE"),
    "WAE": dict(model="WAE"),
    "VampPriorVAE": dict(model="VampPriorVAE"),
    "mixture": dict(),
    "k-means": dict(kmeans_epoch=2),
    "aggregate": dict(prior_objective="aggregate", queue=40, learned_weights=True),
    "mixture posterior": dict(posterior_components=2, objective="cs_each"),
    "implicit draws": dict(posterior_components=2, objective="cs_each", posterior_draws="implicit"),
    "layers": dict(layers=2, lower_dim=3),
    "constraint": dict(constraint="reconstruction<=4"),
    "prior network": dict(prior_network=True),
    "batch norm": dict(network="residual", x=IMAGES),
    "classes": LABELS | dict(y=Y),
    "classes, vamp": LABELS | dict(y=Y, prior="vamp", model="MixtureVAE"),
    "classifier": LABELS | dict(y=Y, labels=1.0, model="Supervised"),
    "answers, summed": LABELS | dict(y=ANSWERS[:, :3]),
    "answers, softened": LABELS | dict(y=ANSWERS),
    "answers, weighed": LABELS | dict(y=ANSWERS, balance="weights"),
    "patterns": LABELS | dict(y=ANSWERS, model="Supervised", patterns=2, balance="weights"),
    "intensities": LABELS | dict(y=ANSWERS[:, :2], levels=3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:reconstruction<=4 was not met")
def test_replayed_steps_train_as_steps_that_are_made_one_by_one(kind, monkeypatch):
    replayed, called = (trained(graph, monkeypatch, **KINDS[kind]) for graph in (Recorded, Called))
    assert torch.allclose(replayed, called, atol=1e-6), (replayed - called).abs().max()


@pytest.mark.parametrize("kind", ["classes", "answers, softened", "mixture"])
def test_what_warms_up_is_recorded_once(kind, monkeypatch):
    trained(Recorded, monkeypatch, **KINDS[kind])
    assert Recorded.made == 1  # in four epochs, in each of which a weight or a temperature is another


def test_members_are_validated_some_at_a_time(monkeypatch):
    "Two, and the third alone: each as by itself, which `validated_both_ways` looks at."
    monkeypatch.setattr(fleet, "rows_at_once", lambda x: 30)
    monkeypatch.setattr(fleet, "_Graph", Called)
    outputs, at_once = fleet._outputs, []

    def counted(together, ts, x, some):
        at_once.append(len(ts[some]))
        return outputs(together, ts, x, some)

    monkeypatch.setattr(fleet, "_outputs", counted)
    data = load_data(dict(x=X), "bernoulli")
    configs = [Config(**FIELDS | dict(epochs=2, warmup=1), seed=s, name=f"some{s}") for s in range(3)]
    assert fit_fleet(configs, data, progress=False) and at_once == [2, 1, 2, 1]


class Alpha(LabelTask):
    "A task whose model gets another number in each epoch."

    def begin(self, model, epoch):
        super().begin(model, epoch)
        model.alpha = 1.0 / epoch


def test_a_number_that_changes_between_epochs_is_recorded_anew(monkeypatch):
    monkeypatch.setattr(fleet, "task_of", Alpha)
    replayed, called = (trained(g, monkeypatch, **KINDS["answers, softened"]) for g in (Called, Recorded))
    assert Recorded.made == 4 and torch.allclose(replayed, called, atol=1e-6)


def test_a_number_that_grew_old_would_be_noticed(monkeypatch):
    "What the test above would miss, if graphs did not come anew."
    monkeypatch.setattr(fleet, "task_of", Alpha)
    monkeypatch.setattr(fleet, "_numbers", lambda module: {})
    replayed, called = (trained(g, monkeypatch, **KINDS["answers, softened"]) for g in (Recorded, Called))
    assert (replayed - called).abs().max() > 1e-4


def test_what_waits_for_a_value_fails_while_it_is_recorded():
    x = torch.arange(3.0)
    for waiting in (lambda: x[x > 1], lambda: x.nonzero(), lambda: x.sum().item()):
        with Operations(), pytest.raises(RuntimeError, match="waits for a value"):
            waiting()
    with OnTheDevice(), pytest.raises(RuntimeError, match="on the processor"):
        torch.zeros(3)
