"A member of a fleet fails, is killed and is finished like a run of its own."

import warnings
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from csrae_nb import fleet
from csrae_nb.fleet import fit_fleet, fleets, train_fleets
from csrae_nb.catalogue import load_data
from csrae_nb.config import Config, resolve
from csrae_nb.data import LazyImages
from csrae_nb.files import load_tensors, runs_folder
from csrae_nb.models import MODELS
from csrae_nb.networks import Encoder
from csrae_nb.runs import Run, fit
from csrae_nb.tasks import make_model
from csrae_nb.training import NonFiniteLoss, Training, is_trained

X = (np.random.default_rng(0).random((80, 6)) < 0.5).astype(np.float32)
FIELDS = dict(
    dataset="arrays",
    network="pinwheel",
    latent_dim=2,
    components=3,
    epochs=3,
    warmup=1,
    kmeans_epoch=1,
    batch_size=20,
)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))


def config(name, **fields):
    return Config(**FIELDS | fields, name=name)


def weights(run):
    return weights_of(run.model)


def weights_of(model):
    return torch.cat([v.flatten() for v in model.state_dict().values()])


def message(error):
    return str(error).split(". The last good state")[0]


def test_a_member_that_diverges_fails_alone_with_the_message_of_fit():
    "Also right before k-means, which cannot take codes that are no numbers."
    with pytest.raises(NonFiniteLoss) as alone:
        fit(config("alone", seed=1, lam=1e38), dict(x=X), progress=False)
    good, bad, other = fit_fleet(
        [config("a"), config("b", seed=1, lam=1e38), config("c", seed=2)], dict(x=X), progress=False
    )
    assert isinstance(good, Run) and isinstance(other, Run) and isinstance(bad, NonFiniteLoss)
    assert message(bad) == message(alone.value) and "epoch 1, step 1: loss inf" in str(bad)
    tensors, meta = load_tensors(runs_folder() / "b" / "checkpoint.safetensors")
    assert (
        meta["epoch"] == 0
        and "of epoch 0, is" in str(bad)
        and all(t.isfinite().all() for t in tensors.values())
    )
    (lone,) = fit_fleet([config("a2"), config("c2", seed=2)], dict(x=X), progress=False)[:1]
    assert weights(good) == pytest.approx(weights(lone), abs=1e-4)


def test_a_fleet_of_which_all_diverge_ends():
    out = fit_fleet([config(f"m{s}", seed=s, lam=1e38) for s in range(2)], dict(x=X), progress=False)
    assert [type(e) for e in out] == [NonFiniteLoss] * 2


def test_a_member_killed_between_its_last_checkpoint_and_its_model_is_finished(monkeypatch):
    members = [config(f"k{s}", seed=s) for s in range(2)]

    def killed(t):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Training, "finish", killed)
        fit_fleet(members, dict(x=X), progress=False)
    assert not list(runs_folder().glob("*/model.safetensors"))
    epochs = [load_tensors(p)[1]["epoch"] for p in runs_folder().glob("*/checkpoint.safetensors")]
    assert epochs == [3, 3]
    monkeypatch.setattr(Training, "record", lambda *a, **kw: pytest.fail("it trained again"))
    assert all(isinstance(r, Run) for r in fit_fleet(members, dict(x=X), progress=False))


def test_a_kill_while_checkpoints_are_written_leaves_one_epoch(monkeypatch):
    monkeypatch.setattr(fleet, "SAVE_EVERY", 0.0)
    members, saves, save = [config(f"e{s}", seed=s) for s in range(3)], iter(range(4)), Training.save

    def interrupted(t):
        if next(saves, None) is None:
            raise KeyboardInterrupt  # 3 at the start, and the first member's first epoch
        save(t)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Training, "save", interrupted)
        fit_fleet(members, dict(x=X), progress=False)

    def epochs():
        return sorted(load_tensors(p)[1]["epoch"] for p in runs_folder().glob("*/checkpoint.safetensors"))

    assert epochs() == [0, 0, 1]
    fleet._agree([*runs_folder().iterdir()])
    assert epochs() == [0, 0, 0] and not list(runs_folder().glob("*/*before*"))


Y = np.arange(80) % 3
ANSWERS = (np.random.default_rng(1).random((80, 5)) < 0.5).astype(int)
KINDS = [
    dict(model="IWAE"),
    dict(model="WAE"),
    dict(model="RAE"),
    dict(prior_network=True),
    dict(posterior_components=2, objective="cs_each"),
    dict(layers=2, lower_dim=3),
    dict(network="gated"),
    dict(constraint="reconstruction<=4"),
    dict(labels=30, network="mlp", labelled_batch=5),
    dict(labels=30, network="mlp", labelled_batch=5, prior="vamp", model="MixtureVAE"),
    dict(labels=1.0, network="mlp", model="Supervised"),
]


def together_and_alone(y, **fields):
    "Two runs in a fleet, which differ in all that they may, and alone: the last rows of their histories."
    data, model = dict(x=X, y=y), fields.get("model", Config.model)
    weights = {MODELS.about(model, "weight"): 3.0} if model in MODELS else {}
    if "labels" in fields and weights:
        weights["beta"] = 4.0  # of the divergence of labels
    if "constraint" in fields:
        weights["constraint"] = fields["constraint"].replace("4", "4.2")
    both = [fields | dict(seed=0), fields | dict(seed=1) | weights]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*performance drop.*")  # vmap would go through the members in turn
        runs = fit_fleet([config(f"t{f['seed']}", **f) for f in both], data, progress=False)
        alone = [fit(config(f"a{f['seed']}", **f), data, progress=False) for f in both]
    return [(a.history[-1], b.history[-1]) for a, b in zip(runs, alone, strict=True)]


@pytest.mark.parametrize("fields", KINDS, ids=lambda f: " ".join(map(str, f.values())))
def test_every_kind_of_run_goes_in_a_fleet(fields):
    for a, b in together_and_alone(Y, **fields):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("model", ["MixtureCSRAE", "Supervised"])
def test_rows_of_answers_go_in_a_fleet(model):
    labels = dict(labels=1.0 if model == "Supervised" else 30, labelled_batch=5)
    for a, b in together_and_alone(ANSWERS, model=model, network="mlp", **labels):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


class Holding(nn.Linear):
    def __init__(self, held):
        super().__init__(2, 2)
        self.held = held


@pytest.mark.parametrize(
    "one, other",
    [
        (0.1, 0.2),
        ("a", "b"),
        (torch.zeros(3), torch.ones(3)),
        (np.zeros(3), np.zeros(4)),
        ([1.0, 2.0], [1.0, 3.0]),
        (dict(a=(1, torch.zeros(2))), dict(a=(1, torch.ones(2)))),
        (None, 1),
    ],
)
def test_members_that_differ_in_what_is_no_buffer_are_refused(one, other):
    fleet.Fleet([nn.Sequential(Holding(deepcopy(one))) for _ in range(2)])
    with pytest.raises(ValueError, match="differ in 0.held, which is no parameter or buffer"):
        fleet.Fleet([nn.Sequential(Holding(v)) for v in (one, other)])


def test_images_that_are_read_when_needed_go_in_a_fleet():
    whole = load_data(dict(x=X), "bernoulli")
    stored = {f"x_{s}": getattr(whole, f"x_{s}") for s in ("train", "val")}
    lazily = {k: LazyImages(lambda rows, x=x: x[rows], len(x), (6,)) for k, x in stored.items()}
    configs = [config(f"lazy{s}", seed=s) for s in range(2)]
    runs = fit_fleet(configs, replace(whole, **lazily), progress=False)
    for run, known in zip(
        runs, fit_fleet([config(f"k{s}", seed=s) for s in range(2)], whole, progress=False)
    ):
        assert torch.equal(weights(run), weights(known))


def test_a_run_that_begins_with_another_is_left_alone():
    configs = [config(f"p{s}", seed=s, labels=30, pretrain=2, network="mlp") for s in range(2)]
    with pytest.raises(ValueError, match="none begins with another run"):
        fit_fleet(configs, dict(x=X, y=Y), progress=False)


def test_a_fleet_that_fails_leaves_its_runs_to_be_tried_alone(monkeypatch, capsys):
    def failing(*args, **kw):
        raise RuntimeError("vmap: no such rule")

    monkeypatch.setattr(fleet.Fleet, "each", failing)
    train_fleets([Config(dataset="digits", epochs=1, seed=s) for s in range(3)], progress=False)
    assert "and 2 others: vmap: no such rule" in capsys.readouterr().err


def test_a_fleet_that_memory_does_not_hold_is_trained_in_halves(monkeypatch, capsys):
    step, tried = fleet._Steps.step, []

    def with_room_for_two(steps, rows, *given):
        tried.append(len(rows))
        if len(rows) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return step(steps, rows, *given)

    monkeypatch.setattr(fleet._Steps, "step", with_room_for_two)
    configs = [Config(dataset="digits", epochs=1, seed=s, name=f"h{s}") for s in range(5)]
    train_fleets(configs, progress=False)
    assert list(dict.fromkeys(tried)) == [5, 3, 2]  # of 3 a pair and one that is left alone
    assert [is_trained(runs_folder() / c.name) for c in configs] == [True, True, False, True, True]
    assert "h0 and 4 others: CUDA out of memory; in halves now" in capsys.readouterr().err


def test_members_have_tensors_of_their_own_when_a_fleet_ends():
    "A stack of many would live on in the one that keeps a part of it."
    models = [fit(config(f"own{s}", seed=s), dict(x=X), progress=False).model for s in range(3)]
    opts = [torch.optim.Adam(m.parameters(), fused=True) for m in models]
    together = fleet.Fleet(models)
    fleet._shared_adam(together, opts, 1e-3)
    before = [weights_of(m) for m in models]
    size = lambda t: t.untyped_storage().nbytes() / t.nbytes
    assert all(size(p) == 3 for p in models[0].parameters())
    fleet._disband(together, opts)
    assert all(size(p) == 1 for m in models for p in (*m.parameters(), *m.buffers()))
    assert all(size(t) == 1 for o in opts for state in o.state.values() for t in state.values())
    assert all(torch.equal(a, weights_of(m)) for a, m in zip(before, models))


def test_the_error_of_a_bernoulli_is_one_operation_for_all_members():
    "And not the dozen that vmap would make of it, each a pass through the memory."
    cfg = resolve(Config(dataset="digits", model="VAE", network="mlp"))
    together = fleet.Fleet([make_model(cfg, (8, 8), "bernoulli") for _ in range(3)])
    x, draws = torch.ones(3, 4, 8, 8), fleet.MemberDraws([torch.Generator() for _ in range(3)])
    nodes = [together.each(lambda model, x: model(x, draws).loss, x).grad_fn]
    for node in nodes:
        nodes += [below for below, _ in node.next_functions if below and below not in nodes]
    names = [type(node).__name__ for node in nodes]
    assert names.count("BinaryCrossEntropyWithLogitsBackward0") == 1 and "ClampMinBackward0" not in names
    assert "SliceBackward0" not in names  # of the stacks, whose gradients would be copied in each step


def test_a_fleet_in_bf16_casts_its_weights_in_each_step():
    "Within one autocast a weight is cast once, and what the optimiser makes of it afterwards is not seen."
    fields = dict(precision="bf16", lr=0.05, kmeans_epoch=0, epochs=2)
    together = fit_fleet([config(f"t{s}", seed=s, **fields) for s in range(2)], dict(x=X), progress=False)
    alone = [fit(config(f"a{s}", seed=s, **fields), dict(x=X), progress=False) for s in range(2)]
    for a, b in zip(together, alone):
        assert a.history[-1]["criterion"] == pytest.approx(b.history[-1]["criterion"], rel=1e-3)


def test_a_fleet_in_bf16_validates_in_single_precision(monkeypatch):
    "As a single run does."
    cast, plain = [], Encoder.forward

    def forward(self, x):
        if not self.training:
            cast.append(torch.is_autocast_enabled("cpu"))
        return plain(self, x)

    monkeypatch.setattr(Encoder, "forward", forward)
    fit_fleet([config(f"v{s}", seed=s, precision="bf16") for s in range(2)], dict(x=X), progress=False)
    assert cast and not any(cast)


@pytest.mark.parametrize("field, value", [("device", "cpu"), ("threads", 2), ("tracker", "tensorboard")])
def test_runs_that_work_otherwise_are_no_fleet(field, value):
    configs = [Config(seed=s) for s in range(2)]
    assert len(fleets(configs)) == 1
    assert not fleets([configs[0], replace(configs[1], **{field: value})])
