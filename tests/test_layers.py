"Two layers: every model learns with them, goes on where it stopped, and is measured; or is refused."

import copy
import math
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

from bench import neighbours
from csrae_nb import Config, CSRAEEmbedding, load_run
from csrae_nb.catalogue import load_data
from csrae_nb.config import command, make_config, resolve, run_name
from csrae_nb.divergence import cs_divergence, kl_divergence
from csrae_nb.evaluation import _row_key, complete_run, evaluate, results_table
from csrae_nb.files import runs_folder
from csrae_nb.fleet import fit_fleet, fleets
from csrae_nb.layers import Lower, TwoLayers, layered_networks, two_layers
from csrae_nb.likelihoods import Bernoulli, Gaussian
from csrae_nb.mixtures import GMM
from csrae_nb.models import CSRAE, IWAE, VAE, MixtureCSRAE, VampPriorVAE
from csrae_nb.networks import NETWORKS
from csrae_nb.priors import MoGPrior, StandardNormal, VampPrior
from csrae_nb.rivals import RAE, WAE
from csrae_nb.runs import fit
from csrae_nb.results import merge
from csrae_nb.tasks import mean_terms, task_of
from csrae_nb.trained import encode_examples, read_examples

from small_runs import ROWS, TINY, differences, stopped_after_two_epochs, tiny

FIELDS = dict(epochs=3, warmup=1, layers=2, lower_dim=3)


def config(name, **fields):
    return Config(**TINY | FIELDS | fields, name=name)


def trained(name, **fields):
    return tiny(name, **FIELDS | fields)


def model(kind=CSRAE, prior=None, skip=False, **options):
    g = torch.Generator().manual_seed(0)
    encoder, decoder, lower = layered_networks("mlp", (3, 3), 2, 3, 1, g, skip)
    if prior == "vamp":
        prior = VampPrior(encoder, torch.rand(4, 3, 3, generator=g))
    prior = MoGPrior(5, 2, generator=g) if prior == "mog" else prior or StandardNormal(2)
    return two_layers(kind)(encoder, decoder, prior, Bernoulli(), lower=lower, **options)


def images(n=6):
    return torch.randint(2, (n, 3, 3), generator=torch.Generator().manual_seed(1)).float()


MODELS = [(VAE, None), (VampPriorVAE, "vamp"), (CSRAE, None), (MixtureCSRAE, "mog"), (MixtureCSRAE, "vamp")]
of_models = pytest.mark.parametrize("kind, prior", MODELS, ids=lambda v: getattr(v, "__name__", v))
with_skip = pytest.mark.parametrize("skip", [False, True], ids=["chain", "skip"])


# --- the loss


@with_skip
@of_models
def test_the_terms_are_those_of_both_layers(kind, prior, skip):
    m, x = model(kind, prior, skip, lam=2.0, lower_weight=3.0), images()
    terms = m.loss(x, torch.Generator().manual_seed(0))
    g, q = torch.Generator().manual_seed(0), m.encode(x)
    z = q.rsample(g)
    lower, given = m.encode_lower(x, z), m.lower.prior(z)
    z1 = lower.rsample(g)
    D = cs_divergence if issubclass(kind, CSRAE) else lambda a, b: kl_divergence(a, b, z)
    known = dict(
        reconstruction=-m.likelihood.log_prob(x, m.decoder(torch.cat([z1, z], 1) if skip else z1)),
        divergence=D(q, m.prior()),
        divergence_lower=D(lower, given),
    )
    for k, v in known.items():
        torch.testing.assert_close(terms.each[k], v, msg=k)
    total = known["reconstruction"] + 2 * known["divergence"] + 3 * known["divergence_lower"]
    torch.testing.assert_close(terms.loss, total.mean())
    terms.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


@with_skip
def test_the_kl_has_a_chain_rule(skip):
    "log p(x, z₁, z₂) − log q(z₁, z₂|x), in the mean over draws, is minus the loss with weights 1."
    m, x, g = model(VAE, skip=skip).double(), images(2).double(), torch.Generator().manual_seed(0)
    many = x.repeat_interleave(20_000, 0)
    with torch.no_grad():
        loss = sum(m.loss(many, g).each.values()).view(2, -1).mean(1)
        rec, ratio = m.log_weights(x, m.encode(x), m.prior().log_prob, 20_000, g)
    torch.testing.assert_close(-(rec + ratio).mean(0), loss, rtol=0, atol=0.03)


class Of(torch.nn.Module):
    "A Gaussian whose mean and variance are functions of the input."

    def __init__(self, mean, var):
        super().__init__()
        self.mean, self.var = mean, var

    def forward(self, z):
        return GMM.gaussian(self.mean(z), self.var(z))


class Curved(torch.nn.Module):
    "x ~ N(sin z₁ + ½ z₂, ½), as a Gaussian likelihood is given it."

    def forward(self, z):
        mean = z[:, :1].sin() + (0.5 * z[:, 1:] if z.shape[1] > 1 else 0)
        return torch.stack([mean, torch.full_like(mean, math.log(0.5))], 1)


@with_skip
def test_the_log_likelihood_against_quadrature(skip):
    "Of networks that are not linear, one dimension each."
    wide = lambda h: torch.full_like(h[:, :1], 4.0)
    posterior = Of(lambda h: 0.2 * h[:, :1], wide)
    lower = Lower(Of(lambda h: 0.1 * h[:, :1], wide), Of(torch.tanh, lambda z: 0.1 + z**2 / 9), skip)
    prior = MoGPrior(3, 1, generator=torch.Generator().manual_seed(0))
    m = two_layers(MixtureCSRAE)(posterior, Curved(), prior, Gaussian(min_var=0.0), lower=lower)
    x, z = torch.tensor([[-1.0], [0.3], [2.0]]), torch.linspace(-9, 9, 901)[:, None]
    with torch.no_grad():
        p1 = lower.prior(z)
        below = torch.distributions.Normal(p1.mu[:, 0], p1.var[:, 0].sqrt()).log_prob(z.T)  # of z₁ given z₂
        upper = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=prior().logw),
            torch.distributions.Normal(prior().mu[:, 0], prior().var[:, 0].sqrt()),
        ).log_prob(z)
        mean = z.T.sin() + (0.5 * z if skip else 0 * z)  # (z₂, z₁)
        given = torch.distributions.Normal(mean, math.sqrt(0.5)).log_prob(x[:, :, None])
        exact = (given + below + upper).flatten(1).logsumexp(1) + 2 * math.log(18 / 900)
    estimate = m.log_likelihood(x, 200_000, torch.Generator().manual_seed(1))
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.02)


@with_skip
def test_more_draws_at_once_are_the_same_estimate(skip):
    m, x = model(skip=skip), images()
    a, b = (m.log_likelihood(x, 3000, torch.Generator().manual_seed(s), rows=500) for s in range(2))
    torch.testing.assert_close(a, b, rtol=0, atol=0.1)
    few = torch.stack([m.log_likelihood(x, 1, torch.Generator().manual_seed(s)) for s in range(200)])
    assert few.mean() < a.mean()


def test_samples_draw_the_lower_code_and_decode_takes_its_mean():
    m = model(MixtureCSRAE, "mog")
    z = m.prior().sample(1, torch.Generator().manual_seed(0)).expand(500, -1)
    with torch.no_grad():
        at_mean, drawn = m.decode(z), m.drawn(z, torch.Generator().manual_seed(1))
    assert at_mean.std(0).max() < 1e-5 < 0.01 < drawn.std(0).max()
    one = GMM.gaussian(z[:1], torch.full_like(z[:1], 1e-12))
    held = GMM(one.logw[0], one.mu[0], one.var[0])
    x = m.sample(500, torch.Generator().manual_seed(2), prior=held)
    torch.testing.assert_close(x.mean(0), drawn[:, 0].sigmoid().mean(0), rtol=0, atol=0.05)


# --- torch.func; models, and torch.compile, in test_transforms


@with_skip
@of_models
def test_the_lower_divergence_of_each_image_alone(kind, prior, skip):
    m, x = model(kind, prior, skip), images()

    def of_one(x, z):  # without a draw: vmap has no generators
        return m.divergence(*m.lower(x[None], z[None]), z[None])[0]

    z = m.encode(x).mean.detach()
    each = vmap(grad(of_one, argnums=1))(x, z)
    at = z.clone().requires_grad_()
    (known,) = torch.autograd.grad(m.divergence(*m.lower(x, at), at).sum(), at)
    torch.testing.assert_close(each, known, rtol=1e-5, atol=1e-5)


# --- runs


@with_skip
@pytest.mark.parametrize("name", ["VAE", "MixtureVAE", "VampPriorVAE", "CSRAE", "MixtureCSRAE"])
def test_every_model_learns_and_comes_back(name, skip, own_runs):
    run = trained("run", model=name, skip=skip)
    again = load_run(run.path)
    assert isinstance(again.model, TwoLayers) and not any(differences(run, again).values())
    x = torch.from_numpy(ROWS)
    assert (again.model.encode(x).mu.shape[-1], again.model.encode_lower(x).mu.shape[-1]) == (2, 3)
    first, last = run.history[0], run.history[-1]
    assert last["train_reconstruction"] < first["train_reconstruction"] + 0.1
    for row in run.history:
        parts = [row[f"val_{k}"] for k in ("reconstruction", "divergence", "divergence_lower")]
        assert row["criterion"] == pytest.approx(sum(parts))
    assert torch.isfinite(run.model.log_likelihood(x[:5], 20)).all()


@pytest.mark.parametrize("more", [dict(), dict(prior_objective="aggregate", queue=10), dict(skip=True)])
def test_it_goes_on_where_it_was_stopped(more, own_runs, monkeypatch):
    *_, off = stopped_after_two_epochs(monkeypatch, **FIELDS | more)
    assert not any(off.values())


def test_the_epoch_that_is_kept_is_best_by_both_weights(own_runs):
    run = trained("run", lam=2.0, lower_weight=0.5, model="CSRAE")
    scores = [
        r["val_reconstruction"] + 2 * r["val_divergence"] + 0.5 * r["val_divergence_lower"]
        for r in run.history
    ]
    assert run.best_epoch == 1 + int(np.argmin(scores))


def test_it_is_evaluated_with_both_codes(own_runs):
    run = trained("run", ll_samples=10, fid_layer=0)
    labelled = load_data(dict(x=ROWS, y=(ROWS[:, 0] > 0).astype(int)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(replace(run, sha256=labelled.sha256), labelled, progress=False)
    assert np.isfinite(found["log_likelihood"]) and np.isfinite(found["divergence_lower"])
    assert 0 <= found["knn3_lower"] <= 100 and 0 <= found["active_units_lower"] <= 3


def test_rows_of_tables_say_it(own_runs):
    usual = dict(dataset="digits", epochs=1, warmup=0, ll_samples=0, fid_layer=0, expost_components=2)
    configs = [Config(**usual, latent_dim=3, **more) for more in ({}, dict(layers=2, lower_weight=2.0))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for c in configs:
            complete_run(c, progress=False)
    one, two = results_table([runs_folder() / run_name(c) for c in configs])
    assert not one["settings"] and two["settings"] == "layers=2 lower_dim=3 lower_weight=2.0"
    assert one["divergence_lower_mean"] is None and two["divergence_lower_mean"] > 0


def test_names_commands_and_fleets(own_runs):
    assert run_name(Config(layers=1)) == run_name(Config())
    two = Config(layers=2)
    assert run_name(two) == run_name(Config(layers=2, lower_dim=resolve(Config()).latent_dim))
    assert len({run_name(c) for c in (Config(), two, Config(layers=2, skip=True))}) == 3
    assert command(Config(layers=2, skip=True)) == "papermill nbs/train.ipynb -p layers 2 -p skip True"
    configs = [config(f"seed{s}", seed=s) for s in range(2)]
    assert fleets(configs) == [list(map(resolve, configs))]
    alone = [fit(replace(c, name=f"{c.name}alone"), dict(x=ROWS), progress=False) for c in configs]
    for a, b in zip(alone, fit_fleet(configs, dict(x=ROWS), progress=False), strict=True):
        assert b.history[-1] == pytest.approx(a.history[-1], rel=1e-3)


def test_an_estimator_takes_two(own_runs):
    est = CSRAEEmbedding(
        latent_dim=2, epochs=2, batch_size=20, random_state=0, config=dict(layers=2, lower_dim=3)
    )
    z = est.fit(ROWS).transform(ROWS)
    assert z.shape == (120, 2) and est.inverse_transform(z).shape == ROWS.shape


@pytest.mark.parametrize("network", [k for k, row in NETWORKS.items() if row.pair])
def test_networks_with_skip(network):
    g = torch.Generator().manual_seed(0)
    encoder, decoder, lower = layered_networks(network, (4, 4), 2, 3, 2, g, True)
    z = encoder(torch.zeros(5, 4, 4)).mean
    q, p = lower(torch.zeros(5, 4, 4), z)
    assert q.mu.shape == p.mu.shape == (5, 1, 3)
    assert decoder(lower.seen(q.mean, z)).shape == (5, 2, 4, 4)
    other = lower(torch.zeros(5, 4, 4), z + 1)[0]
    assert (other.mu - q.mu).abs().min() > 0  # q(z₁) sees z₂


def test_networks_of_images():
    cfg = resolve(
        make_config(dict(dataset="arrays", network="residual", layers=2, latent_dim=3, components=2))
    )
    about = dict(x_shape=(3, 8, 8), likelihood="discretized_logistic")
    m = task_of(cfg).make_model(about)
    assert m.sample(2).shape == (2, 3, 8, 8)


def test_a_collapsed_upper_code_is_named(own_runs):
    with pytest.warns(UserWarning, match="no dimension of z₂ is active: all is left to z₁"):
        trained("run", model="CSRAE", epochs=10, lam=1000.0, lr=0.02)


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(layers=3), "unknown layers 3; expected one of 1, 2"),
        (dict(layers=1), "lower_dim=3 is for layers=2"),
        (dict(lower_dim=0), "lower_dim=0; expected at least 1"),
        (dict(lower_weight=-1.0), "lower_weight=-1.0; expected at least 0"),
        (dict(model="IWAE"), "not for IWAE; layers=1"),
        (dict(model="WAE"), "not for WAE"),
        (dict(model="RAE"), "not for RAE"),
        (dict(labels=10), "without labels"),
        (dict(model="Supervised", labels=10), "without labels"),
        (dict(posterior_components=2), "posterior_components=2 is for models of one layer"),
        (dict(constraint="divergence<=2"), "constraint='divergence<=2' is for models of one layer"),
        (dict(objective="paper_eq21"), "objective='paper_eq21' is for models of one layer"),
        (dict(skip=True, network="residual"), "skip=True takes fully connected networks"),
    ],
)
def test_what_cannot_be_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        config("none", **fields)


@pytest.mark.parametrize("kind", [IWAE, WAE, RAE])
def test_models_with_a_loss_of_their_own_have_one_layer(kind):
    with pytest.raises(ValueError, match=f"not for {kind.__name__}"):
        two_layers(kind)


def test_labels_of_static_images_are_those_of_the_images_they_were_drawn_from(monkeypatch):
    g = np.random.default_rng(0)
    grey = g.integers(0, 256, (30, 28, 28), dtype=np.uint8) * (g.random((30, 28, 28)) < 0.3)
    y = g.integers(0, 10, 30).astype(np.uint8)
    files = {"train-images-idx3-ubyte": (grey, {}), "train-labels-idx1-ubyte": (y, {})}
    monkeypatch.setattr(neighbours, "read_file", files.__getitem__)
    order = g.permutation(30)
    x = torch.tensor(g.random((30, 28, 28)) < grey[order] / 255).float()
    assert neighbours.labels_of(x, "train").tolist() == y[order].tolist()
    with pytest.raises(ValueError, match="2 images of 30 were drawn from none of MNIST's train"):
        neighbours.labels_of(torch.cat([x[:28], 1 - x[28:]]), "train")


def test_rows_say_a_network_that_is_not_the_data_sets_own():
    rows = [_row_key(resolve(Config(dataset="digits", network=n))) for n in (None, "mlp", "gated", "wide")]
    assert [r["network"] for r in rows] == [None, None, "gated", "wide"]
    seeds = [r | dict(seeds="0", lam=1.0) for r in rows]
    assert len(merge(seeds)) == 3  # and are not joined with others


def test_a_table_says_it_too_and_keeps_no_column_that_nothing_fills(own_runs):
    usual = dict(dataset="digits", model="VAE", epochs=1, ll_samples=0)
    folders = []
    for network in ("mlp", "gated"):
        complete_run(cfg := Config(**usual, network=network), progress=False)
        folders.append(runs_folder() / run_name(cfg))
    assert [r["network"] for r in results_table(folders)] == [None, "gated"]
    assert not {"network", "fold", "labels", "settings"} & results_table(folders[:1])[0].keys()


def test_an_estimator_knows_both_layers():
    "Its densities are the model's, and its score has both divergences."
    x = np.random.default_rng(0).normal(size=(100, 4))
    est = CSRAEEmbedding(latent_dim=2, epochs=3, components=3, random_state=0, config=dict(layers=2)).fit(x)
    seen = torch.from_numpy(est.scaler_.transform(x))
    scale = np.log(est.scaler_.scale_).sum()
    known = est.model_.log_likelihood(seen, 4096, torch.Generator().manual_seed(0)).numpy() - scale
    assert np.abs(est.score_samples(x, 4096) - known).mean() < 0.1
    terms = mean_terms(est.model_, seen, torch.Generator().manual_seed(0))
    parts = terms["reconstruction"] + terms["divergence"] + terms["divergence_lower"]
    assert est.score(x) == pytest.approx(-parts - scale, abs=0.3)


def test_two_layers_go_through_a_pickle():
    est = CSRAEEmbedding(epochs=1, components=5, random_state=0, config=dict(layers=2)).fit(ROWS)
    again = pickle.loads(pickle.dumps(est))
    assert np.array_equal(again.transform(ROWS), est.transform(ROWS))
    assert type(again.model_) is type(est.model_) is type(copy.deepcopy(est.model_))


def test_a_table_of_examples_has_the_reconstruction_of_the_model(own_runs):
    run = trained("told")
    x = torch.from_numpy(ROWS[:9])
    (block,) = encode_examples(run, read_examples(run, ROWS[:9]), progress=False)
    shown = run.model.reconstruct(x)  # of Bernoulli's, the means
    known = -(x * shown.log() + (1 - x) * (1 - shown).log()).sum(1)
    assert block["reconstruction"] == pytest.approx(known.tolist(), rel=1e-4)
    parts = np.array([block[k] for k in ("reconstruction", "divergence", "divergence_lower")])
    assert (parts > 0).all() and block["unusual"] == pytest.approx(parts.sum(0).tolist(), rel=1e-5)


def test_a_class_that_is_mixed_by_hand_has_the_same_log_likelihood():
    made, x = model(VAE), images()
    own = type("Mine", (TwoLayers, VAE), {})(
        made.encoder, made.decoder, made.prior, made.likelihood, lower=made.lower
    )
    both = (m.log_likelihood(x, 50, torch.Generator().manual_seed(0)) for m in (own, made))
    assert torch.equal(*both)
