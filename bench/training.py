"Training steps: ours as in `fit`, pythae's as in its trainer (in another process), and the matrix products."

import tempfile
from contextlib import nullcontext
from copy import deepcopy

import torch
from sklearn.datasets import load_digits
from torch.nn import Linear
from torch.nn.functional import interpolate

from csrae_nb.catalogue import load_data
from csrae_nb.config import Config, resolve
from csrae_nb.files import progress_bar
from csrae_nb.process import accelerator, cpu_threads
from csrae_nb.tasks import task_of
from csrae_nb.training import train_epoch
from csrae_nb.training import untrained as fresh

from .interleaved import Elsewhere, Work
from .pythae_models import like, trainer

STEPS, B, SHAPE, BEFORE = 16, 100, (28, 28), 64  # BEFORE: epochs before the clock starts


def images():
    "scikit-learn's digits as black and white images of MNIST's size; an epoch of them has STEPS steps."
    grey = torch.tensor(load_digits().images[:, None], dtype=torch.float32) / 16
    x = (interpolate(grey, SHAPE, mode="bilinear")[:, 0] > 0.5).float()
    return dict(x_train=x[: STEPS * B], x_val=x[STEPS * B :][:B], x_test=x[STEPS * B :])


def config(model, **fields):
    return resolve(
        Config(
            **dict(
                dataset="arrays",
                network="mlp",
                model=model,
                latent_dim=40,
                components=400,
                batch_size=B,
                warmup=0,
                likelihood="bernoulli",
            )
            | fields
        )
    )


def epoch(cfg, data, flush=True):
    "One epoch of ours as a function, and its model; flush: subnormal numbers are 0, as `fit` has it."
    with accelerator(cfg) as acc:
        model, opt = fresh(task_of(cfg), data, acc.device)
        net = acc.prepare(model)

    def run():
        with accelerator(cfg) as acc, cpu_threads(1), progress_bar(False) as bar:
            torch.set_flush_denormal(flush)
            train_epoch(task_of(cfg), acc, net, opt, data, 1, bar)

    return run, model


def epoch_of_pythae(model, x, epochs, tuned):
    "One epoch of pythae's trainer as a function, after some untimed ones; tuned: with what `fit` sets."
    theirs = trainer(like(model, SHAPE), x, tempfile.mkdtemp())

    def run():
        with cpu_threads(1) if tuned else nullcontext():
            theirs.train_step(1)

    for _ in range(epochs):
        run()
    return run


def matrix_products(model, K=0):
    """The products of matrices that a step cannot do without, forward, and for gradients of weights and of
    inputs; K: pseudo-inputs."""
    nets = [(model.encoder, B, True), (model.decoder, B, False), (model.encoder, K, False)]
    triples = [
        (torch.randn(rows, i), torch.randn(i, o), torch.randn(rows, o), of_images and n == 0)
        for net, rows, of_images in nets
        for n, (i, o) in enumerate(
            (m.in_features, m.out_features) for m in net.modules() if isinstance(m, Linear)
        )
        if rows
    ]

    def run():
        for _ in range(STEPS):
            for x, w, g, of_images in triples:
                x @ w
                x.T @ g
                if not of_images:  # whose gradient nobody asks for
                    g @ w.T

    return run


def works():
    data, kept = load_data(images(), "bernoulli"), "ours, subnormal numbers kept"
    for epochs, when in ((0, "first"), (BEFORE, f"after {BEFORE * STEPS:,}")):

        def prepared(model, flush=True, **fields):
            run, m = epoch(config(model, **fields), data, flush)
            untrained = deepcopy(m)
            for _ in range(epochs):
                run()
            return run, untrained

        def others(of, untrained, aim, *args, **fields):
            def elsewhere(tuned):
                return Elsewhere(epoch_of_pythae, untrained, data.x_train, epochs, tuned)

            theirs = {of: (elsewhere(False), aim), f"{of}, with our settings": (elsewhere(True), None)}
            return theirs | ({kept: (prepared(*args, flush=False, **fields)[0], None)} if epochs else {})

        vae, untrained = prepared("VAE")
        yield Work(
            f"{STEPS} training steps, {when}: VAE",
            vae,
            others("pythae", untrained, 1.5, "VAE")
            | {"matrix products alone": (matrix_products(untrained), 1 / 1.8)},
        )
        vamp, untrained = prepared("MixtureCSRAE", prior="vamp")
        yield Work(
            f"{STEPS} training steps, {when}: MixtureCSRAE vamp K=400",
            vamp,
            others("pythae's VAMP", untrained, 2.2, "MixtureCSRAE", prior="vamp")
            | {"matrix products alone": (matrix_products(untrained, 400), None)},
            rounds=7,
        )
        mog, _ = prepared("MixtureCSRAE")
        name = f"{STEPS} training steps, {when}: MixtureCSRAE mog K=400"
        yield Work(name, mog, {"our VAE": (vae, 1 / 3.2)})
        for queue, aim in ((0, 1), (1000, None)):
            matched, _ = prepared("MixtureCSRAE", prior_objective="aggregate", queue=queue)
            of = "prior by the aggregate" + (f", queue of {queue:,}" if queue else "")
            yield Work(f"{name}, {of}", matched, {"prior by each image": (mog, aim)})
