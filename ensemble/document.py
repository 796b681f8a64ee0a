"""YAML as it is written: its values, and the line and column where each of them stands.

It reads YAML 1.2, where only `true` and `false` are booleans, and finds keys that are there twice or are no text. What
the values mean is for `spec` to say.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from ensemble.faults import Fault, Path, Place

__all__ = ["Written", "read_yaml"]

_MOST_VALUES = 200_000  # aliases of aliases multiply
_TAG = "tag:yaml.org,2002:"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml is ten times as quick
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own way; those of YAML 1.1 are left behind)


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)


class Written(NamedTuple):
    """A document: its value, where each value and each key stands, and what is wrong with it as YAML.

    Args:
        value: dicts, lists, text, numbers, booleans and None; None for what is no YAML at all.
        places: by path, where it stands: a value, or the key of one that is an indented block.
        keys: by path, where the key of a value stands.
        faults: E101 and E117.
    """

    value: Any
    places: dict[Path, Place]
    keys: dict[Path, Place]
    faults: list[Fault]


def read_yaml(text: str, file: str, *, may_be_empty: bool = False) -> Written:
    """Read a document; `file` is what its places call it. Whatever is wrong is in `.faults`; nothing is raised."""
    reader = _Reader(file)
    try:
        root = _compose(text)
        if root is None and not may_be_empty:
            reader.note("E101", Place(file, 1, 1), (), "the document is empty: expected a mapping with 'ensemble: 1'")
        value = None if root is None else reader.value(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = reader.place(mark) if mark else Place(file, 1, 1)
        reader.note("E101", place, (), f"this is no YAML: {_problem(error, place, text)}")
        value = None
    except yaml.YAMLError as error:
        reader.note("E101", Place(file, 1, 1), (), f"this is no YAML: {error}")
        value = None
    except RecursionError:
        reader.note("E101", Place(file, 1, 1), (), "the document is nested too deeply to be read")
        value = None
    return Written(value, reader.places, reader.keys, reader.faults)


def _compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        root: yaml.Node | None = loader.get_single_node()
        return root
    finally:
        loader.dispose()


def _problem(error: yaml.MarkedYAMLError, place: Place, text: str) -> str:
    """What the parser says, with where the thing began that it was reading; of a tab, what to do."""
    line = text.splitlines()[place.line - 1 : place.line]
    if line and line[0][place.column - 1 : place.column] == "\t":
        return "a tab cannot indent or begin a value; use spaces"
    began = error.context_mark
    if error.context is None or began is None or began.line + 1 == place.line:
        return str(error.problem or error.context)
    return f"{error.problem} {error.context} that begins at line {began.line + 1}, column {began.column + 1}"


class _Reader:
    """Turns the nodes of one document into values, and notes where they stand."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[Path, Place] = {}
        self.keys: dict[Path, Place] = {}
        self.faults: list[Fault] = []
        self._open: set[int] = set()

    def note(self, code: str, place: Place, path: Path, text: str) -> None:
        self.faults.append(Fault(code, place, path, text))

    def place(self, mark: yaml.Mark) -> Place:
        return Place(self.file, mark.line + 1, mark.column + 1)

    def value(self, node: yaml.Node, path: Path, key: Place | None = None) -> Any:
        is_block = isinstance(node, yaml.CollectionNode) and not node.flow_style
        place = self.places[path] = key if key and is_block else self.place(node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place, path)
        if id(node) in self._open or len(self.places) > _MOST_VALUES:
            self.note("E101", place, path, "an alias that holds itself, or more than 200,000 values")
            return None
        self._open.add(id(node))
        try:
            return self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._list(node, path)
        finally:
            self._open.discard(id(node))

    def _list(self, node: yaml.Node, path: Path) -> list[Any]:
        self._check_tag(node, "seq", path)
        return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]

    def _mapping(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        self._check_tag(node, "map", path)
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node.start_mark)
            key = self._key(key_node, place, path)
            if key is None:
                continue
            below = (*path, key)
            if key in found:
                text = f"key '{key}' is written twice: first at {self.keys[below]}; keep one of them"
                self.note("E117", place, below, text)
                continue
            self.keys[below] = place
            found[key] = self.value(value_node, below, place)
        return found

    def _key(self, node: yaml.Node, place: Place, path: Path) -> str | None:
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.ScalarNode) and tag == "str":
            return str(node.value)
        if tag == "merge":
            self.note("E117", place, (*path, "<<"), "'<<' merges mappings in YAML 1.1 only: write its keys out")
        elif isinstance(node, yaml.ScalarNode):
            what = {"int": "a number", "float": "a number", "bool": "a boolean"}.get(tag, "no text")
            text = f"a key is text: expected '{node.value}' in quotes, got {node.value or 'nothing'}, which is {what}"
            self.note("E117", place, path, text)
        else:
            self.note("E117", place, path, "a key is text: got a list or a mapping")
        return None

    def _scalar(self, node: yaml.ScalarNode, place: Place, path: Path) -> Any:
        text, tag = node.value, node.tag.removeprefix(_TAG)
        try:
            if tag in _SCALARS:
                return _SCALARS[tag](text)
        except ValueError:
            self.note("E101", place, path, f"expected what tag '!!{tag}' says, got {text!r}")
            return None
        self._check_tag(node, "str", path)
        return str(text)

    def _check_tag(self, node: yaml.Node, usual: str, path: Path) -> None:
        if node.tag != _TAG + usual:
            shown = node.tag.replace(_TAG, "!!")
            self.note("E101", self.places[path], path, f"tag '{shown}' means nothing here: leave it out")


def _number(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_SCALARS: dict[str, Any] = {
    "str": str,
    "merge": str,
    "null": lambda _: None,
    "bool": lambda text: text.lower() == "true",
    "int": _number,
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}
