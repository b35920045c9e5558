"""`python -m bench.proposals RUN … --csv FILE`: how much of log p(x) is missed by draws from q(z|x) alone.

Eq. (28) for each of 1,000 test images, the same for all runs: from q as it is, with larger deviations, and
from the mixture of several by which `log_likelihood` estimates. All are estimates from below, so the
largest is the nearest. Test images may be sorted by class, so they are drawn."""

import math

import torch
from tqdm.auto import tqdm

from csrae_nb.evaluation import write_table
from csrae_nb.files import generator
from csrae_nb.mixtures import matrix_log_prob
from csrae_nb.models import WIDTHS

from .rulers import asked, described, parser_of

IMAGES = 1000
PROPOSALS = (1.0,), (2.0,), (4.5,), WIDTHS


def estimates(run, x, widths, draws):
    "log p of images, by proposals of these widths."
    m, g = run.model.eval(), generator(run.cfg.seed, "proposals")
    log_prior = matrix_log_prob(m.prior())
    found = [sum(m.log_weights(b, m.encode(b), log_prior, draws, g, widths)) for b in x.split(2)]
    return torch.cat(found, 1).logsumexp(0).double() - math.log(draws)


@torch.no_grad()
def of_run(run, data, draws):
    "A row for each proposal."
    x, c = data.fixed("test"), run.cfg
    x = x[torch.randperm(len(x), generator=generator(0, "proposals"))[:IMAGES]]
    of = dict(lam=c.lam, divergence=c.objective, posterior_components=c.posterior_components)
    of |= dict(layers=c.layers, skip=c.skip, epochs=c.epochs)
    for widths in PROPOSALS:
        found = estimates(run, x, widths, draws)
        row = dict(log_likelihood=round(found.mean().item(), 3))
        row |= dict(se=round(found.std().item() / math.sqrt(len(x)), 3), draws=draws, images=len(x))
        yield of | dict(widths=" ".join(f"{w:g}" for w in widths)) | row


def main():
    p = parser_of(__doc__)
    p.add_argument("--draws", type=int, default=500, help="for each image and proposal (500)")
    o, runs, data = asked(p)
    rows = []
    for run in tqdm(runs):
        rows += [described(run) | row for row in of_run(run, data, o.draws)]
        write_table(o.csv, rows)


if __name__ == "__main__":
    main()
