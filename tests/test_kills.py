"A process that is killed at any of its file operations leaves a run that goes on to the same bits."

import itertools
import multiprocessing
import os
import sys

import numpy as np
import pytest
import torch

from csrae_nb import fleet
from csrae_nb.evaluation import complete_run
from csrae_nb.fleet import fit_fleet
from csrae_nb.config import Config
from csrae_nb.files import runs_folder
from csrae_nb.runs import load_run

X = (np.random.default_rng(0).random((60, 4)) < 0.5).astype(np.float32)
FIELDS = dict(
    dataset="arrays",
    network="pinwheel",
    latent_dim=2,
    components=3,
    epochs=2,
    warmup=1,
    kmeans_epoch=1,
    batch_size=16,
    ll_samples=2,
    expost_components=2,
)
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}  # of what is on the disk


def changes(event, args, folder):
    "Whether an audit event changes something below a folder."
    if event not in CHANGES or not str(args[0]).startswith(folder):
        return False
    if event != "open":
        return True
    mode, flags = args[1], args[2] or 0
    return bool(mode and set(mode) & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def one_run(prefix):
    complete_run(Config(**FIELDS, name=f"{prefix}0"), dict(x=X), progress=False)


def members(prefix):
    return [Config(**FIELDS, seed=s, lam=s + 1.0, name=f"{prefix}{s}") for s in range(2)]


def one_fleet(prefix):
    fleet.SAVE_EVERY = 0.0
    runs = fit_fleet(members(prefix), dict(x=X), progress=False)
    assert not [r for r in runs if isinstance(r, Exception)], runs


def killed_at(n, job, prefix, folder):
    "Do a job and die, as if by SIGKILL, right before the n-th change of what lies in a folder."
    os.environ["CSRAE_RUNS"] = folder
    count = itertools.count(1)

    def hook(event, args):
        if changes(event, args, folder) and next(count) == n:
            os._exit(9)

    sys.addaudithook(hook)
    job(prefix)


def same(a, b):
    "Whether two finished runs have the same history and the same weights, to the bit."
    a, b = (load_run(runs_folder() / name) for name in (a, b))
    weights = zip(a.model.state_dict().values(), b.model.state_dict().values())
    return a.history == b.history and all(torch.equal(v, w) for v, w in weights)


@pytest.mark.parametrize("job", [one_run, one_fleet])
def test_killed_at_every_change_of_a_file_ends_the_same_to_the_bit(job, tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    job("straight")  # before the forks, which find everything imported and built
    processes = multiprocessing.get_context("fork")
    names = [p.name.removeprefix("straight") for p in runs_folder().glob("straight*")]
    for n in itertools.count(1):
        args = n, job, f"at{n}-", str(runs_folder())
        p = processes.Process(target=killed_at, args=args, daemon=True)
        p.start()
        p.join(60)
        if p.exitcode == 0:
            break
        assert p.exitcode == 9, n
        job(f"at{n}-")
        for name in names:
            path = runs_folder() / f"at{n}-{name}"
            assert same(f"straight{name}", path.name), n
            assert {f.name for f in path.iterdir()} == {
                f.name for f in (runs_folder() / f"straight{name}").iterdir()
            }, n
    assert n > 20, "the kills did not reach the end of training"


def test_the_hook_sees_what_changes_a_file(tmp_path):
    folder, seen = str(tmp_path), []
    sys.addaudithook(lambda event, args: seen.append(event) if changes(event, args, folder) else None)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("")
    os.replace(tmp_path / "a" / "b", tmp_path / "c")
    (tmp_path / "c").read_text()
    (tmp_path / "c").unlink()
    assert seen == ["os.mkdir", "open", "os.rename", "os.remove"]
