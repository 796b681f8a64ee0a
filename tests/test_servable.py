"""Servables and `load`: what a function may take and return, and what a name, a path or a URL opens."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remote_ops.deadline import Deadline, ambient
from remote_ops.errors import DeadlineExceeded, InternalError, SignatureError, SpecError
from remote_ops.servable import FunctionServable, Servable, load
from remote_ops.signature import Array, Signature, TensorSpec

X = TensorSpec("x", "float32", (-1, 2))
Y = TensorSpec("y", "float32", (-1, 2))
Z = TensorSpec("z", "float32", (-1,))
ONES = np.ones((3, 2), np.float32)


def function(fn: Callable[..., Any], *outputs: TensorSpec) -> FunctionServable:
    """A servable of one input `x` and the outputs given, `y` unless said."""
    return FunctionServable(fn, inputs=[X], outputs=outputs or (Y,))


def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> str:
    """Put a module with that source onto the path, and give its name."""
    name = f"made_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    (tmp_path / f"{name}.py").write_text(source, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return name


DOUBLE = """
from remote_ops.servable import FunctionServable
from remote_ops.signature import TensorSpec
spec = lambda name: [TensorSpec(name, "float32", (-1,))]
def make():
    return FunctionServable(lambda x: 2 * x, spec("x"), spec("y"))
double = make()
class Nested:
    double = double
class Own:
    signature = double.signature
    def infer(self, inputs, outputs=None, *, config=b"", deadline=None):
        return double.infer(inputs, outputs)
def scale(x):
    return 2 * x
def nothing(): pass
seven = 7
"""


@pytest.fixture
def magika_file() -> Path:
    return Path(str(resources.files("magika") / "models/standard_v3_3/model.onnx"))


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The address of a real server, and the files it has, by path."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setenv("REMOTE_OPS_CACHE", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", files
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("shape", [tuple, list])
def test_a_function_may_return_an_array_a_sequence_or_a_dict(shape: Callable[[Any], Any]) -> None:
    for fn in (
        lambda x: (2 * x, x.sum(1)),
        lambda x: shape([2 * x, x.sum(1)]),
        lambda x: {"z": x.sum(1), "y": 2 * x},
    ):
        answer = function(fn, Y, Z).infer({"x": ONES})
        assert list(answer) == ["y", "z"]
        np.testing.assert_array_equal(answer["y"], 2 * ONES)
        np.testing.assert_array_equal(answer["z"], [2, 2, 2])
    np.testing.assert_array_equal(function(lambda x: 3 * x).infer({"x": ONES})["y"], 3 * ONES)


def test_a_function_may_return_a_numpy_or_python_scalar_for_a_0d_output() -> None:
    total = TensorSpec("total", "float32", ())
    for fn in (lambda x: x.sum(), lambda x: float(x.sum())):
        answer = function(fn, total).infer({"x": ONES})["total"]
        assert answer.dtype == np.float32
        assert answer.shape == ()
        assert answer == 6


def test_only_the_outputs_asked_for_are_returned_in_the_order_asked_for() -> None:
    servable = function(lambda x: (2 * x, x.sum(1)), Y, Z)
    assert list(servable.infer({"x": ONES}, ["z"])) == ["z"]
    assert list(servable.infer({"x": ONES}, ["z", "y"])) == ["z", "y"]


def test_input_names_that_are_no_identifiers_reach_the_function() -> None:
    names = ["images/0:0", "class", "config-1"]
    servable = FunctionServable(
        lambda **arrays: sum(arrays[name] for name in names),
        inputs=[TensorSpec(name, "float32", (-1,)) for name in names],
        outputs=[TensorSpec("sum:0", "float32", (-1,))],
    )
    one = np.ones(2, np.float32)
    np.testing.assert_array_equal(servable.infer(dict.fromkeys(names, one))["sum:0"], [3, 3])


def test_config_and_deadline_reach_a_function_that_names_them() -> None:
    seen: list[Any] = []

    def fn(x: Array, deadline: Deadline | None, config: bytes = b"none") -> Array:
        seen.extend((config, deadline))
        return x

    until = Deadline.after(60)
    function(fn).infer({"x": ONES}, config=b"fast", deadline=until)
    assert seen == [b"fast", until]


def test_an_input_called_config_is_an_input() -> None:
    servable = FunctionServable(
        lambda config: config, inputs=[TensorSpec("config", "int8", ())], outputs=[TensorSpec("y", "int8", ())]
    )
    assert servable.infer({"config": np.array(5, np.int8)}, config=b"ignored")["y"] == 5


@pytest.mark.parametrize(
    ("returned", "outputs", "said"),
    [
        (None, (Y,), "expected 1 outputs (y) as an array, a tuple or list of them or a dict, got a NoneType"),
        ({1, 2}, (Y,), "got a set"),
        ((ONES, ONES), (Y,), "expected 1 outputs (y), got 2"),
        (ONES, (Y, Z), "expected 2 outputs (y, z), got 1"),
        ((), (Y,), "expected 1 outputs (y), got 0"),
        ({"why": ONES}, (Y,), "output 'y': expected float32 [-1, 2], got no such output but why"),
        (ONES.astype(np.float64), (Y,), "output 'y': expected float32 [-1, 2], got float64 [3, 2]"),
        (ONES[:, :1], (Y,), "output 'y': expected float32 [-1, 2], got float32 [3, 1]"),
    ],
)
def test_a_wrong_return_is_an_internal_error_that_says_what_came(
    returned: Any, outputs: tuple[TensorSpec, ...], said: str
) -> None:
    with pytest.raises(InternalError) as caught:
        function(lambda x: returned, *outputs).infer({"x": ONES})
    assert said in str(caught.value)


def test_what_a_function_raises_reaches_the_caller() -> None:
    def fn(x: Array) -> Array:
        raise ZeroDivisionError("of its own")

    with pytest.raises(ZeroDivisionError, match="of its own"):
        function(fn).infer({"x": ONES})


def test_wrong_inputs_never_reach_the_function() -> None:
    called: list[Array] = []
    servable = function(lambda x: called.append(x))
    for inputs in ({}, {"x": ONES, "w": ONES}, {"x": ONES.astype(int)}, {"x": np.ones((3, 3), np.float32)}):
        with pytest.raises(SignatureError):
            servable.infer(inputs)
    with pytest.raises(SignatureError, match="no output 'yy'"):
        servable.infer({"x": ONES}, ["yy"])
    with pytest.raises(DeadlineExceeded):
        servable.infer({"x": ONES}, deadline=Deadline.after(0))
    assert called == []


def test_a_function_that_does_not_take_the_inputs_is_refused_at_once() -> None:
    with pytest.raises(SpecError, match="named x"):
        function(lambda pixels: pixels)
    with pytest.raises(SpecError, match="one output or more"):
        FunctionServable(lambda x: x, inputs=[X], outputs=[])


def test_a_function_servable_names_itself_after_its_function() -> None:
    def halve(x: Array) -> Array:
        return x / 2

    assert function(halve).signature.name == "halve"
    named = FunctionServable(halve, [X], [Y], name="half", version="2", description="halves")
    assert named.signature == Signature((X,), (Y,), name="half", version="2", description="halves")
    assert "half" in repr(named)


def test_every_kind_is_a_servable(magika_file: Path) -> None:
    class Own:
        signature = Signature((X,), (Y,))

        def infer(
            self,
            inputs: Mapping[str, Array],
            outputs: Sequence[str] | None = None,
            *,
            config: bytes = b"",
            deadline: Deadline | None = None,
        ) -> dict[str, Array]:
            return {"y": inputs["x"]}

    for servable in (function(lambda x: x), load(magika_file), Own()):
        assert isinstance(servable, Servable)
    assert not isinstance(object(), Servable)


def test_load_opens_an_onnx_file_by_str_or_path(magika_file: Path) -> None:
    for what in (magika_file, str(magika_file)):
        model = load(what, name="types", device="cpu", threads=2)
        assert model.signature.name == "types"
        assert getattr(model, "threads", None) == 2
    assert load(magika_file).signature.name == "model"


def test_load_opens_a_servable_a_factory_or_a_class_of_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module(tmp_path, monkeypatch, DOUBLE)
    imported = __import__(name)
    assert load(f"{name}:double") is imported.double
    assert load(f"{name}:Nested.double") is imported.double
    for thing in ("make", "Own"):
        answer = load(f"{name}:{thing}").infer({"x": np.ones(2, np.float32)})
        np.testing.assert_array_equal(answer["y"], [2, 2])


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        ("scale", "got scale(x); wrap it in a FunctionServable"),
        ("nothing", "expected 'nothing' to return a servable, got None"),
        ("seven", "got a int"),
        ("doubel", "did you mean 'double'?"),
    ],
)
def test_load_says_what_it_found_instead_of_a_servable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thing: str, said: str
) -> None:
    name = module(tmp_path, monkeypatch, DOUBLE)
    with pytest.raises(SpecError) as caught:
        load(f"{name}:{thing}")
    assert said in str(caught.value)
    assert str(caught.value).endswith(f"at {name}:{thing}")


def test_load_says_which_module_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="cannot import 'no_such_package"):
        load("no_such_package.models:net")
    broken = module(tmp_path, monkeypatch, "import no_such_dependency")
    with pytest.raises(SpecError, match="No module named 'no_such_dependency'"):
        load(f"{broken}:net")


def test_load_of_a_path_that_is_not_there_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "resnet50.onnx").touch()
    with pytest.raises(SpecError, match=r"no such model .*; did you mean '.*resnet50\.onnx'\?"):
        load(tmp_path / "resnet5O.onnx")
    with pytest.raises(SpecError, match=r"no such model .*; expected a file ending in \.onnx"):
        load(tmp_path / "nowhere" / "x")


@pytest.mark.parametrize("name", ["net.tflite", "graph.json", "net.bin", "plain"])
def test_load_claims_no_kind_that_it_cannot_open(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(SpecError, match=r"expected a file ending in \.onnx, .*, 'package\.module:thing', or a URL"):
        load(tmp_path / name)


def test_load_of_a_graph_that_is_none_tells_its_faults(tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    (tmp_path / "graph.yaml").touch()
    with pytest.raises(SpecError, match=r"E101 .*graph.yaml:1:1 the document is empty: expected a mapping"):
        load(tmp_path / "graph.yaml")


def test_load_of_a_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(SpecError, match="got a folder"):
        load(tmp_path / "folder.onnx")


def test_load_checks_the_digest_of_a_local_file(magika_file: Path) -> None:
    digest = hashlib.sha256(magika_file.read_bytes()).hexdigest()
    assert load(magika_file, sha256=digest.upper()).signature.inputs[0].name == "bytes"
    with pytest.raises(SpecError, match=f"expected sha256 {'0' * 64}, got {digest}"):
        load(magika_file, sha256="0" * 64)
    assert magika_file.exists()


def test_load_downloads_a_model_once_and_keeps_its_name(web: tuple[str, dict[str, bytes]], magika_file: Path) -> None:
    url, files = web
    files["/models/magika.onnx?key=1"] = magika_file.read_bytes()
    digest = hashlib.sha256(magika_file.read_bytes()).hexdigest()
    assert load(f"{url}/models/magika.onnx?key=1", sha256=digest).signature.name == "magika"
    files.clear()
    assert load(f"{url}/models/magika.onnx?key=1#sha256={digest}").signature.name == "magika"
    with pytest.raises(SpecError, match="differ"):
        load(f"{url}/models/magika.onnx?key=1#sha256={digest}", sha256="0" * 64)


def test_load_downloads_a_torch_program_too(web: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    url, files = web
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.ones(2),)), tmp_path / "m.pt2")
    files["/models/relu.pt2"] = (tmp_path / "m.pt2").read_bytes()
    model = load(f"{url}/models/relu.pt2", device="cpu")
    assert model.signature.name == "relu"
    np.testing.assert_array_equal(model.infer({"input": np.float32([-1, 1])})["output"], [0, 1])


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/resnet", "https://h.invalid/a", "http+unix://%2Frun%2Fs/a"])
def test_load_of_any_other_url_is_an_endpoint_and_asks_it_nothing(url: str) -> None:
    client = pytest.importorskip("remote_ops.client")
    endpoint = load(url, timeout_s=1.0)
    assert isinstance(endpoint, client.Endpoint)
    getattr(endpoint, "close", lambda: None)()


def test_load_refuses_a_scheme_that_it_does_not_know() -> None:
    with pytest.raises(SpecError, match="scheme 'ftp': expected http, https or http"):
        load("ftp://127.0.0.1/model.onnx")
    with pytest.raises(SpecError, match="malformed"):
        load("http://[bad/model.onnx")


def test_load_refuses_arguments_that_would_have_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, magika_file: Path
) -> None:
    name = module(tmp_path, monkeypatch, DOUBLE)
    with pytest.raises(SpecError, match=r"sha256: not for an endpoint such as 'http://h\.invalid/m'"):
        load("http://user:pw@h.invalid/m?token=s", sha256="0" * 64)
    with pytest.raises(SpecError, match="device, threads: not for a Python object"):
        load(f"{name}:double", device="cpu", threads=1)
    with pytest.raises(SpecError, match=r"OnnxModel has no option 'thread'.*did you mean 'threads'"):
        load(magika_file, thread=1)


def test_importing_servable_imports_no_framework() -> None:
    heavy = ("onnxruntime", "torch", "tensorflow", "requests", "tqdm")
    code = f"import remote_ops.servable, sys; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def squares(calls: list[str]) -> FunctionServable:
    """A function with a gradient that notes what was called."""

    def square(x: Any) -> Any:
        calls.append("fn")
        return x * x

    def vjp(inputs: Any, cotangents: Any) -> Any:
        calls.append("vjp")
        return {"x": 2 * inputs["x"] * cotangents.get("y", 0)}

    x = TensorSpec("x", "float32", (-1,), differentiable=True)
    return FunctionServable(square, [x], [TensorSpec("y", "float32", (-1,))], vjp=vjp)


@pytest.mark.parametrize(
    ("wanted", "called"), [(["y"], ["fn"]), (["gradient:x"], ["vjp"]), (["gradient:x", "y"], ["vjp", "fn"])]
)
def test_a_function_gives_the_gradients_that_its_vjp_computes(wanted: list[str], called: list[str]) -> None:
    calls: list[str] = []
    values = {"x": np.float32([1, 3]), "cotangent:y": np.float32([1, 10])}
    results = squares(calls).infer(values if "gradient:x" in wanted else {"x": values["x"]}, wanted)
    right = {"y": [1, 9], "gradient:x": [2, 60]}
    assert {name: array.tolist() for name, array in results.items()} == {name: right[name] for name in wanted}
    assert calls == called


def test_a_cotangent_that_is_missing_is_zero() -> None:
    assert squares([]).infer({"x": np.float32([1, 3])}, ["gradient:x"])["gradient:x"].tolist() == [0, 0]


def test_a_vjp_goes_with_a_differentiable_input() -> None:
    x, y = TensorSpec("x", "float32", (-1,)), TensorSpec("y", "float32", (-1,))
    for inputs, vjp in (([replace(x, differentiable=True)], None), ([x], lambda inputs, cotangents: {})):
        with pytest.raises(SpecError, match="a vjp goes with inputs that are differentiable=True"):
            FunctionServable(lambda x: x, inputs, [y], vjp=vjp)


def test_a_vjp_that_forgets_a_gradient_breaks_the_signature() -> None:
    x = TensorSpec("x", "float32", (-1,), differentiable=True)
    forgets = FunctionServable(lambda x: x, [x], [TensorSpec("y", "float32", (-1,))], vjp=lambda *_: {})
    with pytest.raises(InternalError, match="gradient:x"):
        forgets.infer({"x": np.float32([1])}, ["gradient:x"])


def test_the_deadline_of_a_call_bounds_the_calls_that_the_model_makes() -> None:
    seen: list[Deadline | None] = []
    model = function(lambda x: seen.append(ambient()) or x)
    bound = Deadline.after(5.0)
    model.infer({"x": ONES}, deadline=bound)
    model.infer({"x": ONES})
    assert seen == [bound, None]
