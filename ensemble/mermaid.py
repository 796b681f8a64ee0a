"""A diagram as Mermaid text, which GitHub, GitLab and many editors draw: each kind of node has its shape.

It writes text; Mermaid decides where things go and, in its themes, their colours.
"""

from __future__ import annotations

from collections.abc import Iterator

from ensemble.diagram import Arrow, Box, Diagram

__all__ = ["mermaid"]

# Of each kind, what stands around its text.
_SHAPES = {
    "input": ("([", "])"),
    "output": ("([", "])"),
    "remote": (">", "]"),
    "python": ("(", ")"),
    "graph": ("[[", "]]"),
    "combine": ("{{", "}}"),
    "switch": ("{", "}"),
    "split": ("{", "}"),
    "cascade": ("[/", "\\]"),
    "fallback": ("[\\", "/]"),
    "map": ("[/", "/]"),
}
_MODEL = ("[", "]")

# Strokes only, in tones that show on white and on black: the fill is the theme's.
_STYLE = """\
classDef ends stroke:#2b8a3e,stroke-width:2px
classDef far stroke:#c2571a,stroke-width:2px
classDef own stroke:#3b7dd8
classDef decides stroke:#9457d6
classDef maybe stroke-dasharray:5 4"""


def mermaid(diagram: Diagram) -> str:
    """The text of a flowchart; its lines end with a line end.

    Every label stands in quotes, and what Mermaid would read in it is written as an entity. Owned nodes are dashed, in
    a subgraph of their owner's name; dotted lines lead to them.
    """
    return "\n".join(["flowchart TB", *(f"  {line}" for line in _Text(diagram).lines()), ""])


class _Text:
    def __init__(self, diagram: Diagram) -> None:
        self._diagram = diagram
        self._ids = {box.key: f"n{number}" for number, box in enumerate(_all(diagram))}  # names may be words of Mermaid

    def lines(self) -> Iterator[str]:
        yield from self._graph(self._diagram)
        yield from _STYLE.splitlines()
        maybe = [self._ids[box.key] for box in _all(self._diagram) if box.optional]
        if maybe:
            yield f"class {','.join(maybe)} maybe"

    def _graph(self, diagram: Diagram) -> Iterator[str]:
        for box in diagram.boxes:
            yield from self._box(box)
        for arrow in diagram.arrows:
            yield self._arrow(arrow)

    def _box(self, box: Box) -> Iterator[str]:
        if box.inside is None:
            yield self._shape(box)
            return
        yield f'subgraph {self._ids[box.key]}s["{_escaped(box.title)}"]'
        yield f"  {self._shape(box)}"
        yield from (f"  {line}" for line in self._graph(box.inside))
        yield from (f"  {line}" for line in self._reins(box, box.inside))
        yield "end"

    def _shape(self, box: Box) -> str:
        begin, end = _SHAPES.get(box.kind, _MODEL)
        head = box.title if box.kind in ("input", "output") else f"{box.title} ({box.kind})"
        text = "<br/>".join(map(_escaped, (head, *box.lines)))
        return f'{self._ids[box.key]}{begin}"{text}"{end}:::{_class(box.kind)}'

    def _reins(self, box: Box, inside: Diagram) -> Iterator[str]:
        """The dotted lines from an owner to what it runs: to owned nodes, or to what goes into a body."""
        body = any(one.kind == "input" for one in inside.boxes)
        for one in inside.boxes:
            if one.kind == "input" or (not body and one.kind != "output"):
                label = f'|"{_escaped(one.role)}"|' if one.role else ""
                yield f"{self._ids[box.key]} -.->{label} {self._ids[one.key]}"

    def _arrow(self, arrow: Arrow) -> str:
        text = "<br/>".join(_escaped(part) for part in (arrow.label, arrow.operations) if part)
        line = "-.->" if arrow.optional else "-->"
        return f'{self._ids[arrow.source]} {line}|"{text}"| {self._ids[arrow.target]}'


def _all(diagram: Diagram) -> Iterator[Box]:
    for box in diagram.boxes:
        yield box
        if box.inside is not None:
            yield from _all(box.inside)


def _class(kind: str) -> str:
    if kind in ("input", "output"):
        return "ends"
    if kind == "remote":
        return "far"
    return "decides" if kind in ("combine", "switch", "split", "cascade", "fallback", "map") else "own"


_ENTITIES = {char: f"#{ord(char)};" for char in '"#<>&`*'}


def _escaped(text: str) -> str:
    """Text that Mermaid shows as it is: neither HTML, nor Markdown, nor an entity."""
    return "".join(_ENTITIES.get(char, char if char.isprintable() else " ") for char in text)
