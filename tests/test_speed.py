"What makes it fast and does not drift: operators and host synchronisations. Times are for `make bench`."

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from csrae_nb.catalogue import load_data
from csrae_nb.config import Config, resolve
from csrae_nb.files import progress_bar
from csrae_nb.process import accelerator
from csrae_nb.tasks import task_of
from csrae_nb.training import train_epoch, untrained


class Operators(TorchDispatchMode):
    "Counts the operators that are launched."

    def __init__(self):
        super().__init__()
        self.n = Counter()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n[f.overloadpacket._qualified_op_name] += 1
        return f(*args, **(kwargs or {}))


def epoch(model, steps, **fields):
    "Operators of an epoch of so many steps."
    g = torch.Generator().manual_seed(0)
    x = [(torch.rand(n, 8, 8, generator=g) < 0.5).float() for n in (10 * steps, 10, 10)]
    data = load_data(dict(zip(("x_train", "x_val", "x_test"), x)), "bernoulli")
    fields = dict(model=model, network="mlp", latent_dim=3, components=5, batch_size=10) | fields
    cfg = resolve(Config(dataset="arrays", **fields))
    net, opt = untrained(task_of(cfg), data, "cpu")
    with accelerator(cfg) as acc, progress_bar(False) as bar, Operators() as count:
        train_epoch(task_of(cfg), acc, acc.prepare(net), opt, data, 1, bar)
    return count.n


@pytest.mark.parametrize(
    "model, fields, most",
    [
        ("VAE", {}, 200),
        ("CSRAE", {}, 385),
        ("MixtureCSRAE", {}, 455),
        ("MixtureCSRAE", dict(prior="vamp"), 515),
    ],
)
def test_a_step_launches_few_operators_and_waits_for_none(model, fields, most):
    one, five = epoch(model, 50, **fields), epoch(model, 250, **fields)
    assert (five.total() - one.total()) / 200 < most
    syncs = lambda n: n["aten::_local_scalar_dense"] + n["aten::nonzero"]
    assert syncs(five) - syncs(one) <= 4 * 5  # a look at the losses every fifty steps, and nothing else
