"Every chapter runs top to bottom, with the shapes of its signatures enforced."

from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
import fastcore.test, jaxtyping, nbformat, pytest, torch
from accelerate.state import AcceleratorState
from nbdev.test import test_nb as run_nb
from csrae_nb import GMM
from csrae_nb.catalogue import DATASETS
from csrae_nb.config import TASKS
from csrae_nb.models import DIVERGENCES, MODELS
from csrae_nb.priors import PRIORS
from csrae_nb.registry import load_plugins

root = Path(__file__).parents[1]
by_papermill = {"train.ipynb"}  # run as its readers run it, in a test of its own
chapters = [p for p in sorted((root / "nbs").glob("*.ipynb")) if p.name not in by_papermill]


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
    tables = DATASETS, TASKS, DIVERGENCES, MODELS, PRIORS
    before = [(t, dict(t._rows)) for t in tables]
    yield
    for table, rows in before:
        table._rows = rows


@pytest.fixture(autouse=True)
def accelerate_as_it_was():
    "The Accelerator that a reader makes is for that chapter alone."
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("path", chapters, ids=lambda p: p.stem)
def test_chapter(path):
    if path.stem == "24_single_cell" and not find_spec("scvi"):
        pytest.skip("scvi-tools is not installed: pip install 'csrae_nb[singlecell]'")
    passed, _ = run_nb(path, basepath=root)
    assert passed, f"{path.name} fails: its traceback is in the captured stderr"


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
