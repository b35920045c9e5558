"""One thread, no windows, nothing written outside a temporary folder. Shapes are enforced in this process,
but for tests that train for long: chapters call the same functions. Child processes run as anywhere."""

import os
from functools import partial
from importlib import import_module

import jaxtyping
import pytest

os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "CSRAE_TYPECHECK": "1"}


@pytest.fixture(scope="session", autouse=True)
def sandbox(tmp_path_factory):
    "Runs, data and the IPython profile of the notebooks, which enforces the shapes of their own functions."
    home = tmp_path_factory.mktemp("sandbox")
    startup = home / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "shapes.ipy").write_text("%load_ext jaxtyping\n%jaxtyping.typechecker beartype.beartype\n")
    import_module("csrae_nb")  # with its shapes enforced: what says so is not for child processes
    os.environ.pop("CSRAE_TYPECHECK", None)
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    os.environ |= {
        "CSRAE_CACHE": f"{shared}/cache",  # a classifier is trained once for all workers and child processes
        "CSRAE_RUNS": f"{home}/runs",
        "CSRAE_DATA": f"{home}/data",
        "IPYTHONDIR": f"{home}/ipython",
    }


# modules, and single tests, that train for long, or read tables for long, which have no shapes
LONG = "kills sweeps semisup action_units faces training gpu_job estimator settings tables".split()
LONG += "constraint fid".split()
CHAPTERS = "06b_aggregate 06d_constraint 06e_posterior 06f_layers 07_pinwheel 09f_fleet 10a_clusters".split()
CHAPTERS += "10b_evaluation 11_samples 12b_sweeps 13_results 13b_claims 13e_answers 14c_few_labels".split()
CHAPTERS += "19_your_own 20_estimator 20b_density 23a_predict 24_single_cell".split()
LONG += ["test_readme_examples", *(f"test_chapter[{name}]" for name in CHAPTERS)]
# and more that --quick leaves out: they start processes and browsers, or take twenty seconds each
SLOW = "explorers plugins command_line layers predict processes videos clusters".split()
CHAPTERS = "00_two_gaussians 01a_kernels 01d_preferences 06_models 09e_runs 23_after_training".split()
SLOW += ["test_compile", "test_examples_of_the_pages", *(f"test_chapter[{name}]" for name in CHAPTERS)]


def is_of(names, item):
    return bool({item.path.stem.removeprefix("test_"), item.name} & set(names))


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out what takes long")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if is_of(LONG + SLOW, item)])
        items[:] = [item for item in items if not is_of(LONG + SLOW, item)]


@pytest.fixture(autouse=True)
def shapes(request):
    "Shapes are not looked at in tests that take long: to look takes several times the work itself."
    if not is_of(LONG, request.node):
        yield
        return
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def shapes_unchecked():
    "As users have it: no error by jaxtyping comes before our own."
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def own_runs(tmp_path, monkeypatch):
    "A folder of runs for one test alone."
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def own_cache(monkeypatch):
    "What is made from data is made anew, beside the data and the runs."
    monkeypatch.delenv("CSRAE_CACHE")


@pytest.fixture
def hasty(monkeypatch, own_cache):
    "A classifier for the Fréchet distances that is trained for a moment only."
    from csrae_nb import metrics

    monkeypatch.setattr(metrics, "train_classifier", partial(metrics.train_classifier, examples=300))
