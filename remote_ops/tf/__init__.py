"""Remote models in TensorFlow graphs, and TensorFlow models as servables.

The only folder that imports tensorflow.
"""

try:
    import tensorflow as _tensorflow  # noqa: F401
except ImportError as error:
    raise ImportError("remote_ops.tf needs tensorflow: pip install 'remote-ops[tf]'") from error

from remote_ops.tf.library import op_library
from remote_ops.tf.model import TFModel
from remote_ops.tf.ops import remote_op, remote_op_multi

__all__ = ["TFModel", "op_library", "remote_op", "remote_op_multi"]
