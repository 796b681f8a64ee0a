"""The page of the control plane, for a browser: one file that asks the API, and the pictures of graphs that it shows.

It knows no numbers; the file in `page/` asks for those itself. What the file may do is said by its policy: run the one
script that is in it, and ask nobody but us.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from remote_ops.errors import InvalidRequest
from server_ref.answer import failure_of
from server_ref.graphs import is_graph, pictured
from server_ref.names import without_places

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute

    from ensemble.diagram import Box, Diagram
    from server_ref.control import Controlled

__all__ = ["Page", "page", "page_routes", "picture_of"]

_FILE = Path(__file__).parent / "page" / "index.html"
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
# What a drawing of ours is made of; the page makes its own elements of these and of nothing else.
_DRAWN = {
    "rect": ("class", "x", "y", "width", "height", "rx"),
    "path": ("class", "d"),
    "text": ("class", "x", "y", "text-anchor"),
}
_ROOM = 22  # letters that are kept free for the time of a node


class Page(NamedTuple):
    """The file, and the headers that go with it."""

    body: bytes
    headers: Mapping[str, str]


def page_routes(server: Controlled) -> list[BaseRoute]:
    """`GET /`, the page, and `GET /api/graph/<model>/picture`, a graph as the page draws it."""
    from starlette.routing import Route

    async def index(request: Request) -> Response:
        from starlette.responses import Response

        there = page()
        if request.headers.get("if-none-match") == there.headers["ETag"]:
            return Response(status_code=304, headers=dict(there.headers))
        return Response(there.body, headers=dict(there.headers), media_type="text/html")

    async def picture(request: Request) -> Response:
        from starlette.responses import JSONResponse

        try:
            told, status = _picture(server, request.path_params["model"]), 200
        except Exception as error:
            failure = failure_of(error)
            told, status = {"error": without_places(failure.message), "kind": type(error).__name__}, failure.status
        return JSONResponse(told, status, {"Cache-Control": "no-store"})

    return [Route("/", index), Route("/api/graph/{model:path}/picture", picture)]


@lru_cache(maxsize=1)
def page() -> Page:
    """The page with its policy: the hashes of the script and the style that are in it, and nothing from elsewhere."""
    text = _FILE.read_text("utf-8")
    hashes = {tag: f"'sha256-{_hash(content)}'" for tag, content in _INLINE.findall(text)}
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    body = text.encode()
    return Page(
        body,
        {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-cache",
            "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        },
    )


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


# --------------------------------------------------------------------------- graphs


def _picture(server: Controlled, name: str) -> dict[str, Any]:
    servable = server.front.catalog.model(name).version().servable
    if not is_graph(servable):
        raise InvalidRequest(f"model '{name}' is no graph of models")
    return picture_of(pictured(servable)[0])


def picture_of(diagram: Diagram) -> dict[str, Any]:
    """A graph as shapes for a page: `[element, attributes, text]` each, with room for how long each node takes.

    A shape that is the place of such a time has the key of the node as a fourth item. Costs some 10 ms for 20 nodes.
    """
    from ensemble.svg import svg

    salt = secrets.token_hex(4)  # no word of a graph can pass for a mark
    marks = {key: f"{salt}{number}".ljust(_ROOM, "_") for number, key in enumerate(_keys(diagram))}
    root = ElementTree.fromstring(svg(_with_room(diagram, marks), ""))
    key_of = {mark: key for key, mark in marks.items()}
    shapes = [shape for element in root if (shape := _shape(element, key_of)) is not None]
    return {"width": float(root.get("width", 0)), "height": float(root.get("height", 0)), "shapes": shapes}


def _keys(diagram: Diagram) -> Iterator[str]:
    """Of every node, those in nodes included."""
    for box in diagram.boxes:
        if box.kind not in ("input", "output"):
            yield box.key
        if box.inside is not None:
            yield from _keys(box.inside)


def _with_room(diagram: Diagram, marks: Mapping[str, str]) -> Diagram:
    def marked(box: Box) -> Box:
        lines = (*box.lines, marks[box.key]) if box.key in marks else box.lines
        return box._replace(lines=lines, inside=None if box.inside is None else _with_room(box.inside, marks))

    return diagram._replace(boxes=tuple(map(marked, diagram.boxes)))


def _shape(element: ElementTree.Element, key_of: Mapping[str, str]) -> list[Any] | None:
    tag = element.tag.rpartition("}")[2]
    if tag not in _DRAWN or element.get("class") == "paper":
        return None
    attributes = {name: value for name in _DRAWN[tag] if (value := element.get(name)) is not None}
    text = element.text or ""
    return [tag, attributes, "", key_of[text]] if text in key_of else [tag, attributes, text]
