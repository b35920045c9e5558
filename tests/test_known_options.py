"Options that are passed on, and numbers of faces, in examples so small that the right one is known."

import csv
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from csrae_nb import detection, few_labels, grids, predict, process, sharing, sweeps, verbs, videos
from csrae_nb import faces as faces_module
from csrae_nb.catalogue import DATASETS, OTHER, load_data, preset
from csrae_nb.catalogue import SMALL as SMALL_PRESET
from csrae_nb.config import Config, command, resolve
from csrae_nb.detection import Face, Seen
from csrae_nb.faces import FACES, FaceData, augmented, fold_rows
from csrae_nb.frames import Recording, _why_not, aligned
from csrae_nb.labels import ManyLabels, ranks_of_answers
from csrae_nb.patterns import fit_patterns, informed
from csrae_nb.tasks import task_of
from csrae_nb.trained import Examples, _fields_for
from csrae_nb.videos import Coding
from small_runs import ROWS, SMALL, TINY

cv2 = pytest.importorskip("cv2")


# grids and sweeps


def test_faces_that_have_changed_since_are_told(monkeypatch):
    monkeypatch.setattr(sweeps, "prepare_data", lambda c: SimpleNamespace(sha256="new"))
    monkeypatch.setattr(sweeps, "finished_metrics", lambda c, sums: None)
    monkeypatch.setattr(sweeps, "run_name", lambda c: "a")
    with pytest.raises(ValueError, match="1 finished runs are of other data than disfa is now"):
        sweeps.check_data([Config(dataset="disfa")])


def test_a_run_is_told_by_the_epoch_that_was_kept(monkeypatch, tmp_path):
    (file := tmp_path / "config.json").write_text("")
    history = [dict(criterion=c) for c in (9.0, 5.0, 7.0)]
    monkeypatch.setattr(grids, "_told", lambda path: (file, Config(**TINY), history, 2))
    monkeypatch.setattr(grids, "is_trained", lambda path: True)
    assert grids.about_run(tmp_path)["validation"] == 5.0


# few labels


def with_labels(**fields):
    y = np.arange(120) % 3
    data = load_data(dict(x=ROWS, y=y))
    task = task_of(resolve(replace(SMALL, network="mlp", labels=30, labelled_batch=5, **fields)))
    return task.make_model(task.about(data))


def test_weights_of_labels_and_of_their_divergence_are_two():
    model = with_labels(alpha=3.0, beta=7.0)
    assert (model.alpha, model.beta) == (3.0, 7.0)


@pytest.mark.parametrize("model, beta", [("CSRAE", 1.0), ("VAE", 3.0)])
def test_a_first_phase_weighs_the_kl_alone(model, beta):
    cfg = resolve(Config(dataset="arrays", model=model, labels=30, pretrain=2, beta=3.0))
    assert few_labels.first_phase(cfg).beta == beta


def test_patterns_are_judged_on_test_images_by_thresholds_of_validation_images():
    g = torch.Generator().manual_seed(0)
    kind, y = ManyLabels(3), (torch.rand(60, 3, generator=g) < 0.4).long()
    test, val = ((torch.randn(60, 3, generator=g) + s * y, y) for s in (1.0, 3.0))
    p = fit_patterns(y, 3)
    found = few_labels.of_patterns(kind, p, test, val)
    known = [(informed(logits, p), y) for logits, y in (test, val)]
    assert found["informed_ap"] == ranks_of_answers(*known[0], kind.asked)["ap"]
    assert found["informed_tuned_f1"] == kind.measured(*known)["tuned_f1"]
    assert found["informed_tuned_f1"] != kind.measured(*known[::-1])["tuned_f1"]


# data by name


def test_a_file_takes_the_longest_name_that_it_begins_with(monkeypatch):
    monkeypatch.setattr(DATASETS, "_rows", dict(DATASETS._rows))
    DATASETS.add("mnist_thin", load_data, preset=SMALL_PRESET | dict(latent_dim=3))
    assert preset("mnist_thin_1.npz")["latent_dim"] == 3
    assert preset("mnist_thin_1.csv") == OTHER


# processes


def test_labelled_images_are_shared_alike_too():
    cfg = Config(batch_size=100, labelled_batch=5, labels=30)
    process._check_shares(replace(cfg, labels=0.0), 2)
    with pytest.raises(ValueError, match="labelled_batch=5 cannot be shared by 2"):
        process._check_shares(cfg, 2)


@pytest.mark.parametrize("asked, cast, products", [("bf16", "bf16", "highest"), ("tf32", "no", "high")])
def test_precision_is_that_of_the_run(asked, cast, products):
    with process.accelerator(resolve(Config(**TINY, precision=asked, device="cpu"))) as acc:
        assert acc.mixed_precision == cast and torch.get_float32_matmul_precision() == products


# sharing


@pytest.mark.parametrize("dataset, told", [("mnist", False), ("disfa", True), ("./mine.npz", True)])
def test_pseudo_inputs_of_faces_are_told(dataset, told):
    model = SimpleNamespace(state_dict=lambda: {"prior.pseudo_inputs": torch.zeros(4, 2)})
    run = SimpleNamespace(cfg=SimpleNamespace(dataset=dataset), model=model, path=Path("a"))
    assert bool(sharing._may_show(run)) == told


@pytest.mark.parametrize("own, told", [("disfa", False), ("fera2015", True)])
def test_the_fold_of_another_data_set_is_told(own, told):
    run = SimpleNamespace(cfg=Config(dataset=own, fold=1, answers="intensity", labels=1.0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fields = _fields_for(run, "disfa")
    assert [str(w.message) for w in said] == told * [
        "of disfa the subjects of fold 1 alone are taken, its test split"
    ]
    assert fields["fold"] == 1 and ("answers" in fields) is not told


def test_names_of_subjects_are_not_shared():
    cfg = Config(dataset="digits")
    content = dict(subjects=dict(test=["Ann"]), metrics={}, provenance=dict(command="/home/ann"))
    shared = sharing._shared_metrics(content, cfg)
    assert "subjects" not in shared and shared["provenance"]["command"] == command(cfg)


# the command line


@pytest.fixture
def asked(monkeypatch):
    "What a command asks the library for: the arguments of each function that it calls, by name."
    seen, rows = {}, [dict(name="a", cluster=0), dict(name="b", cluster=1)]
    model = SimpleNamespace(reconstruct=lambda x: x)
    run = SimpleNamespace(model=model, device="cpu", path=Path("run"), x_shape=(3,), columns=None)
    examples = Examples(torch.zeros(50, 3), tuple(map(str, range(50))))
    gives = dict(open_run=run, examples_of=examples, most_unusual=rows, write_scored=rows)
    gives |= dict(sample_examples="x", cluster_table=(rows, torch.zeros(50)), _picture=b"")
    nothing = "check_output", "write_encoded", "refitted_prior", "write_table", "write_atomic"
    for name in (*gives, *nothing, "_write_examples"):

        def call(*args, name=name):
            seen[name] = args
            return gives.get(name)

        monkeypatch.setattr(verbs, name, call)

    def run_words(words):
        assert verbs.main(words.split()) == 0
        return seen

    return run_words


def test_draws_are_those_that_are_asked_for(asked):
    assert asked("score run data --top 7 --ll-samples 9")["most_unusual"][2:] == (7, 9)
    assert asked("score run data --top 7 --ll-samples 9 --out a.csv")["write_scored"][3:5] == (7, 9)
    assert asked("encode run data --ll-samples 9 --out a.csv")["write_encoded"][3] == 9


def test_samples_are_those_that_are_asked_for(asked):
    words = "sample run -n 5 --component 2 --temperature 0.7 --seed 4 --noise --out a.csv"
    assert asked(words)["sample_examples"][1:] == (5, 2, 0.7, 4, None, True)


def test_clusters_are_as_many_as_are_asked_for(asked):
    assert asked("sample run --cluster 1 --clusters 2 --out a.csv")["cluster_table"][1] == 2
    assert asked("clusters run data --clusters 2 --out a.csv")["cluster_table"][1] == 2


@pytest.mark.parametrize("words, pairs", [("", 32), (" -n 4", 4)])
def test_pairs_are_as_many_as_are_asked_for(asked, words, pairs):
    assert len(asked(f"reconstruct run data --out a.png{words}")["_picture"][0]) == 2 * pairs


# faces


def recording(intensities, eyes, images=(), wanted=None):
    return Recording(images, np.array(intensities, np.int8), np.array(eyes, float), wanted)


def test_eyes_outside_of_the_picture_are_no_face():
    inside, outside = ((10, 20), (30, 20)), ((10, 20), (70, 20))
    r, image = recording([[0], [0]], [inside, outside]), np.zeros((40, 60, 3), np.uint8)
    assert [_why_not(r, i, image) for i in (0, 1)] == [None, "no face"]


def test_a_face_that_becomes_smaller_keeps_its_place():
    "To a tenth of a pixel: the centre of a spot, through a scale of a quarter."
    y, x = np.mgrid[:160, :160]
    spot = 255 * np.exp(-((x - 63.5) ** 2 + (y - 95.5) ** 2) / (2 * 12**2))
    image = np.repeat(spot[..., None], 3, 2).astype(np.uint8)
    small = aligned(image, np.array([[0.25, 0, 0], [0, 0.25, 0]]), 40)[..., 0].astype(float)
    y, x = np.mgrid[:40, :40]
    middle = [(small * a).sum() / small.sum() for a in (x, y)]
    assert middle == pytest.approx([63.5 / 4, 95.5 / 4], abs=0.1)


def test_who_is_in_no_fold_is_in_training_alone():
    who = np.repeat(["Ann", "Bob", "Zoe"], 100)
    rows = fold_rows(who, (("Ann",), ("Bob",)), 0, 0)
    assert rows["test"].tolist() == [*range(100)] and {*range(200, 300)} <= {*rows["train"]}
    assert len(rows["val"]) == 10 and {*rows["val"]} < {*range(100, 200)}


def test_crops_reach_the_edges_and_turn_as_far_as_is_said():
    "Of a picture whose values are its columns: where the middle of a crop lies, and that none is turned."
    S, crop = 40, 20
    x = torch.arange(S).repeat(S, 1).expand(300, 3, S, S).byte()
    centre = 255 * (augmented(x, crop, torch.Generator().manual_seed(0), turn=0.0, mirror=False) + 0.5)
    middle = centre[:, 0, :, crop // 2 - 1 : crop // 2 + 1].mean((1, 2))
    assert 9 <= middle.min() < 11 and 28 < middle.max() <= 30
    assert (centre - centre[:, :, :1]).abs().max() < 0.01, "nothing is turned"


def test_validation_frames_of_faces_are_chosen_by_the_seed(monkeypatch):
    seeds = []
    monkeypatch.setattr(faces_module, "fold_rows", lambda who, folds, fold, seed, how: seeds.append(seed))
    monkeypatch.setattr(faces_module, "_prepared", lambda *a: SimpleNamespace(subjects=None))
    monkeypatch.setattr(faces_module, "_answers", lambda *a: None)
    monkeypatch.setattr(faces_module, "_fold_data", lambda *a: FaceData.__new__(FaceData))
    faces_module.load_faces("faces_demo", split_seed=5)
    assert seeds == [5, 5]


def test_validation_frames_of_videos_are_chosen_by_the_seed(monkeypatch):
    seeds, clips = [], replace(FACES["faces_demo"], root=Path("clips"))

    def load(faces, fold, size, seed, *args, **how):
        seeds.append(seed)
        return FaceData.__new__(FaceData)

    monkeypatch.setattr(videos, "coded_videos", lambda path: clips)
    for name in ("fold_rows", "face_library", "_warn_of_table"):
        monkeypatch.setattr(videos, name, lambda *a: None)
    monkeypatch.setattr(videos, "load_faces", load)
    videos.load_videos("clips", split_seed=5)
    assert seeds == [5]


# videos


def coding(spans, answers, in_seconds=True):
    about = Path("x.avi"), "Ann", ("smile", "open"), in_seconds
    return Coding(*about, np.array(spans, float), np.array(answers, np.int8), tuple(range(2, 2 + len(spans))))


def test_a_time_that_goes_back_counts_as_the_one_before():
    seconds = np.array([0.0, 1.0, 0.2, 2.0])
    assert coding([(0.9, 1.5)], [(1, 0)]).codes(seconds)[1].tolist() == [False, True, True, False]


# detection


def test_a_turned_video_has_to_be_twice_as_certain(monkeypatch, tmp_path):
    writer = cv2.VideoWriter(str(file := tmp_path / "a.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(10):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()

    def of(upright, turned):
        def detect(image):
            q = upright if image.shape[:2] == (48, 64) else turned
            return Face(np.array([[10.0, 10], [20, 10]]), q)

        return detection.quarter_turns(file, detect)

    assert of(0.9, 0.95) == 0 and of(0.9, 0.999) == 1


def test_a_small_face_that_is_certain_is_taken_before_a_larger_doubtful_one():
    small, large = ((50, 50, ((10, 10), (30, 10)), 1.0), (60, 60, ((20, 20), (50, 20)), 0.5))
    assert detection._largest([small, large]).eyes.tolist() == [[10, 10], [30, 10]]


# predictions


def test_a_probability_at_the_threshold_is_no_yes(tmp_path):
    (table := tmp_path / "a").write_text("name,smile\na,0.25\nb,0.2501\nc,\n")
    predict._with_yes(table, out := tmp_path / "out.csv", dict(smile=0.25))
    assert [r["smile yes"] for r in csv.DictReader(open(out))] == ["0", "1", ""]


def job_of(folder, **fields):
    how = dict(
        run=folder, device="cpu", detector="mtcnn", model=None, overlay=folder, every=None, parts=folder
    )
    return predict._Job(**how | fields)


def test_rows_of_other_options_are_not_gone_on_with(tmp_path):
    (file := tmp_path / "a.mp4").write_bytes(b"")
    clip = predict.Clip(("a.mp4",), (file,))
    other = dict(detector="yunet"), dict(model=file), dict(overlay=None), dict(every=3)
    names = {predict._part(job_of(tmp_path, **of), clip, "abc") for of in (dict(), *other)}
    assert len(names) == 5 and predict._part(job_of(tmp_path), clip, "abd") not in names


def test_processes_look_for_eyes_by_the_file_that_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(predict, "make_detector", lambda *a: a)
    monkeypatch.setattr(predict, "open_run", lambda *a, **kw: a)
    job = job_of(tmp_path, detector="yunet", model=tmp_path / "own.onnx", device="cuda")
    assert job.tools() == ((tmp_path, "cuda"), ("yunet", tmp_path / "own.onnx"))


@pytest.mark.parametrize("every, shown", [(None, [0, 5, 10, 15, 20, 25, 30, 35]), (12, [0, 12, 24, 36])])
@pytest.mark.parametrize("stopped", [0, 16])
def test_pictures_of_what_was_seen_are_of_the_same_frames_after_a_stop(
    monkeypatch, tmp_path, every, shown, stopped
):
    kind = SimpleNamespace(names=("smile",), scores=1, levels=2)
    run, clip = (
        SimpleNamespace(model=SimpleNamespace(kind=kind)),
        predict.Clip(("a.mp4",), (tmp_path / "a.mp4",)),
    )
    nowhere, saved = np.full((2, 2), np.nan), []

    def seen_in(clip, detector, start, progress):
        for k in range(start, 40):
            yield "a.mp4", k, Seen(np.zeros((4, 4, 3), np.uint8), k / 10, None, nowhere)

    monkeypatch.setattr(predict, "seen_in", seen_in)
    monkeypatch.setattr(predict, "answers_of", lambda run: ("smile",))
    monkeypatch.setattr(predict, "video_length", lambda file: (40, 10.0))
    monkeypatch.setattr(predict, "whole_blocks", lambda part, size: stopped)
    monkeypatch.setattr(predict, "_cut_out", lambda run, seen: None)
    monkeypatch.setattr(
        predict, "show_prediction", lambda seen, *a: seen.image.size and round(10 * seen.seconds)
    )
    monkeypatch.setattr(predict, "_save_shown", lambda fig, path: saved.append((fig, path.stem)))
    predict._step.cache_clear()
    predict._write_rows(job_of(tmp_path, every=every), clip, tmp_path / "part", (run, None), False)
    predict._step.cache_clear()
    assert saved == [(k, f"a.mp4-{k:06}") for k in shown if k >= stopped]
