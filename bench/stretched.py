"""`python -m bench.stretched RUN … --csv FILE`: why samples can lie nearer to images than reconstructions do.

Test images are reconstructed from the means of their codes, from these stretched by a factor around their
centre, and from draws of q(z|x); beside them are samples. Of each set: its Fréchet distance by the
classifier's features, how much of it is the distance of the means, the variance of its features as a part of
that of the images' own, and the reconstruction in nats; of the runs, the variance of the prior as a part of
that of all codes."""

import torch
from tqdm.auto import tqdm

from csrae_nb.evaluation import real_images, write_table
from csrae_nb.files import generator
from csrae_nb.metrics import classifier_features, feature_statistics, frechet_distance

from .rulers import asked, described, parser_of

FACTORS = (1.07, 1.15, 1.24)


def sets_of(run, q):
    "Name of a set: the codes that its images are decoded from."
    mu, sd = q.mu[:, 0], q.var[:, 0].sqrt()
    centre, g = mu.mean(0), generator(run.cfg.seed, "stretched")
    prior = run.model.prior().sample(len(mu), g)
    drawn = mu + sd * torch.randn(mu.shape, generator=g)
    spread = (prior.var(0).sum() / drawn.var(0).sum()).item()
    stretched = {f"stretched by {f}": centre + f * (mu - centre) for f in FACTORS}
    return dict(reconstructions=mu, drawn=drawn, samples=prior) | stretched, spread


def nats(model, x, z):
    "−log p(x|z), a mean over images."
    parts = [model.likelihood.log_prob(a, model.decoder(b)) for a, b in zip(x.split(500), z.split(500))]
    return -torch.cat(parts).double().mean().item()


@torch.no_grad()
def of_run(run, data, features, images):
    "A row for each set."
    model, x = run.model, data.fixed("test")
    sets, spread = sets_of(run, model.encode(x))
    for name, z in tqdm(sets.items()):
        found = feature_statistics(
            features.of, (model.likelihood.mean(model.decoder(b)) for b in z.split(500))
        )
        row = dict(distance=frechet_distance(found, images))
        row |= dict(of_means=(found.mean - images.mean).square().sum().item())
        row |= dict(variance=(found.cov.trace() / images.cov.trace()).item(), prior_spread=spread)
        row |= dict(nats=nats(model, x, z)) if name != "samples" else {}
        yield dict(set=name, **{k: round(v, 3) for k, v in row.items()})


def main():
    o, runs, data = asked(parser_of(__doc__))
    real, rows = real_images(data), []
    features = classifier_features(real)
    images = feature_statistics(features.of, real.x_test.split(500))
    for run in runs:
        rows += [described(run) | row for row in of_run(run, data, features, images)]
        write_table(o.csv, rows)


if __name__ == "__main__":
    main()
