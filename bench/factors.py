"""`python -m bench.factors --csv FILE --keep FOLDER`: a matched prior whose Gaussians are stretched.

The priors of the book are mixtures of diagonal Gaussians. Here each covariance is a diagonal and R outer
products, diag(t²) + U Uᵀ with U (D, R), as of factor analysers, and the prior learns from D_CS to the
aggregate posterior of dynamic MNIST, in closed form: Eq. (5) asks for the inverse of a sum of covariances,
which for a pair of components is one of 2R × 2R. Rows are those of `bench.expost`: of the prior, of the
same after one step of EM with full covariances, and of a hundred such Gaussians fitted to the codes."""

import argparse
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from csrae_nb.catalogue import load_data
from csrae_nb.config import Config, resolve
from csrae_nb.evaluation import expost_mixture, write_table
from csrae_nb.mixtures import FullGMM
from csrae_nb.priors import full_em_step, kmeans
from csrae_nb.results import read_rows
from csrae_nb.tasks import make_model

from .expost import images_to_compare, measured

D, AFTER = 20, 3  # dimensions; epochs after which the prior starts from clusters of the codes
KEY = "components", "rank", "queue", "weight", "epochs", "seed", "source"


def eliminated(M: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (*B, R, R) and (*B, R)
    "log det M and vᵀ M⁻¹ v of small positive definite matrices, by Gaussian elimination of all at once."
    log_det = square = 0
    for _ in range(v.shape[-1]):
        pivot, below = M[..., :1, 0], M[..., 1:, 0]
        log_det, square = log_det + pivot[..., 0].log(), square + v[..., 0] ** 2 / pivot[..., 0]
        share = below / pivot
        v, M = v[..., 1:] - share * v[..., :1], M[..., 1:, 1:] - share[..., None] * below[..., None, :]
    return log_det, square


def log_density(d: Tensor, w: Tensor, M: Tensor, v: Tensor) -> Tensor:
    "log N(d | 0, W⁻¹ + U Uᵀ), of M = I + Uᵀ W U and v = Uᵀ W d."
    log_det, square = eliminated(M, v)
    return -0.5 * ((w * d * d).sum(-1) - square - w.log().sum(-1) + log_det + D * math.log(2 * math.pi))


def to_each(mu: Tensor, var: Tensor, nu: Tensor, t2: Tensor, U: Tensor) -> Tensor:  # (K, N)
    "log overlap of N diagonal Gaussians with each of K stretched ones."
    w, d = 1 / (var + t2[:, None]), mu - nu[:, None]  # (K, N, D)
    products = (U[..., :, None] * U[..., None, :]).flatten(2)  # (K, D, R²)
    M = (w @ products).unflatten(-1, U.shape[-1:] * 2) + torch.eye(U.shape[-1])
    return log_density(d, w, M, (w * d) @ U)


def of_pairs(logw: Tensor, nu: Tensor, t2: Tensor, U: Tensor) -> Tensor:
    "log ∫ p² of K stretched Gaussians, each pair once."
    i, j = torch.triu_indices(len(nu), len(nu))
    w, d, both = 1 / (t2[i] + t2[j]), nu[j] - nu[i], torch.cat([U[i], U[j]], -1)
    M = both.mT @ (w[..., None] * both) + torch.eye(both.shape[-1])
    z = log_density(d, w, M, ((w * d)[:, None] @ both)[:, 0])
    return (z + logw[i] + logw[j] + math.log(2) * (i != j)).logsumexp(0)


class Stretched(nn.Module):
    "K Gaussians of covariances diag(t²) + U Uᵀ and learned weights."

    def __init__(self, components: int, rank: int, generator: torch.Generator):
        super().__init__()
        self.mu = nn.Parameter(torch.randn(components, D, generator=generator))
        self.logvar = nn.Parameter(torch.zeros(components, D))
        self.U = nn.Parameter(0.1 * torch.randn(components, D, rank, generator=generator))
        self.logits = nn.Parameter(torch.zeros(components))

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.logits.log_softmax(-1), self.mu, self.logvar.exp(), self.U

    @torch.no_grad()
    def mixture(self) -> FullGMM:
        logw, mu, t2, U = self()
        return FullGMM(logw, mu, t2.diag_embed() + U @ U.mT)

    @torch.no_grad()
    def start(self, codes: Tensor, seed: int):
        "From clusters of the codes, and the axes along which each is longest."
        n, mu, _ = kmeans(codes, len(self.mu), seed)
        nearest, R = torch.cdist(codes, mu).argmin(1), self.U.shape[-1]
        for k in range(len(mu)):
            x = codes[nearest == k] - mu[k]
            cov = (x.T @ x + codes.var(0).diag()) / (len(x) + 1)
            values, axes = torch.linalg.eigh(cov)
            U = axes[:, -R:] * (values[-R:] - values[:-R].mean()).clamp_min(1e-6).sqrt()
            rest = cov.diagonal() - U.square().sum(1)
            self.mu[k], self.U[k] = mu[k], U
            self.logvar[k] = rest.maximum(1e-3 * cov.diagonal()).log()
        self.logits.copy_((n / len(codes) + 1e-6).log())


class Training:
    "An encoder, a decoder and a stretched prior, which learn together."

    def __init__(self, o, data):
        fields = dict(dataset="mnist", model="CSRAE", latent_dim=D, lam=o.weight, epochs=o.epochs)
        self.cfg, self.o = resolve(Config(**fields, seed=o.seed, ll_samples=0, fid_layer=0)), o
        torch.manual_seed(o.seed)
        self.g = torch.Generator().manual_seed(o.seed)
        self.model = make_model(self.cfg, data.x_train.shape[1:], data.likelihood)
        self.prior = Stretched(o.components, o.rank, self.g)
        parts = self.model.encoder, self.model.decoder, self.prior
        self.opt = torch.optim.Adam([p for m in parts for p in m.parameters()], lr=self.cfg.lr)
        self.queue = torch.empty(0, D), torch.empty(0, D)

    def draw(self, x):
        "Posteriors of binarised images, and a code of each."
        x = torch.bernoulli(x, generator=self.g)
        q = self.model.encode(x)
        mu, var = q.mu[:, 0], q.var[:, 0]
        return x, mu, var, mu + var.sqrt() * torch.randn(mu.shape, generator=self.g)

    @torch.no_grad()
    def codes(self, x):
        return torch.cat([self.draw(b)[-1] for b in x.split(1000)])

    def loss(self, x, weight):
        x, mu, var, z = self.draw(x)
        error = -self.model.likelihood.log_prob(x, self.model.decode(z))
        logw, *parts = self.prior()
        own = of_pairs(logw, *parts)
        # each posterior sees the prior as it is, and the prior sees all posteriors as they are
        to_prior = (to_each(mu, var, *(t.detach() for t in parts)) + logw.detach()[:, None]).logsumexp(0)
        entropy = -0.5 * (4 * math.pi * var).log().sum(-1)
        each = 0.5 * entropy + 0.5 * own.detach() - to_prior
        seen = [torch.cat(pair) for pair in zip((mu.detach(), var.detach()), self.queue)]
        self.queue = tuple(t[: self.o.queue] for t in seen)
        whole = (to_each(*seen, *parts) + logw[:, None]).logsumexp((0, 1)) - math.log(len(seen[0]))
        return (error + weight * each).mean() + 0.5 * own - whole

    def epoch(self, n, x_train):
        weight, B = self.o.weight * min(1, n / self.cfg.warmup), self.cfg.batch_size
        if n == AFTER + 1:
            self.prior.start(self.codes(x_train), self.o.seed)
        order = torch.randperm(len(x_train), generator=self.g)
        for rows in order[: len(order) // B * B].split(B):
            self.opt.zero_grad()
            self.loss(x_train[rows], weight).backward()
            self.opt.step()


def parsed():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    of = dict(components=100, rank=4, queue=0, weight=0.5, epochs=30, seed=0)
    for name, value in of.items():
        p.add_argument(f"--{name}", type=type(value), default=value, help=f"({value})")
    p.add_argument("--csv", type=Path, required=True, help="the table")
    p.add_argument("--keep", type=Path, required=True, help="a folder for the weights, found again there")
    return p.parse_args()


def trained(o, data):
    "The training, finished now or before."
    t = Training(o, data)
    path = o.keep / f"factors_{'_'.join(str(getattr(o, k)) for k in KEY[:-1])}.pt"
    parts = dict(model=t.model, prior=t.prior)
    if path.exists():
        for k, state in torch.load(path).items():
            parts[k].load_state_dict(state)
        return t
    for n in tqdm(range(1, o.epochs + 1)):
        t.epoch(n, data.x_train)
    o.keep.mkdir(parents=True, exist_ok=True)
    torch.save({k: m.state_dict() for k, m in parts.items()}, path)
    return t


def main():
    o, data = parsed(), load_data("mnist")
    torch.set_num_threads(1)
    t = trained(o, data)
    t.model.eval()
    codes, val = t.codes(data.x_train), t.codes(data.x_val)
    prior, run = t.prior.mixture(), SimpleNamespace(model=t.model, cfg=t.cfg)
    fitted = dict(prior=prior, em=full_em_step(prior, codes))
    fitted["full"] = expost_mixture(codes, 100, o.seed, full=True)
    rows = [r for r in read_rows(o.csv, KEY) if any(r[k] != getattr(o, k) for k in KEY[:-1])]
    against = images_to_compare(data)
    for source, p in fitted.items():
        row = {k: getattr(o, k, source) for k in KEY} | dict(log_density=p.log_prob(val).mean().item())
        rows.append(row | measured(run, p, *against))
    write_table(o.csv, rows)


if __name__ == "__main__":
    main()
