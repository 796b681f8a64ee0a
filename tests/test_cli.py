"""The command `remote-ops`: what it prints, and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from rawoip import Model, echo, sides
from rawpeer import Conversation, Message, Script, peer, serving, unreachable

import server_ref
from remote_ops import FunctionServable, Signature, TensorSpec, __version__, graphpipe
from remote_ops.__main__ import _parser, main
from remote_ops.cli import npy
from remote_ops.errors import SpecError

ROOT = Path(__file__).parents[1]
X, Y = TensorSpec("x", "bfloat16", (-1, 4)), TensorSpec("y", "int64", ())
Array = npt.NDArray[Any]
Printed = pytest.CaptureFixture[str]


def run(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "remote_ops", *args], capture_output=True, text=True, check=False, **options
    )


# --------------------------------------------------------------------------- metadata


def test_metadata_prints_the_signature_of_a_served_model() -> None:
    model = FunctionServable(lambda x: 0, [X], [Y], name="count", version="3", description="counts")
    with server_ref.running({"count": model}) as url:
        done = run("metadata", url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["count 3 counts", "  in   x: bfloat16 [-1, 4]", "  out  y: int64 []"]


def test_metadata_of_nobody_exits_with_1_and_one_clear_line() -> None:
    done = run("metadata", "http://127.0.0.1:1/m", "--timeout-s", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ConnectError: cannot connect to 127.0.0.1:1 (Connection refused)")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("args", [[], ["metdata", "http://h/"], ["metadata"]])
def test_wrong_arguments_exit_with_2(args: list[str]) -> None:
    assert run(*args).returncode == 2


def test_it_says_its_version() -> None:
    assert run("--version").stdout.strip() == f"remote-ops {__version__}"


def describing(signature: Signature) -> Script:
    def script(conversation: Conversation) -> None:
        while conversation.read() is not None:
            conversation.answer(graphpipe.encode_metadata(signature))

    return script


def test_metadata_prints_features(capsys: pytest.CaptureFixture[str]) -> None:
    with peer(describing(Signature((X,), (Y,), name="m", features=("vjp", "batch=0")))) as there:
        assert main(["metadata", there.url]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-2:] == ["  can  vjp", "  can  batch=0"]
    assert printed.err == ""


def test_metadata_of_a_model_that_says_nothing_of_itself_still_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with peer(describing(Signature((), (TensorSpec("y", "any", None),)))) as there:
        assert main(["metadata", there.url]) == 0
    assert capsys.readouterr().out.splitlines() == ["(no name)", "  out  y: any of any shape"]


def test_metadata_of_a_web_server_without_a_model_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with peer(
        lambda conversation: conversation.answer(b"<h1>hello</h1>", "200 OK", "Content-Type: text/html")
    ) as there:
        assert main(["metadata", there.url]) == 1
    assert "BadStatus" in capsys.readouterr().err


def test_a_timeout_ends_the_command_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with unreachable() as url:
        since = time.monotonic()
        assert main(["metadata", url, "--timeout-s", "0.2"]) == 1
        assert time.monotonic() - since < 0.5
    assert "DeadlineExceeded" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["nowhere", "ftp://h/m", "http://ann:hush@h/"])
def test_a_url_that_is_none_exits_with_2_and_is_not_repeated_where_it_holds_a_secret(
    capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert main(["metadata", url]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("SpecError")
    assert "hush" not in printed


def test_metadata_for_programs_is_json(capsys: Printed) -> None:
    signature = Signature((X,), (TensorSpec("y", "any", None),), name="m", features=("vjp",))
    with peer(describing(signature)) as there:
        assert main(["metadata", there.url, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rest = {"description": "", "differentiable": False}
    assert told["inputs"] == [{"name": "x", "dtype": "bfloat16", "shape": [-1, 4], **rest}]
    assert told["outputs"] == [{"name": "y", "dtype": "any", "shape": None, **rest}]
    assert (told["name"], told["features"]) == ("m", ["vjp"])


@pytest.mark.parametrize("command", ["metadata", "call", "ping"])
def test_headers_are_sent_and_may_name_variables(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.setenv("MODEL_TOKEN", "s3cr3t")
    seen: list[dict[str, str]] = []

    def script(conversation: Conversation) -> None:
        while (message := conversation.read()) is not None:
            seen.append(message.headers)
            conversation.answer(b"go away", "401 X")

    with peer(script) as there:
        headers = ["--header", "Authorization: Bearer ${MODEL_TOKEN}", "--header", "X-Who:  me "]
        assert main([command, there.url, *headers]) == 1
    assert {(one["authorization"], one["x-who"]) for one in seen} == {("Bearer s3cr3t", "me")}
    assert "s3cr3t" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        (["Authorization Bearer hush"], "expected 'NAME: VALUE', got no colon"),
        (["X-A: hush", "X-A: hush"], "header 'X-A' is given twice"),
        (["X-A: h\u00fcsh"], "beyond ASCII"),
        (["Host: hush"], "no header of this name can be set: 'Host'"),
        (["X-A: ${NOT_SET_ANYWHERE}hush"], "needs the environment variable NOT_SET_ANYWHERE"),
    ],
)
@pytest.mark.parametrize("command", ["metadata", "call", "ping"])
def test_a_header_that_is_none_exits_with_2_and_is_not_repeated(
    command: str, headers: list[str], said: str, capsys: Printed
) -> None:
    flags = [word for header in headers for word in ("--header", header)]
    assert main([command, "http://127.0.0.1:1/m", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("SpecError")
    assert said in printed.err
    assert "hush" not in printed.err
    assert "h\u00fcsh" not in printed.err
    assert printed.out == ""


def test_what_a_server_says_does_nothing_to_the_terminal(capsys: Printed) -> None:
    wild = Signature((), (Y,), name="m\x1b[2J", description="two\nlines")
    with peer(describing(wild)) as there:
        assert main(["metadata", there.url]) == main(["ping", there.url, "-c", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == r"m\x1b[2J two\nlines"
    assert "\x1b" not in printed


# --------------------------------------------------------------------------- call


def stats(x: Array, config: bytes) -> tuple[Array, Array]:
    return x.mean(1), x.std(1) * np.float32(config or b"1")


def shout(s: Array) -> Array:
    return np.array([item.upper() for item in s.ravel()], object).reshape(s.shape)


def bad(x: Array) -> Array:
    raise ValueError("it broke")


def spec(name: str, dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


EIGHTS = [name for name in sorted(dir(ml_dtypes)) if name.startswith("float8_")]
MODELS = {
    "stats": FunctionServable(
        stats, [spec("x", "float32", -1, 3)], [spec("mean", "float32", -1), spec("std", "float32", -1)]
    ),
    "sum": FunctionServable(
        lambda a, b: a - b, [spec("a", "float32", -1), spec("b", "float32", -1)], [spec("y", "float32", -1)]
    ),
    "shout": FunctionServable(shout, [spec("s", "string", -1)], [spec("t", "string", -1)]),
    "none": FunctionServable(lambda: np.int64(7), [], [Y]),
    "bad": FunctionServable(bad, [spec("x", "float32")], [spec("y", "float32")]),
    **{
        name: FunctionServable(lambda x: x, [spec("x", name, -1)], [spec("y", name, -1)])
        for name in ("bool", "bfloat16", *EIGHTS)
    },
}
ROWS = np.float32([[1, 2, 3], [4, 4, 4]])
STATS = ["mean: float32 [2]", "[2. 4.]", "std: float32 [2]", "[0.8164966 0.       ]"]
TOOK = re.compile(r"took \d+\.\d ms, after \d+\.\d ms to connect and learn the signature")


@pytest.fixture(scope="module")
def models() -> Iterator[str]:
    with server_ref.running(MODELS) as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `x.npy` in it."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", ROWS)
    return tmp_path


def test_call_prints_the_outputs_of_a_served_model_and_on_stderr_how_long_it_took(models: str, folder: Path) -> None:
    done = run("call", f"{models}stats", "--input", "x=x.npy", cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout.splitlines()) == (0, STATS)
    assert TOOK.fullmatch(done.stderr.rstrip("\n"))


@pytest.mark.parametrize("value", ["x.npy", "x=x.npy", "[[1, 2, 3], [4, 4, 4]]", "x=[[1,2,3.0],[4,4,4]]"])
def test_an_input_is_a_file_or_json_with_or_without_a_name(
    value: str, models: str, folder: Path, capsys: Printed
) -> None:
    assert main(["call", f"{models}stats", "-i", value]) == 0
    assert capsys.readouterr().out.splitlines() == STATS


@pytest.mark.parametrize("flags", [["-i", "[5]", "-i", "[2]"], ["-i", "b=[2]", "-i", "a=[5]"]])
def test_inputs_go_by_name_or_in_order(flags: list[str], models: str, capsys: Printed) -> None:
    assert main(["call", f"{models}sum", *flags]) == 0
    assert capsys.readouterr().out.splitlines() == ["y: float32 [1]", "[3.]"]


def test_a_model_without_inputs_is_called_without(models: str, capsys: Printed) -> None:
    assert main(["call", f"{models}none"]) == 0
    assert capsys.readouterr().out.splitlines() == ["y: int64 []", "7"]


def test_only_outputs_asked_for_are_printed_in_that_order(models: str, folder: Path, capsys: Printed) -> None:
    assert main(["call", f"{models}stats", "-i", "x.npy", "-o", "std", "-o", "mean"]) == 0
    assert capsys.readouterr().out.splitlines() == STATS[2:] + STATS[:2]


def test_config_is_text_or_a_file(models: str, folder: Path, capsys: Printed) -> None:
    (folder / "two").write_bytes(b"2")
    for config in ("2", "@two"):
        assert main(["call", f"{models}stats", "-i", "x.npy", "-o", "std", "--config", config]) == 0
        assert "[1.6329932 0.       ]" in capsys.readouterr().out
    assert main(["call", f"{models}stats", "-i", "x.npy", "--config", "@three"]) == 2
    assert "cannot read 'three' (No such file or directory) - at --config" in capsys.readouterr().err


def test_large_outputs_and_long_strings_are_printed_in_short(models: str, folder: Path, capsys: Printed) -> None:
    np.save("many.npy", np.ones((5000, 3), np.float32))
    assert main(["call", f"{models}stats", "-i", "many.npy", "-o", "mean"]) == 0
    assert capsys.readouterr().out == "mean: float32 [5000]\n[1. 1. 1. ... 1. 1. 1.]\n"
    assert main(["call", f"{models}shout", "-i", json.dumps(["a" * 5000, "b"])]) == 0
    assert capsys.readouterr().out == "t: string [2]\n[b'" + "A" * 60 + "'... (5,000 bytes)\n b'B']\n"


def test_outputs_are_saved_where_asked(models: str, folder: Path, capsys: Printed) -> None:
    assert main(["call", f"{models}stats", "-i", "x.npy", "-o", "mean=m.npy", "-o", "std"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == STATS[2:]
    assert printed.err.splitlines()[0] == "mean: float32 [2] -> m.npy"
    assert TOOK.fullmatch(printed.err.splitlines()[-1])
    saved = np.load("m.npy")
    assert (saved.dtype, saved.tolist()) == (np.float32, [2, 4])


def test_arrays_go_through_pipes(models: str, folder: Path) -> None:
    command = [sys.executable, "-m", "remote_ops", "call", f"{models}stats", "-i", "x=-", "-o", "mean=-"]
    done = subprocess.run(command, input=(folder / "x.npy").read_bytes(), capture_output=True, cwd=ROOT)
    assert done.returncode == 0
    assert np.load(io.BytesIO(done.stdout)).tolist() == [2, 4]
    assert done.stderr.decode().splitlines()[0] == "mean: float32 [2] -> stdout"


@pytest.mark.parametrize("array", [ROWS.astype(">f4"), np.asfortranarray(ROWS)], ids=["big-endian", "column-major"])
def test_files_of_any_byte_order_and_layout_are_read(array: Array, models: str, folder: Path, capsys: Printed) -> None:
    np.save("other.npy", array)
    assert main(["call", f"{models}stats", "-i", "other.npy"]) == 0
    assert capsys.readouterr().out.splitlines() == STATS


@pytest.mark.parametrize("dtype", ["S", "U"])
def test_strings_are_read_and_saved(dtype: str, models: str, folder: Path) -> None:
    np.save("s.npy", np.array(["ab", "c", ""], dtype))
    assert main(["call", f"{models}shout", "-i", "s.npy", "-o", "t=t.npy"]) == 0
    assert np.load("t.npy").tolist() == [b"AB", b"C", b""]
    assert main(["call", f"{models}shout", "-i", '["h\u00e9"]', "-o", "t=t.npy"]) == 0
    assert np.load("t.npy").tolist() == ["H\u00e9".encode()]


def test_a_string_that_a_file_does_not_keep_is_not_saved(models: str, folder: Path, capsys: Printed) -> None:
    assert main(["call", f"{models}shout", "-i", '["a\\u0000"]', "-o", "t=t.npy"]) == 2
    assert "a string ends in a zero byte" in capsys.readouterr().err
    assert not Path("t.npy").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", *EIGHTS])
def test_files_without_the_dtype_have_that_of_the_signature(
    dtype: str, models: str, folder: Path, capsys: Printed
) -> None:
    array = np.array([0.5, 1, 2], getattr(ml_dtypes, dtype))
    np.save("x.npy", array)
    for _ in range(2):  # what was saved is an input too
        assert main(["call", f"{models}{dtype}", "-i", "x.npy", "-o", "y=y.npy"]) == 0
        assert capsys.readouterr().err.splitlines()[0] == f"y: {dtype} [3] -> y.npy, as float32"
        saved = np.load("y.npy")
        assert (saved.dtype, saved.tolist()) == (np.float32, [0.5, 1, 2])
        Path("y.npy").rename("x.npy")


def test_bits_are_no_other_dtype_than_they_can_be(models: str, folder: Path, capsys: Printed) -> None:
    np.save("bits.npy", np.zeros(2, ml_dtypes.bfloat16))
    for model in ("float8_e5m2", "bool"):
        assert main(["call", f"{models}{model}", "-i", "bits.npy"]) == 2
        assert f"input 'x': expected {model} [-1], got void16 [2]" in capsys.readouterr().err


def test_bools_are_saved_as_they_are(models: str, folder: Path) -> None:
    assert main(["call", f"{models}bool", "-i", "[true, false]", "-o", "y=y.npy"]) == 0
    saved = np.load("y.npy")
    assert (saved.dtype, saved.tolist()) == (np.bool_, [True, False])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-i", "pixels=x.npy"], "SignatureError: no input 'pixels': expected x - at"),
        (["-i", "xx=x.npy"], "expected x; did you mean 'x'?"),
        (["-i", "x=wide.npy"], "SignatureError: input 'x': expected float32 [-1, 3], got float64 [2, 3] - at"),
        (["-i", "[[1, 2]]"], "SignatureError: input 'x': expected float32 [-1, 3], got float32 [1, 2] - at"),
        (["-i", '"abc"'], "SignatureError: input 'x': expected float32 [-1, 3], got str"),
        (["-i", "[[1, 2, 3], [4]]"], "SignatureError: input 'x': expected float32 [-1, 3], got a list"),
        (["-i", "x.npy", "-i", "x.npy"], "SignatureError: expected 1 inputs (x), got 2 - at"),
        ([], "SignatureError: missing input 'x' (float32 [-1, 3]) - at"),
        (["-i", "x.npy", "-o", "men"], "SignatureError: no output 'men': expected one of mean, std; did you mean"),
        (["-i", "x.npy", "-o", "std", "-o", "std"], "SignatureError: an output is asked for twice: std, std"),
    ],
)
def test_what_does_not_fit_the_model_exits_with_2(
    flags: list[str], said: str, models: str, folder: Path, capsys: Printed
) -> None:
    np.save("wide.npy", np.ones((2, 3)))
    assert main(["call", f"{models}stats", *flags]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-i", "x=nope.npy"], "cannot read 'nope.npy' (No such file or directory) - at --input x"),
        (["-i", "hello"], "cannot read 'hello' (No such file or directory); expected a .npy file, or JSON, where a te"),
        (["-i", "x=."], "cannot read '.' (Is a directory)"),
        (["-i", "x=objects.npy"], "it holds Python objects, which are not read: save strings with np.save(file, arr"),
        (["-i", "x=all.npz"], "it is an .npz archive: save each array to a file of its own"),
        (["-i", "x=empty.npy"], "expected a .npy file: "),
        (["-i", "x=notes.npy"], "expected a .npy file: "),
        (["-i", "x=[[1, 2"], "this is no JSON: "),
        (["-i", "x=" + "[" * 100_000], "this is no JSON: "),
        (["-i", 'x={"a": 1}'], "expected JSON of numbers, true and false, texts, and lists of them - at --input x"),
        (["-i", "x=[1, null]"], "expected JSON of numbers, true and false, texts, and lists of them - at --input x"),
        (["-i", ""], "expected NAME=VALUE, or VALUE, got ''"),
        (["-i", "x="], "expected NAME=VALUE, or VALUE, got 'x='"),
        (["-i", "=x.npy"], "expected NAME=VALUE, or VALUE, got '=x.npy'"),
        (["-i", "a=1", "-i", "2"], "expected all inputs with a name, as in x=arr.npy, or none: got both"),
        (["-i", "a=1", "-i", "a=1"], "an input is given twice: a, a"),
        (["-i", "-", "-i", "x=-"], "stdin holds one array: got '-' twice"),
        (["-o", "y="], "expected NAME, NAME=FILE or NAME=-, got 'y='"),
        (["-o", "=y.npy"], "expected NAME, NAME=FILE or NAME=-, got '=y.npy'"),
        (
            ["-o", "y=nodir/y.npy"],
            "cannot write 'nodir/y.npy': expected a file in a folder that exists - at --output y",
        ),
        (["-o", "y=."], "cannot write '.': expected a file"),
        (["-o", "a=y.npy", "-o", "b=y.npy"], "two outputs for one file: y.npy, y.npy"),
        (["-o", "a=-", "-o", "b"], "'-' takes all of stdout: save the other outputs to files too"),
    ],
)
def test_words_that_mean_nothing_exit_with_2_before_anything_is_sent(
    flags: list[str], said: str, folder: Path, capsys: Printed
) -> None:
    np.save("objects.npy", np.array([b"a", b"bc"], object), allow_pickle=True)
    np.savez("all.npz", a=ROWS)
    Path("empty.npy").touch()
    Path("notes.npy").write_text("not an array")
    assert main(["call", "http://127.0.0.1:1/m", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("SpecError: ")
    assert said in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_terminals_are_no_place_for_arrays(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for flags, said in ((["-i", "-"], "'-' reads a .npy file from stdin"), (["-o", "y=-"], "'-' writes a .npy file")):
        assert main(["call", "http://127.0.0.1:1/m", *flags]) == 2
        assert said in capsys.readouterr().err


def test_a_file_cut_or_changed_anywhere_is_an_array_or_a_spec_error() -> None:
    file = io.BytesIO()
    np.save(file, ROWS)
    data = file.getvalue()
    for size in range(len(data)):
        with pytest.raises(SpecError):
            npy.parse(data[:size], at="x")
    for place in range(128):
        for byte in (b"\0", b"'", b"9", b"\xff"):
            with contextlib.suppress(SpecError):
                npy.parse(data[:place] + byte + data[place + 1 :], at="x")


def test_a_model_that_raises_exits_with_1(models: str, capsys: Printed) -> None:
    assert main(["call", f"{models}bad", "-i", "1"]) == 1
    assert capsys.readouterr().err.startswith("InternalError: the model raised ValueError: it broke - from http://")


def test_a_model_that_is_not_there_exits_with_1(models: str, capsys: Printed) -> None:
    assert main(["call", f"{models}stat", "-i", "1"]) == 1
    assert capsys.readouterr().err.startswith("ModelNotFound: no model '/stat'")


def failing_at_first(times: int, status: str = "503 X") -> tuple[Script, list[Message]]:
    """A model that is not ready for the first few calls, and the calls that it got."""
    calls: list[Message] = []

    def answer(conversation: Conversation, request: Message) -> None:
        calls.append(request)
        if len(calls) <= times:
            conversation.answer(b"", status)
        else:
            conversation.answer(b"".join(graphpipe.encode_response([np.int64(7)])))

    return serving(Signature((), (Y,)), answer), calls


@pytest.mark.parametrize(("flags", "sent"), [([], 3), (["--retries", "0"], 1), (["--retries", "1"], 2)])
def test_calls_are_tried_again_as_often_as_said(flags: list[str], sent: int) -> None:
    script, calls = failing_at_first(9)
    with peer(script) as there:
        assert main(["call", there.url, *flags]) == 1
    assert len(calls) == sent


def test_the_timeout_is_for_signature_and_call_together(capsys: Printed) -> None:
    def late(conversation: Conversation) -> None:
        while (message := conversation.read()) is not None:
            time.sleep(0.3)  # what is tested is time
            known = message.body == graphpipe.METADATA_REQUEST
            conversation.answer(graphpipe.encode_metadata(Signature((), (Y,))) if known else b"")

    with peer(late) as there:
        assert main(["call", there.url, "--timeout-s", "0.5"]) == 1
    assert "DeadlineExceeded: no answer from" in capsys.readouterr().err


def test_models_of_the_open_inference_protocol_are_called_and_pinged(folder: Path, capsys: Printed) -> None:
    with peer(Model(sides("FP32"), echo())) as there:
        url = there.url.removesuffix("/m") + "/v2/models/m"
        assert main(["call", url, "-i", "x=[[1, 2]]"]) == 0
        assert main(["ping", url, "-c", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["y: float32 [1, 2]", "[[1. 2.]]"]
    assert lines[2].startswith(f"up     {url}  m 1  ")


# --------------------------------------------------------------------------- ping


def masked(text: str) -> str:
    """Without the times that a run took."""
    return re.sub(r"\d+\.\d(?= ms| median| max)", "_", text)


def test_ping_prints_a_line_for_each_url_in_their_order(models: str) -> None:
    urls = [f"{models}stats", "http://127.0.0.1:1/m", f"{models}stat"]
    done = run("ping", *urls)
    up, refused, none = masked(done.stdout).splitlines()
    times = "first _ ms with connecting, then min _ median _ max _ ms"
    assert up == f"up     {urls[0]}  stats  {times}"
    assert refused.startswith(f"down   {urls[1]}  ConnectError: cannot connect to 127.0.0.1:1 (Connection refused)")
    assert none.startswith(f"down   {urls[2]}  ModelNotFound: no model '/stat'")
    assert (done.returncode, done.stderr) == (1, "")


def test_ping_exits_with_0_if_all_answered(models: str, capsys: Printed) -> None:
    assert main(["ping", f"{models}stats", f"{models}sum", "--count", "2", "--interval-s", "0"]) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()] == ["up", "up"]


def test_ping_of_one_request_says_that_it_includes_connecting(models: str, capsys: Printed) -> None:
    assert main(["ping", f"{models}stats", "--count", "1"]) == 0
    assert masked(capsys.readouterr().out) == f"up     {models}stats  stats  _ ms with connecting\n"


def test_ping_asks_each_time_over_one_connection() -> None:
    asked: list[Message] = []

    def script(conversation: Conversation) -> None:
        while (message := conversation.read()) is not None:
            asked.append(message)
            conversation.answer(graphpipe.encode_metadata(Signature((), (Y,))))

    with peer(script) as there:
        assert main(["ping", there.url, "--count", "5", "--interval-s", "0"]) == 0
        assert (len(asked), there.connections) == (5, 1)


def test_ping_does_not_try_again() -> None:
    asked: list[Message] = []

    def script(conversation: Conversation) -> None:
        while (message := conversation.read()) is not None:
            asked.append(message)
            conversation.answer(b"", "503 X")

    with peer(script) as there:
        assert main(["ping", there.url, "--count", "2", "--interval-s", "0"]) == 1
    assert len(asked) == 2


def test_ping_tells_of_a_url_that_answers_only_sometimes(capsys: Printed) -> None:
    turns = iter(["200 OK", "503 X", "200 OK"])

    def script(conversation: Conversation) -> None:
        while conversation.read() is not None:
            conversation.answer(graphpipe.encode_metadata(Signature((), (Y,), name="m")), next(turns))

    with peer(script) as there:
        assert main(["ping", there.url, "--interval-s", "0"]) == 1
    start = f"flaky  {there.url}  m  first _ ms with connecting, then min _ median _ max _ ms  1 of 3 failed  "
    assert masked(capsys.readouterr().out).startswith(start)


def test_urls_that_do_not_answer_cost_one_timeout_in_all(capsys: Printed) -> None:
    with unreachable() as one, unreachable() as other:
        since = time.monotonic()
        assert main(["ping", one, other, one, "--timeout-s", "0.5", "--count", "9"]) == 1
        assert time.monotonic() - since < 1.4  # one after the other they would take 1.5 s
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3
    assert all("DeadlineExceeded: no answer from" in row for row in rows)


def test_ping_sends_nothing_if_one_url_is_none(capsys: Printed) -> None:
    with peer(describing(Signature((), (Y,)))) as there:
        assert main(["ping", there.url, "nowhere"]) == 2
        assert there.connections == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("SpecError: no URL of a model")
    assert printed.out == ""


# --------------------------------------------------------------------------- flags, signals and pipes


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["ping", "http://h/", "--count", "0"], "expected a whole number, 1 or more, got '0'"),
        (["ping", "http://h/", "--interval-s", "-1"], "expected a number of seconds, 0 to 1,000,000, got '-1'"),
        (["ping", "http://h/", "--interval-s", "1e300"], "expected a number of seconds"),
        (["ping", "http://h/", "--timeout-s", "nan"], "expected a number of seconds"),
        (["call", "http://h/", "--retries", "-1"], "expected a whole number, 0 or more, got '-1'"),
        (["call", "http://h/", "--retries", "x"], "expected a whole number, 0 or more, got 'x'"),
        (["call"], "required: URL"),
        (["ping"], "required: URL"),
        (["pong", "http://h/"], "invalid choice: 'pong'"),
    ],
)
def test_flags_that_are_none_exit_with_2(args: list[str], said: str, capsys: Printed) -> None:
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["metadata", "call", "ping"])
def test_help_shows_an_example_that_is_one(command: str, capsys: Printed) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    examples = re.findall(rf"remote-ops ({command} http[^|\n]*)", capsys.readouterr().out)
    assert examples
    for example in examples:
        _parser().parse_args(shlex.split(example))


@pytest.mark.parametrize("command", ["metadata", "call", "ping"])
def test_ctrl_c_exits_with_130_and_says_nothing(command: str) -> None:
    asked = threading.Event()

    def hang(conversation: Conversation) -> None:
        conversation.read()
        asked.set()
        conversation.read()

    with peer(hang) as there:
        process = subprocess.Popen(
            [sys.executable, "-m", "remote_ops", command, there.url, "--timeout-s", "60"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with process:
            assert asked.wait(30)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


@pytest.mark.parametrize(
    "args", [["metadata", "{}stats"], ["ping", "{}stats"], ["call", "{}stats", "-i", "[[1,2,3]]"], ["call", "--help"]]
)
def test_a_reader_that_is_gone_gives_no_traceback(args: list[str], models: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "remote_ops", *[arg.format(models) for arg in args]],
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert done.returncode in ((0, 141) if "--help" in args else (141,))  # argparse passes over it if it can
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_line(models: str, capsys: Printed) -> None:
    assert main(["call", f"{models}stats", "-i", "[[1,2,3]]", "-o", "mean=/dev/full"]) == 1
    assert capsys.readouterr().err.endswith("OSError: [Errno 28] No space left on device\n")


# --------------------------------------------------------------------------- docs/cli.md


@pytest.fixture
def shell(folder: Path) -> dict[str, str]:
    """An environment in which `remote-ops` and `python` are those of this checkout."""
    for name, words in (("python", ""), ("remote-ops", "-m remote_ops")):
        command = folder / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} {words} "$@"\n')
        command.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def test_the_page_shows_what_the_commands_print(shell: dict[str, str]) -> None:
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    scope: dict[str, Any] = {}
    exec("".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), scope)
    shown = re.findall(r"^\$ (.*)\n((?:(?!\$ |```).*\n)*)", page, re.MULTILINE)
    assert len(shown) > 5
    with server_ref.running({"stats": scope["model"]}) as url:
        for command, expected in shown:
            words = command.replace("http://127.0.0.1:9000/", url)
            done = subprocess.run(
                words, shell=True, env=shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert masked(done.stdout).replace(url, "http://127.0.0.1:9000/") == masked(expected), command


def test_the_page_names_every_flag_and_every_default() -> None:
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    (commands,) = (action.choices for action in _parser()._actions if isinstance(action.choices, dict))
    real = {flag for one in commands.values() for action in one._actions for flag in action.option_strings}
    rows = [row.split(" | ") for row in re.findall(r"^\| `-(.*) \|$", page, re.MULTILINE)]
    documented = {flag for row in rows for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", "-" + row[0])}
    assert documented == real - {"-h", "--help"}
    told = {row[0].split()[0].strip("`-,"): row[-1] for row in rows}
    for command, name in (("call", "retries"), ("ping", "count"), ("ping", "interval_s")):
        assert told[name.replace("_", "-")] == str(commands[command].get_default(name))
    timeouts = {name: f"{one.get_default('timeout_s'):g}" for name, one in commands.items()}
    assert told["timeout-s"] == f"{timeouts['metadata']}, call {timeouts['call']}, ping {timeouts['ping']}"
