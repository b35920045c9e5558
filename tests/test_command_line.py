"""`papermill nbs/train.ipynb -p ...` as typed: in a terminal, redirected, with stdin a pipe; and papermill
left alone where it is not ours."""

import base64, dataclasses, os, pty, shutil, subprocess, sys, sysconfig
from ast import literal_eval
from pathlib import Path
from unittest.mock import patch
import jaxtyping, nbformat, numpy as np, papermill.cli, pytest
from click.testing import CliRunner
from papermill import inspect_notebook
from csrae_nb import Config, load_run
from csrae_nb.config import run_name

root = Path(__file__).parents[1]
train = root / "nbs" / "train.ipynb"
program = Path(sysconfig.get_path("scripts")) / "papermill"
short = ["-p", "epochs", "2", "-p", "warmup", "1", "-p", "ll_samples", "10"]
files = {
    ".lock",
    "config.json",
    "history.csv",
    "metrics.json",
    "model.safetensors",
    "samples.png",
    "train.ipynb",
}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))  # restores it after the test too
    return tmp_path / "runs"


@pytest.fixture
def foreign(tmp_path):
    "Somebody else's notebook, in a folder nbs/ of a project of theirs."
    cells = [
        nbformat.v4.new_code_cell("x = 1", metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell("print('x is', x)"),
    ]
    nb = nbformat.v4.new_notebook(
        cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    )
    (tmp_path / "theirs" / "nbs").mkdir(parents=True)
    (tmp_path / "theirs" / "settings.ini").write_text("damaged [ % \x00")
    nbformat.write(nb, path := tmp_path / "theirs" / "nbs" / "train.ipynb")
    return path


# --- real starts


def in_terminal(*command, **kwargs):
    "Exit status and output of a command in a terminal."
    ours, its = pty.openpty()
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, **kwargs) as process:
        os.close(its)
        text = b""
        try:
            while part := os.read(ours, 65536):
                text += part
        except OSError:
            pass  # the other end is closed
        os.close(ours)
    return process.returncode, text.decode()


def source(nb):
    return ["".join(c.source) for c in nb.cells]


def test_as_typed(runs, tmp_path):
    "In a terminal, and piped from elsewhere: one and the same run, trained once; train.ipynb stays as it is."
    before = train.read_bytes()
    code, text = in_terminal(program, "nbs/train.ipynb", "-p", "dataset", "digits", *short, cwd=root)
    assert code == 0, text
    assert "100%" in text and f"run: {runs}/digits-" in text
    (folder,) = runs.glob("digits-*")
    assert {p.name for p in folder.iterdir()} == files
    assert folder.name == run_name(Config(epochs=2, warmup=1)) and len(load_run(folder).history) == 2
    nb = nbformat.read(folder / "train.ipynb", 4)
    assert all(c.execution_count for c in nb.cells if c.cell_type == "code")
    assert not [o for c in nb.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert nb.metadata.papermill.parameters == dict(dataset="digits", epochs=2, warmup=1, ll_samples=10)

    weights = (folder / "model.safetensors").stat()
    words = ["train.ipynb", *short, "-y", "{dataset: digits}"]
    piped = subprocess.run([program, *words], cwd=root / "nbs", input="", capture_output=True, text=True)
    assert piped.returncode == 0, piped.stderr
    assert "nothing to train" in piped.stderr and f"{folder.name}/ (config.json" in piped.stdout
    assert [*runs.glob("digits-*")] == [folder] and {p.name for p in folder.iterdir()} == files
    assert (folder / "model.safetensors").stat() == weights
    assert train.read_bytes() == before


def test_own_output_and_own_data(runs, tmp_path):
    "With an output path papermill goes its own way, but for the place of the runs, and finds data."
    np.savez(tmp_path / "own.npz", x=np.random.default_rng(0).random((300, 6)).round(), y=np.arange(300) % 3)
    command = [
        program,
        train,
        "mine.ipynb",
        "-p",
        "dataset",
        "own.npz",
        "-p",
        "name",
        "mine",
        "-p",
        "components",
        "3",
        *short,
    ]
    done = subprocess.run(command, cwd=tmp_path, input="", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "Executing: 100%" in done.stderr
    assert {p.name for p in (runs / "mine").iterdir()} == files - {"train.ipynb"}
    assert (
        len(source(nbformat.read(tmp_path / "mine.ipynb", 4))) == len(source(nbformat.read(train, 4))) + 1
    )  # the injected parameters


def test_refused_in_the_shell(runs):
    "Exit status 2, one line that says why, nothing written, no kernel started."
    done = subprocess.run(
        [program, train, "-p", "learning_rate", "1"], input="", capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith(
            "Error: unknown field 'learning_rate'; the known ones are dataset, model, prior,"
        )
        and done.stderr.count("\n") == 1
    )
    assert not runs.exists()


def test_foreign_notebook(foreign):
    "Executed as ever: unknown parameters warn, the notebook comes out on stdout, and no torch slows it down."
    done = subprocess.run(
        [program, foreign, "-p", "x", "2", "-p", "y", "1", "--log-level", "INFO"],
        cwd=foreign.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "x is 2" in str(nbformat.reads(done.stdout, 4)) and not [
        *foreign.parent.glob("_*"),
        *foreign.parents[1].glob("_*"),
    ]
    code = "import sys, papermill.cli; print(sorted({'csrae_nb.command_line', 'torch'} & set(sys.modules)))"
    env = {k: v for k, v in os.environ.items() if k != "CSRAE_TYPECHECK"}
    assert (
        subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip()
        == "['csrae_nb.command_line']"
    )


# --- what papermill is asked to execute; in this process, with a stand-in for the execution


def executed(*args, piped=False):
    "(Result, arguments of execute_notebook if it was called) of a papermill command; its own errors."
    jaxtyping.config.update("jaxtyping_disable", True)
    with (
        patch("papermill.cli.execute_notebook") as execute,
        patch("papermill.cli.INPUT_PIPED", piped),
        patch.dict(os.environ),
    ):
        result = CliRunner().invoke(papermill.cli.papermill, list(map(str, args)))
    jaxtyping.config.update("jaxtyping_disable", False)
    return result, execute.call_args and execute.call_args.kwargs


def test_parameters_of_the_notebook_are_the_config():
    cell = inspect_notebook(train)
    assert {k: literal_eval(p["default"]) for k, p in cell.items()} == {
        f.name: f.default for f in dataclasses.fields(Config) if f.name != "extra"
    }
    assert all(p["help"] for p in cell.values())


def test_parameters_are_merged_as_papermill_merges_them(foreign, tmp_path):
    "All five ways to give them, in papermill's order, also from a file that can be read only once."

    def given():
        read, write = os.pipe()
        os.write(write, b"lam: 2\nbeta: 2\nname: file")
        os.close(write)
        return [
            "-r",
            "name",
            "7",
            "-p",
            "lam",
            "4",
            "-p",
            "seed",
            "1e1",
            "-p",
            "likelihood",
            "None",
            "-p",
            "prior_network",
            "True",
            "-y",
            "{lam: 3, beta: 3.5e-05}",
            "-f",
            f"/dev/fd/{read}",
            "-b",
            base64.b64encode(b"lam: 1\nbeta: 1\nmodel: 2020-01-01").decode(),
        ]

    theirs, ours = (
        executed(nb, tmp_path / "out.ipynb", *given())[1]["parameters"] for nb in (foreign, train)
    )
    assert (
        ours
        == theirs
        == dict(
            name="7", lam=4, seed=10.0, likelihood=None, prior_network=True, beta=3.5e-05, model="2020-01-01"
        )
    )


@pytest.mark.parametrize(
    "text, value",
    [
        ("None", None),
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("-1.5e3", -1500.0),
        (".5e+2", 50.0),
        ("2.e-1", 0.2),
        ("'1e-3'", "1e-3"),
        ('"None"', "None"),
        ("Nones", "Nones"),
        ("1e", "1e"),
        ("e3", "e3"),
        ("1", 1),
        ("1.5", 1.5),
        ("null", None),
        ("True", True),
        ("2020-01-01", "2020-01-01"),
    ],
)
def test_yaml_reads_none_and_numbers_as_typed_parameters(text, value, tmp_path):
    "By -y, -f and -b; what is not in quotes is what -p makes of it."
    (tmp_path / "values.yaml").write_text(f"name: {text}", encoding="utf-8-sig")
    for given in (
        ["-y", f"{{name: {text}}}"],
        ["-f", tmp_path / "values.yaml"],
        ["-b", base64.b64encode(f"name: {text}".encode()).decode()],
    ):
        got = executed(train, tmp_path / "out.ipynb", *given)[1]["parameters"]["name"]
        assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "raw, says",
    [
        ("name: caf\u00e9".encode("latin-1"), "values.yaml is not UTF-8"),
        (b"{lam: [", "values.yaml cannot be read as YAML"),
        (b"lam", "'lam'; expected YAML"),
        (b"lam: \0", "cannot be read as YAML"),
        (None, "No such file"),
    ],
)
def test_a_parameter_file_that_cannot_be_read_is_named(raw, says, runs, tmp_path):
    if raw is not None:
        (tmp_path / "values.yaml").write_bytes(raw)
    result, call = executed(train, "-f", tmp_path / "values.yaml")
    assert (
        (result.exit_code, call) == (2, None)
        and result.output.startswith("Error: ")
        and says in result.output
        and result.output.count("\n") == 1
    )
    assert not runs.exists()


@pytest.mark.parametrize(
    "args, says",
    [
        (["-p", "lam", "-1"], "lam=-1.0; expected at least 0"),
        (["-p", "dataset", "mnits"], "expected one of digits"),
        (["-p", "model", "GAN"], "expected one of VAE"),
        (["-p", "dataset", "none.npz"], "there is no file or folder 'none.npz'"),
        (["-p", "dataset", "nan.npz"], "NaN"),
        (["-p", "batch_size", "5000"], "more than the"),
        (["-p", "dataset", "arrays"], "arrays"),
        (["-y", "[lam]"], "of the form name: value"),
        (["-y", "{lam: ["], "{lam: [ cannot be read as YAML"),
    ],
)
@pytest.mark.parametrize("piped", [False, True])
def test_refused(args, says, piped, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("nan.npz", x=np.full((300, 6), np.nan))
    result, call = executed(train, *args, piped=piped)
    assert (result.exit_code, call) == (2, None)
    assert result.output.startswith("Error: ") and says in result.output
    assert not runs.exists()


def test_refused_with_an_output_path_and_in_other_notebooks(tmp_path):
    for nb, says in (
        (train, "the known ones are dataset"),
        (root / "nbs" / "09d_training.ipynb", "09d_training.ipynb has none"),
    ):
        result, call = executed(nb, tmp_path / "out.ipynb", "-p", "learning_rate", 1)
        assert (result.exit_code, call) == (2, None) and says in result.output
    result, call = executed(root / "nbs" / "tran.ipynb", piped=True)
    assert (result.exit_code, call) == (2, None) and "train.ipynb" in result.output


def test_refused_folders(runs, tmp_path, monkeypatch):
    "The folder of another configuration, and one that cannot be."
    assert executed(train, "-p", "name", "a")[0].exit_code == 0
    result, call = executed(train, "-p", "name", "a", "-p", "lam", 2)
    assert (result.exit_code, call) == (2, None) and "lam: 1.0 there, 2" in result.output
    (tmp_path / "file").touch()
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "file"))
    for nb in train, root / "nbs" / "09d_training.ipynb":
        result, call = executed(nb)
        assert (result.exit_code, call) == (2, None) and "CSRAE_RUNS" in result.output


def test_output_paths(runs, tmp_path, monkeypatch):
    "Of train.ipynb, of other notebooks, of another clone; braces are not papermill's templates."
    folder = runs / run_name(Config())
    call = executed(train, piped=True)[1]
    assert (call["input_path"], call["output_path"]) == (str(train), str(folder / "train.ipynb"))
    assert executed(root / "nbs" / "09d_training.ipynb")[1]["output_path"] == str(
        runs / "_notebooks" / "09d_training.ipynb"
    )
    assert executed(train, "-p", "name", "{a}")[1]["output_path"].format() == str(
        runs / "{a}" / "train.ipynb"
    )

    monkeypatch.delenv("CSRAE_RUNS")
    (tmp_path / "clone" / "nbs").mkdir(parents=True)
    for path in "settings.ini", "nbs/train.ipynb":
        shutil.copy(root / path, tmp_path / "clone" / path)
    assert executed(tmp_path / "clone" / "nbs" / "train.ipynb")[1]["output_path"] == str(
        tmp_path / "clone" / "_runs" / folder.name / "train.ipynb"
    )
    monkeypatch.setenv("CSRAE_RUNS", "mine")
    monkeypatch.chdir(tmp_path)
    assert executed(train)[1]["output_path"] == str(tmp_path / "mine" / folder.name / "train.ipynb")


def test_left_alone(foreign, runs, tmp_path, monkeypatch):
    "Everything that is not a notebook of this project to be run without an output path."
    call = executed(foreign, "-p", "y", 1, piped=True)[1]
    assert (call["input_path"], call["output_path"], call["parameters"]) == ("-", str(foreign), dict(y=1))
    out = tmp_path / "out.ipynb"
    for args in (
        (train, out),
        ("-", out),
        (train, "-"),
        (train, out, "--prepare-only", "-p", "learning_rate", 1),
        (foreign, out),
    ):
        call = executed(*args)[1]
        assert (call["input_path"], call["output_path"], call["stderr_file"]) == (
            str(args[0]),
            str(args[1]),
            None,
        )
    for args in [["--help"]], [["--version"]], [[train, "--help-notebook"]]:
        result, call = executed(*args[0])
        assert (result.exit_code, call) == (0, None)
    assert not runs.exists()
