"What was measured is read from the run's own folder, once, and a damaged file is said to be damaged."

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from csrae_nb import evaluation, fit, sweeps
from csrae_nb.catalogue import load_data
from csrae_nb.config import Config
from csrae_nb.evaluation import _row_key, finished_metrics, measure, read_metrics, results_table
from csrae_nb.kernels import NotEnoughMemory
from csrae_nb.models import MODELS, MixtureVAE

from small_runs import ROWS, TINY

CFG = Config(**TINY | dict(epochs=1, warmup=0, ll_samples=2, expost_components=3))
ARRAYS = dict(x=ROWS)


def measured(folder=None):
    run = fit(CFG, ARRAYS, folder=folder, progress=False)
    return run, measure(run, load_data(ARRAYS), progress=False)


def test_a_run_elsewhere_is_measured_once_and_by_its_own_file(own_runs, tmp_path, monkeypatch):
    here, _ = measured()
    of_here = json.loads((here.path / "metrics.json").read_text())
    of_here["metrics"]["reconstruction"] = -12345.0
    (here.path / "metrics.json").write_text(json.dumps(of_here))
    there, metrics = measured(tmp_path / "there")
    assert metrics["reconstruction"] > 0 and read_metrics(there.path)["metrics"] == metrics
    monkeypatch.setattr(evaluation, "evaluate", None)
    assert measured(tmp_path / "there")[1] == metrics


@pytest.mark.parametrize("text", ["", '{"config": {}', "null", "[]", '{"config": null, "metrics": 1}'])
def test_a_damaged_file_is_named_and_measured_anew(own_runs, text):
    run, metrics = measured()
    (run.path / "metrics.json").write_text(text)
    assert finished_metrics(run.cfg) is None
    for read in (read_metrics, lambda path: results_table([path])):
        with pytest.raises(ValueError, match=r"metrics\.json is damaged.*remove it"):
            read(run.path)
    again = measured()[1]
    assert again["reconstruction"] == pytest.approx(metrics["reconstruction"])


def test_a_run_counts_once_in_a_table(own_runs, tmp_path):
    run, _ = measured()
    copy = shutil.copytree(run.path, tmp_path / "copy")
    with pytest.raises(ValueError, match="hold the same run, seed 0"):
        results_table([run.path, copy])
    assert results_table([copy])[0]["seeds"] == "0"


def test_without_memory_for_a_refitted_prior_the_rest_is_measured(own_runs, monkeypatch):
    def refuse(*args, **kw):
        raise NotEnoughMemory("too little")

    monkeypatch.setattr("csrae_nb.priors.Prior.refit", refuse)
    with pytest.warns(UserWarning, match="no samples_refit: too little"):
        _, metrics = measured()
    assert metrics["log_prior"] < 0 and metrics.get("log_prior_refit") is None


def test_a_model_of_ones_own_has_its_draws_in_the_table():
    MODELS.add(
        "Own",
        type("Own", (MixtureVAE,), {}),
        weight="beta",
        prior="mog",
        options=dict(kl_samples="kl_samples"),
    )
    try:
        one, eight = (_row_key(replace(CFG, model="Own", kl_samples=n)) for n in (1, 8))
    finally:
        del MODELS["Own"]
    assert one != eight and {one["samples"], eight["samples"]} == {1, 8}


SCRIPT = """
from csrae_nb.catalogue import load_data
from csrae_nb.metrics import _checksum, train_classifier
print(_checksum(train_classifier(load_data("digits"), 1000, progress=False)))
"""
PLAIN = dict(ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE", DNNL_MAX_CPU_ISA="SSE41")


def test_a_classifier_is_the_same_on_an_older_processor():
    "In single precision its weights differ, and in the end distances by a fifth."
    said = [
        subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=os.environ | more)
        for more in ({}, PLAIN)
    ]
    assert said[0].stdout and said[0].stdout == said[1].stdout, said[1].stderr


def test_a_finished_run_whose_folder_cannot_be_read_any_more_is_refused(own_runs, tmp_path):
    "A table with an error in it now ended well, with the numbers of before; data that are gone do."
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(30):
        Image.fromarray(np.full((8, 8), 8 * k, np.uint8)).save(pictures / f"{k}.png")
    cfg = replace(CFG, dataset=str(pictures), network="mlp", batch_size=10, fid_layer=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = evaluation.complete_run(cfg, progress=False)
    (pictures / "3.png").write_bytes(b"no picture")
    (pictures / "4.png").unlink()
    for again in (evaluation.complete_run, lambda c, progress: sweeps.check_data([c])):
        with pytest.raises(ValueError, match=r"3\.png"):
            again(cfg, progress=False)
    shutil.rmtree(pictures)
    with pytest.warns(UserWarning, match="is finished; whether its data are the same now is not known"):
        assert evaluation.complete_run(cfg, progress=False) == metrics


def test_a_run_is_measured_on_its_own_data_alone(own_runs):
    "It gave the numbers in its folder, or held answers of its own against those of others."
    run, metrics = measured()
    other = load_data(dict(x=1 - ROWS))
    for of in (measure, evaluation.evaluate):
        with pytest.raises(ValueError, match="arrays holds other data than .*; give the arrays of its train"):
            of(run, other, progress=False)
    named = replace(run, cfg=replace(run.cfg, dataset="digits"))
    with pytest.raises(ValueError, match=r"give digits as it was then, prepare_data\(run\.cfg\)"):
        measure(named, other, progress=False)
    assert measure(run, load_data(ARRAYS), progress=False) == metrics
