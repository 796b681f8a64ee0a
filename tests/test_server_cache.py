"""The row cache: answers are those of the model, byte for byte, whatever is kept, lost, shared or damaged."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import server_ref
from remote_ops import Endpoint, FunctionServable, TensorSpec, graphpipe
from remote_ops.deadline import Deadline
from remote_ops.errors import InternalError, ModelUnavailable, SignatureError, SpecError
from remote_ops.signature import DTYPES, Array, Signature, describe
from server_ref.batching import Batching
from server_ref.cache import Cached
from server_ref.model import Version
from server_ref.rowkeys import fingerprint
from server_ref.rowstore import MemoryRows, RowCache, Usage

ROOT = Path(__file__).parents[1]
X = TensorSpec("x", "float32", (-1, 2))
Y = TensorSpec("y", "float32", (-1, 2))
Z = TensorSpec("z", "float32", (-1,))


class Clock:
    """A clock that stands still until told."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Counted:
    """A servable of a function that takes note of each call: its inputs, and the outputs asked for."""

    device = "cpu"
    concurrency = 3

    def __init__(
        self, fn: Callable[..., Mapping[str, Any]], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> None:
        self.signature = Signature(tuple(inputs), tuple(outputs), name="counted")
        self.fn = fn
        self.calls: list[tuple[dict[str, Array], list[str] | None]] = []

    def infer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        self.calls.append((dict(inputs), None if outputs is None else list(outputs)))
        results = self.fn(config=config, **inputs)
        return {name: results[name] for name in outputs or results}

    @property
    def rows(self) -> list[int]:
        """How many rows each call had."""
        return [len(next(iter(inputs.values()))) for inputs, _ in self.calls]


class Awaited(Counted):
    """The same, which can be awaited too."""

    async def ainfer(self, *args: Any, **options: Any) -> dict[str, Array]:
        await asyncio.sleep(0)
        return self.infer(*args, **options)


def double(x: Array, config: bytes = b"") -> dict[str, Array]:
    return {"y": 2 * x, "z": x.sum(axis=1)}


def doubling(kind: type[Counted] = Counted) -> Counted:
    return kind(double, [X], [Y, Z])


def pairs(*first: float) -> Array:
    """Rows of two numbers each, told by their first."""
    return np.array([[value, value + 0.5] for value in first], np.float32).reshape(-1, 2)


def answered(answer: Mapping[str, Array]) -> bytes:
    """What goes out for an answer."""
    return b"".join(bytes(part) for part in graphpipe.encode_response(list(answer.values())))


def open_disk(tmp_path: Path, **options: Any) -> Any:
    return pytest.importorskip("server_ref.rowdisk", exc_type=ImportError).DiskRows(tmp_path / "rows", **options)


@pytest.fixture(params=["memory", "disk"])
def make_rows(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., RowCache]]:
    """How to open a store of either kind."""
    opened: list[RowCache] = []

    def make(**options: Any) -> RowCache:
        opened.append(MemoryRows(**options) if request.param == "memory" else open_disk(tmp_path, **options))
        return opened[-1]

    yield make
    for rows in opened:
        rows.close()


@pytest.fixture
def rows(make_rows: Callable[..., RowCache]) -> RowCache:
    return make_rows()


# ----------------------------------------------------------------- what the cache of 2018 got wrong


def test_another_config_finds_another_answer(rows: RowCache) -> None:
    model = Counted(lambda x, config: {"y": x * int(config or b"1")}, [X], [Y])
    cached = Cached(model, rows)
    for config in (b"2", b"3", b"", b"2"):
        assert cached.infer({"x": pairs(1)}, config=config)["y"][0, 0] == int(config or b"1")
    assert len(model.calls) == 3


def test_each_row_of_strings_finds_its_own_answer(rows: RowCache) -> None:
    def lengths(s: Array, config: bytes = b"") -> dict[str, Array]:
        return {"n": np.array([[len(item) for item in row] for row in s], np.int64), "echo": s[:, ::-1]}

    specs = [TensorSpec("n", "int64", (-1, 2)), TensorSpec("echo", "string", (-1, 2))]
    model = Counted(lengths, [TensorSpec("s", "string", (-1, 2))], specs)
    cached = Cached(model, rows)
    texts = np.array([["a", "bc"], ["ab", "c"], ["", "abc"], ["é", "\0"], ["a", "bc"]], object)
    for _ in range(2):
        answer = cached.infer({"s": texts})
        assert answer["n"].tolist() == [[1, 2], [2, 1], [0, 3], [1, 1], [1, 2]]
        assert answer["echo"].tolist() == texts[:, ::-1].tolist()
    assert model.rows == [4]
    assert cached.infer({"s": np.array([[b"a", b"bc"]], object)})["echo"].tolist() == [[b"bc", b"a"]]
    assert model.rows == [4, 1]


def tokens(s: Array, config: bytes = b"") -> dict[str, Array]:
    """The lengths of the words of each text, padded to the longest text of the batch."""
    words = [text.split() for text in s]
    padded = np.zeros((len(s), max(map(len, words))), np.int64)
    for row, of_text in zip(padded, words, strict=True):
        row[: len(of_text)] = [len(word) for word in of_text]
    return {"t": padded}


def tokenizer() -> Counted:
    return Counted(tokens, [TensorSpec("s", "string", (-1,))], [TensorSpec("t", "int64", (-1, -1))])


BATCHES = (["a b"], ["a b c d"], ["a b", "a b c d"], ["a b"], ["a b", "x y"], ["a b c d", "a b"], ["a b", "a b c d"])


@pytest.mark.parametrize("by_row", [None, False])
def test_answers_of_variable_length_keep_their_own_shape(rows: RowCache, by_row: bool | None) -> None:
    model = tokenizer()
    cached = Cached(model, rows, by_row=by_row)
    for batch in BATCHES:
        texts = np.array(batch, object)
        assert answered(cached.infer({"s": texts})) == answered(tokens(texts))
    assert len(model.calls) == len({tuple(batch) for batch in BATCHES})


def test_kept_rows_that_do_not_fit_together_are_computed_as_they_came(rows: RowCache) -> None:
    model = tokenizer()
    cached = Cached(model, rows, by_row=True)
    for batch in (["a b"], ["a b c d"], ["a b", "a b c d"], ["a b"], ["a b c d", "a b"]):
        texts = np.array(batch, object)
        assert answered(cached.infer({"s": texts})) == answered(tokens(texts))
    assert model.rows == [1, 1, 2, 2]


def test_computed_rows_that_do_not_fit_the_kept_ones_are_computed_with_them(rows: RowCache) -> None:
    model = tokenizer()
    cached = Cached(model, rows, by_row=True)
    for batch in (["a b"], ["a b", "a b c d"]):
        texts = np.array(batch, object)
        assert answered(cached.infer({"s": texts})) == answered(tokens(texts))
    assert model.rows == [1, 1, 2]


@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=60),
    max_bytes=st.integers(1, 4000),
    seed=st.integers(0, 1 << 16),
)
def test_memory_never_outgrows_its_bound(sizes: list[int], max_bytes: int, seed: int) -> None:
    chance = random.Random(seed)
    rows = MemoryRows(max_bytes)
    for size in sizes:
        rows.put([(chance.randbytes(1), bytes(chance.randrange(900))), (b"key", bytes(size))])
        rows.get([b"key"])
        assert rows.usage().bytes <= max_bytes
    held = [found for found in rows.get([bytes([key]) for key in range(256)] + [b"key"]) if found is not None]
    assert len(held) == rows.usage().entries
    assert sum(map(len, held)) <= max_bytes


def test_disk_never_outgrows_its_bound_and_gives_up_what_was_put_first(tmp_path: Path) -> None:
    rows = open_disk(tmp_path, max_bytes=1 << 20)
    keys = [number.to_bytes(8, "big") for number in range(300)]
    for key in keys:
        rows.put([(key, key * 1250)])
        rows.flush()
    assert (tmp_path / "rows" / "data.mdb").stat().st_size <= 1 << 20
    assert rows.usage().bytes <= 1 << 20
    found = [value is not None for value in rows.get(keys)]
    kept = sum(found)
    assert 40 < kept < 100
    assert found == [False] * (300 - kept) + [True] * kept
    assert rows.usage() == Usage(kept, rows.usage().bytes, 300 - kept)
    rows.put([(b"large", bytes(1 << 19))])  # not kept, and makes no room for itself
    assert rows.get([b"large"]) == [None]
    rows.close()


def test_disk_takes_rows_of_any_sizes_in_turn(tmp_path: Path) -> None:
    rows = open_disk(tmp_path, max_bytes=1 << 20)
    chance = random.Random(5)
    for number in range(150):
        key, value = number.to_bytes(8, "big"), chance.randbytes(chance.choice([10, 5_000, 60_000]))
        rows.put([(key, value)])
        assert rows.flush()
        assert rows.get([key]) == [value]
    rows.close()


@pytest.mark.parametrize("by_row", [None, False])
def test_a_model_whose_rows_depend_on_each_other_is_right_only_by_whole_requests(
    rows: RowCache, by_row: bool | None
) -> None:
    def centred(x: Array, config: bytes = b"") -> dict[str, Array]:
        return {"y": x - x.mean(axis=0)}

    cached = Cached(Counted(centred, [X], [Y]), rows, by_row=by_row)
    requests = [pairs(1), pairs(1, 3), pairs(3), pairs(1, 3)]
    right = [answered(cached.infer({"x": x})) == answered(centred(x)) for x in requests]
    assert all(right) == (by_row is False)  # nobody can find out by itself: a cache is there only where it is asked for


def test_outputs_go_by_their_names_whichever_are_asked_for(rows: RowCache) -> None:
    model = doubling()
    cached = Cached(model, rows)
    x = pairs(1, 2)
    for outputs in (["z"], ["y"], ["z", "y"], ["y", "z"], None):
        answer = cached.infer({"x": x}, outputs)
        assert list(answer) == (outputs or ["y", "z"])
        assert all(answer[name].tolist() == double(x)[name].tolist() for name in answer)
    assert [asked for _, asked in model.calls] == [["z"], ["y"]]
    with pytest.raises(SignatureError, match="no output ''"):
        cached.infer({"x": x}, [""])


def test_a_model_file_that_is_swapped_finds_no_old_answer(tmp_path: Path, rows: RowCache) -> None:
    file = tmp_path / "model"
    for factor in (2, 3, 2):
        file.write_text(str(factor), "utf-8")
        model = Counted(lambda x, config, by=factor: {"y": by * x}, [X], [Y])
        cached = Cached(model, rows, model_hash=fingerprint(file))
        assert cached.infer({"x": pairs(1)})["y"][0, 0] == factor
    assert model.calls == []  # the first one, back again


# ------------------------------------------------------------------------- answers are the model's


def test_a_fingerprint_is_of_all_that_a_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "sub" / "b").write_bytes(b"2")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    (tmp_path / "sub" / "b").write_bytes(b"3")
    changed = fingerprint(tmp_path)
    (tmp_path / "sub" / "b").rename(tmp_path / "sub" / "c")
    assert len({first, changed, fingerprint(tmp_path), fingerprint(tmp_path / "a")}) == 4
    with pytest.raises(SpecError, match="no such file"):
        fingerprint(tmp_path / "none")


def mixed(x: Array, s: Array, config: bytes = b"") -> dict[str, Array]:
    label = np.array([f"{text}|{config.decode()}" for text in s], object)
    return {"y": x * (len(config) + 1), "label": label, "big": x.sum(axis=1) > 1}


MIXED = (
    [X, TensorSpec("s", "string", (-1,))],
    [Y, TensorSpec("label", "string", (-1,)), TensorSpec("big", "bool", (-1,))],
)
REQUESTS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["", "a", "é"])), max_size=5),
        st.sampled_from([None, ["y"], ["label"], ["big", "y"], ["label", "big", "y"]]),
        st.sampled_from([b"", b"1"]),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, max_bytes=st.sampled_from([700, 4000, 1 << 20]))
def test_cached_answers_are_the_bytes_of_uncached_ones(requests: Any, max_bytes: int) -> None:
    model = FunctionServable(mixed, *MIXED)
    cached = Cached(model, MemoryRows(max_bytes))
    for given_rows, outputs, config in requests:
        inputs = {
            "x": np.array([[number, number] for number, _ in given_rows], np.float32).reshape(-1, 2),
            "s": np.array([text for _, text in given_rows], object),
        }
        expected = model.infer(inputs, outputs, config=config)
        answer = cached.infer(inputs, outputs, config=config)
        assert list(answer) == list(expected)
        assert answered(answer) == answered(expected)


def test_a_server_answers_the_same_bytes_with_a_cache(rows: RowCache) -> None:
    model = FunctionServable(mixed, *MIXED)
    with server_ref.running({"bare": model, "cached": Cached(model, rows, model_hash="1")}) as url:
        bare, cached = Endpoint(f"{url}bare"), Endpoint(f"{url}cached")
        for texts in (["a", "b"], ["b", "c", "b"], ["a"]):
            values = pairs(*range(len(texts))), np.array(texts, object)
            for config in (b"", b"x"):
                for one, other in zip(bare(*values, config=config), cached(*values, config=config), strict=True):
                    assert (describe(one), one.tolist()) == (describe(other), other.tolist())


def test_a_cache_around_batched_instances_lets_only_missing_rows_through(rows: RowCache) -> None:
    model = doubling()
    version = Version(
        "m", [model], batching=Batching(max_rows=8), awaited=lambda instances: Cached(instances, rows, model_hash="1")
    )
    with server_ref.running({"m": version}) as url, Endpoint(url) as endpoint:
        for x in (pairs(1, 2), pairs(2, 3), pairs(3, 1, 2)):
            y, z = endpoint(x)
            assert (y.tolist(), z.tolist()) == (double(x)["y"].tolist(), double(x)["z"].tolist())
    assert model.rows == [2, 1]


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_as_it_was(rows: RowCache, name: str) -> None:
    spec = TensorSpec("x", name, (-1, 3))
    model = Counted(lambda x, config: {"y": x}, [spec], [TensorSpec("y", name, (-1, 3))])
    cached = Cached(model, rows)
    values = np.arange(12).reshape(4, 3) % 2
    x = np.array([[str(item) for item in row] for row in values], object) if name == "string" else values
    inputs = {"x": x.astype(DTYPES[name].numpy)}
    first, second = cached.infer(inputs)["y"], cached.infer(inputs)["y"]
    assert describe(second) == describe(first)
    assert str(second.tolist()) == str(first.tolist())  # one kind has no zero, and so a NaN
    assert model.rows == [2]
    second[:] = second[::-1]  # ours to write to, and nobody else's answer
    assert str(cached.infer(inputs)["y"].tolist()) == str(first.tolist())


def test_only_rows_that_are_missing_are_computed_in_one_call_and_each_once(rows: RowCache) -> None:
    model = doubling()
    cached = Cached(model, rows)
    cached.infer({"x": pairs(1, 2)})
    x = pairs(5, 2, 4, 1, 5, 4, 2)
    answer = cached.infer({"x": x})
    assert answered(answer) == answered(double(x))
    assert [inputs["x"][:, 0].tolist() for inputs, _ in model.calls] == [[1, 2], [5, 4]]
    stats = cached.cache_stats()
    assert (stats.hits, stats.misses, stats.lookups, stats.answered) == (5, 4, 2, 0)
    assert stats.lookup_ns > 0


def test_an_output_asked_for_later_is_all_that_is_computed_then(rows: RowCache) -> None:
    model = doubling()
    cached = Cached(model, rows)
    cached.infer({"x": pairs(1, 2)}, ["y"])
    x = pairs(2, 3)
    assert answered(cached.infer({"x": x})) == answered(double(x))
    assert [(inputs["x"][:, 0].tolist(), asked) for inputs, asked in model.calls] == [
        ([1, 2], ["y"]),
        ([2, 3], ["y", "z"]),
    ]
    cached.infer({"x": pairs(1)}, ["z"])
    assert model.calls[-1][1] == ["z"]


SCALAR = TensorSpec("k", "float32", ())


@pytest.mark.parametrize(
    ("inputs", "outputs", "values"),
    [
        ([X], [Y], {"x": pairs()}),
        ([SCALAR], [SCALAR], {"k": np.array(3, np.float32)}),
        ([X, SCALAR], [Y], {"x": pairs(1, 2), "k": np.array(3, np.float32)}),
        ([X, TensorSpec("w", "float32", (-1,))], [Y], {"x": pairs(1, 2), "w": np.ones(5, np.float32)}),
        ([X, TensorSpec("w", "float32", (2,))], [Y], {"x": pairs(1, 2), "w": np.ones(2, np.float32)}),
        ([X], [TensorSpec("x", "float32", (2, 2))], {"x": pairs(1, 2)}),
        ([X], [TensorSpec("x", "float32", None)], {"x": pairs(1, 2)}),
        ([TensorSpec("t", "string", ())], [TensorSpec("t", "string", ())], {"t": np.array("text", object)}),
        ([], [Y], {}),
    ],
    ids=["no rows", "scalar", "with a scalar", "unequal", "fixed input", "fixed output", "unknown", "text", "nothing"],
)
def test_what_has_no_rows_is_kept_whole(
    rows: RowCache, inputs: list[TensorSpec], outputs: list[TensorSpec], values: dict[str, Array]
) -> None:
    out = outputs[0].name
    model = Counted(lambda config, **given: {out: given.get(out, pairs(7) * len(given))}, inputs, outputs)
    cached = Cached(model, rows)
    first, second = cached.infer(values)[out], cached.infer(values)[out]
    assert (describe(first), first.tolist()) == (describe(second), second.tolist())
    assert [list(given) for given, _ in model.calls] == [list(values)]


def test_an_output_that_has_other_than_a_row_for_each_row_is_kept_whole(
    rows: RowCache, caplog: pytest.LogCaptureFixture
) -> None:
    model = Counted(lambda x, config: {"y": np.concatenate([x, x])}, [X], [Y])
    cached = Cached(model, rows)
    for x in (pairs(1, 2), pairs(1, 2), pairs(1, 2), pairs(2), pairs(3, 3), pairs(3, 3)):
        assert cached.infer({"x": x})["y"].tolist() == [*x.tolist(), *x.tolist()]
    assert model.rows == [2, 2, 1, 2]
    assert len(caplog.records) == 1


def test_an_output_of_other_rows_is_right_although_a_row_came_twice(rows: RowCache) -> None:
    model = Counted(lambda x, config: {"y": np.concatenate([x, x])}, [X], [Y])
    assert len(Cached(model, rows).infer({"x": pairs(3, 3)})["y"]) == 4


def test_gradients_go_to_the_model(rows: RowCache) -> None:
    x = TensorSpec("x", "float32", (-1,), differentiable=True)
    calls = []

    def vjp(inputs: Mapping[str, Array], cotangents: Mapping[str, Array]) -> dict[str, Array]:
        calls.append(1)
        return {"x": 2 * cotangents["y"]}

    ones = np.ones(3, np.float32)
    cached = Cached(FunctionServable(lambda x: 2 * x, [x], [TensorSpec("y", "float32", (-1,))], vjp=vjp), rows)
    for _ in range(2):
        assert cached.infer({"x": ones, "cotangent:y": ones}, ["gradient:x"])["gradient:x"].tolist() == [2, 2, 2]
    assert len(calls) == 2
    assert cached.cache_stats().bypassed == 2
    assert cached.cache_stats().entries == 0


def test_errors_are_not_kept(rows: RowCache) -> None:
    failing = [True]

    def sometimes(x: Array, config: bytes = b"") -> dict[str, Array]:
        if failing[0]:
            raise ModelUnavailable("not now")
        return double(x)

    cached = Cached(Counted(sometimes, [X], [Y]), rows)
    with pytest.raises(ModelUnavailable):
        cached.infer({"x": pairs(1)})
    failing[0] = False
    assert cached.infer({"x": pairs(1)})["y"].tolist() == (2 * pairs(1)).tolist()


def test_an_answer_that_breaks_the_signature_is_not_kept(rows: RowCache) -> None:
    cached = Cached(Counted(lambda x, config: {"y": x.astype(np.float64)}, [X], [Y]), rows)
    for _ in range(2):
        with pytest.raises(InternalError, match="broke its own signature"):
            cached.infer({"x": pairs(1)})
    assert cached.cache_stats().entries == 0


def test_what_cannot_be_hashed_is_for_the_model_to_judge(rows: RowCache) -> None:
    model = Counted(lambda s, config: {"s": s}, [TensorSpec("s", "string", (-1,))], [TensorSpec("s", "string", (-1,))])
    cached = Cached(model, rows)
    for _ in range(2):
        assert cached.infer({"s": np.array([None, 3], object)})["s"].tolist() == [None, 3]
    assert cached.cache_stats().bypassed == 2


def test_inputs_that_do_not_fit_are_refused_as_without_a_cache(rows: RowCache) -> None:
    cached = Cached(doubling(), rows)
    with pytest.raises(SignatureError, match="expected float32"):
        cached.infer({"x": np.ones((1, 3), np.float32)})
    with pytest.raises(SignatureError, match="missing input"):
        cached.infer({})


def test_models_without_a_hash_share_nothing(rows: RowCache) -> None:
    first, second = doubling(), Counted(lambda x, config: {"y": -x, "z": x[:, 0]}, [X], [Y, Z])
    Cached(first, rows).infer({"x": pairs(1)})
    assert Cached(second, rows).infer({"x": pairs(1)})["y"][0, 0] == -1


def test_the_order_of_inputs_does_not_matter(rows: RowCache) -> None:
    specs = [TensorSpec("a", "float32", (-1,)), TensorSpec("b", "float32", (-1,))]
    model = Counted(lambda a, b, config: {"z": a - b}, specs, [Z])
    cached = Cached(model, rows)
    one, two = np.array([1], np.float32), np.array([2], np.float32)
    assert cached.infer({"a": one, "b": two})["z"] == cached.infer({"b": two, "a": one})["z"] == -1
    assert cached.infer({"a": two, "b": one})["z"] == 1
    assert len(model.calls) == 2


# --------------------------------------------------------------------- a servable around a servable


def test_what_the_model_says_of_itself_is_still_said() -> None:
    cached = Cached(doubling(), MemoryRows())
    assert (cached.device, cached.concurrency, cached.signature.name) == ("cpu", 3, "counted")
    assert not hasattr(cached, "ainfer")
    assert not hasattr(cached, "_nothing")
    assert not cached.never_waits
    assert "Counted" in repr(cached)


def test_ainfer_is_there_where_the_model_has_it_and_answers_alike() -> None:
    model = doubling(Awaited)
    cached = Cached(model, MemoryRows())

    async def calls() -> None:
        for x in (pairs(1, 2), pairs(2, 3, 2), pairs(1, 2, 3)):
            assert answered(await cached.ainfer({"x": x})) == answered(double(x))
        assert answered(await cached.ainfer({"x": pairs()})) == answered(double(pairs()))

    asyncio.run(calls())
    assert model.rows == [2, 1, 0]


@pytest.mark.parametrize(("rows_given", "on_loop"), [(10, True), (1000, False)])
def test_hashing_much_does_not_hold_up_a_loop(rows_given: int, on_loop: bool) -> None:
    seen: set[bool] = set()
    here = threading.get_ident()

    class Watched(MemoryRows):
        def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
            seen.add(threading.get_ident() == here)
            return super().get(keys)

        def put(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
            seen.add(threading.get_ident() == here)
            super().put(entries)

    cached = Cached(doubling(Awaited), Watched())
    asyncio.run(cached.ainfer({"x": np.ones((rows_given, 2), np.float32)}, ["y"]))
    asyncio.run(cached.ainfer({"x": np.arange(2 * rows_given, dtype=np.float32).reshape(-1, 2)}, ["y"]))
    assert seen == {on_loop}


def test_an_endpoint_is_asked_what_it_is_off_the_loop() -> None:
    with server_ref.running({"m": FunctionServable(lambda x: 2 * x, [X], [Y])}) as url, Endpoint(url) as endpoint:
        cached = Cached(endpoint, MemoryRows())
        for _ in range(2):
            assert asyncio.run(cached.ainfer({"x": pairs(1)}))["y"].tolist() == [[2, 3]]
        assert cached.cache_stats().answered == 1


def test_many_threads_get_right_answers_and_counts_that_add_up(make_rows: Callable[..., RowCache]) -> None:
    rows = make_rows(max_bytes=1 << 20)
    cached = Cached(doubling(), rows)
    wrong: list[Any] = []
    asked = [0] * 16

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(150):
            x = pairs(*(chance.randrange(40) for _ in range(chance.randrange(1, 6))))
            asked[number] += len(x)
            try:
                if answered(cached.infer({"x": x})) != answered(double(x)):
                    wrong.append(x)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    stats = cached.cache_stats()
    assert stats.hits + stats.misses == sum(asked)
    assert stats.lookups == 16 * 150
    assert stats.lookup_ns > 0


# ---------------------------------------------------------------------------------- age and order


def test_a_row_is_given_until_it_is_too_old(make_rows: Callable[..., RowCache]) -> None:
    clock = Clock()
    rows = make_rows(ttl_s=10.0, clock=clock)
    rows.put([(b"a", b"1")])
    clock.now += 9.99
    rows.put([(b"b", b"2")])
    assert rows.get([b"a", b"b", b"c"]) == [b"1", b"2", None]
    clock.now += 0.01
    assert rows.get([b"a", b"b"]) == [None, b"2"]
    rows.put([(b"a", b"3")])
    assert rows.get([b"a"]) == [b"3"]


def test_memory_gives_up_what_was_asked_for_longest_ago() -> None:
    rows = MemoryRows(3 * (1 + 1 + 320))
    rows.put([(b"a", b"1"), (b"b", b"2"), (b"c", b"3")])
    assert rows.get([b"a"]) == [b"1"]
    rows.put([(b"d", b"4")])
    assert rows.get([b"a", b"b", b"c", b"d"]) == [b"1", None, b"3", b"4"]
    assert rows.usage().evictions == 1
    rows.close()
    assert rows.usage()[:2] == (0, 0)


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"ttl_s": 0.0}, {"ttl_s": -1.0}, {"max_bytes": -5}])
def test_bounds_that_make_no_sense_are_refused(make_rows: Callable[..., RowCache], options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"at {next(iter(options))}"):
        make_rows(**options)


# ---------------------------------------------------------------------------------------- on disk


def test_rows_on_disk_outlive_the_process_that_put_them(tmp_path: Path) -> None:
    for time in range(2):
        model = doubling()
        rows = open_disk(tmp_path)
        assert answered(Cached(model, rows, model_hash="m").infer({"x": pairs(1, 2)})) == answered(double(pairs(1, 2)))
        assert model.rows == [2][time:]
        rows.close()


def test_rows_on_disk_are_for_this_user_alone(tmp_path: Path) -> None:
    rows = open_disk(tmp_path)
    rows.put([(b"a", b"1")])
    rows.flush()
    folder = tmp_path / "rows"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    rows.close()
    folder.chmod(0o770)
    with pytest.raises(SpecError, match="others may write to this folder"):
        open_disk(tmp_path)


CHILD = """
import sys, zlib
from server_ref.rowdisk import DiskRows
rows = DiskRows(sys.argv[1], max_bytes=1 << 21)
for number in range(200):
    rows.put([(bytes([number % 50]) * 48, bytes([number % 50]) * 3000)])
    found = rows.get([bytes([at]) * 48 for at in range(50)])
    assert all(value is None or value == bytes([at]) * 3000 for at, value in enumerate(found))
assert rows.flush(60.0)
rows.close()
"""


def child(source: str, *args: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, args)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_processes_share_rows_on_disk(tmp_path: Path) -> None:
    rows = open_disk(tmp_path, max_bytes=1 << 21)
    children = [child(CHILD, tmp_path / "rows") for _ in range(3)]
    for one in children:
        _, said = one.communicate(timeout=60)
        assert (one.returncode, said) == (0, "")
    assert rows.get([bytes([at]) * 48 for at in range(50)]) == [bytes([at]) * 3000 for at in range(50)]
    assert rows.usage().entries == 50
    rows.close()


def test_a_process_killed_as_it_writes_holds_up_no_other(tmp_path: Path) -> None:
    rows = open_disk(tmp_path)
    for number in range(3):
        writing = child(
            """
            import itertools, sys
            from server_ref.rowdisk import DiskRows
            rows = DiskRows(sys.argv[1])
            for number in itertools.count():
                rows.put([(number.to_bytes(4, "big"), bytes(3000))])
                rows.flush()
                print(number, flush=True)
            """,
            tmp_path / "rows",
        )
        assert writing.stdout is not None
        assert writing.stdout.readline() == "0\n"
        writing.kill()
        writing.communicate(timeout=60)
        rows.put([(b"mine", bytes([number]))])
        assert rows.flush(60.0)
        assert rows.get([b"mine", bytes(4)]) == [bytes([number]), bytes(3000)]
    rows.close()


def test_objects_of_one_process_share_what_is_open(tmp_path: Path) -> None:
    first, second = open_disk(tmp_path), open_disk(tmp_path)
    first.put([(b"a", b"1")])
    assert second.get([b"a"]) == [b"1"]
    first.close()
    first.close()
    assert (first.get([b"a"]), first.usage(), second.get([b"a"])) == ([None], Usage(0, 0, 0), [b"1"])
    first.put([(b"b", b"2")])
    second.close()
    third = open_disk(tmp_path)
    assert third.get([b"a", b"b"]) == [b"1", None]
    third.close()


def test_a_forked_process_serves_without_and_does_no_harm(tmp_path: Path) -> None:
    said = child(
        """
        import os, sys
        from server_ref.rowdisk import DiskRows
        rows = DiskRows(sys.argv[1])
        rows.put([(b"a", b"1")])
        rows.flush()
        pid = os.fork()
        if pid == 0:
            rows.put([(b"b", b"2")])
            print(rows.get([b"a", b"b"]), rows.flush())
            rows.close()
            sys.exit()
        os.waitpid(pid, 0)
        rows.put([(b"c", b"3")])
        print(rows.get([b"a", b"b", b"c"]), rows.flush())
        rows.close()
        """,
        tmp_path / "rows",
    ).communicate(timeout=60)
    assert said == ("[None, None] False\n[b'1', None, b'3'] True\n", "")


def test_a_damaged_row_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    rows = open_disk(tmp_path)
    rows.put([(b"a", b"right"), (b"b", b"other"), (b"c", b"short"), (b"d", b"whole")])
    rows.close()
    with lmdb.open(str(tmp_path / "rows"), max_dbs=2) as env, env.begin(write=True) as txn:
        values = env.open_db(b"values", txn=txn)
        txn.put(b"a", txn.get(b"a", db=values)[:-1] + b"!", db=values)
        txn.put(b"b", txn.get(b"d", db=values), db=values)  # a right record in a wrong place
        txn.put(b"c", b"x", db=values)
    rows = open_disk(tmp_path)
    assert rows.get([b"a", b"b", b"c", b"d"]) == [None, None, None, b"whole"]
    rows.close()


@pytest.mark.parametrize("damage", [0, 100, 8192, -4096, "garbage", "large"])
def test_a_damaged_file_starts_anew(tmp_path: Path, damage: int | str, caplog: pytest.LogCaptureFixture) -> None:
    rows = open_disk(tmp_path)
    rows.put([(bytes([at]), bytes(4000)) for at in range(100)])
    rows.close()
    data = tmp_path / "rows" / "data.mdb"
    if damage == "garbage":
        data.write_bytes(os.urandom(1 << 16))
    else:
        os.truncate(data, data.stat().st_size + damage if damage == -4096 else 1 << 30 if damage == "large" else damage)
    rows = open_disk(tmp_path, max_bytes=1 << 24)
    assert rows.get([b"\0"]) == [None]
    rows.put([(b"a", b"1")])
    assert rows.flush()
    assert rows.get([b"a"]) == [b"1"]
    assert len(caplog.records) <= 1
    rows.close()


def test_a_folder_that_cannot_be_used_is_said_once_and_served_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rows").write_text("a file", "utf-8")
    model = doubling()
    rows = open_disk(tmp_path)
    cached = Cached(model, rows)
    for _ in range(3):
        assert answered(cached.infer({"x": pairs(1)})) == answered(double(pairs(1)))
    assert len(model.calls) == 3
    (record,) = caplog.records
    assert "cannot be opened" in record.getMessage()
    assert str(tmp_path / "rows") in record.getMessage()
    rows.close()


FULL = """
import logging, resource, sys
logging.basicConfig(format="%(message)s")
from server_ref.rowdisk import DiskRows
rows = DiskRows(sys.argv[1])
rows.put([(b"early", b"kept")])
assert rows.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
for number in range(20):
    rows.put([(number.to_bytes(2, "big"), bytes(20_000))])
    rows.flush()
print(rows.get([b"early", (19).to_bytes(2, "big")]))
rows.close()
"""


def test_a_full_disk_is_said_once_and_what_is_there_is_still_found(tmp_path: Path) -> None:
    out, said = child(FULL, tmp_path / "rows").communicate(timeout=60)
    assert out == "[b'kept', None]\n"
    (line,) = said.splitlines()
    assert line.startswith("rows on disk cannot be written, so no more are kept")


def test_rows_from_a_time_to_come_are_not_given(tmp_path: Path) -> None:
    clock = Clock()
    rows = open_disk(tmp_path, clock=clock, ttl_s=10.0)
    rows.put([(b"a", b"1")])
    clock.now -= 3600
    assert rows.get([b"a"]) == [None]
    rows.close()


def test_without_lmdb_the_line_to_type_is_named() -> None:
    source = "import sys; sys.modules['lmdb'] = None; import server_ref.cache; import server_ref.rowdisk"
    _, said = child(source).communicate(timeout=60)
    assert said.endswith("ImportError: server_ref.rowdisk needs lmdb: pip install 'remote-ops[cache]'\n")
