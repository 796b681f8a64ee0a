"""Which models are served, in which versions, and which of them a request means.

It knows no sockets, and loads nothing. Everything changes on the loop's thread only, so there is no lock.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from remote_ops.errors import ModelNotFound
from remote_ops.signature import did_you_mean
from server_ref.model import Version
from server_ref.routing import Routes

__all__ = ["Catalog", "Chosen", "Model"]


class Chosen(NamedTuple):
    """The version that answers a request, and the one that gets a copy of it, if one does."""

    version: Version
    copy_to: Version | None = None


class Model:
    """One model: its versions by name, and how requests are split between them.

    `known` are versions that are to be served, or could be, ready or not. `sticky` is the header, in small letters,
    whose value keeps a caller with a version; none if empty. `is_routed` once labels and weights have been set.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.versions: dict[str, Version] = {}
        self.known: tuple[str, ...] = ()
        self.routes = Routes(name, (), frozenset())
        self.sticky = ""
        self.is_routed = False

    def choose(self, asked: str = "", headers: Mapping[str, str] = MappingProxyType({})) -> Chosen:
        """Choose the version of a request: the version or the label that it asks for, else by weight, else the newest.

        Args:
            asked: a version or a label; empty where the request leaves the choice to us.
            headers: those of the request, by name in small letters.

        Raises:
            ModelNotFound: there is no such version or label.
            ModelUnavailable: it is not ready.
        """
        if asked:
            return Chosen(self.versions[self.routes.choose(asked).version])
        key = headers.get(self.sticky) if self.sticky else None
        choice = self.routes.choose(key=key, chance=random.random() if self.routes.weights else 0.0)
        return Chosen(self.versions[choice.version], self.versions.get(choice.mirror) if choice.mirror else None)

    def version(self, asked: str = "") -> Version:
        """The version that answers a request which no header decides about."""
        return self.choose(asked).version

    def know(self, versions: Iterable[str]) -> None:
        """Take note of the versions that there could be."""
        self.known = tuple(versions)
        self._reroute()

    def add(self, version: Version) -> Version | None:
        """Serve a version; gives the one that it replaces."""
        before = self.versions.get(version.version)
        self.versions[version.version] = version
        self._reroute()
        return before

    def remove(self, version: str) -> Version:
        """Serve a version no more."""
        removed = self.versions.pop(version)
        self._reroute()
        return removed

    def _reroute(self) -> None:
        self.routes = self.routes.with_ready({*self.known, *self.versions}, self.versions)


class Catalog:
    """The models of a server, by name.

    Args:
        models: name -> the versions that are served from the start.
    """

    def __init__(self, models: Mapping[str, Version]) -> None:
        self.models: dict[str, Model] = {}
        self._gone: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        for name, version in models.items():
            self.add(name, version)

    def __iter__(self) -> Iterator[Version]:
        for model in self.models.values():
            yield from model.versions.values()

    @property
    def only(self) -> Model | None:
        """The model, if there is just one."""
        return next(iter(self.models.values())) if len(self.models) == 1 else None

    @property
    def ready(self) -> bool:
        """Whether every version has enough copies that are up."""
        return all(version.ready for version in self)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let every version take requests, those that are added later too."""
        self._loop = loop
        for version in self:
            version.start(loop)

    def stop(self) -> None:
        """Let none take any more."""
        for version in self:
            version.stop()

    def sweep(self) -> None:
        """Give up, in every version, what has waited or run too long."""
        for version in self:
            version.sweep()

    @property
    def calls_others(self) -> bool:
        """Whether a request is under way at a version that calls other models."""
        return any(version.pending for version in self if version.calls_others)

    def refuse_callers(self) -> None:
        """Take no more requests for versions that call other models, so that those can be closed after them."""
        for version in self:
            version.closed = version.calls_others

    def know(self, name: str, versions: Iterable[str]) -> None:
        """Take note of the versions that a model could have: who asks for one too early hears that it is not ready."""
        model = self.models.setdefault(name, Model(name))
        model.know(versions)
        if not model.versions and not model.known:
            del self.models[name]
            self._gone.add(name)

    def add(self, name: str, version: Version) -> Version | None:
        """Serve a version from now on; gives the one that it replaces, which its caller stops when it is done."""
        before = self.models.setdefault(name, Model(name)).add(version)
        if self._loop is not None:
            version.start(self._loop)
        return before

    def remove(self, name: str, version: str) -> Version:
        """Serve a version no more; gives it, and its caller stops it when it is done."""
        model = self.models[name]
        removed = model.remove(version)
        if not model.versions and not model.known:
            del self.models[name]
            self._gone.add(name)
        return removed

    def find(self, path: str) -> tuple[Model, str]:
        """The model that a path names, `/<model>` or `/<model>/<version>`, and the version, if it names one.

        One model answers any path but that of one that is no longer served; a path that names it and a version of it is
        taken at its word.

        Raises:
            ModelNotFound: no such model; names those there are.
        """
        name, _, version = path.strip("/").partition("/")
        if (only := self.only) is not None and (name == only.name or name not in self._gone):
            return only, version if name == only.name and only.routes.knows(version) else ""
        return self.model(name), version

    def model(self, name: str) -> Model:
        """The model of a name.

        Raises:
            ModelNotFound: there is none; names those there are.
        """
        found = self.models.get(name)
        if found is not None:
            return found
        known = [f"/{model}" for model in self.models]
        there_are = f"there are {', '.join(known)}"
        if not name:
            raise ModelNotFound(f"this URL names no model: {there_are}; append one of them")
        raise ModelNotFound(f"no model '/{name}': {there_are}{did_you_mean(f'/{name}', known)}")
