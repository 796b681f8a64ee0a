"""Ctrl-C while TensorFlow waits for a remote op, in processes of its own."""

from __future__ import annotations

import pytest
from tfpeer import python

pytest.importorskip("tensorflow")

FORMS = {
    "eager": "call(x)",
    "function": "function(x)",
    "dataset": "list(tf.data.Dataset.range(4).map(lambda n: call(x), num_parallel_calls=2))",
}

# A model that sends SIGINT to this process when it is first asked, and then takes its time.
PROGRAM = """
import os, signal, sys, threading, time
import tensorflow as tf
from remote_ops.tf import remote_op
import server_ref
from remote_ops import FunctionServable, TensorSpec

signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where a shell began this in the background
over, first, expected = threading.Event(), threading.Lock(), sys.argv[1]

def model(x):
    if first.acquire(blocking=False):  # the next would come while the server closes
        os.kill(os.getpid(), signal.SIGINT)
    over.wait(0.5 if expected == "answer" else 60)
    return x

def call(x):
    return remote_op(url, x, "x", "y", tf.float32, timeout_s=60.0)

served = FunctionServable(model, [TensorSpec("x", "float32", (-1,))], [TensorSpec("y", "float32", (-1,))])
with server_ref.running({"model": served}) as url:
    x = tf.ones(3)
    function = tf.function(call)
    function.get_concrete_function(x)
    SETUP
    since = time.monotonic()
    try:
        FORM
        print("answer")
    except BaseException as error:
        print("interrupted" if "KeyboardInterrupt" in repr(error) else repr(error))
    print("at once" if time.monotonic() - since < 20 else "late")
    over.set()
"""


def run(form: str, expected: str, setup: str = "pass") -> list[str]:
    done = python(PROGRAM.replace("FORM", FORMS[form]).replace("SETUP", setup), expected, timeout_s=110)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("\n")[:2]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_ctrl_c_ends_a_call_that_tensorflow_waits_for(form: str) -> None:
    assert run(form, "interrupted") == ["interrupted", "at once"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["eager", "function"])
def test_a_program_that_handles_sigint_itself_loses_no_call(form: str) -> None:
    assert run(form, "answer", "signal.signal(signal.SIGINT, lambda *a: None)") == ["answer", "at once"]


@pytest.mark.slow
def test_the_pipe_of_somebody_else_is_left_alone() -> None:
    setup = "r, w = os.pipe(); os.set_blocking(w, False); signal.set_wakeup_fd(w)"
    code = PROGRAM.replace("SETUP", setup).replace("FORM", FORMS["eager"])
    code = code.replace("os.kill(os.getpid(), signal.SIGINT)", "pass") + "assert signal.set_wakeup_fd(-1) == w\n"
    done = python(code, "answer", timeout_s=110)
    assert done.stdout.split("\n")[0] == "answer", done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]
