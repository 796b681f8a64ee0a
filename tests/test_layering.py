"""Imports point one way: every module of the three packages is read, none is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first: a package imports itself and the packages before it.
PACKAGES = ("remote_ops", "ensemble", "server_ref")

# Rooms of a package, lowest first: a room imports from the lines before it, never from its own line.
ROOMS = {
    "remote_ops": (
        ("errors",),
        ("signature", "deadline", "buffers", "environment"),
        ("graphpipe", "oip", "http1", "shm", "policy", "download", "headers", "url"),
        ("addresses",),
        ("connection", "replicas"),
        ("transport", "background"),
        ("replies",),
        ("wire",),
        ("telemetry",),
        ("sendings",),
        ("client",),
        ("servable",),
        ("torch", "tf", "onnx"),
        ("cli",),
        ("__init__",),
        ("__main__",),
    ),
    "ensemble": (
        ("faults", "forms", "steps", "breaker", "door", "slots", "ready"),
        ("document", "wording", "agreement", "rows", "predicate", "trace", "nodes.node", "nodes.function"),
        ("plan", "assembly", "batches", "levels", "metadata", "nodes.controller", "nodes.model"),
        ("application", "values", "nodes.file"),
        ("scalars", "axes", "moves"),
        ("operations",),
        ("combinations", "route", "scope", "gradients", "answers"),
        tuple(f"nodes.{kind}" for kind in ("remote", "onnx", "torch", "tf", "python", "graph")),
        tuple(f"nodes.{kind}" for kind in ("combine", "switch", "split", "map", "cascade", "fallback")),
        ("spec",),
        ("layout",),
        ("graph",),
        ("run", "serial"),
        ("engine",),
        ("ensemble",),
        ("check", "feeds", "outlets", "runs", "latency", "layers"),
        ("diagram",),
        ("mermaid", "svg"),
        ("plot",),
        ("__init__",),
        ("__main__",),
    ),
    "server_ref": (
        ("access", "correlation", "devices", "graphs", "listen", "names", "tls"),
        ("mishaps",),
        ("aside", "answer", "batching", "isolation", "json_text", "settings", "sources", "stacking", "stats"),
        ("compression", "folder", "lanes", "origins", "routing", "rowstore", "rowvalues", "source"),
        ("rowdisk", "rowkeys"),
        ("cache", "instances", "journal"),
        ("model",),
        ("catalog", "connection", "opening"),
        ("repository",),
        ("exchange",),
        ("predict", "triton_json"),
        ("open_inference",),
        ("api", "front", "gate"),
        ("control", "metrics", "progress", "watch"),
        ("page", "tryit"),
        ("plane",),
        ("lifecycle",),
        ("batcher", "worker"),
        ("__init__",),
        ("__main__",),
    ),
}
RANK = {
    f"{package}.{room}": rank for package, lines in ROOMS.items() for rank, line in enumerate(lines) for room in line
}

# What is opened only when asked, inside a function: by `load`, what stands above it and what is slow to import.
LAZY = {
    "remote_ops.servable": {
        *("remote_ops.onnx", "remote_ops.torch", "remote_ops.tf", "remote_ops.download"),
        "ensemble",
    },
    "remote_ops.tf": {"remote_ops.torch"},  # RemoteLayer, on Keras' PyTorch backend
    "ensemble.nodes.graph": {"ensemble.ensemble"},  # a graph in a graph
}

# The files or folders that import each of these.
OWNERS = {
    "torch": ("remote_ops/torch/",),
    "safetensors": ("remote_ops/torch/",),
    "tensorflow": ("remote_ops/tf/",),
    "onnxruntime": ("remote_ops/onnx.py",),
    "opentelemetry": ("remote_ops/telemetry.py",),
    "networkx": ("ensemble/graph.py",),
    "lmdb": ("server_ref/rowdisk.py",),
    "yaml": ("ensemble/document.py",),
    **dict.fromkeys(
        ("pydantic", "pydantic_core"),
        (
            *("ensemble/nodes/", "ensemble/spec.py", "ensemble/wording.py"),
            *(f"ensemble/{room}.py" for room in ("application", "scalars", "axes", "moves", "operations")),
            *("server_ref/api.py", "server_ref/control.py", "server_ref/settings.py"),
        ),
    ),
    "PIL": ("ensemble/ready/image.py", "ensemble/feeds.py"),
    "tokenizers": ("ensemble/ready/tokens.py",),
    "prometheus_client": ("server_ref/metrics.py",),
    "pynvml": ("server_ref/devices.py",),
}

# Rooms without I/O; and without a clock: policy, and all that decides what a graph is and does.
IO = {"socket", "asyncio", "ssl", "selectors"}
CLOCKS = {"time", "threading"}
DECIDING = ROOMS["ensemble"][:12]
ACTING = {"breaker", "door", "slots", "batches", "metadata", "gradients"}  # of those, who waits or looks at a clock
PURE = {
    "remote_ops.graphpipe": IO,
    "remote_ops.oip": IO,
    "remote_ops.http1": IO,
    **dict.fromkeys(("server_ref.json_text", "server_ref.origins"), IO | CLOCKS),
    "remote_ops.policy": IO | {"time", "random"},
    **{f"ensemble.{room}": IO | CLOCKS for line in DECIDING for room in line if room not in ACTING},
    **dict.fromkeys(("server_ref.settings", "server_ref.routing"), IO | CLOCKS | {"random"}),
}


class Import(NamedTuple):
    """One imported name: dotted, with the line it stands on and whether that is inside a function."""

    name: str
    line: int
    lazy: bool


def imports_of(tree: ast.AST, package: str, *, lazy: bool = False) -> Iterator[Import]:
    """Every import below `tree`, relative ones resolved against the dotted `package`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            source = ".".join([*up, *([node.module] if node.module else [])])
            yield from (Import(f"{source}.{alias.name}", node.lineno, lazy) for alias in node.names)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(node, package, lazy=lazy or inside)


def room_of(name: str) -> str:
    """The room that a dotted name belongs to: `remote_ops.client` of `remote_ops.client.Endpoint`."""
    package, *parts = name.split(".")
    if package not in ROOMS:
        return package
    rooms = [".".join([package, *parts[:length]]) for length in (2, 1)]
    return next((room for room in rooms if room in RANK), f"{package}.__init__")


def fault_of(imported: Import, module: str, file: str) -> str | None:
    """What is wrong with one import of `module`, which stands in `file`; None if it points the right way."""
    package, target = module.partition(".")[0], imported.name.partition(".")[0]
    if target in OWNERS and not file.startswith(OWNERS[target]):
        return f"{target} is imported only in {' and '.join(OWNERS[target])}"
    here = room_of(module)
    if target in PURE.get(here, ()) or target in PURE.get(module, ()):
        return f"{module} is pure and may not import {target}"
    there = room_of(imported.name)
    if target not in PACKAGES or there == here or (imported.lazy and {there, target} & LAZY.get(here, set())):
        return None
    if PACKAGES.index(target) > PACKAGES.index(package):
        return f"{package} may not import {target}"
    if package == target and package in ROOMS and RANK[there] >= RANK[here]:
        return f"{here} may not import {there}"
    return None


def faults_in(file: str, source: str) -> Iterator[str]:
    """What is wrong with one module: each import that points the wrong way, or a room that nobody knows."""
    parts = file.removesuffix(".py").split("/")
    if not _has_room(parts):
        yield f"{file}:1: the layout has no room called '{'.'.join(parts[1:])}': give it a line in ROOMS"
        return
    for imported in imports_of(ast.parse(source, file), ".".join(parts[:-1])):
        if fault := fault_of(imported, ".".join(parts), file):
            yield f"{file}:{imported.line}: {fault}"


def _has_room(parts: list[str]) -> bool:
    if parts[0] not in ROOMS or parts[-1] == "__init__":
        return True
    return room_of(".".join(parts)) != f"{parts[0]}.__init__"


def faults(root: Path) -> list[str]:
    """What is wrong with every module of the three packages below `root`."""
    paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return [fault for path in paths for fault in faults_in(path.relative_to(root).as_posix(), path.read_text("utf-8"))]


def write(root: Path, file: str, source: str) -> None:
    """Put one module into a made-up source tree."""
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, "utf-8")


def test_imports_point_one_way() -> None:
    assert faults(ROOT) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_read(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("remote_ops/errors.py", "from .signature import Signature", "may not import remote_ops.signature"),
        ("remote_ops/signature.py", "import remote_ops.deadline", "may not import remote_ops.deadline"),
        ("remote_ops/http1.py", "from remote_ops import transport", "may not import remote_ops.transport"),
        ("remote_ops/transport.py", "from .client import Endpoint", "may not import remote_ops.client"),
        ("remote_ops/client.py", "from remote_ops import Endpoint", "may not import remote_ops.__init__"),
        ("remote_ops/client.py", "from . import Endpoint", "may not import remote_ops.__init__"),
        ("remote_ops/client.py", "def f():\n    from .torch import RemoteModule", "import remote_ops.torch"),
        ("remote_ops/client.py", "from remote_ops.cli import text", "may not import remote_ops.cli"),
        ("remote_ops/torch/graph.py", "from ..tf import remote_op", "may not import remote_ops.tf"),
        ("remote_ops/servable.py", "from .onnx import OnnxModel", "may not import remote_ops.onnx"),
        ("remote_ops/servable.py", "def f():\n    import server_ref", "may not import server_ref"),
        ("remote_ops/__main__.py", "import ensemble", "remote_ops may not import ensemble"),
        ("ensemble/engine.py", "from server_ref import batching", "ensemble may not import server_ref"),
        ("remote_ops/client.py", "if True:\n    import torch.nn as nn", "imported only in remote_ops/torch/"),
        ("server_ref/instances.py", "from torch import cuda", "imported only in remote_ops/torch/"),
        ("remote_ops/servable.py", "import safetensors.torch", "imported only in remote_ops/torch/"),
        ("remote_ops/torch/export.py", "import tensorflow as tf", "imported only in remote_ops/tf/"),
        ("ensemble/nodes/onnx.py", "import onnxruntime", "imported only in remote_ops/onnx.py"),
        ("ensemble/plot.py", "import networkx", "imported only in ensemble/graph.py"),
        ("server_ref/cache.py", "import lmdb", "imported only in server_ref/rowdisk.py"),
        ("remote_ops/policy.py", "from time import monotonic", "is pure and may not import time"),
        ("remote_ops/graphpipe.py", "import socket", "is pure and may not import socket"),
        ("remote_ops/oip.py", "import asyncio.streams", "is pure and may not import asyncio"),
        ("remote_ops/http1.py", "async def f():\n    import asyncio", "is pure and may not import asyncio"),
        ("ensemble/steps.py", "from ensemble.nodes.node import NodeSpec", "may not import ensemble.nodes.node"),
        ("ensemble/nodes/node.py", "from .remote import RemoteSpec", "may not import ensemble.nodes.remote"),
        ("ensemble/nodes/split.py", "from ensemble.nodes import map", "may not import ensemble.nodes.map"),
        ("ensemble/graph.py", "def f():\n    from .engine import Engine", "may not import ensemble.engine"),
        ("ensemble/engine.py", "import ensemble", "may not import ensemble.__init__"),
        ("ensemble/nodes/map.py", "import asyncio", "is pure and may not import asyncio"),
        ("ensemble/steps.py", "from time import monotonic", "is pure and may not import time"),
        ("server_ref/routing.py", "import random", "is pure and may not import random"),
        ("ensemble/spec.py", "import yaml", "imported only in ensemble/document.py"),
        ("ensemble/engine.py", "import pydantic", "imported only in ensemble/nodes/ and"),
        ("ensemble/nodes/loop.py", "", "no room called 'nodes.loop'"),
        ("remote_ops/utils.py", "", "no room called 'utils'"),
    ],
)
def test_an_import_that_points_the_wrong_way_is_caught(tmp_path: Path, file: str, source: str, fault: str) -> None:
    write(tmp_path, file, source)
    (found,) = faults(tmp_path)
    assert found.startswith(f"{file}:")
    assert fault in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("remote_ops/__init__.py", "from .client import Endpoint\nfrom . import errors"),
        ("remote_ops/client.py", "import time\nfrom remote_ops import errors, transport"),
        (
            "remote_ops/servable.py",
            "from .client import Endpoint\ndef f():\n    from .torch import TorchModel",
        ),
        ("remote_ops/torch/__init__.py", "import torch\nfrom .graph import op\nfrom ..servable import load"),
        ("remote_ops/torch/graph.py", "from . import model\nfrom .model import TorchModel"),
        ("remote_ops/deadline.py", "import time"),
        ("ensemble/graph.py", "import networkx\nfrom remote_ops.signature import Signature"),
        ("ensemble/nodes/graph.py", "from .node import Model\ndef f():\n    from ensemble.ensemble import load"),
        ("ensemble/ready/image.py", "from . import labels\nfrom PIL import Image"),
        ("ensemble/engine.py", "import time\nfrom ensemble.steps import Step"),
        ("server_ref/front.py", "import asyncio\nimport ensemble\nfrom remote_ops import http1, Servable"),
    ],
)
def test_an_import_that_points_the_right_way_is_left_alone(tmp_path: Path, file: str, source: str) -> None:
    write(tmp_path, file, source)
    assert faults(tmp_path) == []
