"Fréchet distances: the FID with random weights for Inception's and without any, and what meets what."

import dataclasses
import math

import pytest
import torch
from filelock import FileLock

from csrae_nb.catalogue import load_data
from csrae_nb.evaluation import SETS, complete_run, evaluate, finished_metrics, measure
from csrae_nb.metrics import (
    FID_WEIGHTS,
    FIDUnavailable,
    inception,
    inception_features,
    inception_module,
    weights_file,
)
from csrae_nb.config import Config, run_name
from csrae_nb.files import RunLocked, runs_folder
from csrae_nb.runs import fit

pytest.importorskip("pytorch_fid")
CFG = Config(
    epochs=2, warmup=1, kmeans_epoch=1, ll_samples=0, expost_components=5, fid_layer=64, fid_images=6
)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def random_weights(monkeypatch):
    "The network is built as ever, but keeps the weights it was initialised with."

    def build(layer):
        with monkeypatch.context() as m:
            m.setattr(inception_module(), "load_state_dict_from_url", lambda *a, **k: {})
            m.setattr(torch.nn.Module, "load_state_dict", lambda self, *a, **k: None)
            torch.manual_seed(0)
            return inception(layer)

    return build


@pytest.mark.parametrize("layer", [64, 192, 768, 2048])
def test_each_layer_gives_its_number_of_features(random_weights, layer):
    with torch.no_grad():
        h = random_weights(layer)(torch.rand(2, 3, 28, 28))
    assert h.shape == (2, layer) and h.isfinite().all() and not torch.equal(h[0], h[1])


def test_a_run_with_fid_says_how_it_was_made(random_weights, monkeypatch, hasty):
    monkeypatch.setattr("csrae_nb.metrics.inception", random_weights)
    metrics = complete_run(CFG, progress=False)
    assert all(math.isfinite(metrics[f"fid_{s}"]) and metrics[f"fid_{s}"] >= -1e-3 for s in SETS)
    assert (metrics["fid_layer"], metrics["fid_resize"], metrics["images"]) == (64, "bilinear, 299x299", 6)
    assert (
        len(list((runs_folder() / ".cache").glob("digits-statistics-*.safetensors"))) == 2
    )  # of the classifier's features, and of these


def test_a_damaged_cache_is_made_anew(random_weights, monkeypatch, hasty):
    monkeypatch.setattr("csrae_nb.metrics.inception", random_weights)
    first = complete_run(CFG, progress=False)
    for f in (runs_folder() / ".cache").glob("*.safetensors"):
        f.write_bytes(f.read_bytes()[:100])
    (runs_folder() / run_name(CFG) / "metrics.json").unlink()
    again = complete_run(CFG, progress=False)
    assert {k: again[k] for k in first if k != "occupancy"} == {
        k: first[k] for k in first if k != "occupancy"
    }


def test_colour_and_grey_are_shown_with_three_channels_from_0_to_1(monkeypatch):
    seen = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            seen.append(x)
            return x.flatten(1)

    monkeypatch.setattr("csrae_nb.metrics.inception", lambda layer: Net())
    data = load_data("digits")
    inception_features(data, 64).of(data.x_test[:2])
    colour = load_data(dict(x=torch.randint(256, (20, 3, 4, 4), dtype=torch.uint8)))
    inception_features(colour, 64).of(colour.x_test)
    assert (
        seen[0].shape == (2, 3, 8, 8)
        and seen[1].shape[1:] == (3, 4, 4)
        and all(0 <= x.min() and x.max() <= 1 for x in seen)
    )


def test_without_weights_a_run_goes_on(monkeypatch):
    def offline(*a, **k):
        raise OSError("no network here")

    monkeypatch.setattr(inception_module(), "load_state_dict_from_url", offline)
    with pytest.warns(UserWarning, match=f"no FID: .*{FID_WEIGHTS}"):
        metrics = complete_run(CFG, progress=False)
    assert (
        metrics["fid_samples"] is None
        and metrics["fid_layer"] is None
        and metrics["frechet_classifier_samples"] > 0
    )
    assert finished_metrics(CFG) == metrics


def test_the_fid_is_made_up_for_when_the_weights_arrive(random_weights, monkeypatch, tmp_path):
    def offline(*a, **k):
        raise OSError("no network here")

    cfg = dataclasses.replace(CFG, ll_samples=2)
    with monkeypatch.context() as m, pytest.warns(UserWarning, match="no FID"):
        m.setattr(inception_module(), "load_state_dict_from_url", offline)
        before = complete_run(cfg, progress=False)
    weights_file().parent.mkdir(parents=True)
    weights_file().touch()
    monkeypatch.setattr("csrae_nb.metrics.inception", random_weights)
    after = complete_run(cfg, progress=False)
    assert (
        before["fid_samples"] is None
        and after["fid_samples"] > 0
        and after["log_likelihood"] is not None
        and after["log_likelihood"] == before["log_likelihood"]
        and finished_metrics(cfg) == after
    )


def test_a_run_is_evaluated_by_one_process_at_a_time():
    run = fit(dataclasses.replace(CFG, fid_layer=0), progress=False)
    with FileLock(run.path / ".lock"), pytest.raises(RunLocked, match="another process is at work"):
        measure(run, load_data("digits"), progress=False)
    metrics = measure(run, load_data("digits"), progress=False)
    with FileLock(run.path / ".lock"):
        assert measure(run, load_data("digits"), progress=False) == metrics  # to read, nobody waits


def test_damaged_weights_are_named(tmp_path):
    place = tmp_path / "torch" / "hub" / "checkpoints"
    place.mkdir(parents=True)
    (place / FID_WEIGHTS).write_bytes(b"these are no weights")
    with pytest.raises(FIDUnavailable, match=f"{FID_WEIGHTS} is damaged"):
        inception()


def test_without_labels_there_is_no_classifier_and_no_neighbours():
    x = torch.rand(60, 6, 6).numpy()
    with pytest.warns(UserWarning, match="has no labels"):
        metrics = complete_run(
            Config(
                dataset="arrays",
                epochs=1,
                warmup=1,
                batch_size=20,
                components=2,
                latent_dim=2,
                ll_samples=2,
                expost_components=2,
            ),
            dict(x=x),
            progress=False,
        )
    assert (
        metrics["knn3"] is None
        and metrics["frechet_classifier_samples"] is None
        and metrics["log_likelihood"] is not None
    )


def test_a_draw_from_grey_images_is_compared_with_them(monkeypatch):
    grey = load_data("digits")
    drawn = dataclasses.replace(
        grey,
        name="static_mnist",
        dynamic=False,
        **{f"x_{s}": grey.fixed(s) for s in ("train", "val", "test")},
        y_train=None,
        y_val=None,
        y_test=None,
    )
    cfg = dataclasses.replace(CFG, dataset="static_mnist", epochs=1, fid_layer=0, fid_images=100)
    monkeypatch.setattr("csrae_nb.evaluation.load_data", lambda name: {"mnist": grey}[name])
    run = fit(cfg, drawn, progress=False)
    with pytest.warns(UserWarning, match="no kNN errors$"):
        of_draw = evaluate(run, drawn, progress=False)
    of_grey = evaluate(run, grey, progress=False)
    same = (
        "frechet_classifier_floor",
        "frechet_classifier_reconstructions",
        "classifier",
    )  # the same real images, the same inputs to the encoder
    assert [of_draw[k] for k in same] == [of_grey[k] for k in same] and of_draw["knn3"] is None

    def away(name):
        raise FileNotFoundError(name)

    monkeypatch.setattr("csrae_nb.evaluation.load_data", away)
    with pytest.warns(UserWarning, match="images of mnist, which are not at hand"):
        assert evaluate(run, drawn, progress=False)["frechet_classifier_floor"] is None
