"""Call a model on another machine as if it were a layer of this one.

The front door: what stands here is what users import. Frameworks come in by their own doors, `remote_ops.torch` and
`remote_ops.tf`; importing this one imports none of them.
"""

import logging

from remote_ops.client import Endpoint
from remote_ops.deadline import Deadline
from remote_ops.errors import (
    BadStatus,
    CodecError,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    EncodeError,
    FramingError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    NodeError,
    NotDifferentiable,
    Overloaded,
    RemoteError,
    RemoteOpsError,
    SignatureError,
    SpecError,
    TransportError,
)
from remote_ops.policy import Breaker, Hedge, Retry
from remote_ops.servable import FunctionServable, Servable, load
from remote_ops.signature import Signature, TensorSpec
from remote_ops.transport import RequestsTransport
from remote_ops.url import TLS

__version__ = "0.1.0"

logging.getLogger("remote_ops").addHandler(logging.NullHandler())  # silent, unless the program wants to hear

__all__ = [
    "TLS",
    "BadStatus",
    "Breaker",
    "CodecError",
    "ConnectError",
    "ConnectionLost",
    "Deadline",
    "DeadlineExceeded",
    "DecodeError",
    "EncodeError",
    "Endpoint",
    "FramingError",
    "FunctionServable",
    "Hedge",
    "InternalError",
    "InvalidRequest",
    "ModelNotFound",
    "ModelUnavailable",
    "NodeError",
    "NotDifferentiable",
    "Overloaded",
    "RemoteError",
    "RemoteOpsError",
    "RequestsTransport",
    "Retry",
    "Servable",
    "Signature",
    "SignatureError",
    "SpecError",
    "TensorSpec",
    "TransportError",
    "load",
]
