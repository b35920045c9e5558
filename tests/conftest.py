"One thread, no windows, shapes enforced, and nothing written outside a temporary folder."

import os
import pytest

os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "CSRAE_TYPECHECK": "1"}


@pytest.fixture(scope="session", autouse=True)
def sandbox(tmp_path_factory):
    "Runs, data and the IPython profile of the notebooks; the profile enforces the shapes of the notebooks' own functions."
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
