"""All targets, one after the other: `make fuzz`. Fails if any of them finds something, and says where it lies."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fuzz.targets import FINDINGS, TARGETS, inputs_of

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "fuzz"
_LIMITS = ("-timeout=10", "-rss_limit_mb=2048", "-max_len=8192")


def main() -> None:
    """Search with each target; what it learns stays in `build/fuzz` for the next run."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.run", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all unless said")
    parser.add_argument("--seconds", type=int, default=60, help="time for each target")
    parser.add_argument("--from-nothing", action="store_true", help="without seeds and without what was learnt before")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(unknown)}")
    found = [search(name, args.seconds, args.from_nothing) for name in args.targets or TARGETS]
    sys.exit(1 if any(found) else 0)


def search(name: str, seconds: int, from_nothing: bool = False) -> list[Path]:
    """Search with one target, and give the reproducers, made smaller."""
    folder = BUILD / (f"{name}-from-nothing" if from_nothing else name)
    learnt, found, log = folder / "learnt", folder / "found", folder / "log"
    for path in (*learnt.glob("*"), *found.glob("*")) if from_nothing else found.glob("*"):
        path.unlink()
    learnt.mkdir(parents=True, exist_ok=True)
    found.mkdir(exist_ok=True)
    for seed, data in () if from_nothing else inputs_of(name):
        (learnt / seed).write_bytes(data)
    words = folder / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in TARGETS[name].words))
    print(f"== {name}: {seconds} s", flush=True)
    options = [f"-max_total_time={seconds}", f"-dict={words}", f"-artifact_prefix={found}/", "-print_final_stats=1"]
    with log.open("wb") as out:
        command = [sys.executable, "-m", "fuzz.search", name, *options, *_LIMITS, str(learnt)]
        status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    text = log.read_text(errors="replace")
    print(f"   {_figures(text)}", flush=True)
    reproducers = sorted(found.glob("*"))
    if status or reproducers:
        print("\n".join(text.splitlines()[-40:]))
        print(_advice(name, reproducers, log), flush=True)
    return reproducers or ([log] if status else [])


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def _figures(log: str) -> str:
    """How much was tried: what libFuzzer counts at its end."""
    counted = dict(re.findall(r"^stat::(\w+):\s+(\d+)", log, re.MULTILINE))
    edges = re.findall(r"\bcov: (\d+)", log)
    units, speed = counted.get("number_of_executed_units", "?"), counted.get("average_exec_per_sec", "?")
    return f"{units} inputs, {speed} a second, {edges[-1] if edges else '?'} edges reached"


def _advice(name: str, reproducers: list[Path], log: Path) -> str:
    if not reproducers:
        return f"FAILED without a reproducer; all that was said stands in {log}"
    for path in reproducers:
        if path.name.startswith("crash-"):
            path.write_bytes(shrunk(TARGETS[name].check, path.read_bytes()))
    lines = [f"FOUND, with target {name}:", *(f"  {path}: {path.read_bytes()[:200]!r}" for path in reproducers)]
    return "\n".join(
        [
            *lines,
            f"Copy each to {FINDINGS.relative_to(ROOT) / name}, called after what it shows and ending in .bin: there",
            "tests/test_fuzz.py replays it. Fix the package, with a test that has a name in the file of the room.",
        ]
    )


def shrunk(check: Callable[[bytes], None], data: bytes) -> bytes:
    """The bytes without those that the same kind of failure does not need."""
    wanted = _failure(check, data)
    size = len(data)
    while size := size // 2:
        at = 0
        while at < len(data):
            less = data[:at] + data[at + size :]
            if wanted and _failure(check, less) == wanted:
                data = less
            else:
                at += size
    return data


def _failure(check: Callable[[bytes], None], data: bytes) -> tuple[type[Exception], str] | None:
    """How the check fails: with which error, and the words before what differs from input to input."""
    try:
        check(data)
    except Exception as error:
        return type(error), re.split(r"[:\d]", str(error))[0]
    return None


if __name__ == "__main__":
    main()
