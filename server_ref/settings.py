"""`model.yaml`: what may be said of a served model, or of one version of it, and every fault of the writing at once.

It reads and checks; what the settings do is for those who are given them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ensemble.document import Written, read_yaml
from ensemble.faults import Fault, FaultList, Faults, Path, meant
from ensemble.wording import field_names, models_in, near, path_of, shown, worded
from remote_ops.errors import SpecError

__all__ = [
    "Batching",
    "Cache",
    "Instances",
    "Limits",
    "ModelSettings",
    "Options",
    "Queue",
    "SettingsFaults",
    "Versions",
    "Warmup",
    "json_schema",
    "parse_settings",
    "read_settings",
    "schema_text",
]

MIB = 1 << 20

# --------------------------------------------------------------------------- values as they are written


class _Wrong(NamedTuple):
    """What is wrong with a part whose keys are each right: the code, the text, and the key that it stands at."""

    code: str
    text: str
    at: tuple[str | int, ...]


_Part = TypeVar("_Part", bound="_Model")


class _Model(BaseModel):
    """A part of the file: frozen, and a key that it does not know is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def _wrongs(self) -> Iterator[_Wrong]:
        """What is wrong with its keys together."""
        return iter(())

    @model_validator(mode="after")
    def _check(self: _Part) -> _Part:
        if wrongs := list(self._wrongs()):
            text = "; ".join(f"'{'.'.join(map(str, at))}': {text}" for _, text, at in wrongs)
            raise PydanticCustomError("together", "{text}", {"text": text, "wrongs": wrongs})
        return self


def _device(value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        return value
    raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {value!r}{near(value, ('auto', 'cpu', 'cuda'))}")


def _version(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and not re.fullmatch(r"[\w+-][\w.+-]{,127}", value, re.ASCII):
        raise ValueError(f"expected a version such as 3 or 2024-05, got {value!r}")
    return value


def _version_key(value: str) -> str:
    return str(_version(value))


def _label(value: str) -> str:
    if re.fullmatch(r"[A-Za-z_][\w.-]*", value, re.ASCII):
        return value
    raise ValueError(f"expected a label that begins with a letter, such as stable, got {value!r}")


def _header(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", value):
        return value
    raise ValueError(f"expected the name of a header such as X-User, or none, got {value!r}")


_FILLS = ("zeros", "ones", "random")


def _fill(value: str) -> str:
    if value in _FILLS or value.endswith(".npy"):
        return value
    raise ValueError(f"expected {', '.join(_FILLS)} or the path of a .npy file, got {value!r}{near(value, _FILLS)}")


def _rising(values: tuple[int, ...]) -> tuple[int, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError(f"expected numbers that rise, got {list(values)}")
    return values


Device: TypeAlias = Annotated[str, AfterValidator(_device)]
Version: TypeAlias = Annotated[str, BeforeValidator(_version, json_schema_input_type=str | int)]
VersionKey: TypeAlias = Annotated[str, AfterValidator(_version_key)]
Label: TypeAlias = Annotated[str, AfterValidator(_label)]
Fill: TypeAlias = Annotated[str, AfterValidator(_fill)]
Rows: TypeAlias = Annotated[int, Field(ge=1, le=65_536)]
RisingRows: TypeAlias = Annotated[tuple[Rows, ...], AfterValidator(_rising)]
MiB: TypeAlias = Annotated[float, Field(gt=0, le=1 << 30, allow_inf_nan=False)]
SomeMs: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SomeS: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# --------------------------------------------------------------------------- what may be written


class Options(_Model):
    """What `remote_ops.load` is given beside the path and the device; each is for some kinds of model only."""

    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """Of a model file: 64 hex digits that it must have."""
    threads: int | None = Field(default=None, ge=1)
    """Of ONNX files: threads of one run. Of graphs: models that run at a time."""
    profile: str | None = None
    """Of ONNX files: where onnxruntime writes its profile."""
    dtype: str | None = None
    """Of torch models: what they compute in, such as `bfloat16`."""
    compile: bool | None = None
    """Of torch models: whether they are compiled before the first request."""
    weights: str | None = None
    """Of torch modules: a file of weights, beside this file unless its path is absolute."""
    signature: str | None = None
    """Of SavedModels: which signature; `serving_default` unless said."""
    inputs: tuple[str, ...] | str | None = None
    """Of torch models: what they take, such as `x: float32 [-1, 3]`. Of frozen graphs: the names of the tensors."""
    outputs: tuple[str, ...] | str | None = None
    """The same of what they give."""
    timeout_s: SomeS | None = None
    """Of graphs: seconds that a run may take."""

    def given(self) -> dict[str, Any]:
        """Those that are said, by name, for `load`."""
        return self.model_dump(exclude_unset=True)


class Instances(_Model):
    """How many copies of the model run, and where."""

    count: int = Field(default=1, ge=1, le=64)
    """Copies on each device, 1 to 64."""
    devices: tuple[Device, ...] = Field(default=("auto",), min_length=1)
    """Where: `auto`, `cpu`, `cuda` or `cuda:N`."""

    def _wrongs(self) -> Iterator[_Wrong]:
        for index, device in enumerate(self.devices):
            if device in self.devices[:index]:
                text = f"'{device}' is named twice: raise 'count' to have more copies on each device"
                yield _Wrong("E102", text, ("devices", index))


class Batching(_Model):
    """Requests that wait while the instances are busy are served together."""

    max_rows: Rows = 64
    """Most rows of one batch."""
    max_delay_ms: Annotated[float, Field(ge=0, le=60_000, allow_inf_nan=False)] = 0.0
    """How long a request waits for others while an instance is free; 0 unless said: not at all."""
    preferred_rows: RisingRows = ()
    """Sizes at which a batch is closed before its time, in rising order."""
    allowed_rows: RisingRows = ()
    """The only sizes that the model sees, in rising order: a batch is padded to the next; the last is `max_rows`."""
    priorities: int = Field(default=1, ge=1, le=16)
    """Levels of priority; 1 is the first to be served."""
    default_priority: int | None = Field(default=None, ge=1, le=16)
    """The level of requests that name none; the last unless said."""

    def _wrongs(self) -> Iterator[_Wrong]:
        if self.preferred_rows and self.preferred_rows[-1] > self.max_rows:
            text = f"expected {self.max_rows} (max_rows) or less, got {self.preferred_rows[-1]}"
            yield _Wrong("E101", text, ("preferred_rows", len(self.preferred_rows) - 1))
        if self.allowed_rows and self.allowed_rows[-1] != self.max_rows:
            text = f"expected the last to be max_rows, which is {self.max_rows}, got {self.allowed_rows[-1]}"
            yield _Wrong("E101", text, ("allowed_rows", len(self.allowed_rows) - 1))
        if self.default_priority is not None and self.default_priority > self.priorities:
            text = f"expected {self.priorities} (priorities) or less, got {self.default_priority}"
            yield _Wrong("E101", text, ("default_priority",))

    @property
    def usual_priority(self) -> int:
        """The level of requests that name none."""
        return self.priorities if self.default_priority is None else self.default_priority


class Queue(_Model):
    """How much may wait; what is beyond it is refused at once."""

    max_requests: int = Field(default=1024, ge=1)
    """Requests that may wait."""
    max_mb: MiB = 1024.0
    """MiB of inputs that may wait."""
    timeout_ms: SomeMs | None = None
    """How long a request may wait before it is refused; as long as its own deadline unless said."""

    @property
    def max_bytes(self) -> int:
        """Bytes of inputs that may wait."""
        return int(self.max_mb * MIB)


class Cache(_Model):
    """Rows that were computed once are answered without the model."""

    max_mb: MiB = 256.0
    """MiB that are kept, 1 or more on disk; in memory the least recently used go first, on disk the oldest."""
    ttl_s: SomeS | None = None
    """Seconds that a row is kept; for good unless said."""
    path: str | None = Field(default=None, min_length=1)
    """A folder to keep them in on disk, beside this file unless it is absolute; in memory unless said."""
    by_row: bool | None = None
    """Whether each row is kept by itself; `false` where those of a request depend on each other."""

    @property
    def max_bytes(self) -> int:
        """Bytes that are kept."""
        return int(self.max_mb * MIB)


class Warmup(_Model):
    """What the model is run with before it counts as ready."""

    rows: tuple[Rows, ...] = Field(default=(1,), min_length=1)
    """The sizes of batch that it is run with."""
    inputs: dict[str, Fill] = Field(default={})
    """By name, what an input is filled with: `zeros`, `ones`, `random` or a .npy file; zeros unless said."""


class Limits(_Model):
    """How large one request may be, and how long it may take."""

    max_body_mb: MiB | None = None
    """MiB of one request's body; what the server allows unless said."""
    response_timeout_s: SomeS | None = None
    """Seconds that one run may take before its instance counts as hung."""

    @property
    def max_body_bytes(self) -> int | None:
        """Bytes of one request's body."""
        return None if self.max_body_mb is None else int(self.max_body_mb * MIB)


class Versions(_Model):
    """Which versions are served, and which of them a request gets that names none."""

    policy: Literal["latest", "all", "specific"] = "latest"
    """Which are served: the latest ones (`count`), all that are there, or those in `versions`."""
    count: int = Field(default=1, ge=1, le=64)
    """With `latest`: how many; those that a label, a weight or `mirror` names are served besides."""
    versions: tuple[Version, ...] = ()
    """With `specific`: which."""
    labels: dict[Label, Version] = Field(default={})
    """Names for versions, such as `stable: 1`."""
    weights: dict[VersionKey, Weight] = Field(default={})
    """How requests that name no version are split, by version; the latest gets all unless said."""
    sticky: Annotated[str, AfterValidator(_header)] = "none"
    """The header whose value decides, so that a caller stays with a version; `none`: each request by itself."""
    mirror: Version | None = None
    """A version that gets a copy of each request that names none; its answers are dropped."""

    @property
    def named(self) -> frozenset[str]:
        """The versions that a label, a weight or `mirror` names."""
        return frozenset(version for _, version in self._references())

    def _references(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from ((("labels", label), version) for label, version in self.labels.items())
        yield from ((("weights", version), version) for version in self.weights)
        if self.mirror is not None:
            yield ("mirror",), self.mirror

    def _wrongs(self) -> Iterator[_Wrong]:
        is_specific = self.policy == "specific"
        if is_specific != bool(self.versions):
            text = f"with 'policy: {self.policy}', expected {'one version or more' if is_specific else 'none'}"
            yield _Wrong("E101", f"{text}, got {list(self.versions) or 'none'}", ("versions",))
        if self.policy != "latest" and "count" in self.model_fields_set:
            yield _Wrong("E101", f"is for 'policy: latest', and the policy is {self.policy}", ("count",))
        for index, version in enumerate(self.versions):
            if version in self.versions[:index]:
                yield _Wrong("E102", f"version '{version}' is named twice", ("versions", index))
        if self.weights and not any(self.weights.values()):
            yield _Wrong("E101", "expected one weight or more that is not 0", ("weights",))
        for at, version in self._references():
            if self.versions and version not in self.versions:
                yield _Wrong("E103", f"no version '{version}' is served{meant(version, self.versions)}", at)


_OF_A_MODEL = ("versions", "swap")
_ON_IF_SAID = ("batching", "cache", "warmup")


class ModelSettings(_Model):
    """What `model.yaml` says; all of it may be left out.

    The file of a version holds for that version: a key that it has replaces the same key of the model's file as a
    whole.
    """

    file: str | None = Field(default=None, min_length=1)
    """Which file or folder beside this one is the model; needed only where there are several."""
    options: Options = Options()
    """How it is opened."""
    instances: Instances = Instances()
    """How many copies of it run, and where."""
    isolate: Literal["none", "process"] = "none"
    """Whether its instances run in processes of their own, which may crash alone."""
    batching: Batching | None = None
    """Serve requests together; not unless said, and `{}` is enough."""
    queue: Queue = Queue()
    """How much may wait."""
    cache: Cache | None = None
    """Answer rows that were computed before; not unless said, and `{}` is enough."""
    warmup: Warmup | None = None
    """Run the model before it counts as ready; not unless said, and `{}` is enough."""
    limits: Limits = Limits()
    """How large and how long one request may be."""
    versions: Versions = Versions()
    """Which versions are served, and who gets which; in the file of a model, not of a version."""
    swap: Literal["overlap", "replace"] = "overlap"
    """When a file has changed: open the new one first, or close the old one first and save memory."""

    def over(self, model: ModelSettings) -> ModelSettings:
        """Give the settings of a version: what its own file says, else what the file of the `model` says."""
        own = {key: getattr(self, key) for key in self.model_fields_set}
        return model.model_copy(update=own)


# --------------------------------------------------------------------------- reading


class SettingsFaults(Faults):
    """A `model.yaml` that is not valid; `.faults` has every fault, in the order of the file."""


def read_settings(path: str | PathLike[str], *, of_version: bool = False) -> ModelSettings:
    """Read a file of settings.

    Args:
        path: a `model.yaml`.
        of_version: whether it is that of a version, which says nothing of versions.

    Raises:
        SettingsFaults: it is not of the format; has all the faults, each with its place and what to do.
        SpecError: there is no such file, or it is no text.
    """
    try:
        text = FilePath(path).read_text("utf-8")
    except OSError as error:
        raise SpecError(f"cannot read the settings: {error.strerror or error}", path=str(path)) from error
    except UnicodeDecodeError as error:
        raise SpecError(f"the settings are no text in UTF-8: byte {error.start}", path=str(path)) from error
    return parse_settings(text, str(path), of_version=of_version)


def parse_settings(text: str, file: str = "model.yaml", *, of_version: bool = False) -> ModelSettings:
    """Read settings from YAML; `file` is what places call it, and an empty one says nothing.

    Raises:
        SettingsFaults: it is not of the format; has all the faults, each with its place and what to do.

    Costs less than a millisecond.
    """
    written = read_yaml(text, file, may_be_empty=True)
    faults = FaultList(file, written.places)
    faults.all += written.faults
    settings = ModelSettings()
    if not written.faults or isinstance(written.value, dict):
        settings = _Reading(written, faults, of_version).settings()
    if faults.errors:
        raise SettingsFaults(faults.all)
    return settings


class _Reading:
    """One file on its way from values to settings: what has faults is taken out until the rest is valid."""

    def __init__(self, written: Written, faults: FaultList, of_version: bool) -> None:
        self.value = {} if written.value is None else written.value
        self.keys = written.keys
        self.faults = faults
        self.of_version = of_version
        self.harmed: set[str | int] = set()

    def settings(self) -> ModelSettings:
        if not isinstance(self.value, dict):
            self.faults.add("E101", (), f"the settings: expected a mapping of keys, got {shown(self.value)}")
            return ModelSettings()
        for fault in self.faults.all:
            self._cut(fault.path)
        self._refuse_keys()
        while True:  # what a part finds as a whole shows once its keys are valid
            try:
                return ModelSettings.model_validate_json(json.dumps(self.value), strict=True)
            except ValidationError as error:
                for path in list(self._note_all(error)):
                    self._cut(path)

    def _cut(self, path: Path) -> None:
        """Take out the key that a path is in."""
        self.harmed.update(path[:1])
        self.value = _without(self.value, tuple(itertools.takewhile(lambda step: isinstance(step, str), path)))

    def _refuse_keys(self) -> None:
        for key in _OF_A_MODEL if self.of_version else ():
            self._refuse(key in self.value, key, "is for the file of the model, one folder up: this is a version's")
        for key in _ON_IF_SAID:  # with nothing behind it, it may be meant to be on, or to be off
            is_bare = self.value.get(key, ...) is None
            self._refuse(is_bare, key, "expected a mapping, got nothing; write {} to have it as usual, or no such key")

    def _refuse(self, wrong: bool, key: str, text: str) -> None:
        if wrong:
            self._note("E101", (key,), f"'{key}': {text}")
            self._cut((key,))

    def _note(self, code: str, path: Path, text: str) -> None:
        self.faults.all.append(Fault(code, self.keys.get(path, self.faults.place(path)), path, text))

    def _note_all(self, error: ValidationError) -> Iterator[Path]:
        """Note what pydantic found, one fault for each place; the paths that they make unusable."""
        found: dict[Path, list[Any]] = {}
        for one in error.errors(include_url=False):
            found.setdefault(path_of(one["loc"], self.value, lacking=False), []).append(one)
        above = {path[:length] for path in found for length in range(len(path))}
        for path, errors in found.items():
            if path in above:
                continue  # another way of a union that was not meant
            first = errors[0]
            if first["type"] == "extra_forbidden":
                self._note("E101", path, _unknown(path))
            elif first["type"] == "together":
                self._note_together(path, first["ctx"]["wrongs"])
            elif first["loc"][-1] == "[key]":
                self._note(*_worded_key(path, errors))
            else:
                code, text = worded(_called(path), errors)
                self.faults.add(code, path, text)
            yield path

    def _note_together(self, path: Path, wrongs: list[_Wrong]) -> None:
        if path[0] in self.harmed:
            return  # it may only seem so, for want of the keys that were taken out
        for code, text, at in wrongs:
            self.faults.add(code, (*path, *at), f"{_called((*path, *at))}: {text}")


def _worded_key(path: Path, errors: list[Any]) -> tuple[str, Path, str]:
    code, text = worded(_called(path[:-1]), errors)
    return code, path, text


def _called(path: Path) -> str:
    return f"'{'.'.join(map(str, path))}'" if path else "the settings"


def _unknown(path: Path) -> str:
    """What to say of a key that there is not: what was meant, or where it belongs."""
    *above, key = path
    known = sorted(field_names(_model_at(tuple(above))))
    hint = meant(str(key), known)
    elsewhere = [] if hint.startswith(";") else list(_homes(str(key)))
    hint = f"; did you mean '{'.'.join(elsewhere[0])}'?" if elsewhere else hint
    owner = "the settings have" if not above else f"{_called(tuple(above))} has"
    return f"{owner} no key '{key}'{hint}"


def _model_at(path: Path) -> type[BaseModel]:
    model: type[BaseModel] = ModelSettings
    for step in path:
        model = models_in(model.model_fields[str(step)].annotation)[0]
    return model


def _homes(key: str) -> Iterator[tuple[str, ...]]:
    """Where a key is known that was written elsewhere."""
    if key in ModelSettings.model_fields:
        yield (key,)
    for name, field in ModelSettings.model_fields.items():
        yield from ((name, key) for part in models_in(field.annotation) if key in part.model_fields)


def _without(value: Any, path: Path) -> Any:
    """The value without the key at a path; without any where the path is empty."""
    if not path:
        return {}
    if not isinstance(value, dict) or path[0] not in value:
        return value
    if len(path) == 1:
        return {key: one for key, one in value.items() if key != path[0]}
    return {**value, path[0]: _without(value[path[0]], path[1:])}


# --------------------------------------------------------------------------- JSON Schema


def json_schema() -> dict[str, Any]:
    """Give the JSON Schema of `model.yaml`, for editors that complete and check as one writes."""
    schema = ModelSettings.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "model.yaml"}


def schema_text() -> str:
    """Give the JSON Schema as `server_ref/model.schema.json` has it."""
    return json.dumps(json_schema(), indent=2) + "\n"
