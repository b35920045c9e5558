"Labels of any kind: classes by name, -1 for none, answers of any data set, and how many of them are used."

from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch

from csrae_nb.catalogue import load_data
from csrae_nb.data import from_arrays, labelled_rows
from csrae_nb.evaluation import complete_run, results_table
from csrae_nb.labels import ManyLabels, OneLabel, counts_of_answers, how_many, label_kind, labelled_images
from csrae_nb.config import Config, command, make_config, resolve, run_name
from csrae_nb.files import runs_folder
from csrae_nb.runs import fit, load_run
from csrae_nb.tasks import task_of
from small_runs import SMALL

CFG = replace(SMALL, labels=1.0)
pytestmark = pytest.mark.usefixtures("own_runs", "hasty")


def blobs(n=200, classes=2, seed=0):
    "Points around as many corners, and the numbers of these."
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    return rng.normal(size=(n, 3)) + 3 * np.eye(classes, 3)[y], y


NAMES = {
    "integers": (lambda y: y, ("0", "1")),
    "with gaps": (lambda y: np.array([10177, 20_000_000])[y], ("10177", "20000000")),
    "negative": (lambda y: np.array([-7, 5])[y], ("-7", "5")),
    "whole floats": (lambda y: y.astype(np.float32), ("0", "1")),
    "bools": (lambda y: y == 1, ("False", "True")),
    "text": (lambda y: np.array(["dog", "cat"])[y], ("cat", "dog")),
    "text of floats": (lambda y: np.array(["1.0", "0.5"])[y], ("0.5", "1.0")),
    "objects": (lambda y: np.array([3, "x"], object)[y], ("3", "x")),
    "bytes": (lambda y: np.array([b"b", b"a"])[y], ("a", "b")),
    "a list": (lambda y: [["dog", "cat"][c] for c in y], ("cat", "dog")),
    "a column": (lambda y: y[:, None], ("0", "1")),
    "a tensor": (lambda y: torch.from_numpy(y)[:, None].double(), ("0", "1")),
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_class_is_a_distinct_value_and_keeps_its_name(kind):
    make, names = NAMES[kind]
    x, y = blobs()
    given = make(y)
    data = load_data(
        dict(x_train=x, y_train=given, x_val=x[:40], y_val=given[:40], x_test=x[:40], y_test=given[:40])
    )
    run = fit(CFG, data, False)
    kept = load_run(run.path).model.kind
    assert (data.classes, kept.names, kept.outputs) == (names, names, 2)
    numbers = data.y_train.numpy()
    assert (
        set(numbers) == {0, 1}
        and (numbers == (y if names[0] in ("0", "10177", "-7", "False", "3") else 1 - y)).all()
    )
    assert 0 <= task_of(run.cfg).metrics(run.model, data)["error"] <= 100


@pytest.mark.parametrize(
    "none, make",
    [
        (-1, lambda y: y),
        (np.nan, lambda y: y.astype(float)),
        (-1.0, lambda y: y.astype(float)),
        ("", lambda y: np.array(["a", "b"])[y]),
        (None, lambda y: np.array(["a", "b"], object)[y]),
        (np.nan, lambda y: np.array(["a", "b"], object)[y]),
        (None, lambda y: y.astype(object)),
    ],
)
def test_what_means_no_label(none, make):
    x, y = blobs()
    part = make(y).copy()
    part[20:] = none
    data = load_data(dict(x_train=x, y_train=part, x_val=x, y_val=make(y), x_test=x, y_test=part))
    assert data.y_train[20:].unique().tolist() == [-1] and (data.y_train[:20].numpy() == y[:20]).all()
    assert labelled_rows(data, "train").tolist() == list(range(20)) and len(data.classes) == 2
    task = task_of(resolve(CFG))
    rows = task.rows(data, 1)[:, : task.in_batch(data)]
    assert (
        task.labelled(data).equal(torch.arange(20)) and rows.max() < 20 and task.about(data)["share"] == 0.1
    )


def test_a_run_with_few_labels_is_measured_on_what_is_known():
    x, y = blobs(300, 3)
    part = y.copy()
    part[60:] = -1
    data = load_data(
        dict(x_train=x, y_train=part, x_val=x[:80], y_val=part[:80], x_test=x[:80], y_test=part[:80])
    )
    known = load_data(
        dict(x_train=x[:60], y_train=y[:60], x_val=x[:60], y_val=y[:60], x_test=x[:60], y_test=y[:60])
    )
    metrics = complete_run(cfg := replace(CFG, epochs=4), data, progress=False)
    model = load_run(runs_folder() / run_name(cfg)).model
    assert (
        metrics["error"]
        == metrics["error_val"]
        == pytest.approx(task_of(resolve(cfg)).metrics(model, known)["error"])
    )
    assert (
        all(0 <= metrics[k] <= 100 for k in ("knn3", "knn5_val"))
        and 0 <= metrics["cluster_nmi"] <= 1
        and metrics["frechet_classifier_samples"] > 0
    )


def test_neighbours_without_a_label_have_no_vote():
    "Codes of what has no label could all be nearest."
    x, y = blobs(300, 3)
    part = np.where(np.arange(300) % 2, -1, y)
    data = load_data(
        dict(x_train=x, y_train=part, x_val=x[:100], y_val=part[:100], x_test=x[:100], y_test=part[:100])
    )
    assert complete_run(replace(CFG, labels=0.0, epochs=10, lr=2e-3), data, progress=False)["knn5"] < 40


def test_no_known_label_is_no_labels():
    x, y = blobs()
    data = load_data(
        dict(x_train=x, y_train=y, x_val=x, y_val=np.full(200, -1), x_test=x, y_test=[np.nan] * 200)
    )
    assert data.y_val is None and data.y_test is None and data.classes == ("0", "1")
    assert load_data(dict(x=x, y=np.full(200, -1))).y_train is None


@pytest.mark.parametrize(
    "y, says",
    [
        ([-1, 1] * 10, "labels are -1 and 1, and -1 means .* write 0 for it"),
        ([[-1, 1], [1, -1]] * 10, "write 0 for it"),
        ([0.5, 1.0] * 10, "y_train holds 0.5; classes are whole numbers or text"),
        ([[0, 2], [1, 3]] * 10, "a vector of classes .* or a matrix of answers"),
        ([np.inf, 1.0] * 10, "y_train holds inf"),
        (np.zeros((20, 2, 2)), "shape .20, 2, 2."),
        (np.array(["2020-01-01"] * 20, "datetime64[D]"), "dtype datetime64"),
        ([0, 1] * 5, "y_train has 10 labels, x_train has 20 examples"),
    ],
)
def test_what_is_no_label_is_refused_at_the_door(y, says):
    with pytest.raises(ValueError, match=says):
        load_data(dict(x=np.random.randn(20, 3), y=y))


def test_labels_of_two_kinds_are_refused():
    x = np.random.randn(20, 3)
    for other in (["a"] * 20, [[0, 1]] * 20):
        with pytest.raises(
            ValueError, match="y_test has labels of dtype .* y_train of int64 .*: use one kind"
        ):
            from_arrays(dict(x=x, y=[0, 1] * 10, x_test=x, y_test=other))


@pytest.mark.parametrize("model", ["MixtureCSRAE", "VAE"])
def test_validation_and_test_labels_are_optional(model):
    "The epoch is then chosen by the objective."
    x, y = blobs()
    data = dict(x_train=x, y_train=y, x_val=x[:50], x_test=x[:50])
    metrics = complete_run(cfg := replace(CFG, model=model, epochs=4, labels=0.5), data, progress=False)
    run = load_run(runs_folder() / run_name(cfg))
    objective = [r["val_reconstruction"] + r["val_divergence"] for r in run.history]
    assert run.best_epoch == 1 + int(np.argmin(objective)) and "val_error" not in run.history[0]
    assert metrics["error"] is None and metrics["error_val"] is None and metrics["reconstruction"] is not None
    assert results_table([run.path])[0]["labels"] == 0.5
    tested = complete_run(replace(cfg, seed=1), {**data, "y_test": y[:50]}, progress=False)
    assert 0 <= tested["error"] <= 100 and tested["error_val"] is None


def test_a_classifier_alone_needs_labels_to_choose_its_epoch_by():
    x, y = blobs()
    with pytest.raises(ValueError, match="chooses its epoch by validation images with labels, .* give y_val"):
        fit(replace(CFG, model="Supervised"), dict(x_train=x, y_train=y, x_val=x, x_test=x), False)
    part = np.where(np.arange(200) < 20, y, -1)
    run = fit(
        replace(CFG, model="Supervised"), dict(x_train=x, y_train=part, x_val=x, y_val=part, x_test=x), False
    )
    assert (
        len(run.history) == 2 and task_of(run.cfg).metrics(run.model, load_data(dict(x=x)))["error"] is None
    )


def test_a_zero_one_matrix_is_many_answers_of_any_data_set():
    x, y = blobs(300, 3)
    answers = np.stack([y == 0, y == 1], 1).astype(float)
    answers[150:, 1] = np.nan  # then not all answers are known
    data = load_data(
        dict(x_train=x, y_train=answers, x_val=x, y_val=answers, x_test=x[:100], y_test=answers[:100])
    )
    assert label_kind(data) == ManyLabels(2, ("0", "1")) and data.y_train[150:, 1].unique().tolist() == [-1]
    metrics = complete_run(cfg := replace(CFG, epochs=4), data, progress=False)
    assert set(task_of(resolve(cfg)).labelled(data).tolist()) == set(range(150)) and 0 <= metrics["f1"] <= 100
    assert {"f1_0", "f1_1", "f1_val"} <= metrics.keys() and metrics["knn5"] is None
    model = load_run(runs_folder() / run_name(cfg)).model
    guess, truth = model.predict(data.x_val) > 0, data.y_val
    hits = (guess[:150, 1] & (truth[:150, 1] == 1)).sum()
    want = 200 * hits / (guess[:150, 1].sum() + (truth[:150, 1] == 1).sum())  # of what is known
    assert model.kind.judge(model.predict(data.x_val), truth)["f1_1"] == pytest.approx(want.item())


# --- how many


def test_labels_count_as_in_scikit_learn():
    assert [how_many(l, 200) for l in (1, 1.0, 0.5, 100, 100.0)] == [1, 200, 100, 100, 100]
    y = torch.arange(200) % 4
    assert [len(labelled_images(y, l, 0)) for l in (1, 1.0, 0.25, 60, 60.0)] == [1, 200, 50, 60, 60]
    x, y = blobs()
    task = task_of(resolve(replace(CFG, labels=1)))
    assert len(task.labelled(load_data(dict(x=x, y=y)))) == 1
    assert fit(replace(CFG, labels=1), dict(x=x, y=y), False).cfg.labels == 1
    with pytest.raises(ValueError, match="labels=1.5; expected a whole number of images, or a share"):
        Config(labels=1.5)


def test_names_of_runs_are_those_of_version_0_1_0():
    for labels, digest in [
        (None, "9b0abb"),
        (0, "9b0abb"),
        (0.0, "9b0abb"),
        (0.25, "9c933a"),
        (1000, "ab4b75"),
        (1000.0, "ab4b75"),
    ]:
        assert run_name(Config(labels=labels)).endswith(digest)
    assert (
        run_name(Config(labels=1.0))
        == run_name(make_config(dict(labels=1.0)))
        == "digits-MixtureCSRAE-mog20-z10-labels1-seed0-b53d6a"
    )


def test_one_label_and_all_labels_are_two_runs():
    "Although 1 == 1.0."
    one, every = Config(labels=1), Config(labels=1.0)
    assert (
        run_name(one) != run_name(every)
        and type(resolve(one).labels) is int
        and type(Config(labels=1000).labels) is float
    )
    assert "-p labels 1 " in command(one) + " " and "-p labels 1.0" in command(every)
    x, y = blobs()
    fit(replace(CFG, name="same", labels=1.0), dict(x=x, y=y), False)
    with pytest.raises(ValueError, match="holds a run of another configuration .labels"):
        fit(replace(CFG, name="same", labels=1), dict(x=x, y=y), False)
    assert type(load_run(fit(replace(CFG, labels=1), dict(x=x, y=y), False).path).cfg.labels) is int


def test_integer_labels_are_hashed_as_before():
    "So that runs of version 0.1.0 are found to be of the same data."
    x, y = blobs()
    y = y * 3 + 1
    assert (
        load_data(dict(x=x, y=y.astype(np.int32))).sha256["y_train"]
        == sha256(y.astype(np.int64).tobytes()).hexdigest()
    )


def test_the_kinds_of_the_data_sets_stay():
    assert (
        label_kind(load_data("digits")) == OneLabel(10, tuple(map(str, range(10))))
        and label_kind(load_data("pinwheel")).outputs == 4
    )


def test_without_a_single_yes_the_objective_chooses_the_epoch():
    "F1 was 0 in each epoch, and the first was kept."
    g = np.random.default_rng(0)
    x = (g.random((300, 12)) < 0.5).astype(np.uint8)
    y = np.stack([x[:, 0], x[:, 1] & x[:, 2]], 1).astype(int)
    parts = dict(train=slice(200), val=slice(200, 250), test=slice(250, 300))
    data = {f"{k}_{part}": v[at] for part, at in parts.items() for k, v in dict(x=x, y=y).items()}
    data["y_val"] = 0 * data["y_val"]
    fields = dict(labels=1.0, balance="none", epochs=6, batch_size=20, labelled_batch=5, latent_dim=2)
    for model in ("CSRAE", "Supervised"):
        run = fit(Config(dataset="arrays", model=model, warmup=1, name=model, **fields), data, False)
        criterion = [row["criterion"] for row in run.history]
        assert "val_f1" not in run.history[0] and run.best_epoch == 1 + criterion.index(min(criterion)) > 1


def test_a_batch_of_one_labelled_image_is_not_balanced():
    x, y = np.random.default_rng(0).random((60, 4)), np.arange(120).reshape(60, 2) % 2
    cfg = Config(dataset="arrays", model="CSRAE", labels=30, labelled_batch=1, batch_size=10, epochs=1)
    with pytest.raises(ValueError, match="one labelled image in a batch cannot be half yes"):
        fit(cfg, dict(x=x, y=y), False)


def test_while_f1_is_0_the_criterion_decides():
    "Of epochs alike in F1 the first was kept, the least trained of them."
    task = task_of(resolve(Config(dataset="arrays", model="Supervised", labels=1.0)))
    best = dict(val_f1=0.0, criterion=8.1)
    assert task.breaks_tie(dict(val_f1=0.0, criterion=7.8), best)
    assert not task.breaks_tie(dict(val_f1=0.0, criterion=8.2), best)
    assert not task.breaks_tie(dict(val_f1=50.0, criterion=7.8), best | dict(val_f1=50.0))


def test_counts_are_of_all_that_is_known():
    g = torch.Generator().manual_seed(0)
    guess, y = (torch.randint(low, 2, (40, 2), generator=g) for low in (0, -1))
    of = counts_of_answers(guess, y, ("a", "b"))
    for k, name in enumerate("ab"):
        assert sum(of[f"{c}_{name}"] for c in ("tp", "fp", "fn", "tn")) == (y[:, k] >= 0).sum()
        assert of[f"tn_{name}"] == ((y[:, k] == 0) & (guess[:, k] == 0)).sum()
