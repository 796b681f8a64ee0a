"""The command `remote-ops`: what it prints, and how it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

import server_ref
from remote_ops import FunctionServable, TensorSpec, __version__

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
