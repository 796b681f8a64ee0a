"""Search for bytes with which a target's check fails: `python -m fuzz.search TARGET [options of libFuzzer] FOLDER`.

The one file that needs atheris. Branches of `remote_ops` are what the search is guided by.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from random import Random

import atheris

with atheris.instrument_imports(include=["remote_ops"]):
    from fuzz.targets import TARGETS


def mutator(damaged: Callable[[bytes, Random], bytes]) -> Callable[[bytes, int, int], bytes]:
    """How libFuzzer is to change an input: in its own way, and every other time in that of the target."""

    def mutate(data: bytes, most_bytes: int, seed: int) -> bytes:
        choose = Random(seed)
        if choose.random() < 0.5:
            changed = damaged(data, choose)
            if changed != data and len(changed) <= most_bytes:
                return changed
        return bytes(atheris.Mutate(data, most_bytes))

    return mutate


def main() -> None:
    """Run libFuzzer, which ends the process; with another status than 0 if it found something."""
    program, name, *options = sys.argv
    target = TARGETS[name]
    own = {"custom_mutator": mutator(target.damaged)} if target.damaged else {}
    atheris.Setup([program, *options], target.check, **own)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
