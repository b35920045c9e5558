"Two phases, many answers and classifiers alone: what fit makes of them, and what is refused."

import dataclasses
from importlib.util import find_spec

import pytest
import torch

from csrae_nb import few_labels, files, runs, tasks, training
from csrae_nb.action_units import compared_models, f1_table, over_folds, share_of
from csrae_nb.catalogue import load_data
from csrae_nb.drawings import write_disfa, write_fera2015
from csrae_nb.evaluation import complete_run, results_table
from csrae_nb.faces import load_faces
from csrae_nb.networks import torchvision_module
from csrae_nb.few_labels import LabelTask, first_phase, take_over
from csrae_nb.labels import Intensities
from csrae_nb.config import Config, command, identity, resolve, run_name
from csrae_nb.files import runs_folder
from csrae_nb.runs import fit, load_run
from csrae_nb.trained import Examples, encode_examples

pytestmark = pytest.mark.usefixtures("own_cache")  # faces are prepared beside the data

pytest.importorskip("cv2")
pytest.importorskip("h5py")
CFG = Config(
    dataset="faces_demo",
    image_size=32,
    epochs=2,
    warmup=1,
    pretrain=2,
    kmeans_epoch=1,
    components=3,
    batch_size=50,
    labelled_batch=10,
    latent_dim=4,
    expost_components=3,
)
DIGITS = Config(
    labels=100.0, pretrain=2, epochs=2, warmup=1, ll_samples=0, expost_components=5, fid_images=50
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "Two subjects of each fold of faces_demo and DISFA, and some tasks of FERA2015, on disk."
    root = tmp_path_factory.mktemp("faces")
    some = ("SN002", "SN010", "SN013", "SN018", "SN003", "SN029")
    write_disfa(root / "faces_demo", some, frames=60)
    (root / "DISFA").symlink_to("faces_demo")
    write_fera2015(
        root / "FERA2015", ("F001_T1", "M007_T2", "M011_T1", "F003_T3", "F007_T1", "F015_T4"), frames=40
    )
    return root


@pytest.fixture(autouse=True)
def places(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_DATA", str(drawn))
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.mark.filterwarnings("ignore:.*left out|fold . of .* has no frame")
@pytest.mark.parametrize("dataset, answers", [("faces_demo", 8), ("disfa", 8), ("fera2015", 5)])
def test_both_phases_on_each_layout(dataset, answers):
    "Nothing but the data set and what makes it quick: labels and pretraining come from the preset."
    cfg = dataclasses.replace(CFG, dataset=dataset, fid_layer=0)
    metrics = complete_run(cfg, progress=False)
    f1 = {k: v for k, v in metrics.items() if k.startswith("f1_") and k != "f1_val"}
    assert len(f1) == answers
    assert metrics["f1"] == pytest.approx(
        sum(v for v in f1.values() if v is not None) / sum(v is not None for v in f1.values())
    )
    assert {p.name for p in runs_folder().glob("[!.]*")} == {
        run_name(cfg),
        run_name(first_phase(resolve(cfg))),
    }
    assert resolve(cfg).labels == 0.25
    (row,) = results_table([runs_folder() / run_name(cfg)])
    assert (row["labels"], row["pretrain"], row["network"], row["f1_mean"]) == (
        0.25,
        2,
        "faces",
        metrics["f1"],
    )
    assert {k for k, v in f1.items() if v is not None} <= {k.removesuffix("_mean") for k in row}


def test_a_fold_without_labels_for_an_answer(drawn):
    data = load_faces("faces_demo", image_size=32, progress=False)
    y = data.y_train.clone()
    y[:, 2] = 0
    test = data.y_test.clone()
    test[:5, 2], test[:, 3] = 1, 0
    metrics = LabelTask(resolve(dataclasses.replace(CFG, pretrain=0))).metrics(
        fit(
            dataclasses.replace(CFG, pretrain=0),
            data := dataclasses.replace(data, y_train=y, y_test=test),
            progress=False,
        ).model,
        data,
    )
    assert metrics["f1_AU6"] is None and metrics["f1_AU4"] is not None and 0 <= metrics["f1"] <= 100


@pytest.mark.filterwarnings("ignore:fold . of .* has no frame")
def test_thresholds_are_those_of_validation_subjects():
    "Found again by trying each probability; test labels have no part in them; the table has them."
    cfg = dataclasses.replace(
        CFG, model="Supervised", labels=1.0, validation="subjects", epochs=3, batch_size=20, fid_layer=0
    )
    metrics = complete_run(cfg, progress=False)
    run = load_run(runs_folder() / run_name(cfg))
    data = load_faces("faces_demo", image_size=32, progress=False, validation="subjects")
    p, y = (run.model.predict(data.fixed("val")).double().sigmoid(), data.y_val)
    q = run.model.predict(data.fixed("test")).double().sigmoid()
    for a, name in enumerate(data.answers):
        t = metrics[f"threshold_{name}"]
        best = max(f1(p[:, a] > c, y[:, a]) for c in (0.5, *p[:, a].tolist()))  # always yes is none of them
        there, always = f1(p[:, a] > t, y[:, a]), f1(p[:, a] >= 0, y[:, a])
        assert t == 0.5 if always > best else there == pytest.approx(best)
        assert t == 0.5 or y[:, a].any() and not (p[:, a] > t).all()
        there = metrics[f"tuned_f1_{name}"]
        assert there == (
            pytest.approx(f1(q[:, a] > t, data.y_test[:, a])) if data.y_test[:, a].any() else None
        )
    other = dataclasses.replace(data, y_test=1 - data.y_test)
    assert all(v == metrics[k] for k, v in run.task.metrics(run.model, other).items() if "threshold" in k)
    (row,) = results_table([run.path])
    assert row["tuned_f1_mean"] == metrics["tuned_f1"] and row["threshold_AU25_mean"] is not None
    assert row["tp_AU25_mean"] + row["fn_AU25_mean"] == data.y_test[:, data.answers.index("AU25")].sum()


def f1(guess, y):
    "In percent, 0 where there is nothing to find."
    return 200 * (guess & (y == 1)).sum().item() / max(1, (guess.sum() + y.sum()).item())


def interrupted(cfg, data, monkeypatch, phase, epoch):
    "Fit, stopped at the beginning of an epoch of a phase."
    run_epoch = training.Training.train_and_validate

    def stop(t, bar):
        if bool(t.cfg.labels) == (phase == 2) and t.meta["epoch"] + 1 == epoch:
            raise KeyboardInterrupt
        run_epoch(t, bar)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(training.Training, "train_and_validate", stop)
        fit(cfg, data, progress=False)


@pytest.mark.parametrize("phase, epoch", [(1, 2), (2, 1), (2, 2)])
def test_either_phase_goes_on_where_it_was_stopped(digits, monkeypatch, phase, epoch):
    whole = fit(dataclasses.replace(DIGITS, name="whole"), digits, progress=False)
    interrupted(cfg := dataclasses.replace(DIGITS, name="stopped"), digits, monkeypatch, phase, epoch)
    again = fit(cfg, digits, progress=False)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def test_runs_with_other_labels_share_the_first_phase(digits):
    fit(DIGITS, digits, progress=False)
    before = {p: p.stat().st_mtime_ns for p in runs_folder().glob("*/model.safetensors")}
    fit(dataclasses.replace(DIGITS, labels=50.0), digits, progress=False)
    assert len(before) == 2
    assert len(list(runs_folder().iterdir())) == 3
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert "-p pretrain 2" in command(resolve(DIGITS))
    values = "-p epochs 2 -p ll_samples 0 -p fid_images 50 -p expost_components 5"
    assert command(first_phase(resolve(DIGITS))) == f"papermill nbs/train.ipynb {values}"


def test_a_first_phase_that_another_process_trains_is_waited_for(digits, monkeypatch):
    calls, real = [], runs.fit

    def busy(cfg, *args):
        calls.append(cfg.labels)
        if len(calls) == 1:
            raise files.RunLocked("busy")
        return real(cfg, *args)

    monkeypatch.setattr(runs, "fit", busy)
    monkeypatch.setattr(few_labels.time, "sleep", lambda s: None)
    fit(DIGITS, digits, progress=False)
    assert calls == [0.0, 0.0]


@pytest.mark.parametrize("network, shape", [("mlp", (8, 8)), ("faces", (3, 32, 32))])
@pytest.mark.parametrize("model", ["VampPriorVAE", "MixtureCSRAE"])
def test_what_is_taken_over(network, shape, model):
    """The weights of all layers that are alike.
    Of an MLP these are the features and the decoder, of the network for faces all but what is the label's."""
    cfg = resolve(Config(model=model, labels=10.0, network=network, components=3, latent_dim=4))
    about = dict(
        x_shape=shape, likelihood="gaussian", kind="OneLabel", outputs=10, share=0.5, label_prior=[0.0] * 10
    )
    old, new = (
        tasks.Task(resolve(dataclasses.replace(cfg, labels=0.0))).make_model(about).state_dict(),
        LabelTask(cfg).make_model(about),
    )
    for v in old.values():
        v.copy_(torch.randn(v.shape).to(v.dtype))
    taken = take_over(new, old)
    own = new.state_dict()
    parts = {k.split(".")[0] + "." + k.split(".")[1] for k in taken if not k.startswith("prior.")}
    assert parts == {"encoder.image", "decoder.both", "decoder.net"} | (
        {"encoder.both", "encoder.code"} if network == "faces" else set()
    )
    assert sum(torch.equal(own[k], v) for k in taken for v in old.values() if v.shape == own[k].shape) >= len(
        taken
    )
    assert any(k.startswith("prior.") for k in taken)


@pytest.mark.parametrize("labels, n", [(100.0, 100), (1.0, 1439), (0.1, 144)])
def test_a_classifier_alone(digits, labels, n):
    cfg = Config(model="Supervised", labels=labels, epochs=3, components=7, lam=1.0, warmup=5, pretrain=0)
    metrics = complete_run(cfg, digits, progress=False)
    run = load_run(runs_folder() / run_name(cfg))
    task = LabelTask(run.cfg)
    assert metrics["error"] < 85
    assert metrics["reconstruction"] is None
    assert metrics["frechet_classifier_samples"] is None
    assert run_name(cfg) == run_name(Config(model="Supervised", labels=labels, epochs=3, latent_dim=3))
    assert "-z" not in run_name(cfg)
    rows = tasks.task_of(run.cfg).rows(digits, 1)
    assert rows.shape == (14, 100) and len(rows.unique()) >= min(n, 1400) and len(task.labelled(digits)) == n
    (row,) = results_table([run.path])
    assert row["latent_dim"] == "" and row["error_mean"] == metrics["error"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model="Supervised"), "learns from labels alone"),
        (dict(model="Supervised", labels=10.0, network="residual"), "has no part for labels"),
        (dict(model="Supervised", labels=10.0, network="resnet18"), "colour images"),
        (dict(labels=0.5, network="faces"), "32, 96, 160, 224"),
    ],
)
def test_what_is_refused(digits, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(Config(**changes), digits, progress=False)
    assert not runs_folder().exists()


@pytest.mark.filterwarnings("ignore:.*left out|fold . of .* has no frame|F1 of")
@pytest.mark.parametrize("model", ["MixtureCSRAE", "Supervised"])
def test_intensities_are_learned(model):
    "In order, from the same first phase as answers, and judged by agreement beside F1 from 2 on."
    cfg = dataclasses.replace(
        CFG, model=model, answers="intensity", fid_layer=0, pretrain=2 * (model[0] == "M")
    )
    metrics = complete_run(cfg, progress=False)
    run, data = (
        load_run(runs_folder() / run_name(cfg)),
        load_faces("faces_demo", image_size=32, progress=False),
    )
    assert run.model.kind == Intensities(40, data.answers)
    assert {"icc", "pcc_AU25", "mae_AU25", "f1_AU25", "threshold_AU25"} <= metrics.keys()
    coded = load_faces("faces_demo", image_size=32, progress=False, answers="intensity")
    guess = run.model.kind.expected(run.model.predict(coded.fixed("test")))[:, 6]
    corr = torch.stack([guess, coded.y_test[:, 6]]).corrcoef()[0, 1].item()
    assert metrics["mae_AU25"] == pytest.approx((guess - coded.y_test[:, 6]).abs().mean().item(), abs=1e-5)
    assert metrics["pcc_AU25"] == pytest.approx(corr, abs=1e-4)
    (row,) = results_table([run.path])
    assert "answers=intensity" in row["settings"] and row["icc_mean"] == metrics["icc"]
    if model == "MixtureCSRAE":
        presence = dataclasses.replace(cfg, answers="presence")
        assert run_name(first_phase(resolve(cfg))) == run_name(first_phase(resolve(presence)))
        assert run.model.sample(2).shape == (2, 3, 32, 32)
        said = next(iter(encode_examples(run, Examples(data.fixed("test")[:9], tuple("abcdefghi")))))["label"]
        assert all(s == "none" or all("=" in part for part in s.split()) for s in said)


def test_gradients_of_intensities_are_those_of_the_formula():
    kind, g = Intensities(6, levels=4), torch.Generator().manual_seed(0)
    fall = -torch.rand(5, 2, 3, generator=g, dtype=torch.float64).cumsum(-1) * 2 + 2
    logits, prior = fall[:4].flatten(1).requires_grad_(), fall[4].flatten()
    y, normal = torch.randint(4, (4, 2), generator=g), torch.randn(4, 6, generator=g, dtype=torch.float64)
    for f in (
        lambda a: kind.kl(a, prior),
        lambda a: kind.cross_entropy(a, y),
        lambda a: kind.relax(a, 0.7, normal),
    ):
        assert torch.autograd.gradcheck(f, logits)


@pytest.mark.parametrize("balance", ["weights", "asymmetric", "none"])
def test_other_balances_leave_the_batches_alone(balance):
    "Every labelled image comes equally often; the run has a name of its own."
    cfg = dataclasses.replace(CFG, model="Supervised", labels=1.0, balance=balance, pretrain=0, batch_size=20)
    data = load_faces("faces_demo", image_size=32, progress=False)
    rows = tasks.task_of(resolve(cfg)).rows(data, 1)
    assert rows.unique().numel() == rows.numel() > len(data.x_train) - 20
    run = fit(cfg, data, progress=False)
    usual = dataclasses.replace(cfg, balance="batches")
    assert run.path.name != run_name(usual) and f"-p balance {balance}" in command(cfg)
    assert run.history != fit(usual, data, progress=False).history


def test_fields_that_came_later_leave_names_alone():
    old = Config(dataset="faces_demo", model="Supervised")
    assert not {"answers", "balance"} & identity(old).keys()
    for later in (dict(answers="intensity"), dict(balance="weights")):
        assert identity(dataclasses.replace(old, **later)) == identity(old) | later


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(dataset="digits", image_size=None, labels=10.0, balance="weights"),
            "labels of digits are classes",
        ),
        (dict(answers="intensity", balance="asymmetric"), "of intensities use 'weights'"),
        (dict(labels=0.0, answers="intensity"), "answers='intensity' has no effect without labels"),
        (dict(labels=0.0, balance="none"), "balance='none' has no effect without labels"),
        (
            dict(dataset="digits", image_size=None, labels=10.0, answers="intensity"),
            "answers='intensity' is for disfa, fera2015, faces_demo",
        ),
        (dict(balance="focal"), "expected one of batches, weights, asymmetric, none"),
        (dict(answers="valence"), "expected one of presence, intensity"),
    ],
)
def test_answers_and_balances_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        fit(Config(**dict(dataset="faces_demo", image_size=32) | changes), progress=False)


@pytest.mark.filterwarnings("ignore:.*left out|fold . of .* has no frame")
@pytest.mark.skipif(not find_spec("torchvision"), reason="ResNet18 is torchvision's")
def test_resnet18_under_every_objective_and_from_a_file(tmp_path):
    "With labels, in both phases; weights of a file are those that training begins with."
    cfg = dataclasses.replace(CFG, network="resnet18", fid_layer=0)
    assert 0 <= complete_run(cfg, progress=False)["f1"] <= 100
    theirs = torchvision_module("torchvision.models").resnet18(weights=None).state_dict()
    torch.save(theirs, tmp_path / "theirs.pth")
    cfg = dataclasses.replace(cfg, encoder_weights=str(tmp_path / "theirs.pth"), pretrain=0)
    data = load_faces("faces_demo", image_size=32, progress=False)
    for of in (dict(), dict(labels=0.0, pretrain=0), dict(model="Supervised")):
        task = tasks.task_of(resolve(dataclasses.replace(cfg, **of)))
        model = task.make_model(task.about(data))
        task.start(model, None)
        (name,) = [k for k in model.encoder.state_dict() if k.endswith("layer1.0.conv1.weight")]
        assert model.encoder.state_dict()[name].equal(theirs["layer1.0.conv1.weight"])
    assert "encoder_weights" not in identity(CFG) and run_name(cfg) != run_name(
        dataclasses.replace(cfg, encoder_weights=None)
    )
    with pytest.raises(ValueError, match="are of network resnet18; this one is faces"):
        dataclasses.replace(cfg, network=None)
    with pytest.raises(FileNotFoundError, match="put torchvision's file of ResNet18 there"):
        fit(dataclasses.replace(cfg, encoder_weights=str(tmp_path / "none.pth")), data, progress=False)


def test_one_labelled_image_and_all_of_them_are_two_methods_and_a_fold_counts_once():
    "In tables as they are written and read; what the columns cannot tell apart is refused."

    def row(fold, labels, f1, **more):
        words = f"papermill nbs/train.ipynb -p model Supervised -p labels {labels} -p fold {fold}"
        key = dict(
            model="Supervised", labels=float(labels), network="faces", fold=fold, seeds="0", command=words
        )
        return key | dict(f1_mean=f1, f1_AU1_mean=f1) | more

    rows = [row(k, n, f1) for n, f1 in (("1", 10.0), ("1.0", 90.0), ("100", 50.0)) for k in range(2)]
    found = {share_of(r): (r["folds"], r["f1_mean"]) for r in over_folds(rows)}
    assert found == {"1 image": (2, 10.0), "100 %": (2, 90.0), "100 images": (2, 50.0)}
    table = f1_table(over_folds(rows), ("AU1",), [20.0])
    assert [line.split("|")[2].strip() for line in table.splitlines()[3:]] == [
        "1 image",
        "100 %",
        "100 images",
    ]
    vae = [r | dict(model="MixtureCSRAE", f1_mean=95.0) for r in rows if "1.0" in r["command"]]
    assert (
        compared_models(over_folds([*rows, *vae]), 1.0)
        == "100 % of the labels: MixtureCSRAE and CNN not told apart"
    )
    with pytest.raises(ValueError, match=r"fold 1 of CNN \(labels: 100 %\), seed 0 is there twice, and no"):
        over_folds([*rows, row(1, "1.0", 30.0)])


def test_seeds_are_averaged_over_the_same_folds():
    "Else the error over seeds would be that of other subjects."
    found = (("0", 0, 10.0), ("0", 1, 20.0), ("1", 1, 20.0), ("1", 2, 90.0), ("2", 0, 12.0), ("2", 1, 22.0))
    key = dict(model="VAE", labels=1.0, network="faces", command="train -p labels 1.0", f1_se=None)
    (r,) = over_folds(key | dict(seeds=s, fold=k, f1_mean=v) for s, k, v in found)
    assert (r["folds"], r["seeds"], r["f1_mean"], r["f1_se"]) == (2, "0 2", 16.0, 1.0)


def test_one_model_is_compared_with_nobody():
    key = dict(model="Supervised", network="faces", labels=1.0, fold=0, seeds="0", f1_mean=1.0)
    rows = over_folds([key | dict(f1_se=None, command="train -p labels 1.0")])
    assert compared_models(rows, 1.0) == "100 % of the labels: nothing to compare (CNN)"
