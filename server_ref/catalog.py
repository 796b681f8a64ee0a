"""Which models are served, in which versions, and which of them a request means.

It knows no sockets, and loads nothing. Everything changes on the loop's thread only, so there is no lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

from remote_ops.errors import ModelNotFound
from remote_ops.signature import did_you_mean
from server_ref.model import Version

__all__ = ["Catalog", "Model"]


class Model:
    """One model: its versions by name, the newest last."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.versions: dict[str, Version] = {}

    def version(self, asked: str = "", *, key: str = "") -> Version:
        """The version that a request means: the one it asks for, else the newest.

        Args:
            asked: a version; empty where the request leaves the choice to us.
            key: what requests of one user have in common.

        Raises:
            ModelNotFound: there is no such version.
        """
        if not asked:
            return next(reversed(self.versions.values()))
        if asked in self.versions:
            return self.versions[asked]
        known = [version for version in self.versions if version]
        there_is = f"there is {', '.join(map(repr, known))}" if known else "it has no versions"
        raise ModelNotFound(f"no version '{asked}' of model '{self.name}': {there_is}")


class Catalog:
    """The models of a server, by name.

    Args:
        models: name -> the versions that are served from the start.
    """

    def __init__(self, models: Mapping[str, Version]) -> None:
        self.models: dict[str, Model] = {}
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

    def add(self, name: str, version: Version) -> Version | None:
        """Serve a version from now on; gives the one that it replaces, which its caller stops when it is done."""
        model = self.models.setdefault(name, Model(name))
        before = model.versions.pop(version.version, None)
        model.versions[version.version] = version
        if self._loop is not None:
            version.start(self._loop)
        return before

    def remove(self, name: str, version: str) -> Version:
        """Serve a version no more; gives it, and its caller stops it when it is done."""
        model = self.models[name]
        removed = model.versions.pop(version)
        if not model.versions:
            del self.models[name]
        return removed

    def find(self, path: str) -> tuple[Model, str]:
        """The model that a path names, `/<model>` or `/<model>/<version>`, and the version, if it names one.

        One model answers any path.

        Raises:
            ModelNotFound: no such model; names those there are.
        """
        if self.only is not None:
            return self.only, ""
        name, _, version = path.strip("/").partition("/")
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
