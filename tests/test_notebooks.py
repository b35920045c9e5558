"""Every chapter runs top to bottom, with the shapes of its signatures enforced, and shows what it has stored.

Text is compared to the letter and numbers within a tolerance, since another machine rounds otherwise, which
a network that is trained makes larger: the bounds below hold with and without vector instructions."""

import gc
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
import fastcore.test, jaxtyping, nbdev.test, nbformat, pytest, torch
import matplotlib.pyplot as plt
from accelerate.state import AcceleratorState
from nbdev.test import test_nb as run_nb
from csrae_nb import GMM
from csrae_nb.aggregate import PRIOR_OBJECTIVES
from csrae_nb.catalogue import DATASETS, FOLDERS
from csrae_nb.config import TASKS
from csrae_nb.likelihoods import LIKELIHOODS
from csrae_nb.models import DIVERGENCES, MODELS
from csrae_nb.networks import NETWORKS
from csrae_nb.priors import PRIORS
from csrae_nb.registry import load_plugins
from outputs import differences, shown

root = Path(__file__).parents[1]
by_papermill = {"train.ipynb"}  # run as its readers run it, in a test of its own
of_the_reader = {"explore.ipynb"}  # shows whatever runs there are
EXACT, TRAINED = 0.05, 0.5  # parts of the larger number by which stored and fresh ones may differ
trains = {
    *(
        "00b_why_a_mixture",
        "06f_layers",
        "07_pinwheel",
        "10a_clusters",
        "10b_evaluation",
        "14b_semi_supervised",
        "14c_few_labels",
    ),
    *(
        "16_action_units",
        "19_your_own",
        "19b_sharing",
        "20_estimator",
        "23a_predict",
        "23b_csrae",
        "24_single_cell",
    ),
}
volatile = {
    "0109s": "rounding errors of single precision",
    "070029": "the codes of three starts, one of which may end elsewhere",
    "155012": "frames per second",
    "160013": "F1 of a few frames after three epochs",
    "170221": "rounding errors after thirty steps",
    "230326": "clusters of 179 digits by a small model",
    "232027": "what a classifier of two epochs says of a frame",
    "2329s": "events where it is above one half",
    "versions": "what it ran with",
}
chapters = [p for p in sorted((root / "nbs").glob("*.ipynb")) if p.name not in by_papermill]


def test_pieces_of_what_a_cell_prints_are_one_text():
    pieces, whole = (
        [dict(output_type="stream", name="stdout", text=text) for text in texts]
        for texts in (("after five, ", "after ten\n", "nats\n"), ("after five, after ten\nnats\n",))
    )
    value = dict(output_type="execute_result", data={"text/plain": "7"})
    assert not differences(shown([*pieces, value]), shown([*whole, value]), 0)
    assert differences(shown([*pieces, value]), shown(whole), 0) == [("7", "")]


@pytest.fixture(autouse=True)
def show_readers_errors(monkeypatch):
    "Where a chapter provokes an error, the package's own answer is wanted, not the shape checker's."
    expect_fail = fastcore.test.expect_fail

    @contextmanager
    def unchecked(*args, **kwargs):
        before = jaxtyping.config.jaxtyping_disable
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            with expect_fail(*args, **kwargs):
                yield
        finally:
            jaxtyping.config.update("jaxtyping_disable", before)

    monkeypatch.setattr(fastcore.test, "expect_fail", unchecked)


@pytest.fixture(autouse=True)
def tables_as_they_were():
    "What a chapter registers, and registers again, is for that chapter alone."
    load_plugins()
    tables = DATASETS, FOLDERS, TASKS, DIVERGENCES, MODELS, PRIORS, PRIOR_OBJECTIVES, LIKELIHOODS, NETWORKS
    before = [(t, dict(t._rows)) for t in tables]
    yield
    for table, rows in before:
        table._rows = rows


@pytest.fixture(autouse=True)
def shells_end(monkeypatch):
    "What a chapter has made goes with it: nbdev's shells would keep all variables of all chapters."
    made, kind = [], nbdev.test.CaptureShell

    def begun(*args, **kw):
        made.append(kind(*args, **kw))
        return made[-1]

    monkeypatch.setattr(nbdev.test, "CaptureShell", begun)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # a shell puts its own in its place
    yield
    for shell in made:
        shell.close()
        shell.reset()
        shell.result = None
    plt.close("all")
    gc.collect()


@pytest.fixture(autouse=True)
def accelerate_as_it_was():
    "The Accelerator that a reader makes is for that chapter alone."
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def drifted(path, ran, tolerance):
    "Lines of the stored outputs of a chapter that it does not show any more, with those in their place."
    stored = {c.id: shown(c.get("outputs")) for c in nbformat.read(path, 4).cells}
    cells = [c for c in ran.cells if c.cell_type == "code" and c.id not in volatile]
    return {c.id: d for c in cells if (d := differences(stored[c.id], shown(c.outputs), tolerance))}


@pytest.mark.parametrize("path", chapters, ids=lambda p: p.stem)
def test_chapter(path, monkeypatch):
    if path.stem == "24_single_cell" and not find_spec("scvi"):
        pytest.skip("scvi-tools is not installed: pip install 'csrae_nb[singlecell]'")
    monkeypatch.setattr(nbdev.test, "write_nb", lambda nb, _: ran.append(nb))
    ran = []
    passed, _ = run_nb(path, basepath=root, save=True)
    assert passed, f"{path.name} fails: its traceback is in the captured stderr"
    if path.name not in of_the_reader:
        drift = drifted(path, ran[0], TRAINED if path.stem in trains else EXACT)
        assert not drift, (
            f"{path.name} shows something else than it has stored: run it anew, and read its text"
        )


def test_drift_is_seen():
    "Numbers beyond the tolerance, other words and lines that are gone; not rounding, nor another width."
    stored = "KL  6.081 of 1,000\n| a | b |\n|--:|:--|\n| 3e-15 | 12 % |"
    assert not differences(stored, "KL 6.20 of 1,001\n| a   | b |\n|---:|:--|\n| 0e+00 | 12 % |", 0.05)
    assert differences(stored, stored.replace("6.081", "6.6"), 0.05) == [
        ("KL 6.081 of 1,000", "KL 6.6 of 1,000")
    ]
    assert differences(stored, stored.replace("12", "−12"), 0.05) and differences("", "1", 0.5)
    assert differences(stored, stored.replace("KL", "CS"), 0.5) and differences(
        stored, "KL 6.081 of 1,000", 0.5
    )


def test_shapes_are_enforced_in_the_package():
    with pytest.raises(jaxtyping.TypeCheckError):
        GMM(logw=torch.zeros(3), mu=torch.zeros(2, 1), var=torch.ones(2, 1))


@pytest.mark.parametrize("shape, passes", [((3, 2), True), ((3,), False)])
def test_shapes_are_enforced_in_notebooks(tmp_path, shape, passes):
    "A notebook that breaks the shapes it declares fails."
    cells = [
        "from jaxtyping import Float\nfrom torch import Tensor, zeros",
        "def rows(x: Float[Tensor, 'B D']) -> int: return len(x)",
        f"rows(zeros{shape})",
    ]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(nb, tmp_path / "shapes.ipynb")
    assert run_nb(tmp_path / "shapes.ipynb", showerr=passes)[0] == passes
