"Small, short runs on arrays that a test makes up: a configuration, and runs of a few steps."

import numpy as np
import pytest

from csrae_nb import fit
from csrae_nb.config import Config
from csrae_nb.training import Training

SMALL = Config(
    dataset="arrays",
    epochs=2,
    warmup=1,
    kmeans_epoch=1,
    batch_size=20,
    latent_dim=2,
    components=4,
    ll_samples=2,
    expost_components=3,
)


ROWS = (np.random.default_rng(0).random((120, 6)) < 0.5).astype(np.float32)  # six columns of zeros and ones
TINY = dict(dataset="arrays", network="pinwheel", latent_dim=2, components=3, kmeans_epoch=1, batch_size=20)


def tiny(name, **fields):
    "A run on ROWS, in a few steps."
    return fit(Config(**TINY | fields, name=name), dict(x=ROWS), progress=False)


def stopped_after_two_epochs(monkeypatch, **fields):
    "A run that is stopped and goes on, beside the same without a stop; the differences of their weights."
    whole, epoch = tiny("whole", **fields), Training.train_and_validate

    def stop(t, bar):
        if t.meta["epoch"] == 2:
            raise KeyboardInterrupt
        epoch(t, bar)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Training, "train_and_validate", stop)
        tiny("stopped", **fields)
    stopped = tiny("stopped", **fields)
    return whole, stopped, differences(whole, stopped)


def differences(a, b):
    "Of the weights of two runs, the largest of each tensor."
    a, b = a.model.state_dict(), b.model.state_dict()
    assert a.keys() == b.keys()
    return {k: (a[k] - b[k]).abs().max().item() for k in a}
