"""Edges between models of two frameworks: what does not fit is found without a run; what is cast on the way runs."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper
from plans import rows

import ensemble
import server_ref
from remote_ops import FunctionServable, TensorSpec

Array = npt.NDArray[Any]

MODELS = types.ModuleType("pairs_models")  # what `kind: python` nodes find there
sys.modules["pairs_models"] = MODELS
FORM = "{dtype: %s, shape: [3, 4]}"


class Counted:
    """A function that counts its calls."""

    def __init__(self, fn: Callable[[Array], Array]) -> None:
        self.fn = fn
        self.calls = 0

    def __call__(self, x: Array) -> Array:
        self.calls += 1
        return self.fn(x)

    def model(self, takes: str, gives: str) -> FunctionServable:
        return FunctionServable(lambda x: self(x), [TensorSpec("x", takes, (-1, 4))], [TensorSpec("y", gives, (-1, 4))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models lie: `double.onnx` of float32, and where `both` puts its own."""
    made = tmp_path_factory.mktemp("pairs")
    info = helper.make_tensor_value_info
    takes, gives = info("x", TensorProto.FLOAT, ["rows", 4]), info("y", TensorProto.FLOAT, ["rows", 4])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [takes], [gives])
    double = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(double, str(made / "double.onnx"))
    return made


@pytest.fixture(scope="module")
def both(folder: Path) -> None:
    """`wide.pt2`, float32 to float64, and `half`, a SavedModel of float32."""
    tf, torch = pytest.importorskip("tensorflow"), pytest.importorskip("torch")

    class Wide(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return x.double() + 1

    class Half(tf.Module):  # type: ignore[misc]
        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")])
        def half(self, x: Any) -> dict[str, Any]:
            return {"y": x / 2}

    torch.export.save(torch.export.export(Wide(), (torch.zeros(3, 4),)), folder / "wide.pt2")
    made = Half()
    tf.saved_model.save(made, str(folder / "half"), signatures={"half": made.half})


@pytest.fixture
def far() -> Iterator[tuple[str, Counted]]:
    """A model of float64 behind a server."""
    counted = Counted(lambda x: 3 * x)
    with server_ref.running({"m": counted.model("float64", "float64")}) as url:
        yield url, counted


@pytest.fixture
def root() -> Counted:
    """What every graph here begins with: if it was not called, nothing has run."""
    counted = Counted(lambda x: -x)
    MODELS.root = counted.model("float32", "float32")  # type: ignore[attr-defined]
    return counted


def load(folder: Path, first: str, second: str, edge: str = "a.y", gives: str = "float64") -> ensemble.Ensemble:
    """`root -> a -> b`, where a and b are as said, and `edge` is what b reads."""
    text = f"""ensemble: 1
inputs: {{x: {FORM % "float32"}}}
outputs: {{y: b.y}}
nodes:
  root: {{kind: python, call: 'pairs_models:root', inputs: {{x: $inputs.x}}}}
  a: {{{first}, inputs: {{x: root.y}}, outputs: {{y: {FORM % gives}}}}}
  b: {{{second}, inputs: {{x: {edge}}}}}
"""
    return ensemble.load(text, file=str(folder / "pair.yaml"))


def fault(load: Callable[[], ensemble.Ensemble]) -> str:
    with pytest.raises(ensemble.GraphFaults) as caught:
        load()
    (one,) = caught.value.faults
    return f"{one.code} {one.place.line} {one.text}"


ONNX, TORCH, TF = (
    "kind: onnx, path: double.onnx",
    "kind: torch, path: wide.pt2",
    "kind: tf, path: half, signature: half",
)


def test_onnx_float32_for_a_remote_float64_is_found_without_a_run_and_runs_when_cast(
    folder: Path, root: Counted, far: tuple[str, Counted]
) -> None:
    remote = f"kind: remote, url: '{far[0]}'"
    told = fault(lambda: load(folder, ONNX, remote, gives="float32"))
    assert re.match(r"E106 7 edge a.y -> b.x .*: expected float64 .* got float32 .*cast: float64", told), told
    assert root.calls == far[1].calls == 0
    with load(folder, ONNX, remote, "{from: a.y, cast: float64}", "float32") as graph:
        np.testing.assert_array_equal(graph(rows()), 3 * (-2 * rows()).astype(np.float64))
    assert root.calls == far[1].calls == 1


def test_torch_float64_for_tf_float32_is_found_without_a_run_and_runs_when_cast(
    folder: Path, both: None, root: Counted
) -> None:
    told = fault(lambda: load(folder, TORCH, TF))
    assert re.match(r"E106 7 edge a.y -> b.x .*: expected float32 .* got float64 .*cast: float32", told), told
    assert root.calls == 0
    with load(folder, TORCH, TF, "{from: a.y, cast: float32}") as graph:
        np.testing.assert_array_equal(graph(rows()), ((1 - rows().astype(np.float64)).astype(np.float32)) / 2)
    assert root.calls == 1


def test_python_float64_for_onnx_float32_is_found_without_a_run_and_runs_when_cast(folder: Path, root: Counted) -> None:
    wide = Counted(lambda x: x.astype(np.float64) / 3)
    MODELS.wide = wide.model("float32", "float64")  # type: ignore[attr-defined]
    python = "kind: python, call: 'pairs_models:wide'"
    told = fault(lambda: load(folder, python, ONNX))
    assert re.match(r"E106 7 edge a.y -> b.x .*: expected float32 .* got float64 .*cast: float32", told), told
    assert root.calls == wide.calls == 0
    with load(folder, python, ONNX, "{from: a.y, cast: float32}") as graph:
        np.testing.assert_array_equal(graph(rows()), 2 * (-rows().astype(np.float64) / 3).astype(np.float32))
    assert root.calls == wide.calls == 1


def test_bool_for_a_remote_is_found_without_a_run_and_runs_when_cast(
    folder: Path, root: Counted, far: tuple[str, Counted]
) -> None:
    mask = Counted(lambda x: x > 0)
    MODELS.mask = mask.model("float32", "bool")  # type: ignore[attr-defined]
    python, remote = "kind: python, call: 'pairs_models:mask'", f"kind: remote, url: '{far[0]}'"
    told = fault(lambda: load(folder, python, remote, gives="bool"))
    assert re.match(r"E108 7 edge a.y -> b.x .* got bool .* no form on the wire.* cast: float64", told), told
    assert root.calls == mask.calls == far[1].calls == 0
    with load(folder, python, remote, "{from: a.y, cast: float64}", "bool") as graph:
        np.testing.assert_array_equal(graph(rows()), 3.0 * (-rows() > 0))
