"""Does a net on a GPU answer over the wire as fast as in process? (figure l; needs CUDA)"""

from __future__ import annotations

import threading
import time

import numpy as np
import torch
from models import convolution_module
from timing import median, row, server

from remote_ops import Endpoint

ROWS, CALLS = 64, 40


def main() -> None:
    """Print figure l, or why there is none."""
    if not torch.cuda.is_available():
        print("l  a convolutional net on CUDA: not measured, there is no CUDA device", flush=True)
        return
    pictures = np.random.default_rng(0).random((ROWS, 3, 64, 64), np.float32)
    net = convolution_module().to("cuda")  # type: ignore[attr-defined]

    @torch.inference_mode()
    def in_process() -> None:
        net(torch.from_numpy(pictures).pin_memory().to("cuda", non_blocking=True)).cpu()

    with server("convolution", "echo") as (url, _), Endpoint(url + "convolution") as endpoint:
        for clients in (1, 8):
            rates = [(rate(in_process, 1), rate(lambda: endpoint(pictures), clients)) for _ in range(5)]
            bare, ours = median([pair[0] for pair in rates]), median([pair[1] for pair in rates])
            row(f"l  7 x 7 convolutions on CUDA, {clients} clients / in process", f"{ours:.0f} rows/s",
                f"{bare:.0f} rows/s", ours / bare, "at least 0.9")  # fmt: skip


def rate(call: object, clients: int) -> float:
    """Rows a second with that many threads calling."""

    def work() -> None:
        for _ in range(CALLS):
            call()  # type: ignore[operator]

    work()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    since = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ROWS * CALLS * clients / (time.perf_counter() - since)


if __name__ == "__main__":
    main()
