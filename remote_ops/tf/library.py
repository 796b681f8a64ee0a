"""Builds the kernel with g++ on first use, against the TensorFlow that is installed, and keeps it.

It loads nothing. The library is kept by the version of TensorFlow, its flags and the kernel's source; several
processes may ask at once: one builds, the others wait.

`python -m remote_ops.tf.build` builds it ahead of time and prints where it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from remote_ops.errors import RemoteOpsError

__all__ = ["BuildError", "CompilerMissing", "op_library"]

KERNEL = Path(__file__).parent / "kernel"
SOURCES = ("remote_op.cc", "http.cc", "url.cc")
HEADERS = ("budget.h", "graphpipe.h", "http.h", "replicas.h", "resolver.h", "url.h")


class BuildError(RemoteOpsError):
    """The kernel of the TensorFlow ops could not be built here."""


class CompilerMissing(BuildError):
    """There is no compiler to build it with; `fallback` can do without the kernel."""


def op_library() -> Path:
    """The path of the built kernel, for `tf.load_op_library`; builds it if this TensorFlow has none yet.

    It is kept in `$REMOTE_OPS_CACHE/ops`, else `~/.cache/remote-ops/ops`; `$CXX` names another compiler than g++.

    Raises:
        CompilerMissing: there is no compiler, and nobody has built it before.
        BuildError: the compiler failed; with what it said.

    Costs about ten seconds the first time, and the import of tensorflow.
    """
    command = _command()
    folder = _folder()
    path = folder / f"remote_op-{_key(command)}.so"
    if not path.exists():
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                _build(command, path)
    return path


def _command() -> list[str]:
    """The command without the compiler and the output: it is what the library depends on."""
    import tensorflow as tf

    compile_flags = tf.sysconfig.get_compile_flags()
    include = Path(tf.sysconfig.get_include())
    # As of a system: their warnings are not ours to mend.
    flags = [part for flag in compile_flags for part in (("-isystem", flag[2:]) if flag[:2] == "-I" else (flag,))]
    return [
        *("-O2", "-shared", "-fPIC", f'-DREMOTE_OPS_TF="{tf.__version__}"'),
        *flags,
        *("-isystem", str(include / "external" / "curl" / "include")),
        *(str(KERNEL / source) for source in SOURCES),
        *tf.sysconfig.get_link_flags(),
    ]


def _key(command: list[str]) -> str:
    digest = hashlib.sha256("\0".join(command).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((KERNEL / name).read_bytes())
    return digest.hexdigest()[:20]


def _folder() -> Path:
    given = os.environ.get("REMOTE_OPS_CACHE")
    folder = (Path(given) if given else Path.home() / ".cache" / "remote-ops") / "ops"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(wanted[0]) is None:
        raise CompilerMissing(
            f"the TensorFlow ops are built on first use, with a C++ compiler: expected '{wanted[0]}' on the PATH, got "
            "none; install g++ (apt-get install g++), name one with CXX=..., or bring a library that "
            "'python -m remote_ops.tf.build' built for the same TensorFlow, in $REMOTE_OPS_CACHE/ops"
        )
    return wanted


def _build(command: list[str], path: Path) -> None:
    compiler = _compiler()
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        done = subprocess.run([*compiler, *command, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode or not made.exists():
            raise BuildError(
                f"the kernel of the TensorFlow ops does not build: {shlex.join(compiler)} ended with "
                f"{done.returncode}:\n{done.stderr[-4000:]}"
            )
        made.replace(path)
