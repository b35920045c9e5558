"""Files that are cut off or altered by chance: each is read whole, or refused or left out by name; nothing
hangs, and no row goes missing unsaid."""

import gzip
import io
import os
import re
import signal
import struct
import tarfile
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from csrae_nb import faces, formats
from csrae_nb.drawings import write_disfa, write_fera2015
from csrae_nb.frames import prepare_recording, prepared_recording

pytest.importorskip("h5py")
pytest.importorskip("cv2")
TIMES = int(os.environ.get("CSRAE_FUZZ", 20))  # of each of the files below, so 460 in all


def mutated(raw, rng):
    "Bytes cut off somewhere, or with one to three of them altered."
    if rng.random() < 0.4:
        return raw[: rng.integers(0, len(raw))]
    out = bytearray(raw)
    for i in rng.integers(0, len(out), rng.integers(1, 4)):
        out[i] = rng.integers(0, 256) if rng.random() < 0.5 else out[i] ^ 1 << rng.integers(8)
    return bytes(out)


@contextmanager
def seconds(n):
    "TimeoutError for a body that takes longer."

    def late(*_):
        raise TimeoutError(f"still reading after {n} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(n)
    try:
        yield
    finally:
        signal.alarm(0)


def replace(file, raw):
    "Another file under the same name: one that is still mapped into memory stays as it is."
    (new := file.with_name("new")).write_bytes(raw)
    os.replace(new, file)


def fuzz(file, read):
    "Call read() with the file as it is, then with altered ones; `read` itself tests answers and errors."
    raw, rng = file.read_bytes(), np.random.default_rng([*file.name.encode()])
    for i in range(TIMES):
        replace(file, mutated(raw, rng))
        with warnings.catch_warnings(), seconds(10):
            warnings.simplefilter("ignore")
            read()
    replace(file, raw)


# Files of arrays and images --------------------

LABELS, IMAGES, TEXT, RECORDS = (
    "t10k-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "binarized_mnist_test.amat",
    formats.BATCHES[0],
)
X = np.random.default_rng(0).integers(0, 2, (6, 784), dtype=np.uint8)


def idx(a):
    return struct.pack(f">BBBB{a.ndim}I", 0, 0, 8, a.ndim, *a.shape) + a.tobytes()


def mat(zipped, **arrays):
    savemat(file := io.BytesIO(), arrays, do_compression=zipped)
    return file.getvalue()


def records(n):
    return np.concatenate(
        [np.arange(n, dtype=np.uint8)[:, None] % 10, np.resize(X, (n, formats.RECORD - 1))], 1
    ).tobytes()


def archive():
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w:gz") as tar:
        for name in formats.BATCHES:
            info = tarfile.TarInfo(name)
            info.size = formats.RECORD
            tar.addfile(info, io.BytesIO(records(1)))
    return out.getvalue()


PUBLIC = {  # name of the file: its content, its shape
    LABELS: (idx(np.arange(6, dtype=np.uint8)), (6,)),
    f"{IMAGES}.gz": (gzip.compress(idx(X.reshape(6, 28, 28))), (6, 28, 28)),
    TEXT: (b"".join(b" ".join(b"%d" % v for v in x) + b"\n" for x in X), (6, 784)),
    RECORDS: (records(3), (3, formats.RECORD)),
    formats.CIFAR10: (archive(), (6, formats.RECORD)),
    formats.CHARDATA: (
        mat(True, data=X.T / 2, target=np.eye(50)[:, :6]),
        dict(data=(784, 6), target=(50, 6)),
    ),
    formats.SILHOUETTES: (
        mat(False, train_data=X, train_labels=np.arange(6)[:, None]),
        dict(train_data=(6, 784), train_labels=(6, 1)),
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_files(name, tmp_path, monkeypatch):
    raw, shape = PUBLIC[name]
    key = name.removesuffix(".gz") if name.endswith("ubyte.gz") else name
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path))
    monkeypatch.setitem(formats.FILES, key, formats.PublicFile(shape, None, (), None))
    (file := tmp_path / name).write_bytes(raw)

    def read():
        try:
            x, _ = formats.read_file(key)
        except ValueError as e:
            assert f"{name} is damaged or another file" in str(e)
        else:
            assert ({k: x[k].shape for k in shape} if isinstance(shape, dict) else x.shape) == shape

    read()
    fuzz(file, read)


@pytest.mark.parametrize("name", ["a.npz", "b.npz", "c.npy"])
def test_files_of_arrays(name, tmp_path):
    file = tmp_path / name
    if name == "a.npz":
        np.savez(file, x=X, y=np.arange(6))
    elif name == "b.npz":
        np.savez_compressed(file, x=X.astype(float) / 2)
    else:
        np.save(file, X)

    def read():
        try:
            arrays, _ = formats.read_arrays(file)
        except ValueError as e:
            assert f"{name} does not hold plain arrays" in str(e)
        else:  # another name, type or order of the axes is refused later, with the array's name
            for v in arrays.values():
                assert v.size * v.itemsize in (X.size, 8 * X.size, 8 * 6)

    read()
    fuzz(file, read)


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp"])
def test_folders_of_images(ending, tmp_path):
    for i in range(3):
        Image.fromarray(X[i].reshape(28, 28) * 200).save(tmp_path / f"{i}.{ending}")

    def read():
        try:
            x = formats.read_folder(tmp_path)[0]["x_train"]
        except ValueError as e:
            assert f"1 of 3 images in {tmp_path}" in str(e) and f"1.{ending}" in str(e)
        else:
            assert x.shape[0] == 3 and x.shape[-2:] == (28, 28)

    read()
    fuzz(tmp_path / f"1.{ending}", read)


# Recordings of faces, and what is prepared of them --------------------

FRAMES = 8


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    write_disfa(root, ("SN001", "SN002"), frames=FRAMES)
    write_fera2015(root, ("F001_T1",), frames=FRAMES)
    return root


SOURCES = {  # a file of a recording
    "labels": ("faces_demo", "SN001", "ActionUnit_Labels/SN001/SN001_au6.txt"),
    "landmarks": ("faces_demo", "SN002", "Landmark_Points/SN002/frame_lm/SN002_0004_lm.mat"),
    "video": ("faces_demo", "SN002", "Videos_LeftCamera/LeftVideoSN002_comp.avi"),
    "intensities": ("fera2015", "F001_T1", "AU Intensity Codes3.0/AU12/F001_T1_coded.csv"),
    "occurrences": ("fera2015", "F001_T1", "AUCoding/F001_T1.csv"),
    "points": ("fera2015", "F001_T1", "2DFeatures/F001_T1.mat"),
    "frame": ("fera2015", "F001_T1", "BP4D-training/F001/T1/13.jpg"),
}


@pytest.mark.parametrize("what", SOURCES)
def test_recordings_of_faces(what, drawn, tmp_path):
    name, recording, path = SOURCES[what]

    def read():
        about = prepare_recording(faces.FACES[name].read, drawn, recording, tmp_path, 32)
        if problem := about.get("problem"):
            assert len(problem) > 20 and not re.match(r"\w+(Error|Exception|Interrupt)\b", problem), problem
        else:
            n = about["frames"] + sum(about["left_out"].values())
            assert n == FRAMES or what == "labels" and n > FRAMES  # those of the longest of the AUs' files
            assert prepared_recording(tmp_path, recording)["frames"] == about["frames"]
        assert not list(tmp_path.glob(".*"))

    read()
    fuzz(drawn / path, read)


@pytest.mark.parametrize("what", ["index.json", "SN001.npz", "SN001.jpegs"])
def test_prepared_faces(what, drawn, tmp_path):
    out = tmp_path / "prepared"
    out.mkdir()
    demo = faces.FACES["faces_demo"]
    about = {n: prepare_recording(demo.read, drawn, n, out, 32) for n in demo.recordings()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        faces._write_index(demo, drawn, out, 32, about)
    whole = len(faces.FrameStore(out))

    def read():
        try:
            store = faces.FrameStore(out)
            assert len(store) == whole
            assert store.read(np.arange(whole)).shape == (whole, 3, store.size, store.size)
        except ValueError as e:
            assert (
                f"{out} holds no whole preparation" in str(e)
                or "SN001.jpegs is damaged" in str(e)
                or "SN002.jpegs is damaged" in str(e)
            )

    read()
    fuzz(out / what, read)
