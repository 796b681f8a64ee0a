"""`python -m remote_ops.tf.build` builds the kernel of the ops ahead of time and prints where it is.

It does nothing else: `library` builds.
"""

from __future__ import annotations

from remote_ops.tf.library import BuildError, op_library

__all__ = ["BuildError", "op_library"]

if __name__ == "__main__":
    print(op_library())
