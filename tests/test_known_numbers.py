"Numbers that end in tables, in examples so small that the right one is known: a wrong one would look right."

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from csrae_nb import claims, evaluation, priors, results, trained
from csrae_nb.catalogue import load_data
from csrae_nb.config import Config, resolve
from csrae_nb.estimator import CSRAEEmbedding
from csrae_nb.files import generator
from csrae_nb.labels import Intensities, ManyLabels, OneLabel, agreement, best_threshold, ranks_of_answers
from csrae_nb.likelihoods import Bernoulli, make_likelihood
from csrae_nb.metrics import Features, feature_statistics, frechet_distance
from csrae_nb.mixtures import GMM
from csrae_nb.models import IWAE, Autoencoder
from csrae_nb.networks import Decoder, Encoder, mlp
from csrae_nb.priors import MoGPrior, component_graph, cut_map, em_step, kmeans
from csrae_nb.runs import fit
from csrae_nb.semisup import LABEL_NETWORKS, LabelDecoder, LabelEncoder, SemiSupervised
from csrae_nb.tasks import assemble, make_model, mean_terms, posterior_used, task_of, validated
from csrae_nb.training import History
from small_runs import ROWS, TINY

FLAT = Features("flat", lambda x: x.flatten(1).double())
CFG = Config(**TINY | dict(epochs=1, warmup=0, ll_samples=2, expost_components=3, fid_layer=0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def data():
    return load_data(dict(x=ROWS))


@pytest.fixture
def run(own_runs, data):
    return fit(CFG, data, progress=False)


# evaluation


def test_real_images_are_those_of_the_split(own_runs, monkeypatch, tmp_path):
    monkeypatch.setenv("CSRAE_CACHE", str(tmp_path))
    means = []
    for seed in (0, 1):
        digits = load_data("digits", split_seed=seed)
        cfg, images = resolve(Config(split_seed=seed)), evaluation._some(digits, 50)
        means.append(evaluation._real_statistics(cfg, digits, FLAT, images).mean)
    assert not torch.allclose(*means)


def test_the_criterion_is_that_of_the_epoch_that_was_kept(run, data):
    rows = [run.history[0], run.history[0] | dict(criterion=1e6)]
    metrics = evaluation.evaluate(replace(run, history=rows, best_epoch=1), data, progress=False)
    assert metrics["criterion"] == rows[0]["criterion"]


def test_more_draws_of_the_log_likelihood_are_drawn(run, data):
    evaluation.write_metrics(run, {**dict.fromkeys(evaluation.METRICS), "log_likelihood": -12345.0})
    more = replace(run, cfg=replace(run.cfg, ll_samples=50))
    assert evaluation.measure(more, data, progress=False)["log_likelihood"] > -1000


def test_samples_of_black_and_white_images_are_black_and_white():
    digits, x = load_data("digits"), torch.tensor([0.2, 0.8])
    assert evaluation._shown(x, replace(digits, dynamic=False)).tolist() == [0, 1]
    assert evaluation._shown(x, digits).equal(x)


def test_distances_of_a_temperature_are_of_samples_at_it(run, data):
    n, prior = len(data.x_test), run.model.prior().detach()
    found = evaluation.sample_quality(run, data, data, FLAT, dict(samples=prior), n)
    images = evaluation._real_statistics(run.cfg, data, FLAT, evaluation._some(data, n))
    for t in evaluation.TEMPERATURES:
        cooler = evaluation.at_temperature(prior, t)
        x = run.model.sample(n, generator(run.cfg.seed, "samples"), prior=cooler)
        wanted = frechet_distance(feature_statistics(FLAT.of, [evaluation._shown(x, data)]), images)
        assert found[f"frechet_classifier_samples_t{round(100 * t)}"] == pytest.approx(wanted)


def test_the_mixture_fitted_afterwards_has_as_many_components_as_asked_for(run):
    codes = torch.randn(60, 2, generator=seeded())
    of = evaluation.sample_sources(run, codes, codes, ["samples_expost"])
    assert len(of["samples_expost"].logw) == CFG.expost_components == 3


def test_codes_are_weighed_by_each_prior_itself():
    codes = torch.randn(50, 2, generator=seeded()) + 3
    far = torch.tensor([[0.0, 0.0], [3.0, 3.0], [9.0, 9.0]])
    prior = GMM(torch.full((3,), 1 / 3).log(), far, torch.ones(3, 2))
    refit = GMM(prior.logw, torch.full((3, 2), 3.0), prior.var)
    full = GMM(prior.logw, prior.mu + 1, prior.var)
    found = evaluation._usage(dict(samples=prior, samples_refit=refit, samples_full=full), codes, None)
    assert found["effective_k_refit"] == pytest.approx(3, abs=1e-3) and found["effective_k"] < 2
    for name, p in dict(log_prior=prior, log_prior_refit=refit, log_prior_full=full).items():
        assert found[name] == pytest.approx(p.log_prob(codes).mean().item())


# with labels

X = (torch.rand(8, 4, 4, generator=seeded(1)) > 0.5).float()
LABEL_PRIOR = torch.tensor([0.0, 1.0, -1.0])


def with_labels(label_prior=LABEL_PRIOR, **weights):
    kind, net, g = OneLabel(3), LABEL_NETWORKS["mlp"], seeded()
    encoder, decoder = LabelEncoder((4, 4), 2, kind, net, g), LabelDecoder((1, 4, 4), 2, kind, net, g)
    cfg = resolve(Config(model="VAE", latent_dim=2))
    inner = assemble(cfg, encoder, decoder, make_likelihood("bernoulli"), torch.zeros(1, 4, 4))
    return SemiSupervised(inner, label_prior, 0.25, **weights).eval()


def test_log_p_of_an_image_is_the_sum_over_labels_and_their_prior():
    model, g = with_labels(), seeded(2)
    each = torch.stack([model.given(torch.tensor(y)).log_likelihood(X, 50, g) for y in range(3)], 1)
    wanted = (each + LABEL_PRIOR.log_softmax(0)).logsumexp(1)
    torch.testing.assert_close(model.log_likelihood(X, 50, seeded(2)), wanted)


def test_beta_weighs_the_divergence_of_the_labels():
    once, thrice = (with_labels(beta=b) for b in (1.0, 3.0))
    kl = once.kind.kl(once.predict(X), once.label_prior).mean()
    apart = thrice.loss(X, seeded(3)).loss - once.loss(X, seeded(3)).loss
    torch.testing.assert_close(apart, 2 * kl)


def test_alpha_weighs_the_errors_of_the_labels():
    y, once, thrice = torch.tensor([2, 0]), with_labels(alpha=1.0), with_labels(alpha=3.0)
    wrong = once.kind.cross_entropy(once.predict(X[:2]), y).mean()
    apart = thrice.loss(X, seeded(3), y).loss - once.loss(X, seeded(3), y).loss
    torch.testing.assert_close(apart, 2 * wrong)


def test_samples_are_of_the_prior_that_is_given_and_of_likely_labels():
    model = with_labels(torch.tensor([50.0, 0.0, 0.0]))
    p, seen = model.prior(), []
    far = GMM(p.logw, p.mu + 20, p.var)
    assert not torch.allclose(model.sample(20, seeded()), model.sample(20, seeded(), prior=far))
    model.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    model.sample(50, seeded())
    assert torch.cat(seen).argmax(1).unique().tolist() == [0]


def test_codes_are_those_of_the_label_that_is_predicted():
    model = with_labels()
    model.encoder.classifier[-1].weight.data.mul_(20)
    best = model.predict(X).argmax(1)
    assert len(best.unique()) > 1
    found = trained._by_label(model, X, 0, None)
    for i, y in enumerate(best):
        code = model.given(y).encode(X[i : i + 1]).mean
        assert found["z1"][i] == pytest.approx(code[0, 0].item(), rel=1e-4)


def test_answers_that_are_not_known_count_nowhere():
    of = agreement(torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([[0], [1], [-1]]), ["a"])
    assert of["mae"] == 0 and of["pcc"] == pytest.approx(1) and of["icc"] == pytest.approx(1)
    ranked = ranks_of_answers(torch.tensor([[0.9], [0.1], [0.95]]), torch.tensor([[1], [0], [-1]]), ["a"])
    assert ranked["ap"] == 100
    p, y = torch.tensor([0.9, 0.6, 0.7, 0.7, 0.7, 0.1]), torch.tensor([1, 1, -1, -1, -1, 0])
    assert ManyLabels(1).measured(None, (p.logit()[:, None], y[:, None]))["threshold_0"] == 0.5


def test_no_threshold_says_yes_to_everything():
    "Below all probabilities F1 can be largest, and nothing is told apart: it was 0.05, and said yes to 0.06."
    p, y = torch.tensor([0.1, 0.2, 0.3, 0.6]), torch.tensor([1, 0, 1, 1])
    assert best_threshold(p[:3], y[:3]) == 0.5 and best_threshold(p, torch.ones(4).long()) == 0.5
    assert best_threshold(p, torch.tensor([0, 0, 0, 0])) == 0.5
    assert best_threshold(p, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.15)


def test_an_intensity_is_present_from_two_on():
    kind = Intensities(5)
    y = torch.tensor([[0], [1], [2], [5], [-1]])
    assert kind.truth(y).flatten().tolist() == [0, 0, 1, 1, -1]
    assert kind.yes(torch.tensor([[3.0, 1.0, -1.0, -2.0, -3.0]])).item() == 1.0


# priors, models and training


def test_the_k_means_of_a_prior_is_that_of_the_seed():
    codes, (a, b) = torch.rand(200, 2, generator=seeded()), (MoGPrior(12, 2) for _ in range(2))
    a.init_from_codes(codes, 0)
    b.init_from_codes(codes, 1)
    assert torch.equal(b.mu, kmeans(codes, 12, 1)[1]) and not torch.allclose(a.mu, b.mu)


def test_a_map_is_cut_by_as_many_neighbours_as_asked_for():
    places = torch.rand(40, 2, generator=seeded())
    wanted = priors._cut(component_graph(places, 2), 5, 0)
    assert cut_map(places, 5, 2).equal(wanted) and not cut_map(places, 5).equal(wanted)


def test_variances_of_em_keep_the_floor_that_is_given():
    codes = torch.randn(100, 2, generator=seeded())
    narrow = GMM(torch.full((20,), 0.05).log(), codes[:20], torch.full((20, 2), 0.01))
    assert (em_step(narrow, codes, floor=0.5).var >= 0.4999 * codes.var(0)).all()


def test_the_divergence_of_an_iwae_is_a_kl():
    g = seeded()
    prior = MoGPrior(5, 4, generator=g)
    encoder = Encoder((8, 8), mlp(64, 8, generator=g))
    decoder = Decoder(mlp(4, 64, generator=g), (1, 8, 8))
    model, x = IWAE(encoder, decoder, prior, Bernoulli(), samples=4000), torch.rand(3, 8, 8, generator=g)
    q = model.encode(x := x.round())
    z = GMM(*(t.expand(4000, *t.shape) for t in q.broadcast())).rsample(g)
    kl = (q.log_prob(z) - prior().log_prob(z)).mean(0)
    torch.testing.assert_close(model.loss(x, g).divergence, kl, atol=0.1, rtol=0.05)


def test_epochs_of_a_warm_up_are_compared_by_the_whole_weight():
    cfg = resolve(Config(lam=2.0, warmup=10))
    model = make_model(cfg, (8, 8), "bernoulli")
    model.begin(1)
    row = dict(val_reconstruction=5.0, val_divergence=3.0)
    assert task_of(cfg).score(model, row) == pytest.approx(5 + 2 * 3)


class Encoded(Autoencoder):
    "A model of which only the posteriors are asked for."

    def __init__(self, q):
        nn.Module.__init__(self)
        self.q = q

    def encode(self, x):
        return self.q


def test_components_in_use_are_counted_for_each_image():
    q = GMM.mixture(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.zeros(2, 2, 1), torch.ones(2, 2, 1))
    assert posterior_used(Encoded(q), torch.zeros(2, 1)).item() == pytest.approx((1 + 2) / 2)


def test_the_criterion_has_the_divergences_of_both_layers():
    terms = dict(reconstruction=1.0, divergence=2.0, divergence_lower=4.0)
    assert validated({k: torch.tensor(v) for k, v in terms.items()})["criterion"] == 7


@pytest.mark.parametrize(
    "constraint, epochs, done",
    [(None, (10, 24, 25), [False, False, True]), ("divergence<=10", (7, 8), [False, True])],
)
def test_patience_begins_when_a_warm_up_ends_if_there_is_one(constraint, epochs, done):
    cfg = resolve(Config(epochs=100, warmup=20, patience=5, constraint=constraint))
    runs = [SimpleNamespace(cfg=cfg, meta=dict(epoch=e, best_epoch=3)) for e in epochs]
    assert [History.done.fget(r) for r in runs] == done


def test_the_score_of_two_layers_has_both_divergences():
    x = np.random.default_rng(0).normal(size=(60, 3))
    est = CSRAEEmbedding(epochs=1, components=3, random_state=0, config=dict(layers=2)).fit(x)
    rows = torch.from_numpy(est.scaler_.transform(x))
    terms = mean_terms(est.model_, rows, generator(0, "score"))
    assert {"divergence", "divergence_lower"} < terms.keys()
    assert est.score(x) == pytest.approx(-sum(terms.values()) - np.log(est.scaler_.scale_).sum())


# after training


def test_em_afterwards_stops_by_codes_that_it_does_not_fit(run, data, monkeypatch):
    seen = []

    def full_em(p, codes, held_out, steps):
        seen.append((len(codes), len(held_out)))
        return p

    monkeypatch.setattr(trained, "full_em", full_em)
    trained.refitted_prior(run, data=data)
    assert seen == [(len(data.x_train), len(data.x_val))]


def test_of_several_arrays_the_test_is_meant():
    with pytest.warns(UserWarning, match="s.npz: its x_test is read; x_train are not"):
        assert trained._one_array(dict(x_train=1, x_test=2), "s.npz") == 2


# tables


def row(model="VAE", seeds=3, **fields):
    usual = dict(dataset="mnist", model=model, components=None, latent_dim=20, lam=1.0, samples=None)
    usual |= dict(prior="mog" if model == "MixtureCSRAE" else "normal", epochs=30)
    return results.with_name(usual | dict(seeds=" ".join(map(str, range(seeds)))) | fields)


def distances(**of):
    means = {f"frechet_classifier_{k}_mean": v for k, v in of.items()}
    return means | {f"frechet_classifier_{k}_se": 0.1 for k in of}


def test_a_duel_with_a_doubtful_rival_is_not_decided():
    "Whose samples after some steps of EM are nearer than a reconstruction can be."
    vae = dict(reconstructions=40.0, samples=80.0, samples_refit15=80.0, samples_expost=30.0)
    ours = dict(reconstructions=2.0, samples=50.0, samples_refit15=20.0, samples_expost=90.0)
    rows = [row(**distances(**vae)), row("MixtureCSRAE", components=100, **distances(**ours))]
    assert [duel.outcomes[0] for duel in claims.sampling_duels(rows)] == [0]


def test_settings_of_few_labels_are_chosen_by_validation_images():
    two = [
        row(lam=lam, labels=250.0, error_mean=test, error_val_mean=val, error_se=0.1)
        for lam, test, val in ((1.0, 5.0, 6.0), (2.0, 4.0, 7.0))
    ]
    assert claims._by_labels({claims.SEMISUP: two})[250]["VAE"]["lam"] == 1
    assert "| VAE | 1 | 1 | 30 × 3 | 5.00 ± 0.10 |" in results.table3(two, results.read_paper())


def test_of_two_rows_alike_the_longer_training_is_compared():
    assert [r["epochs"] for r in results.equal_training([row(), row(epochs=400)])] == [400]


def test_a_gap_to_a_single_seed_has_no_error():
    gap, error = results._gap(row(criterion_mean=1.0), row(criterion_mean=3.0, criterion_se=0.1))
    assert gap == 2 and math.isnan(error)
