"""`kind: python`: a Python function, or a servable by its Python name."""

from __future__ import annotations

import re
from pathlib import Path as FilePath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ensemble.nodes.function import open_function
from ensemble.nodes.model import ServableSpec
from ensemble.nodes.node import TensorText
from remote_ops.servable import Servable

__all__ = ["PythonSpec"]


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
