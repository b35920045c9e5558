"""`make gpu`: what only a GPU can tell, in one command that needs no network, papermill or nbdev.

Does everything work there as on a processor, how fast is it, and the tables of the paper, most valuable
first, for as long as is given. Writes small CSV files as it goes."""

import argparse
import ast
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from copy import deepcopy
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
from csrae_nb.sweeps import rows_there, seedless, sweep_table
from csrae_nb.config import Config, command, resolve, run_name
from csrae_nb.runs import fit, load_run, run_folder
from csrae_nb.tasks import make_model, task_of
from csrae_nb.training import Training, is_trained

HERE = Path(__file__).parents[1]
PARTS = ("smoke", "timing", "tables")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class Job:
    "Rows of one file, written as they are known; and until when there is time."

    def __init__(self, file, until):
        self.file, self.until, self.rows = Path(file), until, []

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
    x = (
        (x < 0.3).float()
        if likelihood == "bernoulli"
        else (x * 255).floor() / 255
        if likelihood != "gaussian"
        else x
    )
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
            ends.append(torch.stack([weights(r) for r in runs]))
        apart = (ends[0] - ends[1]).abs().max().item()
        assert apart < 1e-2, f"weights {apart:.1e} apart"
        return f"weights {apart:.1e} apart"

    return check


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
    "labels, vamp": dict(labels=200, prior="vamp"),
    "classifier": dict(labels=200, model="Supervised"),
    "matched, with a queue": dict(prior_objective="aggregate", queue=50),
    "a bound": dict(constraint="divergence<=5"),
    "WAE": dict(model="WAE"),
    "RAE": dict(model="RAE"),
}


def smoke(job, small):
    "Each check a row: whether it works, and what it says."
    steps = 5 if small else 50
    checks = {f"{kind}, mlp": on_both(kind, "mlp", steps) for kind in KINDS}
    other = ("pinwheel", "residual", "faces", "resnet18")
    checks |= {
        f"{kind}, {n}": on_both(kind, n, 5 if n != "pinwheel" else steps)
        for n in other
        for kind in ("VAE", "MixtureCSRAE mog", "MixtureCSRAE vamp")
    }
    checks |= {
        "killed and resumed": killed_and_resumed,
        "loaded on a processor": loads_on_a_processor,
        "evaluated": evaluated(),
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
    checks |= {f"fleet of {k}": together(k) for k in KINDS}
    checks |= {f"fleet, {k}": together("MixtureCSRAE mog", **fields) for k, fields in FLEETS_OF.items()}
    if small:
        checks = {k: checks[k] for k in ("VAE, mlp", "killed and resumed", "graph", "fleet in bf16")}
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, CSRAE_RUNS=folder):
        for name, check in checks.items():
            if job.left < 0:
                return
            start = time.perf_counter()
            try:
                said, ok = check(), "yes"
            except Exception as e:
                traceback.print_exc()
                said, ok = f"{type(e).__name__}: {e}"[:300].replace("\n", " "), "NO"
            job.add(check=name, works=ok, said=said or "", seconds=round(time.perf_counter() - start, 1))


# timing: how fast is it?


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def seconds(f, least):
    "Seconds a call takes, after two calls."
    f()
    f()
    synchronize()
    n, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < least or n < 3:
        f()
        n += 1
        synchronize()
    return passed / n


# graphed or not, and how precisely
FLEETS = ((False, "no"), (True, "no"), (True, "tf32")) if CUDA else ((False, "no"),)


def steps_a_second(job, small):
    n = 400 if small else 20_000
    x = torch.rand(n, 28, 28, generator=torch.Generator().manual_seed(0)).round()
    data = load_data(dict(x=x, y=torch.arange(n) % 10), "bernoulli").to(DEVICE)
    kinds = [
        ("VAE", {}),
        ("MixtureCSRAE mog", dict(components=100)),
        ("MixtureCSRAE mog", dict(components=400)),
        ("MixtureCSRAE vamp", dict(components=400)),
        ("MixtureCSRAE mog", dict(labels=0.1)),
    ]
    for kind, fields in (kinds[1], kinds[-1]) if small else kinds:
        cfg = resolve(
            Config(
                dataset="other",
                network="mlp",
                latent_dim=40,
                batch_size=100,
                **KINDS[kind] | dict(components=10) | fields,
            )
        )
        for R in (1, 2) if small else (1, 16, 64, 256, *((1024,) if kind == "VAE" else ())):
            for graphed, precision in FLEETS:
                if job.left < 30:
                    return
                try:
                    with product_precision(precision):
                        row = fleet_speed(cfg, data, R, graphed, small)
                except Exception as e:
                    traceback.print_exc()
                    row = dict(error=f"{type(e).__name__}: {e}"[:200].replace("\n", " "))
                what = "fleet, tf32" if precision == "tf32" else "fleet"
                model = f"{kind}, labels" if cfg.labels else kind
                job.add(what=what, model=model, K=cfg.components, size=R, graphed=graphed, **row)
                if CUDA:
                    torch.cuda.empty_cache()


def fleet_speed(cfg, data, R, graphed, small):
    pseudo = data.x_train[: cfg.components].cpu()
    task = task_of(cfg)
    one = task.make_model(task.about(data), pseudo).to(DEVICE)
    size = sum(p.numel() for p in one.parameters())
    fleet = Fleet([deepcopy(one).train() for _ in range(R)])
    opt = torch.optim.Adam(fleet.params.values(), lr=5e-4, fused=True, capturable=CUDA)
    steps = _Steps(fleet, opt, task, data, graphed)
    steps.begin(list(range(R)), 1)
    rows = torch.randint(
        len(data.x_train), (4, R, cfg.batch_size), generator=torch.Generator().manual_seed(0)
    ).to(DEVICE)
    turn = iter(range(10**9))
    for _ in range(6):
        steps(rows[0])
    taken = seconds(lambda: steps(rows[next(turn) % 4]), 0.02 if small else 0.7)
    return dict(parameters=size, ms=1e3 * taken, run_steps=R / taken, gb=R * size * 4 * 10 / taken / 1e9)


def lone_speed(job, small):
    "Single runs as `fit` trains them, one operation at a time."
    x = torch.rand(400 if small else 20_000, 28, 28, generator=torch.Generator().manual_seed(0)).round()
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, CSRAE_RUNS=folder):
        for kind, K in (("VAE", 10), ("MixtureCSRAE mog", 400))[: 1 if small else 2]:
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
            job.add(
                what="fit", model=kind, K=K, size=1, graphed=False, ms=1e3 * taken / n, run_steps=n / taken
            )


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

        for how in ("kernels", "blocks") if CUDA else ("blocks",):
            with patch("csrae_nb.kernels._for_tiles", lambda mu: how == "kernels"):
                job.add(what=f"D_CS by {how}", K=K, ms=1e3 * seconds(ours, 0.01 if small else 0.3))
        if K <= 4000:
            job.add(what="D_CS, plain", K=K, ms=1e3 * seconds(plain, 0.01 if small else 0.3))


def image_speed(job, small):
    for network, shape in (("residual", (3, 32, 32)), ("faces", (3, 96, 96)), ("faces", (3, 224, 224))):
        if small and shape[1] != 96:
            continue
        cfg = resolve(Config(dataset="other", network=network, model="CSRAE", latent_dim=40))
        for how in ("single", "tf32", "bf16") if CUDA else ("single",):
            model = make_model(cfg, shape, "discretized_logistic").to(DEVICE).train()
            opt = torch.optim.Adam(model.parameters(), lr=5e-4, fused=True)
            x = torch.rand(4 if small else 100, *shape).to(DEVICE)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = how != "single"

            def step():
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=how == "bf16"):
                    loss = model.loss(x).loss
                opt.zero_grad()
                loss.backward()
                opt.step()

            job.add(
                what=f"CSRAE of {network}, {how}",
                size=shape[1],
                images=len(x) / seconds(step, 0.01 if small else 0.5),
            )
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


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
    wanted = [c for t in every for c in t.configs]
    print({t.name: len(t.configs) for t in every}, flush=True)
    groups = [group for t in every for group in fleets(t.configs, size)]
    training = [
        spawn.Process(target=_train, args=(groups[i::trainers], log), daemon=True) for i in range(trainers)
    ]
    for p in training:
        p.start()
    together = {run_name(c) for group in groups for c in group}
    waiting, under_way, failed, told = dict.fromkeys(wanted), {}, {}, time.monotonic()
    start = told
    with ProcessPoolExecutor(jobs, spawn, _prints_to, (log, "runs")) as pool:
        while (waiting or under_way) and time.monotonic() < until:
            for f in [f for f in under_way if f.done()]:
                c = under_way.pop(f)
                how = f.exception() or f.result()
                if how == "running elsewhere":
                    waiting[c] = None
                elif how != "finished":
                    failed[run_name(c)] = how
            for c in sorted(waiting, key=lambda c: run_name(c) not in together):
                if len(under_way) >= jobs:
                    break
                alone = run_name(c) not in together or not any(p.is_alive() for p in training)
                ready = alone or is_trained(run_folder(c))
                if not ready:
                    continue
                del waiting[c]
                under_way[pool.submit(attempt, c)] = c
            if time.monotonic() - told > 30:
                done, told = {t.name: t.write() for t in every}, time.monotonic()
                print(
                    f"{told - start:.0f} s",
                    done,
                    f"{len(under_way)} under way, {len(failed)} failed",
                    flush=True,
                )
            time.sleep(0.1)
        print({t.name: t.write() for t in every}, "failed:", failed, flush=True)
        for p in training:
            p.kill()
        for p in list(pool._processes.values()):
            p.kill()
    for f in sorted(log.glob("train*.log")):
        print(f.read_text()[-1500:])
    if failed:
        for f in sorted(log.glob("runs*.log"))[:2]:
            print(f.read_text()[-1500:])


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
    a = p.parse_args(words)
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
        if part == "tables" and a.sweeps:
            tables(a.sweeps, out, until, a.jobs, a.fleet_size, a.trainers)


if __name__ == "__main__":
    main()
