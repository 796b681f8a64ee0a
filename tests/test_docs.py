"""What the tables and texts of README.md and docs/ state is what the code does."""

from __future__ import annotations

import re
import runpy
from collections.abc import Mapping
from pathlib import Path

import pytest

from remote_ops import DeadlineExceeded, graphpipe, http1
from remote_ops.errors import ANSWERS
from remote_ops.signature import DTYPES, MAX_RANK
from server_ref import Timeouts, json_text
from server_ref.__main__ import _parser
from server_ref.lanes import QueueLimits

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
MADE = ROOT / "docs" / "ensemble-reference.md"  # from the code, to look things up in: as long as there are keys


def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def tables_of(name: str) -> Mapping[tuple[str, ...], list[tuple[str, ...]]]:
    """The tables of a page by their head, as rows of cells without their backquotes."""
    tables: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    rows: list[tuple[str, ...]] = []
    for line in text_of(name).splitlines():
        if not line.startswith("|"):
            rows = []
            continue
        cells = tuple(cell.strip().replace("`", "") for cell in line.strip("|").split("|"))
        if not rows:
            rows = tables.setdefault(cells, [cells])
        else:
            rows.append(cells)
    return {head: rows[2:] for head, rows in tables.items()}


def number(text: str) -> int:
    """The first number of a cell, in which commas group digits."""
    found = re.search(r"\d[\d,]*", text)
    assert found, text
    return int(found[0].replace(",", ""))


def test_client_page_lists_every_answer_and_no_other() -> None:
    rows = tables_of("docs/client.md")["class", "code", "status", "again"]
    assert rows == [
        (answer.error.__name__, str(answer.code), str(answer.status), "yes" if answer.error.retryable else "no")
        for answer in ANSWERS
    ]


def test_client_page_names_the_phases_that_the_transport_names() -> None:
    from remote_ops.connection import CONNECTING, READING, WAITING, WRITING

    for phase in (CONNECTING, WRITING, WAITING, READING):
        assert f"`{phase}`" in text_of("docs/client.md")


def test_wire_page_lists_every_type() -> None:
    rows = tables_of("docs/wire.md")["number", "dtype", "and, as bits of it"]
    assert [(int(number), dtype) for number, dtype, _ in rows] == [
        (row.wire_type, row.name) for row in DTYPES.values() if not row.is_bit_view
    ]
    for row in DTYPES.values():
        if row.is_bit_view:
            family = "float8" if row.name.startswith("float8") else row.name
            assert family in rows[row.wire_type - 1][2]


def test_wire_page_states_the_limits_of_the_codec() -> None:
    limits = {what: number(value) for what, value in tables_of("docs/wire.md")["limit", "value"]}
    assert limits == {
        "message": graphpipe.MAX_MESSAGE_BYTES,
        "axes of a tensor": MAX_RANK,
        "tensors, or errors, in a message": graphpipe.MAX_TENSORS,
        "strings in a tensor": graphpipe.MAX_STRINGS,
        "bytes that a message may decode to": 1 << 20,
    }


def test_server_page_lists_every_flag_and_no_other() -> None:
    tables = tables_of("docs/server.md")
    rows = [*tables["flag", "says", "unless given"], *tables["flag", "variable", "today"]]
    documented = {flag for row in rows for flag in row[0].split(", ")}
    real = {flag for action in _parser({})._actions for flag in action.option_strings}
    assert documented == real - {"-h", "--help"}


def test_server_page_lists_every_variable_of_2018() -> None:
    rows = tables_of("docs/server.md")["flag", "variable", "today"]
    documented = {name for row in rows for name in row[1].split(", ") if name}
    source = text_of("server_ref/__main__.py")
    assert documented == set(re.findall(r"GP_[A-Z_]+", source))


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--max-body-mb", "max_body_mb"),
        ("--drain-grace-s", "drain_grace_s"),
        ("--exit-timeout-s", "exit_timeout_s"),
    ],
)
def test_server_page_states_the_defaults(flag: str, name: str) -> None:
    rows = {row[0]: row[2] for row in tables_of("docs/server.md")["flag", "says", "unless given"]}
    assert float(rows[flag]) == _parser({}).get_default(name)
    assert rows["-l, --listen"] == _parser({}).get_default("listen")


def test_server_page_states_the_limits_of_the_server() -> None:
    rows = {what: most for what, most, _ in tables_of("docs/server-operations.md")["what", "most", "then"]}
    limits, timeouts = http1.Limits(), Timeouts()
    assert {what: number(most) for what, most in rows.items()} == {
        "header block": limits.max_head_bytes,
        "body": limits.max_body_bytes,
        "chunks of a chunked body": limits.max_chunks,
        "requests of one model that wait": QueueLimits().max_requests,
        "bytes of their inputs": QueueLimits().max_bytes,
        "header block to arrive": timeouts.head_s,
        "body to arrive": timeouts.body_s,
        "a connection without a request": timeouts.idle_s,
        "a client that does not read its answer": timeouts.write_s,
    }
    assert number(rows["body to arrive"].partition("each")[2]) == timeouts.min_rate


def test_page_of_other_protocols_states_the_bounds_of_a_text() -> None:
    rows = {what: number(most) for what, most in tables_of("docs/server-oip.md")["a JSON text", "most"]}
    assert rows == {
        "bytes": json_text.MAX_BYTES,
        "depth of lists and objects": json_text.MAX_DEPTH,
        "lists and objects": json_text.MAX_LISTS,
        "commas": json_text.MAX_COMMAS,
    }


def test_readme_shows_errors_of_classes_that_exist() -> None:
    import ensemble
    import remote_ops

    tf = pytest.importorskip("tensorflow")
    rows = tables_of("README.md")["you see", "it means"]
    ours = {*remote_ops.__all__, *ensemble.__all__, "ImportError", "server_ref"}
    for text, _ in rows:
        name = text.partition(":")[0]
        assert name in ours or hasattr(tf.errors, name), text
    assert issubclass(DeadlineExceeded, TimeoutError)


def test_reference_of_graphs_is_what_the_code_takes() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["page"]
    assert MADE.read_text("utf-8") == page(), "run python docs/make_reference.py"


PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *DOCS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_has_a_line_that_waits_for_its_text(page: Path) -> None:
    assert not re.findall(r"^[A-Z]+_[A-Z_]+$", page.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-").replace(",", "") for heading in headings], target


@pytest.mark.parametrize("page", [page for page in DOCS if page != MADE], ids=lambda page: page.name)
def test_a_page_stays_short(page: Path) -> None:
    assert len(page.read_text("utf-8").splitlines()) < 150
