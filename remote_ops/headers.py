"""The headers that a caller wants sent with every request; a value is a secret unless it names environment variables.

It sends nothing, and shows no value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from remote_ops.environment import filled, names_variables
from remote_ops.errors import SpecError

__all__ = ["Headers"]

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OURS = {
    *("content-length", "content-type", "host", "transfer-encoding", "connection", "expect", "user-agent"),
    *("x-request-timeout-ms", "inference-header-content-length"),
}


class Headers:
    """Names and values. Values with `${NAME}` are read at each call; the others are neither shown nor pickled.

    Raises:
        SpecError: a name that is ours or none, or a value that is no line of ASCII.
    """

    def __init__(self, values: Mapping[str, str]) -> None:
        for name, value in values.items():
            if not _NAME.fullmatch(name) or name.lower() in _OURS:
                raise SpecError(f"no header of this name can be set: {name!r}", path="headers")
            _check_value(name, value)
        self._values: dict[str, str | None] = dict(values)
        self._settle()

    def _settle(self) -> None:
        self.lowered = frozenset(map(str.lower, self._values))
        known = [(name, value) for name, value in self._values.items() if not (value is None or names_variables(value))]
        self._fixed = tuple(known) if len(known) == len(self._values) else None

    @property
    def names(self) -> list[str]:
        """The names, in order."""
        return sorted(self._values)

    def __bool__(self) -> bool:
        return bool(self._values)

    def resolve(self) -> Sequence[tuple[str, str]]:
        """Names and values as they are to be sent now.

        Raises:
            SpecError: a variable is not set, or a value that was a secret was lost on the way through a pickle.
        """
        if self._fixed is not None:
            return self._fixed
        return [(name, self._resolve(name, value)) for name, value in self._values.items()]

    def _resolve(self, name: str, value: str | None) -> str:
        if value is None:
            raise SpecError(
                f"header '{name}' had a literal value, which is not pickled: write it as '${{NAME}}', to be read from "
                "the environment at each call",
                path="headers",
            )
        resolved = filled(value, f"header '{name}'", "headers")
        _check_value(name, resolved)
        return resolved

    def describe(self) -> dict[str, str | None]:
        """The names, each with its value if that may be written down."""
        return {name: value if names_variables(value) else None for name, value in self._values.items()}

    @classmethod
    def from_description(cls, description: Mapping[str, str | None]) -> Headers:
        """Make headers of what `describe` gave: those that lost their value say so when they are resolved."""
        made = cls({name: value for name, value in description.items() if value is not None})
        made._values = dict(description)
        made._settle()
        return made

    def __getstate__(self) -> dict[str, Any]:
        return self.describe()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._values = state
        self._settle()


def _check_value(name: str, value: str) -> None:
    if not isinstance(value, str):
        raise SpecError(f"header '{name}' has a value that is no text: got a {type(value).__name__}", path="headers")
    if any(char in value for char in "\r\n\0") or not value.isascii():
        raise SpecError(f"header '{name}' has a value with a line end or a character beyond ASCII", path="headers")
