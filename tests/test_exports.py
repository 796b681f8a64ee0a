"""The front doors: every exported name is there, public and explained, and importing one stays light."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOORS = ("remote_ops", "remote_ops.torch", "server_ref")
FACES = {
    *("Endpoint", "Servable", "FunctionServable", "Signature", "TensorSpec"),
    *("Deadline", "Retry", "TLS", "load"),
}
HEAVY = ("torch", "tensorflow", "onnxruntime", "requests", "uvloop", "tqdm", "flatbuffers")


def exports_of(door: str) -> list[str]:
    """The names in `__all__` of a package."""
    names: list[str] = importlib.import_module(door).__all__
    return names


def is_explained(thing: object, name: str) -> bool:
    """Whether a docstring of its own says what a name is: not inherited, not written by `dataclass`."""
    doc = getattr(thing, "__doc__", None) or ""
    return bool(doc.strip()) and not doc.startswith(f"{name}(")


@pytest.mark.parametrize("door", DOORS)
def test_every_exported_name_exists(door: str) -> None:
    module = importlib.import_module(door)
    assert exports_of(door), f"{door} exports nothing"
    assert [name for name in exports_of(door) if not hasattr(module, name)] == []


@pytest.mark.parametrize("door", DOORS)
def test_exported_names_are_public_and_named_once(door: str) -> None:
    names = exports_of(door)
    assert [name for name in names if name.startswith("_") and name != "__version__"] == []
    assert len(names) == len(set(names))


@pytest.mark.parametrize("door", DOORS)
def test_every_exported_name_has_a_docstring(door: str) -> None:
    module = importlib.import_module(door)
    names = [name for name in exports_of(door) if name != "__version__"]
    assert [name for name in names if not is_explained(getattr(module, name), name)] == []


def test_remote_ops_exports_its_faces_and_every_error() -> None:
    errors = importlib.import_module("remote_ops.errors")
    own = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    raised = {kind.__name__ for kind in own if issubclass(kind, Exception)}
    assert raised
    assert (FACES | raised) - set(exports_of("remote_ops")) == set()


def test_importing_remote_ops_imports_nothing_heavy() -> None:
    code = f"import remote_ops, sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", ["remote_ops", "ensemble", "server_ref"])
def test_every_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
