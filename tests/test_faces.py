"Preparing faces: what a notebook cannot show, kills, damage and folders with gaps."
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from csrae_nb import faces
from csrae_nb.evaluation import complete_run
from csrae_nb.faces import FACES, FrameStore, load_faces, prepare_faces, read_fera2015, write_disfa, write_fera2015
from csrae_nb.training import Config, command, fit, load_run, run_name, runs_folder

h5py = pytest.importorskip("h5py"); pytest.importorskip("cv2")
SUBJECTS = tuple(FACES["faces_demo"].recordings())

@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    write_disfa(root, SUBJECTS, frames=20)
    return root

def digests(index): return {n: a["sha256"] for n, a in index["recordings"].items()}

def test_a_preparation_that_is_killed_goes_on(drawn, tmp_path):
    "What was whole stays as it is, what was half written is made anew, and the result is that of an unbroken one."
    args = "faces_demo", drawn, tmp_path/"killed"
    code = f"from pathlib import Path; from csrae_nb.faces import prepare_faces\nif __name__ == '__main__': prepare_faces('faces_demo', Path({str(drawn)!r}), Path({str(args[2])!r}), 64, jobs=1, progress=False)"
    (script := tmp_path/"prepare.py").write_text(code)
    p = subprocess.Popen([sys.executable, script], start_new_session=True)
    while len(list(args[2].glob("*.npz"))) < 3: assert p.poll() is None; time.sleep(.005)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    before = {f.name: f.stat().st_mtime_ns for f in args[2].glob("*.npz")}
    assert 3 <= len(before) < len(SUBJECTS) and not (args[2]/"index.json").exists()
    (args[2]/".SN999.jpegs.tmp").write_bytes(b"half"); damaged = args[2]/f"{SUBJECTS[0]}.jpegs"; damaged.write_bytes(damaged.read_bytes()[:-5])
    index = prepare_faces(*args, size=64, jobs=2, progress=False)
    after = {f.name: f.stat().st_mtime_ns for f in args[2].glob("*.npz")}
    assert [n for n in before if before[n] != after[n]] == [f"{SUBJECTS[0]}.npz"] and not list(args[2].glob(".*.tmp"))
    assert digests(index) == digests(prepare_faces("faces_demo", drawn, tmp_path/"whole", size=64, jobs=1, progress=False))

def test_what_is_missing_is_named_and_the_rest_goes_on(drawn, tmp_path):
    root = tmp_path/"gaps"; shutil.copytree(drawn, root)
    shutil.rmtree(root/"Landmark_Points"/"SN001"); (root/"ActionUnit_Labels"/"SN002"/"SN002_au9.txt").unlink()
    next((root/"Videos_LeftCamera").glob("*SN003*")).write_bytes(b"no video"); next((root/"Videos_LeftCamera").glob("*SN010*")).unlink()
    for au in FACES["faces_demo"].aus:
        f = root/"ActionUnit_Labels"/"SN013"/f"SN013_au{au}.txt"; f.write_text(f.read_text() + "".join(f"{k},0\n" for k in range(21, 41)))      # longer than the video
        f = root/"ActionUnit_Labels"/"SN018"/f"SN018_au{au}.txt"; f.write_text(f.read_text().replace("7,0\n", "7,9\n", 1))
    for k in (10, 11, 12): next((root/"Landmark_Points"/"SN029").rglob(f"*00{k}_lm.mat")).unlink()
    with pytest.warns(UserWarning, match="4 of 27 recordings of faces_demo are left out: SN001: no landmarks"): index = prepare_faces("faces_demo", root, tmp_path/"out", size=32, jobs=2, progress=False)
    a = index["recordings"]
    assert "labels of AU 9" in a["SN002"]["problem"] and "is no video that can be read" in a["SN003"]["problem"] and "no video of the left camera" in a["SN010"]["problem"]
    assert (a["SN013"]["frames"], a["SN013"]["left_out"]) == (29, {"unreadable": 1, "no face": 10}) and a["SN018"]["left_out"]["not coded"] > 0
    assert a["SN029"]["left_out"] == {"no face": 2}                     # of three in a row the first repeats the one before
    assert json.loads((tmp_path/"out"/"index.json").read_text()) == json.loads(json.dumps(index))

def test_fera2015_through_the_same_door(tmp_path, monkeypatch):
    names = "F001_T1", "F001_T2", "M011_T1", "F007_T8"
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path)); write_fera2015(root := tmp_path/"FERA2015", names, frames=20)
    with h5py.File(root/"2DFeatures"/"F001_T2.mat", "a") as f: f["#refs#"].create_dataset("none", data=np.zeros(2)); f["fit/pred"][4, 0] = f["#refs#/none"].ref # Matlab's way to say []
    (root/"2DFeatures"/"F007_T8.mat").write_bytes(b"damaged")
    shutil.move(root/"AUCoding", root/"AUCodes"); (root/"AUCoding").mkdir(); shutil.move(root/"AUCodes", root/"AUCoding"/"AU_OCC")
    with pytest.raises(FileNotFoundError, match="landmarks that cannot be read"): read_fera2015(root, "F007_T8")
    with pytest.warns(UserWarning) as said, pytest.raises(ValueError, match="fold 2 of fera2015 has no frames to test"): load_faces("fera2015", 2, 28, progress=False)
    assert "325 of 328 recordings of fera2015 are left out" in str(said[0].message)
    with pytest.warns(UserWarning, match="has no frame that shows AU"): data = load_faces("fera2015", 1, 28, progress=False)
    a = json.loads((tmp_path/"fera2015-prepared-32"/"index.json").read_text())["recordings"]
    assert (a["F001_T1"]["left_out"], a["F001_T2"]["left_out"]) == ({"not coded": 1}, {"not coded": 1, "no face": 1})
    assert (len(data.x_test), len(data.x_train) + len(data.x_val), data.y_test.shape[1]) == (19, 37, 5)

def test_an_intensity_that_is_not_known_is_zero_where_the_au_does_not_occur(tmp_path):
    write_fera2015(tmp_path, ("F001_T1",), frames=10); file = tmp_path/"AUCoding"/"F001_T1.csv"
    lines = file.read_text().splitlines(); first = lines[1].split(",")
    for au in faces.FERA_AUS: first[au] = "0"
    file.write_text("\n".join([lines[0], ",".join(first), *lines[2:]]))
    assert read_fera2015(tmp_path, "F001_T1")[0].intensities[0].tolist() == [0]*5

def test_a_damaged_image_is_named(drawn, tmp_path):
    prepare_faces("faces_demo", drawn, tmp_path, size=32, jobs=2, progress=False)
    file = tmp_path/"SN001.jpegs"; file.write_bytes(b"\0"*file.stat().st_size)
    store = FrameStore(tmp_path); assert store.read(np.array([70])).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="SN001.jpegs is damaged"): store.read(np.array([70, 0]))

def test_memory_does_not_grow_with_the_video(tmp_path):
    "The peak of a process that prepares 40 frames, and of one that prepares 400."
    peak = []
    for n in (40, 400):
        write_disfa(root := tmp_path/str(n), ("SN001",), frames=n)
        code = (f"import resource; from pathlib import Path; from csrae_nb.faces import _prepare, FACES\nout = Path({str(tmp_path)!r})\n"
                f"assert _prepare('faces_demo', Path({str(root)!r}), 'SN001', out, 256)['frames'] == {n}\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
        peak.append(int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)/1024)
    assert peak[1] - peak[0] < 15                                      # MiB; 360 frames of 256×256 are 67

def test_a_run_on_faces(drawn, tmp_path, monkeypatch):
    "From the folders to metrics.json, batch by batch from the disk, through the same fit; without labels there are no kNN errors of rows of answers."
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path)); monkeypatch.setenv("CSRAE_RUNS", str(tmp_path/"runs")); shutil.copytree(drawn, tmp_path/"faces_demo")
    cfg = Config(dataset="faces_demo", image_size=32, fold=1, epochs=2, warmup=1, kmeans_epoch=1, components=3, batch_size=50, latent_dim=4, expost_components=3)
    metrics = complete_run(cfg, progress=False)
    assert metrics["reconstruction"] < 8*3*32**2 and metrics["knn3"] is None and metrics["frechet_classifier_floor"] is None and metrics["effective_k"] >= 1
    run = load_run(runs_folder()/run_name(cfg)); data = load_faces("faces_demo", 1, 32, progress=False)
    assert run.model.reconstruct(data.fixed("test")[:3]).shape == (3, 3, 32, 32) and run.sha256 == data.sha256
    assert not run_name(cfg) == run_name(dataclasses.replace(cfg, fold=2)) and "-p image_size 32" in command(cfg) and "-p fold 1" in command(cfg)

@pytest.mark.parametrize("wrong, says", [(dict(dataset="mnist", fold=1), "fold and image_size are of faces"), (dict(dataset="faces_demo", image_size=100), "32, 96, 160, 224"),
                                         (dict(dataset="faces_demo", image_size=32, fold=3), "expected 0 to 2"), (dict(dataset="faces_demo", image_size=32, likelihood="bernoulli"), "call for discretized_logistic")])
def test_what_faces_cannot_be(drawn, tmp_path, monkeypatch, wrong, says):
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path)); monkeypatch.setenv("CSRAE_RUNS", str(tmp_path/"runs")); (tmp_path/"faces_demo").symlink_to(drawn)
    with pytest.raises(ValueError, match=says): fit(Config(**wrong), progress=False)
