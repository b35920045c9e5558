"""`make gpu`: what only a GPU can tell, in one command that needs no network, papermill or nbdev.

Does everything work there as on a processor, how fast is it, and the tables of the paper, most valuable
first, for as long as is given. Writes small CSV files as it goes."""

import argparse
import ast
import csv
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from itertools import islice
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

from csrae_nb.catalogue import load_data
from csrae_nb.divergence import cs_divergence
from csrae_nb.mixtures import GMM, Draws
from csrae_nb.overlap import naive_log_z
from csrae_nb.process import product_precision
from csrae_nb.evaluation import complete_run, finished_metrics, write_table
from csrae_nb.fleet import _Graph, _Steps, Fleet, fit_fleet, fleets, train_fleets
from csrae_nb.grids import attempt, distinct, read_sweep
from csrae_nb.metrics import train_classifier
from csrae_nb.sweeps import rows_there, seedless, sweep_table
from csrae_nb.config import Config, command, resolve, run_name
from csrae_nb.runs import fit, load_run, run_folder
from csrae_nb.tasks import make_model, task_of
from csrae_nb.training import Training, is_trained

HERE = Path(__file__).parents[1]
PARTS = ("smoke", "timing", "profile", "tables")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class Job:
    "Rows of one file, written as they are known; and until when there is time. What failed is tried again."

    def __init__(self, file, until):
        self.file, self.until, self.rows = Path(file), until, []
        if self.file.exists():
            with open(self.file, newline="") as f:
                self.rows = [r for r in csv.DictReader(f) if r.get("works") != "NO" and not r.get("error")]

    def has(self, **row):
        "Whether there is a row that says so."
        return any(all(r.get(k) == str(v) for k, v in row.items()) for r in self.rows)

    def add(self, **row):
        self.rows.append(row)
        print(
            "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
            flush=True,
        )
        columns = dict.fromkeys(k for r in self.rows for k in r)
        write_table(self.file, [{k: r.get(k, "") for k in columns} for r in self.rows])

    @property
    def left(self):
        return self.until - time.monotonic()


# smoke: does it work as on a processor?


class Same(Draws):
    "The same random numbers on every device."

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def standard_normal(self, like):
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype).to(like)


KINDS = {
    "VAE": dict(model="VAE"),
    "IWAE": dict(model="IWAE"),
    "CSRAE": dict(model="CSRAE"),
    "MixtureVAE": dict(model="MixtureVAE"),
    "VampPriorVAE": dict(model="VampPriorVAE"),
    "MixtureCSRAE mog": dict(model="MixtureCSRAE"),
    "MixtureCSRAE vamp": dict(model="MixtureCSRAE", prior="vamp"),
    "MixtureCSRAE prior network": dict(model="MixtureCSRAE", prior_network=True),
    "MixtureCSRAE learned weights": dict(model="MixtureCSRAE", learned_weights=True),
}
SHAPES = {
    "mlp": (28, 28),
    "pinwheel": (6,),
    "residual": (3, 32, 32),
    "faces": (3, 32, 32),
    "resnet18": (3, 32, 32),
}
LIKELIHOODS = {"mlp": "bernoulli", "pinwheel": "gaussian"}


def losses(cfg, network, device, steps):
    "The losses of so many steps on random examples, the same on every device."
    g = torch.Generator().manual_seed(1)
    x = torch.rand(steps, 20, *SHAPES[network], generator=g)
    likelihood = LIKELIHOODS.get(network, "discretized_logistic")
    if likelihood == "bernoulli":
        x = (x < 0.3).float()
    elif likelihood == "discretized_logistic":
        x = (x * 255).floor() / 255
    model = make_model(cfg, SHAPES[network], likelihood, x.flatten(0, 1)[: cfg.components]).to(device).train()
    opt, noise, out = torch.optim.Adam(model.parameters(), lr=5e-4, fused=True), Same(2), []
    for xb in x.to(device):
        loss = model.loss(xb, noise).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
        out.append(loss.item())
    return torch.tensor(out)


def on_both(kind, network, steps):
    def check():
        cfg = resolve(Config(dataset="other", network=network, latent_dim=8, components=10, **KINDS[kind]))
        a, b = (losses(cfg, network, d, steps) for d in ("cpu", DEVICE))
        apart = ((a - b).abs() / a.abs()).max().item()
        bound = 1e-4 if network in ("mlp", "pinwheel") else 1e-2  # convolutions use TF32
        if kind == "IWAE":
            bound = 1e-3  # its five draws weigh small differences
        assert apart < bound, f"losses {apart:.1e} apart, bound {bound}"
        return f"{apart:.1e} apart"

    return check


def digits(**fields):
    usual = dict(
        dataset="digits", epochs=4, warmup=2, kmeans_epoch=2, components=10, latent_dim=8, ll_samples=20
    )
    return Config(**usual | fields)


def weights(run):
    return torch.cat([v.flatten().double().cpu() for v in run.model.state_dict().values()])


def killed_and_resumed():
    whole = fit(digits(name="whole"), progress=False)
    saves, save = iter(range(3)), Training.save

    def dying(t):
        if next(saves, None) is None:
            raise KeyboardInterrupt
        save(t)

    with suppress(KeyboardInterrupt), patch.object(Training, "save", dying):
        fit(digits(name="killed"), progress=False)
    apart = (weights(fit(digits(name="killed"), progress=False)) - weights(whole)).abs().max().item()
    assert apart < 1e-4, f"weights {apart:.1e} apart"
    return f"weights {apart:.1e} apart"


def loads_on_a_processor():
    run = fit(digits(name="whole"), progress=False)
    assert run.device.type == DEVICE.type
    x = torch.rand(10, 8, 8, generator=torch.Generator().manual_seed(0)).round()
    a, b = load_run(run.path, "cpu").model.reconstruct(x), run.model.reconstruct(x.to(run.device)).cpu()
    assert (a - b).abs().max() < 1e-4
    return f"trained on {run.device}, {(a - b).abs().max():.1e} apart on cpu"


def together(kind, data=None, **fields):
    def check():
        label = "-".join([*kind.split(), *map(str, fields.values())])
        configs = [digits(seed=s, name=f"fleet-{label}-{s}", **KINDS[kind] | fields) for s in range(4)]
        runs = fit_fleet(configs, data, progress=False)
        lone = [
            fit(digits(seed=s, name=f"lone-{label}-{s}", **KINDS[kind] | fields), data, progress=False)
            for s in range(4)
        ]
        a, b = (sum(r.history[-1]["criterion"] for r in some) / 4 for some in (runs, lone))
        assert abs(a - b) < 0.05 * b, f"criterion {a:.3f} together, {b:.3f} alone"
        return f"criterion {a:.3f} together, {b:.3f} alone"

    return check


def table():
    "Rows whose columns are far from 1: the likelihood holds their units."
    x = 50 + 20 * torch.randn(600, 6, generator=torch.Generator().manual_seed(0))
    return dict(zip(("x_train", "x_val", "x_test"), x.split(200)))


def replayed(**fields):
    "The graph's steps against the same steps one operation at a time."

    def check():
        ends = []
        for eager in (3, 10**6):
            label = "-".join(["graph", str(eager), *fields])
            configs = [digits(seed=s, name=f"{label}-{s}", **fields) for s in range(4)]
            with patch.object(_Graph, "EAGER", eager):
                runs = fit_fleet(configs, progress=False)
            ends.append(torch.tensor([r.history[-1]["criterion"] for r in runs]))
        apart = (ends[0] / ends[1] - 1).abs().max().item()  # of weights the last bits grow, Adam being Adam
        assert apart < 1e-2, f"criteria {apart:.1e} apart"
        return f"criteria {apart:.1e} apart"

    return check


def one_classifier():
    "The one that distances of samples are measured with, wherever the data are."
    data = load_data("digits")
    here, there = (train_classifier(d, 3000, progress=False).cpu() for d in (data, data.to(DEVICE)))
    pairs = zip(here.state_dict().items(), there.state_dict().values())
    assert not (other := [k for (k, a), b in pairs if not a.equal(b)]), f"another {', '.join(other)}"
    return "the same to the bit"


def evaluated(**fields):
    def check():
        metrics = complete_run(digits(**fields), progress=False)
        return ", ".join(
            f"{k} {v:.2f}" for k in ("criterion", "knn3", "error") if (v := metrics.get(k)) is not None
        )

    return check


def notebook():
    "The cells of train.ipynb, as papermill would run them."
    cells = json.loads((HERE / "nbs" / "train.ipynb").read_text(encoding="utf-8"))["cells"]
    values = dict(__name__="__main__")
    for c in cells:
        if c["cell_type"] != "code" or "".join(c["source"]).startswith("%"):
            continue
        exec(compile(ast.parse("".join(c["source"])), c["id"], "exec"), values)
        if "parameters" in c["metadata"].get("tags", []):
            values |= dict(epochs=3, warmup=1)
    return f"{values['run'].device}, criterion {values['metrics']['criterion']:.2f}"


FLEETS_OF = {
    "labels": dict(labels=200),
    "prior network": dict(prior_network=True),
    "two layers": dict(layers=2),
    "mixture posterior": dict(posterior_components=2, objective="cs_each"),
    "implicit draws": dict(posterior_components=2, objective="cs_each", posterior_draws="implicit"),
    "labels, vamp": dict(labels=200, prior="vamp"),
    "classifier": dict(labels=200, model="Supervised"),
    "matched, with a queue": dict(prior_objective="aggregate", queue=50),
    "a bound": dict(constraint="divergence<=5"),
    "WAE": dict(model="WAE"),
    "RAE": dict(model="RAE"),
}


def checks(small):
    "What smoke tries, by name."
    steps = 5 if small else 50
    found = {f"{kind}, mlp": on_both(kind, "mlp", steps) for kind in KINDS}
    found |= {
        f"{kind}, {n}": on_both(kind, n, 5 if n != "pinwheel" else steps)
        for n in ("pinwheel", "residual", "faces", "resnet18")
        for kind in ("VAE", "MixtureCSRAE mog", "MixtureCSRAE vamp")
    }
    found |= {
        "killed and resumed": killed_and_resumed,
        "loaded on a processor": loads_on_a_processor,
        "evaluated": evaluated(),
        "one classifier": one_classifier,
        "with labels": evaluated(labels=200, prior="vamp"),
        "classifier alone": evaluated(model="Supervised", labels=200),
        "prior network": evaluated(prior_network=True),
        "IWAE": evaluated(model="IWAE"),
        "tf32": evaluated(precision="tf32"),
        "bf16": evaluated(precision="bf16"),
        "train.ipynb": notebook,
        "graph": replayed(),
        "graph, labels": replayed(labels=200),
        "fleet in tf32": together("CSRAE", precision="tf32"),
        "fleet in bf16": together("CSRAE", precision="bf16"),
        "fleet of a table": together(
            "CSRAE", table(), dataset="arrays", network="pinwheel", likelihood="gaussian"
        ),
    }
    found |= {f"fleet of {k}": together(k) for k in KINDS}
    found |= {f"fleet, {k}": together("MixtureCSRAE mog", **fields) for k, fields in FLEETS_OF.items()}
    return found


SMALL = "VAE, mlp", "killed and resumed", "graph", "fleet in bf16"
LONGEST = 180  # seconds that a check may take


def checked(name, small):
    "Whether a check works, and what it says."
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, CSRAE_RUNS=folder):
        try:
            return "yes", checks(small)[name]()
        except Exception as e:
            traceback.print_exc()
            return "NO", f"{type(e).__name__}: {e}"[:300].replace("\n", " ")


def checked_aside(name, small, until):
    "The same in a process of its own: whatever becomes of a GPU's state, the next check begins anew."
    start = time.perf_counter()
    words = [sys.executable, "-m", "bench.gpu", "--check", name, *(["--small"] if small else [])]
    left = max(1, until - time.monotonic())
    try:
        done = subprocess.run(words, cwd=HERE, capture_output=True, text=True, timeout=min(LONGEST, left))
    except subprocess.TimeoutExpired:
        if left < LONGEST:
            return None  # no time is left
        return dict(check=name, works="NO", said=f"took more than {LONGEST} s", seconds=LONGEST)
    works, _, said = (done.stdout.rstrip().splitlines() or ["NO"])[-1].partition(": ")
    if works != "yes":
        print(done.stderr[-2000:], flush=True)
        works, said = "NO", said or f"ended with {done.returncode}: {done.stderr[-200:]}"
    return dict(check=name, works=works, said=said, seconds=round(time.perf_counter() - start, 1))


def smoke(job, small):
    "Each check a row: whether it works, and what it says."
    names = [n for n in (SMALL if small else checks(small)) if not job.has(check=n)]
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        for done in as_completed([pool.submit(checked_aside, n, small, job.until) for n in names]):
            if row := done.result():
                job.add(**row)


# timing: how fast is it?


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def seconds(f, least):
    "Seconds a call takes, after two calls; a GPU is waited for after ten, as training runs ahead of it."
    f()
    f()
    synchronize()
    n, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < least or n < 3:
        for _ in range(10 if CUDA else 1):
            f()
            n += 1
        synchronize()
    return passed / n


# graphed or not, how precisely, and by which library
FLEETS = [("fleet", False, "no", "cublas")]
if CUDA:
    FLEETS += [
        ("fleet", True, "no", "cublas"),
        ("fleet, tf32", True, "tf32", "cublas"),
        ("fleet, cublaslt", True, "no", "cublaslt"),
        ("fleet, tf32, cublaslt", True, "tf32", "cublaslt"),
    ]


@contextmanager
def products(precision, library):
    "Products of matrices so precisely, by this library, inside a with."
    if not CUDA:
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        with product_precision(precision):
            yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def forget():
    "Give back the memory of what is not used any more."
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def grey_images(n):
    "n images as large as MNIST's, with labels, on the device."
    x = torch.rand(n, 28, 28, generator=torch.Generator().manual_seed(0)).round()
    return load_data(dict(x=x, y=torch.arange(n) % 10), "bernoulli").to(DEVICE)


def of_grey_images(kind, **fields):
    sizes = dict(latent_dim=40, batch_size=100, components=10)
    return resolve(Config(dataset="other", network="mlp", **KINDS[kind] | sizes | fields))


def steps_a_second(job, small):
    data = grey_images(400 if small else 20_000)
    kinds = [
        ("VAE", {}),
        ("MixtureCSRAE mog", dict(components=100)),
        ("MixtureCSRAE mog", dict(components=400)),
        ("MixtureCSRAE vamp", dict(components=400)),
        ("MixtureCSRAE mog", dict(labels=0.1)),
    ]
    for kind, fields in (kinds[1], kinds[-1]) if small else kinds:
        cfg = of_grey_images(kind, **fields)
        model = f"{kind}, labels" if cfg.labels else kind
        for R in (1, 2) if small else (256, 64, 1, 16, *((1024,) if kind == "VAE" else ())):
            for what, graphed, precision, library in FLEETS:
                row = dict(what=what, model=model, K=cfg.components, size=R, graphed=graphed)
                if library == "cublaslt" and (kind != "VAE" or R not in (64, 256)) or job.has(**row):
                    continue
                if job.left < 30:
                    return
                try:
                    with products(precision, library):
                        found = fleet_speed(cfg, data, R, graphed, small)
                except Exception as e:
                    traceback.print_exc()
                    found = dict(error=f"{type(e).__name__}: {e}"[:200].replace("\n", " "))
                job.add(**row, **found)
                forget()


@contextmanager
def stepping(cfg, data, R, graphed):
    "Inside a with, a step of R untrained models, recorded by then, and how many weights one has."
    pseudo = data.x_train[: cfg.components].cpu()
    task = task_of(cfg)
    one = task.make_model(task.about(data), pseudo).to(DEVICE)
    fleet = Fleet([deepcopy(one).train() for _ in range(R)])
    opt = torch.optim.Adam(fleet.params.values(), lr=5e-4, fused=True, capturable=CUDA)
    steps = _Steps(fleet, opt, task, data, graphed)
    steps.begin(list(range(R)), 1)
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(len(data.x_train), (4, R, cfg.batch_size), generator=g).to(DEVICE)
    turn = iter(range(10**9))
    for _ in range(6):
        steps(rows[0])
    try:
        yield lambda: steps(rows[next(turn) % 4]), sum(p.numel() for p in one.parameters())
    finally:
        steps.graph = None  # which holds all of this, and is held by it


def fleet_speed(cfg, data, R, graphed, small):
    with stepping(cfg, data, R, graphed) as (step, size):
        taken = seconds(step, 0.02 if small else 0.7)
    return dict(parameters=size, ms=1e3 * taken, run_steps=R / taken, gb=R * size * 4 * 10 / taken / 1e9)


def profile(out, until, small):
    "Which operations a step's time goes to, in files of text."
    data, R = grey_images(400 if small else 20_000), 2 if small else 256
    for kind, fields in {"VAE": {}, "MixtureCSRAE mog": dict(labels=0.1)}.items():
        for precision in ("no", "tf32") if CUDA else ("no",):
            file = out / f"{'-'.join(['profile', *kind.split(), *fields, precision])}.txt"
            if file.exists() or time.monotonic() > until:
                continue
            try:
                with (
                    products(precision, "cublas"),
                    stepping(of_grey_images(kind, **fields), data, R, CUDA) as (f, _),
                ):
                    file.write_text(operations(f, 3 if small else 20))
            except Exception:  # the tables come after it
                traceback.print_exc()
            forget()


def operations(f, calls):
    "A table of the operations of some calls, the longest first."
    with torch.profiler.profile() as seen:
        for _ in range(calls):
            f()
        synchronize()
    by = "cuda_time_total" if CUDA else "cpu_time_total"
    return seen.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=90)


def lone_speed(job, small):
    "Single runs as `fit` trains them, one operation at a time."
    x = torch.rand(400 if small else 20_000, 28, 28, generator=torch.Generator().manual_seed(0)).round()
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, CSRAE_RUNS=folder):
        for kind, K in (("VAE", 10), ("MixtureCSRAE mog", 400))[: 1 if small else 2]:
            if job.has(what="fit", model=kind, K=K):
                continue
            _, *runs = [
                fit(
                    Config(
                        dataset="arrays",
                        network="mlp",
                        latent_dim=40,
                        components=min(K, len(x) // 2),
                        epochs=e,
                        kmeans_epoch=0,
                        name=f"{kind}{i}",
                        **KINDS[kind],
                    ),
                    dict(x=x),
                    progress=False,
                )
                for i, e in enumerate((1, 1, 2 if small else 4))  # the first starts what stays
            ]
            taken = runs[1].seconds - runs[0].seconds
            n = len(x) * 4 // 5 // 100 * (runs[1].cfg.epochs - 1)
            speed = dict(ms=1e3 * taken / n, run_steps=n / taken)
            job.add(what="fit", model=kind, K=K, size=1, graphed=False, **speed)


def overlap_speed(job, small):
    for K in (50,) if small else (100, 400, 1000, 4000, 10_000):
        g = torch.Generator().manual_seed(0)
        q = [
            torch.randn(K, 40, generator=g).to(DEVICE).requires_grad_(),
            torch.rand(K, 40, generator=g).add(0.1).to(DEVICE).requires_grad_(),
        ]
        logw = torch.full((K,), -torch.log(torch.tensor(float(K)))).to(DEVICE)

        def ours():
            p = GMM(logw, *q)
            n = GMM(logw, q[0].flip(0), q[1])
            torch.autograd.grad(cs_divergence(n, p), q)

        def plain():
            a, b = (q[0], q[1]), (q[0].flip(0), q[1])
            terms = [
                (naive_log_z(*u, *v) + 2 * logw[0]).logsumexp((0, 1)) for u, v in ((a, b), (a, a), (b, b))
            ]
            torch.autograd.grad(-terms[0] + (terms[1] + terms[2]) / 2, q)

        ways = {f"D_CS by {how}": how for how in (("kernels", "blocks") if CUDA else ("blocks",))}
        for what, how in (ways | ({"D_CS, plain": None} if K <= 4000 else {})).items():
            if not job.has(what=what, K=K):
                with patch("csrae_nb.kernels._for_tiles", lambda mu: how == "kernels"):
                    taken = seconds(ours if how else plain, 0.01 if small else 0.3)
                job.add(what=what, K=K, ms=1e3 * taken)


def image_speed(job, small):
    for network, shape in (("residual", (3, 32, 32)), ("faces", (3, 96, 96)), ("faces", (3, 224, 224))):
        if small and shape[1] != 96:
            continue
        cfg = resolve(Config(dataset="other", network=network, model="CSRAE", latent_dim=40))
        for how in ("single", "tf32", "bf16") if CUDA else ("single",):
            row = dict(what=f"CSRAE of {network}, {how}", size=shape[1])
            if job.has(**row):
                continue
            model = make_model(cfg, shape, "discretized_logistic").to(DEVICE).train()
            opt = torch.optim.Adam(model.parameters(), lr=5e-4, fused=True)
            x = torch.rand(4 if small else 100, *shape).to(DEVICE)

            def step():
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=how == "bf16"):
                    loss = model.loss(x).loss
                opt.zero_grad()
                loss.backward()
                opt.step()

            tf32 = how != "single"
            cudnn = torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32) if CUDA else nullcontext()
            with cudnn, product_precision("tf32" if tf32 else "no"):
                taken = seconds(step, 0.01 if small else 0.5)
            job.add(**row, images=len(x) / taken)
            forget()


def timing(job, small):
    for part in (lone_speed, steps_a_second, overlap_speed, image_speed):
        if job.left < 0:
            return
        try:
            part(job, small)
        except Exception as e:
            traceback.print_exc()
            job.add(what=part.__name__, error=f"{type(e).__name__}: {e}"[:200].replace("\n", " "))


# tables: train in fleets, evaluate beside them


def _prints_to(folder, name):
    "What this process prints goes to a file from now on."
    with open(folder / f"{name}-{os.getpid()}.log", "a") as f:
        for fd in (1, 2):
            os.dup2(f.fileno(), fd)


def _train(groups, log):
    _prints_to(log, "train")
    for configs in groups:
        train_fleets(configs, len(configs), progress=False)


def _known(rows):
    return {(seedless(r["command"]), s) for r in rows for s in r["seeds"].split()}


class Table:
    "A sweep's runs that the committed table does not have yet."

    def __init__(self, file, out):
        self.name, self.out = Path(file).stem, out
        self.earlier = rows_there(HERE / "results" / f"{self.name}.csv")
        known = _known(self.earlier)
        self.configs = [
            c for c in distinct(read_sweep(file)) if (seedless(command(c)), str(c.seed)) not in known
        ]

    def write(self):
        rows = sweep_table(self.configs, self.earlier)
        if rows:
            write_table(self.out / f"{self.name}.csv", rows)
        return sum(finished_metrics(c) is not None for c in self.configs)


def tables(files, out, until, jobs, size, trainers):
    "Runs of some sweeps until there is no time left, in their order; each table is written as it grows."
    spawn, log = multiprocessing.get_context("spawn"), Path(tempfile.mkdtemp())
    every = [Table(f, out) for f in files]
    print({t.name: len(t.configs) for t in every}, flush=True)
    groups = [group for t in every for group in fleets(t.configs, size)]
    training = [
        spawn.Process(target=_train, args=(groups[i::trainers], log), daemon=True) for i in range(trainers)
    ]
    for p in training:
        p.start()
    together = {c: run_folder(c) for group in groups for c in group}
    alone = [c for t in every for c in t.configs if c not in together]
    start, pool = time.monotonic(), ProcessPoolExecutor(jobs, spawn, _prints_to, (log, "runs"))
    told, under_way, failed = start, {}, {}
    while (together or alone or under_way) and time.monotonic() < until:
        if not any(p.is_alive() for p in training):
            alone, together = [*alone, *together], {}
        for f in [f for f in under_way if f.done()]:
            _took(f, under_way.pop(f), alone, failed)
        ready = (c for c, folder in together.items() if is_trained(folder))
        ready = [*islice(ready, jobs - len(under_way))]
        ready += alone[: jobs - len(under_way) - len(ready)]
        try:
            under_way |= {pool.submit(attempt, c): c for c in ready}
        except BrokenProcessPool:  # one of them was killed: the others are tried in a new one
            pool = ProcessPoolExecutor(jobs, spawn, _prints_to, (log, "runs"))
            continue
        alone = [c for c in alone if c not in ready]
        for c in ready:
            together.pop(c, None)
        if time.monotonic() - told > 120:
            done, told = {t.name: t.write() for t in every}, time.monotonic()
            print(
                f"{told - start:.0f} s", done, f"{len(under_way)} under way, {len(failed)} failed", flush=True
            )
        time.sleep(0.5)
    print({t.name: t.write() for t in every}, "failed:", failed, flush=True)
    for p in (*training, *(pool._processes or {}).values()):
        p.kill()
    pool.shutdown(cancel_futures=True)
    for f in sorted(log.glob("train*.log")) + (sorted(log.glob("runs*.log"))[:2] if failed else []):
        print(f.read_text()[-1500:])


def _took(future, c, alone, failed):
    "What became of a run: it is finished, tried again later, or named."
    how = future.exception() or future.result()
    if how == "running elsewhere":
        alone.append(c)
    elif how != "finished":
        failed[run_name(c)] = how


def main(words=None):
    p = argparse.ArgumentParser("python -m bench.gpu", description=__doc__)
    p.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all, in this order)"
    )
    p.add_argument("--out", type=Path, default=Path("_gpu"), help="folder of the tables (default: _gpu)")
    p.add_argument("--minutes", type=float, default=9, help="time for all of it (default: 9)")
    p.add_argument(
        "--sweeps",
        nargs="*",
        type=Path,
        default=[],
        metavar="FILE",
        help="whose tables to fill, in this order",
    )
    p.add_argument(
        "--trainers", type=int, default=1 + os.cpu_count() // 5, help="processes that train fleets"
    )
    p.add_argument(
        "--jobs", type=int, default=max(1, os.cpu_count() * 3 // 4), help="processes that evaluate"
    )
    p.add_argument("--fleet-size", type=int, default=64, help="runs trained together, at most")
    p.add_argument("--small", action="store_true", help="sizes of a test, which run anywhere")
    p.add_argument("--check", metavar="NAME", help="one check of smoke alone: print what it says")
    a = p.parse_args(words)
    if a.check:
        if a.check not in (known := checks(a.small)):
            p.error(f"unknown check {a.check!r}; expected one of {', '.join(known)}")
        print(*checked(a.check, a.small), sep=": ")
        return
    if unknown := set(a.parts) - set(PARTS):
        p.error(f"unknown part {', '.join(unknown)}; expected {', '.join(PARTS)}")
    until, out = time.monotonic() + 60 * a.minutes, a.out
    out.mkdir(parents=True, exist_ok=True)
    print(torch.cuda.get_device_name() if CUDA else "no GPU here", torch.__version__, flush=True)
    for part in a.parts or PARTS:
        if part == "smoke":
            smoke(Job(out / "gpu_smoke.csv", until), a.small)
        if part == "timing":
            timing(Job(out / "gpu_timing.csv", until), a.small)
        if part == "profile":
            profile(out, until, a.small)
        if part == "tables" and a.sweeps:
            tables(a.sweeps, out, until, a.jobs, a.fleet_size, a.trainers)


if __name__ == "__main__":
    main()
