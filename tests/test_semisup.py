"Learning from few labels: what fit makes of it, and what is refused."

import dataclasses

import pytest
import torch
from torch import nn

from csrae_nb import training
from csrae_nb.catalogue import load_data
from csrae_nb.mixtures import Draws, Share
from csrae_nb.evaluation import complete_run, results_table
from csrae_nb.few_labels import LabelTask
from csrae_nb.labels import ManyLabels, OneLabel
from csrae_nb.likelihoods import Bernoulli
from csrae_nb.models import CSRAE
from csrae_nb.priors import StandardNormal
from csrae_nb.config import Config, resolve
from csrae_nb.files import runs_folder
from csrae_nb.runs import fit, load_run
from csrae_nb.semisup import LABEL_NETWORKS, LabelDecoder, LabelEncoder, SemiSupervised
from csrae_nb.tasks import task_of

CFG = Config(
    labels=100.0, epochs=2, warmup=1, kmeans_epoch=1, ll_samples=2, expost_components=5, fid_images=50
)
pytestmark = pytest.mark.usefixtures("own_runs")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.mark.parametrize("model", ["VAE", "MixtureVAE", "VampPriorVAE", "CSRAE", "MixtureCSRAE"])
def test_every_model_learns_with_labels(digits, model):
    metrics = complete_run(cfg := dataclasses.replace(CFG, model=model), digits, progress=False)
    assert (
        0 < metrics["error"] < 90
        and metrics["error_val"] < 90
        and metrics["log_likelihood"] < 0
        and metrics["frechet_classifier_samples"] > 0
    )
    (folder,) = runs_folder().glob("digits-*-labels100-seed0-*")
    run = load_run(folder)
    assert (
        run.best_epoch == min(run.history, key=lambda r: r["val_error"])["epoch"]
        and LabelTask(run.cfg).metrics(run.model, digits)["error"] == metrics["error"]
    )
    (row,) = results_table([folder])
    assert (
        row["labels"] == 100
        and row["error_mean"] == metrics["error"]
        and "-p labels 100" in row["command"]
        and resolve(cfg).labels == 100
    )


def test_log_p_under_another_prior(digits):
    "Under its own, given by hand, it is the same; log p(x | y) is under the other as that of an autoencoder."
    run = fit(CFG, digits, progress=False)
    x, m = digits.x_test[:20], run.model
    of = lambda **kw: m.log_likelihood(x, 50, torch.Generator().manual_seed(0), **kw)
    torch.testing.assert_close(of(prior=m.prior()), of())
    p = m.prior()
    far = type(p)(p.logw, p.mu + 20, p.var)
    assert (of(prior=far) < of() - 50).all()


def test_a_run_goes_on_where_it_was_stopped(digits, monkeypatch):
    whole = fit(dataclasses.replace(CFG, name="whole", epochs=3), digits, progress=False)
    epoch = training.Training.train_and_validate

    def stop(t, bar):
        if t.meta["epoch"] == 1:
            raise KeyboardInterrupt
        epoch(t, bar)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(training.Training, "train_and_validate", stop)
        fit(cfg := dataclasses.replace(CFG, name="stopped", epochs=3), digits, progress=False)
    again = fit(cfg, digits, progress=False)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


@pytest.mark.parametrize("model", ["VAE", "MixtureCSRAE"])
def test_two_processes_see_what_one_would(digits, model):
    task = task_of(resolve(dataclasses.replace(CFG, model=model, components=5)))
    net = task.make_model(task.about(digits))
    rows = task.rows(digits, 1)[0]
    x, (y,) = (
        digits.draw(digits.x_train[rows], torch.Generator().manual_seed(0)),
        task.arguments(digits, rows),
    )
    net.trust.full = 0.5
    whole = net.loss(x, torch.Generator().manual_seed(1), y)
    parts = [net.loss(x[r::2], Share(torch.Generator().manual_seed(1), r, 2), y[r::2]) for r in range(2)]
    torch.testing.assert_close((parts[0].loss + parts[1].loss) / 2, whole.loss)
    for r in range(2):
        torch.testing.assert_close(parts[r].reconstruction, whole.reconstruction[r::2])


def test_each_epoch_sees_all_images(digits):
    task = task_of(resolve(CFG))
    rows = task.rows(digits, 1)
    labelled, others = rows[:, :20], rows[:, 20:]
    assert torch.bincount(digits.y_train[labelled.unique()]).tolist() == [10] * 10  # ten of each digit
    assert (
        not set(labelled.flatten().tolist()) & set(others.flatten().tolist())
        and len(others.unique()) == others.numel() > len(digits.x_train) - 100 - 80
    )
    assert not rows.equal(task.rows(digits, 2)) and rows[:, :20].unique().equal(
        task.rows(digits, 2)[:, :20].unique()
    )
    supervised = task_of(resolve(dataclasses.replace(CFG, labels=float(len(digits.x_train)))))
    assert len(supervised.arguments(digits, supervised.rows(digits, 1)[0])[0]) == 100


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model="IWAE"), "labels have no IWAE"),
        (dict(network="residual"), "has no part for labels"),
        (dict(labels=5000.0), "expected up to 1439"),
        (dict(labels=1e-9), "at least one image"),
        (dict(labelled_batch=100), "leaves no room"),
        (dict(labels=1300.0, batch_size=200), "takes 160 images without a label, and there are 139"),
    ],
)
def test_what_is_refused(digits, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(dataclasses.replace(CFG, **changes), digits, progress=False)
    assert not runs_folder().exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model="IWAE"), "labels have no IWAE"),
        (dict(model="WAE"), "labels have no WAE"),
        (dict(network="residual"), "with labels there are mlp"),
        (dict(labelled_batch=100), "leaves no room for others in batch_size=100"),
        (dict(batch_size=1), "leaves no room for others in batch_size=1"),
        (dict(prior_objective="aggregate"), "with labels the prior learns from each image"),
        (dict(model="Supervised", labels=0), "learns from labels alone"),
        (dict(model="Supervised", patterns=3, answers="intensity"), "answers='intensity' has others"),
    ],
)
def test_what_labels_cannot_train_is_said_before_videos_are_read(changes, message):
    with pytest.raises(ValueError, match=message):  # of disfa's preset, which has labels
        Config(dataset="disfa", **changes)


def test_a_classifier_alone_has_no_others_in_its_batch():
    assert Config(dataset="disfa", model="Supervised", batch_size=1).batch_size == 1


def test_labels_that_are_not_there(digits):
    none = torch.full_like(digits.y_train, -1)
    for y in (None, none):
        with pytest.raises(ValueError, match="has no labels of its training images"):
            fit(CFG, dataclasses.replace(digits, y_train=y), progress=False)


@pytest.mark.parametrize("kind", [OneLabel(3), ManyLabels(2)])
def test_gradients_through_softened_draws_are_those_of_the_formula(kind):
    logits = torch.randn(
        4, kind.outputs, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0)
    )
    normal = torch.randn(4, kind.outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(
        lambda a: kind.relax(a, 0.7, normal), logits
    ) and torch.autograd.gradcheck(
        lambda a: kind.kl(a, torch.zeros(kind.outputs, dtype=torch.float64)), logits
    )


def test_a_label_that_cannot_be_is_tried_without_harm(digits):
    "In single precision the smallest draws have probability 0: labels of probability 1e-43 are tried, too."

    class Small(Draws):
        def standard_normal(self, like):
            return torch.full_like(like, -8.0)

    task = task_of(resolve(dataclasses.replace(CFG, components=5)))
    net = task.make_model(task.about(digits))
    rows = task.rows(digits, 1)[0]
    classify = net.encoder.classify
    net.encoder.classify = lambda h: 1e4 * classify(h)
    net.loss(digits.x_train[rows], Small(), *task.arguments(digits, rows)).loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_the_first_phase_goes_where_the_run_goes(tmp_path, monkeypatch):
    "A folder of one's own holds both, without checkpoints if none were asked for; nothing lies elsewhere."
    saved, save = [], training.Training.save
    monkeypatch.setattr(
        training.Training, "save", lambda t: (saved.append((t.path.name, t.meta["epoch"])), save(t))
    )
    cfg = Config(labels=100.0, pretrain=3, epochs=3, warmup=1, ll_samples=0)
    run = fit(cfg, progress=False, folder=tmp_path / "mine", checkpoints=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
    assert (load_run(tmp_path / "mine" / "first").cfg.epochs, run.path) == (3, tmp_path / "mine")
    assert saved == [("first", 0), ("first", 3), ("mine", 0), ("mine", 3)]


class Scaled(CSRAE):
    "With a divergence that has something of its own."

    def __init__(self, *args, loose=False, **kw):
        super().__init__(*args, **kw)
        self.scale = nn.Parameter(torch.ones(())) if loose else nn.Linear(1, 1)

    def divergence(self, q, p, z, generator=None):
        return super().divergence(q, p, z) * self.scale(torch.ones(1))


def with_labels(**kw):
    kind, net = OneLabel(3), LABEL_NETWORKS["mlp"]
    encoder, decoder = LabelEncoder((8,), 2, kind, net), LabelDecoder((1, 8), 2, kind, net)
    inner = Scaled(encoder, decoder, StandardNormal(2), Bernoulli(), **kw)
    return SemiSupervised(inner, torch.zeros(3), 0.5)


def test_what_a_divergence_has_of_its_own_is_trained_and_saved_with_labels():
    model = with_labels()
    assert "scale.weight" in model.state_dict()
    model.loss(torch.rand(6, 8).round(), y=torch.arange(3)).loss.backward()
    assert model.scale.weight.grad.abs().sum() > 0
    assert model.to("meta").divergence.__self__.scale.weight.is_meta
    with pytest.raises(ValueError, match="Scaled holds scale itself; .* keep it in a module"):
        with_labels(loose=True)
