"""The picture of README and of the home page: `python -m bench.front` trains a VAE and a MixtureCSRAE on
MNIST, 30 epochs each with seed 0 (the second is a run of sweeps/aggregate.toml), and draws
nbs/images/front.png. Runs that are there already are read. One core needs a quarter of an hour."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from csrae_nb import Config, fit, load_data
from csrae_nb.evaluation import occupancy, run_codes
from csrae_nb.files import generator
from csrae_nb.pictures import show_examples

FILE = Path(__file__).parents[1] / "nbs" / "images" / "front.png"
COMMON = dict(dataset="mnist", latent_dim=20, epochs=30, ll_samples=0, fid_layer=0)
MIXTURE = dict(
    model="MixtureCSRAE",
    components=100,
    learned_weights=True,
    prior_objective="aggregate",
    queue=1000,
    lam=0.5,
)
ROWS, COLUMNS = 8, 14  # samples of each component, and how many components: the most used


def of_components(run, data):
    "Samples, a column for each of the components that most test codes belong to."
    used = occupancy(run.model.prior(), run_codes(run, data, "test"))
    random = generator(run.cfg.seed, "component samples", device=run.device)
    top = used.argsort(descending=True)[:COLUMNS]
    return torch.stack([run.model.sample(ROWS, random, component=k.item()) for k in top], 1).flatten(0, 1)


def draw(vae, mixture, data):
    "Both sheets side by side, without what a file would say of the machine."
    random = generator(vae.cfg.seed, "samples", device=vae.device)
    fig, axs = plt.subplots(1, 2, figsize=(10, 3.1), layout="constrained")
    show_examples(axs[0], vae.model.sample(ROWS * COLUMNS, random), columns=COLUMNS)
    axs[0].set_title("VAE: samples of its one Gaussian")
    show_examples(axs[1], of_components(mixture, data), columns=COLUMNS)
    axs[1].set_title("MixtureCSRAE: each column is a component of its prior")
    fig.savefig(FILE, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    vae, mixture = (fit(Config(**COMMON, **fields)) for fields in (dict(model="VAE"), MIXTURE))
    draw(vae, mixture, load_data("mnist"))
