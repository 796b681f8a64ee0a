"""`${NAME}` in a text: an environment variable, read where it is needed, so that no secret is written down.

It reads the environment, and keeps nothing.
"""

from __future__ import annotations

import os
import re

from remote_ops.errors import SpecError

__all__ = ["filled", "names_variables"]

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def names_variables(text: str | None) -> bool:
    """Whether there is a variable in it."""
    return bool(text and _VARIABLE.search(text))


def filled(text: str, whose: str, path: str) -> str:
    """The text with the value of each variable in its place.

    Raises:
        SpecError: one is not set; `whose` text this is, and the `path` of the argument that holds it.
    """

    def value(match: re.Match[str]) -> str:
        try:
            return os.environ[match[1]]
        except KeyError:
            raise SpecError(f"{whose} needs the environment variable {match[1]}, which is not set", path=path) from None

    return _VARIABLE.sub(value, text)
