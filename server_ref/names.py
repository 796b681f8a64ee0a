"""What may be said of words that strangers or models wrote: in a log as one line, in a metric as one of few labels, to
a client without the places and secrets of this machine.

It writes nothing itself.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Container, Mapping
from functools import lru_cache

__all__ = ["UNKNOWN", "OneLine", "label_of", "one_line", "without_places"]

UNKNOWN = "_unknown"

# Two or more parts, so that the path of a model in a URL stays; what follows a letter, a colon or a slash is a URL's.
_PLACE = re.compile(r"(?<![\w:/.%+-])~?(?:/[\w.@%+=,-]+){2,}/?|(?<!\w)[A-Za-z]:\\[\w.\\@%+=,-]+")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY", re.IGNORECASE)
_SHORTEST_SECRET = 8


def one_line(text: str, most: int = 300) -> str:
    """Text of at most `most` letters, none of which ends a line or steers a terminal: those are written as escapes."""
    cut = text if len(text) <= most else f"{text[: most - 3]}..."
    if cut.isprintable():
        return cut
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in cut)


def label_of(name: str, known: Container[str]) -> str:
    """The name, if it is known, and else one for all: a metric has no more labels than there are models."""
    return name if name in known else UNKNOWN


def without_places(text: str, env: Mapping[str, str] | None = None) -> str:
    """Text without absolute paths and without the values of variables whose names sound secret.

    Without `env` those are the variables of this process, read anew when there is one more or less: that takes 70 us.
    """
    for value in _own_secrets(len(os.environ)) if env is None else _secrets_in(env):
        text = text.replace(value, "[secret]")
    return _PLACE.sub("[path]", text)


def _secrets_in(env: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(value for name, value in env.items() if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name))


@lru_cache(maxsize=1)
def _own_secrets(count: int) -> tuple[str, ...]:
    return _secrets_in(os.environ)


class OneLine(logging.Formatter):
    """A line for each record; those of a traceback are set in, so that no text in them passes for a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        record.message = one_line(record.message, 2000)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        """The traceback, each line of it set in."""
        text = super().formatException(ei)  # type: ignore[arg-type]
        return "\n".join(f"  | {one_line(line, 500)}" for line in text.splitlines())
