"A run folder that version 0.1.0 wrote loads, is found finished, and is worth the same."

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from csrae_nb.catalogue import load_data
from csrae_nb.evaluation import complete_run, evaluate, finished_metrics
from csrae_nb.sharing import Pretrained
from csrae_nb.config import Config, run_name
from csrae_nb.runs import load_run

HERE = Path(__file__).parent / "runs_0.1.0"
CFG = Config(
    dataset="digits",
    network="pinwheel",
    latent_dim=3,
    components=5,
    epochs=4,
    warmup=1,
    ll_samples=3,
    fid_images=50,
    expost_components=3,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A copy of the run in a store of its own."
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path))
    return Path(shutil.copytree(HERE / run_name(CFG), tmp_path / run_name(CFG)))


def test_it_is_found_finished(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    metrics = complete_run(cfg := replace(CFG, ll_samples=0), progress=False)
    assert metrics == finished_metrics(cfg) and len(metrics) > 30
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_its_log_likelihood_is_estimated_anew(folder):
    "It drew from q(z|x) alone, which is too narrow."
    assert "ll" in finished_metrics(replace(CFG, ll_samples=0)) and finished_metrics(CFG) is None
    assert complete_run(CFG, progress=False)["log_likelihood"] < 0
    assert finished_metrics(CFG) is not None


def test_it_loads_and_is_worth_the_same(folder):
    run, model = load_run(folder), Pretrained.from_pretrained(folder).model
    best = json.loads((folder / "metrics.json").read_text())["best_epoch"]
    assert (run.cfg.epochs, len(run.history), run.best_epoch) == (4, 4, best)
    assert all(
        torch.equal(a, b) for a, b in zip(run.model.state_dict().values(), model.state_dict().values())
    )
    then = finished_metrics(replace(CFG, ll_samples=0))
    now = evaluate(run, load_data("digits"), progress=False)
    for name in ("reconstruction", "divergence", "knn3", "active_units", "effective_k"):
        assert now[name] == pytest.approx(then[name], rel=1e-3), name
