"""Write `docs/ensemble-reference.md` from the code: what may be written in a graph, and the codes of what is wrong.

It writes `ensemble/schema.json`, which says the same to editors, too.

Run it after changing what a document may say: `python docs/make_reference.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from ensemble import operations, spec
from ensemble.faults import CODES
from ensemble.nodes.node import NodeSpec

PAGE = Path(__file__).with_name("ensemble-reference.md")
SCHEMA = spec.json_schema()
PARTS = SCHEMA["$defs"]

_INTRODUCTION = """\
# Graphs: every key

Made by `docs/make_reference.py` from what `ensemble` checks; `ensemble schema` prints the same as a JSON Schema, for
editors. [Graphs](ensemble.md) is where to start.

Lengths of time are a number and `us`, `ms`, `s`, `min` or `h`; sizes a number and `kB`, `MB`, `GB`, `TB`, `KiB`, `MiB`,
`GiB` or `TiB`; shares are `5%` or `0.05`. Only `true` and `false` are booleans; keys are text.
"""
_COMMON = "What every kind of node may say, where it has a meaning. Tables of kinds have the keys of their own."


def page() -> str:
    """The page."""
    return "\n".join([_INTRODUCTION, *_document(), *_kinds(), *_parts(), *_operations(), *_codes()]) + "\n"


def _document() -> Iterator[str]:
    yield "## The document\n"
    yield from _table(SCHEMA, SCHEMA["properties"])
    yield from _section("References and edges", "Edge")
    yield "A reference alone, such as `pre.t`, is short for `{from: pre.t}`.\n"
    yield from _section("A declared tensor", "TensorText")
    yield from _section("Admission", "Admission")


def _kinds() -> Iterator[str]:
    yield f"## Nodes\n\n{_COMMON}\n"
    yield from _table(PARTS["RemoteSpec"], _common())
    for kind in spec.KINDS:
        part = PARTS[kind.__name__]
        yield f"### {part['properties']['kind']['const']}\n\n{_text(part['description'])}\n"
        own = {name: one for name, one in part["properties"].items() if name not in _common()}
        yield from _table(part, own)


def _common() -> Mapping[str, Any]:
    """The keys of all nodes, and `kind`."""
    keys = {name: PARTS["RemoteSpec"]["properties"][name] for name in NodeSpec.model_fields}
    return {**keys, "kind": {"enum": [PARTS[kind.__name__]["properties"]["kind"]["const"] for kind in spec.KINDS]}}


def _parts() -> Iterator[str]:
    """What stands in nodes and is not told yet."""
    yield "## Parts of nodes\n"
    told = {"Node", "Edge", "TensorText", "Admission", *(kind.__name__ for kind in spec.KINDS)}
    for name in sorted(set(PARTS) - told):
        yield from _section(_title(name), name)


def _section(title: str, name: str) -> Iterator[str]:
    yield f"### {title}\n\n{_text(PARTS[name]['description'])}\n"
    yield from _table(PARTS[name], PARTS[name]["properties"])


def _title(name: str) -> str:
    return name.removesuffix("Text")


def _table(part: Mapping[str, Any], keys: Mapping[str, Any]) -> Iterator[str]:
    required = part.get("required", ())
    yield "| key | is | default | says |\n|---|---|---|---|"
    for name, one in keys.items():
        default = "required" if name in required else _default(one.get("default"), _type(one))
        yield f"| `{name}` | {_type(one)} | {default} | {_text(one.get('description', 'What it is.'))} |"
    yield ""


def _text(text: str) -> str:
    """A description on one line; bars would end its cell."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def _default(value: Any, kind: str) -> str:
    """A default as one would write it."""
    if isinstance(value, dict) and value:
        return "as told there"
    if isinstance(value, list):
        return " ".join(f"`{one}`" for one in value)
    if isinstance(value, float) and kind in ("text", "share"):
        return f"`{value:.0%}`" if kind == "share" else f"`{_length(value)}`"
    if value in (None, "", {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _length(seconds: float) -> str:
    return f"{seconds * 1e3:g}ms" if 0 < seconds < 1 else f"{seconds:g}s"


def _type(one: Mapping[str, Any]) -> str:
    """The type in words: what a JSON Schema says of a value."""
    if "$ref" in one:
        name = one["$ref"].rpartition("/")[2]
        return f"[{_title(name)}](#{_anchor(name)})" if name != "Node" else "[node](#nodes)"
    if "const" in one:
        return f"`{one['const']}`"
    if "enum" in one:
        return " ".join(f"`{value}`" for value in one["enum"])
    if "anyOf" in one:
        ways = frozenset(way.get("type", way.get("$ref")) for way in one["anyOf"]) - {"null"}
        if ways in _ANY_OF:
            return _ANY_OF[ways]
        return " or ".join(dict.fromkeys(_type(way) for way in one["anyOf"] if way.get("type") != "null"))
    if one.get("type") == "array":
        return f"list of {_type(one['items'])}"
    if one.get("type") == "object":
        below = one.get("additionalProperties")
        return f"mapping to {_type(below)}" if isinstance(below, dict) else "mapping"
    return _WORDS[one.get("type", "")]


_WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "boolean", "": "anything"}
_ANY_OF = {
    frozenset({"string", "#/$defs/Edge"}): "[edge](#references-and-edges)",
    frozenset({"number", "string"}): "share",
    frozenset({"integer", "string"}): "number or text",
    frozenset({"boolean", "integer", "number", "string"}): "any value",
}
_ANCHORS = {"Edge": "references-and-edges", "TensorText": "a-declared-tensor"}


def _anchor(name: str) -> str:
    return _ANCHORS.get(name, _title(name).lower())


def _operations() -> Iterator[str]:
    yield "## Operations of `apply`\n"
    yield "Written `softmax`, `{softmax: {axis: 1}}`, or a list of them; `cast` comes last.\n"
    yield "| operation | arguments | of | gives |\n|---|---|---|---|"
    for word, kind in operations.OPERATIONS.items():
        yield f"| `{word}` | {_arguments(kind)} | {kind.takes} | {_text(kind.__doc__ or '')} |"
    yield ""


def _arguments(kind: Any) -> str:
    return ", ".join(
        f"`{field.alias or name}`"
        if field.default in (None, PydanticUndefined)
        else f"`{field.alias or name}={field.default}`"
        for name, field in kind.model_fields.items()
    )


def _codes() -> Iterator[str]:
    yield "## Codes of faults\n\nA warning has a W for the E.\n"
    yield "| code | says |\n|---|---|"
    yield from (f"| {code} | {_text(text)} |" for code, text in CODES.items())


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    Path(spec.__file__).with_name("schema.json").write_text(spec.schema_text(), "utf-8")
