"""`RemoteLayer`: a model that lives elsewhere as a layer of a Keras model, on Keras' TensorFlow or PyTorch backend.

It says what goes in and out, and what a saved model keeps; who is called is left to `client`, the call itself to
`callsite`, or on PyTorch to `RemoteModule`. Importing it imports keras, and so the backend that keras is set to, and no
other.

Constant: the client, the options. Changing: the signature, learned once, and then the call made of it; on PyTorch a
module for each URL. All are set by operations that are atomic in CPython.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

try:
    import keras
except ModuleNotFoundError as error:
    if error.name != "keras":  # the backend that keras is set to
        raise
    raise ImportError("remote_ops.tf.RemoteLayer needs keras: pip install 'keras>=3'") from error

from remote_ops.errors import SignatureError, SpecError
from remote_ops.policy import Retry
from remote_ops.signature import Signature, TensorSpec, parse_spec
from remote_ops.tf.client import Client
from remote_ops.tf.unwrapped import unwrapped
from remote_ops.url import TLS

__all__ = ["RemoteLayer"]

Tensor = Any  # of whatever backend
_BACKENDS = ("tensorflow", "torch")


@keras.saving.register_keras_serializable(package="remote_ops")
class RemoteLayer(keras.layers.Layer):  # type: ignore[misc]
    """A model that lives elsewhere, as a layer of a Keras model; gradients with respect to its inputs included.

    It has no weights. Called with one tensor, with a list of them in order, or with a dict of them by name, it gives
    one tensor, a tuple of them where the model has several outputs, or a dict of them where the inputs came as one.

    Args:
        uri: `http://`, `https://` or `http+unix://%2Fpath.sock/model`; a list of them for replicas. A saved model
            holds it in full.
        endpoint: instead of `uri`, the name of an environment variable that holds it, several URLs separated by
            spaces, read where the model runs. A saved model then holds the name only.
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
        on_torch = keras.backend.backend() == "torch"
        self._client = Client.of(uri, headers, retry, endpoint=endpoint, tls=tls, timeout_s=timeout_s, ipv6=on_torch)
        self._bytes = _bytes(config)
        self._face = _Face(
            _specs(inputs, "inputs"), _specs(outputs, "outputs"),
            _names(input_names, "input_names"), _names(output_names, "output_names"), self._client.text,
        )  # fmt: skip
        self._make_call = _torch_call if on_torch else _tensorflow_call
        self._call_model: _Call | None = None

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
            if self._call_model is None:
                self._call_model = self._make_call(self._client, face, self._bytes, self.pure)
            return face.shown(self._call_model(fitted), as_dict)

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
            **_described_client(self._client),
            "input_names": None if face.input_names is None else list(face.input_names),
            "output_names": None if face.output_names is None else list(face.output_names),
            "inputs": _described_specs(face.inputs),
            "outputs": _described_specs(face.outputs),
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
        return f"<RemoteLayer name={self.name}, {self._client.text}{known}>"

    def _known(self) -> _Face:
        if self._face.signature is None:
            self._face = self._face.learned(self._client.ask())
        return self._face


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

_Call: TypeAlias = "Callable[[dict[str, Tensor]], Sequence[Tensor]]"


def _tensorflow_call(client: Client, face: _Face, config: bytes, pure: bool) -> _Call:
    """Calls by one call site, whose specs are the layer's own: the server is not asked for them."""
    import tensorflow as tf

    from remote_ops.tf.callsite import CallSite

    site = CallSite.between(client, face.taken, face.given, config=config, pure=pure, on_error="raise")

    def call(values: dict[str, Tensor]) -> Sequence[Tensor]:
        outputs, _ = site(list(values.values()), client.timeout_s)
        return outputs

    called: _Call = tf.autograph.experimental.do_not_convert(call)
    return called


def _torch_call(client: Client, face: _Face, config: bytes, pure: bool) -> _Call:
    """Calls by a `RemoteModule` for each URL, out of keras' sight: it would take one for a layer with state."""
    from remote_ops.torch import RemoteModule

    names = [spec.name for spec in face.given]
    modules: dict[tuple[str, ...], Any] = {}

    def call(values: dict[str, Tensor]) -> Sequence[Tensor]:
        urls = client.places
        module = modules.get(urls)
        if module is None:
            made = RemoteModule(client.as_endpoint(), outputs=names, config=config, pure=pure)
            module = modules.setdefault(urls, made)
        results = module(values)
        return [results[name] for name in names]

    return call


# --------------------------------------------------------------------------- arguments


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


def _described_client(client: Client) -> dict[str, Any]:
    """What the layer's constructor takes to call alike."""
    return {
        "uri": client.urls[0] if len(client.urls) == 1 else list(client.urls) or None,
        "endpoint": client.endpoint,
        "timeout_s": client.timeout_s,
        "headers": dict(client.headers) or None,
        "tls": client.tls and dataclasses.asdict(client.tls),
        "retry": dataclasses.asdict(client.retry),
    }


def _described_specs(specs: tuple[TensorSpec, ...] | None) -> list[dict[str, Any]] | None:
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
