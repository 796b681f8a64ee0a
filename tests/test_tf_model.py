"""`TFModel`: what SavedModels, frozen graphs and Keras files answer through a servable, against TensorFlow itself."""

from __future__ import annotations

import base64
import gc
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import tensorflow as tf

import server_ref
from remote_ops import (
    Endpoint,
    InternalError,
    NotDifferentiable,
    Servable,
    SignatureError,
    SpecError,
    TensorSpec,
    graphpipe,
    load,
)
from remote_ops.deadline import Deadline
from remote_ops.errors import DeadlineExceeded, InvalidRequest
from remote_ops.tf import TFModel
from server_ref.__main__ import main

# How Keras turns TensorFlow's variables into arrays when it saves a model.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(0)
F32 = tf.float32


def floats(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


class Mixed(tf.Module):
    """Two float inputs and words; float outputs that hang on them with and without a derivative, and others."""

    def __init__(self, vocabulary: Path) -> None:
        super().__init__()
        vocabulary.write_text("cat\ndog\n")
        words = tf.lookup.TextFileInitializer(
            str(vocabulary),
            tf.string,
            tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64,
            tf.lookup.TextFileIndex.LINE_NUMBER,
        )
        self.table = tf.lookup.StaticHashTable(words, -1)
        self.weight = tf.Variable(np.arange(12, dtype=np.float32).reshape(4, 3) / 12)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 4], F32, "x"),
            tf.TensorSpec([None, 1], F32, "scale"),
            tf.TensorSpec([None], tf.string, "word"),
        ]
    )
    def __call__(self, x: Any, scale: Any, word: Any) -> dict[str, Any]:
        @tf.custom_gradient
        def thrice(value: Any) -> Any:
            return 3 * value, lambda upstream: 300 * upstream

        return {
            "mixed": tf.tanh(x @ self.weight) * scale,
            "norm": tf.reduce_sum(x * x, 1),
            "steps": tf.cast(tf.cast(x, tf.int32), F32),
            "custom": thrice(x),
            "id": self.table.lookup(word),
            "loud": tf.strings.upper(word),
        }


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A TensorFlow 2 SavedModel, the module that it is of, and the same opened."""
    folder = tmp_path_factory.mktemp("saved")
    module = Mixed(folder / "words.txt")
    tf.saved_model.save(module, str(folder / "mixed"), signatures=module.__call__)
    (folder / "words.txt").unlink()
    return module, folder / "mixed", TFModel(folder / "mixed", device="cpu")


def mixed_inputs(rows: int) -> dict[str, Any]:
    words = np.array([b"dog", b"cat", b"\xff\x00"] * rows, dtype=object)[:rows]
    return {"x": floats(rows, 4), "scale": floats(rows, 1), "word": words}


def local_gradients(module: Any, inputs: dict[str, Any], seeds: dict[str, Any], of: list[str]) -> dict[str, Any]:
    """What `tf.GradientTape` says of the Python module itself."""
    tensors = {name: tf.constant(array) for name, array in inputs.items()}
    with tf.GradientTape() as tape:
        tape.watch([tensors[name] for name in of])
        found = module(**tensors)
    values = tape.gradient(
        [found[name] for name in seeds], [tensors[name] for name in of], [tf.constant(seed) for seed in seeds.values()]
    )
    return {name: tf.convert_to_tensor(value).numpy() for name, value in zip(of, values, strict=True)}


def frozen(path: Path, build: Callable[[], Any]) -> Path:
    """Write the graph that `build` builds, as TensorFlow 1 did."""
    with tf.Graph().as_default() as graph:
        build()
    path.write_bytes(graph.as_graph_def().SerializeToString())
    return path


def small_graph() -> None:
    x = tf.compat.v1.placeholder(F32, [None, 4], name="x")
    logits = tf.matmul(x, tf.constant(np.eye(4, 3, dtype=np.float32)), name="logits")
    tf.nn.softmax(logits, name="probs")
    tf.compat.v1.placeholder(tf.float64, None, name="spare")


def saved(path: Path, fn: Any, *specs: Any) -> Path:
    """A SavedModel of one function."""
    module = tf.Module()
    module.fn = tf.function(fn, input_signature=specs or [tf.TensorSpec([None], F32, "x")])
    gc.collect()  # what TensorFlow frees while it traces, it writes into the graph that it traces
    gc.disable()
    try:
        tf.saved_model.save(module, str(path), signatures=module.fn)
    finally:
        gc.enable()
    return path


def test_it_is_a_servable_that_says_what_it_takes_and_gives(mixed: Any) -> None:
    _, folder, model = mixed
    assert isinstance(model, Servable)
    assert str(model.signature) == (
        "(scale: float32 [-1, 1], word: string [-1], x: float32 [-1, 4])"
        " -> (custom: float32 [-1, 4], id: int64 [-1], loud: string [-1], mixed: float32 [-1, 3],"
        " norm: float32 [-1], steps: float32 [-1, 4])"
    )
    assert {spec.name: spec.differentiable for spec in model.signature.inputs} == {
        "x": True,
        "scale": True,
        "word": False,
    }
    assert model.signature.name == "mixed"
    assert repr(model) == f"TFModel({str(folder)!r}, device='cpu')"
    assert model.never_waits is False
    assert model.concurrency >= 1
    assert TFModel(folder, name="mine").signature.name == "mine"
    assert isinstance(load(folder), TFModel)


def test_a_saved_model_answers_as_the_module_that_it_is_of_strings_and_tables_included(mixed: Any) -> None:
    module, _, model = mixed
    inputs = mixed_inputs(5)
    expected = module(**{name: tf.constant(array) for name, array in inputs.items()})
    with server_ref.running({"mixed": model}) as url:
        answer = Endpoint(url).infer(inputs)
    for name, array in answer.items():
        np.testing.assert_array_equal(array, expected[name].numpy())
    assert answer["loud"].tolist()[:3] == [b"DOG", b"CAT", b"\xff\x00"]
    assert answer["id"].tolist()[:3] == [1, 0, -1]


def test_gradients_are_those_of_gradient_tape(mixed: Any) -> None:
    module, _, model = mixed
    inputs = mixed_inputs(5)
    seeds = {"mixed": floats(5, 3), "norm": floats(5), "custom": floats(5, 4)}
    sent = {**inputs, **{f"cotangent:{name}": seed for name, seed in seeds.items()}}
    with server_ref.running({"mixed": model}) as url:
        answer = Endpoint(url).infer(sent, ["gradient:scale", "mixed", "gradient:x"])
    expected = local_gradients(module, inputs, seeds, ["x", "scale"])
    np.testing.assert_allclose(answer["gradient:x"], expected["x"], rtol=1e-5)
    np.testing.assert_allclose(answer["gradient:scale"], expected["scale"], rtol=1e-5)
    np.testing.assert_array_equal(answer["mixed"], model.infer(inputs)["mixed"])


def test_a_gradient_that_does_not_exist_is_an_error_and_never_zeros(mixed: Any) -> None:
    _, _, model = mixed
    inputs = mixed_inputs(2)
    steps = {**inputs, "cotangent:steps": np.ones((2, 4), np.float32)}
    with pytest.raises(NotDifferentiable, match=r"model 'mixed' .* of 'steps' with respect to 'x'"):
        model.infer(steps, ["gradient:x"])
    both = {**steps, "cotangent:mixed": np.ones((2, 3), np.float32)}
    with pytest.raises(NotDifferentiable, match="'scale'"):
        model.infer(steps, ["gradient:scale"])
    assert np.abs(model.infer(both, ["gradient:x"])["gradient:x"]).sum() > 0
    with pytest.raises(NotDifferentiable, match="word"):
        model.infer(both, ["gradient:word"])
    with pytest.raises(NotDifferentiable, match="'id'"):
        model.infer({**inputs, "cotangent:id": np.ones(2)}, ["gradient:x"])


def test_an_input_that_no_such_output_hangs_on_has_gradient_zero_beside_one_that_it_does(
    mixed: Any, tmp_path: Path
) -> None:
    _, _, model = mixed
    inputs = {**mixed_inputs(2), "cotangent:norm": np.ones(2, np.float32)}
    got = model.infer(inputs, ["gradient:x", "gradient:scale"])
    np.testing.assert_array_equal(got["gradient:scale"], np.zeros((2, 1)))
    np.testing.assert_allclose(got["gradient:x"], 2 * inputs["x"])
    spec = [tf.TensorSpec([None], F32, name) for name in ("a", "b")]
    lossy = TFModel(saved(tmp_path / "m", lambda a, b: {"y": a * tf.cast(tf.cast(b, tf.int32), F32)}, *spec))
    assert [part.differentiable for part in lossy.signature.inputs] == [True, False]
    whole = TFModel(saved(tmp_path / "w", lambda a, b: {"y": a * tf.floor(b), "z": b * 2}, *spec))
    ones = np.ones(2, np.float32)
    with pytest.raises(NotDifferentiable, match=r"'y' with respect to 'b'"):
        whole.infer({"a": ones, "b": ones, "cotangent:y": ones}, ["gradient:a", "gradient:b"])


def test_a_missing_cotangent_is_zero_and_one_of_another_shape_is_refused(mixed: Any) -> None:
    _, _, model = mixed
    inputs = mixed_inputs(2)
    np.testing.assert_array_equal(model.infer(inputs, ["gradient:x"])["gradient:x"], np.zeros((2, 4)))
    with pytest.raises(SignatureError, match=r"'cotangent:norm': expected float32 \[2\].*got float32 \[3\]"):
        model.infer({**inputs, "cotangent:norm": np.ones(3, np.float32)}, ["gradient:x"])


def test_control_flow_gathers_and_second_calls_have_gradients(tmp_path: Path) -> None:
    def fn(x: Any) -> dict[str, Any]:
        total = tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, y * x), (0, x))[1]
        chosen = tf.cond(tf.reduce_sum(x) > 0, lambda: x * 2, lambda: x * 5)
        return {"power": total, "chosen": chosen, "picked": tf.gather(x, [1, 1])}

    model = TFModel(saved(tmp_path / "flow", fn))
    x, one = np.array([1.0, 2.0], np.float32), np.ones(2, np.float32)
    for name, expected in (("power", 4 * x**3), ("chosen", [2, 2]), ("picked", [0, 2])):
        got = model.infer({"x": x, f"cotangent:{name}": one}, ["gradient:x"])["gradient:x"]
        np.testing.assert_allclose(got, expected)


def test_sixteen_threads_get_their_own_answers_and_gradients(mixed: Any) -> None:
    module, _, model = mixed
    work = [(mixed_inputs(rows), floats(rows, 3)) for rows in (1, 2, 3, 5) * 16]
    barrier = threading.Barrier(16)
    with server_ref.running({"mixed": model}) as url, ThreadPoolExecutor(16, initializer=barrier.wait) as pool:
        endpoint = Endpoint(url)
        call = lambda pair: endpoint.infer({**pair[0], "cotangent:mixed": pair[1]}, ["gradient:x", "loud"])  # noqa: E731
        answers = list(pool.map(call, work))
    for (inputs, seed), answer in zip(work, answers, strict=True):
        expected = local_gradients(module, inputs, {"mixed": seed}, ["x"])["x"]
        np.testing.assert_allclose(answer["gradient:x"], expected, rtol=1e-4, atol=1e-6)
        assert answer["loud"].tolist() == [word.upper() for word in inputs["word"]]


def test_it_runs_the_same_inside_a_graph_a_tape_or_another_thread(mixed: Any) -> None:
    _, _, model = mixed
    inputs = {**mixed_inputs(2), "cotangent:norm": np.ones(2, np.float32)}
    expected = model.infer(inputs, ["gradient:x"])["gradient:x"]
    seen = []

    @tf.function
    def traced() -> Any:
        seen.append(model.infer(inputs, ["gradient:x"])["gradient:x"])
        return tf.constant(0)

    traced()
    with tf.Graph().as_default():
        seen.append(model.infer(inputs, ["gradient:x"])["gradient:x"])
    with tf.GradientTape():
        seen.append(model.infer(inputs, ["gradient:x"])["gradient:x"])
    assert len(seen) == 3
    for got in seen:
        np.testing.assert_array_equal(got, expected)


def test_open_sizes_are_minus_one_and_an_open_rank_is_no_shape(tmp_path: Path) -> None:
    spec = [tf.TensorSpec([2, None, 3], tf.int64, "a"), tf.TensorSpec(None, tf.bool, "b")]
    model = TFModel(saved(tmp_path / "m", lambda a, b: {"a2": a * 2, "a10": a, "b": tf.logical_not(b)}, *spec))
    assert model.signature.inputs == (TensorSpec("a", "int64", (2, -1, 3)), TensorSpec("b", "bool", None))
    assert [(spec.name, spec.shape) for spec in model.signature.outputs] == [
        ("a2", (2, -1, 3)),
        ("a10", (2, -1, 3)),
        ("b", None),
    ]
    with server_ref.running({"m": model}) as url:
        answer = Endpoint(url).infer({"a": np.ones((2, 5, 3), np.int64), "b": np.array(True)})
    assert answer["b"].shape == ()
    assert not answer["b"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "uint8", "int16", "uint32"])
def test_other_dtypes_pass_as_they_are(tmp_path: Path, dtype: str) -> None:
    kind = tf.as_dtype(dtype)
    model = TFModel(saved(tmp_path / "m", lambda x: {"y": x + x}, tf.TensorSpec([None], kind, "x")))
    x = np.arange(5).astype(kind.as_numpy_dtype)
    answer = model.infer({"x": x})["y"]
    assert answer.dtype == x.dtype
    np.testing.assert_array_equal(answer.astype(float), [0, 2, 4, 6, 8])


def test_large_inputs_are_not_changed_and_results_are_the_callers_own(tmp_path: Path) -> None:
    weight = tf.Variable(np.ones((1 << 16,), np.float32))
    module = tf.Module()
    module.weight = weight
    module.fn = tf.function(
        lambda x: {"same": tf.identity(x), "weight": tf.identity(weight), "sum": x + 1},
        input_signature=[tf.TensorSpec([None], F32, "x")],
    )
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.fn)
    model = TFModel(tmp_path / "m", device="cpu")
    raw = np.zeros((1 << 16) + 32, np.float32)
    skip = -raw.ctypes.data % 64 // 4
    aligned, shifted = raw[skip : skip + (1 << 16)], raw[skip + 1 : skip + 1 + (1 << 16)]
    frozen_ = aligned.copy()
    frozen_.flags.writeable = False
    for x in (aligned, shifted, frozen_, aligned[::2], aligned.astype(">f4")):
        found = model.infer({"x": x})
        for result in found.values():
            assert not np.shares_memory(result, raw)
            result += 7
        assert not x.any()
        np.testing.assert_array_equal(model.infer({"x": x})["weight"], 1)


def test_a_signature_can_be_chosen_and_a_missing_one_names_those_there_are(tmp_path: Path) -> None:
    module = tf.Module()
    spec = [tf.TensorSpec([None], F32, "x")]
    signatures = {
        name: tf.function(lambda x, by=by: {"y": x * by, "z": x}, input_signature=spec).get_concrete_function()
        for name, by in (("twice", 2.0), ("thrice", 3.0))
    }
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=signatures)
    assert load(tmp_path / "m", signature="thrice").infer({"x": [1.0]})["y"] == [3]
    with pytest.raises(SpecError, match=r"no signature 'serving_default': expected one of thrice, twice"):
        TFModel(tmp_path / "m")
    part = TFModel(tmp_path / "m", signature="twice", outputs="z,y")
    assert [spec.name for spec in part.signature.outputs] == ["z", "y"]
    with pytest.raises(SpecError, match="the signature has no output 'w'"):
        TFModel(tmp_path / "m", signature="twice", outputs=["w"])
    with pytest.raises(SpecError, match="not for a frozen graph"):
        TFModel(frozen(tmp_path / "g.pb", small_graph), signature="twice")


def test_a_frozen_graph_has_the_inputs_and_outputs_that_graphpipe_tf_gives_it(tmp_path: Path) -> None:
    model = TFModel(frozen(tmp_path / "small.pb", small_graph))
    assert str(model.signature) == "(x: float32 [-1, 4], spare: float64 of any shape) -> (probs: float32 [-1, 3])"
    assert model.signature.name == "small"
    chosen = load(tmp_path / "small.pb", inputs="x", outputs=["logits", "probs:0"])
    assert str(chosen.signature) == "(x: float32 [-1, 4]) -> (logits: float32 [-1, 3], probs: float32 [-1, 3])"
    x, seed = floats(2, 4), floats(2, 3)
    answer = chosen.infer({"x": x, "cotangent:logits": seed}, ["logits", "gradient:x"])
    np.testing.assert_allclose(answer["logits"], x[:, :3])
    np.testing.assert_allclose(answer["gradient:x"], np.pad(seed, ((0, 0), (0, 1))))
    for option in ({"inputs": ["y"]}, {"outputs": ["prob"]}, {"outputs": ["probs:3"]}):
        with pytest.raises(SpecError, match=r"the graph has no|no such"):
            TFModel(tmp_path / "small.pb", **option)


def test_an_input_of_a_graph_may_be_in_its_middle_and_an_output_may_be_an_input(tmp_path: Path) -> None:
    frozen(tmp_path / "small.pb", small_graph)
    model = TFModel(tmp_path / "small.pb", inputs="logits", outputs="logits,probs")
    x = floats(2, 3)
    answer = model.infer({"logits": x})
    np.testing.assert_array_equal(answer["logits"], x)
    np.testing.assert_allclose(answer["probs"], tf.nn.softmax(x).numpy())


def asked_over_graphpipe(url: str, inputs: dict[str, Any], outputs: list[str]) -> list[Any]:
    """What an old client gets, which checks no names: the arrays in the order asked for."""
    body = b"".join(graphpipe.encode_request(tuple(inputs), list(inputs.values()), tuple(outputs)))
    with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=30) as answer:
        return list(graphpipe.decode_response(answer.read()).tensors)


def test_names_with_and_without_their_index_are_taken_over_graphpipe(mixed: Any, tmp_path: Path) -> None:
    graph, x = TFModel(frozen(tmp_path / "small.pb", small_graph), inputs="x"), floats(2, 4)
    with server_ref.running({"small": graph}) as url:
        got = [asked_over_graphpipe(url, {name: x}, [out]) for name in ("x", "x:0", "") for out in ("probs", "probs:0")]
    for (array,) in got:
        np.testing.assert_array_equal(array, got[0][0])
    _, _, model = mixed
    inputs = mixed_inputs(2)
    renamed = {"x:0": inputs["x"], "serving_default_scale:0": inputs["scale"], "word": inputs["word"]}
    found = model.infer({**renamed, "cotangent:norm:0": np.ones(2, np.float32)}, ["loud:0", "norm", "gradient:x:0"])
    assert list(found) == ["loud:0", "norm", "gradient:x:0"]
    with pytest.raises(SignatureError, match="given twice"):
        model.infer({**inputs, "x:0": inputs["x"]})
    with pytest.raises(SignatureError, match="asked for twice"):
        model.infer(inputs, ["norm", "norm:0"])
    with pytest.raises(SignatureError, match="no output 'norm:1'"):
        model.infer(inputs, ["norm:1"])


@pytest.mark.parametrize("resource", [True, False])
def test_a_saved_model_of_tensorflow_1_opens_with_its_variables_tables_and_assets(
    tmp_path: Path, resource: bool
) -> None:
    v1 = tf.compat.v1
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(F32, [None, 2], name="x")
        word = v1.placeholder(tf.string, [None], name="word")
        weight = v1.get_variable("w", initializer=np.full((2, 2), 3, np.float32), use_resource=resource)
        spare = v1.get_variable("spare", initializer=1.0, use_resource=resource)
        asset = tf.constant(str(tmp_path / "words.txt"))
        v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, asset)
        table = v1.lookup.StaticHashTable(
            v1.lookup.TextFileInitializer(asset, tf.string, 0 - 2, tf.int64, -1), -1, name="table"
        )
        y, row = tf.matmul(x, weight, name="y"), table.lookup(word)
        session.run([v1.global_variables_initializer(), v1.tables_initializer()])
        session.run(v1.assign(spare, 2.0))
        builder = v1.saved_model.Builder(str(tmp_path / "one"))
        info = v1.saved_model.build_tensor_info
        signature = v1.saved_model.build_signature_def(
            {"x": info(x), "word": info(word)}, {"y": info(y), "row": info(row)}, "predict"
        )
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            {"serving_default": signature},
            assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
            main_op=v1.tables_initializer(),
        )
        builder.save()
    (tmp_path / "words.txt").unlink()
    model = TFModel(tmp_path / "one")
    inputs = {"x": np.ones((1, 2), np.float32), "word": np.array(["dog"])}
    found = model.infer({**inputs, "cotangent:y": np.ones((1, 2), np.float32)}, ["y", "row", "gradient:x"])
    assert found["y"].tolist() == [[6, 6]]
    assert found["row"].tolist() == [1]
    assert found["gradient:x"].tolist() == [[6, 6]]


def keras_model() -> Any:
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="pixels")
    hidden = keras.layers.BatchNormalization()(keras.layers.Dense(8, activation="tanh")(inputs))
    outputs = [
        keras.layers.Dense(3, name="probs", activation="softmax")(keras.layers.Dropout(0.5)(hidden)),
        keras.layers.Dense(1, name="size")(hidden),
    ]
    return keras.Model(inputs, outputs)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_keras_file_answers_and_differentiates_as_its_model_not_training(tmp_path: Path, suffix: str) -> None:
    keras = keras_model()
    keras.save(tmp_path / f"net{suffix}")
    model = load(tmp_path / f"net{suffix}")
    assert str(model.signature) == "(pixels: float32 [-1, 4]) -> (probs: float32 [-1, 3], size: float32 [-1, 1])"
    assert model.signature.name == "net"
    x, seed = floats(5, 4), floats(5, 3)
    with server_ref.running({"net": model}) as url:
        answer = Endpoint(url).infer({"pixels": x, "cotangent:probs": seed}, ["probs", "size", "gradient:pixels"])
    given = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(given)
        probs, size = keras(given, training=False)
    np.testing.assert_allclose(answer["probs"], probs.numpy(), rtol=1e-5)
    np.testing.assert_allclose(answer["size"], size.numpy(), rtol=1e-5)
    gradient = tape.gradient(probs, given, tf.constant(seed)).numpy()
    np.testing.assert_allclose(answer["gradient:pixels"], gradient, rtol=1e-4, atol=1e-6)


def test_a_keras_model_is_taken_as_it_is_and_one_that_was_exported_too(tmp_path: Path) -> None:
    keras = keras_model()
    x = floats(2, 4)
    expected = [array.numpy() for array in keras(x, training=False)]
    keras.export(str(tmp_path / "net"), verbose=False)
    for model in (TFModel(keras), TFModel(tmp_path / "net")):
        found = model.infer({model.signature.inputs[0].name: x})
        for got, wanted in zip(found.values(), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5)
        assert model.signature.inputs[0].differentiable


def test_the_variables_of_a_keras_model_live_as_long_as_what_serves_it() -> None:
    model = TFModel(keras_model())
    gc.collect()
    x, seed = floats(2, 4), floats(2, 3)
    found = model.infer({"pixels": x, "cotangent:probs": seed}, ["probs", "gradient:pixels"])
    assert np.abs(found["gradient:pixels"]).max() > 0


def test_a_keras_model_of_dicts_keeps_their_names() -> None:
    keras = pytest.importorskip("keras")
    inputs = {name: keras.Input((2,), name=name) for name in ("b", "a")}
    model = TFModel(keras.Model(inputs, {"sum": inputs["a"] + inputs["b"], "less": inputs["a"] - inputs["b"]}))
    one, two = np.ones((1, 2), np.float32), np.full((1, 2), 2, np.float32)
    found = model.infer({"a": one, "b": two})
    assert {name: array.tolist() for name, array in found.items()} == {"less": [[-1, -1]], "sum": [[3, 3]]}


class Evil:
    """What a hostile file would do, if it could: a mark on the disk."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "mark"

    def __call__(self, x: Any) -> Any:
        self.mark.write_text("here")
        return x


def test_a_saved_model_that_calls_python_or_touches_files_is_refused_with_the_operations(tmp_path: Path) -> None:
    evil = Evil(tmp_path)
    mark = str(tmp_path / "mark")

    def writes(x: Any) -> dict[str, Any]:
        with tf.control_dependencies([tf.io.write_file(mark, "here")]):
            return {"y": tf.identity(x)}

    dataset = lambda x: {"y": x + tf.data.TextLineDataset(mark).reduce(0.0, lambda a, b: a)}  # noqa: E731
    for number, (fn, operation) in enumerate(
        [
            (lambda x: {"y": tf.py_function(evil, [x], F32)}, "EagerPyFunc"),
            (lambda x: {"y": tf.numpy_function(evil, [x], F32)}, "PyFunc"),
            (lambda x: {"y": tf.numpy_function(evil, [x], F32, stateful=False)}, "PyFuncStateless"),
            (writes, "WriteFile"),
            (lambda x: {"y": x, "z": tf.io.read_file("/etc/passwd")}, "ReadFile"),
            (lambda x: {"y": x, "z": tf.io.matching_files("/*")}, "MatchingFiles"),
            (lambda x: {"y": x, "z": tf.raw_ops.RestoreV2(
                prefix=mark, tensor_names=["w"], shape_and_slices=[""], dtypes=[F32])[0]}, "RestoreV2"),
            (lambda x: {"y": tf.while_loop(
                lambda i, _: i < 1,
                lambda i, y: (i + 1, y + tf.cast(tf.strings.length(tf.io.read_file(mark)), F32)),
                (0, x))[1]}, "ReadFile"),
            (dataset, "Dataset"),
            (lambda x: {"y": x, "z": tf.raw_ops.ImmutableConst(
                dtype=tf.uint8, shape=[1], memory_region_name="/etc/passwd")}, "ImmutableConst"),
            (lambda x: {"y": tf.raw_ops.DebugIdentityV2(
                input=x, debug_urls=[f"file://{tmp_path}/debug"])}, "DebugIdentityV2"),
        ]
    ):  # fmt: skip
        folder = saved(tmp_path / str(number), fn)
        with pytest.raises(SpecError, match=rf"refused.*{operation}.*save a signature that only computes - at"):
            TFModel(folder)
    assert not evil.mark.exists()
    assert not (tmp_path / "debug").exists()


def test_printing_to_a_file_is_refused_and_to_stderr_is_not(tmp_path: Path) -> None:
    def printing(stream: str) -> Any:
        def fn(x: Any) -> dict[str, Any]:
            with tf.control_dependencies([tf.print("x", output_stream=stream)]):
                return {"y": tf.identity(x)}

        return fn

    TFModel(saved(tmp_path / "a", printing("file:///dev/stderr".replace("file:///dev/", "") and sys.stderr)))
    with pytest.raises(SpecError, match=r"PrintV2 \(writes a file"):
        TFModel(saved(tmp_path / "b", printing(f"file://{tmp_path}/mark")))


def test_what_the_signature_does_not_reach_is_neither_refused_nor_loaded(tmp_path: Path) -> None:
    module, evil = tf.Module(), Evil(tmp_path)
    spec = [tf.TensorSpec([None], F32, "x")]
    module.bad = tf.function(lambda x: {"y": tf.py_function(evil, [x], F32)}, input_signature=spec)
    module.good = tf.function(lambda x: {"y": x + 1}, input_signature=spec)
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"bad": module.bad, "good": module.good})
    assert TFModel(tmp_path / "m", signature="good").infer({"x": [1.0]})["y"] == [2]
    with pytest.raises(SpecError, match="EagerPyFunc"):
        TFModel(tmp_path / "m", signature="bad")


def edited(source: Path, target: Path, edit: Callable[[Any], None]) -> Path:
    """A copy of a SavedModel whose meta graph was changed by hand."""
    from tensorflow.core.protobuf import saved_model_pb2

    shutil.copytree(source, target)
    message = saved_model_pb2.SavedModel()
    message.ParseFromString((target / "saved_model.pb").read_bytes())
    edit(message.meta_graphs[0])
    (target / "saved_model.pb").write_bytes(message.SerializeToString())
    return target


def test_what_runs_while_a_saved_model_is_opened_is_looked_at_too(mixed: Any, tmp_path: Path) -> None:
    _, folder, _ = mixed
    mark = tmp_path / "mark"

    def add_writer(graph: Any) -> None:
        for name, value in (("at", str(mark)), ("what", "here")):
            node = graph.node.add(name=name, op="Const")
            node.attr["dtype"].type = tf.string.as_datatype_enum
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
        graph.node.add(name="writer", op="WriteFile", input=["at", "what"])

    def in_initializer(meta: Any) -> None:
        add_writer(meta.graph_def)
        next(node for node in meta.graph_def.node if node.name == "NoOp").input.append("^writer")

    def as_restore(meta: Any) -> None:
        add_writer(meta.graph_def)
        meta.saver_def.restore_op_name = "writer"

    def other_checkpoint(meta: Any) -> None:
        add_writer(meta.graph_def)
        called = next(node for node in meta.graph_def.node if node.name == meta.saver_def.restore_op_name)
        called.input[0] = "at"

    def other_table(meta: Any) -> None:
        add_writer(meta.graph_def)
        for node in meta.graph_def.node:
            if node.op == "AssignVariableOp" and node.input[1] == "asset_path_initializer":
                node.input[1] = "at"

    def asset_outside(meta: Any) -> None:
        meta.asset_file_def[0].filename = "../../../../etc/passwd"

    for number, (edit, reason) in enumerate(
        [
            (in_initializer, "WriteFile"),
            (as_restore, "WriteFile"),
            (other_checkpoint, r"RestoreV2 \(reads a file"),
            (other_table, r"InitializeTableFromTextFileV2 \(reads a file"),
            (asset_outside, "is outside of the folder"),
        ]
    ):
        with pytest.raises(SpecError, match=reason):
            TFModel(edited(folder, tmp_path / str(number), edit))
    assert not mark.exists()
    TFModel(edited(folder, tmp_path / "plain", lambda meta: None))


def test_a_handle_of_what_belongs_to_another_model_is_refused(mixed: Any, tmp_path: Path) -> None:
    _, folder, _ = mixed

    def steal(meta: Any) -> None:
        for node in meta.graph_def.node:
            if node.op == "VarHandleOp":
                node.op = "Const"
                node.attr["dtype"].type = tf.resource.as_datatype_enum

    with pytest.raises(SpecError, match=r"Const \(makes a handle of something that is not the model's"):
        TFModel(edited(folder, tmp_path / "m", steal))


def test_no_operation_that_is_taken_has_a_file_or_an_address_among_its_attributes() -> None:
    from tensorflow.core.framework import op_def_pb2
    from tensorflow.python.client import pywrap_tf_session as session

    from remote_ops.tf import vetted

    known = op_def_pb2.OpList.FromString(session.TF_GetBuffer(session.TF_GetAllOpList()))
    assert len(known.op) > 1000
    for definition in known.op:
        node = tf.compat.v1.NodeDef(name="n", op=definition.name)
        if vetted._reason(node, lambda tensor: False, ()):
            continue
        names = {part.name.lower() for part in (*definition.attr, *definition.input_arg)}
        told = [name for name in names if any(word in name for word in ("file", "url", "address", "region", "library"))]
        assert told == [], definition.name


def test_operations_that_nothing_here_defines_are_named(mixed: Any, tmp_path: Path) -> None:
    _, folder, _ = mixed

    def custom(meta: Any) -> None:
        for function in meta.graph_def.library.function:
            for node in function.node_def:
                node.op = "EvilCorp>Tanh" if node.op == "Tanh" else node.op

    with pytest.raises(SpecError, match=r"EvilCorp>Tanh \(no operation that is defined here, in function"):
        TFModel(edited(folder, tmp_path / "m", custom))


def test_frozen_graphs_that_touch_files_or_hold_variables_are_refused(tmp_path: Path) -> None:
    def reads() -> None:
        tf.identity(tf.io.read_file(tf.compat.v1.placeholder(tf.string, [], name="x")), name="y")

    with pytest.raises(SpecError, match="ReadFile"):
        TFModel(frozen(tmp_path / "a.pb", reads))
    with pytest.raises(SpecError, match="not frozen: 'v' is a variable"):
        TFModel(frozen(tmp_path / "b.pb", lambda: tf.compat.v1.get_variable("v", [2])))


@pytest.mark.parametrize("cut", [0, 1, 7, 100, -1])
def test_files_that_are_none_or_cut_off_are_refused(mixed: Any, tmp_path: Path, cut: int) -> None:
    _, folder, _ = mixed
    whole = (folder / "saved_model.pb").read_bytes()
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "saved_model.pb").write_bytes(whole[:cut])
    with pytest.raises(SpecError, match=r" - at .*"):
        TFModel(tmp_path / "m")
    for suffix in (".pb", ".keras", ".h5"):
        (tmp_path / f"m{suffix}").write_bytes(whole[:cut])
        with pytest.raises(SpecError, match=rf"m\{suffix}"):
            TFModel(tmp_path / f"m{suffix}")


def test_variables_that_are_missing_or_of_another_model_are_refused(mixed: Any, tmp_path: Path) -> None:
    _, folder, _ = mixed
    other = saved(tmp_path / "other", lambda x: {"y": x})
    for name, fault in (("gone", "no file variables"), ("other_", "cannot be restored")):
        copy = tmp_path / f"m{name}"
        shutil.copytree(folder, copy)
        shutil.rmtree(copy / "variables")
        if name == "other_":
            shutil.copytree(other / "variables", copy / "variables")
        with pytest.raises(SpecError, match=fault):
            TFModel(copy)


def test_what_is_no_model_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match=r"folder with a saved_model\.pb.*got a folder without one"):
        load(tmp_path / "empty")
    with pytest.raises(SpecError, match="no such file"):
        TFModel(tmp_path / "empty")
    with pytest.raises(SpecError, match="no such file or folder"):
        TFModel(tmp_path / "no")
    with pytest.raises(SpecError, match=r"got a int|got an? int"):
        TFModel(3)
    with pytest.raises(SpecError, match="sha256: not for a folder"):
        load(saved(tmp_path / "m", lambda x: {"y": x}), sha256="0" * 64)
    for device in ("gpu", "cuda:x"):
        with pytest.raises(SpecError, match="expected auto, cpu, cuda or cuda:N"):
            TFModel(tmp_path / "m", device=device)
    if not tf.config.list_physical_devices("GPU"):
        with pytest.raises(SpecError, match="no working CUDA for 'cuda:0'"):
            TFModel(tmp_path / "m", device="cuda:0")


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_lambda_is_refused_with_the_reason_and_its_code_does_not_run(tmp_path: Path, suffix: str) -> None:
    keras = pytest.importorskip("keras")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x + 1, output_shape=(2,))])
    model.save(tmp_path / f"net{suffix}")
    with pytest.raises(SpecError, match=r"refused: it holds a Lambda, and .*Python code"):
        TFModel(tmp_path / f"net{suffix}")


def rewritten(source: Path, target: Path, edit: Callable[[Any], Any]) -> Path:
    """A copy of a `.keras` file whose config was changed by hand."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "config.json":
                config = json.loads(data)
                edit(config["config"]["layers"])
                data = json.dumps(config).encode()
            new.writestr(name, data)
    return target


def test_keras_files_that_want_other_code_or_other_files_are_refused(tmp_path: Path) -> None:
    keras_model().save(tmp_path / "net.keras")
    code = base64.b64encode(b"code").decode()
    layers: list[tuple[dict[str, Any], str]] = [
        ({"module": "os", "class_name": "system", "registered_name": None, "config": {}}, "wants 'system' of 'os'"),
        (
            {"module": "keras.utils", "class_name": "function", "config": "get_file"},
            "wants 'function' of 'keras.utils'",
        ),
        ({"module": "keras.src.saving.file_editor", "class_name": "KerasFileEditor", "config": {}}, "file_editor"),
        ({"module": "keras.layers", "class_name": "TFSMLayer", "config": {"filepath": "/x"}}, "TFSMLayer"),
        ({"module": "keras.layers", "class_name": "TorchModuleWrapper", "config": {"module": code}}, "TorchModule"),
        ({"class_name": "__lambda__", "config": {"value": code}}, "__lambda__"),
        (
            {"module": "keras.layers", "class_name": "StringLookup", "config": {"vocabulary": "/etc/passwd"}},
            "reads the",
        ),
    ]
    for number, (layer, reason) in enumerate(layers):
        file = rewritten(
            tmp_path / "net.keras", tmp_path / f"{number}.keras", lambda found, new=layer: found.append(new)
        )
        with pytest.raises(SpecError, match=rf"refused: .*{reason}"):
            TFModel(file)


def test_keras_weights_that_are_in_other_files_are_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file.attrs["model_config"] = "{}"
        file["w"] = h5py.ExternalLink("/etc/other.h5", "/w")
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file.create_group("g").create_dataset("w", (4,), "u1", external=[("/etc/passwd", 0, 4)])
    for name in ("link", "raw"):
        with pytest.raises(SpecError, match="is in another file"):
            TFModel(tmp_path / f"{name}.h5")
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        file["w"] = [1.0]
    with pytest.raises(SpecError, match="weights only"):
        TFModel(tmp_path / "weights.h5")


def test_a_layer_that_the_operator_registered_is_taken(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")

    class Doubled(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return 2 * x

    keras.saving.register_keras_serializable(package="tests")(Doubled)
    keras.Sequential([keras.Input((2,)), Doubled()]).save(tmp_path / "net.keras")
    model = TFModel(tmp_path / "net.keras")
    assert next(iter(model.infer({model.signature.inputs[0].name: [[1.0, 2.0]]}).values())).tolist() == [[2, 4]]
    del keras.saving.get_custom_objects()["tests>Doubled"]
    with pytest.raises(SpecError, match="wants 'Doubled'"):
        TFModel(tmp_path / "net.keras")


def test_shapes_that_do_not_go_together_and_assertions_are_the_callers_fault(tmp_path: Path) -> None:
    def fn(a: Any, b: Any) -> dict[str, Any]:
        with tf.control_dependencies([tf.debugging.assert_positive(a, "a must be positive")]):
            return {"y": a + b}

    spec = [tf.TensorSpec([None], F32, name) for name in ("a", "b")]
    model = TFModel(saved(tmp_path / "m", fn, *spec))
    ones = np.ones(2, np.float32)
    with server_ref.running({"m": model}) as url:
        with pytest.raises(InvalidRequest, match=r"'a' float32 \[2\], 'b' float32 \[3\].*shapes"):
            Endpoint(url).infer({"a": ones, "b": np.ones(3, np.float32)})
        with pytest.raises(InvalidRequest, match="a must be positive"):
            Endpoint(url).infer({"a": -ones, "b": ones})
    with pytest.raises(SignatureError, match=r"input 'a': expected float32 \[-1\], got float64"):
        model.infer({"a": np.ones(2), "b": ones})


def test_a_model_that_fails_or_breaks_its_signature_is_an_internal_error_of_one_line(
    mixed: Any, tmp_path: Path
) -> None:
    spec = tf.TensorSpec([2], F32, "x")
    model = TFModel(saved(tmp_path / "m", lambda x: {"y": tf.debugging.check_numerics(x, "no luck")}, spec))
    with pytest.raises(InternalError, match=r"model 'm' failed on 'x' float32 \[2\]: no luck") as caught:
        model.infer({"x": np.array([np.nan, 1], np.float32)})
    assert "\n" not in str(caught.value)
    _, folder, _ = mixed

    def lies(meta: Any) -> None:
        meta.signature_def["serving_default"].outputs["norm"].tensor_shape.dim[0].size = 7

    liar = TFModel(edited(folder, tmp_path / "liar", lies))
    with pytest.raises(InternalError, match="broke its own signature"):
        liar.infer(mixed_inputs(2), ["norm"])


@pytest.mark.parametrize("words", [[b"cat", "dog"], np.array(["cat", "d"]), np.array([b"cat"]), np.empty(0, object)])
def test_strings_may_be_bytes_or_text_and_nothing_else(mixed: Any, words: Any) -> None:
    model, count = mixed[2], len(words)
    inputs = {**mixed_inputs(count), "word": np.asarray(words)}
    expected = [
        word.upper() if isinstance(word, bytes) else word.upper().encode() for word in np.asarray(words).tolist()
    ]
    assert model.infer(inputs)["loud"].tolist() == expected
    for wrong in ([3] * count, [b"cat", None]):
        if count == 2:
            with pytest.raises(SignatureError, match=r"word"):
                model.infer({**inputs, "word": np.array(wrong, dtype=object)})


def test_a_deadline_that_has_passed_starts_nothing(mixed: Any) -> None:
    with pytest.raises(DeadlineExceeded):
        mixed[2].infer(mixed_inputs(1), deadline=Deadline.after(0))


def test_two_models_of_one_file_share_nothing_and_free_their_variables(mixed: Any) -> None:
    _, folder, _ = mixed
    inputs = mixed_inputs(1)
    first, second = TFModel(folder, device="cpu"), TFModel(folder, device="cpu")
    expected = second.infer(inputs)["mixed"]
    handles = [tensor for tensor in first._function.graph.get_operations() if tensor.type == "VarHandleOp"]
    names = [operation.get_attr("shared_name") for operation in handles]
    assert names
    del first, handles
    gc.collect()
    with tf.device("/CPU:0"):
        for name in names:
            handle = tf.raw_ops.VarHandleOp(dtype=F32, shape=[4, 3], shared_name=name)
            assert not tf.raw_ops.VarIsInitializedOp(resource=handle)
    np.testing.assert_array_equal(second.infer(inputs)["mixed"], expected)


@pytest.fixture(scope="module")
def basic_pitch() -> Path:
    """The trained models inside the basic-pitch wheel."""
    try:
        folder = Path(str(distribution("basic-pitch").locate_file("basic_pitch"))) / "saved_models" / "icassp_2022"
    except PackageNotFoundError:
        folder = Path(os.environ.get("BASIC_PITCH_MODELS", "/nowhere"))
    if not folder.is_dir():
        pytest.skip("needs basic-pitch==0.4.0, installed with --no-deps")
    return folder


def chord(rows: int) -> Any:
    """Two seconds of a chord that fades, at 22,050 Hz."""
    time = np.arange(43844) / 22050
    tones = sum(np.sin(2 * np.pi * pitch * time) / (1 + number) for number, pitch in enumerate((220, 277.18, 329.63)))
    return np.stack([0.2 / (1 + row) * tones * np.exp(-time) for row in range(rows)])[..., None].astype(np.float32)


def test_basic_pitch_gives_the_same_notes_in_tensorflow_and_onnx(basic_pitch: Path) -> None:
    pytest.importorskip("onnxruntime")
    from remote_ops.onnx import OnnxModel

    audio = chord(2)
    with server_ref.running({"tf": load(basic_pitch / "nmp"), "onnx": OnnxModel(basic_pitch / "nmp.onnx")}) as url:
        ours, theirs = Endpoint(f"{url}/tf"), Endpoint(f"{url}/onnx")
        found = ours.infer({ours.signature.inputs[0].name: audio})
        others = theirs.infer({theirs.signature.inputs[0].name: audio})
    assert list(found) == ["contour", "note", "onset"]
    for array in found.values():
        twin = min(
            (other for other in others.values() if other.shape == array.shape), key=lambda o: np.abs(o - array).max()
        )
        np.testing.assert_allclose(array, twin, atol=1e-6, rtol=0)
    assert found["note"].max() > 0.5  # it hears something


@pytest.mark.slow
def test_basic_pitch_gives_the_gradient_of_a_note_with_respect_to_the_sound(basic_pitch: Path) -> None:
    model = load(basic_pitch / "nmp")
    audio = chord(1)
    note = model.infer({"input_2": audio}, ["note"])["note"]
    seed = np.zeros_like(note)
    at = np.unravel_index(note.argmax(), note.shape)
    seed[at] = 1
    slope = model.infer({"input_2": audio, "cotangent:note": seed}, ["gradient:input_2"])["gradient:input_2"]
    step = 0.01 * slope / (slope * slope).sum()
    after = model.infer({"input_2": audio + step}, ["note"])["note"]
    np.testing.assert_allclose(after[at] - note[at], (slope * step).sum(), rtol=0.1)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL of a frozen graph on a web server of this machine."""
    frozen(tmp_path / "small.pb", small_graph)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/small.pb"
        server.shutdown()


def test_the_flags_and_variables_of_graphpipe_tf_choose_inputs_and_outputs(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def serve(models: Any, listen: str, **_: Any) -> int:
        started.extend(str(model.signature) for model in models.values())
        return 0

    monkeypatch.setattr("server_ref.__main__.serve", serve)
    for name in [name for name in os.environ if name.startswith("GP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("REMOTE_OPS_CACHE", str(tmp_path / "cache"))
    cache = ["--cache-dir", str(tmp_path / "cache")]
    assert main(["-m", served, "-i", "x", "-o", "logits:0,probs", *cache]) == 0
    monkeypatch.setenv("GP_MODEL", str(tmp_path / "small.pb"))
    monkeypatch.setenv("GP_INPUTS", "x:0")
    monkeypatch.setenv("GP_OUTPUTS", "logits")
    assert main([]) == 0
    assert main(["--outputs", "probs"]) == 0
    folder = saved(tmp_path / "m", lambda x: {"y": x, "z": x})
    assert main(["--model", str(folder), "--outputs", "z", "--inputs", "x", "--signature", "serving_default"]) == 0
    assert started == [
        "(x: float32 [-1, 4]) -> (logits: float32 [-1, 3], probs: float32 [-1, 3])",
        "(x: float32 [-1, 4]) -> (logits: float32 [-1, 3])",
        "(x: float32 [-1, 4]) -> (probs: float32 [-1, 3])",
        "(x: float32 [-1]) -> (z: float32 [-1])",
    ]
    assert main(["--model", str(tmp_path / "small.pb"), "--inputs", "nothing"]) == 2
    assert main(["--model", str(tmp_path / "small.pb"), "--signature", "serving_default"]) == 2


def test_without_tensorflow_the_import_error_names_the_line_to_type() -> None:
    code = "import sys; sys.modules['tensorflow'] = None; from remote_ops.tf import remote_op"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "ImportError: remote_ops.tf needs tensorflow: pip install 'remote-ops[tf]'" in done.stderr
