"""`python -m server_ref --model x.onnx`: the command line. It turns flags and variables into a call of `serve`."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import remote_ops
from remote_ops import http1
from remote_ops.errors import RemoteOpsError, SpecError
from server_ref.access import Access, loopback_or_guarded
from server_ref.journal import Journal, log_handler
from server_ref.lifecycle import serve
from server_ref.listen import Listen
from server_ref.model import Version
from server_ref.opening import open_version
from server_ref.plane import ControlPlane
from server_ref.progress import progress_on
from server_ref.repository import Entry
from server_ref.settings import Batching, Cache, Instances, ModelSettings, read_settings
from server_ref.source import Source
from server_ref.tls import Certificates

__all__ = ["main"]

# Data types in a value_inputs.json, by the numbers of Caffe2's TensorProto.
_CAFFE2_TYPES = {
    1: "float32", 2: "int32", 3: "uint8", 4: "string", 5: "bool", 6: "uint8", 7: "int8", 8: "uint16", 9: "int16",
    10: "int64", 12: "float16", 13: "float64",
}  # fmt: skip

# The flags that only some models take, and what `load` calls them.
_OPTIONS = {
    "--threads": "threads", "--profile": "profile", "--dtype": "dtype", "--compile": "compile", "--weights": "weights",
    "--input": "inputs", "--output": "outputs", "--inputs": "inputs", "--outputs": "outputs",
    "--signature": "signature",
}  # fmt: skip
_OBJECT = "package.module:thing"
_FOLDER = "a SavedModel"
_SCRIPT = ("--dtype", "--compile", "--input", "--output")
_TAKEN = {
    ".onnx": ("--threads", "--profile"),
    ".pt2": ("--dtype", "--compile"),
    **dict.fromkeys((".pt", ".pth", ".jit"), _SCRIPT),
    _OBJECT: (*_SCRIPT, "--weights"),
    ".pb": ("--inputs", "--outputs"),
    _FOLDER: ("--inputs", "--outputs", "--signature"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Serve what the command line and the `GP_*` variables say; a flag wins over its variable."""
    try:
        args = _parser(os.environ).parse_args(argv)
        level = logging.DEBUG if args.verbose else logging.INFO
        logging.basicConfig(level=level, handlers=[log_handler(sys.stderr, args.log_format)])
        _check_old_flags(args)
        if args.max_body_mb < 1:
            raise SpecError(f"expected 1 MiB or more, got {args.max_body_mb}", path="--max-body-mb")
        access = Access.read(args.infer_token_file, args.admin_token_file)
        certificates, control = _certificates(args), _control(args)
        _check_exposure(args, access, certificates)
        models = _load_all(args)
        if args.value_inputs:
            _check_value_inputs(args.value_inputs, models)
        limits = http1.Limits(max_body_bytes=args.max_body_mb << 20)
        return serve(
            models, args.listen, folder=args.folder, watch_s=args.watch, device=_device(args), limits=limits,
            tls=certificates, access=access, grace_s=args.drain_grace_s, exit_timeout_s=args.exit_timeout_s,
            control=control, told=progress_on(sys.stderr), allow_changes=args.allow_model_control,
            model_urls=args.allow_model_url or (), cors_origins=args.cors_origin or (),
            journal=Journal(requests=args.log_requests),
        )  # fmt: skip
    except (RemoteOpsError, ImportError) as error:
        print(f"server_ref: {error}", file=sys.stderr)
        return 2


def _parser(env: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server_ref",
        description="Serve models over GraphPipe.",
        epilog="Variables: GP_MODEL, GP_INPUTS, GP_OUTPUTS, GP_VALUE_INPUTS, GP_INIT_NET, GP_PREDICT_NET, GP_CACHE, "
        "GP_ENGINE_COUNT.",
    )
    add = parser.add_argument
    add("folder", nargs="?", metavar="FOLDER",
        help="a folder of models: NAME.onnx, NAME/VERSION/model.onnx and others, each at /NAME")  # fmt: skip
    add("--watch", nargs="?", type=float, const=2.0, default=0.0, metavar="SECONDS",
        help="follow what changes in FOLDER, looking every so many seconds (2 if no number is given)")  # fmt: skip
    add("-m", "--model", action="append", metavar="[NAME=]WHAT",
        help="a model file, a URL of one, the folder of a SavedModel, or package.module:thing; repeat for several, "
        "each at /NAME")  # fmt: skip
    add("-l", "--listen", default="127.0.0.1:9000", metavar="HOST:PORT",
        help="or unix:/path.sock (default: %(default)s)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--threads", type=int, help="threads per run; as many runs at a time as the cores have room for")
    add("--dtype", help="what torch models compute in: bf16, fp16 or float32")
    add("--compile", action="store_true", default=None, help="compile torch models before the first request")
    add("--weights", metavar="FILE", help="weights of a torch module: .safetensors, or a saved state dict")
    add("--input", action="append", metavar="SPEC",
        help="what a torch module takes, as 'x: float32 [-1, 1024]'; repeat")  # fmt: skip
    add("--output", action="append", metavar="SPEC", help="what it returns, if a run on zeros cannot tell; repeat")
    add("--settings", metavar="FILE", help="a model.yaml for the models of --model")
    add("--instances", type=int, metavar="N", help="copies of each model of --model")
    add("--max-rows", type=int, metavar="N", help="serve waiting requests together, in batches of up to N rows")
    add("--max-delay-ms", type=float, metavar="MS",
        help="with --max-rows: how long a request may wait for others while the model is idle")  # fmt: skip
    add("--isolate", action="store_true", help="run each copy in a process of its own, which may crash alone")
    add("--signature", metavar="NAME", help="which signature of a SavedModel (default: serving_default)")
    add("--sha256", help="what a downloaded model must hash to")
    add("--max-body-mb", type=int, default=1024, help="largest request in MiB (default: %(default)s)")
    add("--drain-grace-s", type=float, default=5.0,
        help="after SIGTERM, seconds of further service while not ready (default: %(default)s)")  # fmt: skip
    add("--exit-timeout-s", type=float, default=30.0,
        help="then, seconds for requests in flight (default: %(default)s)")  # fmt: skip
    _add_guards(parser)
    add("--log-requests", action="store_true", help="log a line for each request, not only for those that failed")
    add("--log-format", choices=("text", "json"), default="",
        help="how log lines look (default: text on a terminal, else json)")  # fmt: skip
    add("-v", "--verbose", action="store_true", help="log more")
    add("-V", "--version", action="version", version=f"remote-ops {remote_ops.__version__}")
    old = parser.add_argument_group("flags of the 2018 servers")
    old.add_argument("-d", "--cache-dir", help="where downloaded models are kept")
    old.add_argument("-i", "--inputs", metavar="NAMES", help="of a TensorFlow graph, with commas between them")
    old.add_argument("-o", "--outputs", metavar="NAMES", help="the same")
    old.add_argument("--engine-count", type=int, default=_number(env, "GP_ENGINE_COUNT"), help="runs at a time")
    old.add_argument("--disable-cuda", action="store_true", help="the same as --device cpu")
    old.add_argument("--profile", metavar="FILE", help="onnxruntime writes its profile there at exit")
    old.add_argument("--value-inputs", default=env.get("GP_VALUE_INPUTS"), metavar="FILE",
                     help='{"name": [dtype, [dims]]}: checked against the model')  # fmt: skip
    old.add_argument("--init-net", default=env.get("GP_INIT_NET"), help=argparse.SUPPRESS)
    old.add_argument("--predict-net", default=env.get("GP_PREDICT_NET"), help=argparse.SUPPRESS)
    old.add_argument("-c", "--cache", action="store_true", default=env.get("GP_CACHE", "").lower() in ("1", "true"),
                     help="answer rows that were computed before; on disk if there is a --cache-dir")  # fmt: skip
    variables = {"--inputs": env.get("GP_INPUTS") or None, "--outputs": env.get("GP_OUTPUTS") or None}
    parser.set_defaults(env_model=env.get("GP_MODEL"), variables=variables)
    return parser


def _add_guards(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--infer-token-file", metavar="FILE",
        help="tokens, one a line, of those who may call models; also REMOTE_OPS_INFER_TOKEN")  # fmt: skip
    add("--admin-token-file", metavar="FILE",
        help="tokens of those who may do all; also REMOTE_OPS_ADMIN_TOKEN")  # fmt: skip
    add("--certfile", metavar="FILE", help="certificate of the server (PEM); makes it https")
    add("--keyfile", metavar="FILE", help="its key, if that is not in the same file")
    add("--client-ca", metavar="FILE", help="who signs the certificates that clients must show")
    add("--control", metavar="HOST:PORT",
        help="where to listen for the control plane, such as 127.0.0.1:9001 (default: it is off)")  # fmt: skip
    add("--allow-model-control", action="store_true", help="let those with an admin token change what is served")
    add("--allow-model-url", action="append", metavar="PREFIX",
        help="with it: load model files from URLs that begin so, by their SHA-256; repeat")  # fmt: skip
    add("--cors-origin", action="append", metavar="ORIGIN",
        help="let pages of this origin call models from a browser; repeat, or * for all")  # fmt: skip
    add("--metrics-compat", action="append", choices=("triton", "torchserve"),
        help="whose names /metrics of the control plane has besides ours; repeat for both")  # fmt: skip
    add("--insecure", action="store_true", help="let other machines in without asking who calls")


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name)
    if not text:
        return None
    if not text.isdigit():
        raise SpecError(f"expected a number, got {text!r}", path=name)
    return int(text)


def _check_old_flags(args: argparse.Namespace) -> None:
    if args.init_net or args.predict_net:
        raise SpecError(
            "Caffe2 nets are not served: export the model to ONNX and pass --model model.onnx",
            path="--init-net, --predict-net",
        )
    if args.engine_count is not None and not 0 <= args.engine_count <= 32:
        raise SpecError(f"expected 0 to 32, got {args.engine_count}", path="--engine-count")
    if args.cache_dir:
        os.environ["REMOTE_OPS_CACHE"] = args.cache_dir


def _certificates(args: argparse.Namespace) -> Certificates | None:
    if args.certfile is None:
        for flag, value in (("--keyfile", args.keyfile), ("--client-ca", args.client_ca)):
            if value is not None:
                raise SpecError("expected --certfile FILE with it: TLS begins with a certificate", path=flag)
        return None
    return Certificates(args.certfile, args.keyfile, args.client_ca)


def _control(args: argparse.Namespace) -> ControlPlane | None:
    if args.control is None:
        if args.allow_model_control:
            raise SpecError("expected --control HOST:PORT with it", path="--allow-model-control")
        if args.metrics_compat:
            raise SpecError("expected --control HOST:PORT with it", path="--metrics-compat")
        return None
    return ControlPlane(args.control, allow_changes=args.allow_model_control, metrics_compat=args.metrics_compat or ())


def _check_exposure(args: argparse.Namespace, access: Access | None, certificates: Certificates | None) -> None:
    loopback = Listen.parse(args.listen).loopback
    mutual = certificates is not None and certificates.mutual
    loopback_or_guarded(args.listen, loopback=loopback, access=access, mutual_tls=mutual, insecure=args.insecure)
    if args.insecure and not loopback:
        said = "can be reached from other machines, and --insecure lets anybody call"
        print(f"server_ref: {args.listen} {said}", file=sys.stderr)


def _load_all(args: argparse.Namespace) -> dict[str, Version]:
    whats = args.model or ([args.env_model] if args.env_model and not args.folder else [])
    if not whats and not args.folder:
        raise SpecError("no model: expected a FOLDER, --model WHAT, or GP_MODEL", path="--model")
    _check_options(whats, args)
    _check_folder_flags(whats, args)
    settings = _settings(args)
    models: dict[str, Version] = {}
    for what in whats:
        source = _source(what, args, settings)
        if source.name in models:
            hint = f"name them, as in --model {source.name}2={what}"
            raise SpecError(f"two models are called '{source.name}': {hint}", path="--model")
        models[source.name] = _open(source)
    return models


def _check_folder_flags(whats: Sequence[str], args: argparse.Namespace) -> None:
    """Raise rather than ignore a flag that is only for a folder, or only for what is no folder."""
    if args.watch and not args.folder:
        raise SpecError("expected a FOLDER with it: what --model names is opened once", path="--watch")
    if not 0 <= args.watch < math.inf:
        raise SpecError(f"expected 0 seconds or more, got {args.watch:g}", path="--watch")
    for flag in ("settings", "instances", "max_rows", "max_delay_ms", "isolate", "threads", "profile"):
        if getattr(args, flag) and not whats:
            raise SpecError("is for models of --model: those of a folder say it in a model.yaml", path=_flag(flag))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _open(source: Source) -> Version:
    """Open a model of `--model`, with a bar on a terminal; elsewhere the line of where it is served says enough."""
    if not sys.stderr.isatty():
        return open_version(source)
    told, entry = progress_on(sys.stderr), Entry(source)
    return open_version(source, lambda step, done, of: told(entry, step, done, of))


def _source(what: str, args: argparse.Namespace, settings: ModelSettings) -> Source:
    name, what = _split(what)
    options = {"sha256": args.sha256, **_options(what, args)}
    name = name or _name_of(what)
    if settings.cache is not None and args.cache_dir:
        path = str(Path(args.cache_dir) / "rows" / name)
        settings = settings.model_copy(update={"cache": settings.cache.model_copy(update={"path": path})})
    return Source(name, "", what, settings, device=_device(args), options=options, concurrency=args.engine_count or 0)


def _device(args: argparse.Namespace) -> str:
    return "cpu" if args.disable_cuda else str(args.device)


def _settings(args: argparse.Namespace) -> ModelSettings:
    """What the flags say of every model of `--model`, over what the file of `--settings` does."""
    said: dict[str, Any] = {}
    if args.max_delay_ms is not None and args.max_rows is None:
        raise SpecError(
            "expected --max-rows with it: without, every request is served by itself", path="--max-delay-ms"
        )
    for flag, value, least, most in (
        ("--instances", args.instances, 1, 64),
        ("--max-rows", args.max_rows, 1, 65_536),
        ("--max-delay-ms", args.max_delay_ms, 0, 60_000),
    ):
        if value is not None and not least <= value <= most:
            raise SpecError(f"expected {least} to {most}, got {value}", path=flag)
    if args.instances is not None:
        said["instances"] = Instances(count=args.instances)
    if args.max_rows is not None:
        said["batching"] = Batching(max_rows=args.max_rows, max_delay_ms=args.max_delay_ms or 0.0)
    if args.isolate:
        said["isolate"] = "process"
    if args.cache:
        said["cache"] = Cache()
    settings = read_settings(args.settings) if args.settings else ModelSettings()
    return settings.model_copy(update=said)


def _split(what: str) -> tuple[str, str]:
    """`NAME=WHAT` taken apart; no name where there is none."""
    name, equals, rest = what.partition("=")
    return (name, rest) if equals and "/" not in name and ":" not in name else ("", what)


def _options(what: str, args: argparse.Namespace) -> dict[str, Any]:
    """The options, of those that are given, which this model takes."""
    given = {flag: getattr(args, flag.removeprefix("--")) for flag in _taken(what)}
    given |= {flag: value for flag, value in args.variables.items() if flag in given and given[flag] is None}
    return {_OPTIONS[flag]: value for flag, value in given.items() if value is not None}


def _check_options(whats: Sequence[str], args: argparse.Namespace) -> None:
    """Raise rather than ignore a flag that none of the models takes; the two of onnxruntime never were refused."""
    taken = {flag for what in whats for flag in _taken(_split(what)[1])} | {"--threads", "--profile"}
    for flag in _OPTIONS:
        if flag not in taken and getattr(args, flag.removeprefix("--")) is not None:
            kinds = ", ".join(kind for kind in _TAKEN if flag in _TAKEN[kind])
            raise SpecError(f"no model here takes it: only {kinds} do", path=flag)


def _taken(what: str) -> tuple[str, ...]:
    plain = what.partition("#")[0].partition("?")[0]
    if "://" not in plain and Path(plain).is_dir():
        return _TAKEN[_FOLDER]
    kind = _OBJECT if ":" in plain and "://" not in plain else Path(plain).suffix.lower()
    return _TAKEN.get(kind, ())


def _name_of(what: str) -> str:
    plain = what.partition("#")[0].partition("?")[0].rstrip("/")
    if "://" in plain:
        parts = urlsplit(plain)
        return Path(parts.path).stem or parts.hostname or "remote"
    return plain.rpartition(":")[2] if ":" in plain else Path(plain).stem


def _check_value_inputs(path: str, models: Mapping[str, Version]) -> None:
    """Check the shapes that the 2018 ONNX server had to be told: ours reads them from the model."""
    try:
        declared = json.loads(Path(path).read_text())
        entries = {name: (_CAFFE2_TYPES[int(dtype)], tuple(dims)) for name, (dtype, dims) in declared.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f'expected {{"name": [dtype, [dims]]}}, got {error}', path=path) from error
    for model, version in models.items():
        specs = {spec.name: spec for spec in version.signature.inputs}
        for name, (dtype, dims) in entries.items():
            spec = specs.get(name)
            if spec is None or spec.dtype != dtype or not spec.accepts_shape(dims):
                got = f"{dtype} {list(dims)}"
                raise SpecError(
                    f"input '{name}' of {model}: the model has {spec or list(specs)}, the file {got}", path=path
                )


if __name__ == "__main__":
    sys.exit(main())
