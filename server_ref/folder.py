"""A folder of models: what lies in it, what has changed since, and when a change may be trusted.

It reads names, sizes and times of files, and the YAML; it opens no model, and waits for nothing.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ensemble.document import read_yaml
from remote_ops.errors import SpecError
from remote_ops.servable import MODEL_FILES, SAVED_MODEL, about_archives
from remote_ops.signature import did_you_mean
from server_ref.settings import ModelSettings, read_settings

__all__ = ["Changes", "Found", "Key", "Scan", "Settling", "Trouble", "changes", "scan"]

Key: TypeAlias = "tuple[str, str]"  # the name of a model, and its version

SETTINGS = "model.yaml"
ONLY_VERSION = "1"  # of a model without folders of versions
_GRAPHS = (".yaml", ".yml")
_SUPPORTED = (
    f"a file ending in {', '.join(MODEL_FILES)}, a graph (.yaml with 'nodes:') or a folder with a {SAVED_MODEL}"
)
_VERSION = re.compile(r"[\w+-][\w.+-]{,127}", re.ASCII)
_DEEPEST = 32
_MOST_SHOWN = 8

# --------------------------------------------------------------------------- what is seen


@dataclass(frozen=True)
class Found:
    """One version of a model in the folder.

    Args:
        name, version: what it is called; `1` where the model has no folders of versions.
        path: what `remote_ops.load` opens: a file, or the folder of a SavedModel.
        settings: those of its own `model.yaml`, else of its model's; the paths in them are absolute.
        fingerprint: of the path, size, time of change and inode of each of its files, `model.yaml` left out: two that
            differ in their settings alone are one model, which need not be opened again.
    """

    name: str
    version: str
    path: Path
    settings: ModelSettings
    fingerprint: str

    @property
    def key(self) -> Key:
        """Its name and version."""
        return self.name, self.version


class Trouble(NamedTuple):
    """What is wrong with a version of a model, with all of a model (None), or with the folder (no name either)."""

    name: str
    version: str | None
    error: SpecError


@dataclass(frozen=True)
class Scan:
    """What was seen at one time.

    Args:
        found: what can be served.
        troubles: what cannot, and why.
        unfinished: what is still being written: the file that tells, by name and version (None: all of the model).
        ignored: names of files beside the models that are none.
    """

    found: Mapping[Key, Found] = field(default_factory=dict)
    troubles: tuple[Trouble, ...] = ()
    unfinished: Mapping[tuple[str, str | None], str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def is_sure_of(self, key: Key) -> bool:
        """Whether what it says of a version can be trusted: nothing is wrong with it, or being written."""
        name, version = key
        unsure = {(trouble.name, trouble.version) for trouble in self.troubles} | set(self.unfinished)
        return unsure.isdisjoint({("", None), (name, None), (name, version)})

    def raise_if_any(self) -> None:
        """Raise what is wrong, all of it at once, if anything is.

        Raises:
            SpecError: has a line for each trouble.
        """
        if len(self.troubles) == 1:
            raise self.troubles[0].error
        if self.troubles:
            lines = "\n".join(str(trouble.error) for trouble in self.troubles)
            raise SpecError(f"{len(self.troubles)} faults in the folder of models\n{lines}")


# --------------------------------------------------------------------------- what has changed


class Changes(NamedTuple):
    """What differs between two times: the keys of `before` that are gone, those that are new, those that differ."""

    added: tuple[Key, ...]
    changed: tuple[Key, ...]
    removed: tuple[Key, ...]


def changes(before: Mapping[Key, Found], after: Mapping[Key, Found]) -> Changes:
    """Compare what was found at two times, in the order of the keys; a change of settings is a change."""
    return Changes(
        tuple(sorted(after.keys() - before.keys())),
        tuple(sorted(key for key in before.keys() & after.keys() if before[key] != after[key])),
        tuple(sorted(before.keys() - after.keys())),
    )


class Settling:
    """Believes what scans say only once it has been the same for a while: a copy in progress is no model.

    Constant: `settle_s`. Changing: `counted`, and what is being waited for. For one thread.

    Args:
        settle_s: how long a change must have stayed as it is; two scans in a row have to agree in any case.
        counted: what is believed from the start.
    """

    def __init__(self, settle_s: float, counted: Mapping[Key, Found] | None = None) -> None:
        self.settle_s = settle_s
        self.counted: dict[Key, Found] = dict(counted or {})
        self._waiting: dict[Key, tuple[Found | None, float]] = {}

    def seen(self, scan: Scan, now: float) -> Mapping[Key, Found]:
        """Take note of a scan, and give what counts now; what is in trouble or being written counts as before.

        Args:
            scan: what was seen.
            now: when, in seconds of any clock that never goes back.
        """
        for key in {*self.counted, *self._waiting, *scan.found}:
            if scan.is_sure_of(key):
                self._see(key, scan.found.get(key), now)
            else:
                self._waiting.pop(key, None)
        return dict(self.counted)

    @property
    def waits(self) -> bool:
        """Whether a change was seen that does not count yet."""
        return bool(self._waiting)

    def _see(self, key: Key, found: Found | None, now: float) -> None:
        if found == self.counted.get(key):
            self._waiting.pop(key, None)
            return
        waiting, since = self._waiting.get(key, (None, now))
        if key not in self._waiting or waiting != found:
            self._waiting[key] = found, now
        elif now - since >= self.settle_s:
            del self._waiting[key]
            self._count(key, found)

    def _count(self, key: Key, found: Found | None) -> None:
        if found is None:
            del self.counted[key]
        else:
            self.counted[key] = found


# --------------------------------------------------------------------------- looking


def scan(root: str | PathLike[str], *, follow_links: bool = False) -> Scan:
    """Look at what lies in a folder of models.

    Args:
        root: the folder. In it: `NAME/VERSION/model.onnx`, `NAME/VERSION/` that is a SavedModel, `NAME/model.onnx`,
            `NAME.onnx`, or `NAME.yaml`, a graph, which in a folder of its own may have its models beside it; a
            `model.yaml` in the folder of a model or of a version. What begins with a dot, folders that begin with
            `_`, and what ends in `.tmp` or `.part` are no models.
        follow_links: whether symbolic links may lead out of the folder.

    Returns:
        What can be served, and what cannot and why; one bad model does not hide the others.

    Raises:
        SpecError: there is no such folder, or it is a SavedModel itself.

    Costs some `stat` for each file, 0.1 ms together, and reads each YAML once for each time that it changes.
    """
    folder = Path(root)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing"
        near = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = did_you_mean(folder.name, near)
        raise SpecError(f"cannot serve '{folder}': expected a folder of models, got {got}{hint}")
    if (folder / SAVED_MODEL).is_file():
        raise SpecError(f"cannot serve '{folder}' as a folder of models: it is a SavedModel itself; serve its parent")
    return _Looking(folder, follow_links).scan()


class _Unfinished(Exception):
    """Somebody is writing here still."""


class _Looking:
    """One look at a folder, which gathers what is found and what is wrong."""

    def __init__(self, root: Path, follow_links: bool) -> None:
        self.root = root
        self.follow_links = follow_links
        self.home = root.resolve()
        self.found: dict[Key, Found] = {}
        self.troubles: list[Trouble] = []
        self.unfinished: dict[tuple[str, str | None], str] = {}
        self.ignored: list[str] = []

    def scan(self) -> Scan:
        with self._noting("", None):
            for name, entries in self._models().items():
                with self._noting(name, None):
                    self._look_at(name, entries)
            if not (self.found or self.troubles or self.unfinished):
                got = f"got {_listed(self.ignored)}{about_archives(self.ignored)}" if self.ignored else "it is empty"
                raise SpecError(f"no model: expected folders of models, or {_SUPPORTED}; {got}", path=str(self.root))
        return Scan(self.found, tuple(self.troubles), self.unfinished, tuple(self.ignored))

    @contextmanager
    def _noting(self, name: str, version: str | None) -> Iterator[None]:
        """Take note of what goes wrong with one model or version, and go on with the others."""
        try:
            yield
        except _Unfinished as sign:
            self.unfinished[name, version] = str(sign)
        except FileNotFoundError as error:  # gone between two looks
            self.unfinished[name, version] = str(error.filename)
        except SpecError as error:
            self.troubles.append(Trouble(name, version, error))
        except OSError as error:
            reason = SpecError(f"cannot be read: {error.strerror or error}", path=str(error.filename or self.root))
            self.troubles.append(Trouble(name, version, reason))

    # models

    def _models(self) -> dict[str, list[Path]]:
        """Everything in the root that may be a model, by name."""
        found: dict[str, list[Path]] = {}
        entries = list(_entries(self.root))
        for entry in entries:
            name = entry.name if entry.is_dir() else entry.stem
            if entry.name == SETTINGS:
                text = "settings belong to a model: put them in its folder, with the model beside them"
                self.troubles.append(Trouble(entry.stem, None, SpecError(text, path=str(entry))))
            elif entry.is_dir() or _is_model_file(entry):
                found.setdefault(name, []).append(entry)
            elif not any(entry.name.startswith(other.name) for other in entries if other != entry):
                self.ignored.append(entry.name)
        return found

    def _look_at(self, name: str, entries: Sequence[Path]) -> None:
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name):
            raise SpecError(f"expected a name of plain text, got {name!r}; rename it", path=str(self.root))
        if len(entries) > 1:
            shown = " and ".join(f"'{entry.name}'" for entry in entries)
            raise SpecError(f"two models are called '{name}': {shown}; rename one of them", path=str(self.root))
        if entries[0].is_dir():
            self._look_into(name, entries[0])
        else:
            self._take(name, ONLY_VERSION, entries[0], ModelSettings(), self._beside(entries[0]))

    def _beside(self, path: Path) -> list[Path]:
        """A file, and those that go with it, such as `a.onnx.data` with `a.onnx`."""
        near = [entry for entry in _entries(path.parent) if entry.name.startswith(path.name) and not entry.is_dir()]
        for entry in near:
            self._check_link(entry)
        return near

    def _look_into(self, name: str, folder: Path) -> None:
        """The folder of a model: it holds the model itself, or folders of versions."""
        self._check_link(folder)
        settings = self._settings(folder, of_version=False)
        within = [entry for entry in _entries(folder) if entry.is_dir()]
        here = _candidates(folder, [entry for entry in _entries(folder) if entry.is_file()], settings)
        is_certain = bool(here) and (settings.file is not None or here == [folder])
        versions = [entry for entry in within if not is_certain and (not here or _holds_model(entry))]
        if here and versions:
            raise SpecError(
                f"model '{name}' has both a model, '{here[0].name}', and folders of versions, {_listed(versions)}: "
                "expected one of them; put it in the folder of a version",
                path=str(folder),
            )
        if here or not versions:
            self._take(name, ONLY_VERSION, None, settings, list(self._files(folder)), folder)
        for entry in versions:
            with self._noting(name, entry.name):
                self._look_at_version(name, entry, settings)

    def _look_at_version(self, name: str, folder: Path, settings: ModelSettings) -> None:
        self._check_link(folder)
        if not _VERSION.fullmatch(folder.name):
            raise SpecError(
                f"'{folder.name}' is no version of model '{name}': expected a number, or letters, digits and . _ + -",
                path=str(folder),
            )
        own = self._settings(folder, of_version=True).over(settings)
        self._take(name, folder.name, None, own, list(self._files(folder)), folder)

    def _take(
        self,
        name: str,
        version: str,
        path: Path | None,
        settings: ModelSettings,
        files: Iterable[Path],
        folder: Path | None = None,
    ) -> None:
        """Note a version that can be served; where it is a folder, find the model in it."""
        fingerprint = _fingerprint(files)
        if path is None:
            assert folder is not None
            path = self._model_in(folder, settings)
        self.found[name, version] = Found(name, version, path, settings, fingerprint)

    # one model

    def _model_in(self, folder: Path, settings: ModelSettings) -> Path:
        """What is to be opened in a folder that holds one model."""
        entries = list(_entries(folder))
        found = _candidates(folder, entries, settings)
        at = str(folder)
        if len(found) == 1:
            self._check_target(found[0])
            return found[0]
        names = [entry.name for entry in entries if entry.name != SETTINGS]
        if settings.file is not None:
            hint = did_you_mean(settings.file, names) or f"; got {_listed(names)}"
            raise SpecError(f"'file' says '{settings.file}': expected {_SUPPORTED} in this folder{hint}", path=at)
        if found:
            first = found[0].name
            raise SpecError(f"{_listed(found)}: expected one model; write 'file: {first}' in {SETTINGS}", path=at)
        if not names:
            raise SpecError(f"the folder of a model is empty: expected {_SUPPORTED}", path=at)
        raise SpecError(f"no model: expected {_SUPPORTED}, got {_listed(names)}{about_archives(names)}", path=at)

    def _settings(self, folder: Path, *, of_version: bool) -> ModelSettings:
        path = folder / SETTINGS
        if (folder / "model.yml").exists():
            raise SpecError(f"settings are called {SETTINGS}: rename it", path=str(folder / "model.yml"))
        if not path.is_file():
            return ModelSettings()
        self._check_link(path)
        return _anchored(_settings_at(path, _stamp(path), of_version), folder)

    def _files(self, folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
        """Every file below a folder, by name.

        Raises:
            _Unfinished: one of them says that it is being written.
            SpecError: a link that leads out of the root, or back up.
        """
        found = folder.stat()
        here = (found.st_dev, found.st_ino)
        if here in above or len(above) > _DEEPEST:
            raise SpecError(f"expected at most {_DEEPEST} folders in each other, and no link back up", path=str(folder))
        for entry in sorted(folder.iterdir()):
            if _is_unfinished(entry.name):
                raise _Unfinished(str(entry))
            if _is_hidden(entry):
                continue
            self._check_link(entry)
            if entry.is_dir():
                yield from self._files(entry, (*above, here))
            else:
                yield entry

    def _check_link(self, path: Path) -> None:
        if path.is_symlink():
            self._check_target(path)

    def _check_target(self, path: Path) -> None:
        if self.follow_links:
            return
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise SpecError(
                "a symbolic link that leads nowhere: expected one to a file or folder", path=str(path)
            ) from error
        if not target.is_relative_to(self.home):
            raise SpecError(
                f"a symbolic link that leads out of the folder, to {target}: expected one that stays in it; "
                "copy what it leads to, or allow such links",
                path=str(path),
            )


# --------------------------------------------------------------------------- files


def _is_unfinished(name: str) -> bool:
    return name.lower().endswith((".tmp", ".part"))


def _is_hidden(entry: Path) -> bool:
    return entry.name.startswith(".") or (entry.name.startswith("_") and entry.is_dir())


def _entries(folder: Path) -> Iterator[Path]:
    """What may count in a folder, by name."""
    for entry in sorted(folder.iterdir()):
        if not _is_hidden(entry) and not _is_unfinished(entry.name):
            yield entry


def _is_model_file(path: Path) -> bool:
    kind = path.suffix.lower()
    if kind in _GRAPHS:
        return path.name != SETTINGS and path.is_file() and _is_graph(path, _stamp(path))
    return kind in MODEL_FILES and (path.is_file() or path.is_symlink())


def _is_model(path: Path) -> bool:
    return (path / SAVED_MODEL).is_file() or _is_model_file(path)


def _candidates(folder: Path, entries: Sequence[Path], settings: ModelSettings) -> list[Path]:
    """What may be meant as the model of a folder: the file that the settings name, the folder itself, or some in it."""
    if settings.file is not None:
        named = Path(os.path.normpath(folder / settings.file))
        return [named] if named.is_relative_to(folder) and _is_model(named) else []
    if (folder / SAVED_MODEL).is_file():
        return [folder]
    found = [entry for entry in entries if _is_model(entry)]
    graphs = [entry for entry in found if entry.suffix.lower() in _GRAPHS]
    return graphs if len(graphs) == 1 else found  # the other models may well be its own


def _holds_model(folder: Path) -> bool:
    return bool(_candidates(folder, list(_entries(folder)), ModelSettings())) or (folder / SETTINGS).is_file()


Stamp: TypeAlias = "tuple[int, int, int]"


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


@lru_cache(maxsize=1024)
def _settings_at(path: Path, stamp: Stamp, of_version: bool) -> ModelSettings:
    """The settings in a file, read once for each `stamp` that it has had."""
    return read_settings(path, of_version=of_version)


@lru_cache(maxsize=1024)
def _is_graph(path: Path, stamp: Stamp) -> bool:
    """Whether a YAML is meant as a graph of models; one that is broken is, if a line of it looks so."""
    text = path.read_text("utf-8", errors="replace")
    value = read_yaml(text, str(path)).value
    return "nodes" in value if isinstance(value, dict) else re.search(r"(?m)^nodes\s*:", text) is not None


def _anchored(settings: ModelSettings, folder: Path) -> ModelSettings:
    """Settings whose paths no longer depend on where they are read from."""
    new: dict[str, object] = {}
    if settings.options.weights is not None:
        weights = str((folder / settings.options.weights).absolute())
        new["options"] = settings.options.model_copy(update={"weights": weights})
    if settings.cache is not None and settings.cache.path is not None:
        path = str((folder / settings.cache.path).absolute())
        new["cache"] = settings.cache.model_copy(update={"path": path})
    if settings.warmup is not None and settings.warmup.inputs:
        inputs = {
            name: str((folder / fill).absolute()) if fill.endswith(".npy") else fill
            for name, fill in settings.warmup.inputs.items()
        }
        new["warmup"] = settings.warmup.model_copy(update={"inputs": inputs})
    return settings.model_copy(update=new) if new else settings


def _fingerprint(files: Iterable[Path]) -> str:
    digest = blake2b(digest_size=16)
    for path in files:
        found = path.stat()
        if path.name != SETTINGS and stat.S_ISREG(found.st_mode):
            digest.update(
                f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ino}\0".encode("utf-8", "surrogatepass")
            )
    return digest.hexdigest()


def _listed(things: Sequence[Path] | Sequence[str]) -> str:
    names = [thing.name if isinstance(thing, Path) else thing for thing in things]
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(map(repr, names[:_MOST_SHOWN])) + more if names else "nothing"
