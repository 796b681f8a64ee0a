"""SavedModels and frozen graphs opened as functions of tensors, cut down to what was vetted before TensorFlow sees it.

It opens a SavedModel as TensorFlow's own server does: by its graph, its restore operation and its initializer, not by
the Python objects that it was saved from. So those of TensorFlow 1 and 2 and of any Keras open in the same way.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import graph_pb2
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2
from tensorflow.python.saved_model import function_deserialization, loader_impl

from remote_ops.errors import SpecError
from remote_ops.signature import DTYPES, TensorSpec, did_you_mean
from remote_ops.tf.vetted import Root, needed_part, node_of

__all__ = ["Opened", "open_graph", "open_saved_model", "reason_of", "spec_of"]

_INIT = "__saved_model_init_op"
_VARIABLES = ("variables", "trainable_variables", "local_variables", "model_variables")
_NO_DATA = ("Const", "CheckNumerics")  # what graphpipe-tf takes for neither input nor output


@dataclass(frozen=True)
class Opened:
    """A model as a function of its input tensors, in order, that gives its output tensors, in order.

    The aliases are further names of inputs and outputs; `graph` is the function's, `callees` the graphs of functions
    that it calls, by name; `held` must live as long as `function`, which refers to variables in it but weakly; `close`
    frees what the model holds outside of Python.
    """

    function: Callable[..., Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    name: str
    place: str
    graph: Any
    graph_inputs: Sequence[Any]
    graph_outputs: Sequence[Any]
    input_aliases: Mapping[str, str] = field(default_factory=dict)
    output_aliases: Mapping[str, str] = field(default_factory=dict)
    callees: Mapping[str, Any] = field(default_factory=dict)
    held: Any = None
    close: Callable[[], None] = lambda: None


def open_saved_model(
    folder: Path, signature: str, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None
) -> Opened:
    """Open a folder that holds a `saved_model.pb`.

    Args:
        folder: the folder.
        signature: which of its signatures.
        inputs, outputs: those of the signature to take and give, and their order; by its names or those of tensors.

    Raises:
        SpecError: no such file, no SavedModel, no such signature, an operation that does more than compute, an asset
            outside of the folder, or tensors that have no form here.
    """
    place = str(folder)
    meta = _meta_graph(folder, place)
    said = _signature(meta, signature, place)
    takes, gives = _infos(said.inputs, "input", inputs, place), _infos(said.outputs, "output", outputs, place)
    if not gives:
        raise SpecError(f"signature '{signature}' has no outputs: expected one or more", path=place)
    assets = _assets(folder, meta)
    part = _part(meta, [info.name for info in (*takes.values(), *gives.values())], assets, place)
    loaded = _Loaded(part, place)
    loaded.restore(folder)
    loaded.initialize(assets)
    feeds = [info.name for info in takes.values()]
    fetches = [info.name for info in gives.values()]
    taken, given = _specs(takes, "input", place), _specs(gives, "output", place)
    return loaded.opened(feeds, fetches, taken, given, name=folder.resolve().name)


def open_graph(path: Path, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> Opened:
    """Open a file that holds a frozen GraphDef.

    Args:
        path: the file.
        inputs, outputs: names of tensors, where `x` means `x:0`; unless said, those that graphpipe-tf takes: the nodes
            that nothing goes into, and those that nothing comes out of, except constants.

    Raises:
        SpecError: no such file, no GraphDef, no such tensor, variables, or an operation that does more than compute.
    """
    place = str(path)
    graph = graph_pb2.GraphDef()
    _parse(graph, path, "a frozen GraphDef")
    if not graph.node:
        hint = "; give the folder that it is in" if path.name == "saved_model.pb" else ""
        raise SpecError(f"expected a frozen GraphDef, got a file without nodes{hint}", path=place)
    if held := [node.name for node in graph.node if node.op in ("VarHandleOp", "Variable", "VariableV2")]:
        raise SpecError(
            f"this graph is not frozen: '{held[0]}' is a variable, whose value is not in the file; freeze it, or give "
            "the SavedModel",
            path=place,
        )
    listed = [node.name for node in graph.node if not node.input] if inputs is None else []
    ends = [] if outputs is not None else _ends(graph)
    wanted = [node_of(name) for name in (*(inputs or listed), *(outputs or ends))]
    names = {node.name for node in graph.node}
    for given, path_ in ((inputs or (), "inputs"), (outputs or (), "outputs")):
        for name in given:
            if node_of(name) not in names:
                raise SpecError(f"the graph has no '{name}'{did_you_mean(node_of(name), names)}", path=path_)
    meta = meta_graph_pb2.MetaGraphDef(graph_def=needed_part(graph, [Root(wanted)], place))
    loaded = _Loaded(meta, place)
    feeds = loaded.named(inputs, "inputs") if inputs is not None else loaded.data_of(listed)
    fetches = loaded.named(outputs, "outputs") if outputs is not None else loaded.data_of(ends)
    if not fetches:
        raise SpecError("this graph has no output that is data: say it, as in outputs=['probs']", path="outputs")
    return loaded.opened(
        [tensor.name for tensor in feeds],
        [tensor.name for tensor in fetches],
        [_spec(tensor, "input", place) for tensor in feeds],
        [_spec(tensor, "output", place) for tensor in fetches],
        name=path.stem,
    )


class _Loaded:
    """A vetted graph inside TensorFlow, of which functions can be cut out."""

    def __init__(self, meta: Any, place: str) -> None:
        self._place = place
        self._meta = meta
        suffix = f"_remote_ops_{id(self)}_{next(_serial)}"
        library = meta.graph_def.library
        try:
            self._functions = function_deserialization.load_function_def_library(
                library, saved_object_graph=meta.object_graph_def, load_shared_name_suffix=suffix
            )
            library.Clear()
            library.function.extend(function.function_def for function in self._functions.values())
            for node in meta.graph_def.node:
                function_deserialization.fix_node_def(node, self._functions, suffix)
            self._wrapped = tf.compat.v1.wrap_function(self._import, [])
        except Exception as error:
            raise SpecError(f"TensorFlow cannot read this graph: {reason_of(error)}", path=place) from error
        self._by_name = {tf.compat.as_str(function.name): function for function in self._functions.values()}

    def _import(self) -> None:
        tf.compat.v1.train.import_meta_graph(self._meta)

    def restore(self, folder: Path) -> None:
        """Give the variables their values."""
        saver = self._meta.saver_def
        if not saver.restore_op_name:
            return
        checkpoint = folder / "variables" / "variables"
        if not checkpoint.with_name("variables.index").is_file():
            if any(node.op in ("VarHandleOp", "VariableV2", "Variable") for node in self._meta.graph_def.node):
                raise SpecError("it has variables, but no file variables/variables.index", path=self._place)
            return
        self._run(
            saver.filename_tensor_name, str(checkpoint), saver.restore_op_name, "its variables cannot be restored"
        )

    def initialize(self, assets: Mapping[str, str]) -> None:
        """Run its initializer, which fills tables."""
        name = _init_op(self._meta)
        if name:
            fetch = self._wrapped.graph.as_graph_element(name)
            self._call_once(list(assets), list(assets.values()), fetch, "its initializer fails")

    def _run(self, feed: str, value: str, fetch: str, fault: str) -> None:
        self._call_once([feed], [value], self._wrapped.graph.as_graph_element(fetch), fault)

    def _call_once(self, feeds: Sequence[str], values: Sequence[str], fetch: Any, fault: str) -> None:
        graph = self._wrapped.graph
        try:
            with graph.as_default():
                anchor = tf.constant(0.0)
            function = self._wrapped.prune([graph.as_graph_element(feed) for feed in feeds], [anchor, fetch])
            function(*[tf.constant(value) for value in values])
        except Exception as error:
            raise SpecError(f"{fault}: {reason_of(error)}", path=self._place) from error

    def named(self, names: Iterable[str], path: str) -> list[Any]:
        """The tensors of these names, where `x` means `x:0`."""
        found = []
        for name in names:
            try:
                found.append(self._wrapped.graph.as_graph_element(_with_index(name)))
            except (KeyError, ValueError) as error:
                raise SpecError(f"the graph has no tensor '{name}': {reason_of(error)}", path=path) from error
        return found

    def data_of(self, nodes: Iterable[str]) -> list[Any]:
        """The tensors that nodes give, as far as they are data; constants give none."""
        operations = [self._wrapped.graph.as_graph_element(name) for name in nodes]
        return [
            tensor
            for operation in operations
            if operation.type not in _NO_DATA
            for tensor in operation.outputs
            if tensor.dtype.name in DTYPES
        ]

    def opened(
        self,
        feeds: Sequence[str],
        fetches: Sequence[str],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        name: str,
    ) -> Opened:
        """The function from some of its tensors to others."""
        graph = self._wrapped.graph
        try:
            sources = [graph.as_graph_element(feed) for feed in feeds]
            targets = [graph.as_graph_element(fetch) for fetch in fetches]
            function = self._wrapped.prune(sources, targets)
        except Exception as error:
            raise SpecError(f"no such model in this graph: {reason_of(error)}", path=self._place) from error
        for operation in function.graph.get_operations():
            callee = _callee(operation)
            if callee in self._by_name:  # else the gradient would be a symbolic one, which few operations have
                operation._gradient_function = self._by_name[callee]._get_gradient_function()
        return Opened(
            function,
            tuple(inputs),
            tuple(outputs),
            name=name,
            place=self._place,
            graph=function.graph,
            graph_inputs=function.graph.inputs[: len(sources)],
            graph_outputs=function.graph.outputs[: len(targets)],
            input_aliases=_aliases(inputs, feeds),
            output_aliases=_aliases(outputs, fetches),
            callees={name: found.graph for name, found in self._by_name.items()},
            close=_freeing(self._meta.graph_def),
        )


def _counter() -> Iterable[int]:
    number = 0
    while True:
        yield number
        number += 1


_serial: Any = _counter()


def _callee(operation: Any) -> str:
    if operation.type not in ("PartitionedCall", "StatefulPartitionedCall"):
        return ""
    return str(operation.get_attr("f").name)


def _freeing(graph: Any) -> Callable[[], None]:
    """What frees the variables of a graph: TensorFlow keeps them, by their name, for as long as the process lives."""
    handles = [
        (node.attr["container"].s, node.attr["shared_name"].s or node.name.encode(), node.attr["dtype"].type)
        for node in graph.node
        if node.op == "VarHandleOp"
    ]

    def free() -> None:
        for container, name, dtype in handles:
            with contextlib.suppress(Exception):  # at exit TensorFlow may be gone
                handle = tf.raw_ops.VarHandleOp(dtype=dtype, shape=None, container=container, shared_name=name)
                tf.raw_ops.DestroyResourceOp(resource=handle, ignore_lookup_error=True)

    return free


def _meta_graph(folder: Path, place: str) -> Any:
    model = saved_model_pb2.SavedModel()
    _parse(model, folder / "saved_model.pb", "a SavedModel")
    serving = [meta for meta in model.meta_graphs if "serve" in meta.meta_info_def.tags]
    metas = serving or list(model.meta_graphs)
    if len(metas) != 1:
        tags = ["+".join(meta.meta_info_def.tags) for meta in model.meta_graphs]
        raise SpecError(f"expected one graph with the tag 'serve', got {', '.join(tags) or 'none'}", path=place)
    return metas[0]


def _parse(message: Any, path: Path, kind: str) -> None:
    try:
        message.ParseFromString(path.read_bytes())
    except OSError as error:
        raise SpecError(f"no such file, or none that can be read: {error.strerror}", path=str(path)) from error
    except Exception as error:  # protobuf's own, from wherever this version keeps it
        raise SpecError(f"expected {kind}, got bytes that are none", path=str(path)) from error


def _signature(meta: Any, name: str, place: str) -> Any:
    known = [key for key in meta.signature_def if not key.startswith("__")]
    if name not in known:
        expected = f"expected one of {', '.join(sorted(known))}{did_you_mean(name, known)}" if known else "it has none"
        raise SpecError(f"no signature '{name}': {expected}", path=f"{place}, signature")
    return meta.signature_def[name]


def _infos(infos: Mapping[str, Any], kind: str, chosen: Sequence[str] | None, place: str) -> dict[str, Any]:
    """The tensors of a signature by name, as chosen; else `a2` before `a10`, for the file keeps no order of them."""
    if chosen is not None:
        by_tensor = {info.name: name for name, info in infos.items()}
        names = [name if name in infos else by_tensor.get(_with_index(name), name) for name in chosen]
        if unknown := [name for name in names if name not in infos]:
            expected = f"expected some of {', '.join(sorted(infos))}{did_you_mean(unknown[0], infos)}"
            raise SpecError(f"the signature has no {kind} '{unknown[0]}': {expected}", path=f"{kind}s")
    else:
        names = sorted(infos, key=_natural)
    for name in names:
        if not infos[name].name:
            raise SpecError(f"{kind} '{name}' is no dense tensor: only those have a form here", path=place)
    return {name: infos[name] for name in names}


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _with_index(name: str) -> str:
    return name if ":" in name else f"{name}:0"


def _assets(folder: Path, meta: Any) -> dict[str, str]:
    """The files that the initializer reads, by the tensor that it takes their name from."""
    inside = (folder / "assets").resolve()
    found = {}
    for tensor, file in loader_impl.get_asset_tensors(str(folder), meta).items():
        path = Path(file.decode() if isinstance(file, bytes) else file)
        if inside not in path.resolve().parents:
            raise SpecError(f"its asset '{path}' is outside of the folder: expected one in {inside}", path=str(folder))
        found[tensor] = str(path)
    return found


def _init_op(meta: Any) -> str:
    if _INIT in meta.signature_def:
        return str(meta.signature_def[_INIT].outputs[_INIT].name)
    for key in ("saved_model_main_op", "legacy_init_op"):
        if key in meta.collection_def and meta.collection_def[key].node_list.value:
            return str(meta.collection_def[key].node_list.value[0])
    return ""


def _part(meta: Any, tensors: Iterable[str], assets: Mapping[str, str], place: str) -> Any:
    """What is needed of a meta graph, without anything else in it that TensorFlow would act on."""
    saver, init = meta.saver_def, _init_op(meta)
    roots = [Root([node_of(name) for name in tensors])]
    if saver.restore_op_name:
        names = [node_of(saver.restore_op_name), node_of(saver.filename_tensor_name)]
        roots.append(Root(names, frozenset([saver.filename_tensor_name]), ("RestoreV2",)))
    if init:
        readers = ("InitializeTableFromTextFileV2", "InitializeTableFromTextFile")
        roots.append(Root([node_of(name) for name in (init, *assets)], frozenset(assets), readers))
    part = meta_graph_pb2.MetaGraphDef(saver_def=saver)
    part.meta_info_def.CopyFrom(meta.meta_info_def)
    roots.append(Root(_initializers(meta, part, needed_part(meta.graph_def, roots, place))))
    part.graph_def.CopyFrom(needed_part(meta.graph_def, roots, place))
    for entry in part.graph_def.library.registered_gradients:  # else what they return is not known
        if entry.gradient_func in meta.object_graph_def.concrete_functions:
            known = meta.object_graph_def.concrete_functions[entry.gradient_func]
            part.object_graph_def.concrete_functions[entry.gradient_func].CopyFrom(known)
    if _INIT in meta.signature_def:
        part.signature_def[_INIT].CopyFrom(meta.signature_def[_INIT])
    for key in ("saved_model_main_op", "legacy_init_op"):
        if key in meta.collection_def and init:
            part.collection_def[key].CopyFrom(meta.collection_def[key])
    return part


def _initializers(meta: Any, part: Any, needed: Any) -> list[str]:
    """Keep the variables of TensorFlow 1 that are needed, and give the nodes that their entries name besides."""
    from tensorflow.core.framework import variable_pb2

    there = {node.name for node in needed.node}
    nodes: list[str] = []
    for key in _VARIABLES:
        if key not in meta.collection_def:
            continue
        for entry in meta.collection_def[key].bytes_list.value:
            variable = variable_pb2.VariableDef.FromString(entry)
            if node_of(variable.variable_name) in there:
                part.collection_def[key].bytes_list.value.append(entry)
                named = (variable.initializer_name, variable.initial_value_name, variable.snapshot_name)
                nodes.extend(node_of(name) for name in (variable.variable_name, *named) if name)
    return nodes


def _ends(graph: Any) -> list[str]:
    """The nodes that take something, and that none takes anything from."""
    used = {node_of(tensor) for node in graph.node for tensor in node.input}
    return [node.name for node in graph.node if node.input and node.name not in used]


def _aliases(specs: Sequence[TensorSpec], tensors: Sequence[str]) -> dict[str, str]:
    """Further names: that of the tensor in the graph, and each with and without its `:0`."""
    found: dict[str, str] = {}
    for spec, tensor in zip(specs, tensors, strict=True):
        for name in (tensor, tensor.removesuffix(":0"), f"{spec.name}:0"):
            if name != spec.name:
                found[name] = spec.name
    return found


def _specs(infos: Mapping[str, Any], kind: str, place: str) -> list[TensorSpec]:
    return [
        spec_of(name, tf.as_dtype(info.dtype), tf.TensorShape(info.tensor_shape), kind, place)
        for name, info in infos.items()
    ]


def _spec(tensor: Any, kind: str, place: str) -> TensorSpec:
    return spec_of(tensor.name.removesuffix(":0"), tensor.dtype, tensor.shape, kind, place)


def spec_of(name: str, dtype: Any, shape: Any, kind: str, place: str) -> TensorSpec:
    """The spec of a tensor of TensorFlow: an open size is -1, an open rank no shape at all."""
    if dtype.name not in DTYPES:
        raise SpecError(f"{kind} '{name}': expected a tensor of {', '.join(DTYPES)}, got {dtype.name}", path=place)
    sizes = None if shape.rank is None else tuple(-1 if size is None else size for size in shape.as_list())
    return TensorSpec(name, dtype.name, sizes)


def reason_of(error: BaseException) -> str:
    """What TensorFlow says, on one line: its first that says something, without its node or the traceback."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not _NOISE.match(line)]
    line = _MARKS.sub(lambda found: found[1] or "", (kept or lines or [""])[0])[:300]
    own = isinstance(error, tf.errors.OpError) and line
    return line if own else f"{type(error).__name__}: {line}".removesuffix(": ")


_NOISE = re.compile(r"Graph execution error|Detected at node|<stack traces|File \"|\[\[|[\w/]+$|\d+ root error|\(\d\)")
_MARKS = re.compile(r"\s*\[\[.*|\s*\[Op:.*|\{\{\w+ ([^}]*)\}\}")
