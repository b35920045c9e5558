"Memory that D_CS and its gradients take on top of what is there before, each in a process of its own."

import sys
from pathlib import Path
from subprocess import check_output

import torch

from . import divergence
from .interleaved import row


def mib(form, *size) -> float:
    "MiB of a form at B, K, D."
    return float(
        check_output(
            [sys.executable, "-m", "bench.memory", form, *map(str, size)],
            text=True,
            cwd=Path(__file__).parents[1],
        ).split()[-1]
    )


def resident(name):
    "VmRSS or VmHWM of this process, in MiB."
    return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) / 1024


def works():
    for size in ((100, 400, 40), (100, 1000, 128), *((100, K, 40) for K in (50, 100, 200, 800))):
        ours, other = mib("ours", *size), mib("broadcast", *size)
        B, K, D = size
        yield row(
            f"memory of D_CS and gradients, B={B} K={K} D={D}",
            dict(B=B, K=K, D=D),
            None,
            "broadcasting",
            ours_mib=ours,
            other_mib=other,
            ratio=other / ours,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    form, leaves = getattr(divergence, sys.argv[1]), divergence.mixtures(*map(int, sys.argv[2:]))
    divergence.with_gradients(form, divergence.mixtures(100, 200, 8))()  # what is loaded, or compiled, once
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")  # forget the peak until now
    divergence.with_gradients(form, leaves)()
    print(max(0.1, resident("VmHWM") - before))
