"""What the models of a graph take and give: each opened once, remote ones asked all at once or read from a file.

It opens and asks; whether what it learns fits the graph is decided in `typing`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, NamedTuple

from ensemble.nodes.node import NodeSpec
from remote_ops.deadline import deadline
from remote_ops.errors import SpecError
from remote_ops.servable import Servable
from remote_ops.signature import Signature, TensorSpec, parse_spec

__all__ = ["AROUND", "Around", "Identity", "Models", "Opened", "Opener", "signatures_in"]

Opener = Callable[[NodeSpec, str], Servable]
Identity = Callable[[NodeSpec, str], Hashable]

Known = Mapping[str, Signature] | SpecError | None

_AT_ONCE = 32


class Around(NamedTuple):
    """What holds for a graph because of the graph that it is a node of.

    Args:
        open: gets the servable of a model node.
        tolerant: whether a remote model that cannot be asked is worth a warning only.
        known: signatures of remote nodes, as `Models` says.
        prefix: what the names of its nodes begin with there: `NODE/`.
    """

    open: Opener
    tolerant: bool
    known: Known
    prefix: str


AROUND: ContextVar[Around | None] = ContextVar("ensemble_around", default=None)  # of the graph that is being opened


@dataclass
class Opened:
    """A model: what runs it, what it takes and gives, and what went wrong where one of them is not known."""

    servable: Servable | None = None
    signature: Signature | None = None
    error: Exception | None = None


class Described:
    """A servable whose signature is known from elsewhere, so that nobody is asked for it."""

    def __init__(self, servable: Servable, signature: Signature) -> None:
        self.servable = servable
        self.signature = signature

    def __getattr__(self, name: str) -> Any:
        if name == "servable":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.servable, name)


class Models:
    """The models of one graph.

    Args:
        open: makes the servable of a model node, given the file of the graph.
        identity: nodes with equal identities share a servable; None stands alone. It is given the file too.
        file: of the graph.
        known: signatures of remote nodes by name, where they are read from a file: then nobody is asked. An error if
            that file cannot be read, which is noted: then nothing is known of them, and nothing more said.
        timeout_s: for asking all remote models, seconds.
        prefix: what `known` puts before the names of nodes.
        tolerant: whether graphs that are nodes may lack what remote models say.

    Changing state: what is opened; used by one thread, which waits for those that ask.
    """

    def __init__(
        self,
        open: Opener,
        identity: Identity,
        file: str,
        known: Known,
        timeout_s: float,
        prefix: str = "",
        tolerant: bool = False,
    ) -> None:
        self._open = open
        self._identity = identity
        self._file = file
        self._known = known
        self._timeout_s = timeout_s
        self._prefix = prefix
        self._tolerant = tolerant
        self._opened: dict[Hashable, Opened] = {}
        self._of_spec: dict[int, Opened] = {}  # specs live as long as the document does

    def ask(self, nodes: Iterable[tuple[str, NodeSpec]]) -> None:
        """Open the remote ones of these nodes, and ask them for their signatures all at once."""
        remote = [self._only_opened(name, spec) for name, spec in nodes if spec.MODEL == "remote"]
        waiting = [one for one in remote if one.servable is not None and one.signature is None and one.error is None]
        waiting = [*{id(one): one for one in waiting}.values()]
        if self._known is None and waiting:
            with (
                ThreadPoolExecutor(min(_AT_ONCE, len(waiting)), "ensemble-metadata") as pool,
                deadline(self._timeout_s),
            ):
                for asked in [pool.submit(copy_context().run, _ask, one) for one in waiting]:
                    asked.result()

    def of(self, name: str, spec: NodeSpec) -> Opened:
        """The model of a node: opened, and asked unless it was in `ask`."""
        found = self._only_opened(name, spec)
        if spec.MODEL == "remote" and self._known is not None and found.servable is not None:
            return self._from_file(name, found.servable)
        if found.servable is not None and found.signature is None and found.error is None:
            _ask(found)
        return found

    @property
    def hint(self) -> str:
        """What to do about a remote model whose signature is not known."""
        if self._known is not None:
            return "add what `remote-ops metadata --json URL` prints, under its name"
        return "start it, or check without it: `metadata: file:PATH` or `metadata: warn`"

    def is_blind(self, spec: NodeSpec) -> bool:
        """Whether nothing is known of a node because the file of signatures cannot be read."""
        return spec.MODEL == "remote" and isinstance(self._known, SpecError)

    def _from_file(self, name: str, servable: Servable) -> Opened:
        if self._known is None or isinstance(self._known, SpecError):
            return Opened(servable)
        signature = self._known.get(self._prefix + name)
        if signature is None:
            return Opened(servable, error=SpecError(f"the metadata file has no '{self._prefix}{name}'"))
        return Opened(Described(servable, signature), signature)

    def _only_opened(self, name: str, spec: NodeSpec) -> Opened:
        if id(spec) not in self._of_spec:
            identity = self._identity(spec, self._file)
            key = ("alone", id(spec)) if identity is None else identity
            if key not in self._opened:
                self._opened[key] = self._newly_opened(name, spec)
            self._of_spec[id(spec)] = self._opened[key]
        return self._of_spec[id(spec)]

    def _newly_opened(self, name: str, spec: NodeSpec) -> Opened:
        inside = Around(self._open, self._tolerant, self._known, f"{self._prefix}{name}/")
        token = AROUND.set(inside if spec.kind == "graph" else None)
        try:
            return Opened(self._open(spec, self._file))
        except Exception as error:  # a model's own file and a user's own module may raise anything
            return Opened(error=error)
        finally:
            AROUND.reset(token)


def _ask(opened: Opened) -> None:
    assert opened.servable is not None
    try:
        opened.signature = opened.servable.signature
    except Exception as error:  # whatever a peer or a model does
        opened.error = error


# --------------------------------------------------------------------------- the file of `metadata: file:PATH`


def signatures_in(path: str, file: str) -> dict[str, Signature]:
    """Read signatures by the names of nodes: `{"NODE": {"inputs": [...], "outputs": [...]}}`.

    A signature is as `remote-ops metadata --json URL` prints it; a tensor of it may be a text, `x: float32 [-1, 4]`.
    A node in the body of a map is `MAP/NODE`, one of a graph in a graph `NODE/NODE`.

    Raises:
        SpecError: there is no such file, or it holds something else.
    """
    path = os.path.join(os.path.dirname(file), path)
    try:
        with open(path, encoding="utf-8") as stream:
            told = json.load(stream)
        return {name: _signature(one) for name, one in told.items()}
    except OSError as error:
        raise SpecError(f"cannot read signatures: {error.strerror or error}", path=path) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        expected = 'expected JSON such as {"NODE": {"inputs": ["x: float32 [-1, 4]"], "outputs": [...]}}'
        raise SpecError(
            f"cannot read signatures: {expected}, got {type(error).__name__}: {error}", path=path
        ) from error


def _signature(told: Mapping[str, Any]) -> Signature:
    inputs, outputs = (tuple(map(_tensor, told[side])) for side in ("inputs", "outputs"))
    return Signature(inputs, outputs, **{key: told.get(key, "") for key in ("name", "version", "server")})


def _tensor(told: str | Mapping[str, Any]) -> TensorSpec:
    if isinstance(told, str):
        return parse_spec(told)
    shape = told["shape"]
    return TensorSpec(
        told["name"], told["dtype"], None if shape is None else tuple(shape), told.get("description", ""),
        differentiable=told.get("differentiable", False),
    )  # fmt: skip
