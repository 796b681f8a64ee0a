"""A document, from YAML to a frozen spec: what may be written, and every fault of the writing at once.

It knows how each kind is written, and nothing of what refers to what, which is for `graph` to check: of a document with
faults it gives on the parts that have none.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union, get_args

from pydantic import AfterValidator, BaseModel, Field, PrivateAttr, ValidationError

from ensemble.document import Written, read_yaml
from ensemble.faults import Fault, FaultList, Path, Place, meant
from ensemble.nodes.cascade import CascadeSpec
from ensemble.nodes.combine import CombineSpec
from ensemble.nodes.fallback import FallbackSpec
from ensemble.nodes.graph import GraphSpec
from ensemble.nodes.map import MapSpec
from ensemble.nodes.node import Bytes, EdgeText, Model, NodeSpec, Seconds, TensorText
from ensemble.nodes.onnx import OnnxSpec
from ensemble.nodes.python import PythonSpec
from ensemble.nodes.remote import RemoteSpec
from ensemble.nodes.split import SplitSpec
from ensemble.nodes.switch import SwitchSpec
from ensemble.nodes.tf import TfSpec
from ensemble.nodes.torch import TorchSpec
from ensemble.wording import field_names, is_meant, models_in, near, path_of, shown, worded
from remote_ops.errors import SpecError

__all__ = ["KINDS", "Admission", "Document", "Node", "json_schema", "parse", "read", "schema_text", "text_of"]

# --------------------------------------------------------------------------- what may be written

# Every kind of node is a line here.
KINDS: tuple[type[NodeSpec], ...] = (
    RemoteSpec,
    OnnxSpec,
    TorchSpec,
    TfSpec,
    PythonSpec,
    GraphSpec,
    CombineSpec,
    SwitchSpec,
    SplitSpec,
    MapSpec,
    CascadeSpec,
    FallbackSpec,
)

if TYPE_CHECKING:
    Node: TypeAlias = NodeSpec
else:
    Node = Annotated[Union[KINDS], Field(discriminator="kind")]  # noqa: UP007 (of a tuple)


def _complete(model: type[BaseModel]) -> None:
    """Let a model know what `Node` is: the body of a map holds nodes of any kind."""
    model.model_rebuild(_types_namespace={"Node": Node})
    for field in model.model_fields.values():
        for part in models_in(field.annotation):
            if not part.__pydantic_complete__:
                _complete(part)


class Admission(Model):
    """How much may be going on at once; what is beyond it is refused at once."""

    max_inflight: int = Field(default=64, ge=1)
    """Runs at a time."""
    max_queued: int = Field(default=128, ge=0)
    """Runs that may wait for one to end."""
    max_bytes: Bytes | None = None
    """Bytes of the inputs of the runs that run, such as `2GiB`; a run alone may have more."""


def _metadata(value: str) -> str:
    if value in ("require", "warn") or re.fullmatch(r"file:\S.*", value):
        return value
    raise ValueError(f"expected require, warn or file:PATH, got {value!r}{near(value, ('require', 'warn'))}")


class Document(Model):
    """A graph of models: its inputs, its nodes, and which of their outputs are its own."""

    ensemble: Literal[1]
    """The version of this format: 1."""
    name: str = ""
    """What the graph is called; the file's name without its ending unless said."""
    description: str = ""
    """What it is for, for people."""
    inputs: dict[str, TensorText] = Field(default={})
    """What callers give, by name; nodes read it as `$inputs.NAME`."""
    outputs: dict[str, EdgeText]
    """What callers get, by name: each a reference such as `node.tensor`, or `{from: node.tensor, apply: softmax}`."""
    nodes: dict[str, Node]
    """What is computed, by name; the order does not matter."""
    deadline: Seconds | None = None
    """How long a run may take in all, such as `400ms`."""
    admission: Admission | None = None
    """How much may be going on at once; 64 runs, and 128 that wait, unless said."""
    metadata: Annotated[str, AfterValidator(_metadata)] = "require"
    """Where a model cannot be asked what it takes: `require` is a fault, `warn` goes on, `file:PATH` has a record.
    It holds for graphs in this one, too, unless they have a record of their own.
    """
    strict: bool = False
    """Whether nodes and outputs that nothing uses are faults, not warnings."""

    _file: str = PrivateAttr(default="")
    _digest: str = PrivateAttr(default="")
    _left_out: frozenset[Path] = PrivateAttr(default=frozenset())

    @property
    def file(self) -> str:
        """Where it was read, which relative paths are relative to."""
        return self._file

    @property
    def digest(self) -> str:
        """The SHA-256 of its text, in hex."""
        return self._digest

    @property
    def left_out(self) -> frozenset[Path]:
        """The paths of what was written with faults, and so is not here."""
        return self._left_out

    def lacks(self, path: Path) -> bool:
        """Whether something was written at a path that is not here because of its faults, which are noted already."""
        return any(path[:length] in self._left_out for length in range(1, len(path) + 1))


# --------------------------------------------------------------------------- reading


def read(source: str | PathLike[str], file: str | None = None) -> Document:
    """Read a document.

    Args:
        source: a path; or the YAML itself, if it has a line end or `file` is said.
        file: what places call the YAML, and what its relative paths are relative to.

    Raises:
        GraphFaults: it is not of the format; has all the faults of the writing.
        SpecError: there is no such file, or it is no text.
    """
    is_text = isinstance(source, str) and (file is not None or "\n" in source)
    text = str(source) if is_text else text_of(source)
    document, faults = parse(text, file or ("<text>" if is_text else str(source)))
    faults.raise_if_any()
    assert document is not None
    return document


def text_of(path: str | PathLike[str]) -> str:
    """Read a file.

    Raises:
        SpecError: there is none, or it is no UTF-8.
    """
    try:
        return FilePath(path).read_text("utf-8")
    except OSError as error:
        raise SpecError(f"cannot read the graph: {error.strerror or error}", path=str(path)) from error
    except UnicodeDecodeError as error:
        raise SpecError(f"the graph is no text in UTF-8: byte {error.start}", path=str(path)) from error


def parse(text: str, file: str) -> tuple[Document | None, FaultList]:
    """Read YAML to a document and its faults, which `graph` adds to.

    Returns:
        The document without what has faults (`.left_out` names it), None if nothing is left; and the faults.
    """
    written = read_yaml(text, file)
    faults = FaultList(file, written.places)
    faults.all += written.faults
    if written.value is None:
        return None, faults
    reading = _Reading(written, faults)
    document = reading.document()
    if document is not None:
        document._file = file
        document._digest = hashlib.sha256(text.encode()).hexdigest()
        document._left_out = frozenset(reading.left_out)
        if not document.name:
            document = _named(document, FilePath(file).stem)
    return document, faults


def _named(document: Document, name: str) -> Document:
    return document.model_copy(update={"name": name})


class _Reading:
    """One document on its way from values to a spec: what has faults is taken out until the rest is valid."""

    def __init__(self, written: Written, faults: FaultList) -> None:
        self.value = written.value
        self.keys = written.keys
        self.faults = faults
        self.left_out: set[Path] = set()

    def document(self) -> Document | None:
        if not isinstance(self.value, dict):
            self.faults.add("E101", (), f"the document: expected a mapping with 'ensemble: 1', got {shown(self.value)}")
            return None
        self._check_names()
        for fault in self.faults.all:
            if fault.code == "E101" or fault.path[-1:] == ("<<",):  # of the YAML: what is there is not what was meant
                self._cut(fault.path)
        for _ in range(10):  # what a model finds as a whole shows once its parts are valid
            try:
                return self._checked(self._validated())
            except ValidationError as error:
                for path in list(self._note_all(error)):
                    self._leave_out(path)
        return None

    def _validated(self) -> Document:
        return Document.model_validate_json(json.dumps(self.value), strict=True)

    def _checked(self, document: Document) -> Document:
        if not document.outputs and not self._lost("outputs"):
            self.faults.add("E101", ("outputs",), "'outputs' names nothing: expected one output or more")
        return document

    def _lost(self, key: str) -> bool:
        return any(path[0] == key for path in self.left_out)

    # names

    def _check_names(self) -> None:
        for above, part in list(_graphs((), self.value)):
            for name in _names(part, "nodes"):
                self._check_name((*above, "nodes", name))
            for name in () if above else _names(part, "inputs"):
                self._check_name(("inputs", name))
            for name in _names(part, "outputs"):
                self._check_output((*above, "outputs", name))
        for above, part in list(_graphs((), self.value)):
            for name in _names(part, "nodes") if above else ():
                self._check_shadow((*above, "nodes", name))

    def _check_name(self, path: Path) -> None:
        *_, part, name = path
        what = str(part).removesuffix("s")
        if name in _RESERVED:
            text = f"'{name}' names no {what}: it is reserved for references such as ${name}.x; choose another name"
        elif not _NAME.fullmatch(str(name)):
            text = f"{name!r} names no {what}: expected a letter, then letters, digits, - or _; choose another name"
        else:
            return
        self._note("E102", self.keys[path], path, text)
        self._cut(path)

    def _check_output(self, path: Path) -> None:
        name = path[-1]
        if not _TENSOR.fullmatch(str(name)):
            self._note("E102", self.keys[path], path, f"{name!r} names no output: expected text without spaces or a $")
            self._cut(path)

    def _check_shadow(self, path: Path) -> None:
        """Whether a node of a body has the name of one that the body may read."""
        for above, part in _graphs((), self.value):
            outer = (*above, "nodes", path[-1])
            is_around = len(above) < len(path) - 2 and path[: len(above)] == above
            if is_around and path[-1] in _names(part, "nodes"):
                text = f"'{path[-1]}' is also the name of a node outside the body, at {self.keys[outer]}"
                self._note("E102", self.keys[path], path, f"{text}, which the body may read; rename one of them")

    # faults

    def _note(self, code: str, place: Place, path: Path, text: str) -> None:
        self.faults.all.append(Fault(code, place, path, text))

    def _note_all(self, error: ValidationError) -> Iterator[Path]:
        """Note what pydantic found, one fault for each place; the paths that they make unusable."""
        found: dict[Path, list[Any]] = {}
        for one in error.errors(include_url=False):
            path = path_of(one["loc"], self.value, lacking=one["type"] == "missing")
            found.setdefault(path, []).append(one)
        above = {path[:length] for path in found for length in range(len(path))}
        unknown: dict[Path, list[str]] = {}
        for path, errors in found.items():
            if errors[0]["type"] == "extra_forbidden":
                unknown.setdefault(path[:-1], []).append(str(path[-1]))
        for path, errors in found.items():
            if path in above:
                continue  # another way of a union that was not meant
            first = errors[0]
            if first["type"] == "missing" and is_meant(str(path[-1]), unknown.get(path[:-1], ())):
                continue  # one fault is enough
            if first["type"] == "extra_forbidden":
                self._note("E101", self.keys.get(path, self.faults.place(path)), path, self._unknown(path))
            elif first["type"] == "missing":
                self.faults.add("E101", path, f"{_subject(path[:-1], of=True)} lacks '{path[-1]}'")
            elif first["type"] == "union_tag_not_found":
                kinds = ", ".join(_kinds())
                self.faults.add(
                    "E101", (*path, "kind"), f"{_subject(path, of=True)} lacks 'kind': expected one of {kinds}"
                )
            elif first["type"] == "union_tag_invalid":
                path = (*path, "kind")
                text = f"no kind '{first['ctx']['tag']}'{meant(first['ctx']['tag'], _kinds())}"
                self.faults.add("E101", path, text)
            else:
                code, text = worded(_subject(path), errors)
                self.faults.add(code, path, text)
            yield path

    def _unknown(self, path: Path) -> str:
        known = {name for model in _models_at(path[:-1], self.value) for name in field_names(model)}
        return f"{_subject(path[:-1], of=True)} has no key '{path[-1]}'{meant(str(path[-1]), sorted(known))}"

    # what is left

    def _cut(self, path: Path) -> None:
        """Take out the smallest part with a name that a path is in."""
        if not path or path == ("ensemble",):
            self.value = {**self.value, "ensemble": 1}
            return
        part = _part(path)
        self.left_out.add(part)
        self.value = _without(self.value, part)
        if part in (("nodes",), ("outputs",)):
            self.value = {**self.value, part[0]: {}}

    def _leave_out(self, path: Path) -> None:
        """Take out the key that a path is in where the rest of its node can be checked without it, else the node."""
        key = self._aside(path, _part(path))
        if key is None:
            self._cut(path)
        else:
            self.value = _without(self.value, key)

    def _aside(self, path: Path, part: Path) -> Path | None:
        """The key of a node that a path is in, where the rest of the node means the same without it."""
        key = path[: len(part) + 1]
        if len(part) < 2 or part[-2] != "nodes" or key == part or not _is_in(part, self.value):
            return None
        known = [name for model in _models_at(part, self.value) for name in field_names(model)]
        near = [key[-1]] if key[-1] in known else difflib.get_close_matches(str(key[-1]), known, 1)
        return key if not {*near} - _ASIDE else None


# Keys of nodes that decide neither what flows, nor what is opened and trusted.
_ASIDE = frozenset(
    [
        *("timeout", "max_inflight", "max_queued", "batching", "description", "config", "run_in", "mutates"),
        *("retry", "hedge", "breaker", "device", "providers", "threads", "compile"),
    ]
)
_RESERVED = ("inputs", "item")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_TENSOR = re.compile(r"[^\s$]\S*")


def _graphs(path: Path, value: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The document and the bodies of its maps, from outside in, each with its path."""
    if not isinstance(value, dict):
        return
    yield path, value
    nodes = value.get("nodes")
    for name, node in nodes.items() if isinstance(nodes, dict) else ():
        if isinstance(node, dict):
            yield from _graphs((*path, "nodes", name, "body"), node.get("body"))


def _names(part: Mapping[str, Any], key: str) -> list[str]:
    found = part.get(key)
    return list(found) if isinstance(found, dict) else []


def _part(path: Path) -> Path:
    """The node, input or output that a path is in; else the key of the document."""
    for length in range(len(path), 1, -1):
        part = path[:length]
        if part[-2] in ("nodes", "inputs", "outputs") and (length == 2 or part[-3] == "body"):
            return part
    return path[:1]


def _is_in(path: Path, value: Any) -> bool:
    for step in path:
        if not isinstance(value, dict) or step not in value:
            return False
        value = value[step]
    return True


def _without(value: Any, path: Path) -> Any:
    if not isinstance(value, dict) or path[0] not in value:
        return value
    if len(path) == 1:
        return {key: one for key, one in value.items() if key != path[0]}
    return {**value, path[0]: _without(value[path[0]], path[1:])}


# --------------------------------------------------------------------------- what a part is called


def _subject(path: Path, *, of: bool = False) -> str:
    """What a path is called: `'retry.attempts' of node 'a'`; as the owner of a key (`of`), `the document` or a part."""
    if not path:
        return "the document"
    part = _part(path)
    if len(part) == 1:
        return "'" + ".".join(map(str, path)) + "'"
    thing = f"{str(part[-2]).removesuffix('s')} '{part[-1]}'"
    rest = ".".join(map(str, path[len(part) :]))
    return f"'{rest}' of {thing}" if rest else thing


# --------------------------------------------------------------------------- what is known where


def _kinds() -> list[str]:
    return [kind for spec in KINDS for kind in _kinds_of(spec)]


def _kinds_of(spec: type[BaseModel]) -> tuple[str, ...]:
    field = spec.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def _models_at(path: Path, value: Any) -> list[type[BaseModel]]:
    """The models that what stands at a path may be of."""
    models: list[type[BaseModel]] = [Document]
    for step in path:
        value = value[step]
        fields = [
            field for model in models for name, field in model.model_fields.items() if step == (field.alias or name)
        ]
        if fields:
            models = [model for field in fields for model in models_in(field.annotation)]
        if isinstance(value, dict) and "kind" in value:
            models = [model for model in models if value["kind"] in _kinds_of(model)] or models
    return models


for _kind in KINDS:
    _complete(_kind)
Document.model_rebuild()


# --------------------------------------------------------------------------- JSON Schema


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the format, for editors that complete and check as one writes."""
    schema = Document.model_json_schema()
    node = schema["properties"]["nodes"]["additionalProperties"]
    schema = _referring(schema, node)
    schema["$defs"]["Node"] = node
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "ensemble"}


def _referring(schema: Any, node: Any) -> Any:
    """The schema with a reference to `Node` where it says what a node is."""
    if schema == node:
        return {"$ref": "#/$defs/Node"}
    if isinstance(schema, dict):
        return {key: _referring(part, node) for key, part in schema.items()}
    return [_referring(part, node) for part in schema] if isinstance(schema, list) else schema


def schema_text() -> str:
    """The JSON Schema as `ensemble/schema.json` has it."""
    return json.dumps(json_schema(), indent=2) + "\n"
