"Patterns of answers as a prior: what a run with them trains on, keeps, measures and refuses."

from dataclasses import replace

import numpy as np
import pytest
import torch

from csrae_nb.catalogue import load_data
from csrae_nb.config import Config, command, identity, resolve, run_name
from csrae_nb.fleet import stackable
from csrae_nb.patterns import Patterns, fit_patterns, informed, log_agreement, patterns_divergence
from csrae_nb.runs import fit, load_run
from csrae_nb.few_labels import MOST_FRAMES, of_patterns
from csrae_nb.labels import ManyLabels
from csrae_nb.tasks import task_of
from small_runs import SMALL

pytestmark = pytest.mark.usefixtures("own_runs", "hasty")
CFG = replace(SMALL, model="Supervised", labels=0.5, labelled_batch=8, patterns=3)


def answers(n=200, unknown=0, seed=0):
    "Points, and three answers to each, the first two of which mostly agree; of some the last is not known."
    rng = np.random.default_rng(seed)
    first = rng.random(n) < 0.5
    second = np.where(rng.random(n) < 0.9, first, ~first)
    y = np.stack([first, second, rng.random(n) < 0.3], 1).astype(float)
    y[:unknown, 2] = np.nan
    x = rng.normal(size=(n, 4)) + 2 * np.nan_to_num(y) @ np.eye(3, 4)
    return dict(x_train=x, y_train=y, x_val=x[:50], y_val=y[-50:], x_test=x[:50], y_test=y[-50:])


@pytest.mark.parametrize("L, N, K", [(1, 1, 1), (3, 2, 4), (8, 5, 3)])
def test_the_divergence_is_that_of_all_rows(L, N, K):
    g = torch.Generator().manual_seed(L)
    rows = torch.cartesian_prod(*[torch.arange(2)] * L).view(-1, L)
    q, p = (
        Patterns(
            torch.randn(n, generator=g).double().log_softmax(0), 4 * torch.randn(n, L, generator=g).double()
        )
        for n in (N, K)
    )
    a, b = q.log_prob(rows), p.log_prob(rows)
    assert log_agreement(q, p).item() == pytest.approx((a + b).logsumexp(0).item(), abs=1e-9)
    by_rows = ((2 * a).logsumexp(0) + (2 * b).logsumexp(0)) / 2 - (a + b).logsumexp(0)
    assert patterns_divergence(q, p).item() == pytest.approx(by_rows.item(), abs=1e-9)


def test_the_divergence_has_gradients_where_answers_are_sure():
    logits = torch.tensor([[80.0, -80.0, 0.0], [-200.0, 200.0, 1.0]], requires_grad=True)
    p = Patterns(torch.zeros(1), torch.tensor([[-90.0, 90.0, 2.0]]))
    patterns_divergence(Patterns.together(logits), p).backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
    assert informed(logits, p).isfinite().all()


def test_frames_without_labels_are_held_against_the_patterns():
    "The loss by hand; labelled frames, which come first, have no part in the divergence."
    data, cfg = load_data(answers()), resolve(CFG)
    task = task_of(cfg)
    assert (task.in_batch(data), task.rows(data, 1).shape[1]) == (8, 20)
    model = task.make_model(task.about(data))
    x, y = data.x_train[:20], data.y_train[:8]
    logits = model.predict(x)
    apart = patterns_divergence(Patterns.together(logits[8:]), model.patterns)
    wanted = model.kind.cross_entropy(logits[:8], y).mean() + cfg.lam_patterns * apart
    assert model.eval()(x, None, y).loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_run_keeps_its_patterns_and_measures_by_them():
    data = load_data(answers())
    run = fit(CFG, data, False)
    again = load_run(run.path).model.patterns
    labelled = data.y_train[run.task.labelled(data)]
    assert all(t.equal(u) for t, u in zip(vars(again).values(), vars(fit_patterns(labelled, 3)).values()))
    metrics = run.task.metrics(run.model, data)
    assert {"informed_f1", "informed_tuned_f1"} <= metrics.keys() and metrics["to_patterns"] >= 0
    assert metrics["labels_to_patterns"] < patterns_divergence(
        Patterns.together(torch.zeros(1, 3)), again
    )  # than undecided


def test_at_weight_0_with_all_labels_the_classifier_is_that_without_patterns():
    data, every = load_data(answers()), replace(CFG, labels=1.0)
    a, b = (
        fit(replace(every, **kw), data, False).model.state_dict()
        for kw in (dict(lam_patterns=0.0), dict(patterns=0))
    )
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_rows_that_are_known_in_part_count_for_the_patterns_if_all_labels_are_used():
    data = load_data(answers(unknown=60))
    every, some = (task_of(resolve(replace(CFG, labels=l))) for l in (1.0, 0.5))
    assert (len(every.answered(data)), len(some.answered(data))) == (200, 70)
    assert (every.answered(data) < 0).sum() == 60 and every.in_batch(data) == 8


def test_long_videos_are_thinned_and_labels_may_lack():
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(30_000, 3, generator=g), (torch.rand(30_000, 3, generator=g) < 0.3).long()
    p, kind = fit_patterns(y, 3), ManyLabels(3)
    found = of_patterns(kind, p, (logits, y), None)
    assert found["labels_to_patterns"] < 0.02 and 30_000 > MOST_FRAMES and "informed_tuned_f1" not in found
    assert of_patterns(kind, p, None, (logits, y)) == {}
    assert of_patterns(kind, p, (logits, y.index_fill(1, torch.tensor([2]), -1)), None)["to_patterns"] is None


def test_names_of_runs_without_patterns_stay():
    old = Config(dataset="faces_demo", model="Supervised", labels=1.0)
    assert not {"patterns", "lam_patterns", "labelled_batch"} & identity(old).keys()
    new = replace(old, patterns=8)
    assert identity(new).keys() - identity(old).keys() == {"patterns", "lam_patterns", "labelled_batch"}
    assert len({run_name(c) for c in (old, new, replace(new, lam_patterns=0.0))}) == 3
    assert "-p patterns 8" in command(new) and stackable(resolve(new))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(model="MixtureCSRAE"),
            "patterns=3 has no effect on this MixtureCSRAE; it is for model=Supervised",
        ),
        (
            dict(patterns=0, lam_patterns=2.0),
            "lam_patterns=2.0 has no effect on this Supervised; it is for patterns=1 or more",
        ),
        (dict(patterns=-1), "patterns=-1; expected at least 0"),
        (dict(lam_patterns=-1.0), "lam_patterns=-1.0; expected at least 0"),
        (dict(dataset="faces_demo", answers="intensity"), "answers='intensity' has others"),
        (dict(patterns=9), "9 patterns of . different rows of answers"),
        (dict(labels=1.0), "batches that are balanced do not have the patterns"),
        (dict(dataset="digits"), "is of answers yes or no; digits has classes"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cfg = replace(CFG, **changes)
        fit(cfg, None if cfg.dataset == "digits" else answers(), progress=False)
