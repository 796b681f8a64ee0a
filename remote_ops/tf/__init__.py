"""Remote models in TensorFlow graphs and Keras models, and TensorFlow models as servables.

The only folder that imports tensorflow; importing it imports nothing until a name is asked for, since `RemoteLayer`
needs no tensorflow where Keras runs on PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remote_ops.tf.callsite import Status
    from remote_ops.tf.layer import RemoteLayer
    from remote_ops.tf.library import op_library
    from remote_ops.tf.model import TFModel
    from remote_ops.tf.ops import remote_op, remote_op_multi

__all__ = ["RemoteLayer", "Status", "TFModel", "op_library", "remote_op", "remote_op_multi"]

_HOMES = {
    "RemoteLayer": "layer",
    "Status": "callsite",
    "TFModel": "model",
    "op_library": "library",
    "remote_op": "ops",
    "remote_op_multi": "ops",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    if name != "RemoteLayer":
        try:
            import tensorflow as _tensorflow  # noqa: F401
        except ImportError as error:
            raise ImportError("remote_ops.tf needs tensorflow: pip install 'remote-ops[tf]'") from error
    found = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
