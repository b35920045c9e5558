"""Short runs end in the weights that version 0.1.0 gave them: every draw comes from the same generator, in
the same order. Processors round differently, so the weights are compared by numbers that any other draw would
move by ten times the tolerance. `python -m tests.test_same_weights` prints them, and hashes for a comparison
to the bit."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from csrae_nb import Config, fit

FILE = Path(__file__).with_suffix(".json")
SHORT = dict(dataset="digits", epochs=2, warmup=1, kmeans_epoch=1, components=10)
RUNS = {
    "VAE": dict(model="VAE"),
    "IWAE": dict(model="IWAE"),
    "MixtureVAE": dict(model="MixtureVAE"),
    "VampPriorVAE": dict(model="VampPriorVAE"),
    "CSRAE": dict(model="CSRAE"),
    "MixtureCSRAE": dict(),
    "vamp": dict(prior="vamp"),
    "network": dict(prior_network=True),
    "learned weights": dict(learned_weights=True),
    "labels": dict(labels=100),
    "Supervised": dict(model="Supervised", labels=100),
    "pinwheel": dict(dataset="pinwheel"),
}


def trained(name):
    return fit(Config(**{**SHORT, **RUNS[name]}), progress=False)


def projections(run):
    "The folder's name, and of each tensor the product with a fixed random one of norm 1."
    g, out = torch.Generator().manual_seed(0), {}
    for k, v in sorted(run.model.state_dict().items()):
        r = torch.randn(v.shape, generator=g, dtype=torch.float64)
        out[k] = (r * v.double()).sum().item() / r.norm().item()
    return {"folder": run.path.name, **out}


@pytest.mark.parametrize("name", RUNS)
def test_weights_are_those_of_before(name, own_runs):
    now, before = projections(trained(name)), json.loads(FILE.read_text())[name]
    assert now.keys() == before.keys() and now.pop("folder") == before.pop("folder")
    for k, v in before.items():
        assert now[k] == pytest.approx(v, abs=2e-4), k


def hashed(run):
    values = (k.encode() + v.numpy().tobytes() for k, v in sorted(run.model.state_dict().items()))
    return hashlib.sha256(b"".join(values)).hexdigest()[:16]


if __name__ == "__main__":
    runs = {name: trained(name) for name in RUNS}
    print(json.dumps({name: projections(run) for name, run in runs.items()}, indent=1))
    print("\n".join(f"{name}: {hashed(run)}" for name, run in runs.items()), file=sys.stderr)
