"One thread, no windows, shapes enforced, and nothing written outside a temporary folder."

import os
from functools import partial

import pytest

os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "CSRAE_TYPECHECK": "1"}


@pytest.fixture(scope="session", autouse=True)
def sandbox(tmp_path_factory):
    "Runs, data and the IPython profile of the notebooks, which enforces the shapes of their own functions."
    home = tmp_path_factory.mktemp("sandbox")
    startup = home / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "shapes.ipy").write_text("%load_ext jaxtyping\n%jaxtyping.typechecker beartype.beartype\n")
    os.environ.pop("CSRAE_CACHE", None)  # beside the data
    os.environ |= {
        "CSRAE_RUNS": f"{home}/runs",
        "CSRAE_DATA": f"{home}/data",
        "IPYTHONDIR": f"{home}/ipython",
    }


@pytest.fixture
def own_runs(tmp_path, monkeypatch):
    "A folder of runs for one test alone."
    monkeypatch.setenv("CSRAE_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def hasty(monkeypatch):
    "A classifier for the Fréchet distances that is trained for a moment only."
    from csrae_nb import metrics

    monkeypatch.setattr(metrics, "train_classifier", partial(metrics.train_classifier, examples=300))
