"A type checker knows what people use: no errors in a script of ordinary use."

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def errors(file):
    "What basedpyright, which is pyright from PyPI with a node of its own, has against a script."
    words = [sys.executable, "-m", "basedpyright", "--level", "error", "--outputjson", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=HERE.parent)
    said = json.loads(done.stdout)["generalDiagnostics"]
    return [f"line {e['range']['start']['line'] + 1}: {e['message']}" for e in said]


def test_ordinary_use_has_no_errors():
    pytest.importorskip("basedpyright")
    assert errors(HERE / "ordinary_use.py") == []


def test_what_does_not_fit_is_an_error(tmp_path):
    pytest.importorskip("basedpyright")
    (tmp_path / "wrong.py").write_text("from csrae_nb import GMM, Config\nConfig(model=3)\nGMM.mixtur()\n")
    first, second = errors(tmp_path / "wrong.py")
    assert first.startswith("line 2") and second.startswith("line 3")
