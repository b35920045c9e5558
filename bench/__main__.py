"`make bench`: all that is claimed to be fast, against what people use instead; writes results/benchmark.csv."

import argparse
import importlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from csrae_nb.evaluation import write_table
from csrae_nb.results import read_rows

from .interleaved import Work, compare

PARTS = ("limits", "divergence", "memory", "training", "evaluation", "fleet")
FILE = Path(__file__).parents[1] / "results" / "benchmark.csv"


def machine():
    "The processor, and the versions that matter."
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    cpu = next(
        (l.split(":", 1)[1].strip() for l in lines if l.startswith("model name")), platform.processor()
    )
    packages = (f"{p} {version(p)}" for p in ("torch", "numba", "numpy", "scipy", "pythae"))
    return dict(
        machine=f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, 1 thread",
        versions=", ".join([f"Python {platform.python_version()}", *packages]),
    )


def line(row):
    "A row as it is printed."
    unit = "mib" if row["ours_mib"] else "ms"

    def number(key, digits):
        return "" if row[key] is None else f"{row[key]:,.{digits}f}"

    ours, other = (f"{number(f'{who}_{unit}', 1):>9}" for who in ("ours", "other"))
    return (
        f"{row['work']:66} {ours} {unit:3}  {row['other'] or '':30} {other}"
        f"  ratio {number('ratio', 2):>7}  aim {number('aim', 2)}"
    )


def main():
    p = argparse.ArgumentParser("python -m bench", description=__doc__)
    what = f"of {', '.join(PARTS)} (default: all); rows of the others stay as they are"
    p.add_argument("parts", nargs="*", metavar="PART", help=what)
    asked = p.parse_args().parts or PARTS
    if unknown := set(asked) - set(PARTS):
        p.error(f"unknown part {', '.join(unknown)}; expected {', '.join(PARTS)}")
    here = machine()
    print(*here.values(), sep="\n")
    rows = [r for r in read_rows(FILE, ("work", "ratio")) if r["part"] not in asked]
    torch.set_num_threads(1)  # and nothing else of what `fit` sets, where ours does not call for it
    for part in asked:
        for work in importlib.import_module(f"bench.{part}").works():
            for row in compare(work) if isinstance(work, Work) else [work]:
                rows.append(dict(part=part, **row, **here))
                print(line(row), flush=True)
        # after each part: an error in the next loses nothing
        write_table(FILE, sorted(rows, key=lambda r: PARTS.index(r["part"])))


if __name__ == "__main__":
    main()
