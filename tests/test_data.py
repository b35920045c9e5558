"What the chapter on data cannot hold: downloads through a server on this machine, and the real MNIST where `CSRAE_DATA` has it."
import gzip
import http.server
import os
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from csrae_nb import data

NAME = "t10k-labels-idx1-ubyte"
CONTENT = struct.pack(">BBBBI", 0, 0, 8, 1, 6) + bytes(range(6))
ZIPPED = gzip.compress(CONTENT, mtime=0)
REAL = os.environ.get("CSRAE_DATA") # before the sandbox changes it


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty data folder, with NAME known as a public file of six labels."
    monkeypatch.setenv("CSRAE_DATA", str(tmp_path/"data"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    public = data.PublicFile((6,), data.sha256(CONTENT), ("http://127.0.0.1:9/none.gz",), data.sha256(ZIPPED))
    monkeypatch.setitem(data.FILES, NAME, public)
    return tmp_path/"data"


@pytest.fixture
def serve(monkeypatch, folder):
    "serve(a, b, ...): mirrors that answer with these bytes, or break off after half of them; gives the list of requests."
    servers, seen = [], []

    def start(*answers, length=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append(self.path)
                body = answers[int(self.path.split("/")[1])]
                if body is None: return self.send_error(404)
                self.send_response(200); self.send_header("Content-Length", str(length or len(body))); self.end_headers()
                self.wfile.write(body)
            def log_message(self, *args): pass
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server); threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = tuple(f"http://127.0.0.1:{server.server_port}/{i}/{NAME}.gz" for i in range(len(answers)))
        monkeypatch.setitem(data.FILES, NAME, replace(data.FILES[NAME], urls=urls))
        return seen
    yield start
    for server in servers: server.shutdown(); server.server_close()


def left(folder): return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_download_once(folder, serve):
    seen = serve(ZIPPED)
    for _ in range(2): # the second finds the file
        x, hashes = data.read_file(NAME)
        assert x.tolist() == list(range(6)) and hashes == {f"{NAME}.gz": data.sha256(ZIPPED)}
    assert len(seen) == 1 and left(folder) == [f"{NAME}.gz"]


@pytest.mark.parametrize("answer", [b"<html>garbage</html>", b"", ZIPPED[:-5], None], ids=["garbage", "empty", "cut", "404"])
def test_bad_download_leaves_the_cache_clean(folder, serve, answer):
    serve(answer)
    with pytest.raises(FileNotFoundError, match=f"{NAME} is not in .* and could not be downloaded"): data.read_file(NAME)
    assert left(folder) == []


def test_connection_that_breaks_off(folder, serve):
    serve(ZIPPED[:20], length=len(ZIPPED))
    with pytest.raises(FileNotFoundError, match="could not be downloaded"): data.read_file(NAME)
    assert left(folder) == []


def test_second_mirror(folder, serve):
    seen = serve(b"garbage", ZIPPED)
    assert data.read_file(NAME)[0].tolist() == list(range(6))
    assert len(seen) == 2 and left(folder) == [f"{NAME}.gz"]


def test_offline_says_which_file_from_where_and_where_to_put_it(folder):
    with pytest.raises(FileNotFoundError) as e: data.download(NAME)
    for part in (NAME, "http://127.0.0.1:9/none.gz", str(folder), "CSRAE_DATA"): assert part in str(e.value)


@pytest.mark.parametrize("place", ["", "MNIST/raw"])
@pytest.mark.parametrize("ending, raw", [("", CONTENT), (".gz", ZIPPED)])
def test_placed_by_hand(folder, place, ending, raw, recwarn):
    path = folder/place/(NAME + ending)
    path.parent.mkdir(parents=True); path.write_bytes(raw)
    x, hashes = data.read_file(NAME)
    assert x.tolist() == list(range(6)) and hashes == {path.name: data.sha256(raw)} and not recwarn.list


def test_zipped_anew_is_the_same_content(folder, recwarn):
    folder.mkdir(); (folder/f"{NAME}.gz").write_bytes(gzip.compress(CONTENT, 1, mtime=12345))
    assert data.read_file(NAME)[0].tolist() == list(range(6)) and not recwarn.list


def test_another_content_warns_and_is_recorded(folder):
    other = CONTENT[:-1] + b"\0"
    folder.mkdir(); (folder/NAME).write_bytes(other)
    with pytest.warns(UserWarning, match="differs from the public file"): x, hashes = data.read_file(NAME)
    assert x[-1] == 0 and hashes == {NAME: data.sha256(other)}


@pytest.mark.parametrize("cut", [1, 8, 9, len(ZIPPED)//2, len(ZIPPED) - 4])
def test_truncated_zip_is_named_and_kept(folder, cut):
    path = folder/f"{NAME}.gz"
    folder.mkdir(); path.write_bytes(ZIPPED[:-cut])
    with pytest.raises(ValueError, match=f"{NAME}.gz is damaged or another file: .* Delete it"): data.read_file(NAME)
    assert path.exists() # it is the user's: we say what to do, and do not do it


def test_flipped_bits_in_a_zip(folder):
    folder.mkdir()
    for i in range(10, len(ZIPPED)):
        (folder/f"{NAME}.gz").write_bytes(ZIPPED[:i] + bytes([ZIPPED[i] ^ 0xff]) + ZIPPED[i + 1:])
        with pytest.raises(ValueError, match="damaged or another file"): data.read_file(NAME)


def test_imports_without_pooch():
    code = ("import sys; sys.modules['pooch'] = sys.modules['requests'] = None; from csrae_nb.data import load_data; "
            "assert load_data('digits').x_shape == (8, 8)")
    subprocess.run([sys.executable, "-c", code], check=True)


# The real files, where there are any ------------------------------------------------------------------------------

def needs(name):
    return pytest.mark.skipif(not (REAL and data.find_file(name)), reason=f"no {name} in CSRAE_DATA")


@pytest.fixture
def real(monkeypatch): monkeypatch.setenv("CSRAE_DATA", REAL)


@needs("train-images-idx3-ubyte")
def test_mnist(real, recwarn):
    start = time.perf_counter(); d = data.load_data("mnist"); took = time.perf_counter() - start
    assert [len(x) for x in (d.x_train, d.x_val, d.x_test)] == [45_000, 5_000, 10_000] and d.x_shape == (28, 28)
    assert (d.likelihood, d.dynamic, len(d.sha256)) == ("bernoulli", True, 4) and not recwarn.list
    assert d.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4] and d.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    assert abs(float(torch.cat([d.x_train, d.x_val]).mean()) - 0.1307) < 5e-4 # the mean that everybody normalises by
    assert d.fixed("test").equal(data.load_data("mnist").fixed("test")) and took < 10


@needs("train-images-idx3-ubyte")
def test_mnist_by_another_likelihood(real):
    d = data.load_data("mnist", likelihood="discretized_logistic")
    assert (d.dynamic, float(d.x_train.min()), float(d.x_train.max())) == (False, -0.5, 0.5)


@needs("binarized_mnist_train.amat")
def test_static_mnist(real, recwarn):
    d = data.load_data("static_mnist")
    assert [len(x) for x in (d.x_train, d.x_val, d.x_test)] == [45_000, 5_000, 10_000] and d.x_shape == (28, 28)
    assert (d.likelihood, d.dynamic, d.y_test) == ("bernoulli", False, None) and not recwarn.list
    assert d.x_train.unique().tolist() == [0, 1] and d.fixed("val").equal(d.x_val)


@needs("binarized_mnist_test.amat")
def test_the_quick_and_the_general_amat_reader_agree(real):
    raw = data.find_file("binarized_mnist_test.amat").read_bytes()[:2*784*200]
    assert np.array_equal(data.read_amat(raw), data.read_amat(raw.replace(b"\n", b"  \r\n")))
