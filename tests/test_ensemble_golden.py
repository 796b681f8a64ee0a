"""Bad documents, each of which says in its first lines which faults it has: code, line and column, and words.

A line such as `# E103 14:31 'rank' "reads 'logits'"` is one fault; `# W109 ...` a warning. The faults are these, in the
order of the file, and no others; each word is in the text of its fault.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from ensemble import spec
from ensemble.faults import CODES, Fault, GraphFaults
from ensemble.graph import build

FILES = sorted((Path(__file__).parent / "ensemble_bad").glob("*.yaml"))
_LINE = re.compile(r"# (?P<kind>[EW])(?P<number>\d{3}) (?P<line>\d+):(?P<column>\d+) (?P<words>.*)")


class Expected(NamedTuple):
    """One fault that a file says it has."""

    code: str
    line: int
    column: int
    warning: bool
    words: tuple[str, ...]


def faults_of(path: Path) -> list[Fault]:
    """Every fault of a document, in the order of the file: of the writing, or if there is none, of the graph."""
    document, faults = spec.parse(path.read_text("utf-8"), str(path))
    try:
        found: Sequence[Fault] = faults.all if document is None or faults.all else build(document, faults).warnings
    except GraphFaults as error:
        found = error.faults
    return sorted(found, key=lambda fault: fault.place)


def expected_of(path: Path) -> list[Expected]:
    """The faults that a file says it has."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        if not (told := _LINE.fullmatch(line)):
            break
        place = int(told["line"]), int(told["column"])
        found.append(Expected(f"E{told['number']}", *place, told["kind"] == "W", tuple(shlex.split(told["words"]))))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_fault_is_told_with_its_code_place_and_both_ends_and_no_other(path: Path) -> None:
    faults, expected = faults_of(path), expected_of(path)
    shown = "\n".join(map(str, faults))
    got = [(fault.code, fault.place.line, fault.place.column, fault.warning) for fault in faults]
    assert sorted(got) == sorted(one[:4] for one in expected), shown
    for one in expected:
        texts = [fault.text for fault in faults if (fault.code, *fault.place[1:], fault.warning) == one[:4]]
        assert any(all(word in text for word in one.words) for text in texts), f"{one.words} in\n{shown}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_bad_file_says_what_it_expects(path: Path) -> None:
    expected = expected_of(path)
    assert expected
    assert all(one.code in CODES and one.words for one in expected)
