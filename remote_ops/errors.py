"""Every exception this project raises, and the one table class <-> code <-> HTTP status.

    RemoteOpsError
    ├─ SpecError         (ValueError)      the YAML or an argument is wrong
    ├─ SignatureError    (ValueError)      names, dtype or shape do not fit; found before any network
    ├─ CodecError        (ValueError)
    │  ├─ EncodeError                      this value has no form on the wire
    │  └─ DecodeError                      these bytes are no valid message
    ├─ TransportError
    │  ├─ ConnectError   (ConnectionError) nobody answered at the address; the request was not sent
    │  ├─ ConnectionLost (ConnectionError) the connection ended before the answer did
    │  ├─ DeadlineExceeded (TimeoutError)  the time ran out
    │  ├─ FramingError                     the peer does not speak HTTP/1.1
    │  └─ BadStatus                        an HTTP status, and a body that is no GraphPipe message
    ├─ RemoteError                         the peer answered with an error
    │  └─ ModelNotFound · ModelUnavailable · Overloaded · InvalidRequest · NotDifferentiable · InternalError
    └─ NodeError                           a node of an ensemble failed; `__cause__` says why

It raises nothing itself and knows nothing of sockets, arrays or frameworks.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

__all__ = [
    "BadStatus",
    "CodecError",
    "ConnectError",
    "ConnectionLost",
    "DeadlineExceeded",
    "DecodeError",
    "EncodeError",
    "FramingError",
    "InternalError",
    "InvalidRequest",
    "ModelNotFound",
    "ModelUnavailable",
    "NodeError",
    "NotDifferentiable",
    "Overloaded",
    "RemoteError",
    "RemoteOpsError",
    "SignatureError",
    "SpecError",
    "TransportError",
]


class RemoteOpsError(Exception):
    """The root of every exception of this project.

    `retryable` says whether the same call may succeed on another try or another replica, `retry_after_s` in how many
    seconds, where the server has said so.
    """

    retryable: ClassVar[bool] = False
    retry_after_s: float | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[RemoteOpsError], args: tuple[Any, ...], state: dict[str, Any]) -> RemoteOpsError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class SpecError(RemoteOpsError, ValueError):
    """An argument or a specification is wrong; `.path` is its place, such as `fraud.yaml:14` or an argument's name."""

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(f"{message} - at {path}" if path else message)
        self.path = path


class SignatureError(RemoteOpsError, ValueError):
    """A name, dtype or shape does not fit a signature; found before any byte is sent.

    `.name` is the input or output, `.expected` and `.got` are what was wanted and what came, as text.
    """

    def __init__(self, message: str, *, name: str = "", expected: str = "", got: str = "", at: str = "") -> None:
        super().__init__(f"{message} - at {at}" if at else message)
        self.name = name
        self.expected = expected
        self.got = got


class CodecError(RemoteOpsError, ValueError):
    """Bytes and arrays could not be turned into each other."""


class EncodeError(CodecError):
    """This value has no form on the wire; `.dtype` and `.shape` describe it."""

    def __init__(self, message: str, *, dtype: str = "", shape: tuple[int, ...] | None = None) -> None:
        super().__init__(message)
        self.dtype = dtype
        self.shape = shape


class DecodeError(CodecError):
    """These bytes are no valid message; `.offset` is the byte where that showed, `.limit` the bound it broke."""

    def __init__(self, message: str, *, offset: int = 0, limit: int | None = None) -> None:
        super().__init__(f"{message} - at byte {offset}")
        self.message = message
        self.offset = offset
        self.limit = limit


class TransportError(RemoteOpsError):
    """The bytes did not make the round trip."""


class ConnectError(TransportError, ConnectionError):
    """No connection could be made, so the request was not sent."""

    retryable = True


class ConnectionLost(TransportError, ConnectionError):
    """The connection ended before the answer was complete."""

    retryable = True


class DeadlineExceeded(TransportError, TimeoutError):
    """The deadline passed before the answer was there; the message names the phase it passed in."""


class FramingError(TransportError):
    """The peer's bytes are not the HTTP/1.1 we accept; `.status` is what a server answers to them."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class BadStatus(TransportError):
    """An HTTP status other than 2xx, or a 2xx whose body is no message of the protocol; `.status` is its number."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class RemoteError(RemoteOpsError):
    """The peer understood the call and answered with an error: `.code`, `.message`, and `.endpoint`, who said so."""

    def __init__(self, message: str, *, code: int | None = None, endpoint: str = "") -> None:
        super().__init__(f"{message} - from {endpoint}" if endpoint else message)
        self.message = message
        self.code = code_of(type(self)) if code is None else code
        self.endpoint = endpoint


class ModelNotFound(RemoteError):
    """The server has no model of that name or version."""


class ModelUnavailable(RemoteError):
    """The model exists but does not answer now: it is loading, draining or crashed."""

    retryable = True


class Overloaded(RemoteError):
    """The server's queue is full."""

    retryable = True


class InvalidRequest(RemoteError):
    """The server refused the request itself: names, dtypes, shapes or framing."""


class NotDifferentiable(RemoteError):
    """The model gives no gradient for what was asked."""


class InternalError(RemoteError):
    """The model raised, or broke its own signature."""


class NodeError(RemoteOpsError):
    """A node of an ensemble failed: `.node` of `.graph`; `__cause__` says why."""

    def __init__(self, message: str, *, node: str, graph: str = "") -> None:
        super().__init__(message)
        self.node = node
        self.graph = graph


class ErrorRow(NamedTuple):
    """How an error class travels: its numeric code in the body, its HTTP status on the head."""

    error: type[RemoteOpsError]
    code: int
    status: int


# The codes are the canonical ones of gRPC, which TensorFlow's status codes share.
ANSWERS = (
    ErrorRow(InvalidRequest, 3, 400),
    ErrorRow(DeadlineExceeded, 4, 504),
    ErrorRow(ModelNotFound, 5, 404),
    ErrorRow(Overloaded, 8, 429),
    ErrorRow(NotDifferentiable, 12, 501),
    ErrorRow(InternalError, 13, 500),
    ErrorRow(ModelUnavailable, 14, 503),
)
_BY_CLASS = {answer.error: answer for answer in ANSWERS}
_BY_CODE = {answer.code: answer for answer in ANSWERS}
_OF_A_NODE = (DeadlineExceeded, Overloaded, ModelUnavailable, NotDifferentiable)  # so of the graph as well
_REFUSED = (SignatureError, CodecError, SpecError, FramingError)


def answer_of(error: BaseException) -> ErrorRow:
    """Say how a server answers `error`; whatever is not listed is an internal error."""
    if isinstance(error, NodeError) and isinstance(error.__cause__, _OF_A_NODE):
        error = error.__cause__
    if isinstance(error, _REFUSED):
        return _BY_CLASS[InvalidRequest]
    for cls in type(error).__mro__:
        if cls in _BY_CLASS:
            return _BY_CLASS[cls]
    return _BY_CLASS[InternalError]


def brief(error: BaseException) -> str:
    """Say what a log or a trace may say of an error: its class, and never what a peer wrote, which may be anything."""
    name = type(error).__name__
    if isinstance(error, ConnectError | ConnectionLost):
        return f"{name}: {str(error).partition(' - at ')[0]}"
    return f"{name} ({error.status})" if isinstance(error, BadStatus) else name


def code_of(cls: type[RemoteOpsError]) -> int:
    """Give the numeric code of an error class; 0 where it has none."""
    answer = _BY_CLASS.get(cls)
    return answer.code if answer else 0


def from_answer(code: int, message: str, *, endpoint: str) -> RemoteOpsError:
    """Build the exception for an error that `endpoint` answered with; an unknown code gives a plain `RemoteError`."""
    answer = _BY_CODE.get(code)
    if answer is None:
        return RemoteError(message, code=code, endpoint=endpoint)
    if issubclass(answer.error, RemoteError):
        return answer.error(message, code=code, endpoint=endpoint)
    return answer.error(f"{message} - from {endpoint}")
