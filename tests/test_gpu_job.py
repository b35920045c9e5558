"The GPU job runs, with small sizes, where there is no GPU."

import csv
import os

from bench import gpu

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


def test_the_gpu_job_checks_times_and_fills_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    (tmp_path / "small.toml").write_text(SWEEP)
    out = tmp_path / "out"
    gpu.main(
        [
            "--small",
            "--out",
            str(out),
            "--sweeps",
            str(tmp_path / "small.toml"),
            "--jobs",
            "1",
            "--trainers",
            "1",
        ]
    )
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
