"""All benchmarks, one after the other: `make bench`. None of them is a test; they print, and people judge."""

from __future__ import annotations

import codec
import exchange
import graphs
import limits
import memory
import real_model
import serving
import tf_ops
import torch_gpu
import torch_layer
from timing import hardware


def main() -> None:
    """Print every figure, with the hardware and the commit."""
    print(hardware())
    print(f"{'':58} {'ours':>14} {'bare twin':>14} {'ratio':>8}", flush=True)
    for bench in (codec, exchange, real_model, memory, torch_layer, torch_gpu, tf_ops, graphs, limits, serving):
        bench.main()


if __name__ == "__main__":
    main()
