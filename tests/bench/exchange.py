"""What does a call cost beyond moving its bytes? (figures c, d, e)"""

from __future__ import annotations

import tempfile

import numpy as np
from models import FEATURES, IMAGE, ROWS
from timing import bare_exchange, in_turn, median, row, server

from remote_ops import Endpoint

HEAD_BYTES = 400  # about what a request's and an answer's heads and tables add


def headline(*, unix: bool) -> None:
    """The 77.07 MB request and its 12.85 MB answer."""
    images = np.random.default_rng(0).random((ROWS, *IMAGE), np.float32)
    listen = f"unix:{tempfile.mktemp(suffix='.sock')}" if unix else ""
    down = ROWS * int(np.prod(FEATURES)) * 4
    with (
        server("headline", "echo", listen=listen) as (url, _),
        bare_exchange(images.nbytes + HEAD_BYTES, down + HEAD_BYTES, unix=unix) as bare,
        Endpoint(url + "headline") as endpoint,
    ):
        in_turn([bare, lambda: endpoint(images)], 5)
        bare_s, ours_s = (median(times) for times in in_turn([bare, lambda: endpoint(images)], 40))
    what = "d  headline over a unix socket / bare" if unix else "c  headline over TCP / bare sockets"
    row(what, f"{ours_s * 1e3:.1f} ms", f"{bare_s * 1e3:.1f} ms", ours_s / bare_s, "1.3")


def small(*, unix: bool) -> None:
    """64 bytes each way, through a Python function (a thread) and an ONNX model (the loop)."""
    x = np.ones((1, 16), np.float32)
    listen = f"unix:{tempfile.mktemp(suffix='.sock')}" if unix else ""
    with (
        server("echo", "double", listen=listen) as (url, _),
        bare_exchange(x.nbytes + HEAD_BYTES, x.nbytes + 208, unix=unix) as bare,
        Endpoint(url + "echo") as echo,
        Endpoint(url + "double") as double,
    ):
        calls = [bare, lambda: echo(x), bare, lambda: double(x)]
        in_turn(calls, 300)
        bare_1, echo_s, bare_2, double_s = (median(times) for times in in_turn(calls, 5000))
        alone = median(in_turn([bare], 5000)[0])
        double_alone = median(in_turn([lambda: double(x)], 5000)[0])
    where = "unix socket" if unix else "TCP"
    for what, ours_s, bare_s in (
        (f"e  64 B over {where}, ONNX model, in turn / bare", double_s, bare_2),
        (f"e  64 B over {where}, Python function, in turn / bare", echo_s, bare_1),
        (f"e  64 B over {where}, ONNX model, each alone / bare", double_alone, alone),
    ):
        row(what, f"{ours_s * 1e6:.1f} us", f"{bare_s * 1e6:.1f} us", ours_s / bare_s, "5")


def main() -> None:
    """Print figures c, d and e."""
    headline(unix=False)
    headline(unix=True)
    small(unix=False)
    small(unix=True)


if __name__ == "__main__":
    main()
