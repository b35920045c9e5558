"The command csrae, as it is typed: on runs of several kinds, killed and resumed, with what cannot be."

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from csrae_nb import __version__
from csrae_nb.catalogue import ARRAYS, is_ink, load_data
from csrae_nb.config import Config, ModelConfig, known_fields
from csrae_nb.registry import comments
from csrae_nb.runs import fit, load_run
from csrae_nb import trained
from csrae_nb.sharing import Pretrained
from csrae_nb.sharing import open_run
from csrae_nb.trained import Examples, read_examples, show_sheet, write_encoded, write_scored
from csrae_nb.verbs import VERBS, main

PROGRAM = "import sys; from csrae_nb.{} import main; sys.exit(main())"
BRIEF = dict(epochs=2, warmup=1, kmeans_epoch=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Runs with a mixture, with a single Gaussian and with labels."
    data, folder = load_data("digits"), tmp_path_factory.mktemp("runs")
    fields = {
        "mixture": dict(components=6),
        "gaussian": dict(model="VAE"),
        "labels": dict(labels=100),
        "classifier": dict(model="Supervised", labels=100),
    }
    for name, kw in fields.items():
        fit(Config(**BRIEF, **kw), data, progress=False, folder=folder / name)
    return folder


def rows(path):
    return list(csv.DictReader(path.open()))


@pytest.mark.parametrize("kind", ["mixture", "gaussian", "labels"])
def test_every_run_that_has_codes_encodes_scores_samples_and_reconstructs(runs, tmp_path, kind, capsys):
    run, codes = str(runs / kind), tmp_path / "codes.csv"
    assert main(["encode", run, "digits", "--out", str(codes), "--ll-samples", "3"]) == 0
    table = rows(codes)
    assert len(table) == 179 and list(table[0])[0] == "name" and ("label" in table[0]) == (kind == "labels")
    assert all(float(r["unusual"]) == -float(r["log_likelihood"]) for r in table)
    assert main(["score", run, "digits", "--out", str(tmp_path / "odd.csv")]) == 0
    odd = [float(r["unusual"]) for r in rows(tmp_path / "odd.csv")]
    assert odd == sorted(odd, reverse=True) and len(odd) == 179
    assert main(["sample", run, "-n", "5", "--temperature", "0.7", "--out", str(tmp_path / "x.npz")]) == 0
    assert np.load(tmp_path / "x.npz")["x"].shape == (5, 8, 8)
    assert main(["sample", run, "-n", "5", "--noise", "--out", str(tmp_path / "drawn.npz")]) == 0
    drawn = np.load(tmp_path / "drawn.npz")["x"]
    assert drawn.shape == (5, 8, 8) and set(np.unique(drawn)) == {0, 1}  # and not probabilities
    assert main(["reconstruct", run, "digits", "-n", "4", "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["report", run, "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().count("<img src=") == (2 if kind == "gaussian" else 4)


def test_a_classifier_alone_has_a_page_without_pictures_of_codes(runs, tmp_path):
    assert main(["report", str(runs / "classifier"), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().count("<img src=") == 1


def test_clusters_need_three_components_and_encoding_needs_codes(runs, tmp_path, capsys):
    out = str(tmp_path / "clusters.csv")
    assert main(["clusters", str(runs / "mixture"), "digits", "--clusters", "3", "--out", out]) == 0
    assert {r["cluster"] for r in rows(tmp_path / "clusters_examples.csv")} <= {"0", "1", "2"}
    for run, says in {"gaussian": "expected 3 components or more", "classifier": "has no codes"}.items():
        with pytest.raises(SystemExit) as e:
            main(["clusters", str(runs / run), "--out", str(tmp_path / "none.csv")])
        assert e.value.code == 2 and says in capsys.readouterr().err and not (tmp_path / "none.csv").exists()


def test_encoding_that_is_killed_goes_on_where_it_was(runs, tmp_path):
    "Rows that are written stay; the end is the same table."
    np.savez(tmp_path / "many.npz", x=(torch.rand(30_000, 8, 8) > 0.5).numpy())
    words = [
        "encode",
        str(runs / "mixture"),
        str(tmp_path / "many.npz"),
        "--out",
        str(tmp_path / "codes.csv"),
    ]
    program = [sys.executable, "-c", PROGRAM.format("verbs"), *words]
    env = {k: v for k, v in os.environ.items() if k != "CSRAE_TYPECHECK"}
    p = subprocess.Popen(program, env=env, stderr=subprocess.DEVNULL)
    while not (found := [f for f in tmp_path.glob(".codes.csv.mixture.*.part") if f.stat().st_size > 10_000]):
        assert p.poll() is None
        time.sleep(0.002)
    p.send_signal(signal.SIGKILL)
    p.wait()
    (part,) = found
    begun = part.read_text().splitlines()[1:-1]
    assert 0 < len(begun) < 30_000 and not (tmp_path / "codes.csv").exists()
    subprocess.run(program, env=env, stderr=subprocess.DEVNULL, check=True)
    lines = (tmp_path / "codes.csv").read_text().splitlines()
    assert lines[1 : len(begun) + 1] == begun and [r.split(",")[0] for r in lines[1:]] == [
        *map(str, range(30_000))
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_word(verb, capsys):
    with pytest.raises(SystemExit) as e:
        main([verb, "--help"])
    said = capsys.readouterr().out
    assert e.value.code == 0 and f"csrae {verb}" in said and "%" not in said


@pytest.mark.parametrize(
    "words, says",
    [
        (["encode", "{mixture}", "pinwheel", "--out", "{out}.csv"], "Bernoulli needs values from 0 to 1"),
        (["encode", "{mixture}", "{wide}", "--out", "{out}.csv"], "(4, 9)"),
        (["encode", "{mixture}", "digits", "--out", "{out}.xlsx"], "expected one of .csv, .npz"),
        (["sample", "{mixture}", "--temperature", "-1", "--out", "{out}.png"], "temperature=-1"),
        (["sample", "{mixture}", "--clusters", "3", "--out", "{out}.png"], "--cluster N draws from one"),
        (
            ["sample", "{mixture}", "--cluster", "9", "--clusters", "3", "--out", "{out}.png"],
            "clusters 0 to 2",
        ),
        (["reconstruct", "{mixture}", "digits", "-n", "0", "--out", "{out}.png"], "at least 1"),
        (["reconstruct", "{mixture}", "digits", "-n", "3", "--out", "{out}.npz"], "of pairs in a picture"),
        (["train"], "fields"),
        (["encode", "{mixture}", "{video}", "--out", "{out}.csv"], "is a video, which is for runs on faces"),
        (["clusters", "{mixture}", "--clusters", "0", "--out", "{out}.csv"], "at least 1"),
        (["encode", "{mixture}", "digits", "--ll-samples", "-5", "--out", "{out}.csv"], "at least 0"),
        (["train", "dataset=digits", "seed=0,1"], "csrae train takes one"),
        (["train", "dataset=mnits"], "mnits"),
        (["train", "dataset", "digits"], "'dataset' is neither field=value nor a .toml file"),
        (["train", "lr=1", "lr=0.001"], "lr is given twice"),
        (["train", "name=a", "name=b"], "name is given twice: a and b"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(runs, tmp_path, words, says, capsys):
    np.save(tmp_path / "wide.npy", np.zeros((3, 4, 9), np.uint8))
    (video := tmp_path / "clip.mp4").write_bytes(b"")
    names = dict(mixture=runs / "mixture", out=tmp_path / "out", wide=tmp_path / "wide.npy", video=video)
    with pytest.raises(SystemExit) as e:
        main([w.format(**names) for w in words])
    assert e.value.code == 2 and says in capsys.readouterr().err and not list(tmp_path.glob("out*"))


def test_a_run_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path))
    words = "dataset=digits epochs=1 warmup=1 ll_samples=0 fid_layer=0 expost_components=2 name=mine"
    assert main(["train", *words.split()]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "mine") and load_run(tmp_path / "mine")


def test_neither_of_two_tables_is_overwritten(runs, tmp_path, capsys):
    (tmp_path / "cl_examples.csv").write_text("mine")
    with pytest.raises(SystemExit):
        main(["clusters", str(runs / "mixture"), "digits", "--out", str(tmp_path / "cl.csv")])
    assert "cl_examples.csv is there already" in capsys.readouterr().err
    assert (tmp_path / "cl_examples.csv").read_text() == "mine" and not (tmp_path / "cl.csv").exists()


def test_black_and_white_pictures_are_read_as_the_grey_ones_of_training(tmp_path):
    rng = np.random.default_rng(0)
    for folder, pictures in (
        ("grey", rng.integers(0, 256, (60, 6, 6), dtype=np.uint8)),
        ("bw", 255 * rng.integers(0, 2, (5, 6, 6), dtype=np.uint8)),
    ):
        (tmp_path / folder).mkdir()
        for i, x in enumerate(pictures):
            Image.fromarray(x).save(tmp_path / folder / f"{i:02}.png")
    run = fit(Config(**BRIEF, dataset=str(tmp_path / "grey"), batch_size=20, components=3), progress=False)
    together, alone = read_examples(run, tmp_path / "bw"), read_examples(run, tmp_path / "bw" / "00.png")
    assert together.x.equal(read_examples(run, pictures).x)
    assert alone.x.equal(together.x[:1]) and together.x.unique().tolist() == [-0.5, 0.5]


def test_pictures_of_ones_own_are_shown_as_they_are(tmp_path):
    dark, out = torch.zeros(4, 8, 8), []
    dark[:, 2:4] = 1
    for ink in (True, False):
        fig = show_sheet(dark, 2, ink=ink)
        fig.savefig(tmp_path / "sheet.png")
        out.append(np.asarray(Image.open(tmp_path / "sheet.png").convert("L")).mean())
    assert out[0] > 127 > out[1] and is_ink("mnist") and not is_ink("arrays") and not is_ink("photos/")


def test_a_saved_model_is_put_to_work_like_its_run(runs, tmp_path):
    Pretrained(runs / "mixture").save_pretrained(tmp_path / "saved")
    for run in (runs / "mixture", tmp_path / "saved"):
        out = tmp_path / f"{run.name}.csv"
        assert main(["encode", str(run), "digits", "--out", str(out)]) == 0
    assert (tmp_path / "mixture.csv").read_text() == (tmp_path / "saved.csv").read_text()


def test_no_folder_is_made_for_an_output(runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(runs / "mixture"), "--out", str(tmp_path / "new" / "page.html")])
    assert "there is no folder" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_folder_that_may_not_be_written_to_is_said_at_once(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(SystemExit):
        main(["report", str(runs / "mixture"), "--out", str(tmp_path / "page.html")])
    assert f"nothing may be written into {tmp_path}" in capsys.readouterr().err


def test_rows_of_other_examples_or_weights_are_not_gone_on_with(runs, tmp_path):
    "A picture of the same name, and a run that was trained anew."
    run = open_run(shutil.copytree(runs / "mixture", tmp_path / "run"))
    x, names = (torch.rand(40, 8, 8) > 0.5).float(), tuple(map(str, range(40)))
    out = tmp_path / "codes.csv"
    begun = trained._write_rows(run, Examples(x[:30], names[:30]), out, 0, False)
    assert trained._part(run, Examples(x[:30], names[:30]), out) == begun and begun.exists()
    other = x.clone()
    other[3] = 1 - other[3]
    for examples in Examples(other[:30], names[:30]), Examples(x, names):
        assert trained._part(run, examples, out) != begun and not begun.exists()
        begun = trained._write_rows(run, examples, out, 0, False)
    weights = tmp_path / "run" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"0000")
    assert trained._part(run, Examples(x, names), out) != begun and not begun.exists()


@pytest.mark.parametrize("write", [write_encoded, write_scored], ids=["encode", "score"])
@pytest.mark.parametrize("kind", ["mixture", "labels"])
def test_a_table_that_is_stopped_goes_on_to_the_same_bytes(runs, tmp_path, monkeypatch, write, kind):
    "Draws for log p(x) belong to a block; rows of other settings, or of half a block, are no rows of it."
    monkeypatch.setattr(trained, "rows_at_once", lambda x: 16)
    run, blocks = open_run(runs / kind), trained.encode_examples
    x = (torch.rand(50, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    examples, seen = Examples(x, tuple(f"a\n{i}, \u2028\"b\"" for i in range(50))), []

    def stopping(*args):
        for block in blocks(*args):
            if len(seen) == 1:
                raise KeyboardInterrupt
            seen.append(block)
            yield block

    for first, then in ((5, 5), (0, 0), (5, 0), (0, 5), (5, 6)):
        write(run, examples, whole := tmp_path / "whole.csv", ll_samples=then, force=True, progress=False)
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(trained, "encode_examples", stopping)
            write(run, examples, tmp_path / "out.csv", ll_samples=first, force=True, progress=False)
        (part,) = tmp_path.glob(".out.csv.*.part")
        with open(part, "ab") as f:
            f.write(part.read_bytes()[-60:-4])  # of a row that is not whole
        starts = []
        with monkeypatch.context() as m:
            m.setattr(trained, "encode_examples", lambda *a: starts.append(a[4]) or blocks(*a))
            write(run, examples, tmp_path / "out.csv", ll_samples=then, force=True, progress=False)
        assert (tmp_path / "out.csv").read_bytes() == whole.read_bytes() and len(rows(whole)) == 50
        assert starts == [16 if first == then else 0] and len(list(tmp_path.iterdir())) == 2
        seen.clear()


def test_codes_and_scores_of_one_name_are_two_tables(runs, tmp_path):
    "Rows begun without codes are not gone on with by encode, nor those of another folder with dots."
    run = open_run(runs / "mixture")
    examples = Examples((torch.rand(30, 8, 8) > 0.5).float(), tuple(map(str, range(30))))
    begun = trained._write_rows(run, examples, tmp_path / "t.csv", 0, False, codes=False)
    other = tmp_path / f".t.csv.mixture.old.{begun.name[-21:]}"
    other.write_text("of a run that is called mixture.old")
    write_encoded(run, examples, tmp_path / "t.csv", progress=False)
    assert "z1" in rows(tmp_path / "t.csv")[0] and not begun.exists() and other.exists()


# --- what a script, or a person, sees of a command


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("begun", [False, True])
def test_ctrl_c_ends_every_verb_with_one_line(tmp_path, monkeypatch, verb, begun, capsys):
    def interrupt(o):
        if begun:
            (tmp_path / ".o[1].csv.run.0123.part").write_text("name")
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, verb, interrupt)
    what = dict(train=["epochs=1"], sample=["run"], report=["run"], runs=[]).get(verb, ["run", "data"])
    out = [] if verb == "train" else ["--out", str(tmp_path / "o[1].csv")]
    assert main([verb, *what, *out]) == 130
    goes_on = "; the same command goes on" if begun or verb == "train" else ""
    assert capsys.readouterr().err == f"csrae {verb}: stopped{goes_on}\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "module, words",
    [
        ("verbs", "score {run} digits --top 100"),
        ("verbs", "encode {run} digits --out {out}"),
        ("verbs", "runs {folder}"),
        ("verbs", "--help"),
        ("sweeps", "dataset=digits seed=0,1,2 --list"),
    ],
)
def test_who_reads_no_further_ends_a_command_in_silence(runs, tmp_path, module, words, unbuffered):
    "As `| head` does: no traceback, no error, the status of other programs. What it writes is there."
    words = words.format(run=runs / "mixture", folder=runs, out=tmp_path / "codes.csv")
    env = {k: v for k, v in os.environ.items() if k != "CSRAE_TYPECHECK"}
    program = [sys.executable, "-c", PROGRAM.format(module), *words.split()]
    read, write = os.pipe()
    os.close(read)
    p = subprocess.run(
        program, env=env | dict(PYTHONUNBUFFERED=unbuffered), stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    said = p.stderr.replace("\r", "\n").split("\n")
    assert p.returncode in ((0, 141) if words == "--help" else (141,))  # argparse swallows it
    assert all(line.startswith("encoding") for line in said if line), said
    assert (tmp_path / "codes.csv").exists() == words.startswith("encode")


def test_a_full_disk_behind_the_output_is_one_line(runs):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        program = [sys.executable, "-c", PROGRAM.format("verbs"), "runs", str(runs)]
        p = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True)
    assert p.returncode == 2 and "No space left" in p.stderr and "Traceback" not in p.stderr


def test_version_and_the_runs_that_there_are(runs, tmp_path, monkeypatch, capsys):
    "Of every kind, also copied, begun, damaged; nothing that is no run."
    with pytest.raises(SystemExit) as e:
        main(["--version"])
    assert e.value.code == 0 and capsys.readouterr().out == f"csrae {__version__}\n"
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "model.safetensors").write_bytes(b"no model")
    (folder / "notes").mkdir()
    shutil.copytree(folder / "gaussian", folder / "begun")
    (folder / "begun" / "model.safetensors").rename(folder / "begun" / "checkpoint.safetensors")
    os.utime(folder / "labels" / "model.safetensors", (2e9, 2e9))
    monkeypatch.setenv("CSRAE_RUNS", str(folder))
    assert main(["runs", "--out", str(tmp_path / "runs.csv")]) == 0
    there = {r["name"]: r for r in rows(tmp_path / "runs.csv")}
    assert list(there)[0] == "labels" and list(there)[-1] == "damaged" and len(there) == 6
    state = {name: r["state"] for name, r in there.items()}
    assert state.pop("begun") == "stopped" and state.pop("damaged") == "unreadable"
    assert there["damaged"]["problem"] and not there["labels"]["problem"]
    assert {*state.values()} == {"finished"}
    measures = {name: r["measure"] for name, r in there.items()}
    assert measures["labels"] == measures["classifier"] == "error" and measures["mixture"] == "criterion"
    run = load_run(runs / "mixture")
    row = there["mixture"]
    assert float(row["validation"]) == pytest.approx(run.history[run.best_epoch - 1]["criterion"], rel=1e-4)
    assert [row[k] for k in "dataset model prior epochs of".split()] == [
        "digits",
        "MixtureCSRAE",
        "mog",
        "2",
        "2",
    ]
    assert there["gaussian"]["prior"] == "normal"
    capsys.readouterr()
    assert main(["runs", str(folder)]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[0] == [*row] and [line[0] for line in shown[1:]] == [*there]
    with pytest.raises(SystemExit):
        main(["runs", str(tmp_path / "none")])
    assert "holds no runs" in capsys.readouterr().err


def test_encoding_that_is_interrupted_goes_on(runs, tmp_path):
    np.savez(tmp_path / "many.npz", x=(torch.rand(30_000, 8, 8) > 0.5).numpy())
    words = ["encode", runs / "mixture", tmp_path / "many.npz", "--out", tmp_path / "codes.csv"]
    env = {k: v for k, v in os.environ.items() if k != "CSRAE_TYPECHECK"}
    program = [sys.executable, "-c", PROGRAM.format("verbs"), *map(str, words)]
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # also under nohup
    p = subprocess.Popen(program, env=env, stderr=subprocess.PIPE, text=True, **heard)
    while not [f for f in tmp_path.glob(".codes.csv.mixture.*.part") if f.stat().st_size > 10_000]:
        assert p.poll() is None
        time.sleep(0.002)
    p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=60)[1].replace("\r", "\n").splitlines()
    assert (p.returncode, said[-1]) == (130, "csrae encode: stopped; the same command goes on")
    assert "Traceback" not in " ".join(said)


def test_training_says_how_it_went(own_runs, capsys):
    "The run's folder on stdout, as scripts read it, and main metrics beside it."
    words = "train dataset=digits components=4 epochs=2 warmup=1 ll_samples=2 fid_layer=0 expost_components=3"
    for _ in range(2):  # a finished run, too
        assert main(words.split()) == 0
        said = capsys.readouterr()
        folder = Path(said.out.splitlines()[-1])
        metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
        line = said.err.splitlines()[-1]
        assert line.endswith("; metrics.json has the others")
        shown = dict(part.split() for part in line.split("; metrics")[0].split(", "))
        assert {"reconstruction", "divergence", "log_likelihood", "active_units"} <= shown.keys()
        assert all(float(v) == pytest.approx(metrics[k], rel=1e-4) for k, v in shown.items())


def test_help_of_train_lists_the_fields_and_data_what_is_taken(capsys):
    said = {}
    for verb in ("train", "encode", "score", "predict", "reconstruct", "clusters"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        said[verb] = capsys.readouterr().out
    lines = said.pop("train").split("Fields, with their defaults:\n")[1].splitlines()
    described = {line.split("=")[0].strip(): line for line in lines}
    assert [*described] == known_fields() and "lam=1.0" in described["lam"]
    told = comments(ModelConfig) | comments(Config)
    assert all(line.endswith(told.get(k, "registers")) for k, line in described.items())
    said = {k: " ".join(text.split()) for k, text in said.items()}
    for text in said.values():
        assert all(ending in text for ending in ARRAYS) and "folder" in text and "videos" in text
    assert "or, if it has none, all pictures" in said["predict"]


def test_a_run_that_is_none_is_told_with_those_of_like_names(runs, tmp_path, monkeypatch, capsys):
    "Before the Hub, which is asked only for what can be a name there."

    def hub(name, **kw):
        asked.append(name)
        raise FileNotFoundError("the Hub has none")

    asked = []
    monkeypatch.setenv("CSRAE_RUNS", str(runs))
    monkeypatch.setattr(Pretrained, "from_pretrained", hub)
    for name in ("mixtrue", "gauss", "./mixtrue", "/no/where/mixture", "someone/mixture"):
        with pytest.raises(SystemExit) as e:
            main(["predict", name, "digits", "--out", str(tmp_path / "x.csv")])
        said = capsys.readouterr().err
        near = "gaussian" if name == "gauss" else "mixture"
        assert e.value.code == 2 and len(said.splitlines()) == 1
        assert said.startswith(f"csrae predict: no run is named {name!r} in {runs}; most alike: {near}, ")
    assert asked == ["someone/mixture"] and "the Hub has none" in said
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="which holds none"):
        open_run("mixture")


# --- where training data and runs are


def table(path, shift=0.0, columns="abc"):
    x = np.random.default_rng(0).normal(shift, 1, (200, len(columns)))
    path.write_text("\n".join([",".join(columns), *(",".join(f"{v:.6f}" for v in row) for row in x)]) + "\n")
    return path


def test_a_refit_takes_the_training_data_wherever_they_are_and_no_others(
    tmp_path, own_runs, monkeypatch, capsys
):
    "Data that moved are named; others of the same name, with the same columns, are refused."
    monkeypatch.chdir(tmp_path)
    cfg = Config(dataset="t.csv", name="of_table", latent_dim=2, components=4, batch_size=50, **BRIEF)
    table(tmp_path / "t.csv")
    fit(cfg, progress=False)
    sample = ["sample", "of_table", "-n", "3", "--refit", "--force", "--out", "new.csv"]
    assert main(sample) == 0
    as_was = rows(tmp_path / "new.csv")
    os.rename("t.csv", "moved.csv")

    def said(words):
        with pytest.raises(SystemExit):
            main(words)
        return capsys.readouterr().err

    assert "what of_table was trained on, 't.csv', is needed and was not found (there is no file" in said(
        sample
    )
    assert main([*sample, "--data", "moved.csv"]) == 0 and rows(tmp_path / "new.csv") == as_was
    for columns in "abc", "ab":
        table(tmp_path / "t.csv", 5.0, columns)
        assert "'t.csv' holds other data than of_table was trained on" in said(sample)
    assert "expected both, or neither" in said(
        [k for k in sample if k != "--refit"] + ["--data", "moved.csv"]
    )


def test_a_run_is_found_where_a_folder_of_its_name_holds_data(runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "mixture", tmp_path / "runs" / "digits8")
    (tmp_path / "digits8").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    assert open_run("digits8").path == tmp_path / "runs" / "digits8"
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(ValueError, match="unfinished holds no finished run"):
        open_run("unfinished")


def test_pictures_come_in_the_colours_that_a_run_takes(tmp_path, own_runs):
    "A grey one goes to a run that saw colours as it did among coloured ones; so does a grey one in RGB."
    grey = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    coloured = np.stack([grey, grey // 2, 255 - grey], 1)
    for name, x, shape in (
        ("grey", grey, (8, 8)),
        ("channel", grey[:, None], (1, 8, 8)),
        ("colours", coloured, (3, 8, 8)),
    ):
        cfg = Config(
            dataset="arrays", name=name, network="mlp", latent_dim=2, components=4, batch_size=20, **BRIEF
        )
        run = fit(cfg, dict(x=x), progress=False)
        assert run.x_shape == shape
        Image.fromarray(grey[0]).save(tmp_path / "a.png")
        Image.fromarray(grey[0]).convert("RGB").save(tmp_path / "b.png")
        for file in "a.png", "b.png":
            (found,) = read_examples(run, tmp_path / file).x
            assert tuple(found.shape) == shape
            expected = torch.from_numpy(grey[0] / 255 - 0.5).float().expand(shape)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        Image.fromarray(coloured[0].transpose(1, 2, 0)).save(tmp_path / "c.png")
        if name != "colours":
            with pytest.raises(ValueError, match="has examples of shape"):
                read_examples(run, tmp_path / "c.png")


def test_a_loss_that_is_not_finite_and_an_extra_that_is_missing_are_a_line_each(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))
    said = []
    for words, missing in ((["lr=1e6"], {}), (["dataset=faces_demo"], {"cv2": None})):
        for name, module in missing.items():
            monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(SystemExit) as stop:
            main(["train", *words, "epochs=2", "warmup=0", "ll_samples=0", "name=odd"])
        said.append((stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]))
    assert [code for code, _ in said] == [2, 2] and all(text.startswith("csrae train: ") for _, text in said)


def test_of_an_npz_with_splits_it_is_said_which_is_read(runs, tmp_path):
    x = load_data("digits").fixed("test")[:6].numpy()
    np.savez(tmp_path / "split.npz", x_train=x[:4], x_test=x[4:])
    with pytest.warns(UserWarning, match="split.npz: its x_test is read; x_train are not"):
        assert len(read_examples(load_run(runs / "mixture"), tmp_path / "split.npz")) == 2


@pytest.mark.parametrize(
    "name, there, error, says",
    [
        ("one.webp", True, ValueError, "one.webp is none of .npz, .*: convert it to one of these"),
        ("make.py", True, ValueError, "make.py is none of .npz"),
        ("none.png", False, FileNotFoundError, "none.png is not there, nor one of digits"),
    ],
)
def test_a_file_of_no_known_kind_or_none_at_all(name, there, error, says, runs, tmp_path):
    if there:
        (tmp_path / name).write_bytes(b"RIFF")
    with pytest.raises(error, match=says):
        read_examples(load_run(runs / "mixture"), tmp_path / name)
