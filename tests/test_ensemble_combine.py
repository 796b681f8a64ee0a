"""Members that become one: the numbers and gradients of every method, and what is said of those that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.stats
import torch
from pydantic import ValidationError
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import VotingClassifier

from ensemble.faults import Fault, FaultList, GraphFaults
from ensemble.forms import UNKNOWN, Form, Symbols
from ensemble.graph import build
from ensemble.nodes.combine import CombineSpec
from ensemble.plan import Plan
from ensemble.spec import parse
from ensemble.steps import Missing
from remote_ops.errors import InternalError, InvalidRequest, ModelUnavailable, NotDifferentiable, SignatureError

RNG = np.random.default_rng(7)
GONE = Missing("gone", "no answer")


class Alone:
    """What a graph of one node answers while that is checked."""

    path = ("nodes", "vote")

    def __init__(self, file: str = "g.yaml") -> None:
        self.file = file
        self.faults = FaultList(file, {})
        self.symbols = Symbols()

    def source(self, name: str | int) -> str:
        return f"{name}.out"

    def resolve(self, form: Form) -> Form:
        return self.symbols.form(form)

    def equal(self, left: Form, left_by: str, right: Form, right_by: str, code: str, path: Any) -> Form:
        if left.dims is None or right.dims is None:
            return left._replace(dtype=left.dtype or right.dtype, dims=left.dims or right.dims)
        if len(left.dims) != len(right.dims):
            self.faults.add(code, path, f"{left_by} is {left}, {right_by} is {right}")
            return left
        for clash in self.symbols.unify(left.dims, left_by, right.dims, right_by):
            self.faults.add(code, path, f"{clash.symbol or clash.axis} {clash.left} {clash.right} {left_by} {right_by}")
        dims = tuple([one if one is not None else other for one, other in zip(left.dims, right.dims, strict=True)])
        return self.resolve(Form(left.dtype or right.dtype, dims))


def spec_of(method: str, members: Any = "abc", **keys: Any) -> CombineSpec:
    inputs = {name: f"{name}.out" for name in members} if isinstance(members, str) else members
    return CombineSpec.model_validate({"kind": "combine", "method": method, "inputs": inputs, **keys})


def checked(spec: CombineSpec, *forms: Form, file: str = "g.yaml") -> tuple[Mapping[str, Form], list[Fault]]:
    """The outputs of a spec whose members have these forms, and the faults."""
    scope = Alone(file)
    outputs = spec.forms({edge.name: form for edge, form in zip(spec.edges(), forms, strict=True)}, scope)  # type: ignore[arg-type]
    return outputs, scope.faults.all


def combined(method: str, arrays: Any, *wanted: str, file: str = "g.yaml", **keys: Any) -> Any:
    """Check and run a combination; its outputs have the forms that were told."""
    arrays = arrays if isinstance(arrays, dict) else dict(zip("abcdefghijklmnopqrstuvwxyz", arrays, strict=False))
    spec = spec_of(method, "".join(arrays), **keys)
    there = [array for array in arrays.values() if not isinstance(array, Missing)]
    form = Form("string" if there[0].dtype == object else str(there[0].dtype), there[0].shape)
    told, faults = checked(spec, *([form] * len(arrays)), file=file)
    assert faults == []
    wanted = wanted or tuple(told)
    given = spec.step(Alone(file)).run(arrays, wanted)  # type: ignore[union-attr, arg-type]
    for name in wanted:
        assert told[name].dtype == ("string" if given[name].dtype == object else str(given[name].dtype))
        assert method == "concat" or told[name].dims == given[name].shape
    return given if len(wanted) > 1 else given[wanted[0]]


class Fixed(ClassifierMixin, BaseEstimator):
    """A classifier of scikit-learn that predicts what it is told."""

    def __init__(self, proba: Any = None, labels: Any = None) -> None:
        self.proba = proba
        self.labels = labels

    def fit(self, x: Any, y: Any) -> Fixed:
        self.classes_ = np.unique(y)
        return self

    def predict_proba(self, x: Any) -> Any:
        return self.proba

    def predict(self, x: Any) -> Any:
        return self.labels


def sklearn_vote(voting: str, members: list[Any], weights: list[float] | None, classes: int) -> VotingClassifier:
    """A fitted VotingClassifier of members that give these arrays; None for one that is dropped."""
    key = "proba" if voting == "soft" else "labels"
    named = [(str(i), "drop" if one is None else Fixed(**{key: one})) for i, one in enumerate(members)]
    vote = VotingClassifier(named, voting=voting, weights=weights)
    return vote.fit(np.zeros((classes, 1)), np.arange(classes))


WEIGHTS = [None, [2, 1, 1, 0.5, 3], [0.1, 0.7, 0.1, 0, 0.3], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("dropped", [None, 0, 3])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_soft_vote_is_that_of_scikit_learn_bit_by_bit(dtype: str, weights: Any, dropped: int | None) -> None:
    for rows in (1, 7, 64):
        probas = list(RNG.dirichlet(np.ones(4), (5, rows)).astype(dtype))
        probas[1][0] = probas[0][0] = [0.25, 0.25, 0.25, 0.25]
        members = [None if place == dropped else proba for place, proba in enumerate(probas)]
        oracle = sklearn_vote("soft", members, weights, 4)
        keys = {} if weights is None else {"weights": dict(zip("abcde", weights, strict=True))}
        given = combined("soft_vote", [GONE if one is None else one for one in members], quorum={"min": 4}, **keys)
        wanted = oracle.predict_proba(np.zeros((rows, 1)))
        assert given["proba"].dtype == wanted.dtype
        assert np.array_equal(given["proba"], wanted)
        assert np.array_equal(given["label"], oracle.predict(np.zeros((rows, 1))))


@pytest.mark.parametrize("dropped", [None, 0, 3])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_a_hard_vote_is_that_of_scikit_learn(weights: Any, dropped: int | None) -> None:
    labels = RNG.integers(0, 4, (5, 500))
    members = [None if place == dropped else one for place, one in enumerate(labels)]
    oracle = sklearn_vote("hard", members, weights, 4)
    keys = {} if weights is None else {"weights": dict(zip("abcde", weights, strict=True))}
    given = combined("hard_vote", [GONE if one is None else one for one in members], quorum={"min": 4}, **keys)
    assert np.array_equal(given, oracle.predict(np.zeros((500, 1))))


def test_equal_votes_go_to_the_lowest_label() -> None:
    assert combined("hard_vote", np.array([[3], [1], [1], [3]])).tolist() == [1]
    assert combined("hard_vote", np.array([[3], [1]]), weights={"a": 1.5}).tolist() == [3]
    proba = np.array([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]], np.float32)
    assert combined("soft_vote", [proba[:1], proba[1:]], "label").tolist() == [0]


def test_labels_may_be_large_or_names() -> None:
    assert combined("hard_vote", np.array([[2**40], [2**40], [5]])).tolist() == [2**40]
    names = [np.array([one], object) for one in ("dog", b"cat", "cat")]
    given = combined("hard_vote", names, labels=["dog", "cat"])
    assert given["label"].tolist() == ["cat"]
    assert given["votes"].tolist() == [[1, 2]]
    assert combined("hard_vote", names[:2], "label", labels=["dog", "cat"]).tolist() == ["dog"]


def test_votes_are_given_where_the_classes_are_known() -> None:
    given = combined("hard_vote", np.array([[0, 2], [2, 2], [1, 0]]), labels=3, weights={"c": 0.5})
    assert given["votes"].tolist() == [[1, 0.5, 1], [0.5, 0, 2]]
    assert np.array_equal(given["votes"].argmax(-1), given["label"])


@pytest.mark.parametrize(("labels", "words"), [(None, "0 or more, got -1"), (2, "from 0 to 1, got -1")])
def test_a_label_that_is_none_is_refused(labels: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        combined("hard_vote", np.array([[0], [-1]]), **({} if labels is None else {"labels": labels}))
    with pytest.raises(InvalidRequest, match=r"expected labels dog, cat, got 'cow'"):
        combined("hard_vote", [np.array(["cow"], object)], labels=["dog", "cat"])


def shared(weights: Any, shape: tuple[int, ...]) -> Any:
    """Weights of members, as scipy wants them."""
    return None if weights is None else np.broadcast_to(weights.reshape(-1, 1, 1), shape)


@pytest.mark.parametrize("weights", [None, np.arange(1, 51) / 7])
def test_a_geometric_mean_does_not_underflow(weights: Any) -> None:
    arrays = {f"m{place}": RNG.uniform(0.5e-12, 2e-12, (3, 4)) for place in range(50)}
    keys = {} if weights is None else {"weights": dict(zip(arrays, weights, strict=True))}
    spec = CombineSpec.model_validate(
        {"kind": "combine", "method": "gmean", "inputs": {name: f"{name}.p" for name in arrays}, **keys}
    )
    wanted = scipy.stats.gmean(stacked := np.array([*arrays.values()]), weights=shared(weights, stacked.shape))
    given = spec.step(Alone()).run(arrays, ["value"])["value"]  # type: ignore[union-attr, arg-type]
    np.testing.assert_allclose(given, wanted, rtol=1e-12)
    narrow = {name: array.astype(np.float32) for name, array in arrays.items()}
    given = spec.step(Alone()).run(narrow, ["value"])["value"]  # type: ignore[union-attr, arg-type]
    np.testing.assert_allclose(given, wanted, rtol=1e-6)
    assert given.dtype == (np.float32 if weights is None else np.float64)


def test_a_geometric_mean_with_a_zero_is_zero_and_warns_of_nothing() -> None:
    assert combined("gmean", np.array([[0.0, 4.0], [1.0, 1.0]])).tolist() == [0, 2]


@pytest.mark.parametrize("weights", [None, [2.0, 1.0, 0.5]])
def test_ranks_are_those_of_scipy(weights: Any) -> None:
    scores = RNG.integers(0, 20, (3, 50)).astype(np.float32)
    keys = {} if weights is None else {"weights": dict(zip("abc", weights, strict=True))}
    ranks = [scipy.stats.rankdata(one) for one in scores]
    assert np.array_equal(combined("rank", scores, **keys), np.average(ranks, axis=0, weights=weights))
    columns = RNG.integers(0, 5, (2, 3, 4, 5))
    for axis in (0, 1, -1):
        wanted = np.mean([scipy.stats.rankdata(one, axis=axis) for one in columns], 0)
        assert np.array_equal(combined("rank", columns, axis=axis), wanted)


def test_the_rank_of_nan_is_nan_as_of_scipy() -> None:
    scores = np.array([[1, np.nan, 2], [3, 2, 1]]).T.copy()
    assert np.array_equal(combined("rank", [scores]), scipy.stats.rankdata(scores, axis=0), equal_nan=True)


@pytest.mark.parametrize("form", ["list", "file", "each"])
def test_ranks_among_a_reference_are_those_of_scipy(form: str, tmp_path: Path) -> None:
    reference = RNG.integers(0, 10, 30).astype(np.float64)
    np.save(tmp_path / "scores.npy", reference)
    given: Any = {"list": reference.tolist(), "file": "scores.npy", "each": {"a": "scores.npy", "b": [1.0] * 30}}[form]
    x = RNG.integers(-1, 11, 8).astype(np.float32)
    ranks = combined("rank", {"a": x, "b": GONE}, reference=given, file=str(tmp_path / "g.yaml"), quorum={"min": 1})
    assert ranks.tolist() == [scipy.stats.rankdata([*reference, one])[-1] for one in x]
    assert combined("rank", [x[:1]], reference=reference.tolist()).shape == (1,)
    second = combined("rank", {"a": GONE, "b": np.array([1.0])}, reference={"a": [0.0], "b": [2.0]}, quorum={"min": 1})
    assert second.tolist() == [1]


def test_the_rank_of_one_row_is_refused() -> None:
    _, faults = checked(spec_of("rank", "a"), Form("float32", (1,)))
    assert [(fault.code, "reference" in fault.text) for fault in faults] == [("E112", True)]
    with pytest.raises(InvalidRequest, match="expected 2 rows or more, got 1; give a 'reference'"):
        spec_of("rank", "a").step(Alone()).run({"a": np.ones(1)}, ["value"])  # type: ignore[union-attr, arg-type]
    assert combined("rank", [np.empty((0, 3))]).shape == (0, 3)


def of_torch(method: str, stacked: list[torch.Tensor], weights: Any, axis: int | None) -> torch.Tensor:
    """The same in torch."""
    if method in ("concat", "stack"):
        return (
            torch.cat(stacked, axis or -1) if method == "concat" else torch.stack(stacked, 1 if axis is None else axis)
        )
    x = torch.stack(stacked)
    w = torch.ones(len(stacked), dtype=x.dtype) if weights is None else torch.tensor(weights, dtype=x.dtype)
    w = (w / w.sum()).reshape(-1, *([1] * (x.ndim - 1)))
    return {
        "soft_vote": lambda: (w * x).sum(0),
        "mean": lambda: (w * x).sum(0),
        "gmean": lambda: (w * x.log()).sum(0).exp(),
        "median": lambda: x.quantile(0.5, 0),
        "max": lambda: x.amax(0),
        "min": lambda: x.amin(0),
    }[method]()


SMOOTH: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in ("soft_vote", "mean", "gmean", "median", "max", "min", "concat", "stack")),
    *((method, {"weights": [2.0, 0.0, 0.5, 1.0]}) for method in ("soft_vote", "mean", "gmean")),
    *((method, {"axis": 1}) for method in ("concat", "stack")),
    ("stack", {"axis": -1}),
]


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize(("method", "keys"), SMOOTH, ids=str)
def test_numbers_and_gradients_are_those_of_torch(method: str, keys: dict[str, Any], gone: bool) -> None:
    if gone and method in ("concat", "stack"):
        return
    arrays = RNG.uniform(0.1, 1, (4, 5, 3))
    arrays[0, 0] = arrays[2, 0] = arrays[3, 0] = 0.99  # equal ones, the largest
    arrays[0, 1] = arrays[2, 1] = 0.01
    named = {**keys, "weights": dict(zip("abcd", keys["weights"], strict=True))} if "weights" in keys else keys
    spec = spec_of(method, "abcd", **named)
    step: Any = spec.step(Alone())  # type: ignore[arg-type]
    inputs: dict[str, Any] = dict(zip("abcd", arrays, strict=True))
    weights = keys.get("weights")
    if gone:
        inputs["d"] = GONE
        weights = weights and weights[:3]
    there = {name: torch.tensor(one, requires_grad=True) for name, one in inputs.items() if one is not GONE}
    wanted = of_torch(method, list(there.values()), weights, keys.get("axis"))
    name = "proba" if method == "soft_vote" else "value"
    outputs = step.run(inputs, [name])
    np.testing.assert_allclose(outputs[name], wanted.detach().numpy(), rtol=1e-13)
    g = RNG.normal(size=outputs[name].shape)
    wanted.backward(torch.tensor(g))
    found = step.vjp(inputs, outputs, {name: g})
    assert list(found) == list(there)
    for member, tensor in there.items():
        assert tensor.grad is not None
        np.testing.assert_allclose(found[member], tensor.grad.numpy(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("method", "keys"), [one for one in SMOOTH if "weights" not in one[1]], ids=str)
def test_a_float_stays_the_float_it_is(method: str, keys: dict[str, Any], dtype: str) -> None:
    arrays = RNG.uniform(0.1, 1, (3, 5, 3)).astype(getattr(ml_dtypes, dtype, dtype))
    name = "proba" if method == "soft_vote" else "value"
    given = combined(method, arrays, name, **keys)
    assert given.dtype == arrays.dtype
    exact = combined(method, arrays.astype(np.float64), name, **keys)
    np.testing.assert_allclose(given.astype(np.float64), exact, rtol=1e-6 if dtype == "float32" else 1e-2)
    step: Any = spec_of(method, **keys).step(Alone())  # type: ignore[arg-type]
    found = step.vjp(dict(zip("abc", arrays, strict=True)), {name: given}, {name: np.ones_like(given)})
    assert {(one.dtype, one.shape) for one in found.values()} == {(arrays.dtype, (5, 3))}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_mean_of_a_few_is_that_of_torch_and_numpy_bit_by_bit(count: int) -> None:
    arrays = RNG.normal(size=(count, 33, 10)).astype(np.float32)
    given = combined("mean", arrays)
    assert np.array_equal(given, np.mean(arrays, 0))
    assert np.array_equal(given, torch.tensor(arrays).mean(0).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_mean_of_a_few_is_that_of_tensorflow(count: int) -> None:
    tf = pytest.importorskip("tensorflow")
    arrays = RNG.normal(size=(count, 33, 10)).astype(np.float32)
    np.testing.assert_allclose(combined("mean", arrays), tf.reduce_mean(arrays, 0).numpy(), rtol=1e-5, atol=1e-7)
    for ours, theirs in (("max", tf.reduce_max), ("min", tf.reduce_min)):
        assert np.array_equal(combined(ours, arrays), theirs(arrays, 0).numpy())


def test_integers_are_combined_as_numpy_does() -> None:
    numbers = np.array([[1, 2], [4, 6]], np.int32)
    assert combined("mean", numbers).tolist() == [2.5, 4]
    assert combined("median", numbers).tolist() == [2.5, 4]
    assert combined("max", numbers).tolist() == [4, 6]
    assert combined("stack", numbers).tolist() == [[1, 4], [2, 6]]
    assert combined("min", np.array([[True], [False]])).tolist() == [False]


def test_sums_are_in_the_order_of_declaration() -> None:
    one, small = np.array([1e16]), np.array([1.0])
    step: Any = spec_of("mean", "abc").step(Alone())  # type: ignore[arg-type]
    declared = {"a": one, "b": small, "c": -one}
    arrived = {name: declared[name] for name in "cab"}
    wanted = step.run(declared, ["value"])["value"]
    assert np.array_equal(step.run(arrived, ["value"])["value"], wanted)
    assert not np.array_equal(step.run({"a": one, "b": -one, "c": small}, ["value"])["value"], wanted)


@pytest.mark.parametrize("method", ["soft_vote", "hard_vote", "mean", "median", "max", "rank"])
def test_no_rows_are_no_rows(method: str) -> None:
    arrays = [np.empty((0, 4), np.int64 if method == "hard_vote" else np.float32)] * 3
    keys = {"weights": {"a": 2.0}} if method in ("soft_vote", "mean") else {}
    given = combined(method, arrays, **keys)
    assert {len(one) for one in (given.values() if isinstance(given, dict) else [given])} == {0}


@pytest.mark.parametrize("method", ["hard_vote", "rank"])
def test_what_has_no_derivative_says_so(method: str) -> None:
    step: Any = spec_of(method).step(Alone())  # type: ignore[arg-type]
    arrays = dict.fromkeys("abc", np.array([1, 0]))
    name = "label" if method == "hard_vote" else "value"
    outputs = step.run(arrays, [name])
    with pytest.raises(NotDifferentiable):
        step.vjp(arrays, outputs, {name: np.ones(2)})


def test_a_label_has_no_derivative() -> None:
    step: Any = spec_of("soft_vote", "a").step(Alone())  # type: ignore[arg-type]
    with pytest.raises(NotDifferentiable, match="only 'proba' has"):
        step.vjp({"a": np.ones((1, 2))}, {}, {"label": np.ones(1)})


def test_members_that_are_no_floats_have_no_gradient() -> None:
    step: Any = spec_of("max").step(Alone())  # type: ignore[arg-type]
    arrays = dict.fromkeys("abc", np.array([1, 0]))
    assert step.vjp(arrays, step.run(arrays, ["value"]), {"value": np.ones(2)}) == {}


def test_without_a_cotangent_the_gradient_is_zero() -> None:
    step: Any = spec_of("soft_vote", "a").step(Alone())  # type: ignore[arg-type]
    assert step.vjp({"a": np.ones((1, 2))}, {}, {})["a"].tolist() == [[0, 0]]


def test_nobody_with_a_weight_is_an_error() -> None:
    step: Any = spec_of("mean", "ab", weights={"a": 0}).step(Alone())  # type: ignore[arg-type]
    with pytest.raises(ModelUnavailable, match="no member with a weight above 0"):
        step.run({"a": np.ones(1), "b": GONE}, ["value"])
    with pytest.raises(ModelUnavailable, match="no member has answered: a, b"):
        step.run({"a": GONE, "b": GONE}, ["value"])


def test_members_that_turn_out_to_differ_are_an_error() -> None:
    step: Any = spec_of("mean", "ab").step(Alone())  # type: ignore[arg-type]
    for other in (np.ones(3), np.ones(2, np.float32)):
        with pytest.raises(SignatureError, match=r"member 'b': expected float64 \[2\] as 'a', got float"):
            step.run({"a": np.ones(2), "b": other}, ["value"])
    with pytest.raises(InvalidRequest, match="expected an axis from -1 to 0"):
        spec_of("concat", "a", axis=1).step(Alone()).run({"a": np.ones(2)}, ["value"])  # type: ignore[union-attr, arg-type]


def test_concat_takes_members_of_several_sizes() -> None:
    spec = spec_of("concat", "ab", outputs={"x": "value"})
    outputs, faults = checked(spec, Form("float32", ("N", 3)), Form("float32", ("M", 4)))
    assert faults == []
    assert outputs == {"x": Form("float32", ("M", 7))}  # N and M are one now
    step: Any = spec.step(Alone())  # type: ignore[arg-type]
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros((2, 4), np.float32)}
    outputs = step.run(arrays, ["x"])
    found = step.vjp(arrays, outputs, {"x": np.arange(14.0).reshape(2, 7)})
    assert outputs["x"].tolist() == [[1, 1, 1, 0, 0, 0, 0]] * 2
    assert {name: gradient.tolist() for name, gradient in found.items()} == {
        "a": [[0, 1, 2], [7, 8, 9]],
        "b": [[3, 4, 5, 6], [10, 11, 12, 13]],
    }


# --------------------------------------------------------------------------- in a document

VOTE = """
ensemble: 1
inputs:
  a: {dtype: float32, shape: [N, 4]}
  b: {dtype: float32, shape: [N, 4]}
  prior: {dtype: float32, shape: [N, 4], optional: true, default: 0.25}
outputs: {label: vote.label, proba: vote.proba}
nodes:
  vote:
    kind: combine
    method: soft_vote
    inputs: {a: {from: $inputs.a, apply: softmax}, b: $inputs.b, prior: $inputs.prior}
    weights: {a: 2, prior: 0.5}
    quorum: {min: 2, grace: 20ms, required: [b]}
"""


def planned(text: str) -> Plan:
    document, faults = parse(text, "g.yaml")
    assert document is not None
    return build(document, faults)


def test_a_vote_in_a_document_becomes_a_plan() -> None:
    plan = planned(VOTE)
    (node,) = plan.nodes
    assert [(wire.name, wire.needed) for wire in node.wires] == [("a", False), ("b", True), ("prior", False)]
    assert {name: str(form) for name, form in plan.output_forms.items()} == {
        "label": "int64 [N]",
        "proba": "float64 [N, 4]",
    }


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("b: {dtype: float32, shape: [N, 4]}", "b: {dtype: float32, shape: [N, 5]}", ["E107 g.yaml:12:55", "vote.b"]),
        ("b: {dtype: float32", "b: {dtype: float64", ["E106 g.yaml:12:55", "expected float32 as 'a' ($inputs.a)"]),
        ("prior: 0.5", "priro: 0.5", ["E112 g.yaml:13:28", "did you mean 'prior'?"]),
        ("required: [b]", "required: [c]", ["E112 g.yaml:14:46", "'c', which is no member"]),
        ("apply: softmax", "apply: sofmax", ["E103 g.yaml:12:17", "did you mean 'softmax'?"]),
        ("soft_vote", "softvote", ["E101 g.yaml:11:13", "did you mean 'soft_vote'?"]),
    ],
)
def test_a_fault_has_its_place_in_the_document(old: str, new: str, wanted: list[str]) -> None:
    assert old in VOTE
    with pytest.raises(GraphFaults) as caught:
        planned(VOTE.replace(old, new))
    (fault,) = (fault for fault in caught.value.faults if not fault.warning)
    assert all(word in str(fault) for word in wanted), fault


# --------------------------------------------------------------------------- forms and faults

P = Form("float32", ("N", 4))
LABEL = Form("int64", ("N",))


@pytest.mark.parametrize(
    ("method", "keys", "forms", "wanted"),
    [
        ("soft_vote", {}, [P, P], {"proba": P, "label": LABEL}),
        ("soft_vote", {"weights": {"a": 2}}, [P, P], {"proba": Form("float64", ("N", 4)), "label": LABEL}),
        ("soft_vote", {"weights": {}}, [P, P], {"proba": P, "label": LABEL}),
        ("soft_vote", {}, [UNKNOWN, P], {"proba": P, "label": LABEL}),
        ("soft_vote", {}, [UNKNOWN], {"proba": UNKNOWN, "label": Form("int64", None)}),
        ("soft_vote", {"axis": 1}, [Form("float32", ("N", 3, "H"))], None),
        ("hard_vote", {}, [LABEL, LABEL], {"label": LABEL}),
        ("hard_vote", {"labels": 3}, [LABEL], {"label": LABEL, "votes": Form("float64", ("N", 3))}),
        ("hard_vote", {"outputs": {"y": "label"}}, [LABEL], {"y": LABEL}),
        ("mean", {}, [P, Form("float32", ("M", None))], {"value": Form("float32", ("M", 4))}),
        ("mean", {}, [Form("int32", ("N",))], {"value": Form("float64", ("N",))}),
        ("mean", {"outputs": {"p": "value"}}, [P], {"p": P}),
        ("mean", {"outputs": {"value": {"dtype": "float32", "shape": ["N", "C"]}}}, [P], {"value": P}),
        ("median", {}, [P], {"value": P}),
        ("rank", {}, [P], {"value": Form("float64", ("N", 4))}),
        ("concat", {}, [P, Form("float32", ("N", "K"))], {"value": Form("float32", ("N", None))}),
        ("concat", {"axis": 0}, [P, Form("float32", (2, 4))], {"value": Form("float32", (None, 4))}),
        ("concat", {}, [Form("string", ("N", 1))], {"value": Form("string", ("N", 1))}),
        ("stack", {}, [P, P], {"value": Form("float32", ("N", 2, 4))}),
        ("stack", {"axis": -1}, [P, P], {"value": Form("float32", ("N", 4, 2))}),
    ],
    ids=str,
)
def test_forms_keep_their_symbols(method: str, keys: dict[str, Any], forms: list[Form], wanted: Any) -> None:
    outputs, faults = checked(spec_of(method, "ab"[: len(forms)], **keys), *forms)
    assert faults == []
    assert outputs == (wanted or {"proba": forms[0], "label": Form("int64", ("N", "H"))})


@pytest.mark.parametrize(
    ("method", "keys", "forms", "code", "path", "words"),
    [
        ("mean", {"weights": {"ab": 1}}, [P, P], "E112", "weights.ab", ["weights has 'ab', which is no member"]),
        ("mean", {"weights": {"a": -1}}, [P, P], "E112", "weights.a", ["'a': expected 0 or more, got -1"]),
        ("mean", {"weights": {"a": float("nan")}}, [P, P], "E112", "weights.a", ["expected 0 or more, got nan"]),
        ("mean", {"weights": {"a": 0, "b": 0}}, [P, P], "E112", "weights", ["expected one above 0"]),
        ("max", {"weights": {"a": 2}}, [P, P], "E112", "weights", ["means nothing for 'max'", "soft_vote"]),
        ("mean", {"axis": 1}, [P, P], "E112", "axis", ["'axis' is for soft_vote, rank, concat, stack"]),
        ("mean", {"labels": 2}, [P, P], "E112", "labels", ["'labels' is for hard_vote"]),
        ("mean", {"reference": [1.0]}, [P, P], "E112", "reference", ["'reference' is for rank"]),
        ("mean", {"quorum": {"min": 3}}, [P, P], "E112", "quorum.min", ["at most the 2 members"]),
        ("mean", {"quorum": {"min": 1, "required": ["c"]}}, [P, P], "E112", "quorum.required.0", ["'c'", "'a', 'b'"]),
        ("stack", {"quorum": {"min": 1}}, [P, P], "E112", "quorum", ["not for 'stack'"]),
        ("soft_vote", {}, [P, LABEL], "E112", "inputs.b", ["expected floats", "got int64 [N]", "use hard_vote"]),
        ("hard_vote", {}, [P, P], "E112", "inputs.a", ["expected integers", "got float32 [N, 4]", "apply: argmax"]),
        ("hard_vote", {}, [Form("string", ("N",))] * 2, "E112", "inputs.a", ["labels: [NAME, ...]"]),
        ("gmean", {}, [LABEL, LABEL], "E112", "inputs.a", ["expected floats for gmean", "cast: float32"]),
        ("rank", {}, [Form("float32", (1,))] * 2, "E112", "", ["expected 2 rows or more, got 1"]),
        ("rank", {"reference": "no.npy"}, [P, P], "E112", "reference", ["cannot read the reference 'no.npy'"]),
        ("rank", {"reference": [[1.0]][0][:0]}, [P, P], "E112", "reference", ["expected finite numbers [R]"]),
        ("rank", {"reference": {"a": [1.0]}}, [P, P], "E112", "reference", ["no reference for member 'b'"]),
        ("rank", {"reference": {"a": [1.0], "b": [1.0, 2.0]}}, [P, P], "E112", "reference", ["got 2 of 'b'"]),
        ("soft_vote", {"axis": 2}, [P, P], "E112", "axis", ["expected an axis from -2 to 1 for float32 [N, 4], got 2"]),
        (
            *("mean", {}, [P, Form("float64", ("N", 4))], "E106", "inputs.b"),
            ["expected float32 as 'a' (a.out)", "got float64 [N, 4]", "`cast: float32` on this edge"],
        ),
        ("mean", {}, [P, Form("float32", ("N", 5))], "E107", "inputs.b", ["4", "5", "b.out", "vote.b (as a.out)"]),
        ("mean", {}, [P, Form("float32", ("N",))], "E107", "inputs.b", ["float32 [N]", "float32 [N, 4]"]),
        ("concat", {}, [P, Form("float32", (2, "K", 1))], "E107", "inputs.b", ["[2, K, ?]"]),
        ("concat", {"axis": 0}, [P, Form("float32", ("N", 5))], "E107", "inputs.b", ["4", "5"]),
        ("mean", {"outputs": {"p": "valeu"}}, [P, P], "E103", "outputs.p", ["did you mean 'value'?"]),
        ("soft_vote", {"outputs": {"p": "value"}}, [P, P], "E103", "outputs.p", ["there is 'proba', 'label'"]),
        ("python:math:floor", {}, [P, P], "E112", "", ["expected outputs with dtype and shape"]),
        ("python:math:flor", {}, [P, P], "E116", "method", ["'math' has no 'flor'", "did you mean 'floor'?"]),
        ("python:mathh:floor", {}, [P, P], "E116", "method", ["No module named 'mathh'"]),
        ("python:math:pi", {}, [P, P], "E116", "method", ["expected a function, got a float"]),
    ],
    ids=str,
)
def test_a_combination_that_is_not_defined_is_a_fault(
    method: str, keys: dict[str, Any], forms: list[Form], code: str, path: str, words: list[str]
) -> None:
    _, faults = checked(spec_of(method, "ab", **keys), *forms)
    found = [fault for fault in faults if ".".join(map(str, fault.path)) == f"nodes.vote.{path}".rstrip(".")]
    assert [fault.code for fault in found] == [code]
    assert all(word in found[0].text for word in words), found[0].text


def test_all_faults_are_told_at_once() -> None:
    spec = spec_of("soft_vote", "ab", weights={"a": -1, "c": 1}, labels=3, quorum={"min": 9})
    _, faults = checked(spec, LABEL, Form("float64", ("N",)))
    assert [fault.code for fault in faults] == ["E112"] * 5


def test_a_combination_of_nothing_is_a_fault() -> None:
    outputs, faults = checked(spec_of("mean", {}))
    assert (outputs, [fault.code for fault in faults]) == ({}, ["E112"])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"method": "soft-vote"}, "did you mean 'soft_vote'?"),
        ({"method": "python:f"}, "no method 'python:f'"),
        ({"weights": {"a": "2"}}, "weights"),
        ({"weights": {"a": True}}, "weights"),
        ({"quorum": {"min": 0}}, "quorum.min"),
        ({"quorum": {"min": 1, "grace": 5}}, "a length such as 150ms"),
        ({"inputs": ["a.p", "a.p"]}, "member 'a.p' is there twice; write inputs by name"),
    ],
    ids=str,
)
def test_a_document_that_is_not_of_the_format_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CombineSpec.model_validate({"kind": "combine", "method": "mean", "inputs": {"a": "a"}, **keys})
    assert words in str(caught.value)


def test_members_of_a_list_have_the_names_of_their_nodes() -> None:
    assert spec_of("mean", ["a.p", "b", "$inputs.x"]).members == ("a", "b", "x")
    assert spec_of("mean", ["a.p", "a.q", {"from": "b.r", "apply": "softmax"}]).members == ("a.p", "a.q", "b")
    _, faults = checked(spec_of("mean", ["a.p", "b.p"], weights={"a": 2}), P, LABEL)
    assert {fault.path for fault in faults} == {("nodes", "vote", "inputs", 1)}


def test_members_that_a_quorum_does_not_require_may_be_missing() -> None:
    assert [edge.needed for edge in spec_of("mean").edges()] == [True] * 3
    spec = spec_of("mean", quorum={"min": 2, "grace": "20ms", "required": ["b"]})
    assert [(edge.name, edge.needed) for edge in spec.edges()] == [("a", False), ("b", True), ("c", False)]
    assert [edge.path for edge in spec.edges()] == [("inputs", name) for name in "abc"]
    assert spec.quorum is not None
    assert spec.quorum.grace == 0.02


def test_the_vote_of_the_first_example_is_accepted_as_written() -> None:
    spec = CombineSpec.model_validate(
        {
            "kind": "combine",
            "method": "soft_vote",
            "inputs": {
                "a": {"from": "a.logits", "apply": "softmax"},
                **{name: f"{name}.probs" for name in "bcd"},
                "prior": "$inputs.prior",
            },
            "weights": {"a": 2, "prior": 0.5},
            "quorum": {"min": 3, "grace": "20ms", "required": ["b"]},
        }
    )
    outputs, faults = checked(spec, P, P, Form("float32", (None, 4)), P, P)
    assert faults == []
    assert outputs == {"proba": Form("float64", ("N", 4)), "label": LABEL}


def weighed(a: Any, b: Any) -> Any:
    """A combination in Python: twice `a`, and `b` if it is there."""
    return 2 * a + (0 if b is None else b)


def parted(a: Any, b: Any) -> dict[str, Any]:
    """A combination in Python with two outputs."""
    return {"low": np.minimum(a, b), "high": np.maximum(a, b)}


def test_a_python_function_combines(tmp_path: Path) -> None:
    one = {"dtype": "float32", "shape": ["N"]}
    spec = spec_of(f"python:{__name__}:weighed", "ab", outputs={"y": one}, quorum={"min": 1})
    outputs, faults = checked(spec, Form("float32", ("N",)), Form("float32", ("N",)))
    assert (outputs, faults) == ({"y": Form("float32", ("N",))}, [])
    step: Any = spec.step(Alone())  # type: ignore[arg-type]
    x = np.ones(2, np.float32)
    assert step.run({"a": x, "b": x}, ["y"])["y"].tolist() == [3, 3]
    assert step.run({"a": x, "b": GONE}, ["y"])["y"].tolist() == [2, 2]
    with pytest.raises(InternalError, match=r"function 'weighed' broke its declared outputs: output 'y'"):
        step.run({"a": np.ones(2), "b": GONE}, ["y"])
    with pytest.raises(NotDifferentiable):
        step.vjp({"a": x, "b": x}, {}, {"y": x})
    (tmp_path / "beside_the_graph.py").write_text("def first(a):\n    return a\n")
    beside = spec_of("python:beside_the_graph:first", "a", outputs={"y": one})
    first: Any = beside.step(Alone(str(tmp_path / "g.yaml")))  # type: ignore[arg-type]
    assert first.run({"a": x}, ["y"])["y"] is x
    both: Any = spec_of(f"python:{__name__}:parted", "ab", outputs={"low": one, "high": one}).step(Alone())  # type: ignore[arg-type]
    assert {name: y.tolist() for name, y in both.run({"a": x, "b": 2 * x}, ["high"]).items()} == {"high": [2, 2]}
