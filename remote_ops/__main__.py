"""`remote-ops metadata URL`: ask a server what it serves. It prints; the work is `Endpoint`'s."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from remote_ops import __version__
from remote_ops.client import Endpoint
from remote_ops.errors import RemoteOpsError, SpecError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if it worked, 1 if the server did not, 2 if the arguments are wrong."""
    parser = argparse.ArgumentParser(prog="remote-ops", description="Ask models on other machines.")
    parser.add_argument("-V", "--version", action="version", version=f"remote-ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    metadata = commands.add_parser("metadata", help="print what the model at a URL takes and gives")
    metadata.add_argument("url", help="http://host:port/model")
    metadata.add_argument("--timeout-s", type=float, default=10.0, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        print(_metadata(Endpoint(args.url, args.timeout_s)))
    except RemoteOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, SpecError) else 1
    return 0


def _metadata(endpoint: Endpoint) -> str:
    signature = endpoint.signature
    lines = [" ".join(filter(None, (signature.name or "(no name)", signature.version, signature.description)))]
    lines += [f"  in   {spec.name}: {spec}" for spec in signature.inputs]
    lines += [f"  out  {spec.name}: {spec}" for spec in signature.outputs]
    return "\n".join([*lines, *(f"  can  {feature}" for feature in signature.features)])


if __name__ == "__main__":
    sys.exit(main())
