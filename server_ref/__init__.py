"""The reference server: exposes any servable over GraphPipe and the Open Inference Protocol.

`serve` runs until it is told to stop, `running` for the length of a block; `python -m server_ref --model x.onnx` is the
command. `Instances` puts a queue before a model, in this process, `Version` says how one is served. Nothing here knows
what a model computes.
"""

from server_ref.access import Access
from server_ref.batching import Batching
from server_ref.connection import Timeouts
from server_ref.instances import Instances
from server_ref.lanes import QueueLimits
from server_ref.lifecycle import running, serve
from server_ref.model import Version
from server_ref.plane import ControlPlane
from server_ref.tls import Certificates

__all__ = [
    "Access", "Batching", "Certificates", "ControlPlane", "Instances", "QueueLimits", "Timeouts", "Version", "running",
    "serve",
]  # fmt: skip
