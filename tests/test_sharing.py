"Models that travel, through a stand-in for the Hub."

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.hub_mixin
import jaxtyping
import pytest
import torch
from safetensors.torch import save_file

from csrae_nb import Pretrained, sharing
from csrae_nb.estimator import CSRAEEmbedding
from csrae_nb.evaluation import complete_run
from csrae_nb.config import Config, run_name
from csrae_nb.files import load_tensors, runs_folder, save_tensors
from csrae_nb.runs import fit, load_run
from csrae_nb.sharing import open_run


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CSRAE_RUNS", str(tmp_path_factory.mktemp("runs")))
        cfg = Config(epochs=3, warmup=1, ll_samples=5, fid_images=50)
        complete_run(cfg, progress=False)
        return runs_folder() / run_name(cfg)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A folder in place of the Hub: what is pushed lies there, what is asked for is copied from there."

    class Api:
        def __init__(self, endpoint=None, token=None):
            pass

        def model_info(self, repo_id, revision=None, files_metadata=False):
            files = [
                SimpleNamespace(rfilename=f.name, size=f.stat().st_size)
                for f in (tmp_path / repo_id).iterdir()
            ]
            return SimpleNamespace(siblings=files, sha="the newest")

        def create_repo(self, repo_id, **kw):
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=True)
            return type("Url", (), dict(repo_id=repo_id))

        def upload_folder(self, repo_id, folder_path, **kw):
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
            return f"hub/{repo_id}"

    def download(name, **kw):
        if not (tmp_path / name).exists():
            raise FileNotFoundError(f"404: {name}")
        asked.append(kw)
        ignore = lambda folder, names: [n for n in names if n not in kw["allow_patterns"]]
        return shutil.copytree(tmp_path / name, tmp_path / "cache" / name, dirs_exist_ok=True, ignore=ignore)

    asked = download.asked = []
    for module in huggingface_hub.hub_mixin, sharing:
        monkeypatch.setattr(module, "HfApi", Api)
    monkeypatch.setattr(sharing, "snapshot_download", download)
    return tmp_path


def test_over_the_hub(run_path, hub):
    mine = Pretrained(run_path)
    assert mine.push_to_hub("someone/digits") == "hub/someone/digits"
    assert {p.name for p in (hub / "someone/digits").iterdir()} == {
        "README.md",
        "config.json",
        "metrics.json",
        "model.safetensors",
    }
    yours = Pretrained.from_pretrained("someone/digits")
    x = torch.rand(4, 8, 8)
    torch.testing.assert_close(yours.model.reconstruct(x), mine.model.reconstruct(x))
    assert yours.metrics["metrics"] == mine.metrics["metrics"]
    with pytest.raises(
        FileNotFoundError, match="'someone/letters' is no folder here, and the Hub did not give it"
    ):
        Pretrained.from_pretrained("someone/letters")


def test_saving_into_the_runs_own_folder_and_a_second_time_spoils_nothing(run_path, tmp_path):
    folder = shutil.copytree(run_path, tmp_path / "run")
    x = torch.rand(4, 8, 8)
    before = Pretrained(folder).model.encode(x).mu
    for _ in range(2):
        Pretrained(folder).save_pretrained(folder)
    assert torch.equal(Pretrained(folder).model.encode(x).mu, before)
    (folder / "README.md").write_text("mine")
    Pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"  # a card that someone edited stays


def test_a_write_that_fails_leaves_no_half_a_model(run_path, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharing, "save_tensors", full)
    with pytest.raises(OSError, match="No space"):
        Pretrained(run_path).save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="no finished run"):
        Pretrained.from_pretrained(tmp_path / "out")


def test_metrics_that_are_no_metrics(run_path, tmp_path):
    folder = shutil.copytree(run_path, tmp_path / "run")
    for text in ("[]", "{}", "null", "{"):
        (folder / "metrics.json").write_text(text)
        with pytest.raises(ValueError, match="metrics.json is damaged"):
            Pretrained(folder)


def test_the_card_of_a_path_names_no_folder(run_path):
    run = Pretrained(run_path).run
    card = str(sharing.model_card(run))
    assert "Not evaluated" in card
    assert "papermill nbs/train.ipynb" in card
    assert str(Path.home()) not in card
    assert str(run_path.parent) not in card
    assert json.loads((run_path / "metrics.json").read_text())["provenance"]["command"] in str(
        Pretrained(run_path).generate_model_card()
    )


def test_only_a_models_files_come_and_their_size_is_said_before(run_path, hub, capsys):
    Pretrained(run_path).push_to_hub("someone/digits")
    (hub / "someone/digits/extra.bin").write_bytes(bytes(10_000))
    size = sum(f.stat().st_size for f in (hub / "someone/digits").iterdir()) - 10_000
    with pytest.raises(ValueError, match=f"someone/digits is of {size:,} bytes, and the limit is 1,000"):
        Pretrained.from_pretrained("someone/digits", limit=1000)
    assert not sharing.snapshot_download.asked  # refused before anything comes
    Pretrained.from_pretrained("someone/digits", limit=size)
    assert f"someone/digits: 4 files, {size / 2**20:.1f} MiB" in capsys.readouterr().err
    assert not (hub / "cache/someone/digits/extra.bin").exists()
    assert sharing.snapshot_download.asked[0]["revision"] == "the newest"  # the one whose size was said


def test_what_the_hub_does_not_tell_the_size_of_comes_from_the_cache(run_path, hub, monkeypatch):
    Pretrained(run_path).push_to_hub("someone/digits")

    def offline(*args, **kw):
        raise RuntimeError("no network")

    monkeypatch.setattr(sharing.HfApi, "model_info", offline)
    assert Pretrained.from_pretrained("someone/digits").model
    assert "revision" not in sharing.snapshot_download.asked[0]


def rewritten(path, folder, change):
    "A copy of a run whose tensors and header are changed."
    folder = shutil.copytree(path, folder)
    tensors, meta = load_tensors(folder / "model.safetensors")
    save_tensors(folder / "model.safetensors", *change(tensors, meta))
    return folder


LARGE = dict(latent_dim=2_000_000, components=50_000_000, network="residual", prior="vamp")


@pytest.mark.parametrize("opened", [Pretrained, open_run])
@pytest.mark.parametrize("field", LARGE)
def test_a_small_file_that_describes_a_large_model_is_refused_unmade(
    run_path, tmp_path, monkeypatch, field, opened
):
    "Before anything is allocated."

    def change(tensors, meta):
        return {"encoder.net.0.weight": torch.zeros(2, 2)}, {
            **meta,
            "config": {**meta["config"], field: LARGE[field]},
        }

    folder = rewritten(run_path, tmp_path / "run", change)
    assert (folder / "model.safetensors").stat().st_size < 10_000
    monkeypatch.setattr(sharing, "load_run", None)  # it is not reached
    with pytest.raises(ValueError, match="other weights than its header says|describes no model"):
        opened(folder)


@pytest.mark.parametrize(
    "field", ["history", "config", "best_epoch", "seconds", "sha256", "x_shape", "likelihood"]
)
@pytest.mark.parametrize("value", [None, "ab"])
def test_a_header_without_what_it_must_say_is_a_value_error(run_path, tmp_path, field, value):
    def change(tensors, meta):
        rest = {k: v for k, v in meta.items() if k != field}
        return tensors, rest if value is None else {**rest, field: value}

    folder = rewritten(run_path, tmp_path / "run", change)
    with pytest.raises(ValueError, match=f"'{field}'|{field} cannot be|describes no model"):
        Pretrained(folder)


@pytest.mark.parametrize("columns", [5, None])
def test_columns_that_are_none_are_a_value_error(run_path, tmp_path, columns):
    folder = rewritten(
        run_path, tmp_path / "run", lambda tensors, meta: (tensors, {**meta, "columns": columns})
    )
    with pytest.raises(ValueError, match="is no model of a finished run"):
        load_run(folder)


@pytest.mark.parametrize(
    "field, value, says", [("model", "GAN", "unknown model 'GAN'"), ("colour", "red", "colour")]
)
def test_a_configuration_of_another_version_is_a_value_error(run_path, tmp_path, field, value, says):
    change = lambda tensors, meta: (tensors, {**meta, "config": {**meta["config"], field: value}})
    with pytest.raises(ValueError, match=says):
        Pretrained(rewritten(run_path, tmp_path / "run", change))


@pytest.mark.parametrize(
    "header", [None, "{", "[]", json.dumps(dict(config={}))], ids=["none", "half", "a list", "no format"]
)
def test_a_foreign_header_is_a_value_error(tmp_path, header):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", header and {"csrae_nb": header})
    with pytest.raises(ValueError, match="no header of a run"):
        Pretrained.from_pretrained(tmp_path)


def test_models_with_labels_travel_too(tmp_path, monkeypatch):
    "Their header is read the same way, whatever makes them."
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    for more in dict(pretrain=0), dict(model="Supervised"), dict(pretrain=0, prior="vamp"):
        run = fit(Config(labels=100.0, epochs=1, **more), progress=False)
        Pretrained(run.path).save_pretrained(tmp_path / run.path.name)
        card = (tmp_path / run.path.name / "README.md").read_text()
        assert (
            "`x` has shape `(n, 8, 8)`, its values from 0 to 1." in card
            and "## Answers\n\n`0`, `1`, `2`" in card
        )
        assert "model.predict(x)" in card and ("model.sample" in card) == (run.cfg.model != "Supervised")
        x, there = torch.rand(4, 8, 8), Pretrained.from_pretrained(tmp_path / run.path.name).model
        torch.testing.assert_close(there.predict(x), run.model.predict(x))


def test_pseudo_inputs_of_data_of_ones_own_are_warned_of_and_not_uploaded(own_runs, hub, tmp_path):
    brief = dict(epochs=1, warmup=1, latent_dim=2, components=3, prior="vamp", batch_size=20)
    x = torch.rand(60, 6).round().numpy()
    mine = Pretrained(fit(Config(dataset="arrays", **brief), dict(x=x), progress=False).path)
    says = "has 3 pseudo-inputs, which began as training examples of arrays and may show them"
    with pytest.warns(UserWarning, match=says):
        mine.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=says):
        mine.push_to_hub("someone/mine")
    with pytest.raises(ValueError, match=says), pytest.warns(UserWarning):
        mine.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="someone/mine")
    assert not (hub / "someone/mine").exists()
    with pytest.warns(UserWarning, match=says):
        assert mine.push_to_hub("someone/mine", examples=True) == "hub/someone/mine"
    public = Pretrained(fit(Config(**brief), progress=False).path)
    assert public.push_to_hub("someone/digits") == "hub/someone/digits"  # without a word


def test_no_path_of_the_authors_machine_is_shared():
    weights = "/home/me/secret/resnet18.pth"
    cfg = Config(dataset="/home/me/private/faces.npz", network="resnet18", encoder_weights=weights)
    assert not any("/home/me" in str(v) for v in vars(sharing._to_share(cfg)).values())


def test_an_estimator_is_no_run(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="a CSRAEEmbedding; expected a run's folder"):
        Pretrained(CSRAEEmbedding())


def test_keywords_that_mean_nothing_are_refused(run_path, tmp_path):
    Pretrained(run_path).save_pretrained(tmp_path / "shared")
    for keyword, says in (
        ("device", "device; expected .*the CPU, and .to"),
        ("foo", "foo; expected repo_type"),
    ):
        with pytest.raises(TypeError, match=f"from_pretrained has no {says}"):
            Pretrained.from_pretrained(tmp_path / "shared", **{keyword: 1})
    assert Pretrained.from_pretrained(tmp_path / "shared", revision="main").model
