"""Remote models as PyTorch modules.

The only folder that imports torch.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("remote_ops.torch needs torch: pip install 'remote-ops[torch]'") from error

from remote_ops.torch.module import RemoteModule

__all__ = ["RemoteModule"]
