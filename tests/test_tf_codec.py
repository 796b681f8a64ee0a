"""The codec of the TensorFlow kernel reads and writes exactly what `graphpipe` does, and nothing past the end."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_hostile
from test_hostile import CAPTURES, VALID, Layout, mutations, objects, tensor_message

from remote_ops.errors import DecodeError
from remote_ops.graphpipe import InferRequest, InferResponse, decode_request, decode_response, encode_request
from remote_ops.signature import STORED

KERNEL = Path(__file__).parents[1] / "remote_ops" / "tf" / "kernel"
WIRE_TYPES = {dtype: wire_type for wire_type, dtype in STORED.items()}
RESPONSE, REQUEST = 0, 1
Outcomes = Callable[[Iterable[bytes | bytearray]], None]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def codec_check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The codec alone, built with the sanitizers for addresses and undefined behaviour."""
    path = tmp_path_factory.mktemp("codec") / "codec_check"
    subprocess.run(["make", "-s", "-C", str(KERNEL), f"OUT={path}"], check=True)
    return path


def shown_tensors(tensors: list[Any]) -> str:
    text = ""
    for tensor in tensors:
        text += f" tensor {WIRE_TYPES[tensor.dtype]} {list(tensor.shape)}"
        if tensor.dtype == object:
            text += "".join(f" '{item.hex()}'" for item in tensor.ravel().tolist())
        else:
            text += f" {tensor.tobytes().hex()}"
    return text


def shown(kind: int, message: bytes | bytearray) -> str:
    """What `graphpipe` makes of a message, as the C++ program writes it."""
    try:
        decoded = decode_request(message) if kind == REQUEST else decode_response(message)
    except DecodeError:
        return "reject"
    if isinstance(decoded, InferResponse):
        errors = "".join(f" error {error.code} '{error.message.encode().hex()}'" for error in decoded.errors)
        return f"response{errors}{shown_tensors(decoded.tensors)}"
    if isinstance(decoded, InferRequest):
        names = [
            " names" + "".join(f" '{name.encode().hex()}'" for name in some)
            for some in (decoded.input_names, decoded.output_names)
        ]
        return f"request '{decoded.config.hex()}'{''.join(names)}{shown_tensors(decoded.tensors)}"
    return "metadata request"


@pytest.fixture
def agree(codec_check: Path, tmp_path: Path) -> Outcomes:
    """Check that both codecs make the same of messages, each read as a response and as a request."""

    def check(messages: Iterable[bytes | bytearray]) -> None:
        records = [(kind, bytes(message)) for message in messages for kind in (RESPONSE, REQUEST)]
        file = tmp_path / "messages"
        file.write_bytes(b"".join(struct.pack("<BI", kind, len(message)) + message for kind, message in records))
        done = subprocess.run([str(codec_check), str(file)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert len(lines) == len(records)
        for line, (kind, message) in zip(lines, records, strict=True):
            got = "reject" if line.startswith("reject") else line
            # Python shows what is not UTF-8 in an error's message as U+FFFD; C++ keeps it.
            if " error " in got and "efbfbd" in shown(kind, message):
                continue
            assert got == shown(kind, message), message.hex()[:400]

    return check


def recorded() -> list[bytes]:
    return [path.read_bytes() for path in sorted(CAPTURES.glob("*.bin"))]


def test_every_recorded_message_reads_the_same(agree: Outcomes) -> None:
    agree([*recorded(), *(message for _, message in VALID.values())])


def test_20000_damaged_messages_are_accepted_or_refused_alike(agree: Outcomes) -> None:
    seeds = [seed for seed in recorded() if 0 < len(seed) < 4000] + [message for _, message in VALID.values()]
    agree(mutations(seeds, 20_000))


@pytest.mark.parametrize("kind", VALID)
def test_a_message_cut_or_changed_at_any_byte_is_accepted_or_refused_alike(agree: Outcomes, kind: str) -> None:
    _, message = VALID[kind]
    cut = [message[:end] for end in range(len(message))]
    changed = [
        message[:at] + bytes([value]) + message[at + 1 :]
        for at in range(len(message))
        for value in (0, 0x7F, 0x80, 0xFF)
    ]
    agree([*cut, *changed])


def cases(test: Any) -> Iterator[dict[str, Any]]:
    """The arguments that pytest would call a test with; none for one that wants a fixture or draws its own."""
    tables = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names = mark.args[0].split(", ") if isinstance(mark.args[0], str) else mark.args[0]
            rows = [getattr(row, "values", row) if len(names) > 1 else [row] for row in mark.args[1]]
            tables.append([dict(zip(names, row, strict=True)) for row in rows])
    for chosen in itertools.product(*tables):
        case = {name: value for part in chosen for name, value in part.items()}
        if case.keys() == inspect.signature(test).parameters.keys():
            yield case


def hostile_messages(monkeypatch: pytest.MonkeyPatch) -> set[bytes]:
    """Every message by which the tests of `graphpipe` try to hurt it."""
    seen: set[bytes] = set()
    for name in ("assert_refused", "try_decode"):
        monkeypatch.setattr(test_hostile, name, lambda decode, message, *_, **__: seen.add(bytes(message)))
    for name, test in vars(test_hostile).items():
        if name.startswith("test_") and not hasattr(test, "hypothesis"):
            for case in cases(test):
                with contextlib.suppress(AssertionError, AttributeError, TypeError):  # it looks at what was decoded
                    test(**case)
    return seen


def test_every_message_meant_to_hurt_graphpipe_is_accepted_or_refused_alike(
    agree: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = hostile_messages(monkeypatch)
    assert len(messages) > 1000
    assert max(map(len, messages)) > 1_000_000  # a vtable behind the end, 250,000 tensors that share one, ...
    assert struct.pack("<Ii", 4, -(2**31)) in messages
    agree(messages)


def shared_strings(count: int, length: int) -> bytearray:
    layout = Layout()
    (slot,) = layout.offsets(layout.table(0, 8, 4) + 4, 1)
    tensor = layout.table(slot, 20, 16, 4, 0, 12)
    layout.bytes[tensor + 16] = 12
    layout.shape(tensor + 4, count)
    slots = layout.offsets(tensor + 12, count)
    target = layout.data(slots[0], b"x" * length)
    for at in slots:
        layout.point(at, target)
    return layout.bytes


def shared_tensors(count: int, wire_type: int, size: int) -> bytearray:
    layout = Layout()
    slots = layout.offsets(layout.table(0, 8, 4) + 4, count)
    target = layout.table(slots[0], 20, 16, 4, 8, 0)
    layout.bytes[target + 16] = wire_type
    layout.shape(target + 4, size)
    layout.data(target + 8, bytes(size))
    for at in slots:
        layout.point(at, target)
    return layout.bytes


def test_messages_with_one_thing_wrong_are_accepted_or_refused_alike(agree: Outcomes) -> None:
    huge = (2**62, 2**63 - 1, 2**32)
    shapes = [
        (),
        (0,),
        (2,),
        (-1,),
        (-(2**63),),
        (1,) * 32,
        (1,) * 33,
        (0, 2**32, 2**32),
        (2**62, 4, 0),
        *((n, n) for n in huge),
    ]
    messages: list[bytes | bytearray] = []
    for wire_type in (0, *range(1, 14), 127, 255):
        for shape in shapes:
            for length in (None, 0, 1, 2, 4, 8, 16):
                data = None if length is None else bytes(length)
                messages.append(tensor_message(wire_type, shape, data))
                messages.append(tensor_message(wire_type, shape, data, strings=(b"a\0b",) * ((length or 0) // 4)))
    messages += [shared_strings(500, 1_000_000), shared_strings(3, 100), shared_tensors(4000, 1, 1_000_000)]
    messages += [shared_tensors(250_000, 10, 0), shared_tensors(4096, 1, 0), shared_tensors(4097, 1, 0)]
    agree(messages)


@pytest.mark.parametrize(
    "name", [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", "größe日😀".encode()]
)
def test_names_are_utf8_for_both(agree: Outcomes, name: bytes) -> None:
    stand_in = b"Q" * len(name)
    agree([b"".join(encode_request((stand_in.decode(),), [np.zeros(1)], ("y",))).replace(stand_in, name)])


def test_both_write_the_same_bytes(codec_check: Path) -> None:
    written = subprocess.run([str(codec_check), "encode"], capture_output=True, check=True).stdout
    arrays = [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        objects(b"a\0b", b"", b"four"),
        np.zeros((0, 2), np.int64),
        np.array(0, np.uint8),
    ]
    assert written == b"".join(encode_request(("x", "größ", "", "d"), arrays, ("y",), b"cfg\0\xff"))
