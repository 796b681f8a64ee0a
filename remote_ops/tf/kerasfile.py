"""Files of Keras, opened in its safe mode, after a look of our own at what they name.

A `.keras` or `.h5` file says which classes and functions to build, and Keras imports them. So only those of Keras that
compute are taken, and those that the operator has registered; no function from the file, and no file besides.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorflow as tf

from remote_ops.errors import SpecError
from remote_ops.tf.graphs import Opened, reason_of, spec_of

__all__ = ["open_keras", "open_keras_file"]

_REFUSED = {
    "Lambda": "a Lambda layer holds Python code",
    "__lambda__": "it holds Python code",
    "TFSMLayer": "it loads another model from a path of the file's choosing",
    "TorchModuleWrapper": "it unpickles a torch module",
    "JaxLayer": "it holds a function of jax",
    "FlaxLayer": "it holds a function of jax",
    "TensorFlowOpLayer": "it holds an operation as bytes",
}
# The parts of Keras whose classes and functions only compute.
_PARTS = {
    "layers", "models", "activations", "initializers", "regularizers", "constraints", "losses", "metrics", "optimizers",
    "dtype_policies", "ops", "random", "quantizers",
}  # fmt: skip
_PATHS = ("vocabulary", "idf_weights")  # a list, or the path of a file


def open_keras_file(path: Path) -> Opened:
    """Open a `.keras` or `.h5` file.

    Raises:
        SpecError: no such file, weights only, something that Keras does not build safely, or no known inputs.
        ImportError: keras or h5py is missing.
    """
    place = str(path)
    if not path.is_file():
        raise SpecError("expected a file, got a folder" if path.is_dir() else "no such file", path=place)
    keras = _keras()
    try:
        (_check_archive if path.suffix.lower() == ".keras" else _check_h5)(path)
    except SpecError as error:
        raise SpecError(f"this model is refused: {error.message}", path=place) from error
    except ImportError:
        raise
    except Exception as error:
        raise SpecError(f"no {path.suffix} file: {reason_of(error)}", path=place) from error
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise SpecError(f"Keras cannot load this model: {reason_of(error)}", path=place) from error
    return open_keras(model, path.stem, place)


def open_keras(model: Any, name: str, place: str) -> Opened:
    """Trace a Keras model, not training, as a function of its inputs.

    Raises:
        SpecError: it was never built, or it fails while it is traced.
    """
    keras = _keras()
    try:
        symbols = list(model.inputs or ())
    except (AttributeError, ValueError):
        symbols = []
    if not symbols:
        raise SpecError("this Keras model does not say what it takes: give it an Input, and save it again", path=place)
    structure = getattr(model, "_inputs_struct", None)
    if structure is None:
        structure = symbols[0] if len(symbols) == 1 else symbols
    keys = list(structure) if isinstance(structure, dict) else []
    names = sorted(keys) if len(keys) == len(symbols) else [symbol.name for symbol in symbols]
    given: list[str] = []

    def call(*tensors: Any) -> Any:
        result = model(keras.tree.pack_sequence_as(structure, list(tensors)), training=False)
        flat = keras.tree.flatten(result)
        given[:] = _output_names(model, result, len(flat))
        return flat

    try:
        traced = tf.function(call, autograph=False).get_concrete_function(
            *[tf.TensorSpec(symbol.shape, symbol.dtype, name=f"input_{index}") for index, symbol in enumerate(symbols)]
        )
    except Exception as error:
        raise SpecError(f"this Keras model cannot be traced: {reason_of(error)}", path=place) from error
    graph = traced.graph
    outputs = graph.outputs[: len(given)]
    return Opened(
        traced,
        tuple(
            spec_of(name, tensor.dtype, tensor.shape, "input", place)
            for name, tensor in zip(names, graph.inputs, strict=False)
        ),
        tuple(
            spec_of(name, tensor.dtype, tensor.shape, "output", place)
            for name, tensor in zip(given, outputs, strict=True)
        ),
        name=name,
        place=place,
        graph=graph,
        graph_inputs=graph.inputs[: len(names)],
        graph_outputs=outputs,
        input_aliases={f"{name}:0": name for name in names},
        output_aliases={f"{name}:0": name for name in given},
        held=model,
    )


def _output_names(model: Any, result: Any, count: int) -> list[str]:
    if isinstance(result, dict) and len(result) == count:
        return sorted(result)
    names = list(getattr(model, "output_names", None) or ())
    if len(names) == count == len(set(names)):
        return names
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def _keras() -> Any:
    try:
        import keras
    except ImportError as error:
        raise ImportError("Keras files need keras: pip install 'remote-ops[tf]'") from error
    if not hasattr(keras, "saving") or int(keras.__version__.partition(".")[0]) < 3:
        raise ImportError(f"Keras files need keras 3, got {keras.__version__}: pip install -U keras")
    if keras.backend.backend() != "tensorflow":
        backend = keras.backend.backend()
        raise SpecError(f"Keras runs on {backend} here: expected KERAS_BACKEND=tensorflow", path="model")
    return keras


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        _check_config(json.loads(archive.read("config.json")))
        for name in names:
            if name.endswith((".h5", ".hdf5")):
                with _h5(io.BytesIO(archive.read(name))) as file:
                    _check_links(file)
            elif name.endswith((".npz", ".npy", ".pkl")):
                raise SpecError(f"it holds '{name}': expected weights in HDF5")


def _check_h5(path: Path) -> None:
    with _h5(path) as file:
        _check_links(file)
        text = file.attrs.get("model_config")
        if text is None:
            raise SpecError("it holds weights only: save the whole model, with model.save(...)")
        _check_config(json.loads(text))


@contextmanager
def _h5(source: Any) -> Iterator[Any]:
    with _h5py().File(source, "r") as file:
        yield file


def _h5py() -> Any:
    try:
        import h5py  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError("Keras files need h5py: pip install 'remote-ops[tf]'") from error
    return h5py


def _check_links(file: Any) -> None:
    """Refuse what HDF5 would read from other files: external links, external storage, virtual datasets."""
    h5py = _h5py()
    seen = set()
    waiting = [file]
    while waiting:
        group = waiting.pop()
        for name in group:
            if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
                raise SpecError(f"'{name}' in it is in another file: expected all weights inside")
            thing = group.get(name)
            if isinstance(thing, h5py.Dataset) and (thing.external or thing.is_virtual):
                raise SpecError(f"the data of '{name}' in it is in another file: expected all weights inside")
            if isinstance(thing, h5py.Group) and (at := h5py.h5o.get_info(thing.id).addr) not in seen:
                seen.add(at)
                waiting.append(thing)


def _check_config(config: Any) -> None:
    """Refuse a class or function that is neither Keras's own nor registered here, and those that could run code."""
    waiting = [config]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting.extend(node)
        elif isinstance(node, dict):
            if "class_name" in node:
                _check_class(node)
            for key in _PATHS:
                if isinstance(node.get(key), str) and node[key]:
                    raise SpecError(f"it reads the file '{node[key]}', as {key} of a layer: expected a list inside")
            waiting.extend(node.values())


def _check_class(node: dict[str, Any]) -> None:
    registered, module = str(node.get("registered_name") or ""), node.get("module")
    name = str(node["class_name"])
    for called in (name, registered):
        short = called.rpartition(">")[2]
        if short in _REFUSED:
            raise SpecError(f"it holds a {short}, and {_REFUSED[short]}: expected layers of Keras alone")
    if registered in _keras().saving.get_custom_objects() or module is None or module == "builtins":
        return
    first, *rest = str(module).split(".")
    rest = rest[1:] if rest[:1] == ["src"] else rest
    if first == "keras" and (not rest or rest[0] in _PARTS):
        return
    raise SpecError(
        f"it wants '{name}' of '{module}', which is none of Keras's layers and nothing that is registered here: import "
        "the package that holds it, with keras.saving.register_keras_serializable, before the model is loaded"
    )
