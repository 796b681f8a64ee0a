"""`ensemble check|plot|run|serve|schema`: the command line of graphs.

It turns flags into calls of the other rooms, and errors into statuses.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble import lacking
from remote_ops import __version__
from remote_ops.cli import text
from remote_ops.cli.arguments import Output, outputs_of, seconds, whole
from remote_ops.cli.status import status_of
from remote_ops.errors import SpecError

if TYPE_CHECKING:
    from ensemble.check import Checked
    from ensemble.ensemble import Ensemble
    from ensemble.feeds import Feeds
    from ensemble.latency import Latency
    from ensemble.outlets import Outlet
    from ensemble.plan import Plan
    from ensemble.runs import Outcome
    from ensemble.trace import Trace

__all__ = ["main"]

_AT_ONCE = 8
_IDLE_S = 0.2  # how long a thread takes at most that has nothing to do


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if it worked, 1 if the graph or a run of it did not, 2 if the arguments are wrong."""
    status = status_of(partial(_run_command, argv))
    if argv is None:
        _leave(status)
    return status


def _run_command(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
        status: int = args.run(args)
        return status
    except ImportError as error:
        print(f"ImportError: {lacking(error)}", file=sys.stderr)
        return 1


def _leave(status: int) -> None:
    """End at once if a node is still at work on a thread, for a run that has ended: Python would wait for it."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("ensemble")]
    until = time.monotonic() + _IDLE_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# --------------------------------------------------------------------------- check


def _check(args: argparse.Namespace) -> int:
    from ensemble import check

    if args.record and len(args.graph) > 1:
        raise SpecError(f"expected one graph to record the models of, got {len(args.graph)}", path="--record")
    status = 0
    for path in args.graph:
        checked = _checked(args, path)
        for fault in checked.faults:
            print(text.printable(str(fault)))
        print(text.printable(checked.summary), flush=True)
        status = 1 if checked.plan is None else status
        if args.record and checked.plan is not None:
            count = check.record(checked.plan, args.record)
            print(f"{count} remote model{'s' * (count != 1)} -> {text.printable(args.record)}", file=sys.stderr)
    return status


def _checked(args: argparse.Namespace, path: str) -> Checked:
    from ensemble.check import check

    return check(path, strict=args.strict, metadata=args.metadata, offline=args.offline)


def _plan(args: argparse.Namespace) -> Plan | None:
    """The plan of the graph; None where it has faults. Says on stderr what was found."""
    checked = _checked(args, args.graph)
    for fault in checked.faults:
        print(text.printable(str(fault)), file=sys.stderr)
    if checked.plan is None:
        print(text.printable(checked.summary), file=sys.stderr)
    return checked.plan


# --------------------------------------------------------------------------- plot


def _plot(args: argparse.Namespace) -> int:
    from ensemble.outlets import writable
    from ensemble.plot import plot

    form = _form_of(args.output)
    if args.output != "-":
        writable(args.output, "--output")
    plan = _plan(args)
    if plan is None:
        return 2
    drawn = plot(plan, "svg" if form == "svg" else "mermaid", _latencies(args.trace, plan) if args.trace else None)
    if form == "md":
        drawn = f"```mermaid\n{drawn}```\n"
    if args.output == "-":
        print(drawn, end="")
    else:
        Path(args.output).write_text(drawn, "utf-8")
    return 0


_FORMS = {".svg": "svg", ".mmd": "mermaid", ".mermaid": "mermaid", ".md": "md"}


def _form_of(file: str) -> str:
    if file == "-":
        return "mermaid"
    suffix = Path(file).suffix.lower()
    if suffix not in _FORMS:
        raise SpecError(f"expected a file that ends in {', '.join(_FORMS)}, got '{file}'", path="--output")
    return _FORMS[suffix]


def _latencies(file: str, plan: Plan) -> dict[str, Latency]:
    from ensemble.latency import latencies_in

    latencies, digest = latencies_in(file)
    if digest != plan.digest:
        print(text.printable(f"'{file}' is the trace of another graph, or of an older version of it"), file=sys.stderr)
    return latencies


# --------------------------------------------------------------------------- run


def _run(args: argparse.Namespace) -> int:
    from ensemble.ensemble import Ensemble
    from ensemble.feeds import feeds_of
    from ensemble.outlets import writable

    asked = outputs_of(args.output)
    if args.trace:
        writable(args.trace, "--trace")
    plan = _plan(args)
    if plan is None:
        return 2
    with Ensemble(plan, timeout_s=args.timeout_s) as ensemble:
        ensemble.signature.select_outputs([output.name for output in asked] or None, at=plan.name)
        optional = frozenset(name for name, given in plan.inputs.items() if given.optional)
        feeds = feeds_of(args.input, ensemble.signature, optional)
        if feeds.is_many and any(output.file for output in asked):
            raise SpecError("a file for one run: expected --output-dir or --out for many", path="--output")
        with ExitStack() as stack:
            outlets = [stack.enter_context(outlet) for outlet in _outlets(args, asked)]
            return _run_all(args, ensemble, feeds, asked, outlets)


def _outlets(args: argparse.Namespace, asked: Sequence[Output]) -> list[Any]:
    """Where the outputs go: printed, unless they are saved."""
    from ensemble.outlets import Archive, Folder, Lines, Shown

    found: list[Any] = [Folder(args.output_dir)] if args.output_dir else []
    if args.out:
        kinds = {".npz": Archive, ".jsonl": Lines}
        suffix = Path(args.out).suffix.lower()
        if suffix not in kinds:
            raise SpecError(f"expected a file that ends in .npz or .jsonl, got '{args.out}'", path="--out")
        found.append(kinds[suffix](args.out))
    return found if found and not any(output.file for output in asked) else [*found, Shown(asked)]


def _run_all(
    args: argparse.Namespace, ensemble: Ensemble, feeds: Feeds, asked: Sequence[Output], outlets: Sequence[Outlet]
) -> int:
    """Run what there is to run, and say how that went."""
    from ensemble.runs import outcomes

    names, since = feeds.names, time.monotonic()
    runs = [(name, partial(feeds.inputs, number)) for number, name in enumerate(names)] * args.repeat
    most = ensemble.plan.admission.max_inflight if ensemble.plan.admission else None
    at_once = min(args.jobs or (_AT_ONCE if feeds.is_many else 1), most or len(runs))
    wanted = [output.name for output in asked] or None
    found = outcomes(ensemble, runs, wanted, at_once=at_once, trace=bool(args.trace or args.profile))
    failed: list[str] = []
    traces: list[tuple[str, Trace]] = []
    for number, outcome in enumerate(_counted(found, len(runs), failed)):
        if outcome.trace is not None:
            traces.append((outcome.run or ensemble.plan.name, outcome.trace))
        if outcome.error is not None and not feeds.is_many:
            _save_traces(args, traces)
            raise outcome.error
        error = _given(outcome, outlets) if number < len(names) else outcome.error
        if error is not None:
            failed.append(outcome.run)
            _say(f"{outcome.run}: {type(error).__name__}: {error}")
        elif outcome.result is not None:
            _say_missing(outcome.run, outcome.result.missing)
    print(_said(len(runs), failed, time.monotonic() - since), file=sys.stderr)
    _save_traces(args, traces)
    return 1 if failed else 0


def _counted(found: Generator[Outcome, None, None], count: int, failed: Sequence[str]) -> Iterator[Outcome]:
    """The outcomes, with a bar on stderr that says how many there were, where it is a terminal and they are several."""
    from tqdm import tqdm

    with closing(found), tqdm(total=count, unit="run", file=sys.stderr, disable=True if count == 1 else None) as bar:
        for outcome in found:
            yield outcome
            if failed:
                bar.set_postfix(failed=len(failed), refresh=False)
            bar.update()


def _say(line: str) -> None:
    """A line on stderr, above the bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text.printable(line), file=sys.stderr)


def _say_missing(run: str, missing: Mapping[str, Sequence[str]]) -> None:
    """Say which members votes did without, in one line."""
    if missing:
        told = "; ".join(f"'{node}' did without {', '.join(map(repr, members))}" for node, members in missing.items())
        _say(f"{run}: {told}" if run else told)


def _given(outcome: Outcome, outlets: Sequence[Outlet]) -> Exception | None:
    """Give what came of a run to the outlets; an output that has no form in a file is a failure of that run.

    Raises:
        SpecError: that, of the only run there is.
    """
    from ensemble.outlets import as_sent

    error: Exception | None = outcome.error
    if outcome.result is not None:
        try:
            outputs = {name: as_sent(array) for name, array in outcome.result.items()}
            for outlet in outlets:
                outlet.add(outcome.run, outputs)
        except SpecError as unfit:
            if not outcome.run:
                raise
            error = unfit
    if error is not None:
        for outlet in outlets:
            outlet.add_error(outcome.run, error)
    return error


def _said(runs: int, failed: Sequence[str], took_s: float) -> str:
    if runs == 1:
        return f"took {1e3 * took_s:.1f} ms"
    said = f"{runs} runs in {took_s:.2f} s, {runs / max(took_s, 1e-9):.1f} a second"
    return text.printable(f"{said}; {len(failed)} failed: {', '.join(dict.fromkeys(failed))}" if failed else said)


def _save_traces(args: argparse.Namespace, traces: Sequence[tuple[str, Trace]]) -> None:
    from ensemble.latency import chrome, table

    if args.trace:
        Path(args.trace).write_text(chrome(traces), "utf-8")
        print(f"trace -> {text.printable(args.trace)}", file=sys.stderr)
    if args.profile and traces:
        print(table([trace for _, trace in traces]))


# --------------------------------------------------------------------------- serve, schema


def _serve(args: argparse.Namespace) -> int:
    if not Path(args.graph).is_file():
        raise SpecError("there is no such file", path=args.graph)
    command = [sys.executable, "-m", "server_ref", "--model", args.graph, *args.flags]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # this process becomes the server, and so gets its signals


def _schema(args: argparse.Namespace) -> int:
    from ensemble.spec import schema_text

    print(schema_text(), end="")
    return 0


# --------------------------------------------------------------------------- flags

_STATUS = "It exits with 0 if it worked, 1 if {one}, 2 if the arguments{two} are wrong."
_CHECK = """\
Check graphs: say everything that is wrong with them, a line for each fault, then how it went.

  ensemble check fraud.yaml
  ensemble check *.yaml --offline                        # where no model is running
  ensemble check fraud.yaml --record models.json         # save what the remote models say of themselves,
  ensemble check fraud.yaml --metadata file:models.json  # and check by that from then on: in a build, say
"""
_PLOT = """\
Draw a graph: what flows from where to where, in which dtype and shape.

  ensemble plot fraud.yaml                                # as Mermaid text
  ensemble plot fraud.yaml -o fraud.svg                   # as a picture
  ensemble plot fraud.yaml -o fraud.svg --trace out.json  # with the time that each node took
"""
_RUN = """\
Run a graph, once or for each of many files, and print its outputs or save them.

  ensemble run faces.yaml --input frame=photo.jpg
  ensemble run fraud.yaml --input 'x=[[1, 2, 3]]' --output score=score.npy
  ensemble run faces.yaml --input frame=photos/ --out faces.jsonl
  ensemble run faces.yaml --input frame=photo.jpg --repeat 100 --profile
"""
_SERVE = """\
Serve a graph as one model: the same as python -m server_ref --model GRAPH, whose flags may follow.

  ensemble serve fraud.yaml --listen 0.0.0.0:9000
"""
_SCHEMA = """\
Print the JSON Schema of graphs, by which editors complete and check as one writes.

  ensemble schema > ensemble.schema.json

The first line of a graph then is

  # yaml-language-server: $schema=ensemble.schema.json
"""

_Command = Callable[..., argparse.ArgumentParser]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ensemble", description="Graphs of models, written in YAML.")
    parser.add_argument("-V", "--version", action="version", version=f"ensemble, of remote-ops {__version__}")
    found = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_check, _add_plot, _add_run, _add_serve, _add_schema):
        add(partial(found.add_parser, formatter_class=argparse.RawDescriptionHelpFormatter))
    return parser


def _add_check(command: _Command) -> None:
    status = _STATUS.format(one="a graph has faults, which warnings are not", two="")
    parser = command("check", help="say everything that is wrong with a graph", description=_CHECK, epilog=status)
    parser.set_defaults(run=_check)
    parser.add_argument("graph", nargs="+", metavar="GRAPH", help="a YAML file")
    _add_reading(parser)
    parser.add_argument("--record", default="", metavar="PATH", help="save the signatures of the remote models as JSON")


def _add_plot(command: _Command) -> None:
    status = _STATUS.format(one="the picture could not be saved", two=" or the graph")
    parser = command("plot", help="draw a graph", description=_PLOT, epilog=status)
    parser.set_defaults(run=_plot)
    parser.add_argument("graph", metavar="GRAPH", help="a YAML file")
    _add_reading(parser)
    parser.add_argument("-o", "--output", default="-", metavar="FILE",
        help="a .svg, .mmd or .md file; '-' for Mermaid on stdout (default)")  # fmt: skip
    parser.add_argument("--trace", default="", metavar="FILE", help="a trace that run --trace saved")


def _add_run(command: _Command) -> None:
    status = _STATUS.format(one="a run failed", two=" or the graph")
    parser = command("run", help="run a graph", description=_RUN, epilog=status)
    parser.set_defaults(run=_run)
    parser.add_argument("graph", metavar="GRAPH", help="a YAML file")
    parser.add_argument("-i", "--input", action="append", default=[], metavar="[NAME=]VALUE",
        help="JSON; a .npy, .npz or .json file; a picture; '-' for .npy on stdin; a folder, or a pattern in quotes, "
        "for a run for each file; repeat for several inputs")  # fmt: skip
    parser.add_argument("-o", "--output", action="append", default=[], metavar="NAME[=FILE]",
        help="an output to ask for (default: all), and a .npy file to save it to, '-' for stdout; repeat")  # fmt: skip
    parser.add_argument("--output-dir", default="", metavar="DIR", help="save each run to a .npz file in a folder")
    parser.add_argument("--out", default="", metavar="FILE",
        help="save all runs to one .npz file, or a line for each to a .jsonl file")  # fmt: skip
    parser.add_argument("--trace", default="", metavar="FILE",
        help="save what each node did and when, for chrome://tracing, Perfetto, or plot --trace")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="print what each node took, the median over the runs")
    parser.add_argument("--repeat", type=whole(1), default=1, metavar="N",
        help="run all of it N times; outputs are those of the first time")  # fmt: skip
    parser.add_argument("--jobs", type=whole(1), default=0, metavar="N",
        help=f"runs at a time (default: {_AT_ONCE} for many files, else 1)")  # fmt: skip
    parser.add_argument("--timeout-s", type=seconds, default=30.0, metavar="S",
        help="seconds for each run (default: %(default)s), unless the graph says less")  # fmt: skip
    _add_reading(parser)


def _add_serve(command: _Command) -> None:
    parser = command("serve", help="serve a graph as one model", description=_SERVE)
    parser.set_defaults(run=_serve)
    parser.add_argument("graph", metavar="GRAPH", help="a YAML file")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="see python -m server_ref --help")


def _add_schema(command: _Command) -> None:
    command("schema", help="print the JSON Schema of graphs", description=_SCHEMA).set_defaults(run=_schema)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strict", action="store_true", help="a node or output that nothing uses is a fault")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--metadata",
        type=_metadata,
        metavar="require|warn|file:PATH",
        help="where a remote model cannot be asked: a fault, a warning, or what a file says; wins over the graph",
    )
    ways.add_argument("--offline", action="store_true", help="ask no remote model anything")


def _metadata(text: str) -> str:
    if text in ("require", "warn") or (text.startswith("file:") and len(text) > len("file:")):
        return text
    raise argparse.ArgumentTypeError(f"expected require, warn or file:PATH, got '{text}'")


if __name__ == "__main__":
    sys.exit(main())
