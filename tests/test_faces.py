"Preparing faces: what a notebook cannot show, kills, damage and folders with gaps."

import codecs
import dataclasses
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from csrae_nb import faces, frames, sweeps
from csrae_nb.drawings import FERA_AUS, some_frames, write_disfa, write_fera2015
from csrae_nb.estimator import CSRAEEmbedding
from csrae_nb.evaluation import complete_run
from csrae_nb.faces import FACES, FrameStore, load_faces, prepare_faces
from csrae_nb.frames import read_disfa, read_fera2015
from csrae_nb.config import Config, command, identity, resolve, run_name
from csrae_nb.files import load_tensors, runs_folder, save_tensors
from csrae_nb.runs import fit, load_run, prepare_data
from csrae_nb.training import Training
from csrae_nb.trained import read_examples, sample_examples

h5py = pytest.importorskip("h5py")
pytest.importorskip("cv2")
pytestmark = pytest.mark.usefixtures("own_cache")  # faces are prepared beside the data
SUBJECTS = tuple(FACES["faces_demo"].recordings())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    write_disfa(root, SUBJECTS, frames=20)
    return root


def digests(index):
    return {n: a["sha256"] for n, a in index["recordings"].items()}


def test_a_preparation_that_is_killed_goes_on(drawn, tmp_path):
    "What was whole stays, what was half written is made anew, and the result is that of an unbroken one."
    args = "faces_demo", drawn, tmp_path / "killed"
    places = f"Path({str(drawn)!r}), Path({str(args[2])!r})"
    code = f"""
from pathlib import Path
if __name__ == "__main__":
    from csrae_nb.faces import prepare_faces
    prepare_faces("faces_demo", {places}, 64, jobs=1, progress=False)
"""
    (script := tmp_path / "prepare.py").write_text(code)
    p = subprocess.Popen([sys.executable, script], start_new_session=True)
    while len(list(args[2].glob("*.npz"))) < 3:
        assert p.poll() is None
        time.sleep(0.005)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    before = {f.name: f.stat().st_mtime_ns for f in args[2].glob("*.npz")}
    assert 3 <= len(before) < len(SUBJECTS) and not (args[2] / "index.json").exists()
    (args[2] / ".SN999.jpegs.tmp").write_bytes(b"half")
    damaged = args[2] / f"{SUBJECTS[0]}.jpegs"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    index = prepare_faces(*args, size=64, jobs=2, progress=False)
    after = {f.name: f.stat().st_mtime_ns for f in args[2].glob("*.npz")}
    assert [n for n in before if before[n] != after[n]] == [f"{SUBJECTS[0]}.npz"]
    assert not list(args[2].glob(".*.tmp"))
    assert digests(index) == digests(
        prepare_faces("faces_demo", drawn, tmp_path / "whole", size=64, jobs=1, progress=False)
    )


def test_what_is_missing_is_named_and_the_rest_goes_on(in_threads, drawn, tmp_path):
    root = tmp_path / "gaps"
    shutil.copytree(drawn, root)
    shutil.rmtree(root / "Landmark_Points" / "SN001")
    (root / "ActionUnit_Labels" / "SN002" / "SN002_au9.txt").unlink()
    next((root / "Videos_LeftCamera").glob("*SN003*")).write_bytes(b"no video")
    next((root / "Videos_LeftCamera").glob("*SN010*")).unlink()
    for au in FACES["faces_demo"].aus:
        f = root / "ActionUnit_Labels" / "SN013" / f"SN013_au{au}.txt"
        f.write_text(f.read_text() + "".join(f"{k},0\n" for k in range(21, 41)))  # longer than the video
        f = root / "ActionUnit_Labels" / "SN018" / f"SN018_au{au}.txt"
        f.write_text(f.read_text().replace("7,0\n", "7,9\n", 1))
    for k in (10, 11, 12):
        next((root / "Landmark_Points" / "SN029").rglob(f"*00{k}_lm.mat")).unlink()
    with pytest.warns(
        UserWarning,
        match="4 of 27 recordings of faces_demo are left out: SN001: no landmarks.*; SN003: .*; …",
    ):
        index = prepare_faces("faces_demo", root, tmp_path / "out", size=32, jobs=2, progress=False)
    a = index["recordings"]
    assert "labels of AU 9" in a["SN002"]["problem"]
    assert "is no video that can be read" in a["SN003"]["problem"]
    assert "no video of the left camera" in a["SN010"]["problem"]
    assert (a["SN013"]["frames"], a["SN013"]["left_out"]) == (29, {"unreadable": 11})
    assert a["SN018"]["left_out"]["not coded"] > 0
    assert a["SN029"]["left_out"] == {"no face": 2}  # of three in a row the first repeats the one before
    assert json.loads((tmp_path / "out" / "index.json").read_text()) == json.loads(json.dumps(index))


def test_fera2015_through_the_same_door(in_threads, tmp_path, monkeypatch):
    names = "F001_T1", "F001_T2", "M011_T1", "F007_T8"
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    write_fera2015(root := tmp_path / "FERA2015", names, frames=20)
    with h5py.File(root / "2DFeatures" / "F001_T2.mat", "a") as f:
        f["#refs#"].create_dataset("none", data=np.zeros(2))
        f["fit/pred"][4, 0] = f["#refs#/none"].ref  # Matlab's way to say []
    (root / "2DFeatures" / "F007_T8.mat").write_bytes(b"damaged")
    shutil.move(root / "AUCoding", root / "AUCodes")
    (root / "AUCoding").mkdir()
    shutil.move(root / "AUCodes", root / "AUCoding" / "AU_OCC")
    with pytest.raises(FileNotFoundError, match="landmarks that cannot be read"):
        read_fera2015(root, "F007_T8")
    with (
        pytest.warns(UserWarning) as said,
        pytest.raises(ValueError, match="fold 2 of fera2015 has no frames to test"),
    ):
        load_faces("fera2015", 2, 28, progress=False)
    assert "325 of 328 recordings of fera2015 are left out" in str(said[0].message)
    with pytest.warns(UserWarning, match="has no frame that shows AU"):
        data = load_faces("fera2015", 1, 28, progress=False)
    a = json.loads((tmp_path / "fera2015-prepared-32" / "index.json").read_text())["recordings"]
    assert (a["F001_T1"]["left_out"], a["F001_T2"]["left_out"]) == (
        {"not coded": 1},
        {"not coded": 1, "no face": 1},
    )
    assert (len(data.x_test), len(data.x_train) + len(data.x_val), data.y_test.shape[1]) == (19, 37, 5)


def test_an_intensity_that_is_not_known_is_zero_where_the_au_does_not_occur(tmp_path):
    write_fera2015(tmp_path, ("F001_T1",), frames=10)
    file = tmp_path / "AUCoding" / "F001_T1.csv"
    lines = file.read_text().splitlines()
    first = lines[1].split(",")
    for au in FERA_AUS:
        first[au] = "0"
    file.write_text("\n".join([lines[0], ",".join(first), *lines[2:]]))
    assert read_fera2015(tmp_path, "F001_T1")[0].intensities[0].tolist() == [0] * 5


def test_a_damaged_image_is_named(in_threads, drawn, tmp_path):
    prepare_faces("faces_demo", drawn, tmp_path, size=32, jobs=2, progress=False)
    file = tmp_path / "SN001.jpegs"
    file.write_bytes(b"\0" * file.stat().st_size)
    store = FrameStore(tmp_path)
    assert store.read(np.array([70])).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="SN001.jpegs is damaged"):
        store.read(np.array([70, 0]))


def test_memory_does_not_grow_with_the_video(tmp_path):
    "The peak of a process that prepares 40 frames, and of one that prepares 400."
    peak = []
    for n in (40, 400):
        write_disfa(root := tmp_path / str(n), ("SN001",), frames=n)
        code = f"""
import resource
from pathlib import Path
from csrae_nb.frames import prepare_recording, read_disfa
about = prepare_recording(read_disfa, Path({str(root)!r}), "SN001", Path({str(tmp_path)!r}), 256)
assert about["frames"] == {n}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peak.append(int(said.stdout) / 1024)
    assert peak[1] - peak[0] < 15  # MiB; 360 frames of 256×256 are 67


def test_a_run_on_faces(drawn, tmp_path, monkeypatch):
    """From the folders to metrics.json, batch by batch from the disk, through the same fit.
    Without labels there are no kNN errors of rows of answers."""
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    shutil.copytree(drawn, tmp_path / "faces_demo")
    cfg = Config(
        dataset="faces_demo",
        image_size=32,
        fold=1,
        epochs=2,
        pretrain=2,
        warmup=1,
        kmeans_epoch=1,
        components=3,
        batch_size=50,
        latent_dim=4,
        expost_components=3,
    )
    metrics = complete_run(cfg, progress=False)
    assert metrics["reconstruction"] < 8 * 3 * 32**2
    assert metrics["knn3"] is None
    assert metrics["frechet_classifier_floor"] is None
    assert metrics["effective_k"] >= 1
    run = load_run(runs_folder() / run_name(cfg))
    data = load_faces("faces_demo", 1, 32, progress=False)
    assert run.model.reconstruct(data.fixed("test")[:3]).shape == (3, 3, 32, 32) and run.sha256 == data.sha256
    assert not run_name(cfg) == run_name(dataclasses.replace(cfg, fold=2))
    assert "-p image_size 32" in command(cfg)
    assert "-p fold 1" in command(cfg)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(dataset="mnist", fold=1), "fold=1 is for disfa, fera2015, faces_demo, a folder of videos"),
        (dict(dataset="faces_demo", image_size=100), "32, 96, 160, 224"),
        (dict(dataset="faces_demo", image_size=32, fold=3), "unknown fold 3; expected one of 0, 1, 2"),
        (dict(dataset="faces_demo", image_size=32, likelihood="bernoulli"), "call for discretized_logistic"),
    ],
)
def test_what_faces_cannot_be(in_threads, drawn, tmp_path, monkeypatch, wrong, says):
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    (tmp_path / "faces_demo").symlink_to(drawn)
    with pytest.raises(ValueError, match=says):
        fit(Config(**wrong), progress=False)


@pytest.fixture
def in_threads(monkeypatch):
    "Prepare without processes, which take seconds to start."
    monkeypatch.setattr(faces, "worker_processes", ThreadPoolExecutor)


# --- landmarks

THREE = "SN001", "SN002", "SN003"  # landmarks counted from 0, from 1, and from 1 under other names


@pytest.fixture
def three(tmp_path):
    write_disfa(tmp_path / "three", THREE, frames=12)
    return tmp_path / "three"


def landmarks(root, subject):
    return sorted((root / "Landmark_Points" / subject).rglob("*.mat"))


def rewrite(root, subject, change, files=slice(None)):
    for f in landmarks(root, subject)[files]:
        savemat(f, dict(pts=change(loadmat(f)["pts"])))


def with_two_corners(p):
    return np.insert(p, (60, 63), p[[48, 54]], 0)  # the 68 points that the 66 are a part of


def turned(p):
    return 2 * p @ [[0, 1], [-1, 0]]


@pytest.mark.parametrize(
    "change", [with_two_corners, np.transpose, turned], ids=["68 points", "lying", "turned"]
)
def test_other_ways_to_write_the_same_landmarks(three, change):
    before = read_disfa(three, "SN002")[0].eyes
    rewrite(three, "SN002", change)
    assert np.allclose(read_disfa(three, "SN002")[0].eyes, turned(before) if change is turned else before)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda p: p[17:],
            r"SN001_0000_lm.mat: landmarks of shape \(49, 2\), "
            r"expected \(66, 2\) or \(68, 2\) \(so are 12 of 12 frames\)",
        ),
        (lambda p: p[:60], r"shape \(60, 2\)"),
        (lambda p: np.column_stack([p, p[:, 0]]), r"shape \(66, 3\)"),
        (lambda p: p[::-1], "another order: the eyes do not lie apart and above the mouth"),
        (lambda p: p[[*range(42), *range(36, 42), *range(48, 66)]], "do not lie apart"),
        (lambda p: p * (1, -1), "above the mouth"),
        (lambda p: p * (-1, 1), "above the mouth"),
        (lambda p: p[:, ::-1], "above the mouth"),
        (lambda p: np.array(["text"]), "SN001_0000_lm.mat, like all others, is no file of landmarks"),
    ],
    ids=[
        "49 points",
        "60 points",
        "3-D",
        "backwards",
        "one eye twice",
        "y upwards",
        "mirrored",
        "y first",
        "text",
    ],
)
def test_landmarks_of_another_layout_are_refused(three, change, says):
    rewrite(three, "SN001", change)
    with pytest.raises(ValueError, match=says):
        read_disfa(three, "SN001")


@pytest.mark.parametrize(
    "change", [lambda p: p[17:], lambda p: p[::-1], lambda p: p * np.nan, lambda p: 0 * p]
)
def test_a_single_odd_face_is_left_out(three, change):
    before = read_disfa(three, "SN001")[0].eyes
    rewrite(three, "SN001", change, slice(5, 6))
    eyes = read_disfa(three, "SN001")[0].eyes
    assert np.flatnonzero(np.isnan(eyes).any((1, 2))).tolist() == [5]
    assert np.array_equal(np.delete(eyes, 5, 0), np.delete(before, 5, 0))


@pytest.mark.parametrize("subject, first_is_known", [("SN001", False), ("SN002", True), ("SN003", True)])
def test_a_missing_first_landmark_shifts_nothing(three, subject, first_is_known):
    "Counted from 1 the numbers tell; from 0, with 1 the smallest, they could be either, and are refused."
    before = read_disfa(three, subject)[0].eyes
    first, second = landmarks(three, subject)[:2]
    first.unlink()
    if not first_is_known:
        with pytest.raises(
            ValueError,
            match="landmarks are numbered 1 to 20, for 12 labels and 21 frames: "
            "are they counted from 0 or from 1. If from 0, copy number 1 to 0",
        ):
            read_disfa(three, subject)
        shutil.copy(second, first)
    assert np.array_equal(read_disfa(three, subject)[0].eyes[1:], before[1:])


def test_a_missing_last_landmark_shifts_nothing(three):
    before = [read_disfa(three, s)[0].eyes for s in THREE]
    for s in THREE:
        landmarks(three, s)[-1].unlink()
    assert np.array_equal(read_disfa(three, "SN001")[0].eyes, before[0])
    for s in THREE[1:]:
        with pytest.raises(ValueError, match="if from 1, copy number 20 to 21"):
            read_disfa(three, s)


def test_two_landmarks_of_one_frame_are_refused(three):
    folder = landmarks(three, "SN001")[0].parent
    shutil.copytree(folder, folder.parent / "frame_lm")
    with pytest.raises(
        ValueError, match="SN001_0000_lm.mat and .*SN001_0000_lm.mat have the same number: keep one"
    ):
        read_disfa(three, "SN001")


def test_linked_landmarks_labels_and_videos_are_followed(three, tmp_path):
    before = read_disfa(three, "SN001")[0]
    for folder in (
        "Landmark_Points/SN001/tmp_frame_lm",
        "Landmark_Points/SN001",
        "Videos_LeftCamera",
        "ActionUnit_Labels/SN001",
    ):
        place = tmp_path / "elsewhere" / folder.replace("/", "_")
        place.parent.mkdir(exist_ok=True)
        shutil.move(three / folder, place)
        (three / folder).symlink_to(place)
    (three / "Landmark_Points" / "SN001" / "circle").symlink_to(three / "Landmark_Points" / "SN001")
    after = read_disfa(three, "SN001")[0]
    assert np.array_equal(after.eyes, before.eyes) and np.array_equal(after.intensities, before.intensities)


def fera_with(root, change):
    "A task of FERA2015 with other landmarks."
    write_fera2015(root, ("F001_T1",), frames=12)
    with h5py.File(root / "2DFeatures" / "F001_T1.mat", "a") as f:
        for k in range(12):
            p = change(f[f"#refs#/{k}"][()])
            del f[f"#refs#/{k}"]
            f["fit/pred"][k, 0] = f.create_dataset(f"#refs#/{k}", data=p).ref


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda p: np.concatenate([p, p[:, :17]], 1),
            r"F001_T1.mat, frame 10: landmarks of shape \(66, 2\), expected \(49, 2\)",
        ),
        (lambda p: p[:, ::-1], "another order"),
    ],
)
def test_landmarks_of_fera2015_of_another_layout_are_refused(tmp_path, change, says):
    fera_with(tmp_path, change)
    with pytest.raises(ValueError, match=says):
        read_fera2015(tmp_path, "F001_T1")


def test_frames_of_fera2015_that_are_missing_shift_no_landmarks(tmp_path):
    write_fera2015(tmp_path, ("F001_T1",), frames=12)
    before = read_fera2015(tmp_path, "F001_T1")[0].eyes
    frames = tmp_path / "BP4D-training" / "F001" / "T1"
    for k in (13, 14):
        (frames / f"{k}.jpg").unlink()
    assert np.array_equal(read_fera2015(tmp_path, "F001_T1")[0].eyes, np.delete(before, (3, 4), 0))
    (frames / "10.jpg").unlink()  # the first, or the last? nobody knows
    with pytest.raises(ValueError, match="landmarks of 12 frames, but there are 9, numbered 11 to 21"):
        read_fera2015(tmp_path, "F001_T1")


# --- malformed files


def test_tables_with_a_byte_order_mark_are_read(three, tmp_path):
    write_fera2015(tmp_path / "fera", ("F001_T1",), frames=12)
    before = read_disfa(three, "SN001")[0], read_fera2015(tmp_path / "fera", "F001_T1")[0]
    for f in (*three.rglob("*.txt"), *(tmp_path / "fera").rglob("*.csv")):
        f.write_bytes(codecs.BOM_UTF8 + f.read_bytes())
    for a, b in zip(before, (read_disfa(three, "SN001")[0], read_fera2015(tmp_path / "fera", "F001_T1")[0])):
        assert np.array_equal(a.intensities, b.intensities)


@pytest.mark.parametrize(
    "raw, says",
    [
        (b"", "is empty"),
        (b"1,0\n2,0,0\n", "no table of whole numbers"),
        (b"1,0,0\n", "has 3 columns, expected 2"),
        ("1,0\n# caf\xe9".encode("latin-1"), "is not UTF-8"),
        ("1,0".encode("utf-16"), "is not UTF-8"),
        (b"10,1\n10,2\n", "frame 10 is there twice"),
        (b"99999999999999999999,1\n", "no table"),
        (None, "Is a directory"),
    ],
)
def test_a_malformed_label_file_of_fera2015_is_named(tmp_path, raw, says):
    write_fera2015(tmp_path, ("F001_T1",), frames=12)
    file = tmp_path / "AU Intensity Codes3.0" / "AU12" / "F001_T1_coded.csv"
    file.unlink()
    file.mkdir() if raw is None else file.write_bytes(raw)
    with pytest.raises((ValueError, OSError), match=f"F001_T1_coded.csv.*{says}|{says}.*F001_T1_coded.csv"):
        read_fera2015(tmp_path, "F001_T1")


@pytest.mark.parametrize(
    "raw",
    [lambda raw: raw[: len(raw) // 2], lambda raw: raw[:-2], lambda raw: b"", lambda raw: b"none"],
    ids=["half", "without its end", "empty", "text"],
)
def test_a_frame_that_is_cut_off_is_not_used(tmp_path, raw):
    "OpenCV gives the half that is there, and grey below."
    write_fera2015(tmp_path, ("F001_T1",), frames=6)
    file = tmp_path / "BP4D-training" / "F001" / "T1" / "13.jpg"
    file.write_bytes(raw(file.read_bytes()))
    seen = list(frames.frames_of(read_fera2015(tmp_path, "F001_T1")[0]))
    assert [i for i, x in enumerate(seen) if x is None] == [3] and len(seen) == 6


def test_occurrence_codes_with_too_few_columns_are_named(tmp_path):
    write_fera2015(tmp_path, ("F001_T1",), frames=12)
    file = tmp_path / "AUCoding" / "F001_T1.csv"
    file.write_text("\n".join(",".join(line.split(",")[:13]) for line in file.read_text().splitlines()))
    with pytest.raises(ValueError, match="F001_T1.csv has 13 columns, expected 18 or more"):
        read_fera2015(tmp_path, "F001_T1")


def test_a_recording_that_cannot_be_read_is_left_out_and_tried_again(
    in_threads, drawn, tmp_path, monkeypatch
):
    """By its name and for its reason; the others are prepared.
    Once it can be read, the same command prepares it and nothing else."""
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    shutil.copytree(drawn, tmp_path / "faces_demo")
    labels = tmp_path / "faces_demo" / "ActionUnit_Labels"
    whole = {s: (labels / s / f"{s}_au1.txt").read_bytes() for s in ("SN001", "SN002")}
    for s, raw in dict(SN001=b"", SN002="caf\xe9".encode("latin-1")).items():
        (labels / s / f"{s}_au1.txt").write_bytes(raw)
    (labels / "SN003" / "SN003_au1.txt").unlink()
    (labels / "SN003" / "SN003_au1.txt").mkdir()
    with pytest.warns(
        UserWarning,
        match=r"3 of 27 recordings .*SN001: .*SN001_au1.txt is empty; SN002: .*SN002_au1.txt is not UTF-8 .*"
        r"SN003: .*Is a directory.*SN003_au1.txt.* the same command prepares them",
    ):
        data = load_faces("faces_demo", 1, 28, progress=False)
    times = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "faces_demo-prepared-32").glob("SN*.npz")}
    n = [len(load_faces("faces_demo", 1, 28, progress=False).x_train), len(data.x_train)]
    for s, raw in whole.items():
        (labels / s / f"{s}_au1.txt").write_bytes(raw)
    with pytest.warns(UserWarning, match="1 of 27 recordings"):
        mended = load_faces("faces_demo", 1, 28, progress=False)
    assert n[0] == n[1] < len(mended.x_train) and data.sha256 != mended.sha256
    after = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "faces_demo-prepared-32").glob("SN*.npz")}
    assert {k: after[k] for k in times} == times and len(after) == len(times) + 2
    shutil.rmtree(tmp_path / "faces_demo")
    assert (
        load_faces("faces_demo", 1, 28, progress=False).sha256 == mended.sha256
    )  # what is prepared is enough


def test_a_recording_whose_process_dies_does_not_end_the_others(monkeypatch):
    "Such as one with a file that crashes its reader. What each does is written out, and run by `eval`."
    does = dict.fromkeys(("good", "bad", "better"), "dict(frames=1)")
    does["bad"] = f"__import__('os').kill(__import__('os').getpid(), {signal.SIGKILL:d})"
    monkeypatch.setattr(faces, "prepare_recording", eval)
    done = faces._prepare_all(lambda n: (does[n],), None, list(does), 2, faces.progress_bar(False))
    assert done == {"good": dict(frames=1), "better": dict(frames=1), "bad": dict(problem=faces._DIED)}


def test_a_process_that_dies_while_work_is_handed_out_does_not_end_the_others(monkeypatch):
    class Broken(ThreadPoolExecutor):
        left = 1

        def submit(self, *args):
            if not self.left:
                raise BrokenProcessPool("A child process terminated abruptly")
            self.left -= 1
            return super().submit(*args)

    monkeypatch.setattr(faces, "worker_processes", Broken)
    monkeypatch.setattr(faces, "prepare_recording", lambda n: dict(name=n))
    done = faces._prepare_all(lambda n: (n,), None, ["a", "b", "c"], 2, faces.progress_bar(False))
    assert done == {n: dict(name=n) for n in "abc"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "SN001.npz").write_bytes((f / "SN001.npz").read_bytes()[:-9]),
        lambda f: (f / "SN001.jpegs").unlink(),
        lambda f: (f / "SN001.jpegs").write_bytes(b""),
        lambda f: (f / "index.json").write_text("{"),
        lambda f: (f / "index.json").write_text((f / "index.json").read_text().replace("SN001", "SN0O1")),
        lambda f: (f / "index.json").write_text(
            (f / "index.json").read_text().replace('"frames"', '"frbmes"', 1)
        ),
    ],
)
def test_damaged_preparations_are_found_and_made_anew(in_threads, drawn, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    (tmp_path / "faces_demo").symlink_to(drawn)
    before = load_faces("faces_demo", 1, 28, progress=False)
    damage(tmp_path / "faces_demo-prepared-32")
    with pytest.raises(ValueError, match="holds no whole preparation of frames"):
        FrameStore(tmp_path / "faces_demo-prepared-32")
    again = load_faces("faces_demo", 1, 28, progress=False)
    assert again.sha256 == before.sha256 and again.x_test[:3].equal(before.x_test[:3])


# --- where they go


@pytest.fixture
def read_only(monkeypatch, tmp_path):
    "A data folder in which nothing can be written, also by those who may write everywhere."
    folder, access, mkdir = tmp_path / "data", os.access, Path.mkdir
    folder.mkdir()
    monkeypatch.setenv("CSRAE_DATA", str(folder))

    def inside(path):
        return folder in (Path(path), *Path(path).parents)

    def refuse(self, *args, **kw):
        if inside(self):
            raise OSError(30, "Read-only file system", str(self))
        return mkdir(self, *args, **kw)

    monkeypatch.setattr(
        os, "access", lambda p, mode, **kw: not (inside(p) and mode & os.W_OK) and access(p, mode, **kw)
    )
    monkeypatch.setattr(Path, "mkdir", refuse)
    return folder


def test_data_that_cannot_be_written_are_prepared_in_the_cache(
    in_threads, drawn, tmp_path, monkeypatch, read_only
):
    os.symlink(drawn, read_only / "faces_demo")
    monkeypatch.setenv("CSRAE_CACHE", str(tmp_path / "cache"))
    before = load_faces("faces_demo", 1, 28, progress=False)
    (made,) = (tmp_path / "cache").glob("faces_demo-prepared-32-*")
    time_made = (made / "index.json").stat().st_mtime_ns
    assert load_faces("faces_demo", 1, 28, progress=False).sha256 == before.sha256
    assert (made / "index.json").stat().st_mtime_ns == time_made
    assert os.listdir(read_only) == ["faces_demo"]
    monkeypatch.delenv("CSRAE_CACHE")
    monkeypatch.setattr("pooch.os_cache", lambda name: str(tmp_path / "home" / name))
    assert load_faces("faces_demo", 1, 28, progress=False).sha256 == before.sha256
    assert list((tmp_path / "home" / "csrae_nb").glob("faces_demo-prepared-32-*/index.json"))
    monkeypatch.setenv("CSRAE_CACHE", str(read_only / "cache"))
    with pytest.raises(
        OSError,
        match=r"cannot write to .*faces_demo-prepared-32-.* \(Read-only file system\); "
        "free some space there, or name another folder in CSRAE_CACHE",
    ):
        load_faces("faces_demo", 1, 28, progress=False)


def test_two_data_folders_share_no_frames(in_threads, drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_CACHE", str(tmp_path / "cache"))
    sums = []
    for name in "ab":
        shutil.copytree(drawn, tmp_path / name / "faces_demo")
        if name == "b":
            write_disfa(tmp_path / name / "faces_demo", SUBJECTS[:1], frames=20, seed=1)
        monkeypatch.setenv("CSRAE_DATA", str(tmp_path / name))
        sums.append(load_faces("faces_demo", 1, 28, progress=False).sha256)
    assert sums[0] != sums[1]


def test_frames_that_lie_beside_the_data_are_found(in_threads, drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    (tmp_path / "faces_demo").symlink_to(drawn)
    before = load_faces("faces_demo", 1, 28, progress=False)
    monkeypatch.setenv("CSRAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "faces_demo").unlink()
    assert load_faces("faces_demo", 1, 28, progress=False).sha256 == before.sha256
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_ends_the_preparation_with_its_name(in_threads, drawn, tmp_path, monkeypatch):
    "It is no recording's fault."

    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frames, "_frames_to", full)
    with pytest.raises(OSError, match=r"cannot write to .* \(No space left on device\); .* CSRAE_CACHE"):
        prepare_faces("faces_demo", drawn, tmp_path, size=32, jobs=1, progress=False)
    assert os.listdir(tmp_path) == [".lock"]


# --- mean eyes, and subjects to validate on


def test_eyes_come_to_lie_where_they_are_on_average(in_threads, drawn, tmp_path, monkeypatch):
    """Of two landmarks turned back by the alignment, the mean over all frames is where each frame's are.
    The fixed ones stay as they are, in a folder of their own."""
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    (tmp_path / "faces_demo").symlink_to(drawn)
    fixed, mean = (load_faces("faces_demo", 1, 224, progress=False, eyes=e) for e in ("fixed", "mean"))
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == [
        "faces_demo",
        "faces_demo-prepared-256",
        "faces_demo-prepared-256-mean-eyes",
    ]
    assert fixed.sha256 != mean.sha256
    to = np.array(faces.mean_eyes("faces_demo", drawn))
    assert 0.15 < np.hypot(*(to[1] - to[0])) < 0.3 and abs(to.mean(0)[0] - 0.5) < 0.05
    whites = [
        (d.x_test[:20].amin(1) > 0.35).float().mean(0) for d in (fixed, mean)
    ]  # of the eyes, which nothing else in these faces is as bright as
    for w, (left, right) in zip(whites, ([[0.34, 0.38], [0.66, 0.38]], to)):
        w = w[60:120]
        assert [
            abs(w[:, half].sum(0) @ torch.arange(112.0) / w[:, half].sum() + o + 16 - 256 * e[0]) < 6
            for half, o, e in ((slice(0, 112), 0, left), (slice(112, 224), 112, right))
        ] == [True] * 2
    with pytest.raises(ValueError, match="eyes='median'; expected one of fixed, mean"):
        load_faces("faces_demo", eyes="median", progress=False)


def test_validation_on_subjects_that_nobody_trained_on(in_threads, drawn, tmp_path, monkeypatch):
    """Through Config, fit and its folder.
    The test stays the same, and so do names and folders of runs that validate on frames."""
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    (tmp_path / "faces_demo").symlink_to(drawn)
    store = (
        load_faces("faces_demo", 1, 32, progress=False),
        FrameStore(tmp_path / "faces_demo-prepared-37"),
    )[1]
    rows = {
        v: faces.fold_rows(store.subjects, FACES["faces_demo"].folds, 1, 0, v) for v in ("frames", "subjects")
    }
    of = {k: set(store.subjects[v]) for k, v in rows["subjects"].items()}
    assert [len(s) for s in of.values()] == [16, 2, 9]
    assert len(set.union(*of.values())) == 27
    assert sum(map(len, rows["subjects"].values())) == len(store)
    assert np.array_equal(rows["frames"]["test"], rows["subjects"]["test"])
    assert set(store.subjects[rows["frames"]["val"]]) <= set(store.subjects[rows["frames"]["train"]])
    old = Config(
        dataset="faces_demo",
        image_size=32,
        fold=1,
        epochs=1,
        warmup=1,
        labels=0.0,
        kmeans_epoch=0,
        components=3,
        batch_size=50,
        latent_dim=4,
    )
    new = dataclasses.replace(old, validation="subjects")
    data = prepare_data(resolve(new))
    assert (len(data.x_val), len(data.x_train)) == tuple(len(rows["subjects"][s]) for s in ("val", "train"))
    assert "validation" not in identity(old)
    assert identity(new) == {**identity(old), "validation": "subjects"}
    assert run_name(old) != run_name(new)
    assert "-p validation subjects" in command(new)
    run = fit(old, progress=False)
    config = json.loads((run.path / "config.json").read_text())
    del config["validation"]
    (run.path / "config.json").write_text(json.dumps(config))  # as version 0.1.0 wrote it
    tensors, meta = load_tensors(run.path / "model.safetensors")
    del meta["config"]["validation"]
    save_tensors(run.path / "model.safetensors", tensors, meta)
    assert fit(old, progress=False).history == run.history and load_run(run.path).cfg == run.cfg
    with pytest.raises(ValueError, match="validation: None there, 'subjects' here"):
        fit(new, progress=False, folder=run.path)


def test_validation_is_of_faces():
    with pytest.raises(
        ValueError, match="is for disfa, fera2015, faces_demo, a folder of videos .*, not for digits"
    ):
        Config(validation="subjects")
    with pytest.raises(ValueError, match="unknown validation 'videos'; expected one of frames, subjects"):
        Config(dataset="disfa", validation="videos")


# --- unknown answers are neither yes nor no


def partly_unknown(root, name):
    "Twelve frames of a drawn subject, of which every third has an answer that nobody knows."
    r, odd = read_disfa(root, name)
    intensities = r.intensities.copy()
    intensities[::3, :2] = frames.UNKNOWN
    return frames.Recording(r.images, intensities, r.eyes, np.arange(12) != 5), odd


def test_unknown_answers_are_drawn_as_unknown(in_threads, three, tmp_path):
    "Bars against counts by hand; an answer of two levels is no intensity."
    some = dataclasses.replace(
        FACES["faces_demo"], read=partly_unknown, folds=tuple((s,) for s in THREE), root=three
    )
    prepare_faces(some, three, tmp_path / "out", size=32, jobs=1, progress=False)
    store = FrameStore(tmp_path / "out", some)
    (ax,) = faces.plot_activations(store).axes
    bars = {b.get_label(): [p.get_height() for p in b] for b in ax.containers}
    known = [[v for v in column if v >= 0] for column in store.intensities.T.tolist()]
    assert bars == {
        "present (intensity 2 to 5)": [sum(v >= 2 for v in k) for k in known],
        "absent": [sum(v < 2 for v in k) for k in known],
        "unknown": [len(store) - len(k) for k in known],
    }
    assert bars["unknown"] == [12, 12, *[0] * 6] and len(store) == 33
    two = dataclasses.replace(some, least=(1,) * 8)
    store.faces = two
    assert [b.get_label() for b in faces.plot_activations(store).axes[0].containers][0] == "present"


def test_eyes_are_averaged_over_the_frames_that_are_used(three):
    "Also over those of which an answer is not known."
    n, sums = frames.eye_sums(partly_unknown, three, "SN001")
    eyes = np.delete(read_disfa(three, "SN001")[0].eyes, 5, 0)
    assert n == 11
    np.testing.assert_allclose(sums / n, (eyes.mean(0) - (96, 80)) / 160 + 0.5)


# --- what is left out is told


def warned(*args, **kw):
    "What is said while a data set is loaded, rare AUs aside."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_faces(*args, **kw)
    return [str(w.message) for w in caught if "has no frame that shows" not in str(w.message)]


def test_each_load_says_what_is_left_out(in_threads, tmp_path, monkeypatch):
    "Labels, a video and landmarks that were lost in part, beside recordings that are not there."
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    write_disfa(root := tmp_path / "disfa", SUBJECTS[:6] + SUBJECTS[-4:], frames=30)
    kept = root / "ActionUnit_Labels" / "SN001" / "SN001_au12.txt"
    kept.write_text("".join(kept.read_text().splitlines(True)[:3]))
    video = next((root / "Videos_LeftCamera").glob("*SN003*"))
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 4])
    for f in landmarks(root, "SN005")[15:]:
        f.unlink()
    said = [warned("disfa", 1, 28, progress=False) for _ in range(3)]
    assert said[0] == said[1] == said[2] and len(said[0]) == 1
    index = json.loads((tmp_path / "disfa-prepared-32" / "index.json").read_text())
    counts = faces.frame_counts(index)
    assert counts["SN001"] == {"used": 3, "not coded": 27} and counts["SN002"] == {"used": 30}
    assert counts["SN005"] == {"used": 16, "no face": 14} and counts["SN007"] == {"used": 0}
    assert counts["SN003"]["used"] + counts["SN003"]["unreadable"] == 30 and counts["SN003"]["used"] < 12
    unread = counts["SN003"]["unreadable"]
    for part in (
        "17 of 27 recordings of disfa are left out: no files of SN007, SN008, SN009 and 14 more (no labels",
        f"{41 + unread} of 300 frames of disfa are left out (27 not coded, {unread} unreadable, 14 no face)",
        "SN001: 27 of 30; the AUs have 3 and 30 labels: only the first 3 frames are used; ",
        f"SN003: {unread} of 30; its video ends after {30 - unread} of 30 frames; ",
        "SN005: 14 of 30 (all in ",
        "once they are mended, the same command prepares them; to prepare one anew",
    ):
        assert part in said[0][0], part


@pytest.mark.parametrize(
    "counts, odd, told",
    [
        (dict(used=1000), [], False),
        ({"used": 990, "no face": 10}, [], False),
        ({"used": 989, "no face": 6, "unreadable": 5}, [], True),
        ({"used": 900, "not coded": 100}, [], False),
        ({"used": 899, "not coded": 101}, [], True),
        ({"used": 10, "not named": 990}, [], False),
        ({"used": 98, "not named": 900, "no face": 2}, [], True),
        (dict(used=1000), ["its times stand still"], True),
        (dict(used=1000, unreadable=1), ["its times stand still"], True),
    ],
)
def test_what_is_worth_a_word(counts, odd, told):
    "More than one frame in a hundred, more than one in ten not coded, or anything odd."
    lost = {k: n for k, n in counts.items() if k != "used"}
    index = dict(name="x", recordings=dict(a=dict(frames=counts["used"], left_out=lost, odd=odd)))
    said = faces._frames_left_out(index)
    assert bool(said) == told and not any(s.startswith("0 of") for s in said)


# --- pictures that a camera dropped


def pieces(raw):
    "Where the pictures of an AVI begin, and their sizes."
    at, out = raw.index(b"movi") + 4, []
    while (name := raw[at : at + 4]) in (b"00dc", b"JUNK"):
        (n,) = struct.unpack_from("<I", raw, at + 4)
        out += [(at, n)] * (name == b"00dc")
        at += 8 + n + n % 2
    return out


def drop(path, k):
    "Empty the piece of picture k, as cameras do; the bytes that it had are skipped by players."
    raw = bytearray(path.read_bytes())
    at, n = pieces(raw)[k]
    struct.pack_into("<I", raw, at + 4, 0)
    struct.pack_into("<4sI", raw, at + 8, b"JUNK", n + n % 2 - 8)
    struct.pack_into("<I", raw, raw.index(b"idx1") + 8 + 16 * k + 12, 0)
    path.write_bytes(raw)


def spoil(path, k):
    at, n = pieces(raw := bytearray(path.read_bytes()))[k]
    raw[at + 8 : at + 8 + n] = bytes(n)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "lost, change, odd",
    [
        ((5,), drop, ["1 frame has no picture (the first is 5, counted from 0)"]),
        ((5, 6, 9), drop, ["3 frames have no picture (the first is 5, counted from 0)"]),
        ((5,), spoil, []),
        ((0, 7), spoil, []),
        ((19,), drop, []),  # the video goes on behind the labels
    ],
)
def test_labels_stay_with_their_frames_where_pictures_are_missing(tmp_path, lost, change, odd):
    "Each picture against those that were drawn, of which it is the nearest."
    write_disfa(tmp_path, ("SN001",), frames=20)
    video = next((tmp_path / "Videos_LeftCamera").glob("*SN001*"))
    for k in lost:
        change(video, k)
    true = [image.astype(int) for image, *_ in some_frames("SN001", 29, frames.DISFA_AUS, 0)]
    seen = list(frames.frames_of(read_disfa(tmp_path, "SN001")[0], said := []))
    near = [None if x is None else int(np.argmin([np.abs(x - t).mean() for t in true])) for x in seen]
    assert near == [None if k in lost else k for k in range(20)]
    assert said == (
        odd or ([] if change is spoil else ["1 frame has no picture (the first is 19, counted from 0)"])
    )


def test_a_video_without_a_steady_rate_is_left_out(three, tmp_path, monkeypatch):
    "Its labels are numbered, and nobody can say which picture a number means."
    real = frames.FrameClock.number
    monkeypatch.setattr(frames.FrameClock, "number", lambda self, i, s: real(self, i, s * (1 + 0.02 * i)))
    about = frames.prepare_recording(read_disfa, three, "SN001", tmp_path, 32)
    assert "too late for a rate of 20 per second: save the video at a steady rate" in about["problem"]


def test_codes_without_a_picture_are_told(in_threads, tmp_path, monkeypatch):
    "Of one AU that is numbered a frame late, and of all where pictures are missing; at each load."
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    write_fera2015(root := tmp_path / "fera2015", ("F001_T1", "M011_T1", "F007_T1"), frames=12)
    (file,) = (root / "AU Intensity Codes3.0" / "AU12").glob("M011_T1*")
    rows = [line.split(",") for line in file.read_text().split()]
    file.write_text("\n".join(f"{int(k) + 1},{v}" for k, v in rows))
    (root / "BP4D-training" / "F007" / "T1" / "20.jpg").unlink()
    for k in (13, 14):
        (root / "BP4D-training" / "F007" / "T1" / f"{k}.jpg").unlink()
    said = [warned("fera2015", 0, 28, progress=False) for _ in range(2)]
    assert said[0] == said[1] and len(said[0]) == 1
    assert "codes of AU 12 are of 1 frame that has no picture (the first is 22)" in said[0][0]
    assert (
        "codes of AU 6, 10, 12, 14, 17 are of 3 frames that have no picture (the first is 13)" in said[0][0]
    )
    assert "3 of 33 frames of fera2015 are left out (3 not coded)" in said[0][0]


# --- small and capital letters


def renamed(root, change):
    "All files and folders below a folder under changed names, from the innermost out."
    for path in sorted(root.rglob("*"), key=lambda p: -len(p.parts)):
        path.rename(path.with_name(change(path.name)))


@pytest.mark.parametrize("change", [str.upper, str.lower, str.swapcase])
def test_names_are_found_in_small_and_capital_letters(tmp_path, monkeypatch, change):
    write_disfa(tmp_path / "disfa", ("SN001",), frames=12)
    write_fera2015(tmp_path / "fera", ("F001_T1",), frames=12)

    def read():
        return read_disfa(tmp_path / "disfa", "SN001")[0], read_fera2015(tmp_path / "fera", "F001_T1")[0]

    before = read()
    for name in ("disfa", "fera"):
        renamed(tmp_path / name, change)
    for a, b in zip(before, read()):
        assert np.array_equal(a.intensities, b.intensities) and np.array_equal(a.eyes, b.eyes, equal_nan=True)
        assert next(frames.frames_of(b)) is not None
    assert FACES["disfa"].expected(tmp_path / "disfa", "SN001") == 13
    assert FACES["fera2015"].expected(tmp_path / "fera", "F001_T1") == 12
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    (tmp_path / "disfa").rename(tmp_path / "Disfa")
    assert faces._found(FACES["disfa"]) == tmp_path / "Disfa"


def test_a_video_of_disfa_may_be_an_mp4(three):
    (video,) = (three / "Videos_LeftCamera").glob("*SN001*")
    cv2 = pytest.importorskip("cv2")
    before = list(frames.frames_of(read_disfa(three, "SN001")[0]))
    writer = cv2.VideoWriter(str(video.with_suffix(".mp4")), cv2.VideoWriter_fourcc(*"mp4v"), 20, (192, 160))
    for image, *_ in some_frames("SN001", 21, frames.DISFA_AUS, 0):
        writer.write(image)
    writer.release()
    video.unlink()
    r, odd = read_disfa(three, "SN001")
    after = list(frames.frames_of(r, odd))
    assert not odd and all(np.abs(a.astype(int) - b).mean() < 10 for a, b in zip(before, after, strict=True))


# --- said before anything is prepared


@pytest.mark.parametrize(
    "words, says",
    [
        ("image_size=48", "network='faces' takes pictures of 32, 96, 160, 224, … pixels"),
        ("image_size=48 network=resnet18", "network='resnet18' takes pictures of 32, 96, 160, 224"),
        ("fold=3", "unknown fold 3; expected one of 0, 1, 2"),
    ],
)
def test_a_sweep_lists_nothing_that_would_fail_when_all_is_prepared(
    tmp_path, monkeypatch, capsys, words, says
):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    with pytest.raises(SystemExit) as e:
        sys.exit(sweeps.main(["dataset=disfa", *words.split(), "--list"]))
    assert e.value.code and says in capsys.readouterr().err + str(e.value.code)


def test_pictures_of_any_size_for_networks_that_take_them():
    for network in ("mlp", "gated"):
        assert Config(dataset="disfa", image_size=48, network=network, labels=0).image_size == 48
    assert Config(dataset="disfa", image_size=48, network="resnet18", model="Supervised").image_size == 48


def test_a_fold_that_is_not_there_is_refused_before_faces_are_prepared(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    (tmp_path / "faces_demo").symlink_to(drawn)
    with pytest.raises(ValueError, match="fold=3; expected 0 to 2"):
        load_faces("faces_demo", 3, 28, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["faces_demo"]


def test_one_process_per_core_that_this_one_may_use(three, tmp_path, monkeypatch):
    "On a shared machine they are fewer than it has."
    begun = []

    def workers(jobs):
        begun.append(jobs)
        return ThreadPoolExecutor(jobs)

    monkeypatch.setattr(faces, "worker_processes", workers)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    prepare_faces("faces_demo", three, tmp_path / "out", size=32, progress=False)
    monkeypatch.delattr(os, "sched_getaffinity")
    prepare_faces("faces_demo", three, tmp_path / "again", size=32, progress=False)
    assert begun == [2, 27]


@pytest.mark.filterwarnings("ignore:.*left out|fold . of .* has no frame")
@pytest.mark.parametrize("name, layout", [("disfa", "disfa"), ("FERA 2015", "fera2015")])
def test_a_path_to_a_known_layout_is_that_data_set(in_threads, tmp_path, monkeypatch, name, layout):
    "With the same frames as by its name, and with the network that it has."
    monkeypatch.setenv("CSRAE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "elsewhere" / name
    if layout == "disfa":
        write_disfa(root, ("SN002", "SN013", "SN003"), frames=12)
    else:
        write_fera2015(root, ("F001_T1", "M011_T1", "F007_T1"), frames=12)
    cfg = Config(dataset=str(root), image_size=32, fold=1, batch_size=10, components=5)
    assert faces.known_layout(root) == layout and faces.known_layout(tmp_path) is None
    data = prepare_data(resolve(cfg))
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / layout).symlink_to(root)
    named = load_faces(layout, 1, 32, progress=False)
    assert data.name == name and data.subjects == named.subjects and data.x_test[:].equal(named.x_test[:])
    assert (resolve(cfg).network, resolve(cfg).labels) == ("faces", 0.25)
    for wrong, says in ((dict(fold=3), "unknown fold 3"), (dict(image_size=48), "32, 96, 160, 224")):
        with pytest.raises(ValueError, match=says):
            dataclasses.replace(cfg, **wrong)


# --- new pictures for a run on faces


@pytest.mark.parametrize("likelihood", ["gaussian", "discretized_logistic"])
def test_new_pictures_reach_a_run_as_faces_reached_it_in_training(
    in_threads, drawn, tmp_path, monkeypatch, likelihood
):
    "As files, bytes or a table, in Python and in an estimator, also with a run of an earlier version."
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    (tmp_path / "faces_demo").symlink_to(drawn)
    cfg = Config(dataset="faces_demo", image_size=32, model="VAE", labels=0, latent_dim=2, epochs=1)
    cfg = dataclasses.replace(cfg, likelihood=likelihood, warmup=1, batch_size=20)
    run = fit(cfg, progress=False, folder=tmp_path / "run")
    seen = read_examples(run, "faces_demo").x[:4]
    levels = ((seen + 0.5) * 255).round().byte().numpy()
    (pictures := tmp_path / "pictures").mkdir()
    for i, x in enumerate(levels):
        Image.fromarray(x.transpose(1, 2, 0)).save(pictures / f"{i}.png")
    tensors, meta = load_tensors(run.path / "model.safetensors")
    assert meta["values"] == "centred bytes" and seen.min() < 0
    for values in (None, "bytes", "centred bytes"):  # of 0.1.0, of a version between, and of this one
        meta = {k: v for k, v in meta.items() if k != "values"} | ({"values": values} if values else {})
        save_tensors(run.path / "model.safetensors", tensors, meta)
        there = load_run(run.path)
        assert there.values == "centred bytes"
        for new in (pictures, levels, dict(x=seen.numpy())):
            torch.testing.assert_close(read_examples(there, new).x, seen)
        codes = there.model.encode(seen).mean.detach().numpy()
        est, flat = CSRAEEmbedding.from_run(there), levels.reshape(4, -1)
        for new in (levels, flat, pandas.DataFrame(flat.astype(int))):
            assert np.allclose(est.transform(new), codes, atol=1e-4)
        back = est.inverse_transform(est.transform(levels)).reshape(seen.shape)
        assert -1 < back.min() < 0 and np.allclose(sample_examples(there, 4).mean(), back.mean(), atol=0.3)
    assert read_examples(run, np.ones((1, 3, 32, 32), bool)).x.unique().tolist() == [0.5]


def test_levels_on_another_scale_are_told(in_threads, drawn, tmp_path, monkeypatch):
    "A Gaussian takes any number: levels from 0 to 1 draw a warning, data sets of another scale are refused."
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    (tmp_path / "faces_demo").symlink_to(drawn)
    cfg = Config(dataset="faces_demo", image_size=32, model="VAE", labels=0, latent_dim=2, epochs=1)
    cfg = dataclasses.replace(cfg, likelihood="gaussian", warmup=1, batch_size=20)
    run = fit(cfg, progress=False, folder=tmp_path / "run")
    x = read_examples(run, "faces_demo").x[:2]
    with pytest.warns(UserWarning, match=r"x ranges from 0.* give bytes, or subtract 0\.5"):
        read_examples(run, (x + 0.5).numpy())
    levels = ((x + 0.5) * 255).round().byte().numpy()
    own = Config(dataset="arrays", model="VAE", latent_dim=2, epochs=1, batch_size=1, likelihood="gaussian")
    of_bytes = fit(own, np.repeat(levels, 10, 0), progress=False, folder=tmp_path / "bytes")
    assert of_bytes.values == "bytes"
    with pytest.raises(ValueError, match="faces_demo is of centred bytes, .* of bytes: .*an array"):
        read_examples(of_bytes, "faces_demo")


# --- files that were changed since their recording was prepared


def prepared_times(folder):
    return {f.stem: f.stat().st_mtime_ns for f in folder.glob("*.npz")}


@pytest.fixture
def own_faces(in_threads, drawn, tmp_path, monkeypatch):
    "Drawn faces that a test may change, and a function that loads them and says what was prepared anew."
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    shutil.copytree(drawn, root := tmp_path / "faces_demo")

    def load():
        before = prepared_times(folder := tmp_path / "faces_demo-prepared-37")
        data = load_faces("faces_demo", 1, 32, progress=False)
        return data, {n for n, t in prepared_times(folder).items() if t != before.get(n)}

    load()
    return root, load


def video(root, subject):
    return next((root / "Videos_LeftCamera").glob(f"*{subject}*"))


def test_what_was_changed_is_prepared_anew_and_nothing_else(own_faces):
    "A label, a video, a landmark less: of that recording alone; a file that is touched is the same."
    root, load = own_faces
    first, anew = load()
    assert not anew
    label = root / "ActionUnit_Labels" / "SN002" / "SN002_au4.txt"
    label.write_text(re.sub(r"3,\d", "3,5", label.read_text(), count=1))  # as long as before
    second, anew = load()
    assert anew == {"SN002"} and second.sha256 != first.sha256 and not load()[1]
    shutil.copy(video(root, "SN003"), video(root, "SN010"))
    assert load()[1] == {"SN010"}
    landmarks(root, "SN031")[4].unlink()
    third, anew = load()
    assert anew == {"SN031"} and third.sha256 != second.sha256
    video(root, "SN005").touch()
    (root / "Landmark_Points" / "SN006" / ".DS_Store").write_text("seen")
    assert not load()[1]


def test_a_folder_of_frames_that_links_to_itself_is_read_once(tmp_path):
    write_fera2015(tmp_path, ("F001_T1",), frames=10)
    before, folder = frames.made_from(tmp_path, "F001_T1"), tmp_path / "BP4D-training" / "F001" / "T1"
    for name in ("once", "again"):
        (folder / name).symlink_to(folder)
    assert frames.made_from(tmp_path, "F001_T1") == before


def test_one_per_frame_is_looked_at_here_and_there(tmp_path):
    "A hundred pictures that are replaced together are seen, and by its name every one that comes or goes."
    write_fera2015(tmp_path, ("F001_T1", "F001_T2"), frames=100)
    pictures = sorted((tmp_path / "BP4D-training" / "F001" / "T1").glob("*.jpg"))
    before, other = (frames.made_from(tmp_path, n) for n in ("F001_T1", "F001_T2"))
    for f in pictures:
        f.write_bytes(f.read_bytes() + b"\0")
    after = frames.made_from(tmp_path, "F001_T1")
    pictures[41].unlink()
    assert len({before, after, frames.made_from(tmp_path, "F001_T1")}) == 3
    codes = next(tmp_path.glob("AU Intensity*/AU06/F001_T2*.csv"))
    assert frames.made_from(tmp_path, "F001_T2") == other
    codes.touch()
    assert frames.made_from(tmp_path, "F001_T2") == other
    codes.write_text(codes.read_text() + "\n")
    assert frames.made_from(tmp_path, "F001_T2") != other and frames.made_from(tmp_path, "F009_T1") == ""
    shutil.copytree(tmp_path, moved := tmp_path / "moved", ignore=lambda *_: ["moved"])
    assert frames.made_from(moved, "F001_T2") == frames.made_from(tmp_path, "F001_T2")


def test_what_is_prepared_outlives_its_files(own_faces, tmp_path):
    "Videos that are gone leave their frames; one that cannot be read any more is a problem, tried again."
    root, load = own_faces
    first, _ = load()
    good = video(root, "SN002").read_bytes()
    video(root, "SN001").unlink()
    shutil.rmtree(root / "Landmark_Points" / "SN003")
    same, anew = load()
    assert not anew and same.sha256 == first.sha256
    video(root, "SN002").write_bytes(b"no video")
    with pytest.warns(UserWarning, match="1 of 27 recordings of faces_demo are left out: SN002: .*no video"):
        assert load()[0].sha256 != first.sha256
    video(root, "SN002").write_bytes(good)
    assert load()[0].sha256 == first.sha256
    shutil.rmtree(root)
    assert load()[0].sha256 == first.sha256


def test_what_cannot_be_prepared_anew_is_told(own_faces, monkeypatch):
    root, load = own_faces
    changed = video(root, "SN005")
    changed.write_bytes(changed.read_bytes() + b"\0")
    monkeypatch.setattr(faces.os, "access", lambda *_: False)
    with pytest.warns(UserWarning, match="SN005 of faces_demo in .* were changed .* are those of before"):
        assert not load()[1]


def test_frames_of_an_earlier_version_stay_and_are_told(own_faces, tmp_path):
    "They know neither their source nor how they were counted; prepared anew, they do."
    root, load = own_faces
    first, _ = load()
    folder = tmp_path / "faces_demo-prepared-37"
    index = json.loads((folder / "index.json").read_text())
    for name, about in index["recordings"].items():
        about = {k: v for k, v in about.items() if k not in ("source", "counted")}
        index["recordings"][name] = about
        columns = dict(np.load(folder / f"{name}.npz")) | dict(about=json.dumps(about))
        np.savez(folder / f"{name}.npz", **columns)
    (folder / "index.json").write_text(json.dumps(index))
    told = "27 recordings of faces_demo were prepared by an earlier version, .* remove its .npz there"
    video(root, "SN001").touch()
    with pytest.warns(UserWarning, match=told):
        same, anew = load()
    assert same.sha256 == first.sha256 and not anew
    for f in folder.glob("*.npz"):
        f.unlink()
    with warnings.catch_warnings(record=True) as said:
        same, anew = load()
    assert len(anew) == 27 and not any("earlier" in str(w.message) for w in said)


def test_a_run_on_mean_eyes_goes_on_where_it_was_stopped(own_faces, tmp_path):
    "With the same call; by its configuration alone it would be on fixed eyes, and that is told."
    small = dict(dataset="faces_demo", image_size=32, model="Supervised", labels=1.0, epochs=3, warmup=1)
    cfg = Config(**small, batch_size=20, labelled_batch=10, fold=1)

    def mean():
        return load_faces("faces_demo", 1, 32, progress=False, eyes="mean")

    with pytest.MonkeyPatch.context() as m:
        save = Training.save
        m.setattr(
            Training, "save", lambda t: (save(t), t.meta["epoch"] == 2 and (_ for _ in ()).throw(OSError))
        )
        with pytest.raises(OSError):
            fit(cfg, mean(), progress=False, folder=tmp_path / "mean")
    assert (tmp_path / "mean" / "checkpoint.safetensors").exists()
    there = "of other data, 'faces_demo, mean eyes' there, 'faces_demo' here"
    with pytest.raises(ValueError, match=there):
        fit(cfg, progress=False, folder=tmp_path / "mean")
    run = fit(cfg, mean(), progress=False, folder=tmp_path / "mean")
    whole = fit(cfg, mean(), progress=False, folder=tmp_path / "whole")
    assert run.history == whole.history and len(run.history) == 3
    with pytest.raises(ValueError, match=there):
        fit(cfg, progress=False, folder=tmp_path / "mean")


# --- left and right


def test_mirroring_is_a_choice(own_faces, tmp_path, monkeypatch):
    "Without it the same crops and turns, none in the mirror; runs that have it keep their names."
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    cfg = Config(dataset="faces_demo", image_size=32, fold=1, model="VAE", labels=0, epochs=1, warmup=1)
    straight = dataclasses.replace(cfg, mirror=False, latent_dim=2, batch_size=20)
    data, kept = prepare_data(resolve(cfg)), prepare_data(resolve(straight))
    assert (data.mirror, kept.mirror, data.sha256) == (True, False, kept.sha256)
    x = data.x_train[:1].expand(200, *data.x_train.shape[1:])
    seen, plain = (d.draw(x, torch.Generator().manual_seed(0)) for d in (data, kept))
    same = (seen == plain).flatten(1).all(1)
    assert 70 < same.sum() < 130
    assert torch.equal(data.fixed("val")[:3], kept.fixed("val")[:3])
    assert "mirror" not in identity(resolve(cfg)) and identity(resolve(straight))["mirror"] is False
    assert run_name(straight) != run_name(dataclasses.replace(straight, mirror=True))
    assert fit(straight, progress=False).cfg.mirror is False
    with pytest.raises(
        ValueError, match="mirror=False is for disfa, fera2015, faces_demo, a folder of videos"
    ):
        fit(Config(dataset="digits", mirror=False), progress=False)


def test_what_is_there_is_told_before_what_is_absent_and_odd_sizes_too(tmp_path):
    whole = dict(frames=9, left_out={}, odd=[], counted=2)
    of = {n: dict(problem=f"no video of {n}", absent=True) for n in ("A", "B", "C", "D")}
    of |= {n: dict(whole, shape=[160, 192]) for n in "EFGH"} | dict(I=dict(whole, shape=[120, 144]))
    of |= dict(X=dict(problem="labels of AU 4 are damaged"))
    with pytest.warns(UserWarning) as said:
        faces._tell(dict(name="disfa", recordings=of), tmp_path)
    text = str(said[0].message)
    left_out = "X: labels of AU 4 are damaged; no files of A, B, C and 1 more"
    assert f"5 of 10 recordings of disfa are left out: {left_out}" in text
    assert "frames of another size than the usual 192 x 160: I 144 x 120; if they were resized" in text
