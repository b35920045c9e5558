"""`python -m bench.single_cell`: SCVI's own prior and mixtures on cells, several seeds; it writes
results/single_cell.csv, and goes on where it was stopped."""

import argparse
import logging
import time
import warnings
from itertools import cycle, product
from statistics import median

import torch
from tqdm.auto import tqdm

from csrae_nb.evaluation import write_table
from csrae_nb.priors import effective_components, occupancy
from csrae_nb.results import read_rows, results_folder
from csrae_nb.singlecell import (
    SCVI,
    MixtureSCVI,
    SampledSCVI,
    agreement_with_types,
    batch_mixing,
    draw_cells,
    gradient_noise,
    kmeans_clusters,
    pbmc_counts,
)

import scvi

SETS = {"drawn": (lambda: draw_cells(1000), 120), "pbmc68k_reduced": (pbmc_counts, 50)}  # cells, epochs
MODELS = {  # class, what it takes, weight, and when components are placed
    "N(0, I), KL": (SCVI, {}, 1.0, {}),
    "mixture, KL by 1 draw": (SampledSCVI, dict(kl_samples=1), 1.0, {}),
    "mixture, KL by 30 draws": (SampledSCVI, dict(kl_samples=30), 1.0, {}),
    "mixture, D_CS": (MixtureSCVI, {}, 2.0, {}),
    "mixture, D_CS, aggregate": (MixtureSCVI, dict(prior_objective="aggregate"), 2.0, {}),
    "mixture, D_CS, placed early": (MixtureSCVI, {}, 2.0, dict(kmeans_at=0.25)),
}
KEY = ("data", "model", "seed")


def make(cells, name, seed):
    "An untrained model."
    kind, options, *_ = MODELS[name]
    scvi.settings.seed = seed
    kind.setup_anndata(cells, batch_key="batch")
    return kind(cells, gene_likelihood="nb", **options)


def train(model, epochs, weight, placed):
    plan = dict(max_kl_weight=weight, n_epochs_kl_warmup=epochs // 2)
    quiet = dict(accelerator="cpu", enable_progress_bar=False, check_val_every_n_epoch=epochs)
    model.train(epochs, plan_kwargs=plan, **quiet, **placed)


def of_clusters(found, types, name):
    return {f"{k}_{name}": v for k, v in agreement_with_types(found, types).items()}


def measured(model, cells, weight):
    "What a trained model is worth."
    codes, types = model.get_latent_representation(), cells.obs.type.to_numpy()
    C, mixture, h = len(set(types)), isinstance(model, MixtureSCVI), model.history
    batches = list(model._make_data_loader(cells, batch_size=128))[:-1]
    own = model.get_clusters(clusters=C) if mixture else None
    used = occupancy(model.module.prior().detach(), torch.from_numpy(codes)) if mixture else None
    nothing = dict(ari_components=None, nmi_components=None)
    return dict(
        reconstruction=float(h["reconstruction_loss_validation"].iloc[-1, 0]),
        divergence=float(h["kl_local_validation"].iloc[-1, 0]),
        mixing=batch_mixing(codes, cells.obs.batch.to_numpy()),
        **of_clusters(kmeans_clusters(codes, C), types, "kmeans"),
        **(of_clusters(own, types, "components") if mixture else nothing),
        in_use=effective_components(used) if mixture else None,
        noise_divergence=gradient_noise(model.module, batches[:1], 30),
        noise_whole=gradient_noise(model.module, batches, 30, whole=True, weight=weight),
    )


def step_times(cells, rounds):
    "Milliseconds of the processor for a training step, by the name of the model, taken in turns."

    def stepper(name):
        model = make(cells, name, 0)
        module = model.module.train()
        loader = cycle(list(model._make_data_loader(cells, batch_size=128))[:-1])
        opt = torch.optim.Adam(module.parameters(), 1e-3, eps=0.01)

        def step():
            loss = module(next(loader), loss_kwargs=dict(kl_weight=1.0))[2].loss
            opt.zero_grad()
            loss.backward()
            opt.step()

        return step

    steps, times = {name: stepper(name) for name in MODELS}, {name: [] for name in MODELS}
    for _ in tqdm(range(rounds), desc="steps"):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(1000 * (time.process_time() - start))
    return {name: median(t[3:]) for name, t in times.items()}


def main():
    p = argparse.ArgumentParser("python -m bench.single_cell", description=__doc__)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--rounds", type=int, default=100, help="of steps that are timed")
    asked = p.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    file = results_folder() / "single_cell.csv"
    rows = read_rows(file, KEY)
    done = {tuple(r[k] for k in KEY) for r in rows}
    cells = {data: read() for data, (read, _) in SETS.items()}
    todo = [k for k in product(SETS, MODELS, range(asked.seeds)) if k not in done]
    for data, name, seed in tqdm(sorted(todo, key=lambda k: k[2]), desc="models"):
        model, epochs, (*_, weight, placed) = make(cells[data], name, seed), SETS[data][1], MODELS[name]
        train(model, epochs, weight, placed)
        row = dict(zip(KEY, (data, name, seed)), weight=weight, epochs=epochs, step_ms=None)
        rows.append(row | measured(model, cells[data], weight))
        write_table(file, rows)
    for data in SETS:
        ms = step_times(cells[data], asked.rounds)
        rows = [r | dict(step_ms=ms[r["model"]]) if r["data"] == data else r for r in rows]
    write_table(file, rows)


if __name__ == "__main__":
    main()
