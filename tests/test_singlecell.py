"SCVI with a mixture prior, in scvi-tools' own training plan."

import logging
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal

if find_spec("scvi") is None:
    pytest.skip("scvi-tools is not installed: pip install 'csrae_nb[singlecell]'", allow_module_level=True)

from csrae_nb import singlecell as sc
from csrae_nb.divergence import cs_divergence
from csrae_nb.mixtures import GMM

import scvi
from scvi.module.base import MogPrior
from scvi.train._trainingplans import _compute_kl_weight

pytestmark = pytest.mark.filterwarnings("ignore")
CELLS = sc.draw_cells(200, types=3, batches=2, genes=40)
SMALL = dict(n_latent=3, n_hidden=16, components=4)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    for name in ("lightning.pytorch", "lightning.fabric", "scvi"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)


def make(kind=sc.MixtureSCVI, cells=CELLS, seed=0, **kw):
    scvi.settings.seed = seed
    kind.setup_anndata(cells, batch_key="batch")
    return kind(cells, **{**SMALL, **kw})


def train(model, epochs=4, plan=None, **kw):
    quiet = dict(accelerator="cpu", enable_progress_bar=False, check_val_every_n_epoch=1)
    model.train(epochs, plan_kwargs=dict(n_epochs_kl_warmup=2) | (plan or {}), **quiet, **kw)
    return model


def batch(model, cells=CELLS, n=50):
    return next(iter(model._make_data_loader(cells, batch_size=n)))


def outputs(module, tensors, seed=0, **kw):
    "Posteriors and loss of a batch, in eval mode."
    torch.manual_seed(seed)
    inference, _, out = module.eval()(tensors, loss_kwargs=kw)
    return inference["qz"], out


@pytest.fixture(scope="module")
def trained():
    return train(make(), 10, batch_size=50)


# --- the term


def densities(module, qz):
    "q of each cell and p on a grid of one dimension, and its step; by torch.distributions."
    at = torch.linspace(-15, 15, 30_001, dtype=torch.float64)
    p = module.prior().detach()
    parts = Normal(p.mu.double(), p.var.double().sqrt()).log_prob(at) + p.logw.double()[:, None]
    q = Normal(qz.loc.double(), qz.scale.double()).log_prob(at).exp()
    return q, parts.exp().sum(0), 0.001


def test_the_divergence_of_each_cell_is_what_a_grid_says():
    model = make(n_latent=1, components=3)
    qz, out = outputs(model.module, batch(model))
    with torch.no_grad():
        q, p, h = densities(model.module, qz)
        overlap, of_q, of_p = ((a * b).sum(-1) * h for a, b in ((q, p), (q, q), (p, p)))
        expected = -overlap.log() + of_q.log() / 2 + of_p.log() / 2
        ours = out.kl_local["kl_divergence_z"].double()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        with_library = cs_divergence(GMM.gaussian(qz.loc, qz.scale**2), model.module.prior())
        torch.testing.assert_close(ours.float(), with_library)
    assert ours.std() > 0.01


def test_the_estimates_have_the_kl_of_the_grid_as_their_mean():
    many = make(sc.SampledSCVI, n_latent=1, components=3, kl_samples=2000)
    tensors = batch(many, n=20)
    with torch.no_grad():
        qz, out = outputs(many.module, tensors)
        q, p, h = densities(many.module, qz)
        expected = (q * (q.clamp_min(1e-300).log() - p.log())).sum(-1) * h
        found = out.kl_local["kl_divergence_z"].double()
        assert (found - expected).abs().max() < 0.1
        many.module.kl_samples, z = 1, qz.sample()
        of_z = many.module.divergence(GMM.gaussian(qz.loc, qz.scale**2), many.module.prior(), z)
        at = many.module.prior().to_distribution().log_prob(z)
        torch.testing.assert_close(of_z, qz.log_prob(z).sum(-1) - at, rtol=1e-4, atol=1e-4)


def test_the_estimate_is_that_of_scvi():
    module, theirs = make(sc.SampledSCVI, kl_samples=30).module, MogPrior(4, 3)
    with torch.no_grad():
        theirs.prior_means.copy_(module.prior.mu)
        theirs.prior_log_scales.copy_(module.prior.logvar / 2)
        qz, q = (d := Normal(torch.randn(5, 3), torch.rand(5, 3) + 0.1)), GMM.gaussian(d.loc, d.scale**2)
        torch.manual_seed(1)
        expected = theirs.kl(qz)
        torch.manual_seed(1)
        found = module.divergence(q, module.prior(), None)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # their σ have 1e-4 added


def test_only_the_divergence_is_exchanged():
    "With SCVI's own weights the reconstruction is SCVI's, and so is the learned size of cells."
    ours = make(use_observed_lib_size=False)
    sc.SCVI.setup_anndata(CELLS, batch_key="batch")
    theirs = sc.SCVI(CELLS, n_latent=3, n_hidden=16, use_observed_lib_size=False)
    theirs.module.load_state_dict(ours.module.state_dict(), strict=False)
    tensors = batch(ours)
    (_, a), (_, b) = outputs(ours.module, tensors), outputs(theirs.module, tensors)
    torch.testing.assert_close(a.reconstruction_loss_sum, b.reconstruction_loss_sum)
    size = "kl_divergence_l"
    torch.testing.assert_close(a.kl_local[size], b.kl_local[size])
    assert a.kl_local[size].mean() > 0 and set(a.kl_local) == set(b.kl_local)
    change = (a.kl_local["kl_divergence_z"] - b.kl_local["kl_divergence_z"]).mean()
    torch.testing.assert_close(a.loss - b.loss, change, rtol=1e-3, atol=1e-3)
    assert change.abs() > 0.1


# --- training


def test_the_loss_decreases_and_components_are_placed(trained):
    loss = trained.history["elbo_train"].iloc[:, 0]
    assert loss.iloc[-1] < 0.98 * loss.iloc[0] and trained.module.placed
    at_random = make().module.prior
    assert not torch.allclose(trained.module.prior.logits, at_random.logits, atol=0.01)
    assert {"kl_local_train", "kl_local_validation", "kl_weight"} <= set(trained.history)


def test_the_plans_warm_up_weighs_the_term(monkeypatch):
    seen = []
    theirs = sc.MixtureModule.loss

    def spied(self, tensors, inference_outputs, generative_outputs, kl_weight=1.0):
        out = theirs(self, tensors, inference_outputs, generative_outputs, kl_weight=kl_weight)
        if self.training:
            plain = out.reconstruction_loss["reconstruction_loss"].mean()
            weighed = out.loss - plain
            seen.append((float(kl_weight), weighed.item(), out.kl_local["kl_divergence_z"].mean().item()))
        return out

    monkeypatch.setattr(sc.MixtureModule, "loss", spied)
    train(make(), 4, dict(n_epochs_kl_warmup=2, max_kl_weight=3.0), batch_size=90)
    expected = [_compute_kl_weight(e, 0, 2, None, 3.0, 0.0) for e in range(4) for _ in range(2)]
    assert [w for w, *_ in seen] == pytest.approx(expected) and {0.0, 1.5, 3.0} == set(expected)
    for weight, weighed, term in seen:
        assert weighed == pytest.approx(weight * term, abs=2e-3) and term > 0.1


def gradients(module, loss):
    "Whether a number has a gradient for the encoder, and for the prior."
    ends = [module.z_encoder.mean_encoder.weight, module.prior.mu]
    return [g is not None and bool(g.any()) for g in torch.autograd.grad(loss, ends, allow_unused=True)]


def test_who_learns_from_what():
    model = make()
    for weight, expected in ((0.0, [True, False]), (1.0, [True, True])):
        assert (
            gradients(model.module, outputs(model.module, batch(model), kl_weight=weight)[1].loss) == expected
        )
    model = make(prior_objective="aggregate", queue=100)
    _, out = outputs(model.module.train(), batch(model), kl_weight=0.0)
    term = out.extra_metrics["aggregate"]
    assert gradients(model.module, out.kl_local["kl_divergence_z"].sum()) == [True, False]
    _, out = outputs(model.module, batch(model))
    assert gradients(model.module, out.extra_metrics["aggregate"]) == [False, True] and term.isfinite()


def test_the_aggregate_trains_in_their_plan():
    model = train(make(prior_objective="aggregate", queue=100))
    assert model.history["aggregate_validation"].notna().all().all() and model.module.placed
    assert model.module.aggregate.logits.gt(-1).sum() == 100  # the queue has filled


def test_components_are_placed_once():
    model = train(make(), kmeans_at=0.5)
    before = model.module.prior.mu.clone()
    train(model, 1, dict(lr=0.0), kmeans_at=0.0)
    assert model.module.prior.mu.equal(before)
    assert not train(make(), 4, callbacks=[], early_stopping=False, kmeans_at=0.0).module.prior.mu.equal(
        before
    )


def test_own_callbacks_are_called_too():
    seen = []

    class Mine(sc.Callback):
        def on_train_epoch_end(self, trainer, plan):
            seen.append(trainer.current_epoch)

    assert train(make(), 2, callbacks=[Mine()]).module.placed and seen == [0, 1]


# --- what a model is used for


@pytest.mark.parametrize("kind", [sc.MixtureSCVI, sc.SampledSCVI])
@pytest.mark.parametrize("objective", ["cell", "aggregate"])
def test_a_saved_model_gives_the_same(kind, objective, tmp_path):
    model = train(make(kind, prior_objective=objective), 2)
    model.save(tmp_path / "model")
    again = kind.load(tmp_path / "model", CELLS, accelerator="cpu")
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())
    assert again.module.placed and again.module.prior().mu.equal(model.module.prior().mu)
    np.testing.assert_array_equal(again.get_clusters(clusters=3), model.get_clusters(clusters=3))


def test_batches_are_used(trained):
    b = CELLS.obs.batch.to_numpy()
    torch.manual_seed(0)
    as_measured = trained.get_normalized_expression(library_size=1)
    torch.manual_seed(0)
    as_first = trained.get_normalized_expression(transform_batch="0", library_size=1)
    change = np.abs(np.log(as_measured) - np.log(as_first)).to_numpy().mean(1)
    assert as_first.shape == CELLS.shape and change[b == "1"].min() > 0.05 and change[b == "0"].max() < 1e-4


def test_clusters_are_of_the_cells_asked_for(trained):
    found = trained.get_clusters(clusters=3)
    assert found.shape == (200,) and set(found) <= {0, 1, 2}
    np.testing.assert_array_equal(trained.get_clusters(CELLS[:7].copy(), 3), found[:7])


def test_other_likelihoods_and_covariates_are_taken():
    model = make(gene_likelihood="poisson", encode_covariates=True, latent_distribution="ln")
    assert train(model, 2).get_latent_representation().shape == (200, 3)
    assert np.isfinite(model.get_elbo())


# --- cells and scores


def test_counts_come_back_from_what_scanpy_stores():
    import scanpy

    stored, cells = scanpy.datasets.pbmc68k_reduced(), sc.pbmc_counts()
    assert cells.shape == (700, 765) and cells.obs.type.nunique() == 10 and cells.obs.batch.nunique() == 8
    x = cells.X.astype(float)
    assert (x == x.round()).all() and x.min() == 0
    forward = np.log1p(1e4 * x / stored.obs.n_counts.to_numpy(dtype=float)[:, None])
    assert np.abs(forward - stored.raw.X.toarray()).max() < 2e-3


def test_drawn_cells_are_what_is_said():
    a, b = sc.draw_cells(3000, shift=0.5), sc.draw_cells(3000, shift=0.5)
    assert (a.X == b.X).all() and (a.X != sc.draw_cells(3000, shift=0.5, seed=1).X).any()
    n = a.obs.type.value_counts()
    assert 3 < n["7"] / n["0"] < 5.5 and 600 < a.X.sum(1).mean() < 1000

    def apart(cells):
        means = [np.log(cells.X[cells.obs.batch == b].sum(0) + 1) for b in "01"]
        return (means[0] - means[1]).std()

    assert apart(a) > 2 * apart(sc.draw_cells(3000, shift=0.0))


def test_scores_of_codes_that_are_known():
    g = np.random.default_rng(0)
    codes = np.repeat([[0.0], [9.0]], 200, 0) + g.normal(size=(400, 1))
    where, chance = np.repeat(["a", "b"], 200), g.choice(["a", "b"], 400)
    assert sc.batch_mixing(codes, where) < 0.01 and 0.95 < sc.batch_mixing(codes, chance) <= 1.01
    assert sc.agreement_with_types(sc.kmeans_clusters(codes, 2), where) == pytest.approx(dict(ari=1, nmi=1))
    assert abs(sc.agreement_with_types(sc.kmeans_clusters(codes, 2), chance)["ari"]) < 0.1


def test_the_noise_falls_with_the_draws(trained):
    noise = {}
    for name, kind, kw in (
        ("cs", sc.MixtureSCVI, {}),
        (1, sc.SampledSCVI, {}),
        (9, sc.SampledSCVI, dict(kl_samples=9)),
    ):
        model = make(kind, **kw)
        model.module.load_state_dict(trained.module.state_dict())
        noise[name] = sc.gradient_noise(model.module, [batch(model)], draws=40)
    assert noise["cs"] < 1e-10 and 4 < noise[1] / noise[9] < 18
    loss = sc.gradient_noise(trained.module, [batch(trained)], whole=True)
    assert loss > 1e-6  # the reconstruction has draws


def test_a_cell_is_mixed_with_as_many_neighbours_as_asked_for():
    "Of single neighbours in a row of a, b, a, b, … each is of one batch: nothing is mixed."
    assert sc.batch_mixing(np.arange(20.0)[:, None], np.tile(["a", "b"], 10), 1) == 0


def test_clusters_are_joined_by_the_seed(monkeypatch):
    asked, p = [], GMM(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2))
    monkeypatch.setattr(sc, "merge_components", lambda p, *how: asked.append(how) or torch.zeros(1).long())
    own = SimpleNamespace(prior=lambda: p)
    model = SimpleNamespace(module=own, get_latent_representation=lambda *a, **how: (np.zeros((3, 2)), None))
    assert sc.MixtureSCVI.get_clusters(model, None, 1, 5).tolist() == [0, 0, 0]
    assert asked == [(1, 5)]


def test_who_was_placed_goes_on_in_training_mode_and_with_no_means_of_old_gradients():
    prior, module = torch.nn.Linear(2, 2), torch.nn.Dropout()
    prior.init_from_codes = lambda codes: None
    module.prior, module.placed, module._get_inference_input = prior, torch.tensor(False), dict
    module.inference = lambda **x: dict(qz=torch.distributions.Normal(torch.zeros(3, 2), 1.0))
    other = torch.zeros(1)
    opt = SimpleNamespace(state={prior.weight: dict(step=1), other: dict(step=1)})
    trainer = SimpleNamespace(current_epoch=3, max_epochs=4, train_dataloader=[{}], optimizers=[opt])
    sc.PlaceComponents(0.75).on_train_epoch_start(trainer, SimpleNamespace(module=module))
    assert module.placed and module.training
    assert [*opt.state] == [other]  # Adam's means were of the components before


# --- bad input


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(components=0), "components=0"),
        (dict(prior_objective="image"), "prior_objective='image'; expected 'cell' or 'aggregate'"),
        (dict(queue=5), "queue=5 is for prior_objective='aggregate'"),
    ],
)
def test_bad_settings_are_refused(kw, says):
    with pytest.raises(ValueError, match=says):
        make(**kw)


@pytest.mark.parametrize("at", [-0.1, 1.0, 20.0])
def test_a_bad_time_to_place_components_is_refused(at):
    with pytest.raises(ValueError, match="expected a part of the epochs"):
        make().train(4, kmeans_at=at)


def test_what_cannot_be_is_refused(trained):
    with pytest.raises(ValueError, match="kl_samples=0; .*at least 1 draw"):
        make(sc.SampledSCVI, kl_samples=0)
    with pytest.raises(ValueError, match="180 cells to train on for 190 components"):
        train(make(components=190))
    with pytest.raises(ValueError, match="clusters=9; expected 1 to 4"):
        trained.get_clusters(clusters=9)
    with pytest.raises(ValueError, match="draws=1; a variance needs at least 2"):
        sc.gradient_noise(trained.module, [batch(trained)], draws=1)
    with pytest.raises(NotImplementedError, match="this prior is a mixture"):
        trained.get_marginal_ll(n_mc_samples=2)
