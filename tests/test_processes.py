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
    "mixtures": dict(posterior_components=3, objective="cs_each"),
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


OF_FACES = """
import numpy as np
from csrae_nb.config import Config
from csrae_nb.runs import fit
if __name__ == "__main__":
    x = (np.random.default_rng(0).random((200, 3, 32, 32)) * 255).astype(np.uint8)
    x[:100] //= 3
    fields = dict(network="faces", model="VAE", latent_dim=4, batch_size=20, epochs=100, warmup=0, patience=1)
    fit(Config(dataset="arrays", lr=1e-3, seed=6, device="cpu", name="faces", **fields), dict(x=x), False)
    print("\\nfinished", flush=True)
"""


def test_processes_with_batch_normalisation_stop_together(tmp_path):
    "Each validated statistics of its own; one went on after ten epochs, and waited for the other for ever."
    (script := tmp_path / "faces.py").write_text(OF_FACES)
    own = dict(CSRAE_RUNS=str(tmp_path), ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    command = [*LAUNCH, free_port(), str(script)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0 and done.stdout.count("finished") == 2, done.stdout + done.stderr


def test_a_mac_trains_on_its_processor(monkeypatch):
    "Its GPU has no double precision."
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda *a, **kw: True)
    with accelerator(resolve(Config())) as acc:
        assert acc.device.type == "cpu"
