"""Pictures of graphs: what is in them, that text meets nothing, and that Mermaid can read what is written for it."""

from __future__ import annotations

import json
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from plans import ROWS, node, plan

import ensemble
from ensemble.diagram import diagram_of
from ensemble.forms import Form
from ensemble.latency import Latency, chrome, latencies_in, table
from ensemble.layers import Size, place
from ensemble.mermaid import mermaid
from ensemble.plan import Plan, PlanInput
from ensemble.plot import plot
from ensemble.trace import Span, Trace
from remote_ops import FunctionServable, TensorSpec
from remote_ops.errors import SpecError
from remote_ops.telemetry import Record

Array = npt.NDArray[Any]
SVG = "{http://www.w3.org/2000/svg}"

IMAGES = TensorSpec("x", "float32", (-1, 8, 8, 3))
SCORES = TensorSpec("probs", "float32", (-1, 4))


def scores(x: Array) -> Array:
    return np.full((len(x), 4), 0.25, np.float32)


def detected(img: Array) -> tuple[Array, Array]:
    return np.zeros((2, 4), np.float32), np.zeros((2, 1, 8, 8, 3), np.float32)


model = FunctionServable(scores, [IMAGES], [SCORES])
years = FunctionServable(lambda x: x.mean((1, 2, 3)), [IMAGES], [TensorSpec("years", "float32", (-1,))])
detect = FunctionServable(
    detected,
    [TensorSpec("img", "uint8", (-1, -1, 3))],
    [TensorSpec("boxes", "float32", (-1, 4)), TensorSpec("crops", "float32", (-1, 1, 8, 8, 3))],
)
risk = FunctionServable(
    lambda ids: np.full((len(ids), 2), 0.5, np.float32),
    [TensorSpec("ids", "int64", (-1, -1))],
    [TensorSpec("proba", "float32", (-1, 2))],
)

# The three examples of the documentation, with models of this process.
VOTE = """\
ensemble: 1
name: tumour_vote
inputs:
  image: {dtype: float32, shape: [N, 8, 8, 3]}
  prior: {dtype: float32, shape: [N, 4], optional: true, default: 0.25}
outputs: {label: vote.label, proba: vote.proba}
nodes:
  a: {kind: python, call: test_ensemble_plot:model, inputs: {x: $inputs.image}, outputs: {logits: probs}}
  b: {kind: python, call: test_ensemble_plot:model, inputs: {x: $inputs.image}}
  c: {kind: python, call: test_ensemble_plot:model, inputs: [$inputs.image], on_error: skip}
  vote:
    kind: combine
    method: soft_vote
    inputs: {a: {from: a.logits, apply: softmax}, b: b.probs, c: c.probs, prior: $inputs.prior}
    quorum: {min: 2, grace: 20ms, required: [b]}
"""
FACES = """\
ensemble: 1
name: faces
inputs: {frame: {dtype: uint8, shape: [H, W, 3]}}
outputs: {boxes: detect.boxes, emotion: per_face.emotion}
nodes:
  detect: {kind: python, call: test_ensemble_plot:detect, inputs: {img: $inputs.frame}}
  per_face:
    kind: map
    over: {crop: detect.crops}
    chunk: 16
    body:
      nodes:
        age: {kind: python, call: test_ensemble_plot:years, inputs: {x: $item.crop}}
        route: {kind: switch, scope: row, select: age.years, default: senior, inputs: {x: $item.crop},
                cases: [{if: "< 13", use: child}, {if: "< 65", use: adult}]}
        child: {kind: python, call: test_ensemble_plot:model}
        adult: {kind: python, call: test_ensemble_plot:model}
        senior: {kind: python, call: test_ensemble_plot:model}
      outputs: {emotion: route.probs}
"""
RISK = """\
ensemble: 1
name: text_risk
inputs: {tokens: {dtype: int64, shape: [N, S]}, user: {dtype: string, shape: [N], optional: true}}
outputs: {proba: decide.proba, stage: decide.stage_used}
nodes:
  small: {kind: split, weights: {v1: 90, v2: 10}, sticky: $inputs.user, mirror: {to: v3, sample: 20%}}
  v1: {kind: python, call: test_ensemble_plot:risk}
  v2: {kind: python, call: test_ensemble_plot:risk}
  v3: {kind: python, call: test_ensemble_plot:risk}
  big: {kind: fallback, try: [gpu, cpu]}
  gpu: {kind: python, call: test_ensemble_plot:risk}
  cpu: {kind: python, call: test_ensemble_plot:risk}
  decide:
    kind: cascade
    rows: N
    inputs: {ids: $inputs.tokens}
    stages:
      - {use: small, accept: {score: max_prob, tensor: proba, gte: 0.9}, cost: 1}
      - {use: big, cost: 40}
"""
EXAMPLES = {"vote": VOTE, "faces": FACES, "risk": RISK}


@pytest.fixture(params=EXAMPLES, scope="module")
def example(request: pytest.FixtureRequest) -> Iterator[Plan]:
    with ensemble.load(EXAMPLES[request.param], file=f"{request.param}.yaml") as graph:
        yield graph.plan


def planned(name: str) -> Plan:
    with ensemble.load(EXAMPLES[name], file=f"{name}.yaml") as graph:
        return graph.plan


# --------------------------------------------------------------------------- Mermaid

NODE = re.compile(r"(n\d+)(\(\[|>|\(|\[\[|\{\{|\{|\[/|\[\\|\[)\"([^\"]*)\"(\]\)|\]|\)|\]\]|\}\}|\}|\\\]|/\])(:::\w+)")
ARROW = re.compile(r"(n\d+) (-->|-\.->)(?:\|\"([^\"]+)\"\|)? (n\d+)")


class Read(NamedTuple):
    """What stands in Mermaid text, and in which subgraph each node is."""

    labels: dict[str, str]
    arrows: list[tuple[str, str, str]]
    within: dict[str, str]
    dashed: set[str]


def read(text: str) -> Read:
    """Read Mermaid text, of which every line must be one that is understood."""
    lines = text.splitlines()
    assert lines[0] == "flowchart TB"
    found = Read({}, [], {}, set())
    around: list[str] = []
    for line in map(str.strip, lines[1:]):
        if opened := re.fullmatch(r"subgraph n\d+s\[\"([^\"]+)\"\]", line):
            around.append(opened[1])
        elif line == "end":
            around.pop()
        elif shape := NODE.fullmatch(line):
            found.labels[shape[1]] = shape[3]
            found.within[shape[3].partition("<br/>")[0]] = "/".join(around)
        elif arrow := ARROW.fullmatch(line):
            found.arrows.append((arrow[1], arrow[3] or "", arrow[4]))
        elif dashed := re.fullmatch(r"class ([n\d,]+) maybe", line):
            found.dashed.update(dashed[1].split(","))
        else:
            assert re.fullmatch(r"classDef \w+ [\w:#,\- ]+", line), line
    assert not around
    return found


def test_mermaid_text_is_well_formed_and_its_arrows_lead_between_nodes(example: Plan) -> None:
    found = read(plot(example))
    assert {end for source, _, target in found.arrows for end in (source, target)} <= set(found.labels)
    assert len(found.labels) == sum(1 for _ in boxes_of(diagram_of(example).boxes))


def boxes_of(boxes: Sequence[Any]) -> Iterator[Any]:
    for box in boxes:
        yield box
        yield from boxes_of(box.inside.boxes if box.inside else ())


def test_arrows_say_name_dtype_and_shape_and_what_is_done_on_the_way() -> None:
    found = read(plot(planned("vote")))
    labels = {label for _, label, _ in found.arrows}
    assert {"float32 [N, 8, 8, 3]", "label: int64 [N]"} <= labels
    (applied,) = [label for label in labels if label.startswith("logits: float32")]
    assert applied.endswith("<br/>softmax")


def test_owned_nodes_are_dashed_in_the_subgraph_of_their_owner() -> None:
    found = read(plot(planned("risk")))
    assert found.within["v1 (python)"] == "decide/small"
    assert found.within["cpu (python)"] == "decide/big"
    dashed = {found.labels[one].partition(" ")[0] for one in found.dashed}
    assert dashed == {"small", "v1", "v2", "v3", "big", "gpu", "cpu", "user"}
    roles = {found.labels[target].partition(" ")[0]: label for _, label, target in found.arrows}
    assert roles["v1"] == "90 %"
    assert roles["v3"] == "mirror, 20 %"
    assert roles["small"] == "stage 1, cost 1, until max_prob #62;= 0.9"
    assert roles["gpu"] == "try 1"


def test_the_body_of_a_map_is_a_subgraph_of_its_own_inputs_nodes_and_outputs() -> None:
    found = read(plot(planned("faces")))
    assert found.within["age (python)"] == found.within["crop"] == "per_face"
    assert found.within["child (python)"] == "per_face/route"
    assert {label for _, label, _ in found.arrows} >= {"if #60; 13", "if #60; 65", "default"}


def test_symbols_that_nobody_wrote_are_not_shown(example: Plan) -> None:
    assert (
        re.findall(r"\[[^\]]*\.[^\]]*\]", re.sub(r"classDef.*", "", plot(example, "svg").partition("</style>")[2]))
        == []
    )


def test_what_mermaid_would_read_in_a_label_is_an_entity() -> None:
    odd = plan(node('say "hi" <b>#1; & `x`', lambda x: x), outputs={"y": 'say "hi" <b>#1; & `x`.y'})
    (label,) = [label for label in read(plot(odd)).labels.values() if label.startswith("say")]
    assert label.startswith("say #34;hi#34; #60;b#62;#35;1; #38; #96;x#96;")


def test_inputs_that_may_be_missing_are_dashed_and_say_what_stands_in() -> None:
    graph = plan(
        node("sum", lambda a, b: a + b, {"a": "$inputs.a", "b": "$inputs.b"}),
        inputs={"a": ROWS, "b": PlanInput(ROWS, optional=True, default=0.5)},
    )
    found = read(plot(graph))
    (optional,) = found.dashed
    assert found.labels[optional] == "b<br/>default 0.5"


# --------------------------------------------------------------------------- SVG


class Rectangle(NamedTuple):
    """What a box or a text covers."""

    what: str
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Rectangle, slack: float = 0.1) -> bool:
        return (
            self.left < other.right - slack
            and other.left < self.right - slack
            and self.top < other.bottom - slack
            and other.top < self.bottom - slack
        )

    def holds(self, other: Rectangle) -> bool:
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.right <= self.right
            and other.bottom <= self.bottom
        )


class Picture(NamedTuple):
    """What there is in an SVG."""

    boxes: list[Rectangle]
    texts: list[Rectangle]
    points: list[tuple[float, float]]  # on the arrows
    size: Rectangle


def picture_of(text: str) -> Picture:
    root = ET.fromstring(text)
    boxes, texts = [], []
    points: list[tuple[float, float]] = []
    for element in root.iter():
        css = (element.get("class") or "").split()
        if "box" in css:
            x, y, width, height = (float(element.get(key) or 0) for key in ("x", "y", "width", "height"))
            boxes.append(Rectangle(element.get("class") or "", x, y, x + width, y + height))
        elif element.tag == f"{SVG}text":
            size = 13.0 if "title" in css else 11.0
            x, y, half = (
                float(element.get("x") or 0),
                float(element.get("y") or 0),
                len(element.text or "") * size * 0.301,
            )
            texts.append(Rectangle(element.text or "", x - half, y - 0.75 * size, x + half, y + 0.2 * size))
        elif "way" in css:
            points += on_path(element.get("d") or "")
    width, height = (float(root.get(key) or 0) for key in ("width", "height"))
    return Picture(boxes, texts, points, Rectangle("paper", 0, 0, width, height))


def on_path(path: str) -> Iterator[tuple[float, float]]:
    """Points on a path of M, V and C, a hundred to a bend."""
    x = y = 0.0
    for letter, rest in re.findall(r"([MVC])([^MVC]*)", path):
        numbers = [float(number) for number in rest.split()]
        if letter == "M":
            x, y = numbers
        elif letter == "V":
            yield from ((x, y + (numbers[0] - y) * part / 100) for part in range(101))
            y = numbers[0]
        else:
            ends = np.array([(x, y), *zip(numbers[::2], numbers[1::2], strict=True)])
            for part in np.linspace(0, 1, 101):
                weights = [(1 - part) ** 3, 3 * part * (1 - part) ** 2, 3 * part**2 * (1 - part), part**3]
                across, down = weights @ ends
                yield float(across), float(down)
            x, y = numbers[-2:]


def assert_is_tidy(found: Picture) -> None:
    """Boxes lie apart or in one another, text is in one place alone, and no arrow passes through either."""
    for one, other in combinations(found.boxes, 2):
        assert not one.meets(other) or one.holds(other) or other.holds(one), (one, other)
    for text, other in combinations(found.texts, 2):
        assert not text.meets(other), (text, other)
    for text in found.texts:
        assert found.size.holds(text), text
        for box in found.boxes:
            assert not text.meets(box) or box.holds(text), (text, box)
        assert not [point for point in found.points if is_in(point, text)], text
    plain = [box for box in found.boxes if "around" not in box.what]
    for box in plain:
        assert not [point for point in found.points if is_in(point, box, 1.0)], box


def is_in(point: tuple[float, float], one: Rectangle, slack: float = 0.0) -> bool:
    return one.left + slack < point[0] < one.right - slack and one.top + slack < point[1] < one.bottom - slack


def test_text_meets_neither_text_nor_boxes_nor_arrows(example: Plan) -> None:
    assert_is_tidy(picture_of(plot(example, "svg")))


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_are_drawn_without_overlaps(seed: int) -> None:
    rng = random.Random(seed)
    nodes = []
    for number in range(rng.randint(1, 25)):
        sources = ["$inputs.x", *[f"n{before}" for before in range(number)]]
        read_ones = rng.sample(sources, rng.randint(1, min(4, len(sources))))
        given = {f"i{index}": source for index, source in enumerate(read_ones)}
        nodes.append(node(f"n{number}", lambda **_: None, given))
    assert_is_tidy(picture_of(plot(plan(*nodes, outputs={"y": nodes[-1].name, "z": "n0"}), "svg")))


def test_an_svg_is_one_file_for_light_and_dark_screens(example: Plan) -> None:
    text = plot(example, "svg")
    root = ET.fromstring(text)
    assert root.findtext(f"{SVG}title") == example.name
    assert "prefers-color-scheme: dark" in text
    assert "href" not in text
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in text.partition("</style>")[0].split("@media")
    )
    assert light.keys() == dark.keys()
    for colours in (light, dark):
        for ink in ("ink", "soft"):
            for paper in ("paper", "ends", "far", "own", "decides"):
                assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)


def contrast(one: str, other: str) -> float:
    """How well two colours are told apart: 4.5 is what WCAG 2 asks of text."""
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_what_a_node_owns_is_drawn_in_its_box() -> None:
    found = picture_of(plot(planned("risk"), "svg"))
    (decide,) = [box for box in found.boxes if "around" in box.what and "maybe" not in box.what]
    titles = {text.what for text in found.texts if decide.holds(text)}
    assert {"decide", "small", "v1", "v2", "v3", "big", "gpu", "cpu"} <= titles
    assert not {"tokens", "user", "stage"} & titles


def test_letters_of_east_asia_have_room() -> None:
    name = "画像の分類器"
    narrow, wide = (
        picture_of(plot(plan(node("n", lambda x: x), inputs={one: ROWS, "x": ROWS}), "svg")) for one in ("abcdef", name)
    )
    assert max(box.right - box.left for box in wide.boxes) > max(box.right - box.left for box in narrow.boxes)


def test_an_empty_graph_and_one_node_are_drawn() -> None:
    alone = plan(node("n", lambda: None, {}, outputs={"y": Form(None, None)}), inputs={})
    assert_is_tidy(picture_of(plot(alone, "svg")))
    assert mermaid(diagram_of(alone)).count("-->") == 1


def test_a_long_chain_is_placed_without_recursion() -> None:
    placed = place([Size(80.0, 40.0)] * 2000, pairwise(range(2000)))
    assert {x for x, _ in placed.centres} == {40.0}


@pytest.mark.parametrize("seed", range(5))
def test_layers_go_down_along_every_arrow(seed: int) -> None:
    rng = random.Random(seed)
    arrows = [(rng.randrange(target), target) for target in range(1, 60) for _ in range(2)]
    placed = place([Size(rng.uniform(20, 200), rng.uniform(20, 60)) for _ in range(60)], arrows)
    for source, target in arrows:
        assert placed.centres[source][1] < placed.centres[target][1]
        downs = [round(y, 6) for _, y in placed.ways[source, target]]
        assert downs == sorted(downs)


# --------------------------------------------------------------------------- how long it took


def traced(*spans: Span, began: float = 100.0, took_s: float = 0.1) -> Trace:
    trace = Trace("graph", "d1ge57", began)
    trace.ended = began + took_s
    trace.spans += spans
    return trace


def span(name: str, began: float, took_s: float, **more: Any) -> Span:
    return Span(name, "python", began - 0.001, began, began + took_s, 2048, 5 << 20, **more)


def test_the_last_latencies_are_written_into_the_boxes(tmp_path: Any) -> None:
    trace = traced(span("a", 100.0, 0.02), *[span("m/b", 100.02 + at / 100, 0.01) for at in range(3)])
    (tmp_path / "t.json").write_text(chrome([("one", trace)]))
    latencies, digest = latencies_in(str(tmp_path / "t.json"))
    assert digest == "d1ge57"
    assert {name: (found.calls, round(found.median_ms, 3)) for name, found in latencies.items()} == {
        "a": (1, 20.0),
        "m/b": (3, 10.0),
    }
    drawn = plot(plan(node("a", lambda x: x)), "svg", latencies)
    assert "20.0 ms" in drawn


def test_the_latency_of_a_node_in_a_body_is_found() -> None:
    drawn = plot(planned("faces"), "svg", {"per_face/route/senior": Latency(12, 3.25)})
    assert "3.25 ms, 12 calls" in drawn


def test_the_traces_of_runs_call_nodes_as_pictures_do() -> None:
    with ensemble.load(FACES, file="faces.yaml") as graph:
        trace = graph.run({"frame": np.zeros((4, 4, 3), np.uint8)}, trace=True).trace
    assert trace is not None
    names = {span.node for span in trace.spans}
    assert names == {"detect", "per_face", "per_face/age", "per_face/route", "per_face/route/child"}
    assert names <= {box.key for box in boxes_of(diagram_of(graph.plan).boxes)}


def test_many_runs_are_one_trace_with_a_process_for_each() -> None:
    first, second = traced(span("a", 100.0, 0.01)), traced(span("a", 101.0, 0.01), began=101.0)
    told = json.loads(chrome([("x.png", first), ("y.png", second)]))
    names = {event["pid"]: event["args"]["name"] for event in told["traceEvents"] if event["name"] == "process_name"}
    assert names == {1: "x.png", 2: "y.png"}
    starts = [event["ts"] for event in told["traceEvents"] if event["ph"] == "X" and event["name"] == "a"]
    assert starts == pytest.approx([0.0, 1e6])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": [1], "otherData": {"digest": ""}}'])
def test_a_file_that_is_no_trace_is_told_in_one_line(tmp_path: Any, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(SpecError, match="expected a trace"):
        latencies_in(str(tmp_path / "t.json"))
    with pytest.raises(SpecError, match="cannot read the trace: No such file"):
        latencies_in(str(tmp_path / "none.json"))


def test_the_table_has_the_median_over_runs_of_what_each_node_did_in_them() -> None:
    sent = Record("http://h/", 1, "ok", 100.0, 0.03, 9, 9, waiting_s=0.02)
    runs = [
        traced(span("a", 100.0, took_s), *[span("a/b", 100.0, 0.002)] * calls, span("far", 100.5, 0.1, sent=(sent,)))
        for took_s, calls in ((0.01, 1), (0.03, 3), (0.02, 5))
    ]
    head, a, b, far, took, way = table(runs).splitlines()
    assert head.split() == ["node", "kind", "calls", "queue", "ms", "compute", "ms", "network", "ms", "in", "out"]
    assert a.split() == ["a", "python", "1", "1.00", "20.0", "0.00", "2.0", "KiB", "5.0", "MiB"]
    assert b.split() == ["a/b", "python", "3", "3.00", "6.00", "0.00", "6.0", "KiB", "15.0", "MiB"]
    assert far.split()[2:6] == ["1", "71.0", "20.0", "10.0"]
    assert took == "a run took 100 ms, the median of 3"
    assert way == "longest way: a -> far"


def test_the_table_says_what_failed() -> None:
    assert table([traced(span("a", 100.0, 0.01, outcome="InternalError"))]).splitlines()[1].endswith("1 failed")
    assert table([traced(span("a", 100.0, 0.01, outcome="left out"))]).splitlines()[1].endswith("MiB  1 left out")
