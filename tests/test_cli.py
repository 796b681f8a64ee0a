"""The command `remote-ops`: what it prints, and how it ends."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from rawpeer import Conversation, Script, peer, unreachable

import server_ref
from remote_ops import FunctionServable, Signature, TensorSpec, __version__, graphpipe
from remote_ops.__main__ import main

X, Y = TensorSpec("x", "bfloat16", (-1, 4)), TensorSpec("y", "int64", ())


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "remote_ops", *args], capture_output=True, text=True, check=False)


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
