"Training steps: ours as `fit` makes them, pythae's as its trainer makes them, and the bare matrix products."
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from torch.nn import Linear

from csrae_nb.data import load_data
from csrae_nb.training import Config, _accelerator, _untrained, progress_bar, resolve, train_epoch

from .interleaved import Work
from .pythae_models import like, trainer

STEPS, B, SHAPE = 20, 100, (28, 28)


def images():
    "Sparse binary images, as many as an epoch of STEPS steps takes."
    g = torch.Generator().manual_seed(0)
    return dict(zip(("x_train", "x_val", "x_test"), ((torch.rand(n, *SHAPE, generator=g) < .13).float() for n in (STEPS*B, B, B))))


def config(model, **fields):
    return resolve(Config(**dict(dataset="arrays", network="mlp", model=model, latent_dim=40, components=400, batch_size=B, warmup=0, likelihood="bernoulli") | fields))


def epoch(cfg, data):
    "One epoch of ours as a function, and the model it trains."
    acc = _accelerator(cfg); model, opt = _untrained(cfg, data, acc.device); net = acc.prepare(model)
    def run():
        with progress_bar(False) as bar: train_epoch(acc, net, opt, data, cfg, 1, Path(), bar)
    return run, model


def matrix_products(model):
    "The products of matrices that a step cannot do without: forward, and gradients of weights and of inputs."
    sizes = [(m.in_features, m.out_features) for net in (model.encoder, model.decoder) for m in net.modules() if isinstance(m, Linear)]
    triples = [(torch.randn(B, i), torch.randn(i, o), torch.randn(B, o), n == 0) for n, (i, o) in enumerate(sizes)]
    def run():
        for _ in range(STEPS):
            for x, w, g, first in triples:
                x @ w; x.T @ g
                if not first: g @ w.T                                  # nobody asks for the gradient of the images
    return run


def works():
    data, folder = load_data(images(), "bernoulli"), tempfile.mkdtemp()
    vae, of_vae = epoch(config("VAE"), data)
    theirs = trainer(like(deepcopy(of_vae), SHAPE), data.x_train, folder)
    yield Work(f"{STEPS} training steps, VAE", vae, {"pythae": (lambda: theirs.train_step(1), 1.5), "matrix products alone": (matrix_products(of_vae), 1/1.8)})
    vamp, of_vamp = epoch(config("MixtureCSRAE", prior="vamp"), data)
    theirs_vamp = trainer(like(deepcopy(of_vamp), SHAPE), data.x_train, folder)
    yield Work(f"{STEPS} training steps, MixtureCSRAE vamp K=400", vamp, {"pythae's VAMP": (lambda: theirs_vamp.train_step(1), 2.2)}, rounds=7)
    mog, _ = epoch(config("MixtureCSRAE"), data)
    yield Work(f"{STEPS} training steps, MixtureCSRAE mog K=400", mog, {"our VAE": (vae, 1/3.2)})
