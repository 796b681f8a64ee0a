"""`remote-ops metadata|call|ping`: the command line. It turns flags into calls of `cli`, and errors into statuses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

from remote_ops import __version__
from remote_ops.cli import text
from remote_ops.cli.arguments import config_of, headers_of, inputs_of, outputs_of, seconds, whole
from remote_ops.cli.call import call
from remote_ops.cli.ping import line, ping
from remote_ops.cli.status import status_of
from remote_ops.client import Endpoint
from remote_ops.policy import Retry

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if it worked, 1 if the server did not, 2 if the arguments are wrong."""
    return status_of(partial(_run_command, argv))


def _run_command(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    status: int = args.run(args)
    return status


# --------------------------------------------------------------------------- commands


def _metadata(args: argparse.Namespace) -> int:
    with Endpoint(args.url, args.timeout_s, headers_of(args.header)) as endpoint:
        signature = endpoint.signature
    print(text.as_json(signature) if args.json else text.as_text(signature))
    return 0


def _call(args: argparse.Namespace) -> int:
    retry = Retry(attempts=args.retries + 1)
    with Endpoint(args.url, args.timeout_s, headers_of(args.header), retry=retry) as endpoint:
        outputs, config, inputs = outputs_of(args.output), config_of(args.config), inputs_of(args.input)
        call(endpoint, inputs, outputs, config, timeout_s=args.timeout_s)
    return 0


def _ping(args: argparse.Namespace) -> int:
    answers = ping(
        args.url,
        headers=headers_of(args.header),
        count=args.count,
        interval_s=args.interval_s,
        timeout_s=args.timeout_s,
    )
    status = 0
    for pings in answers:
        print(line(pings), flush=True)
        status = 1 if pings.errors else status
    return status


# --------------------------------------------------------------------------- flags

_STATUS = "It exits with 0 if it worked, 1 if the server or the way there failed, 2 if the arguments are wrong."
_METADATA = """\
Print what the model at a URL takes and gives; -1 is any size.

  remote-ops metadata http://127.0.0.1:9000/
"""
_CALL = """\
Call the model at a URL once, and print its outputs or save them.

  remote-ops call http://127.0.0.1:9000/ --input x=arr.npy
  remote-ops call http://127.0.0.1:9000/ --input 'x=[[1, 2, 3]]' --output y=result.npy
  make-array | remote-ops call http://127.0.0.1:9000/ --input x=- --output y=- | use-array
"""
_PING = """\
Ask the models at all the URLs at once whether they are there, and how long that takes. Nothing is tried again.

  remote-ops ping http://gpu1:9000/resnet http://gpu2:9000/resnet
"""
_PING_STATUS = "It exits with 0 if all requests were answered, 1 if any was not, 2 if the arguments are wrong."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="remote-ops", description="Ask models on other machines.")
    parser.add_argument("-V", "--version", action="version", version=f"remote-ops {__version__}")
    found = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_metadata, _add_call, _add_ping):
        add(partial(found.add_parser, formatter_class=argparse.RawDescriptionHelpFormatter))
    return parser


def _add_metadata(command: Callable[..., argparse.ArgumentParser]) -> None:
    brief = "print what the model at a URL takes and gives"
    parser = command("metadata", help=brief, description=_METADATA, epilog=_STATUS)
    parser.set_defaults(run=_metadata)
    _add_address(parser, timeout_s=10.0)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _add_call(command: Callable[..., argparse.ArgumentParser]) -> None:
    parser = command("call", help="call the model at a URL", description=_CALL, epilog=_STATUS)
    parser.set_defaults(run=_call)
    _add_address(parser, timeout_s=30.0)
    parser.add_argument("-i", "--input", action="append", default=[], metavar="[NAME=]VALUE",
        help="a .npy file, '-' for one on stdin, or JSON; repeat for several; unnamed ones go in order")  # fmt: skip
    parser.add_argument("-o", "--output", action="append", default=[], metavar="NAME[=FILE]",
        help="an output to ask for (default: all), and a .npy file to save it to, '-' for stdout; repeat")  # fmt: skip
    parser.add_argument("--config", default="", metavar="TEXT", help="handed to the model; @FILE for what a file holds")
    parser.add_argument("--retries", type=whole(0), default=Retry().attempts - 1, metavar="N",
        help="how often to try again what failed for a passing reason (default: %(default)s)")  # fmt: skip


def _add_ping(command: Callable[..., argparse.ArgumentParser]) -> None:
    brief = "ask whether models are there, and how long that takes"
    parser = command("ping", help=brief, description=_PING, epilog=_PING_STATUS)
    parser.set_defaults(run=_ping)
    _add_address(parser, timeout_s=5.0, several=True)
    parser.add_argument("-c", "--count", type=whole(1), default=3, metavar="N",
        help="requests to each URL (default: %(default)s)")  # fmt: skip
    parser.add_argument("--interval-s", type=seconds, default=0.2, metavar="S",
        help="seconds between the requests to a URL (default: %(default)s)")  # fmt: skip


def _add_address(parser: argparse.ArgumentParser, *, timeout_s: float, several: bool = False) -> None:
    parser.add_argument("url", nargs="+" if several else None, metavar="URL",
        help="http://HOST:PORT/MODEL, or for the Open Inference Protocol .../v2/models/NAME")  # fmt: skip
    what = "each request" if several else "everything, retries included"
    parser.add_argument("--timeout-s", type=seconds, default=timeout_s, metavar="S",
        help=f"seconds for {what} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--header", action="append", default=[], metavar="'NAME: VALUE'",
        help="sent with every request; ${NAME}, in single quotes, is read from the environment; repeat")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
