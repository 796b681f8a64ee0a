"""What a model takes and gives: ordered, named, typed inputs and outputs, and the table of dtypes.

It checks arrays against itself; it knows nothing of messages, sockets or frameworks.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from remote_ops.errors import NotDifferentiable, SignatureError, SpecError

__all__ = ["DTYPES", "DType", "Signature", "TensorSpec", "describe", "did_you_mean", "parse_spec"]

Array = npt.NDArray[Any]
MAX_RANK = 32
STRING_TYPE = 12
_SPEC = re.compile(r"\s*(?P<name>\S(?:.*\S)?)\s*:\s*(?P<dtype>\w+)\s*\[(?P<sizes>[-\d\s,]*)\]\s*")


class DType(NamedTuple):
    """One row of the dtype table.

    `wire_type` is the number in a Tensor; `stored` is the numpy dtype that number means, which differs from `numpy`
    for the types that travel as bit views.
    """

    name: str
    numpy: np.dtype[Any]
    wire_type: int
    stored: np.dtype[Any]

    @property
    def is_bit_view(self) -> bool:
        """Whether the wire knows it only as an unsigned integer of the same size."""
        return self.numpy != self.stored


def _row(name: str, wire_type: int, numpy: Any, stored: Any = None) -> DType:
    numpy = np.dtype(numpy)
    return DType(name, numpy, wire_type, numpy if stored is None else np.dtype(stored))


_FLOAT8 = sorted(name for name in dir(ml_dtypes) if name.startswith("float8_"))
DTYPES: dict[str, DType] = {
    row.name: row
    for row in (
        _row("uint8", 1, np.uint8),
        _row("int8", 2, np.int8),
        _row("uint16", 3, np.uint16),
        _row("int16", 4, np.int16),
        _row("uint32", 5, np.uint32),
        _row("int32", 6, np.int32),
        _row("uint64", 7, np.uint64),
        _row("int64", 8, np.int64),
        _row("float16", 9, np.float16),
        _row("float32", 10, np.float32),
        _row("float64", 11, np.float64),
        _row("string", STRING_TYPE, object),
        _row("bool", 1, np.bool_, np.uint8),
        _row("bfloat16", 3, ml_dtypes.bfloat16, np.uint16),
        *(_row(name, 1, getattr(ml_dtypes, name), np.uint8) for name in _FLOAT8),
    )
}
BY_NUMPY: dict[np.dtype[Any], DType] = {row.numpy: row for row in DTYPES.values()}
STORED: dict[int, np.dtype[Any]] = {row.wire_type: row.stored for row in DTYPES.values() if not row.is_bit_view}
# What a 2018 peer may send as float32, since its enum has no such type.
_CAST_FROM_FLOAT32 = frozenset({"bfloat16", *_FLOAT8})


def describe(array: Array) -> str:
    """Say dtype and shape of an array, as every message of this project does: `float32 [8, 3]`."""
    row = BY_NUMPY.get(array.dtype)
    return f"{row.name if row else array.dtype.name} {list(array.shape)}"


def _loses(natural: Array, wanted: np.dtype[Any] | None) -> bool:
    """Whether Python numbers would lose what they are as `wanted`: 1.7 as an int64, '3.5' as a float32."""
    if wanted is None or wanted.kind == "O" or not natural.size:
        return False
    return natural.dtype.kind in "SU" or (natural.dtype.kind in "fc" and wanted.kind in "iub")


def _dtype_name(dtype: Any) -> str:
    if isinstance(dtype, str) and (dtype in DTYPES or dtype == "any"):
        return dtype
    try:
        row = BY_NUMPY.get(np.dtype(dtype).newbyteorder("=")) if dtype is not None else None
    except (TypeError, ValueError, SyntaxError):  # numpy reads "f4,,f4" as Python
        row = None
    if row is None:
        raise SpecError(f"no dtype {dtype!r}: expected one of {', '.join(DTYPES)}", path="dtype")
    return row.name


def _usable_shape(name: str, sizes: Iterable[Any]) -> tuple[int, ...]:
    try:
        shape = tuple(operator.index(size) for size in sizes)
    except TypeError:
        shape = None
    if shape is None or len(shape) > MAX_RANK or not all(-1 <= size < 2**63 for size in shape):
        raise SpecError(f"'{name}' has no usable shape {sizes!r}: at most 32 sizes, each a whole number, -1 or more")
    return shape


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of one input or output.

    Args:
        name: how callers name it.
        dtype: a name of `DTYPES`, or anything numpy takes for one; `any` for a peer that does not say.
        shape: sizes per axis, -1 = any size; None for a peer that does not say.
        description: free text for people.
        differentiable: whether the model can give a gradient with respect to it (inputs only).

    Raises:
        SpecError: no such dtype, a size below -1, or more than 32 axes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    description: str = ""
    differentiable: bool = False
    _numpy: np.dtype[Any] | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        name = _dtype_name(self.dtype)
        object.__setattr__(self, "dtype", name)
        object.__setattr__(self, "_numpy", DTYPES[name].numpy if name != "any" else None)
        if self.shape is not None:
            object.__setattr__(self, "shape", _usable_shape(self.name, self.shape))

    def __str__(self) -> str:
        return f"{self.dtype} {'of any shape' if self.shape is None else list(self.shape)}"

    @property
    def is_float(self) -> bool:
        """Whether it holds real numbers, so that a derivative means something; a peer that does not say may."""
        return self.dtype == "any" or "float" in self.dtype

    def accepts_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape fits."""
        mine = self.shape
        if mine is None or mine == shape:
            return True
        if len(mine) != len(shape):
            return False
        for wanted, size in zip(mine, shape):  # noqa: B905, SIM110 (a plain loop: this runs for every tensor)
            if wanted != size and wanted != -1:
                return False
        return True

    def fit(self, value: Any, *, kind: str = "input", at: str = "") -> Array:
        """Give a caller's value as an array that fits this spec.

        A Python number, list or string takes the spec's dtype; an array keeps its own, which must be the spec's
        (float32 stands in for bfloat16 and the float8 kinds). Costs a copy only for a cast or a foreign byte order.

        Raises:
            SignatureError: dtype or shape do not fit.
        """
        if not isinstance(value, np.ndarray):
            value = self._from_python(value, kind, at)
        if value.dtype != self._numpy and self._numpy is not None:
            value = self._cast(value, kind, at)
        if value.shape != self.shape and not self.accepts_shape(value.shape):
            raise self._misfit(value, kind, at)
        return value  # type: ignore[no-any-return]

    def view(self, array: Array, *, kind: str = "input", at: str = "") -> Array:
        """Give an array as it came off the wire in this spec's dtype: the bit views, without a copy.

        Raises:
            SignatureError: dtype or shape do not fit, or a bool that is neither 0 nor 1.
        """
        if array.dtype != self._numpy and self._numpy is not None:
            row = DTYPES[self.dtype]
            if array.dtype != row.stored:
                return self.fit(array, kind=kind, at=at)
            if self.dtype == "bool" and array.size and array.max() > 1:
                raise SignatureError(
                    f"{kind} '{self.name}': expected bool, each 0 or 1, got a byte {int(array.max())}",
                    name=self.name, expected=str(self), got=describe(array), at=at,
                )  # fmt: skip
            array = array.view(row.numpy)
        if array.shape != self.shape and not self.accepts_shape(array.shape):
            raise self._misfit(array, kind, at)
        return array

    def _from_python(self, value: Any, kind: str, at: str) -> Array:
        try:
            natural = np.asarray(value)
            if _loses(natural, self._numpy):
                raise self._misfit(natural, kind, at)
            return np.asarray(value, dtype=self._numpy)
        except SignatureError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            got = type(value).__name__
            raise SignatureError(
                f"{kind} '{self.name}': expected {self}, got a {got} that is no such array ({error})",
                name=self.name, expected=str(self), got=got, at=at,
            ) from error  # fmt: skip

    def _cast(self, array: Array, kind: str, at: str) -> Array:
        if self.dtype == "string" and array.dtype.kind in "OSUT":
            return array
        if array.dtype.newbyteorder("=") == self._numpy or (
            self.dtype in _CAST_FROM_FLOAT32 and array.dtype == np.float32
        ):
            return array.astype(self._numpy)
        raise self._misfit(array, kind, at)

    def _misfit(self, array: Array, kind: str, at: str) -> SignatureError:
        got = describe(array)
        return SignatureError(
            f"{kind} '{self.name}': expected {self}, got {got}", name=self.name, expected=str(self), got=got, at=at
        )


def parse_spec(text: str) -> TensorSpec:
    """Read a spec as this project prints it: `x: float32 [-1, 1024]`; -1 is any size, `[]` a scalar.

    Raises:
        SpecError: it is none.
    """
    match = _SPEC.fullmatch(text)
    try:
        if match is not None:
            sizes = [int(size) for size in match["sizes"].split(",")] if match["sizes"].strip() else []
            if match["dtype"] in DTYPES:  # numpy knows other names, and its `float` is a float64
                return TensorSpec(match["name"], match["dtype"], tuple(sizes))
            raise SpecError(f"no dtype '{match['dtype']}': expected one of {', '.join(DTYPES)}", path="inputs, outputs")
    except ValueError as error:
        if isinstance(error, SpecError):
            raise
    raise SpecError(f"expected a spec such as 'x: float32 [-1, 1024]', got {text!r}", path="inputs, outputs")


@dataclass(frozen=True)
class Signature:
    """Ordered, named, typed inputs and outputs of a model, and what it says of itself.

    Args:
        inputs: in the order of positional arguments.
        outputs: in the order of the returned tuple.
        name, version, server, description: free text of the model and of who serves it.
        features: what it can do beyond plain inference, such as `vjp`.

    Raises:
        SpecError: two inputs or two outputs share a name.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    name: str = ""
    version: str = ""
    server: str = ""
    description: str = ""
    features: tuple[str, ...] = ()
    _inputs: dict[str, TensorSpec] = field(init=False, repr=False, compare=False)
    _outputs: dict[str, TensorSpec] = field(init=False, repr=False, compare=False)
    _cotangents: dict[str, TensorSpec] = field(init=False, repr=False, compare=False)
    _gradients: dict[str, TensorSpec] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for attribute in ("inputs", "outputs"):
            specs = tuple(getattr(self, attribute))
            by_name = {spec.name: spec for spec in specs}
            if len(by_name) != len(specs):
                raise SpecError(f"two {attribute} share a name: {', '.join(spec.name for spec in specs)}")
            object.__setattr__(self, attribute, specs)
            object.__setattr__(self, f"_{attribute}", by_name)
        gradients = _prefixed("gradient:", [spec for spec in self.inputs if spec.differentiable])
        cotangents = _prefixed("cotangent:", [spec for spec in self.outputs if spec.is_float] if gradients else [])
        object.__setattr__(self, "_gradients", gradients)
        object.__setattr__(self, "_cotangents", cotangents)

    def __str__(self) -> str:
        def side(specs: Iterable[TensorSpec]) -> str:
            return ", ".join(f"{spec.name}: {spec}" for spec in specs)

        return f"({side(self.inputs)}) -> ({side(self.outputs)})"

    def bind(self, values: Sequence[Any], *, at: str = "") -> dict[str, Any]:
        """Name positional values by the order of the inputs.

        Raises:
            SignatureError: too few or too many.
        """
        if len(values) != len(self.inputs):
            names = ", ".join(spec.name for spec in self.inputs)
            raise SignatureError(
                f"expected {len(self.inputs)} inputs ({names}), got {len(values)}",
                expected=str(len(self.inputs)), got=str(len(values)), at=at,
            )  # fmt: skip
        return {spec.name: value for spec, value in zip(self.inputs, values, strict=True)}

    def fit_inputs(self, values: Mapping[str, Any], *, at: str = "") -> dict[str, Array]:
        """Check a caller's named values and give them as arrays, in the order of the inputs.

        For a vector-Jacobian product they may hold `cotangent:<output>` too, of the dtype and shape of that output.

        Raises:
            SignatureError: an unknown or missing name, or a value that does not fit.
            NotDifferentiable: a cotangent, for a model that gives no gradients.
        """
        return {spec.name: spec.fit(values[spec.name], at=at) for spec in self._specs_of(values, at)}

    def view_inputs(self, arrays: Mapping[str, Array], *, at: str = "") -> dict[str, Array]:
        """The same for arrays that came off the wire: bit views become their real dtype."""
        return {spec.name: spec.view(arrays[spec.name], at=at) for spec in self._specs_of(arrays, at)}

    def select_outputs(self, names: Sequence[str] | None, *, at: str = "") -> tuple[TensorSpec, ...]:
        """The specs of the outputs asked for, in the order asked for; all of them for None.

        `gradient:<input>` asks for the gradient with respect to that input, of its dtype and shape.

        Raises:
            SignatureError: an unknown name, or one asked for twice.
            NotDifferentiable: the gradient of an input that the model cannot differentiate.
        """
        if names is None:
            return self.outputs
        if isinstance(names, str) or not names:
            raise SignatureError(
                f"expected a list of output names, or None for all: got {names!r}", got=repr(names), at=at
            )
        specs = tuple(self._outputs[name] for name in names if name in self._outputs)
        if len(specs) != len(names):
            known = self._outputs | self._gradients
            if unknown := [name for name in names if name not in known]:
                raise self._unknown_output(unknown[0], at)
            specs = tuple(known[name] for name in names)
        if len(set(names)) != len(names):
            raise SignatureError(f"an output is asked for twice: {', '.join(names)}", got=", ".join(names), at=at)
        return specs

    def fit_outputs(
        self, results: Mapping[str, Any], wanted: Sequence[TensorSpec], *, at: str = ""
    ) -> dict[str, Array]:
        """Check what a model returned against what was asked of it.

        Raises:
            SignatureError: an output is missing, or its dtype or shape is not the declared one.
        """
        fitted = {}
        for spec in wanted:
            if spec.name not in results:
                got = ", ".join(results) or "nothing"
                raise SignatureError(
                    f"output '{spec.name}': expected {spec}, got no such output but {got}",
                    name=spec.name, expected=str(spec), got=got, at=at,
                )  # fmt: skip
            fitted[spec.name] = spec.fit(results[spec.name], kind="output", at=at)
        return fitted

    def _specs_of(self, values: Mapping[str, Any], at: str) -> Sequence[TensorSpec]:
        """The specs of a call's values: every input, and the cotangents that are there."""
        if len(values) == len(self._inputs) and values.keys() == self._inputs.keys():
            return self.inputs
        cotangents = [spec for name, spec in self._cotangents.items() if name in values]
        if len(values) == len(self._inputs) + len(cotangents) and values.keys() >= self._inputs.keys():
            return [*self.inputs, *cotangents]
        raise self._wrong_names(values, at)

    def _wrong_names(self, values: Mapping[str, Any], at: str) -> Exception:
        expected = ", ".join(self._inputs)
        for name in values:
            if name.startswith("cotangent:") and name not in self._cotangents:
                return self._unknown_cotangent(name, at)
            if name not in self._inputs and name not in self._cotangents:
                return SignatureError(
                    f"no input '{name}': expected {expected}{did_you_mean(name, self._inputs)}",
                    name=name, expected=expected, got=", ".join(values), at=at,
                )  # fmt: skip
        missing = ", ".join(f"'{spec.name}' ({spec})" for spec in self.inputs if spec.name not in values)
        return SignatureError(f"missing input {missing}", expected=expected, got=", ".join(values), at=at)

    def _unknown_cotangent(self, name: str, at: str) -> Exception:
        if not self._gradients:
            return NotDifferentiable(f"model '{self.name}' gives no gradients, so it takes no '{name}'", endpoint=at)
        spec = self._outputs.get(name.removeprefix("cotangent:"))
        if spec is not None:
            return NotDifferentiable(
                f"output '{spec.name}' of model '{self.name}' is {spec}: only floats have cotangents", endpoint=at
            )
        expected = ", ".join(self._cotangents)
        return SignatureError(
            f"no output for '{name}': expected some of {expected}{did_you_mean(name, self._cotangents)}",
            name=name, expected=expected, got=name, at=at,
        )  # fmt: skip

    def _unknown_output(self, name: str, at: str) -> Exception:
        source = name.removeprefix("gradient:")
        if source != name and (source in self._inputs or not self._gradients):
            can = ", ".join(key.removeprefix("gradient:") for key in self._gradients)
            only = f", only with respect to {can}" if can else ""
            return NotDifferentiable(
                f"model '{self.name}' gives no gradient with respect to input '{source}'{only}", endpoint=at
            )
        expected = ", ".join(self._outputs)
        return SignatureError(
            f"no output '{name}': expected one of {expected}{did_you_mean(name, self._outputs | self._gradients)}",
            name=name, expected=expected, got=name, at=at,
        )  # fmt: skip


def _prefixed(prefix: str, specs: Iterable[TensorSpec]) -> dict[str, TensorSpec]:
    """The specs of what goes with inputs or outputs in a vector-Jacobian product, by name."""
    return {prefix + spec.name: TensorSpec(prefix + spec.name, spec.dtype, spec.shape) for spec in specs}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown name: the known one that is most like it, if one is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
