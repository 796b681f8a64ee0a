"""What `make fuzz` starts from holds now, what it once found stays mended, and its checks fail where they should."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from fuzz.claims import assert_same, bits
from fuzz.run import shrunk
from fuzz.targets import FINDINGS, TARGETS, inputs_of

from remote_ops import graphpipe, http1, oip
from remote_ops.errors import DecodeError, FramingError

ROOT = Path(__file__).parents[1]
FUZZER = ROOT / ".venv-fuzz" / "bin" / "python"
NOTHING = re.compile(r"(?!)")

INPUTS = [pytest.param(name, data, id=f"{name}-{label}") for name in TARGETS for label, data in inputs_of(name)]


@pytest.mark.parametrize(("name", "data"), INPUTS)
def test_every_seed_and_every_finding_holds(name: str, data: bytes) -> None:
    TARGETS[name].check(data)


def test_every_finding_belongs_to_a_target_and_is_replayed() -> None:
    kept = [path.relative_to(FINDINGS) for path in FINDINGS.rglob("*") if path.is_file()]
    assert {path.parts[0] for path in kept} <= set(TARGETS)
    assert all(len(path.parts) == 2 and path.suffix == ".bin" for path in kept)
    replayed = sum(label.startswith("finding-") for name in TARGETS for label, _ in inputs_of(name))
    assert replayed == len(kept) > 0


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_small_and_most_of_them_mean_something(name: str) -> None:
    seeds = dict(TARGETS[name].seeds())
    assert max(map(len, seeds.values())) <= 8192  # what the search is told to keep to
    assert len(set(seeds.values())) > len(seeds) / 2


# --------------------------------------------------------------------------- checks that can fail


def failures(name: str) -> list[str]:
    """What the check of a target says to its seeds and findings, where it fails."""
    said = []
    for _, data in inputs_of(name):
        try:
            TARGETS[name].check(data)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def shifted(known: Any, data: memoryview) -> Any:
    return np.ndarray(known.shape, known.dtype, bytes(data) + bytes(1), len(known.head) + 1)


def first_fitting(words: Any, wire_type: int) -> str:
    return DESCRIBED(list(reversed(words)), wire_type)


IDLE: Any = http1.Reader.idle
DESCRIBED, FROM_JSON, PLAIN = graphpipe._described_dtype, oip._from_json, oip._plain


def kept_once(row: Any, kept: dict[str, Any] = {}) -> Any:  # noqa: B006 (the defect is that it is kept)
    return kept.setdefault(repr(row), FROM_JSON(row))


def backwards(name: str, array: Any) -> Any:
    return PLAIN(name, array[::-1])


def forgetful(reader: Any) -> bool:
    """As `_read_chunk_data`, if all of a chunk came at once."""
    size = min(reader._left, reader._end - reader._start)
    reader._parts += reader._scratch[reader._start : reader._start + size]
    reader._start += size
    reader.state = type(reader.state).CHUNK_END
    return True


def roomless(reader: Any) -> Any:
    """As `buffer`, but no byte is ever moved."""
    in_body = reader.state is type(reader.state).BODY
    return reader._body[reader._filled :] if in_body else reader._scratch[reader._end :]


def idle_after_all(reader: Any) -> bool:
    failure, reader.failure = reader.failure, None
    try:
        return bool(IDLE.fget(reader))
    finally:
        reader.failure = failure


DEFECTS: list[tuple[str, Any, str, Any, str]] = [
    # target, where, what, by what it is replaced, what is said then
    ("graphpipe", graphpipe, "_U16x2", lambda data, at: [][at], "IndexError"),
    ("graphpipe", graphpipe, "_SHAPE", [*graphpipe._SHAPE[:2], lambda data, at: (3, 2)], "the tensors: "),
    ("graphpipe", graphpipe._Reader, "spend", lambda reader, size, at: None, "decode to "),
    ("graphpipe", graphpipe._Known, "tensor", shifted, "after one like it"),
    ("graphpipe", graphpipe, "_utf8", lambda text, what: b"another name", "written and read again"),
    ("graphpipe", graphpipe, "_ends_early", lambda data: DecodeError("?", offset=-1), "outside the message"),
    ("graphpipe", graphpipe, "_described_dtype", first_fitting, "written and read again"),
    ("oip", oip, "_loads", lambda data: json.loads(bytes(data)), "JSONDecodeError"),
    ("oip", oip, "_SURROGATE", NOTHING, "EncodeError"),
    ("oip", oip, "_unbase64", lambda item, of: item.encode(), "tensor "),
    ("oip", oip, "_from_json", kept_once, "after what the first one gave was changed"),
    ("oip", oip, "_padded", lambda text: text.replace(b'"name":"', b'"name":"_'), "written and read again"),
    ("oip", oip, "_plain", backwards, "written and read again"),
    *(
        (name, where, what, instead, said)
        for name in ("http-requests", "http-responses")
        for where, what, instead, said in (
            (http1, "_keeps_alive", lambda version, headers: {}[version], "KeyError"),
            (http1.Reader, "_read_chunk_data", forgetful, "cut into|byte by byte"),
            (http1.Reader, "buffer", roomless, "no room"),
            (http1.Reader, "_check_size", lambda reader, size: None, "asked for 101 bytes|more of a body"),
            (http1.Reader, "idle", property(idle_after_all), "idle after a fault"),
            (http1, "_framing", lambda headers, version: int(headers.get("content-length", 0)), "the body of message"),
            (http1, "_lines", lambda headers: b"Host: a\r\n", "the headers, written and read again"),
        )
    ),
    ("http-requests", http1, "_REQUEST_LINE", re.compile(rb".* *.*(1\.[01])"), "accepted as the first line"),
]


def forget() -> None:
    """Let nothing that was read or written with a defect be remembered, and nothing from before hide it."""
    for room in (graphpipe, oip):
        for kept in vars(room).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()


@pytest.mark.parametrize(
    ("name", "where", "what", "instead", "said"), DEFECTS, ids=[f"{defect[0]}-{defect[2]}" for defect in DEFECTS]
)
def test_a_planted_defect_is_reported(
    monkeypatch: pytest.MonkeyPatch, name: str, where: Any, what: str, instead: Any, said: str
) -> None:
    forget()
    monkeypatch.setattr(where, what, instead)
    reports = failures(name)
    monkeypatch.undo()
    forget()
    assert any(re.search(said, report) for report in reports), reports[:3]
    assert not failures(name)


def test_results_are_compared_bit_by_bit() -> None:
    assert_same([np.array([np.nan])], (np.array([np.nan]),), "equal")
    for one, other in ((0.0, -0.0), (np.float32(1), np.float64(1)), ([1], 1)):
        with pytest.raises(AssertionError, match="the sign: expected"):
            assert_same({"x": np.array(one)}, {"x": np.array(other)}, "the sign")
    assert bits(bits({"s": np.array([[b"a", "b"]], object)})) == bits({"s": np.array([[b"a", "b"]], object)})


# --------------------------------------------------------------------------- the search


def refuses(word: bytes) -> Callable[[bytes], None]:
    def check(data: bytes) -> None:
        if word in data:
            raise FramingError(f"{word!r} in {len(data)} bytes")
        assert b"?" not in data, "another fault"

    return check


def test_a_reproducer_is_made_smaller_while_it_fails_alike() -> None:
    assert shrunk(refuses(b"ab"), b"?" * 100 + b"xaby" + b"?" * 33) == b"ab"
    assert shrunk(refuses(b""), b"anything") == b""
    assert shrunk(refuses(b"ab"), b"holds") == b"holds"


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.damaged])
def test_damage_of_a_targets_own_is_new_and_the_same_every_time(name: str) -> None:
    damaged = TARGETS[name].damaged
    assert damaged is not None
    seeds = [data for _, data in TARGETS[name].seeds()]
    made = [[damaged(data, Random(seed)) for seed in range(20)] for data in seeds]
    assert made == [[damaged(data, Random(seed)) for seed in range(20)] for data in seeds]
    assert len({data for row in made for data in row}) > 2 * len(seeds)


@pytest.mark.slow
@pytest.mark.skipif(not FUZZER.exists(), reason="the search needs .venv-fuzz: make fuzz FUZZ_S=1 creates it")
def test_the_search_finds_what_no_seed_shows(tmp_path: Path) -> None:
    found, seeds = tmp_path / "found", tmp_path / "seeds"
    found.mkdir()
    seeds.mkdir()
    for label, data in TARGETS["oip"].seeds():
        (seeds / label).write_bytes(data)
    defect = "oip._whole = lambda values, of: tuple(values)"  # any list is a shape
    program = f"from fuzz import search\nfrom remote_ops import oip\n{defect}\nsearch.main()"
    command = [str(FUZZER), "-c", program, "oip", "-max_total_time=60", f"-artifact_prefix={found}/", str(seeds)]
    path = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode, done.stderr[-2000:]
    assert [path.name.partition("-")[0] for path in found.iterdir()] == ["crash"], done.stderr[-2000:]
