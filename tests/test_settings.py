"A run depends on its configuration alone, not on its folder or its process, whose settings it leaves alone."

import os
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from csrae_nb import CSRAEEmbedding, Pretrained, load_data, sweeps, verbs
from csrae_nb.evaluation import evaluate
from csrae_nb.fleet import fit_fleet
from csrae_nb.catalogue import ARRAYS, DATASETS
from csrae_nb.config import Config, make_config, resolve, run_name
from csrae_nb.files import RunLocked, run_lock
from csrae_nb.process import check_device, product_precision
from csrae_nb.runs import fit, load_run, prepare_data

SHORT = dict(epochs=2, warmup=1, kmeans_epoch=1, components=5, ll_samples=2, expost_components=3)
X = np.random.default_rng(0).random((80, 6), np.float32)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))


def arrays(**fields):
    return Config(dataset="arrays", network="pinwheel", latent_dim=2, batch_size=20, **SHORT, **fields)


def weights(run):
    return torch.cat([v.flatten() for v in run.model.state_dict().values()])


def test_a_finished_run_is_loaded_from_another_folder(tmp_path, monkeypatch):
    "A data set is a relative path, and whether it is there is nobody's question when a run is only loaded."
    from PIL import Image

    for i in range(12):
        (tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray((X[i * 4 : i * 4 + 4, :4] * 255).astype(np.uint8)).save(
            tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        )
    monkeypatch.chdir(tmp_path)
    run = fit(Config(dataset="photos", batch_size=4, **{**SHORT, "components": 2}), progress=False)
    Pretrained(run.path).save_pretrained(tmp_path / "model")
    monkeypatch.chdir("/")
    assert torch.equal(weights(load_run(run.path)), weights(run))
    assert torch.equal(weights(Pretrained.from_pretrained(tmp_path / "model").run), weights(run))
    with pytest.raises(ValueError, match="unknown dataset 'photos'; expected one of digits"):
        prepare_data(resolve(run.cfg))


@pytest.mark.parametrize(
    "told", [lambda: make_config(dict(dataset="")), lambda: load_data("mnits"), lambda: sweep("mnits")]
)
def test_whoever_names_no_data_is_told_every_kind_of_file_that_is_read(told, capsys):
    with pytest.raises((ValueError, SystemExit)) as e:
        told()
    said = f"{e.value}{capsys.readouterr().err}"
    assert all(word in said for word in (*ARRAYS, "folder of images", "labels.csv", "digits"))


def sweep(name):
    sweeps.main([f"dataset={name}", "epochs=1"])


def test_a_config_does_not_look_at_the_disk(monkeypatch):
    "But for whether a path leads to a folder, which may be one of a kind of its own."
    assert "mnist" in DATASETS  # plugins are loaded

    def looked(*args, **kw):
        raise AssertionError(f"it asked for {args}")

    for name in ("lstat", "scandir", "listdir", "open"):
        monkeypatch.setattr(os, name, looked)
    assert make_config(dict(dataset="photos", epochs=3)).dataset == "photos"
    monkeypatch.setattr(os, "stat", looked)
    for name in ("mnist", "arrays"):
        assert make_config(dict(dataset=name, epochs=3)).dataset == name


def test_a_config_of_videos_is_the_same_where_its_name_is_a_folder_of_pictures(tmp_path, monkeypatch):
    "What a folder holds is asked when its data are read."
    from PIL import Image

    fields = dict(dataset="clips", image_size=96, network="faces", labels=0.1)
    monkeypatch.chdir(tmp_path)
    elsewhere = resolve(make_config(fields))
    (tmp_path / "clips").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "clips" / "a.png")
    assert resolve(make_config(fields)) == elsewhere
    assert run_name(make_config(fields)) == run_name(elsewhere)
    with pytest.raises(ValueError, match="image_size=96 is for .*, a folder of videos .*, not for clips"):
        prepare_data(elsewhere)


@pytest.mark.parametrize("first, then", [("bf16", "no"), ("no", "bf16")])
def test_each_run_has_its_own_precision(first, then):
    alone = fit(arrays(precision=then, name="alone"), dict(x=X), progress=False)
    fit(arrays(precision=first, name="first"), dict(x=X), progress=False)
    assert torch.equal(
        weights(fit(arrays(precision=then, name="then"), dict(x=X), progress=False)), weights(alone)
    )


def test_accelerate_stays_as_the_user_set_it():
    mine = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
    try:
        CSRAEEmbedding(epochs=2, components=3).fit(X)
        CSRAEEmbedding(epochs=2, components=3, config=dict(precision="bf16")).fit(X).partial_fit(X)
        fit(arrays(name="a"), dict(x=X), progress=False)
        assert mine.mixed_precision == "bf16" and mine.gradient_accumulation_steps == 4
        assert mine.state.distributed_type is AcceleratorState().distributed_type
        mine.prepare(torch.nn.Linear(2, 2))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_nothing_of_accelerate_is_left_behind():
    fit(arrays(name="a", device="cpu"), dict(x=X), progress=False)
    assert not AcceleratorState._shared_state and not PartialState._shared_state


def settings():
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().tolist(),
    )


SETTINGS = {
    "double precision": lambda: torch.set_default_dtype(torch.float64),
    "another device": lambda: torch.set_default_device("meta"),
    "mixed precision": lambda: torch.set_autocast_enabled("cpu", True),
    "products in bfloat16": lambda: torch.set_float32_matmul_precision("medium"),
    "no gradients": lambda: torch.set_grad_enabled(False),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "threads": lambda: torch.set_num_threads(2),
    "random state": lambda: torch.manual_seed(7),
}


MATMUL = torch.backends.cuda.matmul
PRODUCTS = {  # how a caller may have said what products are to be
    "as newer versions say it": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "for everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "as older versions say it": lambda: setattr(MATMUL, "allow_tf32", True),
    "in a word": lambda: torch.set_float32_matmul_precision("medium"),
}


@pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_as_a_run_asks_and_then_as_the_caller_said(name):
    places = MATMUL, torch.backends.mkldnn.matmul
    usual, everywhere = [p.fp32_precision for p in places], torch.backends.fp32_precision
    PRODUCTS[name]()
    try:
        before = [p.fp32_precision for p in places]
        for precision, inside in (("no", "ieee"), ("tf32", "tf32")):
            with product_precision(precision):
                assert MATMUL.fp32_precision == inside
            assert [p.fp32_precision for p in places] == before
        MATMUL.allow_tf32 = False  # the caller has it otherwise from now on
        with product_precision():
            assert MATMUL.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = everywhere
        torch.set_float32_matmul_precision("highest")
        for place, value in zip(places, usual):
            place.fp32_precision = value


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_torch_are_neither_needed_nor_changed(name):
    def everything(prefix):
        run = fit(arrays(name=f"{prefix}run"), dict(x=X), progress=False)
        fleet = fit_fleet([arrays(name=f"{prefix}{s}", seed=s) for s in range(2)], dict(x=X), progress=False)
        metrics = evaluate(load_run(run.path), prepare_data(resolve(run.cfg), dict(x=X)), progress=False)
        table = CSRAEEmbedding(epochs=2, components=3, random_state=0).fit(X).partial_fit(X)
        return (
            [*map(weights, (run, load_run(run.path), *fleet))],
            metrics,
            [table.transform(X), table.sample(5)[0], table.score(X)],
        )

    usual = everything("usual")
    threads = torch.get_num_threads()
    SETTINGS[name]()
    try:
        before = settings()
        here = everything("here")
        assert settings() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("cpu")
        torch.set_grad_enabled(True)
        torch.set_autocast_enabled("cpu", False)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(usual[0], here[0]))
    assert usual[1] == here[1]
    assert all(np.allclose(a, b, rtol=1e-9) for a, b in zip(usual[2], here[2]))  # on the caller's own threads


def test_a_lock_is_the_same_file_for_all_who_wait(tmp_path):
    "Who opened the lock's file before its holder let go must meet the file that others lock later."
    with run_lock(tmp_path):
        waiting = os.stat(tmp_path / ".lock").st_ino
    with run_lock(tmp_path):
        assert os.stat(tmp_path / ".lock").st_ino == waiting
        with pytest.raises(RunLocked):
            with run_lock(tmp_path):
                pass


def test_tf32_is_for_training_alone(monkeypatch):
    "Products may be rounded in a step, not in the evaluation, and not after the run."
    seen = []
    usual = torch.nn.Linear.forward

    def forward(self, x):
        seen.append((torch.is_grad_enabled(), torch.get_float32_matmul_precision()))
        return usual(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    cfg = arrays(name="rounded", precision="tf32")
    run = fit(cfg, dict(x=X), progress=False)
    assert {how for training, how in seen if training} == {"high"}
    seen.clear()
    evaluate(run, prepare_data(resolve(cfg), dict(x=X)), progress=False)
    assert {how for _, how in seen} == {"highest"} == {torch.get_float32_matmul_precision()}
    if not torch.cuda.is_available():  # a CPU has no TF32
        plain = fit(arrays(name="plain"), dict(x=X), progress=False)
        assert torch.equal(weights(run), weights(plain))


@pytest.mark.parametrize("around", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_run_in_bf16_learns_what_one_in_single_precision_does(around):
    "Its own autocast casts the weights of each step anew, inside of a caller's, too."
    plain = fit(Config(model="CSRAE", epochs=4, warmup=1, name="plain"), progress=False)
    with around():
        cast = fit(Config(model="CSRAE", epochs=4, warmup=1, name="cast", precision="bf16"), progress=False)
    assert cast.history[-1]["criterion"] == pytest.approx(plain.history[-1]["criterion"], rel=0.02)


def test_a_gpu_may_be_asked_for_and_is_refused_where_there_is_none(tmp_path, capsys):
    asked = arrays(device="cuda")
    assert run_name(asked) == run_name(arrays()) == run_name(arrays(device="cpu"))
    with pytest.raises(ValueError, match="unknown device 'gpu'; expected one of auto, cpu, cuda"):
        arrays(device="gpu")
    run = fit(arrays(device="cpu"), dict(x=X), progress=False, folder=tmp_path / "run")
    out = str(tmp_path / "codes.csv")
    for device in ("cuda:99", "gpu"):
        with pytest.raises(SystemExit) as e:
            verbs.main(["encode", str(run.path), "digits", "--device", device, "--out", out])
        said = capsys.readouterr().err
        assert e.value.code == 2 and said.startswith(f"csrae encode: there is no device '{device}' here (")
        assert said.count("\n") == 1
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no device 'cuda' here .*take cpu, or auto"):
            fit(asked, dict(x=X), progress=False, folder=tmp_path / "none")
        with pytest.raises(ValueError, match="there is no device 'cuda' here"):
            CSRAEEmbedding(device="cuda", epochs=1, components=3).fit(X)
    assert not (tmp_path / "none").exists() and not (tmp_path / "codes.csv").exists()


def test_a_seed_that_scikit_learn_would_refuse_is_refused_before_training():
    with pytest.raises(ValueError, match=r"seed=4294967296; expected less than 2³²"):
        Config(seed=2**32)


def test_a_table_takes_no_preset_by_its_name_and_arrays_do():
    names = "./mnist_umap.csv", "./cifar10_features.parquet", "./other.csv", "./mnist_half.npz", "mnist"
    table, also, other, arrays, mnist = (resolve(Config(dataset=name)) for name in names)
    assert table.network == also.network == other.network and table.latent_dim == other.latent_dim
    assert (arrays.network, arrays.epochs) == (mnist.network, mnist.epochs) != (other.network, other.epochs)


def test_a_preset_may_name_some_fields():
    DATASETS.add("iris", lambda likelihood=None, split_seed=0: None, preset=dict(latent_dim=2))
    try:
        cfg = resolve(Config(dataset="iris"))
    finally:
        del DATASETS["iris"]
    assert (cfg.latent_dim, cfg.epochs) == (2, resolve(Config(dataset="./other.csv")).epochs)


def test_a_run_that_is_not_there_is_looked_for_in_the_right_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder; runs are in .*runs"):
        load_run("nowhere")


def test_a_path_is_one_however_it_is_written():
    spelled = [Config(dataset=d) for d in ("own", "own/", "./own", "other/../own")]
    assert len({*map(run_name, spelled)}) == 1
    assert run_name(Config(dataset="/data/own/")) == run_name(Config(dataset="/data/own"))
    assert run_name(Config(dataset="./mnist")) != run_name(Config(dataset="mnist"))  # a folder, a name


def test_threads_train_in_turns_and_leave_the_process_as_it_was():
    alone, done = [weights(fit(arrays(name=f"a{s}", seed=s), dict(x=X), progress=False)) for s in (0, 1)], {}

    def work(s, epochs):
        cfg = arrays(name=f"t{s}", seed=s)
        done[s] = weights(fit(cfg, dict(x=X), progress=False))

    torch.set_default_dtype(torch.float64)
    try:
        threads = [threading.Thread(target=work, args=(s, 2)) for s in (0, 1)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(done[s], alone[s]) for s in (0, 1))


def test_the_random_numbers_of_gpus_are_left_alone(monkeypatch):
    from csrae_nb import metrics, networks

    def refused(seed):
        raise AssertionError("the caller's GPUs are seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refused)
    data = load_data(dict(x=X, y=np.arange(80) % 2))
    metrics.train_classifier(data, examples=1, progress=False)
    networks.resnet18_features((3, 32, 32))


def test_auto_is_a_gpu_if_there_is_one():
    assert check_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
