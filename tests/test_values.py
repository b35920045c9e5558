"Values of any size: no input gives NaN, floats have units, and what one row cannot tell is None."

import warnings
from dataclasses import replace
from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch
from sklearn.datasets import load_wine
from sklearn.mixture import GaussianMixture

from csrae_nb import training
from csrae_nb.catalogue import load_data
from csrae_nb.data import column_units, names_of_labels
from csrae_nb.divergence import cs_divergence, kl_bounds, kl_divergence, log_overlap
from csrae_nb.estimator import CSRAEEmbedding
from csrae_nb.evaluation import complete_run
from csrae_nb.fleet import fit_fleet
from csrae_nb.kernels import log_sum_exp
from csrae_nb.likelihoods import LIKELIHOODS, Gaussian, make_likelihood
from csrae_nb.networks import load_resnet18, side_by_side
from csrae_nb.priors import LOG_VAR, MoGPrior, variance, within
from csrae_nb.config import Config, resolve
from csrae_nb.files import load_tensors
from csrae_nb.mixtures import GMM, FullGMM, as_mixture, pairwise_log_overlap
from csrae_nb.models import MODELS
from csrae_nb.runs import fit, load_run
from csrae_nb.tasks import make_model, task_of
from csrae_nb.training import NonFiniteLoss
from small_runs import SMALL

CFG = replace(SMALL, epochs=3, kmeans_epoch=2, ll_samples=3)
pytestmark = pytest.mark.usefixtures("own_runs")


@pytest.fixture(scope="module")
def wine():
    x, y = load_wine(return_X_y=True)
    return load_data(dict(x=x, y=y))


# --- no input gives NaN

FAR = torch.tensor([0.0, 1.0, 255.0, -1e6, 1e15, 3e38, -3e38])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name, prior", [*((m, "mog") for m in MODELS), ("MixtureCSRAE", "vamp")])
def test_no_input_gives_nan(name, prior, likelihood):
    cfg, g = resolve(replace(CFG, model=name, prior=prior)), torch.Generator().manual_seed(0)
    model = make_model(cfg, (5,), likelihood, torch.rand(4, 5, generator=g))
    x = FAR[:, None] * torch.randn(5, generator=g).clamp(-1, 1)
    seen = x.clamp(model.likelihood.low, model.likelihood.high)  # what the likelihood is asked about
    terms = model.loss(seen, g)
    terms.loss.backward()
    assert terms.reconstruction.isfinite().all() and terms.divergence.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    q = model.encode(x)
    assert q.mu.isfinite().all() and q.var.isfinite().all() and (q.var > 0).all()
    assert model.reconstruct(x).isfinite().all()
    if model.has_likelihood:
        assert not model.log_likelihood(seen, 5, g).isnan().any()


@pytest.mark.parametrize("network, shape", [("residual", (1, 8, 8)), ("faces", (3, 32, 32))])
def test_no_picture_gives_nan(network, shape):
    model = make_model(resolve(replace(CFG, network=network)), shape, "gaussian").eval()
    x = FAR.view(-1, 1, 1, 1) * torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        terms = model.loss(x)
    assert (
        terms.reconstruction.isfinite().all()
        and terms.divergence.isfinite().all()
        and model.reconstruct(x).isfinite().all()
    )


def test_between_the_bounds_a_variance_is_that_of_exp_to_the_bit():
    logvar = torch.linspace(-LOG_VAR, LOG_VAR, 10_001, requires_grad=True)
    (ours,) = torch.autograd.grad(variance(logvar).sum(), logvar)
    (plain,) = torch.autograd.grad(logvar.exp().sum(), logvar)
    assert variance(logvar).equal(logvar.exp()) and ours.equal(plain)


def test_half_precision_is_bounded_by_its_own_largest_number():
    far = within(torch.tensor([1.0, torch.inf, -torch.inf], dtype=torch.float16))
    assert far.isfinite().all() and variance(torch.full((2,), 29.0, dtype=torch.float16)).isfinite().all()
    x, out = torch.rand(2, 3), torch.randn(2, 2, 3)
    assert torch.allclose(Gaussian().log_prob(x, out.half()), Gaussian().log_prob(x, out), atol=0.02)


KINDS = [
    *(dict(model=m, prior="mog") for m in MODELS),
    dict(model="MixtureCSRAE", prior="vamp"),
    dict(model="MixtureCSRAE", prior="mog", prior_network=True),
    dict(model="CSRAE", layers=2, skip=True),
    dict(model="VAE", posterior_components=3),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fields", KINDS, ids=lambda f: "-".join(map(str, f.values())))
def test_weights_of_another_precision_take_any_input_and_give_single_precision_at_least(fields, dtype):
    x, z = torch.rand(6, 5), torch.randn(3, CFG.latent_dim)
    model = make_model(resolve(replace(CFG, **fields)), (5,), "bernoulli", torch.rand(4, 5)).eval()
    plain, model = model.encode(x).mean, model.to(dtype)
    want = torch.promote_types(dtype, torch.float32)
    for given in (x, x.to(dtype)):
        codes, loss = model.encode(given).mean, model.loss(given).loss
        assert codes.dtype == want and torch.allclose(codes.float(), plain, atol=0.05)
        assert loss.dtype == want and loss.isfinite()
    out = model.decode(z), model.decode(z.to(dtype)), model.sample(4), model.reconstruct(x), model.prior().var
    assert {t.dtype for t in out} == {want}
    if model.has_likelihood:
        assert model.log_likelihood(x, 10).isfinite().all()


@pytest.mark.parametrize("dataset", ["digits", "pinwheel"])
def test_training_keeps_far_from_the_bounds(dataset):
    data = load_data(dataset)
    model = fit(Config(dataset=dataset, epochs=10, warmup=2, lr=2e-3), data, False).model
    for gmm in (model.encode(data.fixed("train")), model.prior()):
        assert gmm.var.log().abs().max() < LOG_VAR / 3 and gmm.mu.abs().max() < 1e3


def test_components_without_spread_can_still_be_learned():
    prior = MoGPrior(3, 2)
    prior.init_from_codes(torch.zeros(5, 2))
    prior.log_prob(torch.ones(1, 2)).sum().backward()
    assert prior.logvar.grad.isfinite().all() and (prior.logvar.grad != 0).any()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_weights_that_run_away_stop_a_run(likelihood):
    "Although nothing is infinite."
    x = (torch.rand(100, 6) > 0.5).float()
    with pytest.raises(NonFiniteLoss, match="epoch 1, step .* A lower lr"):
        fit(replace(CFG, likelihood=likelihood, lr=1e6), dict(x=x), progress=False)


@pytest.mark.parametrize("model, prior", [(m, "mog") for m in MODELS] + [("MixtureCSRAE", "vamp")])
def test_an_estimator_scores_a_far_outlier_very_low(model, prior):
    X = np.random.default_rng(0).normal(size=(60, 3))
    est = CSRAEEmbedding(model=model, prior=prior, epochs=2, components=3, random_state=0).fit(X)
    for far in (1e3, 1e9, 1e30, 1e300, -1.7e308):
        assert -np.inf < est.score(X[:1] + [far, 0, 0]) < est.score(X) - 1000
    assert -np.inf < est.score(np.full((1, 3), 3e38, np.float32)) < -1e6
    far = X[:2] * 1e300
    for values in (est.transform(far), est.predict_proba(far), est.inverse_transform([[1e300, -1e300]])):
        assert np.isfinite(values).all()


# --- units


@pytest.mark.parametrize(
    "model, prior", [("VAE", "mog"), ("IWAE", "mog"), ("MixtureCSRAE", "mog"), ("MixtureCSRAE", "vamp")]
)
def test_floats_of_any_scale_are_learned_as_if_they_were_standardised(wine, model, prior):
    plain = replace(
        wine,
        **{f"x_{s}": wine.units.inward(getattr(wine, f"x_{s}")) for s in ("train", "val", "test")},
        units=None,
    )
    cfg = replace(CFG, model=model, prior=prior)
    a, b = fit(replace(cfg, name="own"), wine, False), fit(replace(cfg, name="plain"), plain, False)
    same = (
        torch.equal if model != "IWAE" else partial(torch.allclose, atol=1e-3)
    )  # its weights are ratios of rounded densities
    assert all(same(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())
    shift = wine.units.scale.double().log().sum().item()  # a density in other units
    assert a.history[-1]["val_reconstruction"] == pytest.approx(
        b.history[-1]["val_reconstruction"] + shift, abs=1e-3
    )
    assert torch.allclose(
        a.model.reconstruct(wine.x_test), wine.units.outward(b.model.reconstruct(plain.x_test)), rtol=1e-5
    )
    draws = [r.model.sample(5, torch.Generator().manual_seed(0)) for r in (a, b)]
    assert torch.allclose(draws[0], wine.units.outward(draws[1]), rtol=1e-5)


def test_units_are_kept_in_the_run(wine):
    run = fit(CFG, wine, False)
    again = load_run(run.path)
    assert load_tensors(run.path / "model.safetensors")[1]["units"] == wine.units.record()
    assert again.model.reconstruct(wine.x_test).equal(run.model.reconstruct(wine.x_test))
    assert (again.model.sample(200).mean(0) / wine.x_train.mean(0) - 1).abs().max() < 0.3


def test_a_run_with_units_goes_on_where_it_was_stopped(wine, monkeypatch):
    whole, epoch = (
        fit(replace(CFG, name="whole", model="VampPriorVAE"), wine, False),
        training.Training.train_and_validate,
    )

    def stop(t, bar):
        if t.meta["epoch"] == 1:
            raise KeyboardInterrupt
        epoch(t, bar)

    cfg = replace(CFG, name="stopped", model="VampPriorVAE")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(training.Training, "train_and_validate", stop)
        fit(cfg, wine, False)
    again = fit(cfg, wine, False).model.state_dict()
    assert all(v.equal(again[k]) for k, v in whole.model.state_dict().items())


def test_a_fleet_has_units_too(wine):
    configs = [replace(CFG, model="VampPriorVAE", seed=s) for s in range(2)]
    together = fit_fleet(configs, wine, False)
    alone = fit(replace(configs[0], name="alone"), wine, False)
    assert together[0].history[-1]["criterion"] == pytest.approx(alone.history[-1]["criterion"], rel=1e-3)


def test_evaluation_is_in_the_units_of_the_data(wine, hasty):
    metrics = complete_run(replace(CFG, epochs=60, lr=2e-3), wine, False)
    normal = torch.distributions.Normal(wine.x_train.mean(0), wine.x_train.std(0))
    assert (
        metrics["log_likelihood"] > normal.log_prob(wine.x_test).sum(1).mean().item() - 1
    )  # no worse than a normal for each column
    assert metrics["frechet_classifier_samples"] is not None and metrics["knn5"] < 40


@pytest.mark.parametrize("shape", [(-1, 64), (-1, 8, 8)])
def test_grey_levels_as_floats(shape):
    "Also flattened, where a pixel that is always dark in training has no scale."
    x = load_data("digits").x_train.reshape(shape) * 255
    if len(shape) == 2:
        x[:, 0] = 0
        x[-300:, 0] = 255
    data = load_data(dict(x_train=x[:800], x_val=x[-200:], x_test=x[-200:]))
    run = fit(replace(CFG, epochs=5, batch_size=100), data, False)
    assert (data.units.scale > 0).all() and len(data.units.scale) == (64 if len(shape) == 2 else 1)
    assert all(
        row["val_reconstruction"] < 64 * 8 for row in run.history
    )  # nats: a uniform code costs log 256 = 5.5 a pixel


@pytest.mark.parametrize(
    "x", [torch.rand(50, 4), torch.randn(50, 4), torch.rand(50, 6, 6), torch.randn(50, 2) * 3 + 1]
)
def test_what_is_near_one_is_left_alone(x):
    assert column_units(x) is None and load_data(dict(x=x)).units is None


def test_data_sets_with_runs_have_no_units():
    assert load_data("pinwheel").units is None and load_data("digits").units is None


def test_runs_from_before_have_no_units(wine):
    task = task_of(resolve(CFG))
    assert "units" in task.about(wine) and "units" not in task.about(load_data("pinwheel"))
    assert task.make_model(dict(x_shape=[13], likelihood="gaussian")).likelihood == make_likelihood(
        "gaussian"
    )


@pytest.mark.parametrize(
    "likelihood, says",
    [
        ("bernoulli", "x_train ranges from 0 to 255, .* divide grey levels by the largest that there can be"),
        ("discretized_logistic", "x_train ranges from 0 to 255, .*uint8, or as x/255 - 0.5"),
    ],
)
def test_other_likelihoods_say_the_range_and_the_remedy(likelihood, says):
    with pytest.raises(ValueError, match=says):
        load_data(dict(x=torch.arange(256.0).repeat(20, 1)), likelihood)


def test_an_estimator_without_standardising_says_the_range():
    X = load_wine().data
    with pytest.warns(UserWarning, match="X ranges from 0.13 to 1680, .*standardize=True is the remedy"):
        est = CSRAEEmbedding(standardize=False, epochs=1, components=3).fit(X)
    assert (
        est.model_.likelihood.units is None
        and CSRAEEmbedding(epochs=1, components=3).fit(X).model_.likelihood.units is None
    )


# --- splits of one row


@pytest.mark.parametrize("rows", [12, 19])
def test_what_one_row_cannot_tell_is_none_with_one_warning(hasty, rows):
    rng = np.random.default_rng(0)
    cfg = replace(CFG, epochs=10, batch_size=5, components=3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        metrics = complete_run(cfg, dict(x=rng.normal(size=(rows, 4)), y=np.arange(rows) % 2), progress=False)
    assert [str(w.message) for w in seen if w.category is UserWarning] == [
        "x_test has one example: no active units, clusters and Fréchet distances; "
        "x_val has one example: no floor of the Fréchet distances"
    ]
    unknown = {k for k, v in metrics.items() if v is None and not k.startswith("fid")}
    assert unknown == {
        "active_units",
        *(
            f"frechet_classifier_{s}"
            for s in (
                "floor",
                "reconstructions",
                "samples",
                "samples_refit",
                "samples_refit15",
                "samples_full",
                "samples_expost",
            )
        ),
    }
    assert "cluster_nmi" not in metrics and all(
        np.isfinite(metrics[k])
        for k in ("reconstruction", "divergence", "log_likelihood", "knn5", "log_prior")
    )


def test_one_validation_row_leaves_out_the_floor_only(hasty):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 4))
    data = dict(
        x_train=x[:30], y_train=np.arange(30) % 2, x_val=x[:1], x_test=x[30:], y_test=np.arange(10) % 2
    )
    with pytest.warns(UserWarning, match="^x_val has one example: no floor"):
        metrics = complete_run(CFG, data, progress=False)
    assert (
        metrics["frechet_classifier_floor"] is None
        and metrics["frechet_classifier_samples"] > 0
        and metrics["active_units"] is not None
    )


@pytest.mark.parametrize("fields", [dict(model="VAE"), dict(components=1)])
def test_one_training_row_is_evaluated(hasty, fields):
    "Codes without a spread have mixtures with the smallest variance there can be, not with none."
    x = np.random.default_rng(0).normal(size=(9, 4))
    cfg = replace(CFG, batch_size=1, **fields)
    metrics = complete_run(cfg, dict(x_train=x[:1], x_val=x[1:5], x_test=x[5:]), progress=False)
    assert np.isfinite(metrics["reconstruction"]) and np.isfinite(metrics["log_prior_refit"])


@pytest.mark.parametrize("components", [2, 3])
def test_examples_of_one_class_need_no_three_components(hasty, components):
    "Fewer components than three are not mapped, and so not joined."
    x = np.random.default_rng(0).normal(size=(60, 4))
    cfg = replace(CFG, components=components, kmeans_epoch=0)
    metrics = complete_run(cfg, dict(x=x, y=np.zeros(60, int)), progress=False)
    assert 0 < metrics["cluster_accuracy"] <= 1
    assert metrics.get("merged_accuracy") == (1 if components == 3 else None)


# --- errors say what to give instead


@pytest.mark.parametrize("f", [cs_divergence, log_overlap, kl_divergence, kl_bounds, pairwise_log_overlap])
def test_what_is_no_mixture_is_told_what_to_be(f, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    q, prior = GMM.gaussian(torch.zeros(3, 2), torch.ones(3, 2)), MoGPrior(4, 2)
    for sides in (q, prior), (prior, q), (prior, prior):
        with pytest.raises(ValueError, match=r"a MoGPrior is a module.*when it is called; give prior\(\)"):
            f(*sides)
    for wrong in q.mu, (q.mu, q.var), None:
        with pytest.raises(ValueError, match=r"is no mixture; expected a GMM, as of GMM.gaussian\(mu, var\)"):
            f(wrong, prior())


TWO = torch.zeros(1), torch.zeros(1, 2)  # a weight's logarithm, and means of one component


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: FullGMM(*TWO, torch.tensor([[[1.0, 0.9], [0.0, 1.0]]])), "not symmetric"),
        (lambda: GMM.gaussian(torch.tensor([0.0, torch.inf]), 1.0), "mu holds 1 infinities among 2"),
        (lambda: GMM.gaussian(torch.tensor([0, 0]), 1), "are int64, int64, int64"),
        (lambda: GMM.gaussian(torch.zeros(2), 1.0).sample(-1), "n=-1; expected the number of draws"),
        (lambda: fit("digits"), "cfg is a str; expected a Config"),
        (lambda: load_run("no run"), "open_run finds them by name"),
        (
            lambda: fit(Config(dataset="arrays"), np.zeros((50, 3))),
            "more than the 40 training examples of arrays; set 40 or less",
        ),
    ],
)
def test_what_would_go_wrong_later_is_refused(make, says, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=says):
        make()


def test_scikit_learns_mixture_has_a_closed_form_too(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    g = torch.Generator().manual_seed(0)
    fitted = GaussianMixture(3, random_state=0).fit(torch.randn(200, 2, generator=g).numpy())
    q = GMM.gaussian(torch.zeros(2, dtype=torch.float64), 1.0)
    assert cs_divergence(q, fitted) == cs_divergence(q, as_mixture(fitted)) > 0


# --- a batch of mixtures in parts, and elsewhere

PARTS = 0, -1, (1, 2), slice(1, 3), (..., 0), (slice(None), [0, 2]), None, [True, False, True]


@pytest.mark.parametrize("at", PARTS)
def test_a_part_of_a_batch_is_that_part(at):
    g = torch.Generator().manual_seed(0)
    r = partial(torch.randn, generator=g)
    q, z = GMM(r(3, 1, 2).log_softmax(-1), r(4, 2, 5), torch.ones(2, 5)), r(5)
    assert torch.equal(q[at].log_prob(z), q.log_prob(z)[at])
    assert torch.allclose(q[at].mean.sum(-1), q.mean.sum(-1)[at])
    with pytest.raises(IndexError):
        q[3]
    with pytest.raises(IndexError):
        q[0, 0, 0]  # a component is no part of a batch
    with pytest.raises(ValueError, match="a single mixture, without a batch"):
        list(q[0, 0])


def test_a_mixture_moves_as_one():
    p = MoGPrior(4, 2)()
    for moved in (p.to(torch.float64), FullGMM.of(p).to(torch.float64)):
        assert {t.dtype for t in vars(moved).values()} == {torch.float64}
        assert cs_divergence(moved, moved).abs() < 1e-12
    assert {t.device.type for t in vars(p.to("meta")).values()} == {"meta"}
    assert p.to(torch.float64).mu.requires_grad


class Unmeasured(Gaussian):
    "As somebody would write it who knows of no units."

    def __getattribute__(self, name):
        if name == "units":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_a_likelihood_of_ones_own_gets_units_or_a_warning(monkeypatch):
    monkeypatch.setitem(LIKELIHOODS, "own", type("Own", (Gaussian,), {}))
    monkeypatch.setitem(LIKELIHOODS, "bare", Unmeasured)
    x = dict(x=load_wine().data)
    assert torch.equal(load_data(x, "own").units.mean, load_data(x, "gaussian").units.mean)
    with pytest.warns(UserWarning, match="x ranges from .* standardise them, or give Unmeasured units"):
        assert load_data(x, "bare").units is None


def test_networks_side_by_side_are_alike_in_every_number():
    net = lambda slope, bias=True: torch.nn.Sequential(
        torch.nn.Linear(2, 3, bias=bias), torch.nn.LeakyReLU(slope)
    )
    for nets in ([net(0.01), net(0.9)], []):
        with pytest.raises(ValueError, match="only like ones go side by side"):
            side_by_side(nets)
    with pytest.raises(ValueError, match="bias=False"):
        side_by_side([net(0.1, False), net(0.1, False)])
    with pytest.raises(ValueError, match="holds no ResNet18"):
        load_resnet18(net(0.1), "weights.pth")


def test_a_sum_of_nothing_is_none():
    assert log_sum_exp(torch.zeros(2, 0)).tolist() == [-np.inf, -np.inf]


def test_classes_that_only_test_examples_have_are_named():
    data = load_data(dict(x_train=np.zeros((20, 3)), x_test=np.ones((4, 3)), y_test=np.array(list("abab"))))
    assert names_of_labels(data) == ("a", "b")


def test_some_components_are_of_one_mixture():
    gmm = GMM(torch.zeros(7, 2).log_softmax(-1), torch.zeros(7, 2, 3), torch.ones(7, 2, 3))
    with pytest.raises(ValueError, match=r"only wants one mixture, not a batch of shape \(7,\)"):
        gmm.only([0, 1])


@pytest.mark.parametrize("steps", [0, -1])
def test_a_refit_takes_a_step(steps):
    with pytest.raises(ValueError, match="expected a whole number from 1"):
        MoGPrior(3, 2).refit(torch.randn(9, 2), steps)


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("shape", [(8, 6), (8, 3, 6), (8, 2)])
def test_a_decoder_of_another_shape_is_told_wherever_it_is_asked(name, shape, shapes_unchecked):
    kind, out = make_likelihood(name), torch.zeros(shape)
    for ask in (kind.mean, kind.sample):
        with pytest.raises(ValueError, match=rf"a decoder gave out of shape \({shape[0]}, {shape[1]}"):
            ask(out)
