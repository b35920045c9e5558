"""`python -m bench.neighbours RUN … --csv FILE`: neighbours' errors, by means and draws of q(z|x).

Static MNIST has no labels: each of its images was drawn from one of MNIST's, pixel by pixel, and has the
label of the likeliest; any of another label is less likely by 13 nats and more. There the means alone are
asked, of two layers both codes."""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from csrae_nb.evaluation import run_codes, write_table
from csrae_nb.formats import read_file
from csrae_nb.metrics import knn_error
from csrae_nb.results import read_rows
from csrae_nb.tasks import mean_codes

from .rulers import asked, described, parser_of

KS = 3, 5, 10
KEY = ("model", "network", "prior", "components", "latent_dim", "layers", "skip")
KEY += ("weight", "epochs", "seed", "code")


def labels_of(x: Tensor, part: str) -> Tensor:
    "Of black and white images (n, 28, 28), from those of MNIST's train or t10k that they were drawn from."
    grey, y = (read_file(f"{part}-{name}")[0] for name in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    white = torch.tensor(grey).flatten(1).float() / 255
    p = white.clamp(1e-4, 1 - 1e-4)
    logits, rest = p.logit(), (1 - p).log().sum(1)
    drawn_from = torch.cat([(b @ logits.T + rest).argmax(1) for b in x.flatten(1).split(1000)])
    apart = (x.flatten(1) - white[drawn_from]).abs().amax(1)
    missed = apart == 1  # a white pixel of a black one, or a black one of a white
    if missed.any():
        raise ValueError(f"{int(missed.sum()):,} images of {len(x):,} were drawn from none of MNIST's {part}")
    return torch.tensor(y).long()[drawn_from]


def codes(run, data):
    "What a row says of which code, and the codes of training and test images."
    if data.y_train is not None:
        yield "z, drawn", *(run_codes(run, data, part) for part in ("train", "test"))
        yield "z", *(mean_codes(run.model, data.fixed(part)) for part in ("train", "test"))
        return
    two = run.cfg.layers == 2
    encoders = {"z2" if two else "z": run.model.encode} | ({"z1": run.model.encode_lower} if two else {})
    for name, encode in encoders.items():
        yield name, mean_codes(run.model, data.x_train, encode), mean_codes(run.model, data.x_test, encode)


@torch.no_grad()
def main():
    o, runs, data = asked(p := parser_of(__doc__))
    y_train, y_test = data.y_train, data.y_test
    if y_train is None:
        if runs[0].cfg.dataset != "static_mnist":
            p.error(f"{runs[0].cfg.dataset} has no labels")
        y_train, y_test = labels_of(data.x_train, "train"), labels_of(data.x_test, "t10k")
    rows = read_rows(o.csv, KEY)
    done = {tuple(r[k] for k in KEY) for r in rows}
    for run in tqdm(runs):
        of = described(run) | {k: getattr(run.cfg, k) for k in ("epochs", "layers", "skip")}
        for code, train, test in codes(run, data):
            row = of | dict(code=code)
            if tuple(row[k] for k in KEY) not in done:
                errors = knn_error(train, y_train, test, y_test, KS)
                rows.append(row | {f"knn{k}": e for k, e in errors.items()})
                write_table(o.csv, rows)


if __name__ == "__main__":
    main()
