"""The kinds of node that are a servable: `remote`, `onnx`, `torch`, `tf`, `python` and `graph`.

A kind only says how its servable is got; what flows in and out is the affair of all of them alike. Nothing is run here,
and an endpoint is opened without asking it anything.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ensemble.breaker import Guarded
from ensemble.faults import Path, meant
from ensemble.forms import UNKNOWN, Form
from ensemble.nodes.function import modules_in, open_function
from ensemble.nodes.node import EdgeAt, Inputs, Model, NodeSpec, Scope, Seconds, Share, TensorText
from ensemble.steps import ModelStep
from remote_ops.client import Endpoint
from remote_ops.errors import SpecError
from remote_ops.policy import Breaker, Hedge, Retry
from remote_ops.servable import Servable, load
from remote_ops.signature import DTYPES, Signature, TensorSpec
from remote_ops.url import TLS

__all__ = [
    "GraphSpec",
    "OnnxSpec",
    "PythonSpec",
    "RemoteSpec",
    "ServableSpec",
    "TfSpec",
    "TorchSpec",
    "identity",
    "open_servable",
]

_FLOATS_FROM_FLOAT32 = ("bfloat16", "float8")  # a servable takes float32 in their place


class ServableSpec(NodeSpec):
    """A node that is a servable."""

    inputs: Inputs | None = None
    """Where its inputs come from: by the model's names, or a list in its order; none for an owned node."""

    MODEL: ClassVar[Literal["local", "remote"] | None] = "local"
    OPENED_BY: ClassVar[tuple[str, ...]] = ()
    PLACE: ClassVar[str] = "thread"

    def open(self, file: str) -> Servable:
        """Get the servable; relative paths are relative to `file`."""
        raise NotImplementedError

    @property
    def what(self) -> str:
        """What the model is called in messages: its path, URL or name."""
        raise NotImplementedError

    @property
    def connected(self) -> tuple[str, ...] | int:
        """The names of the inputs that its servable is made for, or how many; of no matter to most kinds."""
        return 0

    @property
    def place(self) -> str:
        """Where it runs, as `ModelStep` says."""
        return self.PLACE

    @property
    def sent(self) -> bytes:
        """The `config` that goes with every call."""
        return b""

    @property
    def writes(self) -> bool | None:
        """Whether it writes into its inputs, as `ModelStep` says; None for models, which do not."""
        return None

    def edges(self) -> Iterator[EdgeAt]:
        """Every edge into this node."""
        named = self.inputs.items() if isinstance(self.inputs, dict) else enumerate(self.inputs or ())
        return (EdgeAt(name, edge, ("inputs", name)) for name, edge in named)

    def forms(self, inputs: Mapping[str | int, Form], scope: Scope) -> Mapping[str, Form]:
        """What comes out, by our names, given what goes in.

        Where the servable cannot be asked, what the outputs are declared to be.
        """
        servable = scope.servable(self)
        if servable is None:
            return {name: _declared(text) for name, text in (self.outputs or {}).items()}
        check = _Check(self, servable.signature, scope)
        check.inputs(inputs)
        return check.outputs()

    def step(self, scope: Scope) -> ModelStep:
        """The servable, and how our output names become its own."""
        servable = scope.servable(self)
        renames: Mapping[str, str] = {}
        if servable is None:  # it could not be asked, which was no fault; it may answer by the time of a run
            servable = open_servable(self, scope.file)
            renames = {name: text for name, text in (self.outputs or {}).items() if isinstance(text, str)}
        elif self.outputs is not None:
            renames = _renames(self.outputs, servable.signature)
        differing = {ours: theirs for ours, theirs in renames.items() if ours != theirs}
        return ModelStep(servable, differing, self.place, self.sent, self.writes)


def open_servable(spec: NodeSpec, file: str) -> Servable:
    """Open what a node is: a file is read, a module imported, an endpoint made but not asked.

    Args:
        spec: a node of one of the kinds here.
        file: the YAML file; relative paths are relative to its folder.

    Raises:
        SpecError: it is not there, is no such model, or an argument does not fit.
        TransportError: a download failed.
        ImportError: the framework that it needs is not installed.
    """
    if not isinstance(spec, ServableSpec):
        raise SpecError(f"a node of kind '{spec.kind}' is no servable", path="kind")
    return spec.open(file)


def identity(spec: NodeSpec, file: str = "") -> Hashable:
    """What two nodes have in common exactly if one servable serves both; `file` is the YAML file that they are in."""
    if not isinstance(spec, ServableSpec):
        raise SpecError(f"a node of kind '{spec.kind}' is no servable", path="kind")
    folder = str(FilePath(file).resolve().parent) if file else ""
    return folder, spec.kind, spec.model_dump_json(include=set(spec.OPENED_BY)), spec.connected


def _declared(text: str | TensorText) -> Form:
    return text.form if isinstance(text, TensorText) else UNKNOWN


# --------------------------------------------------------------------------- what goes in and out


class _Check:
    """Holds a node against the signature of its model, and notes what does not fit."""

    def __init__(self, spec: ServableSpec, signature: Signature, scope: Scope) -> None:
        self.spec = spec
        self.signature = signature
        self.scope = scope
        self.node = str(scope.path[-1]) if scope.path else spec.kind
        self.edges = {edge.name: edge for edge in spec.edges()}
        self.misspelt: set[str] = set()  # inputs that were meant by a name that is not there

    def inputs(self, given: Mapping[str | int, Form]) -> None:
        """Whether every input of the model is fed, and by what fits."""
        known = {spec.name: spec for spec in self.signature.inputs}
        fed = set()
        for name, form in given.items():
            bound = self._bound(name, list(known.values()), len(given))
            if bound is not None:
                fed.add(bound.name)
                self._fit(name, bound, form)
        for spec in [spec for name, spec in known.items() if name not in fed | self.misspelt]:
            self._note("E105", ("inputs",), f"node '{self.node}' lacks input '{spec.name}': {self._whose} takes {spec}")

    def outputs(self) -> dict[str, Form]:
        """What comes out by our names: as the model says, and as is declared."""
        theirs = {spec.name: spec for spec in self.signature.outputs}
        if self.spec.outputs is None:
            return {name: Form.of(spec) for name, spec in theirs.items()}
        renames = _renames(self.spec.outputs, self.signature)
        found = {}
        for ours, text in self.spec.outputs.items():
            spec = theirs.get(renames[ours])
            if spec is None:
                what = f"output '{ours}' of '{self.node}' is '{renames[ours]}'"
                self._note(
                    "E103", ("outputs", ours), f"{what}, which {self._whose} lacks{meant(renames[ours], theirs)}"
                )
            found[ours] = _declared(text) if spec is None else self._agreed(ours, text, spec)
        return found

    @property
    def _whose(self) -> str:
        return f"{self.spec.kind} '{self.spec.what}'"

    def _note(self, code: str, path: Path, text: str) -> None:
        self.scope.faults.add(code, (*self.scope.path, *path), text)

    def _path(self, name: str | int) -> Path:
        return self.edges[name].path if name in self.edges else ()

    def _bound(self, name: str | int, known: Sequence[TensorSpec], count: int) -> TensorSpec | None:
        """The input of the model that is meant by a name, or by a place in a list."""
        if isinstance(name, int):
            if name < len(known):
                return known[name]
            self._note_beyond(name, known, count)
            return None
        for spec in known:
            if spec.name == name:
                return spec
        names = [spec.name for spec in known]
        self.misspelt |= set(difflib.get_close_matches(name, names, 1))
        text = f"node '{self.node}': {self._whose} has no input '{name}'{meant(name, names)}"
        self._note("E105", self._path(name), text)
        return None

    def _note_beyond(self, place: int, known: Sequence[TensorSpec], count: int) -> None:
        names = ", ".join(spec.name for spec in known)
        text = f"node '{self.node}': {self._whose} takes {len(known)} inputs ({names}), got {count}"
        self._note("E105", self._path(place), f"{text}; '{self.scope.source(place)}' is one too many")

    def _fit(self, name: str | int, spec: TensorSpec, form: Form) -> None:
        wanted, source = Form.of(spec), self.scope.source(name)
        target = f"{self.node}.{spec.name} ({self._whose})"
        if self._is_formless(form.dtype, wanted.dtype):
            text = f"edge {source} -> {target}: expected {wanted}, got {form}, which has no form on the wire there"
            self._note("E108", self._path(name), f"{text}; write {spec.name}: {{from: {source}, cast: {wanted.dtype}}}")
            wanted = wanted._replace(dtype=form.dtype)
        elif form.dtype == "float32" and wanted.dtype and wanted.dtype.startswith(_FLOATS_FROM_FLOAT32):
            wanted = wanted._replace(dtype="float32")
        self.scope.equal(form, source, wanted, target, "E106", (*self.scope.path, *self._path(name)))

    def _is_formless(self, dtype: str | None, wanted: str | None) -> bool:
        """Whether a dtype crosses the wire only as the bits of another one, and the server takes neither."""
        if self.spec.MODEL != "remote" or dtype is None or wanted is None or dtype == wanted:
            return False
        return dtype not in DTYPES or DTYPES[dtype].is_bit_view

    def _agreed(self, ours: str, text: str | TensorText, spec: TensorSpec) -> Form:
        form = Form.of(spec)
        if isinstance(text, str):
            return form
        declared = text.form
        if form.dtype is not None and declared.dtype != form.dtype:
            what = f"output '{ours}' of '{self.node}' is declared {declared}"
            self._note("E106", ("outputs", ours), f"{what}, but {self._whose} gives {form}; declare {form.dtype}")
        path = (*self.scope.path, "outputs", ours)
        given = form._replace(dtype=declared.dtype)
        by = f"'{ours}' of '{self.node}' as declared"
        return self.scope.equal(given, f"'{spec.name}' of {self._whose}", declared, by, "E107", path)


def _renames(outputs: Mapping[str, str | TensorText], signature: Signature) -> dict[str, str]:
    """The model's name of each output of ours.

    One that is declared has the model's own name. Where none of them has, they are as many as the model's and in order.
    """
    theirs = [spec.name for spec in signature.outputs]
    named = {ours: text if isinstance(text, str) else ours for ours, text in outputs.items()}
    if len(named) == len(theirs) and not set(named.values()) & set(theirs) and _all_declared(outputs):
        return dict(zip(named, theirs, strict=True))
    return named


def _all_declared(outputs: Mapping[str, str | TensorText]) -> bool:
    return all(isinstance(text, TensorText) for text in outputs.values())


# --------------------------------------------------------------------------- remote


def _failure(value: Any) -> Any:
    return "unavailable" if value in (503, "503") else value


Failure = Annotated[
    Literal["connect", "lost", "overloaded", "unavailable"],
    BeforeValidator(_failure, json_schema_input_type=Literal["connect", "lost", "overloaded", "unavailable", 503]),
]


class RetryText(Model):
    """How often a call that failed for a passing reason is sent again."""

    attempts: int = Field(default=3, ge=1)
    """Sendings in all; 1 for no retry."""
    when: list[Failure] | None = None
    """Which failures are tried again: `connect`, `lost`, `overloaded`, `unavailable` (or 503); all unless said."""
    idempotent: bool = True
    """Write false if a call must not happen twice: it is sent again only where no connection was made."""
    budget: Share = 0.2
    """Sendings that all calls together may add, as a share of the calls, such as `20%`."""

    def retry(self) -> Retry:
        """The same for an `Endpoint`."""
        when = None if self.when is None else tuple(self.when)
        return Retry(attempts=self.attempts, idempotent=self.idempotent, budget=self.budget, when=when)


def _after(value: Any) -> Any:
    if value == "p95" or (isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?\s*(us|ms|s|min|h)", value)):
        return value
    raise ValueError(f"expected p95 or a length such as 30ms, got {value!r}")


class HedgeText(Model):
    """When a call that is late is sent a second time; the first answer counts."""

    after: Annotated[Literal["p95"] | Seconds, BeforeValidator(_after, json_schema_input_type=str)] = "p95"
    """A length such as `30ms`, or `p95`: what 95 % of the last answers took."""
    budget: Share = 0.07
    """Copies that may be sent, as a share of the calls, such as `5%`."""

    def hedge(self) -> Hedge:
        """The same for an `Endpoint`."""
        return Hedge(None if isinstance(self.after, str) else self.after, min(self.budget, 1.0))


class BreakerText(Model):
    """When a replica that fails is left alone, and for how long."""

    failures: int = Field(default=5, ge=1)
    """Failures in a row."""
    reset: Annotated[Seconds, Field(gt=0)] = 1.0
    """How long it is left alone at first, such as `10s`; twice as long after each relapse, up to a minute."""

    def breaker(self) -> Breaker:
        """The same for an `Endpoint`."""
        return Breaker(self.failures, self.reset, max(60.0, self.reset))


class TlsText(Model):
    """Whom https trusts, and who we are; paths are relative to the YAML file."""

    ca: str | None = None
    """A file of CA certificates (PEM) to trust instead of the system's."""
    cert: str | None = None
    """The client certificate (PEM)."""
    key: str | None = None
    """Its key (PEM)."""
    password: str | None = None
    """Of the key; write `${NAME}` for an environment variable."""
    verify: bool = True
    """Whether certificates are checked; false trusts anybody."""

    def tls(self, file: str) -> TLS:
        """The same for an `Endpoint`."""
        ca, cert, key = [path and _beside(file, path) for path in (self.ca, self.cert, self.key)]
        return TLS(ca, cert, key, self.password, self.verify)


def _urls(value: str | list[str]) -> str | list[str]:
    if not value:
        raise ValueError("expected a URL or more, got none")
    return value


class RemoteSpec(ServableSpec):
    """A model on another machine: a URL, or several that answer alike."""

    kind: Literal["remote"]
    url: Annotated[str | list[str], AfterValidator(_urls)]
    """`http://host:9000/model`, `https://`, `http+unix://`, or `gp://`, which means http; or a list of replicas."""
    retry: RetryText = RetryText()
    """When a call that failed is sent again: where the reason may pass, three times in all, unless said."""
    hedge: HedgeText | None = None
    """When a call that is late is sent a second time; never unless said."""
    breaker: BreakerText = BreakerText()
    """When a replica that fails is left alone; where this is written, the node too, be it the only one."""
    headers: dict[str, str] = Field(default={})
    """Sent with every request; write `${NAME}` for an environment variable."""
    tls: TlsText | None = None
    """Whom https trusts, and who we are."""
    config: str = ""
    """Handed to the model with every call."""

    MODEL: ClassVar = "remote"
    OPENED_BY: ClassVar = ("url", "timeout", "retry", "hedge", "breaker", "headers", "tls")
    PLACE: ClassVar = "loop"

    @property
    def what(self) -> str:
        """The first URL, without its query, which may hold a secret."""
        return self.urls[0].partition("?")[0]

    @property
    def urls(self) -> list[str]:
        """The URLs, `gp://` read as `http://`."""
        urls = [self.url] if isinstance(self.url, str) else self.url
        return [re.sub(r"\Agp://", "http://", url) for url in urls]

    @property
    def sent(self) -> bytes:
        """The `config` that goes with every call."""
        return self.config.encode()

    def open(self, file: str) -> Servable:
        """Make the endpoint; it is not asked anything."""
        endpoint = self._endpoint(file)
        return Guarded(endpoint, self.breaker.breaker()) if "breaker" in self.model_fields_set else endpoint

    def _endpoint(self, file: str) -> Endpoint:
        return Endpoint(
            self.urls,
            timeout_s=30.0 if self.timeout is None else self.timeout,
            headers=self.headers,
            tls=None if self.tls is None else self.tls.tls(file),
            retry=self.retry.retry(),
            hedge=None if self.hedge is None else self.hedge.hedge(),
            breaker=self.breaker.breaker(),
        )


# --------------------------------------------------------------------------- files


def _is_file(path: str) -> bool:
    return "://" not in path and not re.fullmatch(r"[\w.]+:[\w.]+", path)


def _beside(file: str, path: str) -> str:
    """A path relative to a file's folder."""
    return str(FilePath(file).parent / FilePath(path).expanduser())


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {value!r}")
    return value


Device = Annotated[str, AfterValidator(_device)]


class FileSpec(ServableSpec):
    """A model in a file."""

    path: str
    """The model, relative to the YAML file; or `https://host/model.onnx#sha256=...`, which is downloaded once."""
    device: Device = "auto"
    """Where it runs: `cpu`, `cuda`, `cuda:1`, or `auto` for CUDA where it works."""
    sha256: str | None = None
    """The 64 hex digits that the file must have."""

    SUFFIXES: ClassVar[tuple[str, ...]] = ()

    @property
    def what(self) -> str:
        """The path as it is written, without a query, which may hold a secret."""
        return self.path.partition("?")[0] if "://" in self.path else self.path

    def open(self, file: str) -> Servable:
        """Load the file."""
        path = _beside(file, self.path) if _is_file(self.path) else self.path
        self._require_kind(path)
        options = {name: value for name, value in self.options(file).items() if value is not None}
        with modules_in(str(FilePath(file).parent)):
            return load(path, sha256=self.sha256, device=self._device(), **options)

    def options(self, file: str) -> dict[str, Any]:
        """What the class of servable takes besides."""
        return {}

    def _device(self) -> str:
        return self.device

    def _require_kind(self, path: str) -> None:
        """Refuse what `load` would open as a model of another kind, or not as a model in a file at all."""
        bare = re.split(r"[?#]", path)[0].lower() if "://" in path else path.lower()
        suffix = FilePath(bare).suffix
        if suffix not in self.SUFFIXES and not self._may_be(path, suffix):
            expected = ", ".join(filter(None, self.SUFFIXES))
            raise SpecError(f"'{self.what}' is not for kind '{self.kind}': expected a file ending in {expected}")

    def _may_be(self, path: str, suffix: str) -> bool:
        return False


class OnnxSpec(FileSpec):
    """A model in an ONNX file, run here by onnxruntime."""

    kind: Literal["onnx"]
    providers: list[Literal["cuda", "cpu"]] | None = None
    """What it may run on, the best first; another way to say `device`."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of one run; a quarter of the CPUs unless said."""

    OPENED_BY: ClassVar = ("path", "device", "sha256", "providers", "threads")
    SUFFIXES: ClassVar = (".onnx",)

    @model_validator(mode="after")
    def _one_way(self) -> OnnxSpec:
        if self.providers is not None and "device" in self.model_fields_set:
            raise ValueError("'device' and 'providers' say the same: write one of them")
        if self.providers == []:
            raise ValueError("'providers' is empty: expected cuda, cpu or both")
        return self

    def options(self, file: str) -> dict[str, Any]:
        """What `OnnxModel` takes besides."""
        return {"threads": self.threads}

    def _device(self) -> str:
        if self.providers is None:
            return self.device
        return "auto" if self.providers[:2] == ["cuda", "cpu"] else self.providers[0]


class TorchSpec(FileSpec):
    """A model of PyTorch, run here: an exported program, a TorchScript file, or a module by its Python name."""

    kind: Literal["torch"]
    dtype: Literal["bfloat16", "bf16", "float16", "fp16", "float32"] | None = None
    """What it computes in; callers see no difference but precision."""
    compile: bool = False
    """Whether it is compiled before the first run."""
    weights: str | None = None
    """For a module: the file of its weights, relative to the YAML file."""
    takes: list[str] | None = None
    """For a module or TorchScript: its inputs in order, each such as `x: float32 [-1, 1024]`."""
    gives: list[str] | None = None
    """Its outputs in order, each such as `y: float32 [-1, 10]`; learned from a dry run unless said."""

    OPENED_BY: ClassVar = ("path", "device", "sha256", "dtype", "compile", "weights", "takes", "gives")
    SUFFIXES: ClassVar = (".pt2", ".pt", ".pth", ".jit")

    def options(self, file: str) -> dict[str, Any]:
        """What `TorchModel` takes besides."""
        return {
            "dtype": self.dtype,
            "compile": self.compile or None,
            "weights": self.weights and _beside(file, self.weights),
            "inputs": self.takes,
            "outputs": self.gives,
        }

    def _may_be(self, path: str, suffix: str) -> bool:
        return not _is_file(path) and "://" not in path


class TfSpec(FileSpec):
    """A model of TensorFlow, run here: the folder of a SavedModel, a frozen graph or a Keras file."""

    kind: Literal["tf"]
    signature: str | None = None
    """Which signature of a SavedModel; `serving_default` unless said."""
    takes: list[str] | None = None
    """Names of its inputs in order; of a frozen graph any tensors."""
    gives: list[str] | None = None
    """Names of its outputs in order; of a frozen graph any tensors."""

    OPENED_BY: ClassVar = ("path", "device", "sha256", "signature", "takes", "gives")
    SUFFIXES: ClassVar = (".pb", ".keras", ".h5", "")

    def options(self, file: str) -> dict[str, Any]:
        """What `TFModel` takes besides."""
        return {"signature": self.signature, "inputs": self.takes, "outputs": self.gives}

    def _may_be(self, path: str, suffix: str) -> bool:
        return FilePath(path).is_dir()


# --------------------------------------------------------------------------- python


def _runs_in(value: Any) -> Any:
    if value == "process":
        raise ValueError(
            "expected inline or thread, got 'process', which is not there; "
            "serve the function (python -m server_ref --model pkg.mod:thing) and call it by kind: remote"
        )
    return value


def _callable_name(value: str) -> str:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", value):
        raise ValueError(f"expected package.module:function, got {value!r}")
    return value


class PythonSpec(ServableSpec):
    """A Python function, or a servable by its Python name."""

    kind: Literal["python"]
    call: Annotated[str, AfterValidator(_callable_name)]
    """`package.module:function`, whose parameters are the inputs; or a servable, or what makes one of either."""
    run_in: Annotated[
        Literal["inline", "thread"],
        BeforeValidator(_runs_in, json_schema_input_type=Literal["inline", "thread"]),
    ] = "thread"
    """`thread`, or `inline` for what is cheap and never waits."""
    mutates: bool = False
    """Whether it writes to its inputs: then it gets copies of those that others read too."""
    options: dict[str, Any] = Field(default={})
    """Keyword arguments of the function, or of what makes it; for a parameter annotated as a `Path`, a path that is
    relative to the YAML file.
    """
    config: str = ""
    """Handed to it with every call, where it takes `config`."""

    OPENED_BY: ClassVar = ("call", "options", "outputs")

    @property
    def what(self) -> str:
        """The name of the function."""
        return self.call

    @property
    def connected(self) -> tuple[str, ...] | int:
        """The names of its inputs; where they are a list, how many."""
        return tuple(self.inputs) if isinstance(self.inputs, dict) else len(self.inputs or ())

    @property
    def place(self) -> str:
        """Where it runs."""
        return self.run_in

    @property
    def sent(self) -> bytes:
        """The `config` that goes with every call."""
        return self.config.encode()

    @property
    def writes(self) -> bool | None:
        """Whether it is said to."""
        return self.mutates

    def open(self, file: str) -> Servable:
        """Import it; this runs the code of its module."""
        declared = {name: text for name, text in (self.outputs or {}).items() if isinstance(text, TensorText)}
        specs = [text.form.spec(name) for name, text in declared.items()]
        return open_function(self.call, str(FilePath(file).parent), self.options, self.connected, specs)


# --------------------------------------------------------------------------- graph


class GraphSpec(ServableSpec):
    """Another graph, in a file of its own."""

    kind: Literal["graph"]
    ref: str
    """Its YAML file, relative to this one."""

    OPENED_BY: ClassVar = ("ref",)
    PLACE: ClassVar = "loop"

    @property
    def what(self) -> str:
        """The path as it is written."""
        return self.ref

    def open(self, file: str) -> Servable:
        """Load the graph.

        Raises:
            SpecError: it has faults, or holds itself.
        """
        from ensemble.ensemble import load  # not at the top: it is made of the modules here

        return load(_beside(file, self.ref))
