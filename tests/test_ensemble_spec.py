"""`ensemble.spec` and `ensemble.document`: what may be written, where it stands, and what is kept of a bad document."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ensemble.document import read_yaml
from ensemble.faults import GraphFaults
from ensemble.nodes.onnx import OnnxSpec
from ensemble.nodes.python import PythonSpec
from ensemble.nodes.remote import RemoteSpec
from ensemble.spec import json_schema, parse, read, schema_text
from remote_ops.errors import SpecError

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "ensemble" / "schema.json"

VALID = """\
ensemble: 1                     # schema version
name: tumour
inputs:
  image: {dtype: uint8,   shape: [N, 224, 224, 3]}
  prior: {dtype: float32, shape: [N, 4], optional: true, default: 0.25}
outputs: {label: b.label, proba: {from: a.logits, apply: softmax}}
deadline: 400ms
admission: {max_inflight: 64, max_queued: 128, max_bytes: 2GiB}
nodes:
  pre:  {kind: python, call: shop.pre:normalise, inputs: {x: $inputs.image},
         outputs: {t: {dtype: float32, shape: [N, 3, 224, 224]}}, run_in: thread}
  a:    {kind: remote, url: http://gp-a:9000, inputs: {input: pre.t}, outputs: {logits: scores},
         timeout: 150ms, retry: {attempts: 2, when: [connect, 503]}, hedge: {after: p95, budget: 5%}}
  b:    {kind: onnx,  path: b.onnx, providers: [cuda, cpu], inputs: {data: pre.t},
         batching: {max_size: 32, max_delay: 2ms}}
  c:    {kind: torch, path: c.pt2, inputs: [pre.t], outputs: {probs: {dtype: float32, shape: [N, 4]}}}
  d:    {kind: tf,    path: saved/d, signature: serving_default, inputs: {images: pre.t}}
  e:    {kind: graph, ref: e.yaml}
  f:    {kind: remote, url: "gp://det:9000/face", breaker: {failures: 5, reset: 10s}, on_error: {default: 0.5}}
"""
SMALL = "ensemble: 1\noutputs: {y: a.y}\nnodes:\n  a: {kind: onnx, path: a.onnx}\n"


def only_fault(text: str) -> str:
    """The one fault of a document."""
    (fault,) = parse(text, "g.yaml")[1].all
    return str(fault)


# --------------------------------------------------------------------------- what may be written


def test_a_valid_document_is_read_into_frozen_specs() -> None:
    document = read(VALID, "tumour.yaml")
    assert document.deadline == pytest.approx(0.4)
    assert document.admission is not None
    assert document.admission.max_bytes == 2 << 30
    assert document.inputs["prior"].default == 0.25
    assert document.outputs["proba"].apply == "softmax"
    assert document.outputs["label"].from_ == "b.label"
    node = document.nodes["a"]
    assert isinstance(node, RemoteSpec)
    assert node.retry.when == ["connect", "unavailable"]
    assert node.hedge is not None
    assert (node.hedge.after, node.hedge.budget) == ("p95", pytest.approx(0.05))
    with pytest.raises(ValueError, match="frozen"):
        node.timeout = 5.0


def test_the_digest_and_the_file_are_those_of_the_text() -> None:
    document = read(VALID, "graphs/tumour.yaml")
    assert document.digest == hashlib.sha256(VALID.encode()).hexdigest()
    assert document.file == "graphs/tumour.yaml"


def test_a_graph_without_a_name_is_called_as_its_file() -> None:
    document = read(SMALL, "graphs/faces.yaml")
    assert document.name == "faces"
    assert document.file == "graphs/faces.yaml"
    assert document.digest


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("yes", "yes"), ("no", "no"),
        ("on", "on"), ("off", "off"), ("y", "y"), ("12", 12), ("-1", -1), ("010", 10), ("0o10", 8), ("0x1f", 31),
        ("1_000", "1_000"), ("12:30", "12:30"), ("2026-11-22", "2026-11-22"), ("1e3", 1000.0), (".5", 0.5),
        ("-.inf", float("-inf")), (".INF", float("inf")), ("150ms", "150ms"), ("'1'", "1"), ("!!str 1", "1"),
        ("5%", "5%"), ("?", "?"), ("$inputs.x", "$inputs.x"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(written: str, value: Any) -> None:
    read_value = read_yaml(f"k: {written if written != '?' else repr(written)}\n", "g.yaml").value["k"]
    assert read_value == value
    assert type(read_value) is type(value)


@pytest.mark.parametrize("key", ["on", "off", "yes", "no", "y"])
def test_keys_that_yaml_1_1_takes_for_booleans_are_text(key: str) -> None:
    assert read_yaml(f"{key}: 1\n", "g.yaml").value == {key: 1}


# --------------------------------------------------------------------------- reading


def test_read_takes_a_path_or_a_text(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(SMALL, "utf-8")
    assert read(tmp_path / "g.yaml").nodes == read(str(tmp_path / "g.yaml")).nodes == read(SMALL).nodes
    assert read(tmp_path / "g.yaml").file == str(tmp_path / "g.yaml")


def test_read_says_what_file_is_not_there_or_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read the graph: No such file.* - at .*g\.yaml"):
        read(tmp_path / "g.yaml")
    (tmp_path / "g.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(SpecError, match="no text in UTF-8: byte 6"):
        read(tmp_path / "g.yaml")


def test_read_raises_all_faults_at_once_with_their_places() -> None:
    text = SMALL.replace("path", "pth") + "deadline: 5\ndeadline: 400ms\n"
    with pytest.raises(GraphFaults) as caught:
        read(text, "g.yaml")
    assert [(fault.code, *fault.place[1:]) for fault in caught.value.faults] == [
        ("E101", 4, 19),
        ("E101", 5, 11),
        ("E117", 6, 1),
    ]
    assert str(caught.value).startswith(
        "3 faults\nE101 g.yaml:4:19 node 'a' has no key 'pth'; did you mean 'path'? - at"
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "E101 g.yaml:1:1 the document is empty"),
        ("# nothing\n", "E101 g.yaml:1:1 the document is empty"),
        ("just text", "E101 g.yaml:1:1 the document: expected a mapping with 'ensemble: 1', got 'just text'"),
        ("a: 1\n---\nb: 2\n", "E101 g.yaml:2:1 this is no YAML"),
        ("a: [1\n", "E101 g.yaml:2:1 this is no YAML"),
        ("\ta: 1\n", "E101 g.yaml:1:1 this is no YAML: a tab cannot indent or begin a value; use spaces"),
        (
            "a: 1\nb: {c: 1\nd: 2\n",
            "E101 g.yaml:3:2 this is no YAML: did not find expected ',' or '}' while parsing a flow mapping"
            " that begins at line 2, column 4",
        ),
        ("a: \x00\n", "E101 g.yaml:1:"),
        ("a: *b\n", "E101 g.yaml:1:4 this is no YAML"),
        ("[" * 5000 + "]" * 5000, "E101 g.yaml:1:1 the document is nested too deeply"),
    ],
)
def test_what_cannot_be_read_at_all_is_one_fault(text: str, fault: str) -> None:
    assert only_fault(text).startswith(fault)
    assert parse(text, "g.yaml")[0] is None


def test_an_alias_stands_for_what_it_names() -> None:
    document = read(SMALL.replace("{kind", "&a {kind") + "  b: *a\n")
    assert document.nodes["b"] == document.nodes["a"]


def test_an_alias_that_holds_itself_is_a_fault() -> None:
    faults = parse(SMALL.replace("path: a.onnx", "path: &a [*a]"), "g.yaml")[1].all
    assert any("an alias that holds itself" in fault.text for fault in faults)


def test_aliases_that_multiply_end() -> None:
    lines = [
        "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)),
    ]
    faults = read_yaml("\n".join(lines), "g.yaml").faults
    assert "more than 200,000 values" in faults[0].text


# --------------------------------------------------------------------------- places


def test_a_fault_stands_at_its_value_and_that_of_a_block_at_its_key() -> None:
    written = read_yaml(
        "nodes:\n  a:\n    kind: onnx\n    list:\n      - x\n      - {y: 1}\n  b: {kind: tf}\n", "g.yaml"
    )
    assert {path: place[1:] for path, place in written.places.items()} == {
        (): (1, 1),
        ("nodes",): (1, 1),
        ("nodes", "a"): (2, 3),
        ("nodes", "a", "kind"): (3, 11),
        ("nodes", "a", "list"): (4, 5),
        ("nodes", "a", "list", 0): (5, 9),
        ("nodes", "a", "list", 1): (6, 9),
        ("nodes", "a", "list", 1, "y"): (6, 13),
        ("nodes", "b"): (7, 6),
        ("nodes", "b", "kind"): (7, 13),
    }
    assert written.keys[("nodes", "b", "kind")][1:] == (7, 7)


def test_columns_count_characters_not_bytes() -> None:
    assert only_fault(SMALL.replace("path: a.onnx", "path: 模型.onnx, thread: 1")).startswith("E101 g.yaml:4:34 ")


# --------------------------------------------------------------------------- what is left of a bad document


def test_what_has_faults_is_left_out_and_the_rest_is_kept() -> None:
    text = VALID.replace("kind: onnx", "kind: onx").replace("deadline: 400ms", "deadline: 400").replace("uint8", "int0")
    document, faults = parse(text, "g.yaml")
    assert document is not None
    assert sorted(fault.code for fault in faults.all) == ["E101", "E101", "E101"]
    assert document.left_out == {("nodes", "b"), ("deadline",), ("inputs", "image")}
    assert set(document.nodes) == {"pre", "a", "c", "d", "e", "f"}
    assert set(document.inputs) == {"prior"}
    assert document.deadline is None


def test_a_document_knows_what_it_lacks_because_of_faults() -> None:
    document, _ = parse(VALID.replace("kind: onnx", "kind: onx"), "g.yaml")
    assert document is not None
    assert document.lacks(("nodes", "b"))
    assert document.lacks(("nodes", "b", "inputs", "data"))
    assert not document.lacks(("nodes", "a"))
    assert not document.lacks(("nodes", "z"))


def test_without_its_nodes_a_document_lacks_every_node() -> None:
    document, faults = parse("ensemble: 1\noutputs: {y: a.y}\nnodes: 5\n", "g.yaml")
    assert [fault.place[1:] for fault in faults.all] == [(3, 8)]
    assert document is not None
    assert document.nodes == {}
    assert document.lacks(("nodes", "a"))


def test_a_document_of_another_version_is_still_checked() -> None:
    document, faults = parse(SMALL.replace("ensemble: 1", "ensemble: 7").replace("path", "pth"), "g.yaml")
    assert len(faults.all) == 2
    assert document is not None


# --------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("{kind: remote}", "node 'a' lacks 'url'"),
        ("{kind: remote, url: 5}", "'url' of node 'a': expected text or a list, got 5; put it in quotes"),
        ("{kind: remote, url: []}", "'url' of node 'a': expected a URL or more, got none"),
        ("{kind: remote, url: u, retry: {attempts: 0}}", "'retry.attempts' of node 'a': expected 1 or more, got 0"),
        ("{kind: remote, url: u, retry: {when: [timeout]}}", "'connect', 'lost', 'overloaded' or 'unavailable'"),
        ("{kind: remote, url: u, hedge: {after: p99}}", "expected p95 or a length such as 30ms, got 'p99'"),
        ("{kind: remote, url: u, hedge: {budget: lots}}", "expected a share such as 5% or 0.05, got 'lots'"),
        ("{kind: remote, url: u, on_error: ski}", "'fail' or 'skip' or a mapping, got 'ski'; did you mean 'skip'?"),
        ("{kind: remote, url: u, headers: {X: 5}}", "'headers.X' of node 'a': expected text, got 5; put it in quotes"),
        ("{kind: remote, url: u, max_inflight: 0}", "'max_inflight' of node 'a': expected more than 0, got 0"),
        ("{kind: remote, url: u, max_queued: 1}", "'max_queued' without 'max_inflight' is for nothing"),
        ("{kind: remote, url: u, max_inflight: true}", "'max_inflight' of node 'a': expected a whole number, got true"),
        ("{kind: onnx, path: [x]}", "'path' of node 'a': expected text, got a list"),
        ("{kind: onnx, path: }", "'path' of node 'a': expected text, got nothing"),
        ("{kind: onnx, path: x, device: gpu}", "expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("{kind: onnx, path: x, providers: [tensorrt]}", "expected 'cuda' or 'cpu', got 'tensorrt'"),
        ("{kind: onnx, path: x, providers: []}", "'providers' is empty"),
        ("{kind: onnx, path: x, batching: {max_delay: 2ms}}", "'batching' of node 'a' lacks 'max_size'"),
        ("{kind: onnx, path: x, inputs: {x: {form: b.c}}}", "of node 'a' has no key 'form'; did you mean 'from'?"),
        ("{kind: onnx, path: x, inputs: {x: 5}}", "'inputs.x' of node 'a': expected a reference such as node.tensor"),
        ("{kind: onnx, path: x, inputs: [5]}", "'inputs.0' of node 'a': expected a reference such as node.tensor"),
        ("{kind: onnx, path: x, inputs: b.c}", "'inputs' of node 'a': expected a mapping or a list, got 'b.c'"),
        ("{kind: onnx, path: x, outputs: {y: {dtype: float32}}}", "'outputs.y' of node 'a' lacks 'shape'"),
        ("{kind: torch, path: x, dtype: float64}", "'dtype' of node 'a': expected 'bfloat16', 'bf16', 'float16'"),
        ("{kind: python, call: normalise}", "expected package.module:function, got 'normalise'"),
        ("{kind: graph}", "node 'a' lacks 'ref'"),
        ("onnx", "node 'a': expected a mapping, got 'onnx'"),
        ("{kind: 5}", "no kind '5': there is 'remote', 'onnx'"),
    ],
)  # fmt: skip
def test_a_fault_says_what_is_wrong_what_was_expected_and_what_is_there(node: str, words: str) -> None:
    assert words in only_fault(SMALL.replace("{kind: onnx, path: a.onnx}", node))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("metadata: requre", "'metadata': expected require, warn or file:PATH, got 'requre'; did you mean 'require'?"),
        ("metadata: file", "expected require, warn or file:PATH, got 'file'"),
        ("admission: {max_bytes: 2 GB of it}", "'admission.max_bytes': expected a size such as 512MiB or 2GiB"),
        ("admission: {max_inflght: 2}", "'admission' has no key 'max_inflght'; did you mean 'max_inflight'?"),
        ("strict: on", "expected true or false, got 'on'; only true and false are booleans here"),
        ("inputs: {x: float32}", "input 'x': expected a mapping, got 'float32'"),
    ],
)
def test_so_does_a_fault_of_the_document_itself(line: str, words: str) -> None:
    assert words in only_fault(f"{SMALL}{line}\n")


def test_a_long_value_is_cut_short_in_the_text() -> None:
    assert len(only_fault(SMALL.replace("kind: onnx", f"kind: onnx, device: {'x' * 500}"))) < 700


def test_no_secret_of_a_url_is_in_what_a_remote_node_is_called() -> None:
    assert RemoteSpec(kind="remote", url="https://h/m?token=abc").what == "https://h/m"


def test_whatever_is_written_is_a_document_or_has_faults() -> None:
    chance, pieces = (
        random.Random(6),
        [*re.findall(r"\w+|[^\w\s]", VALID), "\n", ": ", "&a ", "*a", "~", "!!int ", "<<: *a"],
    )
    for _ in range(500):
        start, end = sorted(chance.choices(range(len(VALID)), k=2))
        text = VALID[:start] + chance.choice(pieces) + VALID[min(end, start + chance.randrange(12)) :]
        document, faults = parse(text, "g.yaml")
        assert document is not None or faults.errors
        assert all(str(fault).startswith(f"{fault.code} g.yaml:") for fault in faults.all)


def test_reading_imports_no_framework() -> None:
    code = (
        "import sys, ensemble.spec; print({'torch', 'tensorflow', 'onnxruntime', 'ray', 'networkx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --------------------------------------------------------------------------- the JSON Schema


def properties_of(schema: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every property of a schema, with its path."""
    if isinstance(schema, dict):
        for name, part in schema.get("properties", {}).items():
            yield f"{path}.{name}", part
        for key, part in schema.items():
            yield from properties_of(part, f"{path}.{key}")
    elif isinstance(schema, list):
        for part in schema:
            yield from properties_of(part, path)


def test_the_json_schema_that_is_shipped_is_that_of_the_models() -> None:
    command = (
        """python -c 'from ensemble.spec import schema_text; print(schema_text(), end="")' > ensemble/schema.json"""
    )
    assert SCHEMA.read_text("utf-8") == schema_text(), f"write it anew: {command}"


def test_every_field_has_a_description() -> None:
    bare = [path for path, part in properties_of(json_schema()) if "const" not in part and not part.get("description")]
    assert bare == []


def test_the_json_schema_takes_what_is_valid_and_refuses_what_is_not() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))
    validator.check_schema(validator.schema)
    assert list(validator.iter_errors(read_yaml(VALID, "g.yaml").value)) == []
    for bad in ("kind: onx", "kind: onnx, pth: b.onnx"):
        assert list(validator.iter_errors(read_yaml(VALID.replace("kind: onnx", bad), "g.yaml").value))


def test_a_document_with_every_node_kind_has_specs_of_their_classes() -> None:
    nodes = read(VALID).nodes
    assert isinstance(nodes["b"], OnnxSpec)
    assert isinstance(nodes["pre"], PythonSpec)
    assert [node.kind for node in nodes.values()] == ["python", "remote", "onnx", "torch", "tf", "graph", "remote"]
