"Models that travel, through a stand-in for the Hub."
import json
import shutil
from pathlib import Path

import huggingface_hub.hub_mixin
import pytest
import torch

from csrae_nb import Pretrained, sharing
from csrae_nb.evaluation import complete_run
from csrae_nb.training import Config, run_name, runs_folder

@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CSRAE_RUNS", str(tmp_path_factory.mktemp("runs")))
        cfg = Config(epochs=3, warmup=1, ll_samples=5, fid_images=50); complete_run(cfg, progress=False)
        return runs_folder()/run_name(cfg)

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A folder in place of the Hub: what is pushed lies there, what is asked for is copied from there."
    class Api:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, **kw): (tmp_path/repo_id).mkdir(parents=True, exist_ok=True); return type("Url", (), dict(repo_id=repo_id))
        def upload_folder(self, repo_id, folder_path, **kw): shutil.copytree(folder_path, tmp_path/repo_id, dirs_exist_ok=True); return f"hub/{repo_id}"
    def download(name, **kw):
        if not (tmp_path/name).exists(): raise FileNotFoundError(f"404: {name}")
        return shutil.copytree(tmp_path/name, tmp_path/"cache"/name, dirs_exist_ok=True)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api); monkeypatch.setattr(sharing, "snapshot_download", download)
    return tmp_path

def test_over_the_hub(run_path, hub):
    mine = Pretrained(run_path); assert mine.push_to_hub("someone/digits") == "hub/someone/digits"
    assert {p.name for p in (hub/"someone/digits").iterdir()} == {"README.md", "config.json", "metrics.json", "model.safetensors"}
    yours = Pretrained.from_pretrained("someone/digits"); x = torch.rand(4, 8, 8)
    torch.testing.assert_close(yours.model.reconstruct(x), mine.model.reconstruct(x)); assert yours.metrics["metrics"] == mine.metrics["metrics"]
    with pytest.raises(FileNotFoundError, match="'someone/letters' is no folder here, and the Hub did not give it"): Pretrained.from_pretrained("someone/letters")

def test_saving_into_the_runs_own_folder_and_a_second_time_spoils_nothing(run_path, tmp_path):
    folder = shutil.copytree(run_path, tmp_path/"run"); x = torch.rand(4, 8, 8); before = Pretrained(folder).model.encode(x).mu
    for _ in range(2): Pretrained(folder).save_pretrained(folder)
    assert torch.equal(Pretrained(folder).model.encode(x).mu, before)
    (folder/"README.md").write_text("mine"); Pretrained(folder).save_pretrained(folder); assert (folder/"README.md").read_text() == "mine"   # a card that someone edited stays

def test_a_write_that_fails_leaves_no_half_a_model(run_path, tmp_path, monkeypatch):
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(sharing, "save_tensors", full)
    with pytest.raises(OSError, match="No space"): Pretrained(run_path).save_pretrained(tmp_path/"out")
    with pytest.raises(ValueError, match="no finished run"): Pretrained.from_pretrained(tmp_path/"out")

def test_metrics_that_are_no_metrics(run_path, tmp_path):
    folder = shutil.copytree(run_path, tmp_path/"run")
    for text in ("[]", "{}", "null", "{"):
        (folder/"metrics.json").write_text(text)
        with pytest.raises(ValueError, match="metrics.json is damaged"): Pretrained(folder)

def test_the_card_of_a_path_names_no_folder(run_path):
    run = Pretrained(run_path).run; card = str(sharing.model_card(run))
    assert "Not evaluated" in card and "papermill nbs/train.ipynb" in card and str(Path.home()) not in card and str(run_path.parent) not in card
    assert json.loads((run_path/"metrics.json").read_text())["provenance"]["command"] in str(Pretrained(run_path).generate_model_card())
