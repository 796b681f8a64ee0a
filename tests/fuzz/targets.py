"""The targets of `make fuzz`: what is called with any bytes, and from which bytes the search starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from fuzz import graphpipe_target, http1_target, oip_target

FINDINGS = Path(__file__).parent / "findings"


class Target(NamedTuple):
    """`check` raises for bytes with which something that must hold does not.

    `words` and `damaged`, if there is one, are how bytes are changed beyond what libFuzzer does by itself.
    """

    check: Callable[[bytes], None]
    seeds: Callable[[], Iterator[tuple[str, bytes]]]
    words: tuple[bytes, ...]
    damaged: Callable[[bytes, Random], bytes] | None = None


TARGETS = {
    "graphpipe": Target(
        graphpipe_target.check, graphpipe_target.seeds, graphpipe_target.WORDS, graphpipe_target.damaged
    ),
    "oip": Target(oip_target.check, oip_target.seeds, oip_target.WORDS, oip_target.damaged),
    "http-requests": Target(http1_target.check_requests, http1_target.request_seeds, http1_target.WORDS),
    "http-responses": Target(http1_target.check_responses, http1_target.response_seeds, http1_target.WORDS),
}


def inputs_of(name: str) -> Iterator[tuple[str, bytes]]:
    """Where the search starts: the seeds of a target, then what was once found with it."""
    for seed, data in TARGETS[name].seeds():
        yield f"seed-{seed}", data
    for path in sorted((FINDINGS / name).glob("*.bin")):
        yield f"finding-{path.name}", path.read_bytes()
