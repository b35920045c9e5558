"Numbers and options of what models are made of, in examples so small that the right ones are known."

from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, Uniform

from csrae_nb import clusters, metrics
from csrae_nb.catalogue import load_data
from csrae_nb.clusters import CodeClusters, cluster_codes
from csrae_nb.config import Config, identity, resolve, run_name
from csrae_nb.divergence import log_overlap
from csrae_nb.fleet import fleets
from csrae_nb.layers import layered_networks, two_layers
from csrae_nb.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian
from csrae_nb.mixtures import GMM, FullGMM, matrix_log_prob
from csrae_nb.models import CSRAE, IWAE, VAE, VampPriorVAE
from csrae_nb.networks import make_networks, mlp
from csrae_nb.patterns import Patterns, em_of_patterns
from csrae_nb.priors import StandardNormal, VampPrior
from csrae_nb.rivals import OF_WEIGHTS, RAE, SmallWeights


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# divergences and mixtures


def test_a_narrow_box_under_a_wide_gaussian():
    q, p = Normal(torch.tensor([1.0]), torch.tensor([3.0])), Uniform(torch.tensor([1.5]), torch.tensor(1.501))
    torch.testing.assert_close(log_overlap(q, p), q.log_prob(torch.tensor([1.5005])), atol=1e-4, rtol=0)


def test_a_gmm_beside_another_family_has_its_variances():
    box = Independent(Uniform(torch.zeros(2), torch.ones(2)), 1)
    q = GMM.gaussian(torch.zeros(2), 4.0)
    same = Independent(Normal(torch.zeros(2), torch.full((2,), 2.0)), 1)
    torch.testing.assert_close(log_overlap(q, box), log_overlap(same, box))


def test_an_empty_batch_of_full_covariances():
    assert FullGMM(torch.zeros(0, 1), torch.zeros(0, 1, 2), torch.zeros(0, 1, 2, 2)).batch_shape == (0,)


def test_narrow_components_far_apart_are_not_left_to_a_matrix_product():
    mu = torch.tensor([[-1e3, 1e3], [1e3, -1e3]], dtype=torch.float64)
    p = GMM(torch.full((2,), 0.5, dtype=torch.float64).log(), mu, torch.full_like(mu, 1e-8))
    z = mu + 1e-4 * torch.randn(2, 2, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(matrix_log_prob(p)(z), p.log_prob(z), atol=1e-6, rtol=0)


# likelihoods


def test_the_smallest_variance_is_the_one_that_is_set():
    x, out = torch.ones(1, 3), torch.tensor([0.0, -50.0])[None, :, None].expand(1, 2, 3)
    wanted = Normal(0.0, 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(Gaussian(min_var=1.0).log_prob(x, out), wanted, atol=1e-3, rtol=0)


def test_the_probabilities_of_few_bins_sum_to_one():
    kind, out = DiscretizedLogistic(bins=4), torch.tensor([0.1, -1.5])[None, :, None].expand(4, 2, 1)
    x = torch.linspace(-0.5, 0.5, 4)[:, None]
    assert kind.log_prob(x, out).exp().sum().item() == pytest.approx(1, abs=1e-5)


# networks, layers and rivals


def test_a_decoder_has_the_activations_of_its_row():
    for net in make_networks("pinwheel", (2,), 2, 1, seeded()):
        assert [type(m) for m in net.net if not isinstance(m, nn.Linear)] == 2 * [nn.Softplus]


def test_two_layers_take_their_weight_and_the_upper_code_that_is_given():
    encoder, decoder, lower = layered_networks("mlp", (4, 4), 2, 2, 1, seeded(), skip=True)
    parts = encoder, decoder, StandardNormal(2), Bernoulli()
    model = two_layers(CSRAE)(*parts, lower=lower, lower_weight=3.0)
    x = (torch.rand(5, 4, 4, generator=seeded()) > 0.5).float()
    terms = model.loss(x, seeded()).means()
    wanted = terms["reconstruction"] + terms["divergence"] + 3 * terms["divergence_lower"]
    torch.testing.assert_close(model.loss(x, seeded()).loss, wanted)
    z = model.encode(x).mean
    assert model.encode_lower(x, z).mean.equal(model.encode_lower(x).mean)
    assert not torch.allclose(model.encode_lower(x, z + 1).mean, model.encode_lower(x).mean, atol=1e-3)


def test_what_an_rae_asks_for_is_half_a_square():
    q, decoder = GMM.gaussian(torch.tensor([[1.0, 2.0, 2.0]]), 1e-6), mlp(3, 4, generator=seeded())
    model = RAE(mlp(4, 6), decoder, StandardNormal(3), Bernoulli())
    assert model.divergence(q, q, None).tolist() == [4.5]
    squares = sum(w.square().sum() for w in decoder.parameters())
    torch.testing.assert_close(SmallWeights(decoder)(q, q), OF_WEIGHTS * squares / 2)


# patterns of answers


def test_a_pattern_of_no_frame_keeps_the_weight_of_those_it_begins_with():
    p = Patterns(torch.tensor([0.0, -1000.0]), torch.zeros(2, 3))
    found = em_of_patterns(p, torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0], [1, 0, 0]]), smooth=0.5)
    torch.testing.assert_close(found.logw.exp(), torch.tensor([0.75, 0.25]))  # 2 of 8 frames


# data and features


def test_each_split_of_grey_images_is_binarised_by_itself():
    half = torch.full((20, 8), 0.5)
    data = load_data(dict(x_train=half, x_val=half, x_test=half), "bernoulli")
    assert data.dynamic and not data.fixed("val").equal(data.fixed("test"))
    assert not data.fixed("train").equal(data.fixed("val"))


def test_a_classifier_is_of_the_best_epoch_and_of_labelled_rows(monkeypatch):
    digits = load_data("digits")
    data, epoch, right = replace(digits, y_train=digits.y_train.clone()), count(1), iter((0.5, 0.9, 0.1))
    data.y_train[::2] = -1

    def train(net, opt, data, rows):
        assert (data.y_train[rows] >= 0).all() and len(rows) == data.n_labelled
        net.head.bias.data.fill_(next(epoch))

    monkeypatch.setattr(metrics, "_train_epoch", train)
    monkeypatch.setattr(metrics, "accuracy", lambda net, data: next(right))
    assert metrics.train_classifier(data, 300, progress=False).head.bias.unique().tolist() == [2]


def test_accuracy_is_a_share_of_the_rows_whose_label_is_known():
    x, y = torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5)
    data = replace(load_data(dict(x=x, y=y)), x_val=x, y_val=y.masked_fill(torch.arange(20) < 10, -1))
    net = metrics.Classifier((4,), 4)
    net.body, net.head = nn.Identity(), nn.Linear(4, 4, bias=False)
    net.head.weight.data = torch.eye(4)
    assert metrics.accuracy(net, data) == 1


def test_another_split_asks_for_another_classifier():
    a, b = (metrics._classifier_key(load_data("digits", split_seed=s)) for s in (0, 1))
    assert a != b


def test_inception_sees_grey_levels_from_0_to_1(monkeypatch):
    monkeypatch.setattr(metrics, "inception", lambda layer: nn.Identity())
    x = torch.arange(256, dtype=torch.uint8).repeat(10).view(40, 8, 8).numpy()
    data = load_data(dict(x=x))
    seen = metrics.inception_features(data, 64).of(torch.tensor([-0.5, 0.0, 0.5]).view(3, 1, 1))
    assert seen[:, 0, 0, 0].tolist() == [0, 0.5, 1]


# clusters


def test_every_layout_has_a_seed_and_codes_are_drawn_from_all(monkeypatch):
    seeds = []

    def layout(codes, seed):
        seeds.append(seed)
        return codes[:, :2]

    monkeypatch.setattr(clusters, "code_map", layout)
    codes = torch.randn(60, 3, generator=seeded())
    codes[:, 2] = torch.arange(60)
    found = [cluster_codes(codes, 2, seed, most=20) for seed in (0, 1)]
    assert seeds == [0, 1, 2, 3, 4, 5]
    drawn = [set(f.codes[:, 2].tolist()) for f in found]
    assert max(drawn[0]) > 20 and drawn[0] != drawn[1]


def test_as_many_neighbours_vote_as_asked_for():
    codes = torch.tensor([[0.0], [1.0], [1.1]])
    found = CodeClusters(codes, codes.repeat(1, 2), torch.tensor([0, 1, 1]))
    votes = [found.predict(torch.tensor([[0.1]]), n).item() for n in (1, 3)]
    assert votes == [0, 1]


# configurations


def test_an_option_that_is_used_is_part_of_what_a_run_is():
    a, b = (Config(model="CSRAE", layers=2, lower_weight=w) for w in (1.0, 2.0))
    assert identity(a) != identity(b) and run_name(a) != run_name(b)
    assert resolve(replace(a, latent_dim=7)).lower_dim == 7
    usual = Config(labels=100)
    assert resolve(replace(usual, batch_size=200)).labelled_batch == 2 * resolve(usual).labelled_batch


def test_how_a_run_is_evaluated_is_no_part_of_what_it_is():
    for field in (dict(ll_samples=3), dict(fid_layer=0), dict(fid_images=5), dict(expost_components=3)):
        assert run_name(Config(**field)) == run_name(Config())


def test_runs_that_bound_another_term_go_in_another_fleet():
    bounds = [Config(constraint=c) for c in ("divergence<=3", "divergence<=5", "reconstruction<=80")]
    assert [len(group) for group in fleets(bounds)] == [2]


class OneWidth(nn.Module):
    "An encoder whose q(z|x) share their weight and their variances, which broadcast."

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def forward(self, x):
        return GMM(torch.zeros(1), self.net(x)[:, None], torch.ones(1, 2))


class InFull(OneWidth):
    "The same, of whole tensors."

    def forward(self, x):
        return GMM(*super().forward(x).broadcast())


@pytest.mark.parametrize("kind", [VAE, IWAE, VampPriorVAE])
def test_an_encoder_may_give_what_broadcasts(kind):
    x, found = torch.rand(6, 4, generator=seeded()).round(), []
    torch.manual_seed(0)
    both, decoder = (OneWidth(), InFull()), nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 4)))
    both[1].load_state_dict(both[0].state_dict())
    for encoder in both:
        prior = VampPrior(encoder, x[:3]) if kind is VampPriorVAE else StandardNormal(2)
        model = kind(encoder, decoder, prior, Bernoulli())
        found.append((model.loss(x, seeded()).loss, model.log_likelihood(x, 5, seeded())))
    assert all(map(torch.equal, *found))
