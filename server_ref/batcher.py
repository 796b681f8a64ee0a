"""`python -m server_ref.batcher --target-url URL`: a server that calls another one, for many callers at a time.

Small requests wait a moment for each other and go on as one; the target need not know of batches. The flags are those
of graphpipe-batcher. The queue, the rules and the rows are those of every model here.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt

import remote_ops
from remote_ops import Endpoint
from remote_ops.deadline import Deadline
from remote_ops.errors import RemoteOpsError, SpecError
from remote_ops.signature import Signature, TensorSpec, did_you_mean
from server_ref.batching import Batching
from server_ref.cache import Cached
from server_ref.lifecycle import serve
from server_ref.model import Version
from server_ref.rowstore import MemoryRows, RowCache

__all__ = ["Upstream", "batcher", "main"]

Array = npt.NDArray[Any]
_TARGET_S = 60.0


class Upstream:
    """The model of an endpoint, for a number of threads to call, with those of its outputs that are passed on.

    Args:
        endpoint: of the target, which is asked for its signature.
        workers: how many calls it gets at a time.
        inputs, outputs: names and their order; as the target has them unless given.

    Raises:
        SpecError: the target has no input or output of a name, or an input that is not named.
        RemoteOpsError: it does not say what it takes.
    """

    def __init__(
        self, endpoint: Endpoint, *, workers: int = 1, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
    ) -> None:
        told = endpoint.signature
        self.url = endpoint.url
        self.concurrency = workers
        self._endpoint = endpoint
        self._signature = replace(
            told, inputs=_named(told.inputs, inputs, "--inputs"), outputs=_named(told.outputs, outputs, "--outputs")
        )
        if missing := [spec.name for spec in told.inputs if spec not in self._signature.inputs]:
            raise SpecError(f"the target wants {', '.join(map(repr, missing))} too", path="--inputs")

    @property
    def signature(self) -> Signature:
        """What the target takes, and what of its outputs is passed on."""
        return self._signature

    def infer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """Call the target; raises as `Endpoint.infer` does."""
        wanted = [spec.name for spec in self._signature.select_outputs(outputs)]
        return self._endpoint.infer(inputs, wanted, config=config, deadline=deadline)


def _named(specs: Sequence[TensorSpec], names: Sequence[str], path: str) -> tuple[TensorSpec, ...]:
    known = {spec.name: spec for spec in specs}
    for name in names:
        if name not in known:
            raise SpecError(
                f"the target has no '{name}': it has {', '.join(known)}{did_you_mean(name, known)}", path=path
            )
    return tuple(known[name] for name in names) or tuple(specs)


def batcher(
    upstream: Upstream, *, batch_size: int = 10, timeout_s: float = 0.25, rows: RowCache | None = None
) -> Version:
    """What to serve: the upstream, called with up to `batch_size` rows, or once the oldest has waited `timeout_s`.

    With `rows`, those that were computed before are not asked for again; none from an earlier launch, since the target
    may have another model by now.

    Raises:
        SpecError: a size below 1, or a time below 0.
    """
    if batch_size < 1:
        raise SpecError(f"expected 1 row or more, got {batch_size}", path="--batch-size")
    name = upstream.signature.name or "batcher"
    batching = Batching(max_rows=batch_size, max_delay_s=timeout_s)
    awaited = None if rows is None else lambda instances: Cached(instances, rows)
    return Version(name, [upstream], batching=batching, awaited=awaited)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop; see `server_ref.serve`."""
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        if args.workers < 1:
            raise SpecError(f"expected 1 or more, got {args.workers}", path="--workers")
        rows = _rows(args.cache_dir) if args.cache else None
        with Endpoint(args.target_url, _TARGET_S) as endpoint:
            upstream = Upstream(
                endpoint, workers=args.workers, inputs=_names(args.inputs), outputs=_names(args.outputs)
            )
            version = batcher(upstream, batch_size=args.batch_size, timeout_s=args.timeout / 1000, rows=rows)
            return serve({version.name: version}, args.listen, grace_s=args.drain_grace_s)
    except (RemoteOpsError, ImportError) as error:
        print(f"batcher: {error}", file=sys.stderr)
        return 2


def _rows(folder: str | None) -> RowCache:
    if not folder:
        return MemoryRows()
    from server_ref.rowdisk import DiskRows  # it needs lmdb, which is an extra

    return DiskRows(folder)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server_ref.batcher", description="Put small requests together on their way to a model server."
    )
    add = parser.add_argument
    add("--target-url", required=True, metavar="URL", help="of the model that is called")
    add("-l", "--listen", default="127.0.0.1:10000", metavar="HOST:PORT", help="where (default: %(default)s)")
    add("-i", "--inputs", default="", metavar="NAMES", help="in order, with commas (default: what the target says)")
    add("-o", "--outputs", default="", metavar="NAMES", help="the same")
    add("--batch-size", type=int, default=10, help="most rows in a call (default: %(default)s)")
    add("--timeout", type=float, default=250, metavar="MS",
        help="longest wait of a request for others, in milliseconds (default: %(default)s)")  # fmt: skip
    add("--workers", type=int, default=1, help="calls of the target at a time (default: %(default)s)")
    add("-c", "--cache", action="store_true", help="do not ask again for rows that were computed since the launch")
    add("-d", "--cache-dir", metavar="DIR", help="keep them there, and not in memory")
    add("--drain-grace-s", type=float, default=5.0,
        help="after SIGTERM, seconds of further service while not ready (default: %(default)s)")  # fmt: skip
    add("-v", "--verbose", action="store_true", help="log more")
    add("-V", "--version", action="version", version=f"remote-ops {remote_ops.__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
