"""`RemoteLayer`: a remote model in a Keras model, built, trained, saved, loaded and exported like any other layer."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rawpeer import Message, peer
from tfpeer import MATRIX, ROOT, echo, mix, python, scaled

import server_ref
from remote_ops import ConnectError, FunctionServable, Retry, SignatureError, SpecError, TensorSpec
from remote_ops.graphpipe import encode_response
from remote_ops.url import TLS

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("keras runs on another backend here", allow_module_level=True)

from remote_ops.tf.layer import RemoteLayer  # noqa: E402
from remote_ops.tf.library import op_library  # noqa: E402

# Keras' own, with the numpy of today.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

X = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
NOBODY = "http://127.0.0.1:1/m"
DECLARED: dict[str, Any] = {"inputs": "x: float32 [-1, 4]", "outputs": "y: float32 [-1, 4]"}


def partial() -> FunctionServable:
    """`x * w`, differentiable with respect to x only."""
    return FunctionServable(
        lambda x, w: x * w,
        [TensorSpec("x", "float32", (-1, 4), differentiable=True), TensorSpec("w", "float32", (-1, 4))],
        [TensorSpec("y", "float32", (-1, 4))],
        name="partial",
        vjp=lambda inputs, cotangents: {"x": cotangents["y"] * inputs["w"]},
    )


@pytest.fixture(scope="module")
def served() -> Iterator[Callable[[str], str]]:
    models = {"mix": mix(), "scaled": scaled(), "partial": partial()}
    models |= {dtype: echo(dtype) for dtype in ("string", "bfloat16", "float64", "int64", "bool")}
    with server_ref.running(models) as base:
        yield lambda name: f"{base}{name}"


def functional(layer: Any) -> Any:
    x = keras.Input((4,))
    return keras.Model(x, keras.layers.Dense(2)(layer(x)))


# --------------------------------------------------------------------------- in and out


def test_a_layer_gives_what_the_model_gives(served: Callable[[str], str]) -> None:
    layer = RemoteLayer(served("mix"))
    np.testing.assert_allclose(layer(X), np.sin(X) @ MATRIX, rtol=1e-6)
    assert layer.count_params() == 0
    assert layer.weights == []
    assert str(layer.signature) == "(x: float32 [-1, 4]) -> (y: float32 [-1, 4])"


def test_a_symbolic_input_gives_a_static_shape(served: Callable[[str], str]) -> None:
    layer = RemoteLayer(served("mix"))
    assert layer(keras.Input((4,))).shape == (None, 4)
    assert layer(keras.KerasTensor((None, None))).shape == (None, 4)
    assert layer.compute_output_shape((None, 4)) == (None, 4)
    several = RemoteLayer(served("scaled"))
    inputs = {"x": keras.Input(()), "n": keras.KerasTensor((), dtype="int64"), "w": keras.Input(())}
    assert {name: (out.shape, out.dtype) for name, out in several(inputs).items()} == {
        "product": ((None,), "float32"),
        "total": ((None,), "float32"),
    }
    assert several.compute_output_shape({}) == {"product": (None,), "total": (None,)}


def test_several_inputs_come_by_name_or_in_order_and_so_do_outputs(served: Callable[[str], str]) -> None:
    x, n, w = tf.constant([1.0, 2.0]), tf.constant(3, tf.int64), tf.constant([5.0, 7.0])
    layer = RemoteLayer(served("scaled"))
    for inputs in ([x, n, w], (x, n, w)):
        product, total = layer(inputs)
        assert (product.numpy().tolist(), total.numpy().tolist()) == ([3, 6], [6, 9])
    named = layer({"w": w, "x": x, "n": n})
    assert {name: value.numpy().tolist() for name, value in named.items()} == {"product": [3, 6], "total": [6, 9]}
    ordered = RemoteLayer(served("scaled"), input_names=["n", "w", "x"], output_names=["total"])
    assert ordered([n, w, x]).numpy().tolist() == [6, 9]
    assert RemoteLayer(served("mix"))([X]).shape == (3, 4)


def test_a_floating_input_takes_the_dtype_of_the_model_whatever_the_policy_says(served: Callable[[str], str]) -> None:
    for dtype in (None, "float64", "mixed_bfloat16"):
        layer = RemoteLayer(served("mix"), dtype=dtype)
        for value in (X, X.astype("f8"), tf.cast(X, tf.bfloat16)):
            got = layer(value)
            assert got.dtype == tf.float32
            np.testing.assert_allclose(got, np.sin(X) @ MATRIX, rtol=0.05, atol=0.05)
    assert RemoteLayer(served("float64"))(np.float64([1 / 3])).numpy()[0] == 1 / 3
    assert RemoteLayer(served("bfloat16"))(tf.constant([1.5])).dtype == tf.bfloat16
    assert RemoteLayer(served("int64"))(np.int64([2**62 + 1])).numpy()[0] == 2**62 + 1
    assert RemoteLayer(served("string"))(np.array(["a", "größe"])).numpy()[1].decode() == "größe"
    assert RemoteLayer(served("bool"))(np.array([True])).dtype == tf.bool


def test_a_mixed_precision_model_calls_with_the_dtype_of_the_remote_model(served: Callable[[str], str]) -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), RemoteLayer(served("mix"))])
        assert model(X).dtype == tf.float32
        assert model.outputs[0].dtype == "float32"
    finally:
        keras.config.set_dtype_policy("float32")


def test_what_does_not_fit_is_refused_before_anything_is_sent() -> None:
    layer = RemoteLayer(NOBODY, **DECLARED)
    with pytest.raises(SignatureError, match=r"input 'x': expected float32 \[-1, 4\], got float32 \[3, 5\]") as caught:
        layer(np.zeros((3, 5), np.float32))
    assert (caught.value.name, caught.value.got) == ("x", "float32 [3, 5]")
    assert NOBODY in str(caught.value)
    with pytest.raises(SignatureError, match=r"expected float32 \[-1, 4\], got int32 \[3, 4\]"):
        layer(X.astype("i4"))
    with pytest.raises(SignatureError, match=r"expected float32 \[-1, 4\], got float32 \[None, 7\]"):
        layer(keras.Input((7,)))
    with pytest.raises(SignatureError, match=r"expected float32 \[-1, 4\], got float32 \[4\]"):
        layer(X[0])
    with pytest.raises(SignatureError, match=r"expected 1 inputs \(x\), got 2"):
        layer([X, X])
    with pytest.raises(SignatureError, match="no input 'z': expected x"):
        layer({"z": X})
    with pytest.raises(SignatureError, match="no output 'z': expected one of y"):
        RemoteLayer(NOBODY, **DECLARED, output_names=["z"])
    with pytest.raises(SignatureError, match=r"missing input 'x' \(float32 \[-1, 4\]\)"):
        RemoteLayer(NOBODY, **DECLARED, input_names=[])
    with pytest.raises(SpecError, match=r"'y' is float32 of any shape: expected a dtype and a shape; say outputs="):
        RemoteLayer(NOBODY, inputs=DECLARED["inputs"], outputs=TensorSpec("y", "float32", None))(keras.Input((4,)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "expected a URL, or endpoint='NAME' of a variable that holds it: got neither"),
        ({"uri": []}, "expected a URL, .* got neither"),
        ({"uri": NOBODY, "endpoint": "URL"}, "expected a URL, .* got both"),
        ({"endpoint": "http://a/m"}, "expected the name of an environment variable, got 'http://a/m'"),
        ({"uri": "gopher://a"}, "expected http://"),
        ({"uri": "http://[::1]:9000/m"}, r"no IPv6: .*got 'http://\[::1\]:9000/m'"),
        ({"uri": NOBODY, "headers": {"Authorization": "Bearer secret"}}, "'Authorization' has a literal value"),
        ({"uri": NOBODY, "headers": "Authorization"}, "expected a dict of names and values, got a str"),
        ({"uri": "https://a", "tls": TLS(password="secret")}, "password of a key would stand in a saved model"),
        ({"uri": NOBODY, "timeout_s": -1}, "a timeout is a number of seconds"),
        ({"uri": NOBODY, "timeout_s": 0}, "expected a number of seconds above 0, got 0"),
        ({"uri": NOBODY, "inputs": "x float32"}, "expected a spec such as"),
        ({"uri": NOBODY, "outputs": []}, "expected all outputs of the model"),
        ({"uri": NOBODY, "inputs": [3]}, "expected a TensorSpec or text"),
        ({"uri": NOBODY, "input_names": "x"}, "expected a list of names, got 'x'"),
        ({"uri": NOBODY, "input_names": ["x", "x"]}, "a name is there twice"),
        ({"uri": NOBODY, "config": 3}, "expected text or bytes"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        RemoteLayer(**arguments)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_down_is_an_error_of_ours_when_the_layer_is_built() -> None:
    with pytest.raises(ConnectError, match=NOBODY):
        RemoteLayer(NOBODY, retry=Retry(attempts=1))(X)


def test_a_call_that_fails_has_the_class_of_its_fault() -> None:
    layer = RemoteLayer(NOBODY, **DECLARED, retry=Retry(attempts=1))
    with pytest.raises(tf.errors.UnavailableError, match=NOBODY):
        layer(X)


# --------------------------------------------------------------------------- training


def test_a_model_trains_through_a_layer(served: Callable[[str], str]) -> None:
    keras.utils.set_random_seed(0)
    layer = RemoteLayer(served("mix"))
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="first"), layer])
    model.compile("adam", "mse")
    assert model.jit_compile is False
    x = np.random.default_rng(1).standard_normal((64, 4)).astype("f4")
    y = np.sin(x @ np.eye(4, dtype="f4")[::-1]) @ MATRIX
    before = model.get_layer("first").kernel.numpy()
    losses = model.fit(x, y, epochs=5, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert not np.array_equal(before, model.get_layer("first").kernel.numpy())


def test_gradients_are_those_of_the_model(served: Callable[[str], str]) -> None:
    layer, x = RemoteLayer(served("mix")), tf.constant(X.astype("f8"))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(layer(x))
    gradient = tape.gradient(y, x)
    assert gradient.dtype == tf.float64
    np.testing.assert_allclose(gradient, np.ones((3, 4)) @ MATRIX.T * np.cos(X), rtol=1e-5)


def test_an_input_that_is_not_differentiable_has_no_gradient(served: Callable[[str], str], tmp_path: Path) -> None:
    x, w = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([x, w], RemoteLayer(served("partial"))([x, w]))
    model.save(tmp_path / "m.keras")
    for made in (model, keras.models.load_model(tmp_path / "m.keras")):
        a, b = tf.constant(X), tf.constant(X + 1)
        with tf.GradientTape() as tape:
            tape.watch([a, b])
            y = made([a, b])
        da, db = tape.gradient(y, [a, b])
        np.testing.assert_allclose(da, X + 1)
        assert db is None


def test_a_layer_that_knows_its_signature_is_traced_and_exported_with_the_server_down(tmp_path: Path) -> None:
    with server_ref.running({"partial": partial()}) as url:
        built = RemoteLayer(url)
        built.build()
        config = built.get_config()
    layer = RemoteLayer.from_config(config)
    inputs = {"x": keras.Input((4,), name="x"), "w": keras.Input((4,), name="w")}
    model = keras.Model(inputs, layer(inputs)["y"])
    rows = tf.TensorSpec((None, 4))
    traced = tf.function(lambda x, w: layer([x, w])).get_concrete_function(rows, rows)
    model.export(tmp_path / "saved", verbose=False)
    serve = tf.saved_model.load(tmp_path / "saved").serve
    a, b = tf.constant(X), tf.constant(X + 1)
    with server_ref.running({"partial": partial()}, url.removeprefix("http://").rstrip("/")):
        for ask in (traced, lambda x, w: layer([x, w]), lambda x, w: serve({"x": x, "w": w})):
            with tf.GradientTape() as tape:
                tape.watch([a, b])
                y = ask(a, b)
            da, db = tape.gradient(y, [a, b])
            np.testing.assert_allclose(y, X * (X + 1), rtol=1e-6)
            np.testing.assert_allclose(da, X + 1)
            assert db is None


# --------------------------------------------------------------------------- saving


def texts(path: Path) -> bytes:
    """All that a .keras file holds."""
    with zipfile.ZipFile(path) as file:
        return b"".join(file.read(name) for name in file.namelist())


def test_a_config_makes_an_equal_layer_with_the_server_down() -> None:
    layer = RemoteLayer(
        [NOBODY, "https://b/m"], input_names=["x"], output_names=["y"], **DECLARED, config=b"\xff\0",
        timeout_s=3.0, headers={"Authorization": "Bearer ${TOKEN}"}, tls=TLS(ca="ca.pem", password="${PASSWORD}"),
        retry=Retry(attempts=2), pure=False, name="ranker",
    )  # fmt: skip
    config = layer.get_config()
    again = RemoteLayer.from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    assert (again.name, again.pure, again.signature) == ("ranker", False, layer.signature)
    assert again._client == layer._client
    assert again._bytes == b"\xff\0"
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert restored.get_config() == config
    assert RemoteLayer.from_config(RemoteLayer(NOBODY).get_config()).get_config()["inputs"] is None
    with pytest.raises(SpecError, match="a timeout is a number of seconds") as caught:
        RemoteLayer.from_config({**config, "uri": "https://b/m?key=hidden", "timeout_s": -1})
    assert "hidden" not in str(caught.value)


def test_a_layer_is_copied_and_pickled_with_its_model() -> None:
    model = functional(RemoteLayer(NOBODY, **DECLARED, dtype="mixed_bfloat16"))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), keras.models.clone_model(model)):
        assert copied.layers[1].get_config() == model.layers[1].get_config()
        assert copied.layers[1].dtype_policy.name == "mixed_bfloat16"


def test_a_saved_model_loads_with_the_server_down_and_answers_alike(tmp_path: Path) -> None:
    with server_ref.running({"mix": mix()}) as url:
        model = functional(RemoteLayer(url))
        model.save(tmp_path / "m.keras")
        expected = model(X)
        np.testing.assert_allclose(keras.models.load_model(tmp_path / "m.keras")(X), expected, rtol=1e-6)
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.output_shape == (None, 2)
    assert loaded.layers[1].signature.inputs[0].differentiable
    with pytest.raises(tf.errors.UnavailableError):
        loaded(X)


LOAD = """
import sys, numpy as np, keras
import remote_ops.tf.layer
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[2], keras.ops.convert_to_numpy(model(np.load(sys.argv[3]))))
"""


@pytest.mark.slow
def test_a_fresh_process_loads_a_saved_model(served: Callable[[str], str], tmp_path: Path) -> None:
    model = functional(RemoteLayer(served("mix")))
    model.save(tmp_path / "m.keras")
    np.save(tmp_path / "x.npy", X)
    done = python(LOAD, *(str(tmp_path / name) for name in ("m.keras", "y.npy", "x.npy")))
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model(X), rtol=1e-6)


EXPORTED = """
import sys, numpy as np, tensorflow as tf
tf.load_op_library(sys.argv[1])
serve = tf.saved_model.load(sys.argv[2]).serve
assert not any(name.startswith("remote_ops") for name in sys.modules)
x = tf.constant(np.load(sys.argv[3]))
with tf.GradientTape() as tape:
    tape.watch(x)
    y = serve(x)
np.savez(sys.argv[4], y=y, dx=tape.gradient(y, x))
"""


@pytest.mark.slow
def test_an_exported_model_infers_and_differentiates_where_only_the_library_is_loaded(
    served: Callable[[str], str], tmp_path: Path
) -> None:
    model = keras.Sequential([keras.Input((4,)), RemoteLayer(served("mix"))])
    model.export(tmp_path / "saved", verbose=False)
    np.save(tmp_path / "x.npy", X)
    done = python(EXPORTED, str(op_library()), *(str(tmp_path / name) for name in ("saved", "x.npy", "out.npz")))
    assert done.returncode == 0, done.stderr[-2000:]
    got = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(got["y"], np.sin(X) @ MATRIX, rtol=1e-6)
    np.testing.assert_allclose(got["dx"], np.ones((3, 4)) @ MATRIX.T * np.cos(X), rtol=1e-5)


def test_no_secret_is_shown_or_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REMOTE_OPS_TEST_TOKEN", "s3cret")
    seen: list[Message] = []
    answer = b"".join(encode_response([X]))

    def script(conversation: Any) -> None:
        while (request := conversation.read()) is not None:
            seen.append(request)
            conversation.answer(answer)

    with peer(script) as server:
        headers = {"Authorization": "Bearer ${REMOTE_OPS_TEST_TOKEN}"}
        layer = RemoteLayer(f"{server.url}?key=hidden", **DECLARED, headers=headers)
        model = functional(layer)
        model(X)
        assert seen[0].headers["authorization"] == "Bearer s3cret"
        model.save(tmp_path / "m.keras")
    lines: list[str] = []
    model.summary(print_fn=lines.append)
    assert "RemoteLayer" in "\n".join(lines)
    shown = repr(layer) + "\n".join(lines)
    assert "hidden" not in shown
    assert "(x: float32 [-1, 4]) -> (y: float32 [-1, 4])" in repr(layer)
    assert b"s3cret" not in texts(tmp_path / "m.keras")


def test_a_model_that_names_its_endpoint_holds_no_url(
    served: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REMOTE_OPS_TEST_URL", served("mix"))
    layer = RemoteLayer(endpoint="REMOTE_OPS_TEST_URL")
    assert layer.signature.outputs[0].name == "y"
    assert repr(layer).startswith("<RemoteLayer name=remote_layer")
    assert served("mix") not in json.dumps(layer.get_config()) + repr(layer)
    monkeypatch.delenv("REMOTE_OPS_TEST_URL")
    assert RemoteLayer.from_config(layer.get_config()).signature == layer.signature
    with pytest.raises(SpecError, match=r"environment variable REMOTE_OPS_TEST_URL, .* is not set: set it"):
        _ = RemoteLayer(endpoint="REMOTE_OPS_TEST_URL").signature


def test_an_endpoint_is_read_from_the_environment_when_it_is_called(
    served: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REMOTE_OPS_TEST_URL", NOBODY)
    model = functional(RemoteLayer(endpoint="REMOTE_OPS_TEST_URL", **DECLARED))
    model.save(tmp_path / "m.keras")
    assert NOBODY.encode() not in texts(tmp_path / "m.keras")
    monkeypatch.setenv("REMOTE_OPS_TEST_URL", served("mix"))
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded.layers[1](X), np.sin(X) @ MATRIX, rtol=1e-6)


def test_an_endpoint_may_hold_the_urls_of_several_replicas(
    served: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMOTE_OPS_TEST_URL", f" {NOBODY}  {served('mix')} ")
    layer = RemoteLayer(endpoint="REMOTE_OPS_TEST_URL", retry=Retry(attempts=2, base_s=0.001))
    for _ in range(2):
        np.testing.assert_allclose(layer(X), np.sin(X) @ MATRIX, rtol=1e-6)


# --------------------------------------------------------------------------- other backends

TORCH = """
import sys
sys.modules["tensorflow"] = None
import os, numpy as np, keras, torch
from remote_ops import SignatureError
from remote_ops.tf import RemoteLayer
assert keras.backend.backend() == "torch"
x = np.load(sys.argv[1])
RemoteLayer("http://[::1]:9000/m")
layer = RemoteLayer(endpoint="REMOTE_OPS_TEST_URL", headers={"Authorization": "Bearer ${REMOTE_OPS_TEST_TOKEN}"})
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="first"), layer])
assert model.output_shape == (None, 4) and layer.count_params() == 0 and [*layer.parameters()] == layer.weights == []
model.compile("adam", "mse")
assert model.jit_compile is False
losses = model.fit(np.tile(x, (8, 1)), np.tile(np.sin(x) @ np.load(sys.argv[2]), (8, 1)), epochs=5, verbose=0)
assert losses.history["loss"][-1] < losses.history["loss"][0], losses.history
t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
layer(t).sum().backward()
model.save(sys.argv[3])
loaded = keras.models.load_model(sys.argv[3])
assert torch.equal(loaded(x), model(x))
try:
    layer(np.zeros((3, 5), "f4"))
except SignatureError as error:
    assert error.name == "x", error
else:
    raise AssertionError
try:
    from remote_ops.tf import remote_op
except ImportError as error:
    assert str(error) == "remote_ops.tf needs tensorflow: pip install 'remote-ops[tf]'", error
else:
    raise AssertionError
np.savez(sys.argv[4], y=layer(x).detach().cpu().numpy(), dx=t.grad.numpy())
"""


def run(code: str, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90, check=False
    )  # fmt: skip


@pytest.mark.slow
def test_on_keras_torch_backend_it_works_without_tensorflow(served: Callable[[str], str], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "matrix.npy", MATRIX)
    paths = [str(tmp_path / name) for name in ("x.npy", "matrix.npy", "m.keras", "out.npz")]
    variables = {"REMOTE_OPS_TEST_URL": f"{served('mix')} {served('mix')}", "REMOTE_OPS_TEST_TOKEN": "s3cret"}
    done = run(TORCH, *paths, KERAS_BACKEND="torch", **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    got = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(got["y"], np.sin(X) @ MATRIX, rtol=1e-6)
    np.testing.assert_allclose(got["dx"], np.ones((3, 4)) @ MATRIX.T * np.cos(X), rtol=1e-5)
    saved = texts(tmp_path / "m.keras")
    assert b"s3cret" not in saved
    assert served("mix").encode() not in saved


def test_another_backend_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(SpecError, match="RemoteLayer runs on Keras' backends tensorflow and torch: got 'jax'; set"):
        RemoteLayer(NOBODY)


def test_a_missing_keras_is_named() -> None:
    code = "import sys; sys.modules['keras'] = None; from remote_ops.tf import RemoteLayer"
    assert "remote_ops.tf.RemoteLayer needs keras: pip install 'keras>=3'" in run(code).stderr


def test_importing_the_door_imports_neither_framework() -> None:
    code = (
        "import remote_ops.tf, sys; print([m for m in ('tensorflow', 'keras', 'torch') if m in sys.modules], "
        "{*remote_ops.tf.__all__} <= {*dir(remote_ops.tf)}); remote_ops.tf.Status.code; remote_ops.tf.nothing"
    )
    done = run(code)
    assert done.stdout.split("\n")[0] == "[] True"
    assert "AttributeError: module 'remote_ops.tf' has no attribute 'nothing'" in done.stderr
