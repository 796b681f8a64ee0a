"""What does it cost to turn arrays into a message and back, and does that depend on their size? (figures a, b)"""

from __future__ import annotations

import numpy as np
from graphpipe import convert
from models import IMAGE, ROWS
from timing import in_turn, median, per_call_us, row

from remote_ops import graphpipe


def main() -> None:
    """Print figures a and b."""
    small, large = np.ones((1, 16), np.float32), np.random.default_rng(0).random((ROWS, *IMAGE), np.float32)

    def ours(array: np.ndarray) -> tuple[float, float]:
        message = memoryview(bytearray(b"".join(graphpipe.encode_request(("x",), [array], ("y",)))))
        return (
            median([per_call_us(lambda: graphpipe.encode_request(("x",), [array], ("y",)), 500) for _ in range(15)]),
            median([per_call_us(lambda: graphpipe.decode_request(message), 500) for _ in range(15)]),
        )

    small_us, large_us = ours(small), ours(large)
    for what, small_one, large_one in zip(("encode", "decode"), small_us, large_us, strict=True):
        row(
            f"a  {what} 77.07 MB / 64 B",
            f"{large_one:.2f} us",
            f"{small_one:.2f} us",
            large_one / small_one,
            "3, and 30 us",
        )

    def old(array: np.ndarray) -> convert.InferReq:
        return convert.InferReq("", [array], ["x"], ["y"])

    message = bytes(convert.serialize_infer_request(old(small)))
    theirs = [
        median([per_call_us(call, 200) for _ in range(15)])
        for call in (lambda: convert.serialize_infer_request(old(small)), lambda: convert.deserialize_request(message))
    ]
    times = in_turn(
        [
            lambda: convert.serialize_infer_request(old(large)),
            lambda: graphpipe.encode_request(("x",), [large], ("y",)),
        ],
        9,
    )
    theirs_large, ours_large = (median(values) * 1e6 for values in times)
    row("b  encode 77.07 MB / graphpipe 1.0.4", f"{ours_large:.2f} us", f"{theirs_large:.0f} us",
        ours_large / theirs_large, "0.01")  # fmt: skip
    for what, mine, his in zip(("encode", "decode"), small_us, theirs, strict=True):
        row(f"b  {what} 64 B / graphpipe 1.0.4", f"{mine:.2f} us", f"{his:.2f} us", mine / his, "0.2")

    fresh = [
        memoryview(bytearray(b"".join(graphpipe.encode_request((f"x{index}",), [small], ("y",)))))
        for index in range(3000)
    ]
    messages = iter(fresh)
    first = per_call_us(lambda: graphpipe.decode_request(next(messages)), len(fresh))
    row(
        "b  decode 64 B never seen before / graphpipe 1.0.4",
        f"{first:.2f} us",
        f"{theirs[1]:.2f} us",
        first / theirs[1],
        "",
    )


if __name__ == "__main__":
    main()
