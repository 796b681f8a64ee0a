"""OnnxModel: a trained model against onnxruntime itself, and tiny models of every dtype, rank and fault."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from remote_ops.deadline import Deadline
from remote_ops.errors import DeadlineExceeded, InternalError, SignatureError, SpecError
from remote_ops.onnx import OnnxModel
from remote_ops.servable import Servable
from remote_ops.signature import Array, TensorSpec

MAGIKA = Path(str(resources.files("magika") / "models/standard_v3_3/model.onnx"))
NO_CUDA = "CUDAExecutionProvider" not in ort.get_available_providers()
FLOAT = TensorProto.FLOAT
CONFINES = tuple(int(part) for part in ort.__version__.split(".")[:2]) >= (1, 24)
REFUSED = "External data path" if CONFINES else "external data .* expected 1.24 or newer"


def value(name: str, kind: int, shape: Sequence[int | str | None] | None) -> Any:
    """An input or output of a made-up model; None for an axis or a shape that the file does not tell."""
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes: Sequence[tuple[str, str, str]], inputs: list[Any], outputs: list[Any], **more: Any) -> bytes:
    """A made-up model of nodes `(op, inputs, outputs)`, names split by spaces."""
    made = [helper.make_node(op, takes.split(), gives.split()) for op, takes, gives in nodes]
    graph = helper.make_graph(made, "made", inputs, outputs, more.pop("weights", ()), doc_string="a made-up graph")
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10, **more)
    return bytes(proto.SerializeToString())


def identity(kind: int, shape: Sequence[int | str | None] | None = ("N",)) -> bytes:
    """A model that gives its input `x` back as `y`."""
    return model([("Identity", "x", "y")], [value("x", kind, shape)], [value("y", kind, shape)])


def add(left: list[Any], right: list[Any]) -> bytes:
    """A model that adds `a` and `b`."""
    return model([("Add", "a b", "y")], [value("a", FLOAT, left), value("b", FLOAT, right)], [value("y", FLOAT, ["K"])])


def with_external(folder: Path, location: str) -> Path:
    """A model file that adds one float that stands in another file."""
    weight = onnx.TensorProto(name="w", data_type=FLOAT, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    for key, text in (("location", location), ("offset", "0"), ("length", "4")):
        weight.external_data.add(key=key, value=text)
    path = folder / "model.onnx"
    path.write_bytes(
        model([("Add", "x w", "y")], [value("x", FLOAT, ["N"])], [value("y", FLOAT, ["N"])], weights=[weight])
    )
    return path


@pytest.fixture(scope="module")
def magika() -> OnnxModel:
    return OnnxModel(MAGIKA)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_trained_model_answers_as_onnxruntime_does(magika: OnnxModel, rows: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 2048), dtype=np.int32)
    session = ort.InferenceSession(MAGIKA, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"bytes": pixels})
    np.testing.assert_allclose(magika.infer({"bytes": pixels})["target_label"], expected, rtol=1e-4, atol=1e-6)


def test_the_signature_is_what_the_file_declares(magika: OnnxModel) -> None:
    assert isinstance(magika, Servable)
    assert magika.signature.inputs == (TensorSpec("bytes", "int32", (-1, 2048)),)
    assert magika.signature.outputs == (TensorSpec("target_label", "float32", (-1, 214)),)
    assert magika.signature.name == "model"
    assert magika.signature.version == ""
    assert "tf2onnx" not in magika.signature.description
    assert "logits" in magika.signature.description


def test_name_version_description_and_metadata_come_from_the_file_unless_given() -> None:
    data = model(
        [("Identity", "x", "y")],
        [value("x", FLOAT, [])],
        [value("y", FLOAT, [])],
        model_version=7,
        doc_string="doubles",
    )
    proto = onnx.load_from_string(data)
    helper.set_model_props(proto, {"classes": "cat dog"})
    servable = OnnxModel(proto.SerializeToString())
    assert servable.signature.name == "made"
    assert servable.signature.version == "7"
    assert servable.signature.description == "doubles"
    assert servable.metadata == {"classes": "cat dog"}
    assert OnnxModel(data, name="mine").signature.name == "mine"
    assert OnnxModel(identity(FLOAT)).signature.description == "a made-up graph"


def test_a_file_whose_rank_is_open_takes_any_shape_and_a_scalar_stays_one(tmp_path: Path) -> None:
    data = model(
        [("Identity", "x", "y"), ("Identity", "s", "t"), ("Reshape", "x to", "z")],
        [value("x", FLOAT, None), value("s", FLOAT, []), value("to", TensorProto.INT64, ["K"])],
        [value("y", FLOAT, None), value("t", FLOAT, []), value("z", FLOAT, None)],
    )
    (tmp_path / "m.onnx").write_bytes(data)
    square, scalar = np.ones((2, 2), np.float32), np.array(3, np.float32)
    for servable in (OnnxModel(data), OnnxModel(tmp_path / "m.onnx")):
        assert [spec.shape for spec in servable.signature.inputs] == [None, (), (-1,)]
        assert [spec.shape for spec in servable.signature.outputs] == [None, (), None]
        answer = servable.infer({"x": square, "s": scalar, "to": np.array([4])})
        assert [array.shape for array in answer.values()] == [(2, 2), (), (4,)]
        with pytest.raises(SignatureError, match=r"input 's': expected float32 \[\], got float32 \[2, 2\]"):
            servable.infer({"x": square, "s": square, "to": np.array([4])})


def test_sizes_that_the_file_leaves_open_are_minus_one() -> None:
    assert OnnxModel(identity(FLOAT, ["N", 3, None, -1])).signature.inputs[0].shape == (-1, 3, -1, -1)


NUMERIC = {
    "BOOL": np.bool_, "INT8": np.int8, "UINT8": np.uint8, "INT16": np.int16, "UINT16": np.uint16, "INT32": np.int32,
    "UINT32": np.uint32, "INT64": np.int64, "UINT64": np.uint64, "FLOAT16": np.float16, "FLOAT": np.float32,
    "DOUBLE": np.float64, "BFLOAT16": ml_dtypes.bfloat16, "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn,
    "FLOAT8E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "FLOAT8E5M2": ml_dtypes.float8_e5m2,
    "FLOAT8E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip


@pytest.mark.parametrize("kind", NUMERIC)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 4), (2, 3)])
def test_every_dtype_and_rank_comes_back_as_it_went_in(kind: str, shape: tuple[int, ...]) -> None:
    servable = OnnxModel(identity(getattr(TensorProto, kind), ["N", "M"][: len(shape)]))
    sent = (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(NUMERIC[kind])
    got = servable.infer({"x": sent})["y"]
    assert servable.signature.inputs[0].dtype == servable.signature.outputs[0].dtype
    assert got.dtype == sent.dtype
    assert got.shape == sent.shape
    assert got.tobytes() == sent.tobytes()


@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2"])
def test_a_dtype_that_numpy_lacks_is_computed_with_and_not_only_passed_on(kind: str) -> None:
    data = model([("Cast", "x", "y")], [value("x", FLOAT, ["N"])], [value("y", getattr(TensorProto, kind), ["N"])])
    proto = onnx.load_from_string(data)
    proto.graph.node[0].attribute.append(helper.make_attribute("to", getattr(TensorProto, kind)))
    sent = np.array([0.1, -1.7, 3.0, 100.0], np.float32)
    got = OnnxModel(proto.SerializeToString()).infer({"x": sent})["y"]
    np.testing.assert_array_equal(got.astype(np.float32), sent.astype(NUMERIC[kind]).astype(np.float32))
    taken = OnnxModel(identity(getattr(TensorProto, kind))).infer({"x": sent})["y"]
    np.testing.assert_array_equal(taken, sent.astype(NUMERIC[kind]))


@pytest.mark.parametrize(
    "sent",
    [
        np.array(["a", "é", ""], object),
        np.array(["a", "é", ""]),
        np.array([b"a", "é".encode(), b""], object),
        np.array([b"a", "é".encode(), b""]),
        np.array([b"a", "é", np.str_("")], object),
    ],
    ids=["str", "U", "bytes", "S", "mixed"],
)
def test_strings_of_every_kind_come_back_as_bytes(sent: Array) -> None:
    got = OnnxModel(identity(TensorProto.STRING)).infer({"x": sent})["y"]
    assert got.dtype == object
    assert got.tolist() == [b"a", "é".encode(), b""]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 2)])
def test_strings_keep_their_shape_and_their_nulls(shape: tuple[int, ...]) -> None:
    sent = np.full(shape, b"a\x00b\x00", object)
    got = OnnxModel(identity(TensorProto.STRING, ["N", "M"][: len(shape)])).infer({"x": sent})["y"]
    assert got.shape == shape
    assert got.tolist() == sent.tolist()


@pytest.mark.parametrize("wrong", [b"\xff", 7, None, "\udcff"])
def test_a_string_that_is_no_text_is_refused(wrong: object) -> None:
    sent = np.array(["fine", wrong], object)
    with pytest.raises(SignatureError, match=r"'x'|surrogates"):
        OnnxModel(identity(TensorProto.STRING)).infer({"x": sent})


def test_arrays_at_odd_addresses_with_strides_or_foreign_byte_order_are_taken() -> None:
    servable = OnnxModel(identity(TensorProto.DOUBLE))
    expected = np.arange(5.0)
    odd = np.ndarray((5,), np.float64, bytearray(44), 4)
    odd[:] = expected
    assert not odd.flags.aligned
    frozen = np.frombuffer(expected.tobytes(), np.float64)
    for sent in (odd, np.arange(10.0)[::2] / 2, np.arange(4.0, -1, -1)[::-1], expected.astype(">f8"), frozen):
        np.testing.assert_array_equal(servable.infer({"x": sent})["y"], expected)
    bits = OnnxModel(identity(TensorProto.BFLOAT16))
    strided = np.arange(10).astype(ml_dtypes.bfloat16)[::2]
    np.testing.assert_array_equal(bits.infer({"x": strided})["y"], strided)


def test_the_callers_dict_is_left_as_it_was() -> None:
    inputs = {"x": np.array([b"a"], object)}
    before = inputs["x"]
    OnnxModel(identity(TensorProto.STRING)).infer(inputs)
    assert inputs["x"] is before
    assert before.tolist() == [b"a"]


def test_only_the_outputs_asked_for_are_given_in_the_order_asked_for() -> None:
    data = model(
        [("Neg", "x", "minus"), ("Abs", "x", "size")],
        [value("x", FLOAT, ["N"])],
        [value("minus", FLOAT, ["N"]), value("size", FLOAT, ["N"])],
    )
    servable = OnnxModel(data)
    inputs = {"x": np.array([3], np.float32)}
    assert servable.infer(inputs, ["size"]) == {"size": [3]}
    assert list(servable.infer(inputs, ["size", "minus"]).items()) == [("size", [3]), ("minus", [-3])]
    assert list(servable.infer(inputs)) == ["minus", "size"]


def test_a_weight_that_is_also_an_input_need_not_be_given() -> None:
    weight = helper.make_tensor("w", FLOAT, [1], [2.0])
    data = model(
        [("Add", "x w", "y")],
        [value("x", FLOAT, ["N"]), value("w", FLOAT, [1])],
        [value("y", FLOAT, ["N"])],
        weights=[weight],
    )
    np.testing.assert_array_equal(OnnxModel(data).infer({"x": np.zeros(2, np.float32)})["y"], [2, 2])


def test_inputs_that_do_not_fit_never_reach_onnxruntime(magika: OnnxModel) -> None:
    good = np.zeros((1, 2048), np.int32)
    for inputs in ({}, {"bytes": good, "more": good}, {"bytes": good[:, :9]}, {"bytes": good.astype(np.int64)}):
        with pytest.raises(SignatureError, match=r"bytes|more"):
            magika.infer(inputs)
    with pytest.raises(SignatureError, match=r"no output 'target_lable'.*did you mean 'target_label'"):
        magika.infer({"bytes": good}, ["target_lable"])
    with pytest.raises(DeadlineExceeded, match="model 'model'"):
        magika.infer({"bytes": good}, deadline=Deadline.after(0))


@pytest.mark.parametrize("right", [["N"], ["M"]])
def test_shapes_that_do_not_go_together_are_the_callers_fault(
    right: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    servable = OnnxModel(add(["N"], right))
    with pytest.raises(SignatureError, match=r"'a' float32 \[3\], 'b' float32 \[2\]"):
        servable.infer({"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)})
    assert capfd.readouterr() == ("", "")
    np.testing.assert_array_equal(
        servable.infer({"a": np.ones(3, np.float32), "b": np.ones(1, np.float32)})["y"], [2, 2, 2]
    )


def test_a_run_that_fails_otherwise_is_an_internal_error_on_one_line() -> None:
    data = model(
        [("Expand", "x to", "y")],
        [value("x", FLOAT, [1]), value("to", TensorProto.INT64, ["K"])],
        [value("y", FLOAT, None)],
    )
    with pytest.raises(InternalError, match="Failed to allocate memory") as caught:
        OnnxModel(data).infer({"x": np.ones(1, np.float32), "to": np.array([1 << 45])})
    assert "\n" not in str(caught.value)
    assert "onnxruntime_src" not in str(caught.value)


def test_a_file_that_lies_about_its_outputs_is_an_internal_error() -> None:
    data = model([("Identity", "x", "y")], [value("x", FLOAT, ["N"])], [value("y", FLOAT, [4])])
    with pytest.raises(InternalError, match=r"broke its own signature: output 'y': expected float32 \[4\]"):
        OnnxModel(data).infer({"x": np.ones(2, np.float32)})


def test_many_threads_get_each_its_own_answer(magika: OnnxModel) -> None:
    rng = np.random.default_rng(1)
    sent = [rng.integers(0, 256, (1, 2048), dtype=np.int32) for _ in range(24)]
    alone = [magika.infer({"bytes": x})["target_label"] for x in sent]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: magika.infer({"bytes": x})["target_label"], sent))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_threads_say_how_many_runs_fit() -> None:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    servable = OnnxModel(identity(FLOAT))
    assert servable.threads == max(1, cpus // 4)
    assert servable.concurrency == max(1, cpus // servable.threads)
    assert OnnxModel(identity(FLOAT), threads=1).concurrency == cpus
    assert OnnxModel(identity(FLOAT), threads=cpus + 1).concurrency == 1
    with pytest.raises(SpecError, match="expected 1 thread or more, got 0"):
        OnnxModel(identity(FLOAT), threads=0)


def test_the_device_is_the_one_that_really_runs() -> None:
    assert OnnxModel(identity(FLOAT), device="cpu").device == "cpu"
    assert "device='cpu'" in repr(OnnxModel(identity(FLOAT), device="cpu"))
    if NO_CUDA:
        assert OnnxModel(identity(FLOAT), device="auto").device == "cpu"


@pytest.mark.skipif(not NO_CUDA, reason="this onnxruntime has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_that_is_not_there_is_refused_and_not_replaced(device: str) -> None:
    with pytest.raises(SpecError, match=f"no working CUDA for '{device}': expected CUDA.*, got .*CPUExecutionProvider"):
        OnnxModel(identity(FLOAT), device=device)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "", "CPU "])
def test_a_device_that_nobody_knows_is_refused(device: str) -> None:
    with pytest.raises(SpecError, match="expected auto, cpu, cuda or cuda:N"):
        OnnxModel(identity(FLOAT), device=device)


@pytest.mark.parametrize("content", [b"", b"garbage\n" * 9, identity(FLOAT)[:-5], b"\x08\x0a"])
def test_a_corrupt_file_is_named_with_the_reason_on_one_line(
    tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(SpecError, match="cannot load this model") as caught:
        OnnxModel(path)
    assert str(caught.value).endswith(f"at {path}")
    assert "\n" not in str(caught.value)
    with pytest.raises(SpecError, match="at bytes in memory"):
        OnnxModel(content)
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.onnx", tmp_path):
        with pytest.raises(SpecError, match="no such file"):
            OnnxModel(path)


def test_inputs_and_outputs_that_are_no_tensors_are_named_with_their_type() -> None:
    sequence = helper.make_tensor_sequence_value_info
    takes = model(
        [("SequenceAt", "x at", "y")],
        [sequence("x", FLOAT, ["N"]), value("at", TensorProto.INT64, [])],
        [value("y", FLOAT, ["N"])],
    )
    gives = model([("SequenceConstruct", "x", "y")], [value("x", FLOAT, ["N"])], [sequence("y", FLOAT, ["N"])])
    maybe = helper.make_value_info("x", helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, ["N"])))
    optional = model([("OptionalGetElement", "x", "y")], [maybe], [value("y", FLOAT, ["N"])])
    for data, said in (
        (takes, r"input 'x': .*got seq\(tensor\(float\)\)"),
        (gives, r"output 'y': .*got seq\(tensor\(float\)\)"),
        (optional, r"input 'x': .*got optional\(tensor\(float\)\)"),
        (identity(TensorProto.COMPLEX64), r"tensor\(complex64\)"),
    ):
        with pytest.raises(SpecError, match=said):
            OnnxModel(data)


def test_strings_beside_bfloat16_are_refused_when_the_model_is_opened() -> None:
    data = model(
        [("Identity", "s", "t"), ("Identity", "x", "y")],
        [value("s", TensorProto.STRING, ["N"]), value("x", TensorProto.BFLOAT16, ["N"])],
        [value("t", TensorProto.STRING, ["N"]), value("y", TensorProto.BFLOAT16, ["N"])],
    )
    with pytest.raises(SpecError, match=r"string inputs \('s'\) with bfloat16 or float8 \('x'\)"):
        OnnxModel(data)


@pytest.mark.parametrize("location", ["../../secret", "ABSOLUTE", "link", "sub/../../../secret", "..//..//secret"])
def test_external_data_outside_the_models_folder_is_never_read(tmp_path: Path, location: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(np.float32(42).tobytes())
    folder = tmp_path / "models" / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to(secret)
    path = with_external(folder, str(secret) if location == "ABSOLUTE" else location)
    with pytest.raises(SpecError, match=REFUSED):
        OnnxModel(path)


@pytest.mark.skipif(not CONFINES, reason="this onnxruntime would read external data from anywhere")
def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(np.float32(7).tobytes())
    servable = OnnxModel(with_external(tmp_path, "weights.bin"))
    assert servable.infer({"x": np.zeros(1, np.float32)})["y"] == [7]


def test_bytes_never_read_external_data_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.bin").write_bytes(np.float32(42).tobytes())
    data = with_external(tmp_path, "weights.bin").read_bytes()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=REFUSED):
        OnnxModel(data)


def test_a_profile_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    servable = OnnxModel(identity(FLOAT), profile=tmp_path / "trace")
    servable.infer({"x": np.ones(1, np.float32)})
    path = servable.end_profile()
    assert path.parent == tmp_path
    assert path.name.startswith("trace")
    assert b"Identity" in path.read_bytes()
    with pytest.raises(SpecError, match="nothing was profiled"):
        OnnxModel(identity(FLOAT)).end_profile()


def test_without_onnxruntime_the_line_to_type_is_named() -> None:
    code = "import sys; sys.modules['onnxruntime'] = None; import remote_ops.onnx"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: remote_ops.onnx needs onnxruntime: pip install 'remote-ops[onnx]'" in done.stderr
