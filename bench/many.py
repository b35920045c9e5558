"""`python -m bench.many --csv FILE`: what thousands of runs cost that are finished: to look at, to make a
table of, and to keep, each in a folder of its own or 64 together in one file."""

import argparse
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from csrae_nb.config import Config, resolve
from csrae_nb.evaluation import complete_run, write_table
from csrae_nb.files import runs_folder
from csrae_nb.grids import run_state
from csrae_nb.runs import run_folder
from csrae_nb.sweeps import sweep_table
from csrae_nb.tasks import make_model

FLEET = 64
OWN = dict(epochs=1, ll_samples=0, fid_layer=0)  # of the run that is copied


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def copies(n):
    "Configurations of n finished runs, which are one, copied under other names."
    first = resolve(Config(**OWN, name="run0"))
    complete_run(first, progress=False)
    configs = [replace(first, name=f"run{i}") for i in range(n)]
    for c in configs[1:]:
        shutil.copytree(run_folder(first), run_folder(c), dirs_exist_ok=True)
    return configs


def looked_at(n):
    "Seconds to find out that n runs are finished, and to make a table of them; files and bytes of each."
    configs = copies(n)
    files = [f for f in run_folder(configs[0]).rglob("*") if f.is_file()]
    states = seconds(lambda: [run_state(c) for c in configs])
    table = seconds(lambda: sweep_table(configs))
    size = sum(f.stat().st_size for f in files)
    return dict(runs=n, states=states, table=table, files=len(files), kib=size / 1024)


def kept_together():
    "Weights of 64 runs on MNIST, as files and as one: seconds to write them all, and to read one run's."
    cfg = resolve(Config(dataset="mnist", model="VAE"))
    weights = make_model(cfg, (28, 28), "bernoulli").state_dict()
    stacks = {k: torch.stack([v] * FLEET) for k, v in weights.items()}
    folder = runs_folder()
    folder.mkdir(exist_ok=True)

    def each():
        for i in range(FLEET):
            save_file(weights, folder / f"{i}.safetensors")

    def one_of_all():
        with safe_open(folder / "all.safetensors", "pt") as f:
            return {k: f.get_slice(k)[7].clone() for k in f.keys()}

    apart = seconds(each), seconds(lambda: load_file(folder / "7.safetensors"))
    together = seconds(lambda: save_file(stacks, folder / "all.safetensors")), seconds(one_of_all)
    mib = sum(v.nbytes for v in weights.values()) / 2**20
    names = ("files", "one file")
    return [
        dict(kept=name, write=w, read=r, mib=FLEET * mib) for name, (w, r) in zip(names, (apart, together))
    ]


def main():
    p = argparse.ArgumentParser("python -m bench.many", description=__doc__)
    p.add_argument("--csv", type=Path, required=True)
    p.add_argument("--runs", type=int, nargs="+", default=[1000, 10_000])
    o, rows = p.parse_args(), []
    for n in o.runs:
        with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, CSRAE_RUNS=folder):
            rows.append(looked_at(n))
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, CSRAE_RUNS=folder):
        rows += kept_together()
    columns = {k: None for row in rows for k in row}
    write_table(o.csv, [columns | row for row in rows])


if __name__ == "__main__":
    main()
