"""Random graphs with random faults: the engine answers as `run_serial` does, or with an error that it has too."""

from __future__ import annotations

import os
import random
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from plans import node, plan, rows

from ensemble.ensemble import Ensemble
from ensemble.nodes.node import Default
from ensemble.plan import Plan
from ensemble.serial import run_serial
from ensemble.steps import Missing
from remote_ops.errors import InternalError, NodeError

Array = npt.NDArray[Any]


class Broken(InternalError):
    """A fault that was put there."""


def model(number: int, fault: str) -> Any:
    def fn(**inputs: Array) -> Array:
        if fault == "raises":
            raise Broken(f"n{number} is broken")
        total = np.float32(number)
        for array in inputs.values():
            total = total + array
        return total

    return fn


def random_plan(rng: random.Random) -> Plan:
    """Up to twelve nodes that read inputs and nodes before them; some fail, and some of these have a stand-in."""
    nodes = []
    for number in range(rng.randint(1, 12)):
        sources = ["$inputs.x", *[f"n{before}" for before in range(number)]]
        read = rng.sample(sources, rng.randint(1, min(3, len(sources))))
        fault = rng.choices(["none", "raises"], [0.93, 0.07])[0]
        on_error: Any = rng.choice(["fail", "skip", Default(default=0.5)])
        given = {f"i{index}": source for index, source in enumerate(read)}
        fn = model(number, fault)
        # a function of keywords does not say its inputs: the builder names them
        place = rng.choice(["inline", "inline", "thread", "loop"])
        nodes.append(node(f"n{number}", fn, given, place=place, on_error=on_error))
    outputs = {
        f"o{index}": f"n{number}"
        for index, number in enumerate(rng.sample(range(len(nodes)), rng.randint(1, len(nodes))))
    }
    return plan(*nodes, outputs=outputs)


def outcome_of(run: Any) -> Any:
    try:
        return run()
    except NodeError as error:
        return error


def same(plain: Any, found: Any) -> bool:
    """What the oracle found, or one of the errors that a run may meet first."""
    if isinstance(plain, NodeError) or any(isinstance(value, Missing) for value in plain.values()):
        return isinstance(found, NodeError)
    return not isinstance(found, NodeError) and all(np.array_equal(plain[name], found[name]) for name in plain)


def try_seeds(seeds: range) -> dict[str, int]:
    told = {"answers": 0, "errors": 0}
    for seed in seeds:
        rng = random.Random(seed)
        graph, x = random_plan(rng), rows(rng.randint(0, 3), seed)
        wanted = rng.sample([wire.name for wire in graph.outputs], rng.randint(1, len(graph.outputs)))
        with Ensemble(graph, threads=2) as ensemble:
            found = outcome_of(lambda: ensemble.infer({"x": x}, wanted))  # noqa: B023 (called at once)
        plain = outcome_of(lambda: run_serial(_only(graph, wanted), {"x": x}, wanted))  # noqa: B023
        assert same(plain, found), (seed, plain, found)
        told["errors" if isinstance(found, NodeError) else "answers"] += 1
    return told


def _only(graph: Plan, wanted: list[str]) -> Plan:
    """The plan without what the outputs wanted do not need: a fault there is not met."""
    import dataclasses

    from ensemble.route import route_of

    return dataclasses.replace(graph, nodes=route_of(graph, wanted).nodes)


def test_random_graphs_answer_as_the_oracle_does() -> None:
    told = try_seeds(range(500))
    assert min(told.values()) > 50


@pytest.mark.slow
def test_ten_thousand_random_graphs_answer_as_the_oracle_does_and_leave_nothing_behind() -> None:
    def held() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    try_seeds(range(10))
    before = held()
    told = try_seeds(range(1_000, 11_000))
    assert min(told.values()) > 1_000
    from rawpeer import until

    assert until(lambda: held() <= before)
