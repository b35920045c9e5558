"""What people write with this package, for a type checker: each name is known, each call fits its signature,
and nothing that comes out is Any. test_types.py has it checked; it is never run."""

from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from torch import Tensor

from csrae_nb import CSRAE, GMM, MixtureCSRAE, MoGPrior, StandardNormal, VampPrior
from csrae_nb import Config, CSRAEEmbedding, FullGMM, Pretrained
from csrae_nb import cs_divergence, fit, kl_divergence, load_data, load_run
from csrae_nb.data import Dataset
from csrae_nb.evaluation import evaluate
from csrae_nb.likelihoods import Bernoulli
from csrae_nb.models import Autoencoder, BatchTerm, Terms, Weight
from csrae_nb.networks import make_networks
from csrae_nb.runs import Run

# mixtures and their divergence
p = GMM.mixture(weights=torch.tensor([0.5, 0.5]), mu=torch.tensor([[-3.0], [3.0]]), var=torch.ones(2, 1))
q = GMM.gaussian(torch.zeros(8, 1), torch.ones(8, 1))
assert_type(cs_divergence(q, p), Tensor)
assert_type(kl_divergence(q, q), Tensor)
assert_type(q.rsample(), Tensor)
assert_type(p.sample(10), Tensor)
assert_type(p.log_prob(p.sample(10)), Tensor)
assert_type(p.responsibilities(q.mean), Tensor)
assert_type(q.aggregate(), GMM)
assert_type(FullGMM.of(p).sample(3), Tensor)

# a model of one's own networks
encoder, decoder = make_networks("mlp", (28, 28), 10, 1)
prior = MoGPrior(20, 10)
model = MixtureCSRAE(encoder, decoder, prior, Bernoulli(), lam=2.0)
plain = CSRAE(encoder, decoder, StandardNormal(10), Bernoulli(), lam=Weight(1.0, warmup=10))
vamp = MixtureCSRAE(encoder, decoder, VampPrior(encoder, torch.rand(20, 28, 28)), Bernoulli())
x = torch.rand(100, 28, 28).round()
terms = model.loss(x)
assert_type(terms, Terms)
assert_type(terms.loss, Tensor)
assert_type(terms.reconstruction, Tensor)
assert_type(terms.means()["divergence"], Tensor)
terms.loss.backward()
plain.begin(1)
assert_type(model.encode(x), GMM)
assert_type(vamp.encode(x).mean, Tensor)
assert_type(model.decode(torch.zeros(3, 10)), Tensor)
assert_type(model.sample(16), Tensor)
assert_type(model.reconstruct(x), Tensor)
assert_type(model.log_likelihood(x, samples=10), Tensor)
assert_type(prior.refit(torch.zeros(100, 10)), GMM | FullGMM)


class Spread(BatchTerm):
    def forward(self, q: GMM, p: GMM) -> Tensor:
        return q.mean.var(-2).mean(-1)


model.batch_terms["spread"] = Spread()

# runs
cfg = Config(dataset="digits", model="MixtureCSRAE", components=10, epochs=2)
data = load_data("digits")
assert_type(data, Dataset)
run = fit(cfg, data, progress=False)
assert_type(run, Run)
assert_type(run.path, Path)
assert_type(run.model, Autoencoder)
assert_type(run.model.sample(16), Tensor)
assert_type(load_run(run.path), Run)
evaluate(run, data)

# an estimator, and a model to share
X = np.random.default_rng(0).normal(size=(200, 13))
codes = CSRAEEmbedding(latent_dim=2).fit_transform(X)
estimator = CSRAEEmbedding(latent_dim=2, components=5).fit(X)
labels = estimator.predict(X)
rows, which = estimator.sample(10)
shared: Pretrained = Pretrained.from_pretrained(run.path)
assert_type(shared.model, Autoencoder)
