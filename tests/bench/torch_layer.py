"""What does a remote layer cost beyond the call, and do branches overlap? (figures i, j, k)"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from models import IMAGE, ROWS
from timing import in_turn, median, row, server

from remote_ops import Endpoint
from remote_ops.torch import Parallel, RemoteModule


def branches() -> None:
    """One branch of 200 ms against two and eight of them, forward and backward."""
    with server("far") as (url, _):
        x = torch.ones(1, 16, requires_grad=True)
        for how in ("eager", "compiled"):
            one, *several = (Parallel(*[RemoteModule(url + "far") for _ in range(count)]) for count in (1, 2, 8))
            if how == "compiled":
                one, *several = (torch.compile(module, fullgraph=True) for module in (one, *several))
            for module, count, bound in zip(several, (2, 8), ("1.15", "1.3"), strict=True):
                forward_and_backward(one, x), forward_and_backward(module, x)  # the first call compiles
                times = [(forward_and_backward(one, x), forward_and_backward(module, x)) for _ in range(7)]
                for index, direction in enumerate(("forward", "backward")):
                    bare_s, ours_s = (median([pair[which][index] for pair in times]) for which in (0, 1))
                    what = f"i  {count} branches of 200 ms, {direction}, {how} / one branch"
                    row(what, f"{ours_s * 1e3:.1f} ms", f"{bare_s * 1e3:.1f} ms", ours_s / bare_s, bound)


def forward_and_backward(module: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], x: torch.Tensor) -> list[float]:
    """Seconds of each."""
    since = time.perf_counter()
    answer = sum(module(x)).sum()  # type: ignore[union-attr]
    between = time.perf_counter()
    answer.backward()
    return [between - since, time.perf_counter() - between]


def small() -> None:
    """64 bytes each way: what the layer adds to `Endpoint.infer`."""
    x = np.ones((1, 16), np.float32)
    tensor, wants_gradient = torch.from_numpy(x), torch.from_numpy(x).clone().requires_grad_()
    with server("echo", "double") as (url, _), Endpoint(url + "double") as endpoint:
        module = RemoteModule(url + "double")
        compiled = torch.compile(module, fullgraph=True)
        compiled(tensor), compiled(wants_gradient)
        inputs = {"x": x}
        calls = [
            lambda: endpoint.infer(inputs),
            lambda: module(tensor),
            lambda: compiled(tensor),
            lambda: module(wants_gradient),
            lambda: compiled(wants_gradient),
        ]
        in_turn(calls, 500)
        bare_s, *ours = (median(times) for times in in_turn(calls, 5000))
    for what, seconds, bound in zip(
        ("eager", "compiled", "eager, wants a gradient", "compiled, wants a gradient"),
        ours, ("+60 us", "+120 us", "+60 us", "+120 us"), strict=True,
    ):  # fmt: skip
        added = f"+{(seconds - bare_s) * 1e6:.0f} us"
        row(
            f"j  64 B through RemoteModule, {what} / Endpoint", added, f"{bare_s * 1e6:.0f} us", seconds / bare_s, bound
        )


def headline() -> None:
    """77.07 MB up, 12.85 MB down."""
    images = np.random.default_rng(0).random((ROWS, *IMAGE), np.float32)
    tensor = torch.from_numpy(images)
    with server("headline", "echo") as (url, _), Endpoint(url + "headline") as endpoint:
        module = RemoteModule(url + "headline")
        calls = [lambda: endpoint(images), lambda: module(tensor)]
        in_turn(calls, 5)
        bare_s, ours_s = (median(times) for times in in_turn(calls, 40))
    row("k  headline through RemoteModule / Endpoint", f"{ours_s * 1e3:.1f} ms", f"{bare_s * 1e3:.1f} ms",
        ours_s / bare_s, "1.1")  # fmt: skip


def main() -> None:
    """Print figures i, j and k."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    branches()
    small()
    headline()


if __name__ == "__main__":
    main()
