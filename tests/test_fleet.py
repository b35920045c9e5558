"A member of a fleet fails, is killed and is finished like a run of its own."

import numpy as np
import pytest
import torch

from csrae_nb import fleet
from csrae_nb.fleet import fit_fleet
from csrae_nb.config import Config
from csrae_nb.files import load_tensors, runs_folder
from csrae_nb.runs import Run, fit
from csrae_nb.training import NonFiniteLoss, Training

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
    return torch.cat([v.flatten() for v in run.model.state_dict().values()])


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


def test_a_fleet_in_bf16_casts_its_weights_in_each_step():
    "Within one autocast a weight is cast once, and what the optimiser makes of it afterwards is not seen."
    fields = dict(precision="bf16", lr=0.05, kmeans_epoch=0, epochs=2)
    together = fit_fleet([config(f"t{s}", seed=s, **fields) for s in range(2)], dict(x=X), progress=False)
    alone = [fit(config(f"a{s}", seed=s, **fields), dict(x=X), progress=False) for s in range(2)]
    for a, b in zip(together, alone):
        assert a.history[-1]["criterion"] == pytest.approx(b.history[-1]["criterion"], rel=1e-3)
