"""Nodes that are servables: how each kind opens its own, and what fits into and comes out of it."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import ensemble
import server_ref
from ensemble.breaker import Guarded
from ensemble.faults import FaultList
from ensemble.faults import Path as SpecPath
from ensemble.forms import UNKNOWN, Form, Symbols
from ensemble.nodes.model import ServableSpec, identity, open_servable
from ensemble.nodes.node import NodeSpec
from ensemble.nodes.python import PythonSpec
from ensemble.nodes.remote import RemoteSpec
from ensemble.spec import read
from ensemble.steps import ModelStep
from remote_ops.client import Endpoint
from remote_ops.errors import ConnectError, SpecError
from remote_ops.servable import FunctionServable, Servable
from remote_ops.signature import TensorSpec

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)
ROWS_FORM = Form("float32", ("N", 4))


def node(text: str, file: str = "g.yaml") -> ServableSpec:
    """The node of a document that has one, as YAML in a row."""
    spec = read(f"ensemble: 1\noutputs: {{y: a.y}}\nnodes:\n  a: {text}\n", file).nodes["a"]
    assert isinstance(spec, ServableSpec)
    return spec


class Asked:
    """A scope of one node `a` that opens its servable, unless told that nobody knows what it takes and gives."""

    def __init__(self, spec: NodeSpec, file: str, *, known: bool = True) -> None:
        self.path: SpecPath = ("nodes", "a")
        self.file = file
        self.faults = FaultList(file, {})
        self.symbols = Symbols()
        self.inputs: Mapping[str | int, Form] = {}
        self.sources = {edge.name: edge.edge.from_ for edge in spec.edges()}
        self._servable = open_servable(spec, file) if known else None

    def source(self, name: str | int) -> str:
        return self.sources.get(name, f"input '{name}'")

    def servable(self, spec: NodeSpec) -> Servable | None:
        return self._servable

    def child(self, name: str) -> Mapping[str, Form]:
        return {}

    def body(self, name: str, items: Mapping[str, Form]) -> Mapping[str, Form]:
        return {}

    def equal(self, left: Form, left_by: str, right: Form, right_by: str, code: str, path: SpecPath) -> Form:
        words = f"{left_by} -> {right_by}: expected {right}, got {left}"
        if left.dtype and right.dtype and left.dtype != right.dtype:
            self.faults.add("E106", path, words)
            return UNKNOWN
        if left.dims is None or right.dims is None:
            return Form(left.dtype or right.dtype, left.dims or right.dims)
        if len(left.dims) != len(right.dims) or self.symbols.unify(left.dims, left_by, right.dims, right_by):
            self.faults.add("E107", path, words)
        dims = tuple(
            [
                one if isinstance(one, int) or other is None else other
                for one, other in zip(left.dims, right.dims, strict=False)
            ]
        )
        return self.symbols.form(Form(left.dtype or right.dtype, dims))

    def resolve(self, form: Form) -> Form:
        return self.symbols.form(form)


def forms(text: str, file: str = "g.yaml", **inputs: Form) -> tuple[dict[str, Form], list[str]]:
    """What comes out of a node, and the faults that it has, given what goes in by name (`_0` for the first place)."""
    spec = node(text, file)
    scope = Asked(spec, file)
    given = {int(name[1:]) if name.startswith("_") else name: form for name, form in inputs.items()}
    found = dict(spec.forms(given, scope))
    return found, [f"{fault.code} {fault.text} - at {'.'.join(map(str, fault.path))}" for fault in scope.faults.all]


def step(text: str, file: str = "g.yaml", *, known: bool = True) -> ModelStep:
    """What a node becomes."""
    spec = node(text, file)
    return spec.step(Asked(spec, file, known=known))


# --------------------------------------------------------------------------- models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an ONNX model `data: float32 [rows, 4] -> sums: float32 [rows, 1], double: float32 [rows, 4]`."""
    nodes = [
        helper.make_node("ReduceSum", ["data", "axes"], ["sums"]),
        helper.make_node("Add", ["data", "data"], ["double"]),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "sums", [info("data", TensorProto.FLOAT, ["rows", 4])],
        [info("sums", TensorProto.FLOAT, ["rows", 1]), info("double", TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(tmp_path / "sums.onnx"))
    return tmp_path


@pytest.fixture
def graph(folder: Path) -> str:
    """The file of a graph in that folder; it need not be there."""
    return str(folder / "g.yaml")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of a model `x: uint8 [-1, 4], w: float32 [] -> y: float32 [-1, 4]` that multiplies."""
    model = FunctionServable(
        lambda x, w: (x * w).astype(np.float32),
        inputs=[TensorSpec("x", "uint8", (-1, 4)), TensorSpec("w", "float32", ())],
        outputs=[TensorSpec("y", "float32", (-1, 4))],
    )
    with server_ref.running({"scale": model}) as found:
        yield found


def module(folder: Path, source: str) -> str:
    """Put a module with that source beside the graph, and give its name."""
    name = f"shop_{hashlib.sha256((str(folder) + source).encode()).hexdigest()[:12]}"
    (folder / f"{name}.py").write_text(source, "utf-8")
    return name


# --------------------------------------------------------------------------- files


def test_an_onnx_node_opens_its_file_beside_the_graph(graph: str) -> None:
    made = step("{kind: onnx, path: sums.onnx, threads: 1, providers: [cuda, cpu]}", graph)
    assert made.servable.infer({"data": ROWS})["sums"].tolist() == [[6], [22]]
    assert made.place == "thread"
    assert made.renames == {}


@pytest.mark.parametrize(("written", "device"), [("[cpu]", "cpu"), ("[cpu, cuda]", "cpu"), ("[cuda, cpu]", "auto")])
def test_providers_say_the_device_in_another_way(written: str, device: str) -> None:
    assert node(f"{{kind: onnx, path: a.onnx, providers: {written}}}")._device() == device  # type: ignore[attr-defined]


def test_a_torch_node_opens_a_script_with_the_inputs_that_it_says(folder: Path, graph: str) -> None:
    torch = pytest.importorskip("torch")
    program = torch.export.export(torch.nn.Linear(4, 2), (torch.zeros(3, 4),))
    torch.export.save(program, folder / "two.pt2")
    made = step("{kind: torch, path: two.pt2, device: cpu, outputs: {probs: {dtype: float32, shape: [3, 2]}}}", graph)
    (theirs,) = [spec.name for spec in made.servable.signature.outputs]
    assert made.renames == {"probs": theirs}
    assert made.servable.signature.inputs[0].shape == (3, 4)


def test_a_torch_node_takes_a_module_by_its_python_name(folder: Path, graph: str) -> None:
    pytest.importorskip("torch")
    name = module(folder, "import torch\nnet = torch.nn.Linear(4, 2)\n")
    known = "takes: ['x: float32 [-1, 4]'], gives: ['y: float32 [-1, 2]']"
    made = step(f"{{kind: torch, path: '{name}:net', device: cpu, {known}}}", graph)
    assert made.servable.infer({"x": ROWS})["y"].shape == (2, 2)


def test_a_tf_node_opens_a_saved_model_and_its_signature(folder: Path, graph: str) -> None:
    tf = pytest.importorskip("tensorflow")

    class Model(tf.Module):  # type: ignore[misc]
        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="images")])
        def half(self, images: Any) -> dict[str, Any]:
            return {"y": images / 2}

    made = Model()
    tf.saved_model.save(made, str(folder / "saved"), signatures={"half": made.half})
    found, faults = forms("{kind: tf, path: saved, signature: half, inputs: {images: b.c}}", graph, images=ROWS_FORM)
    assert faults == []
    assert found == {"y": Form("float32", (None, 4))}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{kind: onnx, path: sum.onnx}", "no such model '{folder}/sum.onnx'; did you mean '{folder}/sums.onnx'?"),
        ("{kind: torch, path: sums.onnx}", "'sums.onnx' is not for kind 'torch': expected a file ending in .pt2"),
        ("{kind: onnx, path: 'http://h/model.pt2'}", "'http://h/model.pt2' is not for kind 'onnx'"),
        ("{kind: onnx, path: 'shop.models:net'}", "is not for kind 'onnx'"),
        ("{kind: tf, path: nowhere}", "no such model '{folder}/nowhere'"),
        ("{kind: onnx, path: sums.onnx, sha256: '" + "0" * 64 + "'}", "0000"),
        ("{kind: tf, path: sums.onnx}", "is not for kind 'tf': expected a file ending in .pb, .keras, .h5"),
    ],
)
def test_a_file_that_is_not_what_the_kind_says_is_a_spec_error(folder: Path, graph: str, text: str, words: str) -> None:
    with pytest.raises(SpecError, match=re.escape(words.format(folder=folder))):
        open_servable(node(text), graph)


def test_a_file_behind_a_url_is_downloaded_and_its_digest_checked(
    folder: Path, graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMOTE_OPS_CACHE", str(folder / "cache"))
    digest = hashlib.sha256((folder / "sums.onnx").read_bytes()).hexdigest()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{web.server_port}/sums.onnx"
        made = open_servable(node(f"{{kind: onnx, path: '{url}#sha256={digest}'}}"), graph)
        with pytest.raises(SpecError):
            open_servable(node(f"{{kind: onnx, path: '{url}?again#sha256={'0' * 64}'}}"), graph)
        web.shutdown()
        thread.join()
    assert made.infer({"data": ROWS})["sums"].tolist() == [[6], [22]]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_digest_that_is_right_opens(folder: Path, graph: str) -> None:
    digest = hashlib.sha256((folder / "sums.onnx").read_bytes()).hexdigest()
    assert open_servable(node(f"{{kind: onnx, path: sums.onnx, sha256: {digest}}}"), graph).signature.name == "sums"


# --------------------------------------------------------------------------- what goes in


def test_inputs_go_by_name_or_by_the_place_in_a_list(graph: str) -> None:
    for inputs, names in (("{data: b.c}", "data"), ("[b.c]", "_0")):
        found, faults = forms(f"{{kind: onnx, path: sums.onnx, inputs: {inputs}}}", graph, **{names: ROWS_FORM})
        assert faults == []
        assert found == {"sums": Form("float32", (None, 1)), "double": Form("float32", (None, 4))}


@pytest.mark.parametrize(
    ("inputs", "given", "faults"),
    [
        ("{dat: b.c}", {"dat": ROWS_FORM},
         ["E105 node 'a': onnx 'sums.onnx' has no input 'dat'; did you mean 'data'? - at nodes.a.inputs.dat"]),
        ("{}", {}, ["E105 node 'a' lacks input 'data': onnx 'sums.onnx' takes float32 [-1, 4] - at nodes.a.inputs"]),
        ("{data: b.c, more: b.d}", {"data": ROWS_FORM, "more": ROWS_FORM},
         ["E105 node 'a': onnx 'sums.onnx' has no input 'more': there is 'data' - at nodes.a.inputs.more"]),
        ("[b.c, b.d]", {"_0": ROWS_FORM, "_1": ROWS_FORM},
         ["E105 node 'a': onnx 'sums.onnx' takes 1 inputs (data), got 2; 'b.d' is one too many - at nodes.a.inputs.1"]),
    ],
)  # fmt: skip
def test_an_input_that_is_missing_unknown_or_too_many_is_a_fault(
    graph: str, inputs: str, given: dict[str, Form], faults: list[str]
) -> None:
    assert forms(f"{{kind: onnx, path: sums.onnx, inputs: {inputs}}}", graph, **given)[1] == faults


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        (
            Form("float64", ("N", 4)),
            "E106 b.c -> a.data (onnx 'sums.onnx'): expected float32 [?, 4], got float64 [N, 4]",
        ),
        (
            Form("float32", ("N", 5)),
            "E107 b.c -> a.data (onnx 'sums.onnx'): expected float32 [?, 4], got float32 [N, 5]",
        ),
        (Form("float32", ("N",)), "E107 b.c -> a.data (onnx 'sums.onnx'): expected float32 [?, 4], got float32 [N]"),
    ],
)
def test_what_does_not_fit_an_input_is_found_without_a_run(graph: str, form: Form, fault: str) -> None:
    faults = forms("{kind: onnx, path: sums.onnx, inputs: {data: b.c}}", graph, data=form)[1]
    assert faults == [f"{fault} - at nodes.a.inputs.data"]


@pytest.mark.parametrize(
    "form", [UNKNOWN, Form("float32", None), Form(None, (None, None)), Form("float32", ("N", "K"))]
)
def test_what_is_not_known_fits(graph: str, form: Form) -> None:
    assert forms("{kind: onnx, path: sums.onnx, inputs: {data: b.c}}", graph, data=form)[1] == []


def test_float32_stands_in_for_bfloat16(folder: Path, graph: str) -> None:
    name = module(folder, HALF)
    text = f"{{kind: python, call: '{name}:model', inputs: {{x: b.c}}}}"
    assert forms(text, graph, x=Form("float32", ("N",)))[1] == []
    assert [fault[:4] for fault in forms(text, graph, x=Form("float64", ("N",)))[1]] == ["E106"]


HALF = """
from remote_ops.servable import FunctionServable
from remote_ops.signature import TensorSpec
spec = [TensorSpec("x", "bfloat16", (-1,))]
model = FunctionServable(lambda x: x, spec, spec)
"""


# --------------------------------------------------------------------------- remote


def test_a_remote_node_is_asked_what_it_takes_and_gives(url: str) -> None:
    text = f"{{kind: remote, url: '{url}', inputs: {{x: b.c, w: b.d}}}}"
    found, faults = forms(text, x=Form("uint8", ("N", 4)), w=Form("float32", ()))
    assert faults == []
    assert found == {"y": Form("float32", (None, 4))}
    assert step(text).place == "loop"


def test_a_bool_for_a_remote_that_takes_uint8_is_a_fault_with_the_cast_to_write(url: str) -> None:
    text = f"{{kind: remote, url: '{url}', inputs: {{x: b.c, w: b.d}}}}"
    (fault,) = forms(text, x=Form("bool", ("N", 4)), w=Form("float32", ()))[1]
    assert fault == (
        f"E108 edge b.c -> a.x (remote '{url}'): expected uint8 [?, 4], got bool [N, 4], which has no form on the wire "
        "there; write x: {from: b.c, cast: uint8} - at nodes.a.inputs.x"
    )


def test_opening_a_remote_node_asks_nobody() -> None:
    servable = open_servable(node("{kind: remote, url: 'http://127.0.0.1:1/m', retry: {attempts: 1}}"), "g.yaml")
    with pytest.raises(ConnectError):
        _ = servable.signature


def test_the_options_of_a_remote_node_are_those_of_its_endpoint(folder: Path) -> None:
    spec = node(
        "{kind: remote, url: [gp://one:9000/m, https://two/m], timeout: 150ms, headers: {X: '${TOKEN}'},"
        " retry: {attempts: 2, when: [connect, 503], budget: 50%}, hedge: {after: 30ms, budget: 5%},"
        " breaker: {failures: 4, reset: 90s}, tls: {ca: ca.pem, verify: false}, config: fast}"
    )
    guarded = open_servable(spec, str(folder / "g.yaml"))
    assert isinstance(guarded, Guarded)
    told = guarded.endpoint.describe()
    assert told is not None
    assert told["url"] == ["http://one:9000/m", "https://two/m"]
    assert told["timeout_s"] == pytest.approx(0.15)
    assert told["retry"]["attempts"] == 2
    assert told["retry"]["when"] == ("connect", "unavailable")
    assert told["retry"]["budget"] == pytest.approx(0.5)
    assert told["hedge"] == {"after_s": pytest.approx(0.03), "budget": pytest.approx(0.05)}
    assert told["breaker"] == {"faults": 4, "base_s": 90.0, "max_s": 90.0}
    assert told["tls"]["ca"] == str(folder / "ca.pem")
    assert spec.sent == b"fast"


def test_a_remote_node_unless_said_is_as_an_endpoint_unless_said() -> None:
    endpoint = open_servable(node("{kind: remote, url: 'http://h/m'}"), "g.yaml")
    assert isinstance(endpoint, Endpoint)
    assert endpoint.describe() == Endpoint("http://h/m").describe()
    hedged = open_servable(node("{kind: remote, url: 'http://h/m', hedge: {after: p95}}"), "g.yaml")
    assert isinstance(hedged, Endpoint)
    assert (hedged.describe() or {})["hedge"]["after_s"] is None


def test_a_url_of_no_model_is_a_spec_error() -> None:
    with pytest.raises(SpecError, match="no URL of a model: expected http://"):
        open_servable(node("{kind: remote, url: 'ftp://h/m'}"), "g.yaml")


# --------------------------------------------------------------------------- what comes out


def test_outputs_are_renamed_and_those_not_named_are_left_out(graph: str) -> None:
    text = "{kind: onnx, path: sums.onnx, inputs: {data: b.c}, outputs: {total: sums}}"
    found, faults = forms(text, graph, data=ROWS_FORM)
    assert (found, faults) == ({"total": Form("float32", (None, 1))}, [])
    assert step(text, graph).renames == {"total": "sums"}


def test_an_output_that_the_model_lacks_is_a_fault_with_what_was_meant(graph: str) -> None:
    found, faults = forms(
        "{kind: onnx, path: sums.onnx, inputs: {data: b.c}, outputs: {t: sum}}", graph, data=ROWS_FORM
    )
    assert faults == [
        "E103 output 't' of 'a' is 'sum', which onnx 'sums.onnx' lacks; did you mean 'sums'? - at nodes.a.outputs.t"
    ]
    assert found == {"t": UNKNOWN}


def test_an_output_that_is_declared_gets_its_symbols_and_keeps_the_models_sizes(graph: str) -> None:
    text = (
        "{kind: onnx, path: sums.onnx, inputs: {data: b.c},"
        " outputs: {sums: {dtype: float32, shape: [N, 1]}, double: {dtype: float32, shape: [N, K]}}}"
    )
    found, faults = forms(text, graph, data=ROWS_FORM)
    assert faults == []
    assert found == {"sums": Form("float32", ("N", 1)), "double": Form("float32", ("N", 4))}


def test_declared_outputs_under_other_names_are_the_models_in_order(graph: str) -> None:
    declared = "outputs: {s: {dtype: float32, shape: [N, 1]}, d: {dtype: float32, shape: [N, 4]}}"
    text = f"{{kind: onnx, path: sums.onnx, inputs: {{data: b.c}}, {declared}}}"
    found, faults = forms(text, graph, data=ROWS_FORM)
    assert (list(found), faults) == (["s", "d"], [])
    assert step(text, graph).renames == {"s": "sums", "d": "double"}


def test_a_declaration_that_contradicts_the_model_is_a_fault(graph: str) -> None:
    declared = "outputs: {sums: {dtype: int64, shape: [N, 1]}, double: {dtype: float32, shape: [N, 5]}}"
    faults = forms(f"{{kind: onnx, path: sums.onnx, inputs: {{data: b.c}}, {declared}}}", graph, data=ROWS_FORM)[1]
    assert faults == [
        "E106 output 'sums' of 'a' is declared int64 [N, 1], but onnx 'sums.onnx' gives float32 [?, 1]; declare float32"
        " - at nodes.a.outputs.sums",
        "E107 'double' of onnx 'sums.onnx' -> 'double' of 'a' as declared: expected float32 [N, 5], got float32 [?, 4]"
        " - at nodes.a.outputs.double",
    ]


def test_what_cannot_be_asked_gives_what_is_declared() -> None:
    spec = node("{kind: remote, url: 'http://h/m', outputs: {y: {dtype: float32, shape: [N, 4]}, z: scores}}")
    scope = Asked(spec, "g.yaml", known=False)
    assert spec.forms({}, scope) == {"y": Form("float32", ("N", 4)), "z": UNKNOWN}
    assert scope.faults.all == []
    made = spec.step(scope)
    assert isinstance(made.servable, Endpoint)
    assert made.renames == {"z": "scores"}


# --------------------------------------------------------------------------- python


FUNCTIONS = """
from __future__ import annotations
from functools import partial
from typing import Annotated, NamedTuple, TypedDict
import numpy as np
from remote_ops.servable import FunctionServable
from remote_ops.signature import TensorSpec

F = Annotated[np.ndarray, TensorSpec("f", "float32", (-1, 4))]
I = Annotated[np.ndarray, TensorSpec("i", "int64", (-1,))]

class Pair(NamedTuple):
    first: F
    second: I

class Named(TypedDict):
    one: F
    other: I

def plain(x, scale=2):
    return x * np.float32(scale)

def annotated(x: F) -> F:
    return x

def pair(x: F) -> Pair:
    return Pair(x, np.arange(len(x)))

def named(x: F) -> Named:
    return {"one": x, "other": np.arange(len(x))}

def both(x: F) -> tuple[F, I]:
    return x, np.arange(len(x))

def configured(x: F, config) -> F:
    return x * len(config)

def anything(**inputs) -> F:
    return sum(inputs.values())

async def awaited(x: F) -> F:
    return x

def positional(x, /) -> F:
    return x

class Scaler:
    def __init__(self, by=3):
        self.by = np.float32(by)
    def __call__(self, x: F) -> F:
        return x * self.by

def make_scaler(by):
    return Scaler(by)

def make_model():
    return model

def make_nothing():
    return 7

def fails():
    raise RuntimeError("no disk")

class Holder:
    twice = partial(plain, scale=2)

model = FunctionServable(annotated, [TensorSpec("x", "float32", (-1, 4))], [TensorSpec("y", "float32", (-1, 4))])
seven = 7
"""
Y = "outputs: {y: {dtype: float32, shape: [N, 4]}}"


@pytest.fixture
def functions(folder: Path) -> str:
    """A module beside the graph, by its name."""
    return module(folder, FUNCTIONS)


def call(functions: str, graph: str, thing: str, more: str = "", inputs: str = "{x: b.c}") -> ModelStep:
    """The step of a python node."""
    text = f"{{kind: python, call: '{functions}:{thing}', inputs: {inputs}{', ' if more else ''}{more}}}"
    return step(text, graph)


@pytest.mark.parametrize(
    ("thing", "more", "outputs"),
    [
        ("plain", Y, {"y": 2 * ROWS}),
        ("plain", f"{Y}, options: {{scale: 5}}", {"y": 5 * ROWS}),
        ("annotated", "", {"f": ROWS}),
        ("pair", "", {"first": ROWS, "second": np.arange(2)}),
        ("named", "", {"one": ROWS, "other": np.arange(2)}),
        ("both", "", {"f": ROWS, "i": np.arange(2)}),
        ("anything", "", {"f": ROWS}),
        ("Scaler", "", {"f": 3 * ROWS}),
        ("Scaler", "options: {by: 4}", {"f": 4 * ROWS}),
        ("make_scaler", "options: {by: 5}", {"f": 5 * ROWS}),
        ("make_model", "", {"y": ROWS}),
        ("model", "", {"y": ROWS}),
        ("Holder.twice", Y, {"y": 2 * ROWS}),
    ],
)
def test_a_python_node_calls_what_its_name_stands_for(
    functions: str, graph: str, thing: str, more: str, outputs: dict[str, Any]
) -> None:
    found = call(functions, graph, thing, more).servable.infer({"x": ROWS})
    assert list(found) == list(outputs)
    for name, array in outputs.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_parameter_with_a_default_is_an_input_only_where_it_is_fed(functions: str, graph: str) -> None:
    one = call(functions, graph, "plain", Y).servable
    assert [spec.name for spec in one.signature.inputs] == ["x"]
    two = call(functions, graph, "plain", Y, "{x: b.c, scale: b.d}").servable
    assert [spec.name for spec in two.signature.inputs] == ["x", "scale"]
    listed = call(functions, graph, "plain", Y, "[b.c, b.d]").servable
    assert [spec.name for spec in listed.signature.inputs] == ["x", "scale"]


def test_annotations_say_what_goes_in_and_the_node_may_say_more(functions: str, graph: str) -> None:
    text = f"{{kind: python, call: '{functions}:annotated', inputs: {{x: b.c}}, {Y}}}"
    found, faults = forms(text, graph, x=Form("float32", ("N", 4)))
    assert (found, faults) == ({"y": Form("float32", ("N", 4))}, [])
    assert [fault[:4] for fault in forms(text, graph, x=Form("uint8", ("N", 4)))[1]] == ["E106"]


@pytest.mark.parametrize("what", ["reads", "Reads", "reading"])
def test_an_option_that_is_a_path_is_relative_to_the_graph(
    what: str, folder: Path, graph: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = """
from __future__ import annotations
from pathlib import Path

def reads(x, file: Path, word: str = ""):
    return x + len(file.read_text()) + len(word)

class Reads:
    def __init__(self, file: str | Path | None = None, word: str = ""):
        self.file, self.word = file, word
    def __call__(self, x):
        return reads(x, self.file, self.word)

def reading(*, file: Path, word: str = ""):
    return lambda x: reads(x, file, word)
"""
    (folder / "path_functions.py").write_text(source)
    (folder / "four.txt").write_text("four")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    more = "options: {file: four.txt, word: a/b}, inputs: {x: a.b}, outputs: {y: {dtype: float32, shape: ['?']}}"
    opened = open_servable(node(f"{{kind: python, call: 'path_functions:{what}', {more}}}"), graph)
    assert opened.infer({"x": np.zeros(1, np.float32)})["y"].tolist() == [7]


def test_the_files_of_ready_nodes_are_relative_to_the_graph(folder: Path, graph: str) -> None:
    (folder / "names.txt").write_text("cat\ndog\n")
    text = (
        "{kind: python, call: 'ensemble.ready.labels:top_k', options: {k: 1, labels: names.txt}, inputs: {probs: a.b}}"
    )
    given = open_servable(node(text), graph).infer({"probs": np.array([[0.1, 0.9]], np.float32)})
    assert given["labels"].tolist() == [["dog"]]


def test_the_config_of_a_python_node_goes_with_the_call(functions: str, graph: str) -> None:
    made = call(functions, graph, "configured", "config: abc")
    assert made.config == b"abc"
    np.testing.assert_array_equal(made.servable.infer({"x": ROWS}, config=made.config)["f"], 3 * ROWS)


def test_a_python_node_runs_in_a_thread_unless_it_says_inline(functions: str, graph: str) -> None:
    assert call(functions, graph, "annotated").place == "thread"
    assert call(functions, graph, "annotated", "run_in: inline").place == "inline"


def test_the_folder_of_the_graph_is_searched_and_not_left_on_the_path(functions: str, graph: str) -> None:
    before = list(sys.path)
    call(functions, graph, "annotated")
    assert sys.path == before


@pytest.mark.parametrize(
    ("thing", "more", "words"),
    [
        ("plan", "", "has no 'plan'; did you mean 'plain'?"),
        ("plain", "", "its outputs are not known: declare them in the node"),
        ("annotated", "options: {scale: 5}", "no option 'scale': expected some of x"),
        ("plain", f"{Y}, options: {{scal: 5}}", "no option 'scal': expected some of x, scale; did you mean 'scale'?"),
        ("model", "options: {scale: 5}", "options scale: not for a servable, which is made already"),
        ("awaited", "", "an async function cannot be a node"),
        ("positional", "", "parameter 'x' is positional only"),
        ("make_nothing", "", "it has no inputs, so it was taken for what makes a servable or a function: got a int"),
        ("fails", "", "making it failed: RuntimeError: no disk"),
        ("seven", "", "expected a function or a servable, got a int"),
    ],
)
def test_a_python_node_that_cannot_be_opened_says_why(
    functions: str, graph: str, thing: str, more: str, words: str
) -> None:
    with pytest.raises(SpecError, match=re.escape(words)) as caught:
        call(functions, graph, thing, more)
    assert caught.value.path == f"{functions}:{thing}"


@pytest.mark.parametrize("source", ["import nowhere_at_all", "1 / 0", "def f(:"])
def test_a_module_that_cannot_be_imported_is_a_spec_error(folder: Path, graph: str, source: str) -> None:
    with pytest.raises(SpecError, match="cannot import"):
        call(module(folder, source), graph, "f")


# --------------------------------------------------------------------------- graphs, identity


def test_a_graph_node_loads_the_file_beside_it(graph: str) -> None:
    there = Path(graph).parent / "parts" / "e.yaml"
    there.parent.mkdir()
    there.write_text(
        "ensemble: 1\ninputs: {x: {dtype: float32, shape: [N]}}\noutputs: {y: m.value}\n"
        "nodes: {m: {kind: combine, method: mean, inputs: {a: $inputs.x, b: $inputs.x}}}\n"
    )
    opened = open_servable(node("{kind: graph, ref: parts/e.yaml}"), graph)
    assert isinstance(opened, ensemble.Ensemble)
    assert opened.infer({"x": np.ones(2, np.float32)})["y"].tolist() == [1, 1]


def test_nodes_that_open_the_same_are_identical_and_others_are_not() -> None:
    same = ("{kind: onnx, path: a.onnx, inputs: {x: b.c}}", "{kind: onnx, path: a.onnx, timeout: 5s, on_error: skip}")
    assert len({identity(node(text)) for text in same}) == 1
    others = (
        "{kind: onnx, path: a.onnx}", "{kind: onnx, path: b.onnx}", "{kind: onnx, path: a.onnx, threads: 2}",
        "{kind: remote, url: 'http://h/a'}", "{kind: remote, url: 'http://h/a', timeout: 1s}",
        "{kind: remote, url: 'http://h/a', headers: {X: y}}", "{kind: python, call: 'm:f', inputs: {x: a.b}}",
        "{kind: python, call: 'm:f', inputs: {z: a.b}}", "{kind: python, call: 'm:f', inputs: [a.b]}",
        "{kind: python, call: 'm:f', inputs: {x: a.b}, options: {n: 1}}",
        "{kind: tf, path: a}", "{kind: tf, path: a, signature: s}", "{kind: graph, ref: a}",
    )  # fmt: skip
    assert len({identity(node(text)) for text in others}) == len(others)


def test_one_relative_path_from_two_folders_is_not_the_same_model() -> None:
    spec = node("{kind: onnx, path: a.onnx}")
    assert identity(spec, "one/g.yaml") != identity(spec, "two/g.yaml")
    assert identity(spec, "one/g.yaml") == identity(spec, "one/h.yaml")


def test_what_a_python_node_reads_from_does_not_tell_its_servable_apart() -> None:
    one, other = (node(f"{{kind: python, call: 'm:f', inputs: {{x: {source}}}}}") for source in ("a.b", "c.d"))
    assert identity(one) == identity(other)


def test_a_spec_survives_json() -> None:
    spec = node("{kind: remote, url: 'http://h/m', retry: {when: [503]}}")
    assert json.loads(spec.model_dump_json())["retry"]["when"] == ["unavailable"]
    assert isinstance(spec, RemoteSpec)
    assert not isinstance(spec, PythonSpec)
