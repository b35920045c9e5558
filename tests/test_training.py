"Runs that are killed, damaged or cannot be written: what a notebook cannot hold."

import errno
import json
import multiprocessing
import os
import random
import shutil
import time
from types import SimpleNamespace

import pytest
import torch

from csrae_nb import config, files, models, runs, training
from csrae_nb.catalogue import load_data
from csrae_nb.config import Config, resolve
from csrae_nb.files import load_tensors, runs_folder
from csrae_nb.runs import fit, load_run

SHORT = dict(epochs=4, warmup=2)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))


def same_weights(a, b):
    a, b = a.model.state_dict(), b.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run_in(folder, cfg):
    os.environ["CSRAE_RUNS"] = folder
    fit(Config(**cfg), progress=False)


def test_killed_at_five_random_moments_ends_the_same_to_the_bit():
    processes, seed = multiprocessing.get_context("forkserver"), random.randrange(2**32)
    processes.set_forkserver_preload(["csrae_nb.runs"])
    rnd, cfg, folder = random.Random(seed), dict(epochs=36, warmup=5), runs_folder()

    def start(name):
        p = processes.Process(target=run_in, args=(str(folder), {**cfg, "name": name}))
        p.start()
        return p

    history = folder / "killed" / "history.csv"
    done = lambda: len(history.read_text().splitlines()) - 1 if history.exists() else 0
    for epoch in sorted(rnd.sample(range(0, 18), 5)):  # k-means is at the end of epoch 3
        p = start("killed")
        while p.is_alive() and done() < epoch:
            time.sleep(0.002)
        time.sleep(rnd.uniform(0, 0.3))  # somewhere in the epochs that follow, or while they are written
        p.kill()
        p.join()
        assert p.exitcode == -9, f"the run ended before it was killed, seed {seed}"
    for name in ("killed", "straight"):
        p = start(name)
        p.join()
        assert p.exitcode == 0
    a, b = (load_run(folder / name) for name in ("killed", "straight"))
    assert a.history == b.history and same_weights(a, b), f"seed {seed}"
    assert sorted(os.listdir(b.path)) == [".lock", "config.json", "history.csv", "model.safetensors"]


def stop(monkeypatch, epoch, **cfg):
    "A run that is interrupted after an epoch; its folder."
    with monkeypatch.context() as m:

        def interrupted(t, bar, original=training.Training.train_and_validate):
            if t.meta["epoch"] == epoch:
                raise KeyboardInterrupt
            original(t, bar)

        m.setattr(training.Training, "train_and_validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(Config(**SHORT, **cfg), progress=False)
    return runs_folder() / cfg["name"]


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda b: b[: len(b) // 2], "damaged"),
        (lambda b: b"", "damaged"),
        (lambda b: b.replace(b"csrae_nb", b"other_nb"), "not written by csrae_nb"),
        (lambda b: b.replace(b'\\"format\\": 1', b'\\"format\\": 2'), "upgrade csrae_nb"),
        (lambda b: b.replace(b'\\"epoch\\": 2', b'\\"epoch\\": 1'), "checksum is wrong"),
        (lambda b: b.replace(b'\\"format\\"', b'\\"farmat\\"'), "damaged in its header"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named_and_kept(monkeypatch, damage, says):
    file = stop(monkeypatch, 2, name="a") / "checkpoint.safetensors"
    file.write_bytes(content := damage(file.read_bytes()))
    with pytest.raises(ValueError, match=says) as e:
        fit(Config(**SHORT, name="a"), progress=False)
    assert "checkpoint.safetensors" in str(e.value) and file.read_bytes() == content


def test_other_data_do_not_continue_a_run(monkeypatch):
    x = torch.rand(300, 4).numpy()
    cfg = Config(**SHORT, dataset="arrays", name="b", components=5, ll_samples=10)
    fit(cfg, dict(x=x), progress=False)
    with pytest.raises(ValueError, match="is of other data"):
        fit(cfg, dict(x=x + 1), progress=False)


def test_an_unfinished_run_says_so(monkeypatch):
    with pytest.raises(ValueError, match="start it again with the same command"):
        load_run(stop(monkeypatch, 2, name="c"))


def test_a_damaged_config_is_named():
    fit(Config(**SHORT, name="d"), progress=False)
    (runs_folder() / "d" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        fit(Config(**SHORT, name="d"), progress=False)


def no_training(monkeypatch):
    monkeypatch.setattr(training.Training, "train_and_validate", lambda *a: pytest.fail("training began"))


def test_a_full_disk_is_found_before_training(monkeypatch):
    no_training(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="this run needs .* free some space"):
        fit(Config(**SHORT), progress=False)


def test_a_failing_write_is_found_before_training_and_leaves_nothing(monkeypatch):
    no_training(monkeypatch)

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*CSRAE_RUNS"):
        fit(Config(**SHORT, name="e"), progress=False)
    assert os.listdir(runs_folder() / "e") == []


def test_a_folder_that_cannot_be_made_is_found_before_training(monkeypatch, tmp_path):
    no_training(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "file"))
    with pytest.raises(OSError, match="cannot write to .*CSRAE_RUNS"):
        fit(Config(**SHORT), progress=False)


def test_a_disk_that_fills_up_while_training_loses_nothing(monkeypatch):
    path = stop(monkeypatch, 2, name="f")
    before = (path / "checkpoint.safetensors").read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            fit(Config(**SHORT, name="f"), progress=False)
    assert (path / "checkpoint.safetensors").read_bytes() == before
    assert same_weights(
        fit(Config(**SHORT, name="f"), progress=False), fit(Config(**SHORT, name="g"), progress=False)
    )


def test_a_loss_that_is_not_finite_names_step_terms_and_checkpoint():
    with pytest.raises(
        training.NonFiniteLoss,
        match=r"step \d+: loss .* reconstruction .* divergence .*checkpoint.safetensors",
    ):
        fit(Config(**SHORT, lr=1e6, name="h"), progress=False)
    tensors, meta = load_tensors(runs_folder() / "h" / "checkpoint.safetensors")
    assert all(t.isfinite().all() for t in tensors.values()) and meta["epoch"] == 0


def test_the_finished_run_is_read_without_pickle_and_reported(capsys):
    a = fit(Config(**SHORT, name="i"), progress=False)
    b = fit(Config(**SHORT, name="i"))
    said = capsys.readouterr()
    assert "nothing to train" in said.err and not said.out  # where csrae train prints the folder alone
    assert same_weights(a, b) and a.history == b.history
    assert json.loads((a.path / "config.json").read_text())["epochs"] == 4


@pytest.mark.parametrize("model", list(models.MODELS))
def test_every_model_learns(model):
    h = fit(Config(model=model, epochs=12, warmup=4), progress=False).history
    assert h[-1]["val_reconstruction"] < h[0]["val_reconstruction"] - 2


def test_a_tracker_gets_the_history(monkeypatch):
    "A run that was stopped goes on in the same curves, and the tracker is no part of what makes it this run."
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg = Config(epochs=4, warmup=1, tracker="tensorboard")
    save = training.Training.save

    def dies(self):
        save(self)
        if self.meta["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(training.Training, "save", dies)
        fit(cfg, progress=False)
    run = fit(cfg, progress=False)
    assert config.identity(cfg) == config.identity(Config(epochs=4, warmup=1)) and config.run_name(
        cfg
    ) == config.run_name(Config(epochs=4, warmup=1))
    events = accumulator.EventAccumulator(str(run.path / "tracker")).Reload()
    for k in ("criterion", "train_divergence", "val_reconstruction", "weight"):
        assert [e.step for e in events.Scalars(k)] == [1, 2, 3, 4]
        assert [e.value for e in events.Scalars(k)] == pytest.approx([r[k] for r in run.history], rel=1e-5)
    assert len(list((run.path / "tracker").glob("*/hparams.yml"))) == 2  # one a sitting


def test_two_processes_that_open_a_run_at_once_both_find_it(monkeypatch, tmp_path):
    "The faster one has the lock already, and has removed the temporary file of the slower one."
    cfg, replace = Config(**SHORT), os.replace

    def meanwhile(tmp, file):
        shutil.copy(tmp, file)
        with files.run_lock(tmp_path):
            pass
        replace(tmp, file)

    monkeypatch.setattr(os, "replace", meanwhile)
    assert runs.claim_folder(cfg, tmp_path) == tmp_path
    assert config.make_config(json.loads((tmp_path / "config.json").read_text())) == resolve(cfg)


def test_a_folder_where_nothing_was_trained_may_be_removed(tmp_path):
    "As after a first step that failed; where there is a checkpoint, the run is not to be lost."
    runs.claim_folder(Config(**SHORT), tmp_path)
    with pytest.raises(ValueError, match="another name, or remove the folder, where nothing is trained yet"):
        runs.claim_folder(Config(**SHORT, seed=1), tmp_path)
    (tmp_path / "checkpoint.safetensors").touch()
    with pytest.raises(ValueError, match="give this one another name$"):
        runs.claim_folder(Config(**SHORT, seed=1), tmp_path)
    with pytest.raises(ValueError, match="give this one another name; a run keeps its number of epochs$"):
        runs.claim_folder(Config(**SHORT | dict(epochs=9)), tmp_path)


def test_what_is_given_in_place_of_arrays_by_name():
    "The error says the word to write."
    x, y = torch.rand(50, 3), torch.arange(50) % 2
    with pytest.raises(ValueError, match="give examples and labels by name, dict"):
        fit(Config(dataset="arrays", **SHORT), (x.numpy(), y.numpy()), progress=False)
    with pytest.raises(ValueError, match="the data are 'digits'; data that were loaded by a name or from a"):
        fit(Config(dataset="arrays", **SHORT), load_data("digits"), progress=False)


def test_a_run_goes_to_no_device_that_is_not_here():
    run = fit(Config(epochs=1, warmup=1), progress=False)
    with pytest.raises(ValueError, match="there is no device 'cuda:99' here"):
        load_run(run.path, "cuda:99")


def test_a_failing_write_keeps_its_kind(monkeypatch, tmp_path):
    def refused(*args, **kw):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(PermissionError, match="cannot write to .*Permission denied.*CSRAE_RUNS") as e:
        fit(Config(**SHORT, name="p"), progress=False)
    assert e.value.errno == errno.EACCES
