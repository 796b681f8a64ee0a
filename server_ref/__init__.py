"""The reference server: exposes any servable over GraphPipe.

`serve` runs until it is told to stop, `running` for the length of a block; `python -m server_ref --model x.onnx` is the
command. Nothing here knows what a model computes.
"""

from server_ref.connection import Timeouts
from server_ref.lifecycle import running, serve

__all__ = ["Timeouts", "running", "serve"]
