"""What does a graph cost beyond its models, and does it keep them busy? (figures q to w)

The bare twin is the same calls written out by hand with asyncio.
"""

from __future__ import annotations

import asyncio
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from graph_nodes import MOST, slow
from timing import ROOT, in_turn, median, row

import ensemble
import server_ref
from remote_ops import FunctionServable, TensorSpec, load

NODES, STUB_S = 50, 0.05
X, Y = TensorSpec("x", "float32", (-1, 4)), TensorSpec("y", "float32", (-1, 4))
ONE = np.ones((1, 4), np.float32)
HEAD = "ensemble: 1\nname: bench\ninputs: {x: {dtype: float32, shape: [N, M]}}\n"


class Stub:
    """A model elsewhere that takes a while: it is awaited, and costs this machine nothing."""

    signature = FunctionServable(lambda x: x, [X], [Y]).signature

    def __init__(self, lasts_s: float) -> None:
        self.lasts_s = lasts_s

    def infer(self, inputs: Any, outputs: Any = None, **_: Any) -> dict[str, Any]:
        time.sleep(self.lasts_s)
        return {"y": inputs["x"]}

    async def ainfer(self, inputs: Any, outputs: Any = None, **_: Any) -> dict[str, Any]:
        await asyncio.sleep(self.lasts_s)
        return {"y": inputs["x"]}


class Awaited:
    """Graphs of stubs, put together by hand: YAML has no kind for them."""

    def __init__(self, edges: dict[str, tuple[float, str | None]], last: list[str]) -> None:
        from ensemble.forms import Form
        from ensemble.nodes.node import NodeSpec
        from ensemble.plan import Plan, PlanInput, PlanNode, Source, Wire
        from ensemble.steps import ModelStep

        def wire(name: str, read: str | None) -> Wire:
            return Wire(name, Source("inputs", "x") if read is None else Source("node", read, "y"))

        form = Form("float32", ("N", 4))
        nodes = [
            PlanNode(name, NodeSpec(kind="stub"), ModelStep(Stub(lasts_s), {}, "loop"), (wire("x", read),), {"y": form})  # type: ignore[arg-type]
            for name, (lasts_s, read) in edges.items()
        ]
        outputs = tuple([wire(name, name) for name in last])
        forms = dict.fromkeys(last, form)
        self.graph = ensemble.Ensemble(Plan("bench", "", "0" * 64, {"x": PlanInput(form)}, outputs, forms, nodes))

    def __call__(self) -> None:
        self.graph.infer({"x": ONE})


def overhead() -> None:
    """A chain of 50 models that do nothing, for each way to run one."""
    model = FunctionServable(lambda x: x, [X], [Y])

    def by_hand() -> None:
        async def run() -> None:
            x = ONE
            for _ in range(NODES):
                x = model.infer({"x": x}, ("y",))["y"]

        asyncio.run_coroutine_threadsafe(run(), LOOP).result()

    def by_hand_in_threads() -> None:
        async def run() -> None:
            x = ONE
            for _ in range(NODES):
                x = (await LOOP.run_in_executor(POOL, model.infer, {"x": x}, ("y",)))["y"]

        asyncio.run_coroutine_threadsafe(run(), LOOP).result()

    for place, twin, aim in (("inline", by_hand, "40 us"), ("thread", by_hand_in_threads, "100 us")):
        nodes = "".join(
            f"  n{index}: {{kind: python, call: 'graph_nodes:same', run_in: {place}, inputs: {{x: {read}}}, "
            "outputs: {y: {dtype: float32, shape: [N, M]}}}\n"
            for index, read in enumerate(["$inputs.x", *[f"n{number}" for number in range(NODES - 1)]])
        )
        with ensemble.load(f"{HEAD}outputs: {{y: n{NODES - 1}}}\nnodes:\n{nodes}", file=__file__) as graph:
            plain, traced = partial(graph.infer, {"x": ONE}), partial(graph.run, {"x": ONE}, trace=True)
            bare_s, *ours = (median(times) / NODES for times in in_turn([twin, plain, traced], 100))
        for how, ours_s, most in (("", ours[0], aim), (", traced", ours[1], "100 us" if place == "inline" else "")):
            what = f"q  {place} node, in a chain of {NODES}{how}"
            row(what, f"{ours_s * 1e6:.1f} us", f"{bare_s * 1e6:.1f} us", ours_s / bare_s, most)


def critical_path() -> None:
    """Stubs side by side, and a diamond of which one arm waits early and the other late."""

    async def slept(*seconds: float) -> None:
        for one in seconds:
            await asyncio.sleep(one)

    def by_hand(*arms: tuple[float, ...]) -> Callable[[], None]:
        async def run() -> None:
            await asyncio.gather(*[slept(*arm) for arm in arms])

        return lambda: asyncio.run_coroutine_threadsafe(run(), LOOP).result()

    for count in (4, 16, 64):
        names = [f"n{index}" for index in range(count)]
        graph = Awaited(dict.fromkeys(names, (STUB_S, None)), names)
        _ratio(f"r  {count} calls of 50 ms / 50 ms", graph, by_hand(*[(STUB_S,)] * count), STUB_S)
    edges: dict[str, tuple[float, str | None]] = {
        "a": (0.01, None),
        "b": (0.2, "a"),
        "c": (0.1, None),
        "d": (0.01, "c"),
    }
    skewed = Awaited(edges, ["b", "d"])
    _ratio("s  skewed diamond (10+200 | 100+10 ms) / 210 ms", skewed, by_hand((0.01, 0.2), (0.1, 0.01)), 0.21)


def _ratio(what: str, graph: Awaited, twin: Callable[[], None], longest_s: float) -> None:
    bare_s, ours_s = (median(times) / longest_s for times in in_turn([twin, graph], 15))
    row(what, f"{ours_s:.3f}", f"{bare_s:.3f}", ours_s / bare_s, "1.05")
    graph.graph.close()


def memory() -> None:
    """A chain of 20 tensors of 64 MiB; and handing 100 MiB from node to node."""
    for count, megabytes, call in ((20, 64, "grown"), (20, 100, "same")):
        reads = ["$inputs.x", *[f"n{number}" for number in range(count - 1)]]
        nodes = "".join(
            f"  n{index}: {{kind: python, call: 'graph_nodes:{call}', inputs: {{x: {read}}}, "
            "outputs: {y: {dtype: float32, shape: [N, M]}}}\n"
            for index, read in enumerate(reads)
        )
        with ensemble.load(f"{HEAD}outputs: {{y: n{count - 1}}}\nnodes:\n{nodes}", file=__file__) as graph:
            x = np.ones((megabytes << 18, 1), np.float32)
            times = in_turn([lambda graph=graph, x=x: graph.infer({"x": x})], 5)[0]  # type: ignore[misc]
        if call == "grown":
            row(f"t  chain of {count} x {megabytes} MiB, most alive", f"{MOST[0]}", "1", float(MOST[0]), "3")
        else:
            row(
                f"u  handing {megabytes} MiB to the next node",
                f"{median(times) / count * 1e3:.3f} ms",
                "0 ms",
                0.0,
                "1 ms",
            )


def saturated() -> None:
    """As many runs at a time as there is room for, against the slowest member alone."""
    model = FunctionServable(slow, [X], [Y])
    gives = "outputs: {y: {dtype: float32, shape: [N, M]}}"
    nodes = (
        f"  a: {{kind: python, call: 'graph_nodes:same', inputs: {{x: $inputs.x}}, {gives}}}\n"
        f"  b: {{kind: python, call: 'graph_nodes:slow', inputs: {{x: a}}, {gives}}}\n"
    )
    with ensemble.load(f"{HEAD}outputs: {{y: b}}\nnodes:\n{nodes}", file=__file__, threads=16) as graph:

        def rate(call: Callable[[], Any], count: int = 200) -> float:
            since = time.perf_counter()
            list(POOL.map(lambda _: call(), range(count)))
            return count / (time.perf_counter() - since)

        rates = [(rate(lambda: model.infer({"x": ONE})), rate(lambda: graph.infer({"x": ONE}))) for _ in range(5)]
    bare, ours = (sorted(found)[2] for found in zip(*rates, strict=True))
    row("v  saturated graph / its slowest member, at least 0.95", f"{ours:.1f} /s", f"{bare:.1f} /s", ours / bare, "")


def reading() -> None:
    """The graph of `examples/05_ocr`, two of its models behind a server, against the package they come from."""
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        print(f"w  left out: {error}")
        return
    folder = ROOT / "examples" / "05_ocr"
    sys.path.insert(0, str(folder))
    example: Any = runpy.run_path(str(folder / "__main__.py"), run_name="example")
    import stages

    models = {"detection": stages.DETECTION, "recognition": stages.RECOGNITION}
    package, served = RapidOCR(), {name: load(path, threads=os.cpu_count()) for name, path in models.items()}
    with server_ref.running(served) as url:
        graph = example["GRAPH"].read_text("utf-8").replace("http://127.0.0.1:9000/", url)
        ocr = ensemble.load(graph, file=str(example["GRAPH"]))
        for name, picture in (("rendered", example["rendered"]()), ("scan", example["scanned"]())):
            runs = [lambda picture=picture: package(picture), lambda picture=picture: ocr.infer({"picture": picture})]
            in_turn(runs, 2)
            bare_s, ours_s = (median(times) for times in in_turn(runs, 15))
            row(f"w  reading '{name}', as a graph with a server / the package", f"{ours_s * 1e3:.0f} ms",
                f"{bare_s * 1e3:.0f} ms", ours_s / bare_s, "1.10")  # fmt: skip


LOOP = asyncio.new_event_loop()
POOL = ThreadPoolExecutor(16)


def main() -> None:
    """Print figures q to w."""
    threading.Thread(target=LOOP.run_forever, daemon=True).start()
    overhead()
    critical_path()
    memory()
    saturated()
    reading()


if __name__ == "__main__":
    main()
