"""What README.md says of graphs is so: its graph runs, faults read as shown, and importing loads nothing heavy."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ensemble
import server_ref
from remote_ops import FunctionServable, NodeError, TensorSpec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
W = np.eye(4, 2, dtype=np.float32)


def first_graph() -> str:
    found = re.search(r"^```yaml fraud.yaml\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def save_onnx(path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 4])
    y = onnx.helper.make_tensor_value_info("probs", onnx.TensorProto.FLOAT, ["N", 2])
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["z"]),
        onnx.helper.make_node("Softmax", ["z"], ["probs"], axis=1),
    ]
    graph = onnx.helper.make_graph(nodes, "blue", [x], [y], [onnx.numpy_helper.from_array(W, "w")])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


def save_torch(path: Path) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Softmax(1))
    rows = ({0: torch.export.Dim("rows")},)
    torch.export.save(torch.export.export(net, (torch.ones(2, 4),), dynamic_shapes=rows), path)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The models of the first graph, one of them served, and the graph with its URL."""
    pytest.importorskip("onnxruntime")
    save_onnx(tmp_path / "blue.onnx")
    save_torch(tmp_path / "coral.pt2")
    x, logits = TensorSpec("x", "float32", (-1, 4)), TensorSpec("logits", "float32", (-1, 2))
    with server_ref.running({"amber": FunctionServable(lambda x: x @ W, [x], [logits])}) as url:
        (tmp_path / "fraud.yaml").write_text(first_graph().replace("http://127.0.0.1:9000/", url), "utf-8")
        yield tmp_path


def test_first_graph_of_the_readme_votes(folder: Path) -> None:
    payments = np.array([[9, 0, 1, 1], [0, 9, 1, 1]], np.float32)
    with ensemble.load(folder / "fraud.yaml") as fraud:
        answer = fraud.infer({"payment": payments})
    assert answer["label"].tolist() == [0, 1]
    assert answer["proba"].shape == (2, 2)


def test_fault_of_the_readme_reads_as_shown(folder: Path) -> None:
    graph = folder / "fraud.yaml"
    graph.write_text(graph.read_text("utf-8").replace("blue.probs", "bleu.probs"), "utf-8")
    with pytest.raises(ensemble.GraphFaults) as caught:
        ensemble.load(graph)
    assert f"| `GraphFaults: {str(caught.value).replace(str(graph), 'fraud.yaml')}` |" in README


def test_failure_of_the_readme_reads_as_shown() -> None:
    text = """
ensemble: 1
metadata: warn
inputs: {x: {dtype: float32, shape: [N]}}
outputs: {y: amber}
nodes:
  amber:
    {kind: remote, url: 'http://127.0.0.1:1/', inputs: {x: $inputs.x}, outputs: {y: {dtype: float32, shape: [N]}}}
"""
    with ensemble.load(text, file="fraud.yaml") as fraud, pytest.raises(NodeError) as caught:
        fraud(np.ones(1, np.float32))
    assert f"| `NodeError: {str(caught.value).replace('127.0.0.1:1', '127.0.0.1:9000')}` |" in README


HEAVY = ("numpy", "yaml", "pydantic", "networkx", "torch", "tensorflow", "onnxruntime", "ray", "PIL", "tokenizers")


def loaded_by(code: str) -> list[str]:
    shown = f"{code}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, timeout=60, check=True)
    found: list[str] = eval(done.stdout)
    return found


def test_importing_ensemble_imports_nothing_heavy() -> None:
    assert loaded_by("import remote_ops.errors") == loaded_by("import remote_ops.errors, ensemble, ensemble.__main__")


def test_loading_a_graph_imports_no_framework() -> None:
    assert set(loaded_by("import ensemble\nensemble.load")) <= {"numpy", "yaml", "pydantic", "networkx"}
    assert set(loaded_by("import ensemble.ready.image, ensemble.ready.tokens, ensemble.ready.labels")) <= {"numpy"}
