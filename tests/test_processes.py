"Two processes on a CPU do what one does: the same losses, one checkpoint, metrics once."

import csv
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from csrae_nb.config import Config, resolve
from csrae_nb.process import accelerator

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over forked processes")

CFG = dict(epochs=3, warmup=1, kmeans_epoch=2, ll_samples=5, expost_components=5, device="cpu")
JOB = f"""
from accelerate import PartialState, notebook_launcher
from csrae_nb.evaluation import complete_run
from csrae_nb.config import Config
def job(runs):
    for name, fields in runs.items():
        metrics = complete_run(Config(name=name, **fields, **{CFG}), progress=False)
        state, n = PartialState(), len(metrics)
        print(f"\\nprocess {{state.process_index}} of {{state.num_processes}}: {{n}} metrics", flush=True)
"""
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")

    def run(how, runs):
        "Train runs one after another, in folders of their own; what was said on the way."
        names = {f"{how}-{name}": fields for name, fields in runs.items()}
        call, port = f"job({names!r})", free_port()
        if how == "notebook":
            call = f"notebook_launcher(job, ({names!r},), num_processes=2, use_port={port!r})"
        (script := folder / f"{how}.py").write_text(f"{JOB}\nif __name__ == '__main__': {call}\n")
        env = {
            **os.environ,
            "CSRAE_RUNS": str(folder / "runs"),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        }
        program = [*LAUNCH, port] if how == "launch" else [sys.executable]
        done = subprocess.run([*program, str(script)], env=env, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr
        return {name: folder / "runs" / f"{how}-{name}" for name in runs}, done.stdout

    return run


def history(path):
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(open(path / "history.csv"))]


RUNS = {
    "MixtureCSRAE": dict(),
    "aggregate": dict(prior_objective="aggregate", learned_weights=True),
    "IWAE": dict(model="IWAE"),
    "constraint": dict(constraint="divergence<=2"),
}
FILES = [".lock", "config.json", "history.csv", "metrics.json", "model.safetensors"]


@pytest.fixture(scope="module")
def alone(start):
    "The folders of the runs that one process trains."
    return start("one", RUNS)[0]


@pytest.mark.parametrize("how, names", [("launch", list(RUNS)), ("notebook", ["MixtureCSRAE"])])
def test_two_processes_train_the_runs_of_one(start, alone, how, names):
    together, said = start(how, {name: RUNS[name] for name in names})
    assert said.count("process 1 of 2: 0 metrics") == said.count("process 0 of 2") == len(names)
    for name in names:
        one, two = alone[name], together[name]
        assert sorted(os.listdir(one)) == sorted(os.listdir(two)) == FILES
        for a, b in zip(history(one), history(two), strict=True):
            assert a == pytest.approx(b, rel=2e-4), name
        a, b = (json.loads((p / "metrics.json").read_text())["metrics"] for p in (one, two))
        assert (a["reconstruction"], a["log_likelihood"]) == pytest.approx(
            (b["reconstruction"], b["log_likelihood"]), rel=1e-3
        )


def test_a_mac_trains_on_its_processor(monkeypatch):
    "Its GPU has no double precision."
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda *a, **kw: True)
    with accelerator(resolve(Config())) as acc:
        assert acc.device.type == "cpu"
