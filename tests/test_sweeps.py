"Sweeps that are killed, shared, or lose a run or a worker: what a notebook cannot hold."

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from bench import many
from csrae_nb.grids import (
    distinct,
    expand,
    failure,
    read_sweep,
    run_state,
    shard,
    sweep_fields,
    trained_epochs,
    without_effect,
)
from csrae_nb import fleet, sweeps
from csrae_nb.runs import run_folder
from csrae_nb.sweeps import main, ray_engine, run_sweep
from csrae_nb.config import Config, run_name
from csrae_nb.evaluation import complete_run
from csrae_nb.files import runs_folder
from csrae_nb.fleet import fit_fleet
from csrae_nb.training import Training

root = Path(__file__).parents[1]
FAST = dict(ll_samples=0, expost_components=5)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def points(tmp_path):
    "A data set without labels, of which an epoch is short and the evaluation too."
    np.savez(path := tmp_path / "points.npz", x=np.random.default_rng(0).random((400, 6), np.float32))
    return str(path)


def words(fields):
    return [f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in fields.items()]


def start(*args):
    "csrae-sweep in a process of its own."
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from csrae_nb.sweeps import main; sys.exit(main())", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process, seconds=120):
    "Wait until something holds while a process works at it."
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.05)


def models():
    return {p.parent.name: p.stat().st_mtime_ns for p in runs_folder().glob("*/model.safetensors")}


def sittings(cfg):
    "Process ids of all processes that a run has had, from its log."
    log = run_folder(cfg) / "log.txt"
    return (
        [int(pid) for pid in re.findall(r"^20.* UTC, .*, process (\d+): ", log.read_text(), re.M)]
        if log.exists()
        else []
    )


# --- grids


def test_equal_runs_are_run_once():
    grid = expand(dict(model=["VAE", "CSRAE", "MixtureCSRAE"], components=[5, 10], lam=[1, 1.0], seed=[1, 0]))
    runs = distinct(grid)
    assert (len(grid), len(runs)) == (24, 8) and [c.seed for c in runs] == [0] * 4 + [1] * 4
    assert len({run_name(c) for c in runs}) == 8 and distinct(runs) == runs


def test_fields_without_effect_are_named():
    grid = expand(
        dict(model=["VAE", "MixtureCSRAE"], components=[5, 10], kl_samples=[1, 9], ll_samples=[0, 5])
    )
    without = "without effect on VAE: components, kl_samples", "without effect on MixtureCSRAE: kl_samples"
    assert without_effect(grid) == sorted(without, reverse=True)
    assert without_effect(distinct(grid)) == []


@pytest.mark.parametrize("file", sorted((root / "sweeps").glob("*.toml")), ids=lambda p: p.stem)
def test_the_papers_sweeps_are_grids(file):
    runs = distinct(read_sweep(file))
    full = file.stem.startswith(("table", "figure", "published")) and not file.stem.endswith("_short")
    epochs = {(c.epochs, c.warmup) for c in runs}
    paper = {(50, 15) if c.dataset in ("disfa", "fera2015") else (400, 100) for c in runs}
    assert epochs == paper or not full and all(c.epochs <= 400 for c in runs)
    seeds = {c.seed for c in runs}
    assert seeds == set(range(len(seeds))), "seeds count from 0 without a gap"
    assert not full or len(seeds) == (1 if file.stem == "published" else 5)
    assert sorted(sum((shard(list(range(len(runs))), f"{i}/7") for i in range(1, 8)), [])) == list(
        range(len(runs))
    )


@pytest.mark.parametrize(
    "args, says",
    [
        (["lamda=1"], f"'lamda'; most alike lam; the known ones are {', '.join(sweep_fields())}"),
        (["seed=0", "--shard", "3/2"], "expected i/n"),
        (["seed=0", "--jobs", "0"], "at least 1"),
        (["none.toml"], "none.toml"),
        (["seed=0", "--gpus", "1"], "--engine ray"),
        (["name=a"], "unknown field 'name'"),
        (["dataset=mnits"], "unknown dataset"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_written(args, says, capsys):
    with pytest.raises(SystemExit) as e:
        main(args)
    assert e.value.code == 2 and says in capsys.readouterr().err and not runs_folder().exists()


def test_a_table_begun_elsewhere_is_not_lost(tmp_path, points, capsys):
    "A store with fewer seeds, or none, leaves the file's rows; what is no table is refused before any run."
    fields = dict(dataset=points, epochs=1, batch_size=50, latent_dim=2, **FAST, fid_layer=0)
    grid, table = words(fields | dict(model=["VAE", "CSRAE"], seed=[0, 1])), tmp_path / "table.csv"
    assert main([*grid, "--csv", str(table)]) == 0
    before = table.read_text()
    runs_folder().rename(tmp_path / "elsewhere")
    assert main([*grid, "--list", "--csv", str(table)]) == 0 and table.read_text() == before
    assert main([*words(fields | dict(model="VAE", seed=0)), "--jobs", "1"]) == 0
    assert main([*grid, "--list", "--csv", str(table)]) == 0 and table.read_text() == before
    (other := tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        main([*words(fields | dict(model="VAE", seed=2)), "--csv", str(other)])
    assert "no column `command`" in capsys.readouterr().err and other.read_text() == "a,b\n1,2\n"
    assert not list(runs_folder().glob("*-seed2-*"))


def test_an_unknown_field_is_named_with_its_file_and_block(tmp_path, capsys):
    (file := tmp_path / "mine.toml").write_text("[[grid]]\nmodel = 'VAE'\n[[grid]]\nlearning_rate = 1")
    with pytest.raises(SystemExit):
        main([str(file)])
    assert re.search(
        r"mine.toml, \[\[grid\]\] 2: unknown field 'learning_rate'; the known ones are dataset, .*lr",
        capsys.readouterr().err,
    )


# --- sweeps


def test_eight_runs_are_killed_and_resumed(points, tmp_path, capsys):
    fields = dict(
        dataset=points, model=["VAE", "CSRAE"], beta=1, latent_dim=[2, 3], epochs=20, seed=[0, 1], **FAST
    )
    runs = distinct(expand(fields))
    assert len(runs) == 8
    p = start(*words(fields), "--jobs", "2")
    wait_for(lambda: len(models()) >= 2, p)
    children = [pid for c in runs for pid in sittings(c)]
    p.kill()
    p.wait()
    before = models()
    wait_for_end(children)
    states = [run_state(c) for c in runs]
    assert 2 <= len(before) < 8 and "new" in states and "running" not in states
    assert main([*words(fields), "--jobs", "2", "--csv", str(tmp_path / "tables" / "all.csv")]) == 0
    after = models()
    assert len(after) == 8 and before.items() <= after.items(), "a finished run was repeated"
    assert "8 runs: 8 finished" in capsys.readouterr().out
    table = (tmp_path / "tables" / "all.csv").read_text().splitlines()
    assert len(table) == 1 + 8
    assert main([*words(fields), "--list"]) == 0 and "8 runs: 8 finished" in capsys.readouterr().out


def wait_for_end(pids):
    "Wait until none of some processes is alive: those of a sweep that was killed end by themselves."
    end = time.monotonic() + 20
    while any(
        Path(f"/proc/{pid}").exists()
        and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
        for pid in pids
    ):
        assert time.monotonic() < end, "a run outlived its sweep"
        time.sleep(0.05)


def test_a_run_that_fails_leaves_the_others_alone_and_is_tried_again(points, capfd):
    good, bad = dict(dataset=points, model="VAE", epochs=3, seed=[0, 1], **FAST), dict(lr=[5e-4, 1e6])
    assert main([*words(good | bad), "--jobs", "1"]) == 1
    runs = distinct(expand(good | bad))
    lost = [c for c in runs if c.lr > 1]
    assert [run_state(c) for c in runs] == ["failed" if c in lost else "finished" for c in runs]
    assert (
        failure(lost[0]).startswith("NonFiniteLoss: epoch 1, step")
        and "-p lr 1000000.0" in json.loads((run_folder(lost[0]) / "failed.json").read_text())["command"]
    )
    out = capfd.readouterr().out
    assert (
        "4 runs: 2 finished, 2 failed" in out
        and str(run_folder(lost[1])) in out
        and "NonFiniteLoss" in (run_folder(lost[0]) / "log.txt").read_text()
    )
    assert main([*words(good | bad), "--jobs", "1"]) == 1 and [len(sittings(c)) for c in runs] == [
        2 if c in lost else 1 for c in runs
    ]


@contextmanager
def meanwhile(condition, act):
    "As soon as a condition holds, and while the body of a with runs, act."

    def watch():
        while not over.is_set():
            if condition():
                return act()
            time.sleep(0.002)

    over = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def kill(cfg):
    os.kill(sittings(cfg)[-1], signal.SIGKILL)


def test_a_run_that_is_killed_fails_one_that_is_locked_is_left_and_one_that_is_stopped_goes_on(points, capfd):
    fields = dict(dataset=points, model="VAE", epochs=20, patience=20, **FAST)
    killed, locked, good = runs = distinct(expand(dict(fields, seed=[0, 1, 2])))
    run_folder(locked).mkdir(parents=True)
    with FileLock(run_folder(locked) / ".lock"):
        with meanwhile(lambda: trained_epochs(killed), lambda: kill(killed)):  # as if memory had run out
            assert main([*words(dict(fields, seed=[0, 1, 2])), "--jobs", "2"]) == 1
        assert (
            "3 runs: 1 finished, 1 failed, 1 running elsewhere" in capfd.readouterr().out
            and "killed by signal 9" in failure(killed)
        )
        assert [run_state(c) for c in runs] == ["failed", "running", "finished"] and sittings(locked) == []
    before = models()
    with meanwhile(
        lambda: trained_epochs(locked), lambda: os.kill(os.getpid(), signal.SIGTERM)
    ):  # as a job scheduler does
        assert main([*words(dict(fields, seed=[1, 2])), "--jobs", "1"]) == 130
    assert "stopped with 1 of 2 runs finished" in capfd.readouterr().err and run_state(locked) == "stopped"
    assert run_sweep(runs, jobs=2, progress=False) == {run_name(c): "finished" for c in runs}
    assert trained_epochs(killed) == trained_epochs(locked) == 20 and before.items() <= models().items()


def test_two_sweeps_share_a_grid(points):
    runs = distinct(expand(dict(dataset=points, model="VAE", epochs=10, seed=[0, 1, 2, 3], **FAST)))
    with ThreadPoolExecutor() as pool:
        a, b = pool.map(lambda _: run_sweep(runs, jobs=1, progress=False), range(2))
    assert all("finished" in (a[n], b[n]) and "failed" not in (a[n], b[n]) for n in a) and all(
        run_state(c) == "finished" for c in runs
    )
    logs = [(run_folder(c) / "log.txt").read_text() for c in runs]
    assert all(len(re.findall("training: +0%", log)) == 1 for log in logs), "a run was trained twice"


# --- Ray


@contextmanager
def unless_ray_is_too_slow():
    "Skip a test on a machine that is too busy for Ray's own time limits."
    try:
        yield
    except ValueError as e:
        if "timed out during startup" not in str(e):
            raise
        pytest.skip(f"this machine is too busy for Ray's time limits: {e}")


def test_a_ray_worker_that_is_killed_is_replaced_and_one_that_always_is_is_a_failure(points):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'csrae_nb[cluster]'")
    once, always = runs = distinct(
        expand(dict(dataset=points, model="VAE", epochs=20, patience=20, seed=[0, 1], **FAST))
    )
    with (
        unless_ray_is_too_slow(),
        meanwhile(lambda: trained_epochs(once), lambda: kill(once)),
        meanwhile(lambda: len(sittings(always)) == 1, lambda: kill(always)),
        meanwhile(lambda: len(sittings(always)) == 2, lambda: kill(always)),
    ):
        outcome = run_sweep(runs, jobs=2, engine=ray_engine, losses=1, progress=False)
    assert outcome == {run_name(once): "finished", run_name(always): "failed"}
    assert (len(sittings(once)), trained_epochs(once)) == (2, 20) and (
        len(sittings(always)),
        run_state(always),
    ) == (2, "failed")
    assert "its Ray worker was lost 2 times" in failure(always)


def a_fleet(points, model, **fields):
    fields = dict(dataset=points, model=model, epochs=12, patience=12, seed=[0, 1], **FAST) | fields
    return distinct(expand(fields))


def test_a_fleet_whose_ray_worker_is_killed_goes_on_and_its_runs_are_evaluated(points, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'csrae_nb[cluster]'")
    one, other = a_fleet(points, "VAE"), a_fleet(points, "CSRAE")
    saves, save = iter(range(8)), Training.save

    def stopped(t):
        if next(saves, None) is None:
            raise KeyboardInterrupt
        save(t)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):  # four epochs of the first, before
        m.setattr(fleet, "SAVE_EVERY", 0.0)
        m.setattr(Training, "save", stopped)
        fit_fleet(one, progress=False)
    assert [trained_epochs(c) for c in one] == [3, 3]
    with unless_ray_is_too_slow(), meanwhile(lambda: sittings(one[0]), lambda: kill(one[0])):
        outcome = run_sweep([*one, *other], jobs=2, engine=ray_engine, fleet_size=8, progress=False)
    assert set(outcome.values()) == {"finished"} and len(outcome) == 4
    log = (run_folder(one[0]) / "log.txt").read_text()
    assert len(sittings(one[0])) == 3 and "and 1 others" in log  # killed, trained, evaluated
    assert re.search("training 2 runs: +25%", log) and not re.search("training 2 runs: +0%", log)
    assert [trained_epochs(c) for c in (*one, *other)] == [12] * 4


def test_runs_of_a_fleet_whose_process_is_killed_are_tried_alone(points):
    runs = a_fleet(points, "VAE", epochs=3)
    with meanwhile(lambda: sittings(runs[0]), lambda: kill(runs[0])):  # as if memory had run out
        outcome = run_sweep(runs, jobs=2, fleet_size=8, progress=False)
    assert set(outcome.values()) == {"finished"} and [len(sittings(c)) for c in runs] == [2, 1]


def test_a_shard_of_fleets_keeps_each_together(points, capsys):
    words = [f"dataset={points}", "model=VAE,CSRAE", "seed=0,1,2", "lam=1", "--list", "--fleet"]
    shown = []
    for part in ("1/2", "2/2"):
        main([*words, "--shard", part])
        shown.append(re.findall(r"points-(VAE|CSRAE)-\S+  ", capsys.readouterr().out))
    assert shown == [["VAE"] * 3, ["CSRAE"] * 3]


def test_what_many_runs_cost_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["many", "--csv", str(tmp_path / "many.csv"), "--runs", "2", "3"])
    many.main()
    with open(tmp_path / "many.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["runs"] for r in rows] == ["2", "3", "", ""] and [r["kept"] for r in rows[2:]] == [
        "files",
        "one file",
    ]
    assert all(float(r["states"]) > 0 and r["files"] == "5" for r in rows[:2])
    assert all(float(r["read"]) > 0 and float(r["mib"]) > 100 for r in rows[2:])


# --- scripts

SCRIPT = """
from csrae_nb.grids import expand
from csrae_nb.sweeps import run_sweep
grid = dict(dataset={1!r}, model="VAE", epochs=1, ll_samples=0, expost_components=5, seed={2})
{0}print(run_sweep(expand(grid), jobs=2, progress=False))
"""
GUARD = 'if __name__ == "__main__": '


def test_a_sweep_runs_from_standard_input_and_a_script_and_one_without_a_guard_is_told_once(points, tmp_path):
    "One process does all three: runpy runs a file in the place of __main__, as `python FILE` does."
    files = tmp_path / "guarded.py", tmp_path / "unguarded.py"
    files[0].write_text(SCRIPT.format(GUARD, points, [2, 3]))
    files[1].write_text(SCRIPT.format("", points, [4, 5]))
    lines = [SCRIPT.format("", points, [0, 1]), "import runpy"]
    lines += [f"runpy.run_path({str(f)!r}, run_name='__main__')" for f in files]
    done = subprocess.run([sys.executable, "-"], input="\n".join(lines), capture_output=True, text=True)
    assert [line.count("'finished'") for line in done.stdout.splitlines()] == [2, 2], done.stderr
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    assert not list(runs_folder().glob("*/failed.json"))
    assert done.stderr.strip().endswith('put what the script does under if __name__ == "__main__":')


# --- tables


def test_a_table_only_gains_rows(points, tmp_path):
    "Another grid in the file, and seeds measured elsewhere; a run that is there is renewed, not doubled."
    table = tmp_path / "table.csv"

    def seeds():
        return [(r["model"], r["seeds"]) for r in csv.DictReader(table.open())]

    def sweep(*more):
        return main(
            [
                *words(dict(dataset=points, epochs=1, batch_size=50, latent_dim=2, **FAST)),
                "--csv",
                str(table),
                *more,
            ]
        )

    assert sweep("model=VAE", "seed=0,1") == 0 and seeds() == [("VAE", "0"), ("VAE", "1")]
    assert sweep("model=CSRAE", "seed=0") == 0 and seeds() == [("VAE", "0"), ("VAE", "1"), ("CSRAE", "0")]
    runs_folder().rename(tmp_path / "elsewhere")
    assert sweep("model=VAE", "seed=1,2") == 0 and seeds() == [
        ("VAE", "0"),
        ("VAE", "1"),
        ("CSRAE", "0"),
        ("VAE", "2"),
    ]


def test_two_sweeps_that_end_together_lose_no_rows(tmp_path, monkeypatch):
    def slow(configs, earlier):
        time.sleep(0.3)
        return [*earlier, *configs]

    monkeypatch.setattr(sweeps, "sweep_table", slow)
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    rows = [[dict(command=c, seeds="0")] for c in "ab"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(sweeps._write_csv, [tmp_path / "table.csv"] * 2, rows))
    assert {r["command"] for r in sweeps.rows_there(tmp_path / "table.csv")} == {"a", "b"}


def test_runs_that_are_finished_are_not_taken_for_runs_of_files_that_changed(tmp_path, capsys):
    "The data of one's own may be mended: neither their numbers nor their tables mix with those of before."
    file, words = tmp_path / "d.csv", "epochs=1 latent_dim=2 ll_samples=0 fid_layer=0 components=5".split()
    x = np.random.default_rng(0).normal(size=(300, 4))

    def sweep(x, *more):
        np.savetxt(file, x, delimiter=",", header="a,b,c,d", comments="")
        return main([f"dataset={file}", "model=CSRAE", *words, *more, "--jobs", "1"])

    assert sweep(x, "seed=0") == 0
    (run,) = (tmp_path / "runs").glob("*/metrics.json")
    before = run.read_text()
    with pytest.raises(SystemExit):
        sweep(x * 50, "seed=0,1")
    cfg = Config(**dict(json.loads(before)["config"]))
    with pytest.raises(ValueError, match="is of other data"):
        complete_run(cfg, progress=False)
    assert run.read_text() == before
    (run.parent / "model.safetensors").unlink()
    (run.parent / "checkpoint.safetensors").unlink(missing_ok=True)
    now = complete_run(cfg, progress=False)  # trained anew, and so evaluated anew
    assert now["reconstruction"] > json.loads(before)["metrics"]["reconstruction"] + 1
    file.write_text("a,b,c,d\n1,2,,4\n")  # there, other, and of no use
    with pytest.raises(ValueError, match="row 1, column 'c' holds nothing"):
        complete_run(cfg, progress=False)
    with pytest.raises(SystemExit):
        main([f"dataset={file}", "model=CSRAE", *words, "seed=0", "--jobs", "1"])
    assert "finished runs are of other data than" in capsys.readouterr().err
    file.unlink()
    with pytest.warns(UserWarning, match="whether its data are the same now is not known"):
        assert complete_run(cfg, progress=False) == now


def test_runs_that_share_a_gpu_come_one_after_another(monkeypatch):
    grid = [Config(dataset="digits", seed=s) for s in (0, 1)]
    on_cpu = [replace(c, device="cpu") for c in grid]
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        found = [sweeps._at_once(*args) for args in ((grid, "local"), (on_cpu, "local"), (grid, "ray"))]
        assert found == [1 if gpu else sweeps.cores(), sweeps.cores(), sweeps.cores()]
