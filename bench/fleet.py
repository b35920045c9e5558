"Runs side by side on a CPU, where the arithmetic takes the time and little is to be won."

import os
import tempfile
from itertools import count
from unittest.mock import patch

from csrae_nb.catalogue import load_data
from csrae_nb.fleet import fit_fleet
from csrae_nb.runs import fit

from .interleaved import Work
from .training import STEPS, config, images


def works():
    data, number, M = load_data(images(), "bernoulli"), count(), 4

    def runs():
        n = next(number)
        return [config("CSRAE", components=None, seed=s, epochs=1, name=f"{n}-{s}") for s in range(M)]

    def elsewhere(f):
        def run():
            with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, CSRAE_RUNS=folder):
                f()

        return run

    yield Work(
        f"{M} runs of CSRAE, {STEPS} steps each, with their files",
        elsewhere(lambda: fit_fleet(runs(), data, progress=False)),
        {"one by one": (elsewhere(lambda: [fit(c, data, progress=False) for c in runs()]), None)},
        rounds=5,
    )
