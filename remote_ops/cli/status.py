"""How a command ends: the status for the shell, and one line on stderr where something went wrong.

It runs nothing but what it is given.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from remote_ops.cli import text
from remote_ops.errors import EncodeError, RemoteOpsError, SignatureError, SpecError

__all__ = ["status_of"]

_ARGUMENTS = (SpecError, SignatureError, EncodeError)
_INTERRUPTED, _NOBODY_READS = 130, 141  # what a shell says of a process that SIGINT or SIGPIPE ended


def status_of(command: Callable[[], int]) -> int:
    """Run a command: its own status, 2 if its arguments are wrong, 1 if anything else is; never a traceback of ours."""
    try:
        try:
            return command()
        finally:
            print(end="", flush=True)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except RemoteOpsError as error:
        print(text.printable(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 2 if isinstance(error, _ARGUMENTS) else 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more to write there
        return _NOBODY_READS
    except (OSError, MemoryError) as error:  # a disk that is full
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
