"""The command `remote-ops`: what it prints, and how it ends."""

from __future__ import annotations

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
from typing import Any

import pytest
from rawpeer import Conversation, Message, Script, peer, unreachable

import server_ref
from remote_ops import FunctionServable, Signature, TensorSpec, __version__, graphpipe
from remote_ops.__main__ import _parser, main

X, Y = TensorSpec("x", "bfloat16", (-1, 4)), TensorSpec("y", "int64", ())
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


@pytest.mark.parametrize("command", ["metadata", "ping"])
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
@pytest.mark.parametrize("command", ["metadata", "ping"])
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


MODELS = {name: FunctionServable(lambda x: 0, [X], [Y], name=name) for name in ("stats", "sum")}


@pytest.fixture(scope="module")
def models() -> Iterator[str]:
    with server_ref.running(MODELS) as url:
        yield url


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
        (["ping"], "required: URL"),
        (["pong", "http://h/"], "invalid choice: 'pong'"),
    ],
)
def test_flags_that_are_none_exit_with_2(args: list[str], said: str, capsys: Printed) -> None:
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["metadata", "ping"])
def test_help_shows_an_example_that_is_one(command: str, capsys: Printed) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    examples = re.findall(rf"remote-ops ({command} http[^|\n]*)", capsys.readouterr().out)
    assert examples
    for example in examples:
        _parser().parse_args(shlex.split(example))


@pytest.mark.parametrize("command", ["metadata", "ping"])
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


@pytest.mark.parametrize("args", [["metadata", "{}stats"], ["ping", "{}stats"], ["metadata", "--help"]])
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
