"""`RemoteLayer`: a model that lives elsewhere as a layer of a Keras model, on Keras' TensorFlow or PyTorch backend.

It says what goes in and out, and what a saved model keeps; the call itself is left to `ops`, or on PyTorch to
`RemoteModule`.
Importing it imports keras, and so the backend that keras is set to, and no other.

Constant: the address, the options. Changing: the signature, learned once; on PyTorch a module for each URL. Both are
set by operations that are atomic in CPython.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

try:
    import keras
except ModuleNotFoundError as error:
    if error.name != "keras":  # the backend that keras is set to
        raise
    raise ImportError("remote_ops.tf.RemoteLayer needs keras: pip install 'keras>=3'") from error

from remote_ops.client import Endpoint
from remote_ops.errors import SignatureError, SpecError
from remote_ops.policy import Retry
from remote_ops.signature import Signature, TensorSpec, parse_spec
from remote_ops.tf.unwrapped import unwrapped
from remote_ops.url import TLS, Url

__all__ = ["RemoteLayer"]

Tensor = Any  # of whatever backend
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_BACKENDS = ("tensorflow", "torch")


@keras.saving.register_keras_serializable(package="remote_ops")
class RemoteLayer(keras.layers.Layer):  # type: ignore[misc]
    """A model that lives elsewhere, as a layer of a Keras model; gradients with respect to its inputs included.

    It has no weights. Called with one tensor, with a list of them in order, or with a dict of them by name, it gives
    one tensor, a tuple of them where the model has several outputs, or a dict of them where the inputs came as one.

    Args:
        uri: `http://`, `https://` or `http+unix://%2Fpath.sock/model`; a list of them for replicas. A saved model
            holds it in full.
        endpoint: instead of `uri`, the name of an environment variable that holds it, read where the model runs. A
            saved model then holds the name only.
        input_names: the order in which a list of inputs comes; the model's own unless said.
        output_names: the outputs to give, in order; all of them unless said.
        inputs, outputs: all that the model takes and gives, in its order, each a `TensorSpec` or text such as
            `x: float32 [-1, 4]`. The server is asked for what is not said, when the layer is built.
        config: handed to the model with every call.
        timeout_s: seconds that a call may take in all, retries included.
        headers: sent with every request; a value must name environment variables as `${NAME}`, read at each call.
        tls: whom https trusts, and who we are. Paths are saved, a password must be `${NAME}`.
        retry: how often a call that failed for a passing reason is sent again.
        pure: False has the call run even where nobody uses its output.
        name, dtype: as for any layer. Whatever `dtype` or the global policy say, a float input is cast to the dtype
            that the model declares, and outputs keep the model's; other dtypes are left alone, and must fit.

    Raises:
        SpecError: an argument is wrong, a header or password has a literal value, or Keras' backend is another one.
        SignatureError: the names said are not those that the specs have.

    A saved model, `.keras` or SavedModel, loads while the server is down: the signature is in it.
    """

    def __init__(
        self,
        uri: str | Sequence[str] | None = None,
        *,
        endpoint: str | None = None,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        inputs: Sequence[TensorSpec | str] | TensorSpec | str | None = None,
        outputs: Sequence[TensorSpec | str] | TensorSpec | str | None = None,
        config: str | bytes = "",
        timeout_s: float = 30.0,
        headers: Mapping[str, str] | None = None,
        tls: TLS | None = None,
        retry: Retry = Retry(),  # noqa: B008 (immutable)
        pure: bool = True,
        name: str | None = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        if keras.backend.backend() not in _BACKENDS:
            raise SpecError(
                f"RemoteLayer runs on Keras' backends {' and '.join(_BACKENDS)}: got '{keras.backend.backend()}'; set "
                "KERAS_BACKEND before keras is imported",
                path="KERAS_BACKEND",
            )
        super().__init__(name=name, dtype=dtype, autocast=False, **kwargs)
        self.supports_jit = False
        self.pure = pure
        self._peer = _Peer(_urls(uri), endpoint, timeout_s, tuple((headers or {}).items()), tls, retry)
        self._bytes = _bytes(config)
        self._face = _Face(
            _specs(inputs, "inputs"), _specs(outputs, "outputs"),
            _names(input_names, "input_names"), _names(output_names, "output_names"), self._peer.at,
        )  # fmt: skip
        make = _torch_call if keras.backend.backend() == "torch" else _tensorflow_call
        self._call_model = make(self._peer, self._bytes, pure)

    @property
    def signature(self) -> Signature:
        """What the model takes and gives; asked of the server at the first use, unless it was said.

        Raises:
            RemoteOpsError: it cannot be had.
        """
        return self._known().signature  # type: ignore[return-value]

    # what keras calls

    def build(self, input_shape: Any = None) -> None:
        """Learn the signature. `input_shape` is not needed."""
        self._known()

    def call(self, inputs: Any) -> Any:
        """Call the model: one tensor, a list, or a dict by name; the same comes back, a tuple for several outputs.

        Raises:
            SignatureError: an input does not fit; nothing was sent.
            tf.errors.OpError: on TensorFlow, the call failed. On PyTorch, what `Endpoint` raises.
        """
        with unwrapped():
            face = self._known()
            values, as_dict = face.named(inputs)
            fitted = {spec.name: _fitted(spec, values[spec.name], face.at) for spec in face.taken}
            return face.shown(self._call_model(face, fitted), as_dict)

    def compute_output_spec(self, inputs: Any) -> Any:
        """What `call` gives for symbolic inputs: shape and dtype of each output, from the signature."""
        with unwrapped():
            face = self._known()
            values, as_dict = face.named(inputs)
            for spec in face.taken:
                _require_fit(spec, values[spec.name], face.at)
            return face.shown([_symbolic(spec) for spec in face.given], as_dict)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the output, a tuple of them, or a dict for a dict; sizes that nobody knows are None."""
        face = self._known()
        return face.shown([_symbolic(spec).shape for spec in face.given], isinstance(input_shape, dict))

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes an equal layer of, in what JSON can hold: the signature, if known, and no secret."""
        face = self._face
        return {
            **super().get_config(),
            **self._peer.described(),
            "input_names": None if face.input_names is None else list(face.input_names),
            "output_names": None if face.output_names is None else list(face.output_names),
            "inputs": _described(face.inputs),
            "outputs": _described(face.outputs),
            "config": {"base64": base64.b64encode(self._bytes).decode()} if self._bytes else "",
            "pure": self.pure,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RemoteLayer:
        """Make a layer of what `get_config` gave. The network is not touched. Raises as the constructor does."""
        given = dict(config)
        for key in ("inputs", "outputs"):
            if given.get(key) is not None:
                given[key] = [TensorSpec(**spec) for spec in given[key]]
        for key, kind in (("tls", TLS), ("retry", Retry)):
            if given.get(key) is not None:
                given[key] = kind(**given[key])
        if isinstance(given.get("config"), dict):
            given["config"] = base64.b64decode(given["config"]["base64"])
        return cls(**given)  # keras' own would print the config with an error, query of the URL and all

    def __repr__(self) -> str:
        known = "" if self._face.signature is None else f", {self._face.signature}"
        return f"<RemoteLayer name={self.name}, {self._peer.at}{known}>"

    def _known(self) -> _Face:
        if self._face.signature is None:
            self._face = self._face.learned(self._peer.signature())
        return self._face


# --------------------------------------------------------------------------- who is called


@dataclasses.dataclass(frozen=True)
class _Peer:
    """Who is called, and how: what is saved of an endpoint."""

    urls: tuple[str, ...] | None
    variable: str | None
    timeout_s: float
    headers: tuple[tuple[str, str], ...]
    tls: TLS | None
    retry: Retry

    def __post_init__(self) -> None:
        if (self.urls is None) == (self.variable is None):
            raise SpecError(
                "expected a URL, or the name of an environment variable that holds one", path="uri, endpoint"
            )
        if self.variable is not None and not _VARIABLE.fullmatch(f"${{{self.variable}}}"):
            raise SpecError(f"expected the name of an environment variable, got {self.variable!r}", path="endpoint")
        for name, value in self.headers:
            if not isinstance(value, str) or not _VARIABLE.search(value):
                raise SpecError(
                    f"header '{name}' has a literal value, which everybody could read in a saved model: write it as "
                    "'${NAME}', to be read from the environment at each call",
                    path="headers",
                )
        if self.tls is not None and self.tls.password and not _VARIABLE.search(self.tls.password):
            raise SpecError("the password of a key would stand in a saved model: write it as '${NAME}'", path="tls")
        Endpoint(list(self.urls or ["https://host"]), self.timeout_s, dict(self.headers), self.tls, self.retry)

    @property
    def at(self) -> str:
        """What messages call it."""
        return f"${self.variable}" if self.urls is None else Url.parse(self.urls[0]).text

    def addresses(self) -> tuple[str, ...]:
        """Its URLs; from the environment, as it is now, if that has them."""
        if self.urls is not None:
            return self.urls
        found = os.environ.get(self.variable or "")
        if not found:
            raise SpecError(
                f"the URL is in the environment variable {self.variable}, which is not set", path="endpoint"
            )
        return (found,)

    def options(self) -> dict[str, Any]:
        """What `Endpoint` and `remote_op` take besides the URLs."""
        return {"timeout_s": self.timeout_s, "headers": dict(self.headers), "tls": self.tls, "retry": self.retry}

    def signature(self) -> Signature:
        """What the model takes and gives, asked of the server."""
        with Endpoint(list(self.addresses()), **self.options()) as endpoint:
            return endpoint.signature

    def described(self) -> dict[str, Any]:
        """Its part of the layer's config."""
        return {
            "uri": None if self.urls is None else self.urls[0] if len(self.urls) == 1 else list(self.urls),
            "endpoint": self.variable,
            "timeout_s": self.timeout_s,
            "headers": dict(self.headers) or None,
            "tls": self.tls and dataclasses.asdict(self.tls),
            "retry": dataclasses.asdict(self.retry),
        }


# --------------------------------------------------------------------------- what goes in and out


@dataclasses.dataclass(frozen=True)
class _Face:
    """What the model takes and gives, as far as it is known, and how the layer's caller wants it."""

    inputs: tuple[TensorSpec, ...] | None
    outputs: tuple[TensorSpec, ...] | None
    input_names: tuple[str, ...] | None
    output_names: tuple[str, ...] | None
    at: str

    def __post_init__(self) -> None:
        if self.signature is not None:
            if self.input_names is not None:
                self._require_names(self.input_names)
            self.signature.select_outputs(self.output_names, at=self.at)

    @functools.cached_property
    def signature(self) -> Signature | None:
        """What the model takes and gives; None while that is not known."""
        if self.inputs is None or self.outputs is None:
            return None
        return Signature(self.inputs, self.outputs)

    @functools.cached_property
    def taken(self) -> tuple[TensorSpec, ...]:
        """The inputs in the caller's order."""
        by_name = {spec.name: spec for spec in self.inputs or ()}
        return tuple(by_name[name] for name in self.input_names or by_name)

    @functools.cached_property
    def given(self) -> tuple[TensorSpec, ...]:
        """The outputs in the caller's order."""
        return Signature((), self.outputs or ()).select_outputs(self.output_names)

    def learned(self, signature: Signature) -> _Face:
        """The same with the server's word for what was not said."""
        return dataclasses.replace(
            self, inputs=self.inputs or signature.inputs, outputs=self.outputs or signature.outputs
        )

    def named(self, inputs: Any) -> tuple[dict[str, Tensor], bool]:
        """What a caller passed, by name, and whether it came as a dict."""
        if isinstance(inputs, Mapping):
            self._require_names(inputs)
            return dict(inputs), True
        values = inputs if isinstance(inputs, list | tuple) else [inputs]
        if len(values) != len(self.taken):
            names = ", ".join(spec.name for spec in self.taken)
            raise SignatureError(
                f"expected {len(self.taken)} inputs ({names}), got {len(values)}",
                expected=str(len(self.taken)), got=str(len(values)), at=self.at,
            )  # fmt: skip
        return {spec.name: value for spec, value in zip(self.taken, values, strict=True)}, False

    def shown(self, results: Sequence[Any], as_dict: bool) -> Any:
        """The outputs as the caller gets them."""
        if as_dict:
            return {spec.name: result for spec, result in zip(self.given, results, strict=True)}
        return results[0] if len(results) == 1 else tuple(results)

    def _require_names(self, names: Iterable[str]) -> None:
        if {*names} != {spec.name for spec in self.inputs or ()}:
            Signature(self.inputs or (), ()).fit_inputs(dict.fromkeys(names), at=self.at)  # says which are wrong


def _require_fit(spec: TensorSpec, value: Tensor, at: str) -> bool:
    """Whether a tensor is to be cast to the dtype of its spec; raises if it does not fit even so."""
    dtype = keras.backend.standardize_dtype(value.dtype)
    sizes = _sizes(value)
    casts = dtype != spec.dtype and keras.backend.is_float_dtype(dtype) and spec.is_float and spec.dtype != "any"
    if not (casts or spec.dtype in (dtype, "any")) or not _may_be(spec.shape, sizes):
        got = f"{dtype} {'of any shape' if sizes is None else list(sizes)}"
        raise SignatureError(
            f"input '{spec.name}': expected {spec}, got {got}", name=spec.name, expected=str(spec), got=got, at=at
        )
    return casts


def _sizes(value: Tensor) -> tuple[int | None, ...] | None:
    try:
        return tuple(value.shape)
    except ValueError:  # tensorflow does not know so much as the rank
        return None


def _may_be(wanted: tuple[int, ...] | None, sizes: tuple[int | None, ...] | None) -> bool:
    if wanted is None or sizes is None:
        return True
    same = all(mine == -1 or size is None or mine == size for mine, size in zip(wanted, sizes, strict=False))
    return len(wanted) == len(sizes) and same


def _fitted(spec: TensorSpec, value: Tensor, at: str) -> Tensor:
    return keras.ops.cast(value, spec.dtype) if _require_fit(spec, value, at) else value


def _symbolic(spec: TensorSpec) -> Any:
    if spec.shape is None or spec.dtype == "any":
        raise SpecError(
            f"output '{spec.name}' is {spec}: expected a dtype and a shape; say outputs=['{spec.name}: float32 [-1]']",
            path="outputs",
        )
    return keras.KerasTensor(tuple(None if size == -1 else size for size in spec.shape), dtype=spec.dtype)


# --------------------------------------------------------------------------- calls

_Call: TypeAlias = "Callable[[_Face, dict[str, Tensor]], Sequence[Tensor]]"


def _tensorflow_call(peer: _Peer, config: bytes, pure: bool) -> _Call:
    """Calls by `remote_op_multi`."""
    from remote_ops.tf.ops import dtype_of, remote_op_multi, shape_of

    options: dict[str, Any] = {} if peer.variable is None else {"endpoint": peer.variable}
    options |= peer.options()
    urls: Any = None if peer.urls is None else list(peer.urls)

    def call(face: _Face, values: dict[str, Tensor]) -> Sequence[Tensor]:
        # With everything said, the op takes every float for differentiable; where that is not so, it asks the server.
        mixed = len({spec.differentiable for spec in face.taken if spec.is_float}) == 2
        return remote_op_multi(
            urls, list(values.values()), list(values), [spec.name for spec in face.given],
            None if mixed else [dtype_of(spec) for spec in face.given],
            [shape_of(spec) for spec in face.given], config, pure=pure, **options,
        )  # fmt: skip

    return call


def _torch_call(peer: _Peer, config: bytes, pure: bool) -> _Call:
    """Calls by a `RemoteModule` for each URL, out of keras' sight: it would take one for a layer with state."""
    from remote_ops.torch import RemoteModule

    modules: dict[tuple[str, ...], Any] = {}

    def call(face: _Face, values: dict[str, Tensor]) -> Sequence[Tensor]:
        urls = peer.addresses()
        module = modules.get(urls)
        if module is None:
            names = [spec.name for spec in face.given]
            made = RemoteModule(list(urls), outputs=names, config=config, pure=pure, **peer.options())
            module = modules.setdefault(urls, made)
        results = module(values)
        return [results[spec.name] for spec in face.given]

    return call


# --------------------------------------------------------------------------- arguments


def _urls(uri: Any) -> tuple[str, ...] | None:
    if isinstance(uri, list | tuple):
        return tuple(uri)
    return None if uri is None else (uri,)


def _specs(given: Any, path: str) -> tuple[TensorSpec, ...] | None:
    if given is None:
        return None
    listed = [given] if isinstance(given, str | TensorSpec) else list(given)
    specs = tuple(parse_spec(spec) if isinstance(spec, str) else spec for spec in listed)
    for spec in specs:
        if not isinstance(spec, TensorSpec):
            raise SpecError(f"expected a TensorSpec or text such as 'x: float32 [-1, 4]', got {spec!r}", path=path)
    if not specs:
        raise SpecError(f"expected all {path} of the model, one or more: got none", path=path)
    return specs


def _names(given: Any, path: str) -> tuple[str, ...] | None:
    if given is None:
        return None
    if isinstance(given, str) or not all(isinstance(name, str) for name in given):
        raise SpecError(f"expected a list of names, got {given!r}", path=path)
    if len({*given}) != len(given):
        raise SpecError(f"a name is there twice: {', '.join(given)}", path=path)
    return tuple(given)


def _bytes(config: Any) -> bytes:
    if not isinstance(config, str | bytes):
        raise SpecError(f"expected text or bytes, got a {type(config).__name__}", path="config")
    return config.encode() if isinstance(config, str) else config


def _described(specs: tuple[TensorSpec, ...] | None) -> list[dict[str, Any]] | None:
    if specs is None:
        return None
    return [
        {
            "name": spec.name,
            "dtype": spec.dtype,
            "shape": None if spec.shape is None else list(spec.shape),
            "differentiable": spec.differentiable,
        }
        for spec in specs
    ]
