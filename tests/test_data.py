"""What the chapter on data cannot hold: downloads through a server, files of full size, folders in every
state, and the real data where `CSRAE_DATA` has them."""

import gzip
import http.server
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat
from scipy.sparse import csr_array, csr_matrix
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from csrae_nb import catalogue, data, formats, results, sweeps
from csrae_nb.grids import read_words

NAME = "t10k-labels-idx1-ubyte"
CONTENT = struct.pack(">BBBBI", 0, 0, 8, 1, 6) + bytes(range(6))
ZIPPED = gzip.compress(CONTENT, mtime=0)
REAL = os.environ.get("CSRAE_DATA")  # before the sandbox changes it


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty data folder, with NAME known as a public file of six labels."
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    public = formats.PublicFile(
        (6,), data.sha256(CONTENT), ("http://127.0.0.1:9/none.gz",), data.sha256(ZIPPED)
    )
    monkeypatch.setitem(formats.FILES, NAME, public)
    return tmp_path / "data"


@pytest.fixture
def serve(monkeypatch, folder):
    "serve(a, b, ...): mirrors that answer with these bytes, or break off halfway; gives the requests."
    servers, seen = [], []

    def start(*answers, length=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append(self.path)
                body = answers[int(self.path.split("/")[1])]
                if body is None:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(length or len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = tuple(f"http://127.0.0.1:{server.server_port}/{i}/{NAME}.gz" for i in range(len(answers)))
        monkeypatch.setitem(formats.FILES, NAME, replace(formats.FILES[NAME], urls=urls))
        return seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def left(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_download_once(folder, serve):
    seen = serve(ZIPPED)
    for _ in range(2):  # the second finds the file
        x, hashes = formats.read_file(NAME)
        assert x.tolist() == list(range(6)) and hashes == {f"{NAME}.gz": data.sha256(ZIPPED)}
    assert len(seen) == 1 and left(folder) == [f"{NAME}.gz"]


@pytest.mark.parametrize(
    "answer", [b"<html>garbage</html>", b"", ZIPPED[:-5], None], ids=["garbage", "empty", "cut", "404"]
)
def test_bad_download_leaves_the_cache_clean(folder, serve, answer):
    serve(answer)
    with pytest.raises(FileNotFoundError, match=f"{NAME} is not in .* and could not be downloaded"):
        formats.read_file(NAME)
    assert left(folder) == []


def test_connection_that_breaks_off(folder, serve):
    serve(ZIPPED[:20], length=len(ZIPPED))
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        formats.read_file(NAME)
    assert left(folder) == []


def test_second_mirror(folder, serve):
    seen = serve(b"garbage", ZIPPED)
    assert formats.read_file(NAME)[0].tolist() == list(range(6))
    assert len(seen) == 2 and left(folder) == [f"{NAME}.gz"]


def test_a_set_made_like_mnist_is_kept_apart(folder, serve, monkeypatch):
    serve(ZIPPED)
    fashion = f"{formats.FASHION}{NAME}"
    monkeypatch.setitem(formats.FILES, fashion, formats.FILES[NAME])
    folder.mkdir()
    (folder / NAME).write_bytes(b"MNIST's own")
    assert formats.read_file(fashion)[0].tolist() == list(range(6))
    assert formats.find_file(fashion) == folder / f"{fashion}.gz"
    assert formats.find_file(NAME).read_bytes() == b"MNIST's own"


def test_offline_says_which_file_from_where_and_where_to_put_it(folder):
    with pytest.raises(FileNotFoundError) as e:
        formats.download(NAME)
    for part in (NAME, "http://127.0.0.1:9/none.gz", str(folder), "CSRAE_DATA"):
        assert part in str(e.value)


@pytest.mark.parametrize("place", ["", "MNIST/raw"])
@pytest.mark.parametrize("ending, raw", [("", CONTENT), (".gz", ZIPPED)])
def test_placed_by_hand(folder, place, ending, raw, recwarn):
    path = folder / place / (NAME + ending)
    path.parent.mkdir(parents=True)
    path.write_bytes(raw)
    x, hashes = formats.read_file(NAME)
    assert x.tolist() == list(range(6)) and hashes == {path.name: data.sha256(raw)} and not recwarn.list


def test_zipped_anew_is_the_same_content(folder, recwarn):
    folder.mkdir()
    (folder / f"{NAME}.gz").write_bytes(gzip.compress(CONTENT, 1, mtime=12345))
    assert formats.read_file(NAME)[0].tolist() == list(range(6)) and not recwarn.list


def test_another_content_warns_and_is_recorded(folder):
    other = CONTENT[:-1] + b"\0"
    folder.mkdir()
    (folder / NAME).write_bytes(other)
    with pytest.warns(UserWarning, match="differs from the public file"):
        x, hashes = formats.read_file(NAME)
    assert x[-1] == 0 and hashes == {NAME: data.sha256(other)}


@pytest.mark.parametrize("cut", [1, 8, 9, len(ZIPPED) // 2, len(ZIPPED) - 4])
def test_truncated_zip_is_named_and_kept(folder, cut):
    path = folder / f"{NAME}.gz"
    folder.mkdir()
    path.write_bytes(ZIPPED[:-cut])
    with pytest.raises(ValueError, match=f"{NAME}.gz is damaged or another file: .* Delete it"):
        formats.read_file(NAME)
    assert path.exists()  # it is the user's: we say what to do, and do not do it


def test_flipped_bits_in_a_zip(folder):
    folder.mkdir()
    for i in range(10, len(ZIPPED)):
        (folder / f"{NAME}.gz").write_bytes(ZIPPED[:i] + bytes([ZIPPED[i] ^ 0xFF]) + ZIPPED[i + 1 :])
        with pytest.raises(ValueError, match="damaged or another file"):
            formats.read_file(NAME)


@pytest.fixture
def no_sums(folder, monkeypatch):
    "NAME as a public file whose sums nobody publishes."
    monkeypatch.setitem(formats.FILES, NAME, replace(formats.FILES[NAME], sha256=None, download_sha256=None))


def test_download_without_a_known_sum_is_accepted_by_its_format(no_sums, serve, folder, recwarn):
    serve(b"<html>garbage</html>", gzip.compress(CONTENT + b"\0"), ZIPPED)
    assert formats.read_file(NAME)[1] == {f"{NAME}.gz": data.sha256(ZIPPED)}  # the third mirror's
    assert left(folder) == [f"{NAME}.gz"] and not recwarn.list


@pytest.mark.parametrize(
    "answer",
    [b"<html>garbage</html>", b"", ZIPPED[:-5], ZIPPED[:9]],
    ids=["garbage", "empty", "cut", "header"],
)
def test_bad_download_without_a_known_sum_leaves_the_cache_clean(no_sums, serve, folder, answer):
    serve(answer)
    with pytest.raises(FileNotFoundError, match="could not be downloaded:\n.*another file"):
        formats.read_file(NAME)
    assert left(folder) == []


def test_imports_without_pooch():
    code = (
        "import sys; sys.modules['pooch'] = sys.modules['requests'] = None; "
        "from csrae_nb.catalogue import load_data; "
        "assert load_data('digits').x_shape == (8, 8)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The formats at full size, with made-up content --------------------


def bars(n, seed):
    "n images of an upright bar on 28×28, in grey: higher than wide, as letters are."
    rng, x = np.random.default_rng(seed), np.zeros((n, 28, 28), np.float32)
    column = rng.integers(2, 26, n)
    x[np.arange(n), 5:23, column] = rng.uniform(0.6, 1, (n, 18))
    return x


def one_hot(y, n):
    return (np.arange(n)[:, None] == y).astype(np.uint8)


@pytest.fixture(scope="module")
def letters():
    "Images and alphabets of a made-up chardata.mat."
    return dict(
        x=bars(24_345, 0),
        y=np.sort(np.arange(24_345) % 50),
        x_test=bars(8_070, 1),
        y_test=np.arange(8_070) % 50,
    )


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1)], ids=["by_row", "by_column"])
def test_omniglot(folder, letters, axes):
    x, x_test = (letters[k].transpose(axes).reshape(-1, 784).T for k in ("x", "x_test"))
    folder.mkdir()
    path = folder / formats.CHARDATA
    savemat(
        path,
        dict(
            data=x,
            target=one_hot(letters["y"], 50),
            testdata=x_test,
            testtarget=one_hot(letters["y_test"], 50),
            targetchar=0,
        ),
    )
    d = catalogue.load_data("omniglot", split_seed=1)
    assert [len(x) for x in (d.x_train, d.x_val, d.x_test)] == [23_128, 1_217, 8_070] and d.x_shape == (
        28,
        28,
    )
    assert (d.name, d.likelihood, d.dynamic) == ("omniglot", "bernoulli", True) and d.sha256 == {
        path.name: data.sha256(path.read_bytes())
    }
    assert np.array_equal(d.x_test, letters["x_test"]) and np.array_equal(d.y_test, letters["y_test"])
    order = np.random.RandomState(123).permutation(24_345)
    for split, rows in dict(train=order[:-1_217], val=order[-1_217:]).items():
        assert np.array_equal(getattr(d, f"x_{split}"), letters["x"][rows]) and np.array_equal(
            getattr(d, f"y_{split}"), letters["y"][rows]
        )
    assert d.x_train.is_contiguous() and len(d.y_val.unique()) == 50  # every alphabet is validated


def silhouettes(columns=784):
    rng = np.random.default_rng(0)
    sizes = dict(train=4_100, val=2_264, test=2_307)
    return (
        {f"{s}_data": rng.integers(0, 2, (n, columns), dtype=np.uint8) for s, n in sizes.items()}
        | {f"{s}_labels": rng.integers(1, 102, (n, 1), dtype=np.uint8) for s, n in sizes.items()}
        | dict(classnames=np.array(["Face", "Chair"], dtype=object))
    )


def test_caltech101(folder):
    folder.mkdir()
    content = silhouettes()
    savemat(folder / formats.SILHOUETTES, content, do_compression=True)
    d = catalogue.load_data("caltech101")
    assert (d.name, d.likelihood, d.dynamic, d.x_shape) == (
        "caltech101",
        "bernoulli",
        False,
        (28, 28),
    ) and list(d.sha256) == [formats.SILHOUETTES]
    for s in data.SPLITS:
        x, y = getattr(d, f"x_{s}"), getattr(d, f"y_{s}")
        assert np.array_equal(x.mT.flatten(1), 1 - content[f"{s}_data"]) and np.array_equal(
            y, content[f"{s}_labels"][:, 0] - 1
        )
        assert d.fixed(s) is x or d.fixed(s).equal(x)


def test_another_mat_file_says_what_it_holds(folder):
    folder.mkdir()
    savemat(folder / formats.SILHOUETTES, silhouettes(256))  # those of 16×16
    with pytest.raises(
        ValueError,
        match=r"damaged or another file: it holds .*train_data \(4100, 256\).*"
        r"expected .*train_data \(4100, 784\)",
    ):
        catalogue.load_data("caltech101")
    shutil.copy(folder / formats.SILHOUETTES, folder / formats.CHARDATA)
    with pytest.raises(ValueError, match=r"it holds .*val_data.*expected data \(784, 24345\), target"):
        catalogue.load_data("omniglot")


def test_damaged_mat_file_is_named(folder):
    folder.mkdir()
    path = folder / formats.SILHOUETTES
    savemat(path, silhouettes(), do_compression=True)
    raw = path.read_bytes()
    cuts = [raw[:n] for n in (0, 1, 100, 128, 200, len(raw) // 2, len(raw) - 1)]
    for damaged in [
        *cuts,
        raw[:200] + b"\xff" * 100 + raw[300:],
        bytes(len(raw)),
        b"\x89HDF\r\n\x1a\n" + raw,
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path.name} is damaged or another file"):
            catalogue.load_data("caltech101")


@pytest.fixture(scope="module")
def batches():
    "Records of CIFAR-10 by name of their file; a first pixel tells the number, the next value the plane."
    x = np.zeros((6, 10_000, formats.RECORD), np.uint8)
    i = np.arange(60_000).reshape(6, 10_000)
    x[..., 0], x[..., 1], x[..., 2] = i % 10, i % 256, i // 256
    for plane in range(3):
        x[..., 4 + 1024 * plane], x[..., 1 + 32 + 1024 * plane] = 50 + plane, 100 + plane
    return {name: x[k].tobytes() for k, name in enumerate(formats.BATCHES)}


def check_cifar10(arrays):
    assert {k: v.shape for k, v in arrays.items() if k[0] == "x"} == dict(
        x_train=(45_000, 3, 32, 32), x_val=(5_000, 3, 32, 32), x_test=(10_000, 3, 32, 32)
    )
    x, y = (np.concatenate([arrays[f"{a}_{s}"] for s in data.SPLITS]) for a in "xy")
    assert np.array_equal(
        x[:, 0, 0, 0] + 256 * x[:, 0, 0, 1].astype(int), np.arange(60_000)
    ) and np.array_equal(y, np.arange(60_000) % 10)
    assert x[7, :, 0, 3].tolist() == [50, 51, 52] and x[7, :, 1, 0].tolist() == [100, 101, 102]


@pytest.mark.parametrize("place", ["", "cifar-10-batches-bin"])
def test_cifar10_from_its_batches(folder, batches, place):
    (folder / place).mkdir(parents=True)
    for name, raw in batches.items():
        (folder / place / name).write_bytes(raw)
    arrays, hashes = formats.read_cifar10()
    check_cifar10(arrays)
    assert hashes == {name: data.sha256(raw) for name, raw in batches.items()}
    (folder / place / formats.BATCHES[2]).unlink()
    with pytest.raises(
        FileNotFoundError, match="data_batch_3.bin not in .* put the missing there too, or the whole archive"
    ):
        formats.read_cifar10()
    (folder / place / formats.BATCHES[2]).write_bytes(raw[:-1])
    with pytest.raises(
        ValueError, match="data_batch_3.bin is damaged or another file: it has 30,729,999 bytes"
    ):
        formats.read_cifar10()


def test_cifar10_from_its_archive(folder, batches):
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w:gz", compresslevel=1) as tar:
        for name in reversed(formats.BATCHES):  # in any order
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(batches[name])
            tar.addfile(info, io.BytesIO(batches[name]))
    folder.mkdir()
    path = folder / formats.CIFAR10
    path.write_bytes(out.getvalue())
    d = catalogue.load_data("cifar10")
    assert (d.name, d.likelihood, d.dynamic, d.x_shape) == (
        "cifar10",
        "discretized_logistic",
        False,
        (3, 32, 32),
    )
    assert d.sha256 == {path.name: data.sha256(out.getvalue())} and d.x_train.is_contiguous()
    check_cifar10(
        {
            k: (v + 0.5).mul_(255).round_().byte().numpy() if k[0] == "x" else v.numpy()
            for k, v in vars(d).items()
            if k[:2] in ("x_", "y_")
        }
    )
    path.write_bytes(out.getvalue()[:-100])
    with pytest.raises(ValueError, match="cifar-10-binary.tar.gz is damaged or another file"):
        catalogue.load_data("cifar10")


def test_colour_arrays_with_channels_last_are_turned(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.savez(
        tmp_path / "lossy.npz",
        x_train=x,
        y_train=np.arange(30, dtype=np.uint8),
        x_test=x[:5],
        y_test=np.arange(5, dtype=np.uint8),
    )
    d = catalogue.load_data(tmp_path / "lossy.npz")
    assert (d.name, d.likelihood, d.x_shape) == (
        "lossy",
        "discretized_logistic",
        (3, 32, 32),
    ) and d.x_train.is_contiguous()
    assert d.x_test.equal(torch.from_numpy(x[:5].transpose(0, 3, 1, 2).astype(np.float32)).div(255).sub(0.5))


# Folders of images --------------------


@pytest.fixture
def pictures(tmp_path):
    "30 random grey images of 6×5, as .png, .jpg and .bmp, in folders of three classes; and what adds one."
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)

    def add(name, image=None, **kw):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 256, (5, 6), dtype=np.uint8) if image is None else image
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(folder / name, **kw)

    for i in range(30):
        add(f"{'cat dog emu'.split()[i % 3]}/{i:02}.{'png JPG jpeg bmp'.split()[i % 4]}")
    return folder, add


def test_folder(pictures, capfd):
    folder, _ = pictures
    d = catalogue.load_data(f"{folder}/", split_seed=3)
    assert (d.name, d.likelihood, d.dynamic, d.x_shape) == ("pictures", "discretized_logistic", False, (5, 6))
    assert [len(x) for x in (d.x_train, d.x_val, d.x_test)] == [24, 3, 3] and list(d.sha256) == ["pictures"]
    assert torch.cat([d.y_train, d.y_val, d.y_test]).bincount().tolist() == [10] * 3
    again = catalogue.load_data(folder, split_seed=3)
    assert (
        again.x_train.equal(d.x_train)
        and again.sha256 == d.sha256
        and not catalogue.load_data(folder, split_seed=4).x_train.equal(d.x_train)
    )
    assert capfd.readouterr() == ("", "")  # nothing to wait for, no bar


def test_the_sum_of_a_folder_is_of_names_and_contents(pictures):
    folder, _ = pictures

    def digest():
        return formats.read_folder(folder)[1]["pictures"]

    first = digest()
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden").mkdir()
    shutil.copy(folder / "cat" / "00.png", folder / ".hidden" / "00.png")
    (folder / "cat" / "._00.png").write_bytes(b"a Mac wrote this")
    assert digest() == first  # neither is read
    (folder / "cat" / "00.png").rename(folder / "cat" / "000.png")
    renamed = digest()
    with open(folder / "cat" / "12.png", "ab") as f:
        f.write(b"\0")
    assert len({first, renamed, digest()}) == 3


def test_folder_of_folders_in_any_order_of_creation(pictures, tmp_path):
    folder, _ = pictures
    other = tmp_path / "copy" / "pictures"
    for f in reversed(sorted(folder.rglob("*.*"))):
        (other / f.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(f, other / f.parent.name)
    assert (
        catalogue.load_data(other).x_train.equal(catalogue.load_data(folder).x_train)
        and catalogue.load_data(other).sha256 == catalogue.load_data(folder).sha256
    )


def test_modes(pictures):
    folder, add = pictures
    rgb = np.random.default_rng(1).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    shutil.rmtree(folder)
    add("0.png", rgb)
    add("1.png", np.dstack([rgb, np.full_like(rgb[..., 0], 255)]))
    add("2.png", rgb[..., 0])
    add("3.bmp", Image.fromarray(rgb))
    add("4.png", Image.fromarray(rgb).quantize(256))
    add("5.png", Image.fromarray(rgb[..., 0]).convert("LA"))
    x = formats.read_folder(folder)[0]["x_train"]
    assert x.shape == (6, 3, 5, 6) and x.dtype == np.uint8 and x.flags.c_contiguous
    for i in (0, 1, 3):
        assert np.array_equal(x[i], rgb.transpose(2, 0, 1))
    for i in (2, 5):
        assert np.array_equal(x[i], np.stack([rgb[..., 0]] * 3))  # grey among colours
    assert abs(x[4].astype(int) - x[0]).max() < 40  # by a palette


def test_a_rotated_photograph_is_turned(pictures):
    folder, add = pictures
    shutil.rmtree(folder)
    image, exif = Image.fromarray(np.tile(np.arange(0, 240, 8, dtype=np.uint8), (20, 1))), Image.Exif()
    exif[0x0112] = 6  # "the top row is the right-hand side"
    add("0.jpg", image, exif=exif)
    x = formats.read_folder(folder)[0]["x_train"][0]
    assert x.shape == (30, 20) and x[0].mean() < 20 and x[-1].mean() > 200


@pytest.mark.parametrize(
    "image",
    [
        Image.new("1", (4, 4), 1),
        Image.fromarray(255 * np.eye(4, dtype=np.uint8)),
        Image.fromarray(np.eye(4, dtype=np.uint8)),
    ],
    ids=["mode_1", "0_255", "0_1"],
)
def test_black_and_white_is_binary(pictures, image):
    folder, add = pictures
    shutil.rmtree(folder)
    for i in range(10):
        add(f"{i}.png", image)
    d = catalogue.load_data(folder)
    assert (d.likelihood, d.dynamic, d.y_train) == ("bernoulli", False, None) and d.x_train[0].equal(
        torch.from_numpy(np.asarray(image).astype(np.float32)).gt(0).float()
    )


def test_one_sub_folder_is_no_class(pictures):
    folder, _ = pictures
    for name in ("cat", "dog"):
        shutil.rmtree(folder / name)
    assert catalogue.load_data(folder).y_train is None


def test_splits_by_folders(pictures):
    folder, add = pictures
    for f in sorted(folder.rglob("*.*")):
        (folder / "train" / f.parent.name).mkdir(parents=True, exist_ok=True)
        f.rename(folder / "train" / f.parent.name / f.name)
    for name in ("cat", "dog", "emu"):
        (folder / name).rmdir()
    add("test/emu/0.png")
    add("test/fox/0.png")
    d = catalogue.load_data(folder)
    assert [len(x) for x in (d.x_train, d.x_val, d.x_test)] == [27, 3, 2] and d.y_test.tolist() == [
        2,
        3,
    ]  # classes of all splits
    add("validation/cat/0.png")
    with pytest.raises(ValueError, match="has a folder train, .* 1 do not: validation/cat/0.png"):
        catalogue.load_data(folder)


def test_every_cut_of_an_image_is_read_or_named(pictures):
    folder, _ = pictures
    for path in sorted((folder / "cat").iterdir())[:4]:  # one of each kind
        raw = path.read_bytes()
        for n in range(0, len(raw), max(1, len(raw) // 15)):
            path.write_bytes(raw[:n])
            try:
                formats.read_folder(folder)
            except ValueError as e:
                assert f"1 of 30 images in {folder} cannot be read: cat/{path.name}" in str(
                    e
                ) or "are not 6×5" in str(e)
        path.write_bytes(raw)


def test_the_odd_ones_are_counted_and_some_named(pictures):
    folder, add = pictures
    for i in range(5):
        add(f"dog/odd{i}.png", np.zeros((6, 5), np.uint8))
    with pytest.raises(
        ValueError,
        match=r"5 of 35 images in .* are not 6×5 \(width×height\) like the other 30: "
        r"dog/odd0.png \(5×6\), dog/odd1.png \(5×6\), dog/odd2.png \(5×6\) and 2 more",
    ):
        catalogue.load_data(folder)


def test_an_image_that_may_not_be_read(pictures, monkeypatch):
    folder, _ = pictures
    read = Path.read_bytes

    def refuse(self):
        if self.name == "00.png":
            raise PermissionError(13, "Permission denied")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        ValueError, match="1 of 30 images in .* cannot be read: cat/00.png .*Permission denied"
    ):
        catalogue.load_data(folder)


def test_a_long_reading_shows_a_bar(pictures, monkeypatch, capfd):
    folder, _ = pictures
    decoded = formats._decoded
    monkeypatch.setattr(formats, "_decoded", lambda raw: time.sleep(0.1) or decoded(raw))
    formats.read_folder(folder)
    assert "pictures" in capfd.readouterr().err


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no images .* among its 0 files"):
        catalogue.load_data(tmp_path)


def test_here_is_a_folder_with_a_name(pictures, monkeypatch):
    folder, _ = pictures
    monkeypatch.chdir(folder)
    assert (
        catalogue.load_data(".").name == catalogue.dataset_name(".") == "pictures"
        and catalogue.load_data("cat").name == "cat"
        and catalogue.is_source("cat")
    )
    with pytest.raises(ValueError, match="unknown dataset ''; expected"):
        catalogue.load_data("")


def linked(folder, name, to):
    "Move a sub-folder to another place, and leave a link."
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / name, to)
    (folder / name).symlink_to(to)


def test_links_to_folders_and_files_are_followed(pictures, tmp_path):
    "A folder of links has the images, classes and sums of what it links to."
    folder, _ = pictures
    before = catalogue.load_data(folder)
    linked(folder, "dog", tmp_path / "elsewhere" / "dog")
    linked(folder / "cat", "00.png", tmp_path / "elsewhere" / "00.png")
    after = catalogue.load_data(folder)
    assert (
        after.x_train.equal(before.x_train)
        and after.y_train.equal(before.y_train)
        and after.sha256 == before.sha256
    )


def test_a_linked_split_is_that_split(pictures, tmp_path):
    folder, add = pictures
    for name in ("cat", "dog", "emu"):
        (folder / "train").mkdir(exist_ok=True)
        (folder / name).rename(folder / "train" / name)
    for i in range(4):
        add(f"test/cat/{i}.png")
    linked(folder, "test", tmp_path / "elsewhere")
    assert [len(x) for x in (lambda d: (d.x_train, d.x_val, d.x_test))(catalogue.load_data(folder))] == [
        27,
        3,
        4,
    ]


def test_circles_of_links_end_and_hidden_things_stay_hidden(pictures, tmp_path):
    folder, _ = pictures
    for link, to in {
        "cat/self": folder / "cat",
        "cat/top": folder,
        "cat/above": tmp_path,
        "dog/.hidden": folder / "cat",
    }.items():
        (folder / link).symlink_to(to)
    (folder / "dog" / "cat").symlink_to(folder / "cat")  # no circle: the same pictures in another class
    assert len(formats.read_folder(folder)[0]["x_train"]) == 40
    (folder / "emu" / "round.png").symlink_to("round.png")
    with pytest.raises(ValueError, match="round.png is a link to round.png, which leads nowhere"):
        formats.read_folder(folder)


def test_files_that_are_left_out_are_counted(pictures, recwarn):
    folder, add = pictures
    catalogue.load_data(folder)
    assert not recwarn.list
    for i in range(3):
        add(f"cat/{i}.webp")
        add(f"dog/{i}.tif")
    (folder / "README").touch()
    (folder / ".DS_Store").touch()
    with pytest.warns(
        UserWarning,
        match="3 .tif, 3 .webp, 1 without an ending left out, since only .png, .jpg, .jpeg, .bmp are read",
    ):
        x = formats.read_folder(folder)[0]["x_train"]
    assert len(x) == 30


# Data in memory --------------------

X, Y = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32), np.arange(40) % 2


class Listed(TorchDataset):
    "A torch Dataset of the given items."

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.parametrize(
    "given",
    [
        pd.DataFrame(X, columns=[*"abc"]),
        csr_matrix(X),
        csr_array(X),
        torch.from_numpy(X).to_sparse(),
        Listed([*X]),
        TensorDataset(torch.from_numpy(X)),
        dict(x=pd.DataFrame(X)),
        dict(x=csr_matrix(X)),
        X.tolist(),
    ],
    ids=[
        "frame",
        "sparse",
        "sparse_array",
        "sparse_tensor",
        "dataset",
        "tensors",
        "frame_by_name",
        "sparse_by_name",
        "lists",
    ],
)
def test_every_form_of_the_same_numbers_is_the_same_data(given):
    d, same = catalogue.load_data(given), catalogue.load_data(X)
    assert (
        d.x_train.equal(same.x_train)
        and d.x_test.equal(same.x_test)
        and d.y_train is None
        and d.likelihood == "gaussian"
    )


@pytest.mark.parametrize(
    "given",
    [
        TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)),
        Listed([*zip(X, Y)]),
        Listed([*zip(X.tolist(), Y.tolist())]),
        dict(x=pd.DataFrame(X), y=pd.Series(Y)),
    ],
    ids=["tensors", "pairs", "lists", "series"],
)
def test_labels_that_come_with_the_examples(given):
    d, same = catalogue.load_data(given), catalogue.load_data(dict(x=X, y=Y))
    assert d.x_val.equal(same.x_val) and d.y_val.equal(same.y_val)


def test_a_dataset_of_pictures_as_torchvision_gives_them():
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 5, 3), dtype=np.uint8)
    d = catalogue.load_data(Listed([(Image.fromarray(x), i % 3) for i, x in enumerate(images)]))
    assert (
        d.likelihood == "discretized_logistic"
        and d.x_shape == (3, 4, 5)
        and d.x_val.equal(catalogue.load_data(images).x_val)
    )


def test_a_table_of_several_types():
    frame = pd.DataFrame(
        dict(a=pd.array([*range(20)], "Int64"), b=[True, False] * 10, c=np.linspace(0, 1, 20))
    )
    assert data.as_named_arrays(frame)[0]["x"].dtype == float and data.as_named_arrays(frame)[0]["x"][
        3
    ].tolist() == pytest.approx([3, 0, 3 / 19])
    with pytest.raises(ValueError, match="columns d, e hold no numbers: leave them out"):
        catalogue.load_data(frame.assign(d="x", e=pd.Timestamp(0)))
    frame.loc[3, "a"] = pd.NA
    with pytest.raises(ValueError, match="x_train, row 4, column .a. holds nothing"):
        catalogue.load_data(dict(x_train=frame, x_val=frame[5:], x_test=frame[5:]))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(X)


@pytest.mark.parametrize(
    "given, says",
    [
        (None, "data of type builtins.NoneType"),
        (3, "data of type builtins.int"),
        (iter(X), "expected an array, a tensor"),
        (Endless(), "Endless; .* a torch Dataset that has a length"),
        (DataLoader(TensorDataset(torch.from_numpy(X))), "DataLoader; .* a torch Dataset"),
        (catalogue.load_data("digits"), "csrae_nb.data.Dataset; expected"),
        (Listed([dict(x=x) for x in X]), "items of the Listed are dict, expected x or pairs"),
        (Listed([(x, 0, 0) for x in X]), "items of the Listed are 3, expected"),
        (Listed([X[0], X[0, :2]]), "items of the Listed are not alike"),
        (Listed([]), "no x_train"),
        (csr_matrix((10**8, 10**8)), "GiB with its zeros, .* GiB are free"),
        (dict(x=csr_matrix((10**8, 10**8))), "GiB with its zeros"),
    ],
)
def test_what_is_no_data_is_refused_by_its_type(given, says):
    with pytest.raises(ValueError, match=says):
        catalogue.load_data(given)


def test_a_file_of_one_array_is_as_long_as_it_says(tmp_path):
    np.save(tmp_path / "a.npy", X)
    raw = (tmp_path / "a.npy").read_bytes()
    for damaged in (raw.replace(b"(40, 3)", b"(10, 3)"), raw + b"\0", raw[:-1]):
        (tmp_path / "a.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match="a.npy does not hold plain arrays"):
            catalogue.load_data(tmp_path / "a.npy")


@pytest.mark.parametrize("read", [results.read_rows, sweeps.rows_there])
def test_tables_of_results_as_excel_saves_them(tmp_path, read):
    "With a byte-order mark; in Latin-1 they are refused by name."
    text, path = (
        (Path(__file__).parents[1] / "results" / "table1_short.csv").read_text(encoding="utf-8"),
        tmp_path / "table.csv",
    )
    before = read(Path(__file__).parents[1] / "results" / "table1_short.csv")
    path.write_text(text.replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    assert before and read(path) == before
    path.write_text(text + "caf\u00e9", encoding="latin-1")
    with pytest.raises(ValueError, match="table.csv is not UTF-8 .* save it as UTF-8"):
        read(path)


def test_a_grid_with_a_byte_order_mark_is_read(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text('[[grid]]\ndataset = "digits"\nseed = [0, 1]\n', encoding="utf-8-sig")
    assert len(read_words([str(file)])) == 2
    file.write_text('[[grid]]\ndataset = "caf\u00e9"\n', encoding="latin-1")
    with pytest.raises(ValueError, match="grid.toml is not UTF-8 .* save it as UTF-8"):
        read_words([str(file)])


# The real files, where there are any --------------------


def needs(name):
    return pytest.mark.skipif(not (REAL and formats.find_file(name)), reason=f"no {name} in CSRAE_DATA")


@pytest.fixture
def real(monkeypatch):
    monkeypatch.setenv("CSRAE_DATA", REAL)


@needs("train-images-idx3-ubyte")
def test_mnist(real, recwarn):
    start = time.perf_counter()
    d = catalogue.load_data("mnist")
    took = time.perf_counter() - start
    assert [len(x) for x in (d.x_train, d.x_val, d.x_test)] == [45_000, 5_000, 10_000] and d.x_shape == (
        28,
        28,
    )
    assert (d.likelihood, d.dynamic, len(d.sha256)) == ("bernoulli", True, 4) and not recwarn.list
    assert d.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4] and d.y_test[:5].tolist() == [
        7,
        2,
        1,
        0,
        4,
    ]
    assert (
        abs(float(torch.cat([d.x_train, d.x_val]).mean()) - 0.1307) < 5e-4
    )  # the mean that everybody normalises by
    assert d.fixed("test").equal(catalogue.load_data("mnist").fixed("test")) and took < 60


@needs("train-images-idx3-ubyte")
def test_mnist_by_another_likelihood(real):
    d = catalogue.load_data("mnist", likelihood="discretized_logistic")
    assert (d.dynamic, float(d.x_train.min()), float(d.x_train.max())) == (False, -0.5, 0.5)


@needs(f"{formats.FASHION}train-images-idx3-ubyte")
def test_fashion_mnist(real):
    d = catalogue.load_data("fashion_mnist")
    assert [len(x) for x in (d.x_train, d.x_val, d.x_test)] == [45_000, 5_000, 10_000]
    assert (d.name, d.x_shape, d.dynamic, len(d.sha256)) == ("fashion_mnist", (28, 28), True, 4)
    everyone = torch.cat([d.y_train, d.y_val, d.y_test]).bincount()
    assert everyone.min() > 5_300 and d.y_test.bincount().tolist() == [1_000] * 10
    assert abs(float(torch.cat([d.x_train, d.x_val]).mean()) - 0.2860) < 1e-3  # its mean, as often published
    assert not torch.equal(d.x_test, catalogue.load_data("mnist").x_test)


@needs("binarized_mnist_train.amat")
def test_static_mnist(real, recwarn):
    d = catalogue.load_data("static_mnist")
    assert [len(x) for x in (d.x_train, d.x_val, d.x_test)] == [45_000, 5_000, 10_000] and d.x_shape == (
        28,
        28,
    )
    assert (d.likelihood, d.dynamic, d.y_test) == ("bernoulli", False, None) and not recwarn.list
    assert d.x_train.unique().tolist() == [0, 1] and d.fixed("val").equal(d.x_val)


@needs("binarized_mnist_test.amat")
def test_the_quick_and_the_general_amat_reader_agree(real):
    raw = formats.find_file("binarized_mnist_test.amat").read_bytes()[: 2 * 784 * 200]
    assert np.array_equal(formats.read_amat(raw), formats.read_amat(raw.replace(b"\n", b"  \r\n")))


@needs("chardata.mat")
def test_real_omniglot(real, tmp_path, monkeypatch, recwarn):
    d = catalogue.load_data("omniglot")
    assert [len(x) for x in (d.x_train, d.x_val, d.x_test)] == [23_128, 1_217, 8_070] and (
        d.likelihood,
        d.dynamic,
    ) == ("bernoulli", True)
    assert all(len(y.unique()) == 50 for y in (d.y_train, d.y_val, d.y_test)) and not recwarn.list
    m = loadmat(formats.find_file(formats.CHARDATA))
    turned = {
        k: m[k].T.reshape(-1, 28, 28).transpose(0, 2, 1).reshape(-1, 784).T
        if k in ("data", "testdata")
        else m[k]
        for k in formats.FILES[formats.CHARDATA].shape
    }
    for k, v in formats._omniglot_split(turned).items():
        assert np.array_equal(v, getattr(d, k)), k  # stored either way, read the same


@needs("caltech101_silhouettes_28_split1.mat")
def test_real_caltech101(real, recwarn):
    d = catalogue.load_data("caltech101")
    assert [len(x) for x in (d.x_train, d.x_val, d.x_test)] == [4_100, 2_264, 2_307] and (
        d.likelihood,
        d.dynamic,
    ) == ("bernoulli", False)
    assert (
        all(y.unique().tolist() == list(range(101)) for y in (d.y_train, d.y_val, d.y_test))
        and not recwarn.list
    )
    corners = d.x_train[:, ::27, ::27].mean()
    assert corners < 0.3 < 0.6 < d.x_train[:, 10:18, 10:18].mean()  # the object is in the middle, and it is 1


@needs(formats.BATCHES[0])
@needs(formats.BATCHES[5])
def test_real_cifar10(real):
    d = catalogue.load_data("cifar10")
    assert (
        d.x_shape == (3, 32, 32)
        and torch.cat([d.y_train, d.y_val]).bincount().tolist() == [5_000] * 10
        and d.y_test.bincount().tolist() == [1_000] * 10
    )
    mean = (
        torch.cat([d.x_train, d.x_val]).mean((0, 2, 3)) + 0.5
    ).tolist()  # the means that everybody normalises by
    assert mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)


def test_what_is_transparent_is_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 255))
    for mode in ("RGBA", "LA"):
        image.convert(mode).save(tmp_path / "icon.png")
        _, x = formats.folder_images(tmp_path / "icon.png")
        assert (x == 0).sum() == (3 if mode == "RGBA" else 1) and (x == 255).sum() == x.size - (x == 0).sum()


def test_labels_of_a_csv_are_stripped_and_its_signs_are_explained(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("a, ok, y\n1, True, u\n4, false,v\n2, TRUE , v\n")
    arrays, names = formats.read_csv(table)
    assert names == ("a", "ok") and arrays["x"].tolist() == [[1, 1], [4, 0], [2, 1]]
    assert arrays["y"].tolist() == ["u", "v", "v"]
    table.write_text("a;b\n0,5;0,1\n")
    with pytest.raises(ValueError, match="parted by ';'; expected commas"):
        formats.read_csv(table)


def test_a_data_set_of_ours_keeps_its_name():
    with pytest.raises(ValueError, match="'mnist' is there already"):
        catalogue.add_arrays("mnist", lambda: ({}, {}), "gaussian")


@pytest.mark.parametrize("given", [np.zeros((50, 3)), [[1.0, 2.0]], pd.DataFrame(dict(a=[1.0]))])
def test_arrays_without_names_are_told(given, shapes_unchecked):
    with pytest.raises(ValueError, match=r"expected arrays by name, dict\(x=…, y=…\)"):
        data.from_arrays(given)
