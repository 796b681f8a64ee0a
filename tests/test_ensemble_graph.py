"""A document becomes a plan, or all that is wrong with it: references, owners, cycles, forms, use, times, models."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic import Field

import server_ref
from ensemble.document import read_yaml
from ensemble.faults import Fault, FaultList, GraphFaults
from ensemble.forms import UNKNOWN, Form
from ensemble.graph import build
from ensemble.nodes.model import ServableSpec
from ensemble.nodes.node import BodyAt, Edge, EdgeAt, Inputs, NodeSpec, Owned, Scope, TensorText
from ensemble.nodes.remote import RemoteSpec
from ensemble.plan import Plan, PlanNode, Source, Wire
from ensemble.spec import Document, parse
from ensemble.steps import ModelStep
from remote_ops import Endpoint, FunctionServable, Servable, TensorSpec
from remote_ops.errors import SpecError
from remote_ops.signature import parse_spec

# --------------------------------------------------------------------------- kinds that stand in for the real ones


class Model(NodeSpec):
    """A model that says what it takes and gives: dims of `takes` may be symbols of the graph."""

    inputs: Inputs = Field(default_factory=dict)
    takes: tuple[str, ...] = ("x: float32 [-1, 4]",)
    gives: tuple[str, ...] = ("y: float32 [-1, 4]",)
    symbols: dict[str, list[int | str]] = Field(default_factory=dict)
    file: str = ""

    MODEL: ClassVar = "local"

    def edges(self) -> Iterator[EdgeAt]:
        pairs = self.inputs.items() if isinstance(self.inputs, dict) else enumerate(self.inputs)
        return (EdgeAt(name, edge, ("inputs", name)) for name, edge in pairs)

    def forms(self, inputs: Mapping[str | int, Form], scope: Scope) -> Mapping[str, Form]:
        servable = scope.servable(self)
        if servable is None:
            return {}
        signature, node = servable.signature, scope.path[-1]
        for name, form in inputs.items():
            spec = signature.inputs[name] if isinstance(name, int) else self._input(name)
            wanted = Form.of(spec)._replace(dims=tuple(self._dims(spec)))
            by = f"input '{spec.name}' of node '{node}'"
            scope.equal(form, scope.source(name), wanted, by, "E106", (*scope.path, "inputs", name))
        return {spec.name: Form.of(spec)._replace(dims=tuple(self._dims(spec))) for spec in signature.outputs}

    def step(self, scope: Scope) -> ModelStep:
        servable = scope.servable(self)
        assert servable is not None
        return ModelStep(servable, {}, "inline")

    def _dims(self, spec: TensorSpec) -> list[int | str | None]:
        dims = self.symbols.get(spec.name, spec.shape or ())
        return [None if dim == -1 else dim for dim in dims]

    def _input(self, name: str | int) -> TensorSpec:
        return next(spec for spec in map(parse_spec, self.takes) if spec.name == name)


class Chooser(NodeSpec):
    """Owns nodes, and has an input of its own; gives what the first one gives, with how many there are."""

    inputs: Inputs = Field(default_factory=dict)
    use: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    by: Edge | None = None

    def edges(self) -> Iterator[EdgeAt]:
        assert isinstance(self.inputs, dict)
        for name, edge in self.inputs.items():
            yield EdgeAt(name, edge, ("inputs", name))
        if self.by is not None:
            yield EdgeAt("$by", self.by, ("by",), needed=False)

    def owned(self) -> Iterator[Owned]:
        return (Owned(name, ("use", place)) for place, name in enumerate(self.use))

    def spared(self) -> tuple[str, ...]:
        return self.without

    def forms(self, inputs: Mapping[str | int, Form], scope: Scope) -> Mapping[str, Form]:
        return dict(scope.child(self.use[0])) if self.use else {"y": UNKNOWN}

    def step(self, scope: Scope) -> Any:
        return ("chooser", sorted(map(str, scope.inputs)))


class Each(NodeSpec):
    """Runs a body for every row."""

    over: dict[str, Edge]
    body: dict[str, Any]

    def edges(self) -> Iterator[EdgeAt]:
        return (EdgeAt(name, edge, ("over", name)) for name, edge in self.over.items())

    def bodies(self) -> Iterator[BodyAt]:
        yield BodyAt("body", ("body",), self.body["nodes"], self.body["outputs"], tuple(self.over))

    def forms(self, inputs: Mapping[str | int, Form], scope: Scope) -> Mapping[str, Form]:
        items = {str(name): form._replace(dims=form.dims and form.dims[1:]) for name, form in inputs.items()}
        return {
            name: form._replace(dims=form.dims and ("K", *form.dims))
            for name, form in scope.body("body", items).items()
        }

    def step(self, scope: Scope) -> Any:
        return ("each", {name: str(form) for name, form in scope.body("body", {}).items()})


KINDS = {"model": Model, "chooser": Chooser, "each": Each, "remote": RemoteSpec}


def edge_of(value: Any) -> Edge:
    return Edge.model_validate({"from": value} if isinstance(value, str) else value)


def edges_of(value: Any) -> Any:
    return {name: edge_of(one) for name, one in value.items()}


def node_of(value: Any) -> NodeSpec:
    if value.get("kind") == "each":
        body = {"nodes": nodes_of(value["body"]["nodes"]), "outputs": edges_of(value["body"]["outputs"])}
        value = {**value, "body": body, "over": edges_of(value["over"])}
    if isinstance(value.get("by"), str):
        value = {**value, "by": edge_of(value["by"])}
    return KINDS[value.get("kind", "model")].model_validate({"kind": "model", **value})


def nodes_of(value: Any) -> dict[str, NodeSpec]:
    return {name: node_of(one) for name, one in value.items()}


def opened(spec: NodeSpec, file: str) -> Servable:
    if not isinstance(spec, Model):
        assert isinstance(spec, RemoteSpec)
        return Endpoint(spec.urls)
    if spec.file:
        raise SpecError(f"no such file '{spec.file}'")
    specs = [parse_spec(text) for text in spec.takes]
    return FunctionServable(lambda **_: None, specs, [parse_spec(text) for text in spec.gives])


OPENED: list[NodeSpec] = []


def counted(spec: NodeSpec, file: str) -> Servable:
    OPENED.append(spec)
    return opened(spec, file)


def alone(spec: NodeSpec, file: str) -> None:
    return None


def plan_of(text: str, file: str = "g.yaml", **options: Any) -> Plan:
    """The plan of a document, whose kinds are the ones above and whose outputs and nodes may be left out."""
    written = read_yaml(text, file)
    faults = FaultList(file, written.places)
    assert written.faults == []
    told = {"inputs": {}, "outputs": {}, **written.value}
    document = Document.model_construct(
        ensemble=1,
        name="g",
        inputs={name: TensorText.model_validate(one) for name, one in told["inputs"].items()},
        outputs=edges_of(told["outputs"]),
        nodes=nodes_of(told.get("nodes", {})),
        deadline=told.get("deadline"),
        admission=None,
        metadata=told.get("metadata", "require"),
        strict=told.get("strict", False),
    )
    return build(document, faults, **{"open": opened, "identity": alone, **options})


def faults_of(text: str, **options: Any) -> list[Fault]:
    """Every fault of such a document, warnings included."""
    try:
        return list(plan_of(text, **options).warnings)
    except GraphFaults as found:
        return list(found.faults)


def the_fault(text: str, **options: Any) -> str:
    """The only fault, as it is printed."""
    (fault,) = faults_of(text, **options)
    return str(fault)


def node(plan: Plan, name: str) -> PlanNode:
    (found,) = [one for one in plan.nodes if one.name == name]
    return found


HEAD = """\
inputs: {x: {dtype: float32, shape: [N, 4]}}
outputs: {y: b.y}
"""

# --------------------------------------------------------------------------- plans


def test_nodes_come_after_what_they_read_and_else_as_they_are_written() -> None:
    plan = plan_of(
        HEAD
        + """\
nodes:
  b: {inputs: {x: a.y}}
  a: {inputs: {x: c}}
  c: {inputs: [$inputs.x]}
"""
    )
    assert [one.name for one in plan.nodes] == ["c", "a", "b"]
    assert node(plan, "c").wires == (Wire("x", Source("inputs", "x")),)
    assert node(plan, "a").wires == (Wire("x", Source("node", "c", "y")),)
    assert plan.outputs == (Wire("y", Source("node", "b", "y")),)
    assert str(plan.inputs["x"].form) == "float32 [N, 4]"
    assert str(plan.output_forms["y"]) == "float32 [?, 4]"
    assert plan.warnings == ()


def test_an_edge_has_the_operations_that_are_written_on_it() -> None:
    plan = plan_of(
        HEAD
        + (
            "nodes: {b: {inputs: {x: {from: $inputs.x, apply: [softmax, {argmax: {}}], cast: "
            "float32}}, takes: ['x: float32 [-1]']}}"
        )
    )
    (wire,) = plan.nodes[0].wires
    result = np.array([[0, 3, 1, 2]], np.float32)
    for operation in wire.operations:
        result = operation.run(result)
    assert result.tolist() == [1.0]
    assert result.dtype == np.float32


def test_symbols_of_inputs_stay_and_those_that_are_bound_are_sizes() -> None:
    plan = plan_of(
        """\
inputs: {x: {dtype: float32, shape: [N, M]}}
outputs: {y: b.y}
nodes: {b: {inputs: {x: $inputs.x}, symbols: {y: [N, M]}}}
"""
    )
    assert str(plan.inputs["x"].form) == "float32 [N, 4]"
    assert str(plan.output_forms["y"]) == "float32 [N, 4]"


def test_an_owned_node_takes_what_its_owner_gives_by_name_or_as_its_only_input() -> None:
    plan = plan_of(
        HEAD
        + """\
nodes:
  b: {kind: chooser, inputs: {x: $inputs.x, mask: $inputs.x}, use: [one, two]}
  one: {}
  two: {takes: ['mask: float32 [-1, 4]', 'x: float32 [-1, 4]']}
"""
    )
    owner = node(plan, "b")
    assert [wire.name for wire in owner.wires] == ["x", "mask"]
    one, two = owner.children["one"], owner.children["two"]
    assert isinstance(one, PlanNode)
    assert isinstance(two, PlanNode)
    assert one.wires == (Wire("x", Source("inputs", "x")),)
    assert {wire.name for wire in two.wires} == {"mask", "x"}
    plan = plan_of(HEAD + "nodes: {b: {kind: chooser, inputs: {image: $inputs.x}, use: [one]}, one: {}}")
    (only,) = plan.nodes[0].children.values()
    assert isinstance(only, PlanNode)
    assert only.wires == (Wire("x", Source("inputs", "image")),)


def test_what_an_owned_node_selects_by_reaches_it_through_its_owners() -> None:
    plan = plan_of(
        """\
inputs: {x: {dtype: float32, shape: [N, 4]}, user: {dtype: string, shape: [N], optional: true}}
outputs: {y: top.y}
nodes:
  top: {kind: chooser, inputs: {x: $inputs.x}, use: [middle]}
  middle: {kind: chooser, use: [small]}
  small: {kind: chooser, by: $inputs.user, use: [leaf]}
  leaf: {}
"""
    )
    (top,) = plan.nodes
    assert top.wires[1] == Wire("small.$by", Source("inputs", "user"), (), False)
    middle = top.children["middle"]
    assert isinstance(middle, PlanNode)
    assert middle.wires[1] == Wire("small.$by", Source("inputs", "small.$by"), (), False)
    small = middle.children["small"]
    assert isinstance(small, PlanNode)
    assert small.wires == (Wire("x", Source("inputs", "x")), Wire("$by", Source("inputs", "small.$by"), (), False))
    leaf = small.children["leaf"]
    assert isinstance(leaf, PlanNode)
    assert leaf.wires == (Wire("x", Source("inputs", "x")),)
    assert top.step == ("chooser", ["small.$by", "x"])


BODY = """\
inputs: {x: {dtype: float32, shape: [N, 4]}, z: {dtype: float32, shape: [7, 4]}}
outputs: {y: all.y}
nodes:
  pre: {inputs: {x: $inputs.x}, gives: ['y: float32 [-1, 2, 4]']}
  all:
    kind: each
    over: {crop: pre}
    body:
      nodes:
        two: {inputs: {x: one.y}}
        one:
          inputs: {x: $item.crop, z: $inputs.z, p: other}
          takes: ['x: float32 [2, 4]', 'z: float32 [-1, 4]', 'p: float32 [-1, 4]']
      outputs: {y: {from: two.y, apply: softmax}}
  other: {inputs: {x: $inputs.x}}
"""


def test_a_body_is_a_plan_that_has_what_it_reads_from_outside_as_inputs() -> None:
    plan = plan_of(BODY)
    assert [one.name for one in plan.nodes] == ["pre", "other", "all"]
    all_ = node(plan, "all")
    assert all_.wires == (
        Wire("crop", Source("node", "pre", "y")),
        Wire("$inputs.z", Source("inputs", "z")),
        Wire("other.y", Source("node", "other", "y")),
    )
    body = all_.children["body"]
    assert isinstance(body, Plan)
    assert [*body.inputs] == ["crop", "$inputs.z", "other.y"]
    assert str(body.inputs["crop"].form) == "float32 [2, 4]"
    assert [one.name for one in body.nodes] == ["all/one", "all/two"]
    assert [wire.source for wire in body.nodes[0].wires] == [
        *(Source("inputs", "crop"), Source("inputs", "$inputs.z"), Source("inputs", "other.y"))
    ]
    assert body.nodes[1].wires == (Wire("x", Source("node", "all/one", "y")),)
    assert body.outputs[0].source == Source("node", "all/two", "y")
    assert str(plan.output_forms["y"]) == "float32 [K, ?, 4]"
    assert all_.step == ("each", {"y": "float32 [?, 4]"})


def test_a_body_in_a_body_reads_what_is_outside_of_both() -> None:
    plan = plan_of(
        """\
inputs: {x: {dtype: float32, shape: [N, M, 4]}, z: {dtype: float32, shape: [3]}}
outputs: {y: outer.y}
nodes:
  outer:
    kind: each
    over: {row: $inputs.x}
    body:
      nodes:
        inner:
          kind: each
          over: {cell: $item.row}
          body:
            nodes:
              a:
                inputs: {x: $item.cell, z: $inputs.z, r: $item.row}
                takes: ['x: float32 [4]', 'z: float32 [3]', 'r: float32 [-1, 4]']
            outputs: {y: a}
      outputs: {y: inner}
"""
    )
    (outer,) = plan.nodes
    assert [wire.source.name for wire in outer.wires] == ["x", "z"]
    body = outer.children["body"]
    assert isinstance(body, Plan)
    assert [*body.inputs] == ["row", "$inputs.z"]
    (inner,) = body.nodes
    assert inner.name == "outer/inner"
    assert inner.wires == (
        Wire("cell", Source("inputs", "row")),
        Wire("$inputs.z", Source("inputs", "$inputs.z")),
        Wire("$item.row", Source("inputs", "row")),
    )
    innermost = inner.children["body"]
    assert isinstance(innermost, Plan)
    assert [*innermost.inputs] == ["cell", "$inputs.z", "$item.row"]
    assert innermost.nodes[0].name == "outer/inner/a"


def test_models_of_equal_identity_are_opened_once() -> None:
    OPENED.clear()
    text = HEAD + "nodes: {a: {inputs: {x: $inputs.x}}, b: {inputs: {x: a.y}}}"
    plan_of(text, open=counted, identity=lambda spec, file: "same")
    assert len(OPENED) == 1
    plan_of(text, open=counted)
    assert len(OPENED) == 3


def test_a_chain_of_two_thousand_nodes_loads_in_about_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["  n0: {inputs: {x: $inputs.x}}", *(f"  n{i}: {{inputs: {{x: n{i - 1}.y}}}}" for i in range(1, 2000))]
    text = "inputs: {x: {dtype: float32, shape: [N, 4]}}\noutputs: {y: n1999.y}\nnodes:\n" + "\n".join(reversed(lines))
    started = time.perf_counter()
    plan = plan_of(text)
    took_s = time.perf_counter() - started
    with capsys.disabled():
        print(f"\n2,000 nodes: {took_s:.2f} s")
    assert [one.name for one in plan.nodes] == [f"n{i}" for i in range(2000)]
    assert took_s < 5.0


# --------------------------------------------------------------------------- E103: references


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (
            "nodes: {b: {inputs: {x: prr.y}}, pre: {}}",
            "E103 g.yaml:3:25 node 'b' reads 'prr.y', but there is no node 'prr'; did you mean 'pre'?",
        ),
        (
            "nodes: {b: {inputs: {x: $inputs.y}}}",
            "3:25 node 'b' reads '$inputs.y', but there is no input 'y': there is 'x'",
        ),
        (
            (
                "nodes: {b: {inputs: {x: pre.yy}}, pre: {inputs: {x: $inputs.x}, gives: ['yyy: float32 "
                "[-1, 4]', 'z: int8 []']}}"
            ),
            "node 'b' reads 'pre.yy', but node 'pre' has no output 'yy'; did you mean 'yyy'?",
        ),
        (
            (
                "nodes: {b: {inputs: {x: pre}}, pre: {inputs: {x: $inputs.x}, gives: ['y: float32 [-1, "
                "4]', 'z: int8 []']}}"
            ),
            "node 'b' reads 'pre', but node 'pre' has 2 outputs: expected one of 'pre.y', 'pre.z'",
        ),
        ("nodes: {b: {inputs: {x: $item.x}}}", "there is no item 'x': $item is what a map is over, in its body"),
        (
            (
                "nodes: {b: {kind: chooser, inputs: {x: $inputs.x}, use: [one, tvo]}, one: {}, two: "
                "{inputs: {x: $inputs.x}}}"
            ),
            "3:63 node 'b' uses node 'tvo', which is not there; did you mean 'two'?",
        ),
        (
            "nodes: {b: {inputs: {x: {from: $inputs.x, apply: sotfmax}}}}",
            "E103 g.yaml:3:25 edge from '$inputs.x': no operation 'sotfmax'",
        ),
    ],
)
def test_a_reference_to_what_is_not_there_says_what_was_perhaps_meant(document: str, words: str) -> None:
    assert words in the_fault(HEAD + document)


def test_an_output_may_refer_to_what_is_not_there() -> None:
    text = "outputs: {y: b.z, w: $inputs.v}\nnodes: {b: {takes: []}}"
    first, second = map(str, faults_of(text))
    assert "output 'y' reads 'b.z', but node 'b' has no output 'z': there is 'y'" in first
    assert "output 'w' reads '$inputs.v', but there is no input 'v': there is none" in second


def test_an_owned_node_stands_beside_its_owner() -> None:
    takes = "          takes: ['x: float32 [2, 4]', 'z: float32 [-1, 4]', 'p: float32 [-1, 4]']\n"
    text = BODY.replace(takes, "          kind: chooser\n          use: [other]\n")
    assert "uses node 'other', which stands outside this body" in the_fault(text)


# --------------------------------------------------------------------------- E104: cycles


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (
            "{a: {inputs: {x: c}}, b: {inputs: {x: a}}, c: {inputs: {x: b}}}",
            "E104 g.yaml:2:25 a cycle: a -> b -> c -> a;",
        ),
        ("{a: {inputs: {x: a.y}}, b: {inputs: {x: a}}}", "E104 g.yaml:2:25 a cycle: a -> a;"),
        ("{a: {takes: []}, b: {kind: chooser, use: [c]}, c: {kind: chooser, use: [b]}}", "2:50 a cycle: b -> c -> b;"),
        ("{a: {kind: chooser, use: [b]}, b: {kind: chooser, by: a.y}}", "a cycle: a -> b -> a;"),
        (
            (
                "{a: {kind: each, over: {c: b}, body: {nodes: {d: {inputs: {x: a.y}}}, outputs: {y: "
                "d}}}, b: {takes: []}}"
            ),
            "a cycle: a -> a;",
        ),
        (
            (
                "{a: {kind: each, over: {c: b}, body: {nodes: {d: {inputs: {x: e}}, e: {inputs: {x: "
                "d}}}, outputs: {y: d}}}, b: {takes: []}}"
            ),
            "2:70 a cycle: d -> e -> d;",
        ),
    ],
)
def test_a_cycle_is_printed_as_the_way_around_it(nodes: str, words: str) -> None:
    assert words in the_fault(f"outputs: {{y: a.y}}\nnodes: {nodes}")


def test_two_cycles_are_two_faults_and_nothing_follows_from_them() -> None:
    text = (
        "outputs: {y: e.y}\nnodes: {a: {inputs: {x: b}}, b: {inputs: {x: a}}, c: {inputs: {x: "
        "c}}, e: {inputs: {x: a.y}}}"
    )
    assert [fault.code for fault in faults_of(text)] == ["E104", "E104"]


def test_files_that_hold_each_other_are_a_cycle(tmp_path: FilePath) -> None:
    class Nested(Model):
        def forms(self, inputs: Mapping[str | int, Form], scope: Scope) -> Mapping[str, Form]:
            return {"y": UNKNOWN} if scope.servable(self) else {}

    def open_nested(spec: NodeSpec, file: str) -> Servable:
        assert isinstance(spec, Model)
        path = FilePath(file).parent / spec.file
        plan_of(path.read_text(), str(path), open=open_nested)
        return opened(Model(kind="model"), file)

    KINDS["nested"] = Nested
    for name, other in (("a", "b"), ("b", "a"), ("c", "a"), ("self", "self")):
        text = f"outputs: {{y: n.y}}\nnodes:\n  n: {{kind: nested, file: {other}.yaml}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    for name, words in (("a", "a.yaml -> b.yaml -> a.yaml"), ("self", "self.yaml -> self.yaml")):
        path = tmp_path / f"{name}.yaml"
        fault = the_fault(path.read_text(), file=str(path), open=open_nested)
        assert f"E104 {path}:3:6 node 'n' closes a cycle of files: {words}" in fault
    path = tmp_path / "c.yaml"
    assert "a.yaml -> b.yaml -> a.yaml" in the_fault(path.read_text(), file=str(path), open=open_nested)


def test_the_faults_of_a_graph_in_a_graph_have_their_own_places(tmp_path: FilePath) -> None:
    def open_nested(spec: NodeSpec, file: str) -> Servable:
        return opened(spec, file) if "inner" in file else plan_of(HEAD + "nodes: {b: {inputs: {x: nix}}}", "inner.yaml")  # type: ignore[return-value]

    text = HEAD + "nodes: {b: {inputs: {x: $inputs.x}}, c: {inputs: {x: nox}}}"
    assert [str(fault).split(" node")[0] for fault in faults_of(text, open=open_nested)] == [
        "E103 g.yaml:3:54",
        "E103 inner.yaml:3:25",
    ]


# --------------------------------------------------------------------------- E106, E107: forms


def test_an_edge_that_does_not_fit_names_both_ends_and_both_forms() -> None:
    text = HEAD + "nodes: {b: {inputs: {x: pre.y}}, pre: {inputs: {x: $inputs.x}, gives: ['y: float64 [-1, 4]']}}"
    assert the_fault(text) == (
        "E106 g.yaml:3:25 edge pre.y -> input 'x' of node 'b': expected float32 [?, 4], got float64 [?, 4]; "
        "write `cast: float32` on this edge - at nodes.b.inputs.x"
    )
    assert "expected float32 [?, 4], got float32 [?, 1, 4]: 3 axes, not 2" in the_fault(
        text.replace("float64 [-1, 4]", "float32 [-1, 1, 4]")
    )
    assert "expected float32 [?, 4], got float32 [?, 5]: axis 1 is 5 by pre.y, 4 by input 'x' of" in the_fault(
        text.replace("float64 [-1, 4]", "float32 [-1, 5]")
    )


def test_a_symbol_means_one_size_all_over_a_graph() -> None:
    text = """\
inputs: {x: {dtype: float32, shape: [8, 4]}, z: {dtype: float32, shape: [16, 4]}}
outputs: {y: b.y}
nodes:
  a: {inputs: {x: $inputs.x}, symbols: {x: [N, 4], y: [N, 4]}}
  b: {inputs: {x: a, z: $inputs.z}, takes: ['x: float32 [-1, 4]', 'z: float32 [-1, 4]'], symbols: {z: [N, 4]}}
"""
    fault = the_fault(text)
    assert fault.startswith("E107 g.yaml:5:25 edge $inputs.z -> input 'z' of node 'b'")
    assert "N bound to 16 by $inputs.z, 8 by $inputs.x" in fault or "N bound to 8 by $inputs.x, 16" in fault


@pytest.mark.parametrize(
    ("apply", "code", "words"),
    [
        ("{softmax: {axsi: 1}}", "E101", "axsi"),
        ("{softmax: {axis: 5}}", "E107", "axis 5 is not in float32 [N, 4]"),
        ("[argmax, softmax]", "E106", "softmax"),
    ],
)
def test_an_operation_that_does_not_fit_is_a_fault_of_its_edge(apply: str, code: str, words: str) -> None:
    fault = the_fault(HEAD + f"nodes: {{b: {{inputs: {{x: {{from: $inputs.x, apply: {apply}}}}}}}}}")
    assert fault.startswith(f"{code} g.yaml:3:25 edge from '$inputs.x': ")
    assert words in fault


def test_nothing_follows_from_a_fault() -> None:
    wrong = "d: {inputs: {x: $inputs.x}, takes: ['x: int8 [-1, 4]']}"
    after = (
        "b: {inputs: {x: c, z: d.nix}, takes: ['x: float32 [-1, 4]', 'z: int8 [3]']}, c: "
        "{inputs: {x: {from: d, apply: softmax}}}"
    )
    fault = the_fault(HEAD + f"nodes: {{{after}, {wrong}}}")
    assert "edge $inputs.x -> input 'x' of node 'd': expected int8 [?, 4], got float32 [N, 4]" in fault


def test_all_faults_are_told_at_once() -> None:
    text = """\
inputs: {x: {dtype: float32, shape: [N, 4]}, o: {dtype: float32, shape: [N, 4], optional: true}}
outputs: {y: b.y}
deadline: 1.0
nodes:
  b: {inputs: {x: prr.y}}
  c: {inputs: {x: c}}
  d: {inputs: {x: $inputs.x}, takes: ['x: int8 [-1, 4]']}
  e: {inputs: {x: $inputs.o}, timeout: 2s}
  f: {inputs: {x: $inputs.x}, file: nowhere.onnx}
"""
    found = [(fault.code, fault.place.line) for fault in faults_of(text)]
    assert found == [("E103", 5), ("E104", 6), ("E106", 7), ("E113", 8), ("E114", 8), ("E116", 9)]


# --------------------------------------------------------------------------- E109: use


def test_what_leads_to_no_output_is_a_warning_and_with_strict_a_fault() -> None:
    text = HEAD + "nodes: {b: {inputs: {x: $inputs.x}}, lost: {inputs: {x: b.y}}, after: {inputs: {x: lost}}}"
    first, second = faults_of(text)
    assert str(first) == (
        "W109 g.yaml:3:44 node 'lost' leads to no output: read what it gives, or leave it out - at nodes.lost"
    )
    assert second.path == ("nodes", "after")
    assert first.warning
    with pytest.raises(GraphFaults, match=r"E109 g\.yaml:4:44 node 'lost' leads to no output"):
        plan_of("strict: true\n" + text)


def test_an_input_that_nobody_reads_is_a_warning() -> None:
    text = "inputs: {x: {dtype: float32, shape: []}}\noutputs: {y: b.y}\nnodes: {b: {takes: []}}"
    assert "W109 g.yaml:1:13 input 'x' is read by nobody" in the_fault(text)


def test_an_output_that_was_chosen_and_that_nobody_reads_is_a_warning() -> None:
    text = HEAD + "nodes: {b: {inputs: {x: $inputs.x}, gives: ['y: int8 []', 'z: int8 []']%s}}"
    assert faults_of(text % "") == []
    assert "W109 g.yaml:3:93 output 'z' of node 'b' is read by nobody" in the_fault(text % ", outputs: {y: y, z: z}")


def test_a_node_of_a_body_may_be_of_no_use() -> None:
    text = BODY.replace(
        "        two:", "        lost: {inputs: {x: $item.crop}, takes: ['x: float32 [2, 4]']}\n        two:"
    )
    assert "W109 g.yaml:10:15 node 'lost' leads to no output" in the_fault(text)


def test_what_only_looks_useless_because_of_another_fault_is_not_told() -> None:
    assert [fault.code for fault in faults_of(HEAD + "nodes: {b: {inputs: {x: c}}, lost: {takes: []}}")] == ["E103"]


# --------------------------------------------------------------------------- E113: values that may be missing

OPTIONAL = """\
inputs: {x: {dtype: float32, shape: [2, 4], optional: true%s}}
outputs: {y: b.y}
nodes:
  a: {inputs: {x: $inputs.x}%s}
  b: {inputs: {x: a.y}}
"""


def test_a_node_that_needs_a_value_cannot_read_what_may_be_missing() -> None:
    assert faults_of(OPTIONAL % (", default: 0", "")) == []
    fault = the_fault(OPTIONAL % ("", ""))
    assert fault.startswith(
        "E113 g.yaml:4:19 node 'a', input 'x', needs a value of '$inputs.x', but input 'x' is optional"
    )
    fault = the_fault(OPTIONAL % (", default: 0", ", on_error: skip"))
    assert fault.startswith("E113 g.yaml:5:19 node 'b', input 'x', needs a value of 'a.y', but node 'a' may be skipped")
    skipped = OPTIONAL.replace("a.y}}", "a.y}, on_error: skip}") % (", default: 0", "")
    fault = the_fault(skipped)
    assert fault.startswith("E113 g.yaml:2:14 output 'y' needs a value of 'b.y', but node 'b' may be skipped")


def test_a_node_that_is_skipped_may_be_one_that_its_owner_does_without() -> None:
    text = HEAD + "nodes: {b: {kind: chooser, inputs: {x: $inputs.x}, use: [one, two]}, one: {}, two: {%s}}"
    assert faults_of(text % "on_error: fail") == []
    fault = the_fault(text % "on_error: skip")
    assert "output 'y' needs a value of 'b.y', but node 'two' may be skipped" in fault
    assert faults_of((text % "on_error: skip").replace("use: [", "without: [two], use: [")) == []


def test_what_a_body_reads_from_outside_may_be_missing_where_nothing_needs_it() -> None:
    text = """\
inputs: {x: {dtype: float32, shape: [N, 4]}, user: {dtype: string, shape: [], optional: true}}
outputs: {y: all.y}
nodes:
  all:
    kind: each
    over: {row: $inputs.x}
    body:
      nodes:
        some: {kind: chooser, inputs: {x: $item.row}, by: $inputs.user, use: [one]}
        one: {takes: ['x: float32 [4]']}
      outputs: {y: some.y}
"""
    (all_,) = plan_of(text).nodes
    assert all_.wires[1] == Wire("$inputs.user", Source("inputs", "user"), (), False)
    body = all_.children["body"]
    assert isinstance(body, Plan)
    assert body.inputs["$inputs.user"].optional


# --------------------------------------------------------------------------- E114: times


def test_a_timeout_beyond_the_deadline_is_a_fault_and_timeouts_that_add_up_to_more_a_warning() -> None:
    text = (
        HEAD + "deadline: 1.0\nnodes: {b: {inputs: {x: a}, timeout: %s}, a: {inputs: {x: $inputs.x}, timeout: 700ms}}"
    )
    assert faults_of(text % "300ms") == []
    assert "E114 g.yaml:4:38 node 'b': expected a timeout of at most 1 s, the deadline of a run, got 2 s" in str(
        faults_of(text % "2s")[1]
    )
    assert the_fault(text % "400ms").startswith(
        "W114 g.yaml:3:11 the timeouts along a -> b add up to 1.1 s, but the deadline of a run is 1 s"
    )


# --------------------------------------------------------------------------- E115: owners


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (
            ("{b: {kind: chooser, inputs: {x: $inputs.x}, use: [one]}, one: {}, c: {inputs: {x: one.y}}}"),
            "E115 g.yaml:3:90 node 'c' reads 'one.y', but node 'b' owns 'one'",
        ),
        (
            "{b: {kind: chooser, inputs: {x: $inputs.x}, use: [one]}, one: {inputs: {x: $inputs.x}}}",
            "E115 g.yaml:3:83 node 'one' reads '$inputs.x', but node 'b' owns it",
        ),
        (
            (
                "{b: {kind: chooser, inputs: {x: $inputs.x}, use: [one]}, c: {kind: chooser, inputs: {x: "
                "$inputs.x}, use: [one]}, one: {}}"
            ),
            "E115 g.yaml:3:114 node 'one' is used by node 'c', but node 'b' owns it already",
        ),
    ],
)
def test_an_owned_node_belongs_to_one_owner_that_alone_uses_it_and_feeds_it(nodes: str, words: str) -> None:
    assert words in next(str(fault) for fault in faults_of(HEAD + f"nodes: {nodes}") if not fault.warning)


def test_an_owner_may_use_a_node_twice() -> None:
    (only,) = plan_of(HEAD + "nodes: {b: {kind: chooser, inputs: {x: $inputs.x}, use: [one, one]}, one: {}}").nodes
    assert [*only.children] == ["one"]


# --------------------------------------------------------------------------- E116: models that do not answer

REMOTES = """\
inputs: {x: {dtype: float32, shape: [N, 4]}}
outputs: {y: b.y}
metadata: %s
nodes: {a: {kind: remote, url: "%s", inputs: {x: $inputs.x}}, b: {kind: remote, url: "%s", inputs: {x: a.y}}}
"""
NOBODY = "http://127.0.0.1:9"  # the port of discard, where nobody is


def test_remote_models_are_asked_what_they_take_and_give() -> None:
    model = opened(Model(kind="model"), "")
    with server_ref.running({"m": model}) as url:
        plan = plan_of(REMOTES % ("require", f"{url}/m", f"{url}/m"))
    assert str(plan.output_forms["y"]) == "float32 [?, 4]"


def test_remote_models_are_asked_at_the_same_time_and_each_once() -> None:
    import threading

    together = threading.Barrier(8, timeout=30)

    class Asked:
        def __init__(self) -> None:
            self.known: list[Any] = []

        @property
        def signature(self) -> Any:
            if not self.known:
                together.wait()
                self.known.append(FunctionServable(lambda **_: None, [], [parse_spec("y: int8 []")]).signature)
            return self.known[0]

    asked = {f"http://{number}": Asked() for number in range(8)}
    nodes = ", ".join(f'n{number}: {{kind: remote, url: "{url}"}}' for number, url in enumerate([*asked, *asked]))
    outputs = ", ".join(f"y{number}: n{number}" for number in range(16))
    plan_of(
        f"outputs: {{{outputs}}}\nnodes: {{{nodes}}}",
        open=lambda spec, file: asked[spec.url],
        identity=lambda spec, file: spec.url,
    )
    assert [len(one.known) for one in asked.values()] == [1] * 8


def test_a_remote_model_that_does_not_answer_is_a_fault_that_names_the_url_and_the_way_out() -> None:
    first, second = faults_of(REMOTES % ("require", NOBODY, NOBODY + "/b"), timeout_s=5.0)
    assert first.code == second.code == "E116"
    assert str(first).startswith("E116 g.yaml:4:12 node 'a' does not say what it takes and gives: ")
    assert NOBODY in first.text
    assert "`metadata: file:PATH` or `metadata: warn`" in first.text


def test_with_warn_a_remote_model_that_does_not_answer_gives_what_others_read_of_it() -> None:
    plan = plan_of(REMOTES % ("warn", NOBODY, NOBODY), timeout_s=5.0)
    assert {fault.code for fault in plan.warnings} == {"E116"}
    assert plan.nodes[0].outputs == {"y": UNKNOWN}
    assert plan.output_forms == {"y": UNKNOWN}
    fault = faults_of((REMOTES % ("warn", NOBODY, NOBODY)).replace("a.y", "a"), timeout_s=5.0)[-1]
    assert "node 'b' reads 'a', but its outputs are not known: expected 'a.NAME'" in str(fault)


def test_with_a_file_of_signatures_nobody_is_asked(tmp_path: FilePath) -> None:
    told = {"inputs": ["x: float32 [-1, 4]"], "outputs": [{"name": "y", "dtype": "float32", "shape": [-1, 4]}]}
    (tmp_path / "models.json").write_text(json.dumps({"a": told, "b": told}))
    path, text = str(tmp_path / "g.yaml"), REMOTES % ("file:models.json", NOBODY, NOBODY)
    plan = plan_of(text, path)
    assert str(plan.output_forms["y"]) == "float32 [?, 4]"
    step = plan.nodes[0].step
    assert isinstance(step, ModelStep)
    assert [spec.name for spec in step.servable.signature.inputs] == ["x"]
    (tmp_path / "models.json").write_text(json.dumps({"a": told}))
    assert "node 'b' does not say what it takes and gives: the metadata file has no 'b'" in the_fault(text, file=path)
    (tmp_path / "models.json").write_text('{"a": []}')
    fault = the_fault(text, file=path)
    assert fault.startswith(f"E116 {path}:3:11 cannot read signatures: expected JSON such as")
    (tmp_path / "models.json").unlink()
    assert "cannot read signatures: No such file or directory" in the_fault(text, file=path)


def test_a_model_that_cannot_be_opened_is_a_fault_with_the_reason() -> None:
    text = HEAD + "nodes: {b: {inputs: {x: $inputs.x}, file: nowhere.onnx}}"
    assert the_fault(text).startswith("E116 g.yaml:3:12 node 'b' cannot be opened: no such file 'nowhere.onnx'")


# --------------------------------------------------------------------------- whole documents

PICTURES, FACES, TOKENS = "float32 [-1, 3, 224, 224]", "float32 [-1, 64, 64, 3]", "int64 [-1, -1]"
MODELS = {
    "shop.pre:normalise": (["x: uint8 [-1, 224, 224, 3]"], [f"t: {PICTURES}"]),
    "http://gp-a:9000": ([f"input: {PICTURES}"], ["scores: float32 [-1, 4]"]),
    "b.onnx": ([f"data: {PICTURES}"], ["probs: float32 [-1, 4]"]),
    "c.pt2": ([f"x: {PICTURES}"], ["probs: float32 [-1, 4]"]),
    "saved/d": ([f"images: {PICTURES}"], ["probs: float32 [-1, 4]"]),
    "http://det:9000/face": (
        ["img: uint8 [-1, -1, 3]"],
        ["boxes: float32 [-1, 4]", "crops: float32 [-1, 1, 64, 64, 3]"],
    ),
    "age.onnx": ([f"x: {FACES}"], ["years: float32 [-1]"]),
    "http://gp-c:9000": ([f"x: {FACES}"], ["emotion: float32 [-1, 7]"]),
    "adult.onnx": ([f"x: {FACES}"], ["emotion: float32 [-1, 7]"]),
    "senior.yaml": ([f"face: {FACES}"], ["emotion: float32 [-1, 7]"]),
    "s1.onnx": ([f"ids: {TOKENS}"], ["proba: float32 [-1, 2]"]),
    "s2.pt2": ([f"input_ids: {TOKENS}"], ["proba: float32 [-1, 2]"]),
    "http://shadow:9000": ([f"ids: {TOKENS}"], ["proba: float32 [-1, 2]"]),
    "http://big:9000": ([f"ids: {TOKENS}"], ["proba: float32 [-1, 2]"]),
    "big-int8.onnx": ([f"ids: {TOKENS}"], ["proba: float32 [-1, 2]"]),
}


def described(spec: NodeSpec, file: str) -> Servable:
    assert isinstance(spec, ServableSpec)
    takes, gives = ([parse_spec(text) for text in side] for side in MODELS[spec.what])
    return FunctionServable(lambda **_: None, takes, gives)


def whole_plan_of(name: str) -> Plan:
    """The plan of a document of `ensemble_good`, whose models are those of `MODELS`."""
    path = FilePath(__file__).parent / "ensemble_good" / f"{name}.yaml"
    document, faults = parse(path.read_text("utf-8"), str(path))
    assert document is not None
    return build(document, faults, open=described)


def forms_of(plan: Plan) -> dict[str, str]:
    return {name: str(form) for name, form in plan.output_forms.items()}


def test_a_vote_of_five_kinds_is_a_plan() -> None:
    plan = whole_plan_of("tumour_vote")
    assert plan.warnings == ()
    assert [one.name for one in plan.nodes] == ["pre", "a", "b", "c", "d", "vote"]
    assert [wire.needed for wire in plan.nodes[-1].wires] == [False, True, False, False, False]
    assert forms_of(plan)["label"] == "int64 [N]"


def test_a_map_with_a_switch_in_its_body_is_a_plan() -> None:
    plan = whole_plan_of("faces")
    assert plan.warnings == ()
    assert forms_of(plan) == {"boxes": "float32 [?, 4]", "emotion": "float32 [?, ?, 7]"}
    body = plan.nodes[-1].children["body"]
    assert isinstance(body, Plan)
    route = body.nodes[-1]
    assert [one.name for one in body.nodes] == ["per_face/age", "per_face/route"]
    assert [*route.children] == ["child", "adult", "senior"]
    senior = route.children["senior"]
    assert isinstance(senior, PlanNode)
    assert senior.wires == (Wire("face", Source("inputs", "x")),)


def test_a_cascade_over_a_split_and_a_fallback_is_a_plan() -> None:
    plan = whole_plan_of("text_risk")
    assert plan.warnings == ()
    assert forms_of(plan) == {"proba": "float32 [N, 2]", "stage": "int64 [N]"}
    (decide,) = plan.nodes
    assert decide.wires[1] == Wire("small.$sticky", Source("inputs", "user"), (), False)
    assert [*decide.children] == ["small", "big"]
    small = decide.children["small"]
    assert isinstance(small, PlanNode)
    assert [*small.children] == ["v1", "v2", "v3"]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("timeout: soon", "'timeout' of node 'a': expected a length"),
        ("tiemout: 2s", "node 'a' has no key 'tiemout'; did you mean 'timeout'?"),
        ("colour: red", "node 'a' has no key 'colour'"),
        ("retry: {atempts: 2}", "'retry' of node 'a' has no key 'atempts'"),
        ("batching: {max_delay: 2ms}", "'batching' of node 'a' lacks 'max_size'"),
    ],
)
def test_a_node_is_checked_on_where_what_is_written_wrong_does_not_change_what_flows(written: str, words: str) -> None:
    text = "ensemble: 1\ninputs: {x: {dtype: float32, shape: [N, 4]}}\noutputs: {y: a.y}\nmetadata: warn\nnodes:\n"
    text += f"  a: {{kind: remote, url: 'http://127.0.0.1:1/', inputs: {{x: $inputs.z}}, {written}}}\n"
    document, faults = parse(text, "g.yaml")
    assert document is not None
    with pytest.raises(GraphFaults):
        build(document, faults, timeout_s=5.0)
    told = [fault for fault in faults.all if not fault.warning]
    assert [fault.code for fault in told] == ["E101", "E103"]
    assert words in told[0].text
    assert "there is no input 'z'" in told[1].text


def test_faults_of_writing_and_of_the_graph_are_told_together_and_none_follows_from_another() -> None:
    text = """\
ensemble: 1
inputs: {x: {dtype: float32, shape: [N, 4]}, z: {dtype: flaot32, shape: [N, 4]}}
outputs: {y: b.y, w: c.y, v: nix.v}
nodes:
  a: {kind: onyx, inputs: {x: $inputs.x}}
  b: {kind: fallback, try: [a, s1], inputs: {x: a.y, z: $inputs.z}}
  c: {kind: python, call: "shop.pre:normalise", inputs: {x: c.y}, outputs: {y: {dtype: float32, shape: [N]}}}
  s1: {kind: onnx, path: s1.onnx, outpts: 2}
"""
    document, faults = parse(text, "g.yaml")
    assert document is not None
    with pytest.raises(GraphFaults) as caught:
        build(document, faults, open=described)
    found = [(fault.code, fault.place.line) for fault in caught.value.faults]
    assert found == [("E101", 2), ("E103", 3), ("E101", 5), ("E104", 7), ("E101", 8)]
