"""Follows a folder of models: what has come, changed or gone is loaded, swapped or let go.

It looks again and again, since no event tells of every kind of file system; `folder` says what counts. It runs on the
server's loop, and looks on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from ensemble.document import read_yaml
from remote_ops.errors import RemoteOpsError, SpecError
from server_ref.folder import Found, Key, Scan, Settling, changes, scan
from server_ref.repository import Repository
from server_ref.routing import missing_versions
from server_ref.source import Source

__all__ = ["Watch", "sources_in"]

log = logging.getLogger("server_ref")


def sources_in(seen: Scan, *, device: str = "auto") -> list[Source]:
    """What a look at a folder has found, as sources.

    Raises:
        SpecError: something in it cannot be served, or settings name versions that are not there; says all of it.
    """
    seen.raise_if_any()
    for name in {found.name for found in seen.found.values()}:
        versions = [found.version for found in seen.found.values() if found.name == name]
        settings = next(found.settings for found in seen.found.values() if found.name == name)
        if missing := missing_versions(versions, settings.versions):
            raise SpecError(
                f"the settings of model '{name}' name version {', '.join(missing)}: there are {', '.join(versions)}",
                path=f"{name}/model.yaml",
            )
    return [source_of(found, device) for found in sorted(seen.found.values(), key=is_graph)]  # what they need first


def source_of(found: Found, device: str) -> Source:
    """What was found as a source."""
    return Source(found.name, found.version, str(found.path), found.settings, found.fingerprint, device)


def is_graph(found: Found) -> bool:
    """Whether it is a graph of models, which may name models of its folder."""
    return found.path.suffix.lower() in (".yaml", ".yml")


def files_of(found: Found) -> Iterator[Path]:
    """The files that the nodes of a graph name, its own aside; none of what is no graph."""
    if not is_graph(found):
        return
    value = read_yaml(found.path.read_text("utf-8", errors="replace"), str(found.path)).value
    nodes = value.get("nodes") if isinstance(value, dict) else None
    for node in nodes.values() if isinstance(nodes, dict) else ():
        named = node.get("path") if isinstance(node, dict) else None
        if isinstance(named, str):
            yield Path(os.path.normpath(found.path.parent / named))


class Watch:
    """Keeps a repository as its folder is.

    Args:
        folder: the folder.
        repository: what is told of changes.
        counted: what of it is served already.
        every_s: seconds between two looks; a change counts once two looks in a row agree on it.
        device: where models run, unless their settings say.
    """

    def __init__(
        self,
        folder: Path,
        repository: Repository,
        counted: Mapping[Key, Found],
        *,
        every_s: float = 2.0,
        device: str = "auto",
    ) -> None:
        self.folder = folder
        self.repository = repository
        self.every_s = every_s
        self.device = device
        self._settling = Settling(every_s * 0.9, counted)
        self._troubles: set[str] = set()

    async def run(self) -> None:
        """Look again and again, until it is cancelled."""
        while True:
            await asyncio.sleep(self.every_s)
            with contextlib.suppress(SpecError):  # the folder is gone for a moment
                await self.look()

    async def look(self) -> None:
        """Look once, and bring about what has changed since; one model that fails does not hold up the others."""
        seen = await asyncio.get_running_loop().run_in_executor(None, scan, self.folder)
        self._tell(seen)
        before = dict(self._settling.counted)
        after = self._settling.seen(seen, time.monotonic())
        changed = {key for keys in changes(before, after) for key in keys}
        needing = {key for key, found in after.items() if key not in changed and _needs(found, changed, after)}
        for name in sorted({key[0] for key in changed}) + sorted({key[0] for key in needing}):
            await self._follow(name, before, after, anew=needing)

    def _tell(self, seen: Scan) -> None:
        troubles = {str(trouble.error) for trouble in seen.troubles}
        for trouble in sorted(troubles - self._troubles):
            log.error("in %s: %s", self.folder, trouble)
        self._troubles = troubles

    async def _follow(
        self, name: str, before: Mapping[Key, Found], after: Mapping[Key, Found], *, anew: Collection[Key]
    ) -> None:
        there = {key: found for key, found in after.items() if key[0] == name}
        gone = [key for key in before if key[0] == name and key not in after]
        changed = {key[1] for key, found in there.items() if before.get(key) != found or key in anew}
        sources = [source_of(found, self.device) for found in there.values()]
        try:
            await self.repository.follow(name, sources, anew=changed, gone=[key[1] for key in gone])
        except RemoteOpsError as error:
            log.error("model %r: %s", name, error)


def _needs(found: Found, changed: Collection[Key], after: Mapping[Key, Found]) -> bool:
    """Whether a graph names a file of a model that has changed or come."""
    paths = [after[key].path for key in changed if key in after]
    return any(file.is_relative_to(path) for file in files_of(found) for path in paths)
