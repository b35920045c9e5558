"What the machine can do at most: the rate of a large matrix product, and of copying memory."

from statistics import median

import torch

from .interleaved import row, timed


def works():
    a, b = torch.randn(2, 2000, 2000)
    yield row(
        "matrix product 2,000 × 2,000 × 2,000",
        {},
        None,
        None,
        ours_ms=median(timed(lambda: a @ b) for _ in range(9)),
    )
    x = torch.randn(2**26)
    y = torch.empty_like(x)
    yield row("copy of 256 MiB", {}, None, None, ours_ms=median(timed(lambda: y.copy_(x)) for _ in range(9)))
