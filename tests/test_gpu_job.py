"The GPU job runs, with small sizes, where there is no GPU."

import csv
import os

import pytest

from bench import gpu
from csrae_nb.evaluation import write_table

SWEEP = """
title = "small"
[defaults]
dataset = "digits"
epochs = 2
ll_samples = 0
fid_layer = 0
[[grid]]
model = "CSRAE"
seed = [0, 1]
[[grid]]
model = "IWAE"
"""


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_the_gpu_job_checks_times_fills_tables_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    (tmp_path / "small.toml").write_text(SWEEP)
    out, where = tmp_path / "out", ["--small", "--out", str(tmp_path / "out")]
    gpu.main([*where, "--sweeps", str(tmp_path / "small.toml"), "--jobs", "1", "--trainers", "1"])
    checks = rows(out / "gpu_smoke.csv")
    assert len(checks) == 4 and [c["check"] for c in checks if c["works"] != "yes"] == []
    timed = rows(out / "gpu_timing.csv")
    assert {"fit", "fleet"} <= {r["what"] for r in timed} and not any(r.get("error") for r in timed)
    assert "MixtureCSRAE mog, labels" in {r["model"] for r in timed}
    assert sorted((r["model"], r["seeds"]) for r in rows(out / "small.csv")) == [
        ("CSRAE", "0"),
        ("CSRAE", "1"),
        ("IWAE", "0"),
    ]
    assert {p.stem for p in out.glob("*.txt")} == {"profile-VAE-no", "profile-MixtureCSRAE-mog-labels-no"}
    checks[2]["works"], timed[0]["error"] = "NO", "CUDA error: an illegal memory access"
    write_table(out / "gpu_smoke.csv", checks)
    write_table(out / "gpu_timing.csv", [dict(error="") | t for t in timed])
    asked = []
    monkeypatch.setattr(gpu, "checked_aside", lambda name, small, until: asked.append(name))
    gpu.main([*where, "smoke", "timing"])  # what failed is tried again, and nothing else
    assert asked == [checks[2]["check"]]
    again = rows(out / "gpu_timing.csv")
    assert [r["what"] for r in again[:-1]] == [r["what"] for r in timed[1:]] and not again[-1]["error"]
    assert (again[-1]["what"], again[-1]["model"]) == (timed[0]["what"], timed[0]["model"])


def test_a_check_that_is_not_known_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--check", "grpah"])
    assert "unknown check 'grpah'; expected one of VAE, mlp" in capsys.readouterr().err


def test_runs_that_a_table_has_are_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    (tmp_path / "small.toml").write_text(SWEEP)
    (tmp_path / "results").mkdir()
    first = gpu.Table(tmp_path / "small.toml", tmp_path)
    assert len(first.configs) == 3
    for c in first.configs[:2]:
        gpu.complete_run(c, progress=False)
    assert first.write() == 2
    os.replace(tmp_path / "small.csv", tmp_path / "results" / "small.csv")
    assert [c.model for c in gpu.Table(tmp_path / "small.toml", tmp_path).configs] == [first.configs[2].model]
