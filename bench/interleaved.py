"Ways of doing one thing, timed in turns, so that a machine that slows down slows all of them."

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from statistics import median

import torch


@dataclass(frozen=True)
class Work:
    "What is timed: `ours` against `others`, functions without arguments that do the whole of it."

    name: str
    ours: Callable[[], object]
    others: dict[
        str, tuple[Callable[[], object], float | None]
    ]  # name: function, and the ratio that we aim at
    rounds: int = 15  # of all of them in turn, after one that does not count
    size: dict[str, int] = field(default_factory=dict)  # B, K, D
    warm: bool = (
        False  # each twice in its turn, the second timed: the first pays for pages that the other lost
    )


class Elsewhere:
    "A function in a process of its own, which our settings do not reach; a call runs it there."

    def __init__(self, make: Callable, *args):  # make(*args) is the function; both are sent to the process
        ctx = get_context("spawn")
        self.pipe, end = ctx.Pipe()
        self.process = ctx.Process(target=_serve, args=(end, make, args), daemon=True)
        self.process.start()

    def __call__(self):
        self.pipe.send("run")
        return self.pipe.recv()


def _serve(pipe, make, args):
    torch.set_num_threads(1)
    f = make(*args)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(f())


def timed(f) -> float:
    "Milliseconds that a call takes."
    start = time.perf_counter()
    f()
    taken = time.perf_counter() - start
    if taken > 1 and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(
            0
        )  # giving back gigabytes takes half a second, which the next would pay
    return 1e3 * taken


def compare(work: Work) -> list[dict]:
    "A row for each of the others: median times, and their ratio."
    functions = {"ours": work.ours, **{k: f for k, (f, _) in work.others.items()}}
    for f in functions.values():
        f()
    times = {k: [] for k in functions}
    for _ in range(work.rounds):
        for k, f in functions.items():
            if work.warm:
                f()
            times[k].append(timed(f))
    ours = median(times["ours"])
    return [
        row(
            work.name,
            work.size,
            aim,
            k,
            ours_ms=ours,
            other_ms=median(times[k]),
            ratio=median(times[k]) / ours,
        )
        for k, (_, aim) in work.others.items()
    ]


def row(
    work, size, aim, other, ours_ms=None, other_ms=None, ours_mib=None, other_mib=None, ratio=None
) -> dict:
    "A row of the table, with all its columns."
    return dict(
        work=work,
        **{k: size.get(k) for k in "BKD"},
        other=other,
        ours_ms=ours_ms,
        other_ms=other_ms,
        ours_mib=ours_mib,
        other_mib=other_mib,
        ratio=ratio,
        aim=aim,
    )
