"""Remote models as PyTorch modules, and PyTorch modules as servables.

The only folder that imports torch.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("remote_ops.torch needs torch: pip install 'remote-ops[torch]'") from error

from remote_ops.torch.model import TorchModel
from remote_ops.torch.module import RemoteModule, Started, remote
from remote_ops.torch.parallel import Parallel

__all__ = ["Parallel", "RemoteModule", "Started", "TorchModel", "remote"]
