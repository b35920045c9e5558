"Two processes on a CPU do what one does: the same losses, one checkpoint, metrics once."

import csv
import json
import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over forked processes")

CFG = dict(epochs=3, warmup=1, kmeans_epoch=2, ll_samples=5, expost_components=5, device="cpu")
JOB = f"""
from accelerate import PartialState, notebook_launcher
from csrae_nb.evaluation import complete_run
from csrae_nb.config import Config
def job(name, fields):
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

    def run(name, fields, launcher):
        call, port = f"job({name!r}, {fields!r})", free_port()
        ends = {
            "one": call,
            "launch": call,
            "notebook": f"notebook_launcher(job, ({name!r}, {fields!r}), num_processes=2, use_port={port!r})",
        }
        (script := folder / f"{name}.py").write_text(f"{JOB}\nif __name__ == '__main__': {ends[launcher]}\n")
        env = {
            **os.environ,
            "CSRAE_RUNS": str(folder / "runs"),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [*([*LAUNCH, port] if launcher == "launch" else [sys.executable]), str(script)],
            env=env,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return folder / "runs" / name, done.stdout

    return run


def history(path):
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(open(path / "history.csv"))]


AGGREGATE = dict(prior_objective="aggregate", learned_weights=True)


@pytest.mark.parametrize(
    "fields, launchers",
    [(dict(), ("launch", "notebook")), (AGGREGATE, ("launch",)), (dict(model="IWAE"), ("launch",))],
    ids=["MixtureCSRAE", "aggregate", "IWAE"],
)
def test_two_processes_train_the_run_of_one(start, fields, launchers):
    name = fields.get("model", fields.get("prior_objective", "MixtureCSRAE"))
    one, _ = start(f"one-{name}", fields, "one")
    for launcher in launchers:
        two, said = start(f"{launcher}-{name}", fields, launcher)
        assert "process 0 of 2" in said and "process 1 of 2: 0 metrics" in said
        assert (
            sorted(os.listdir(one))
            == sorted(os.listdir(two))
            == [".lock", "config.json", "history.csv", "metrics.json", "model.safetensors"]
        )
        for a, b in zip(history(one), history(two), strict=True):
            assert a == pytest.approx(b, rel=2e-4), launcher
        a, b = (json.loads((p / "metrics.json").read_text())["metrics"] for p in (one, two))
        assert (a["reconstruction"], a["ll"]) == pytest.approx((b["reconstruction"], b["ll"]), rel=1e-3)
