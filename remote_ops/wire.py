"""How a model is spoken to: which protocol a URL means, what a call is in it, and how its answer is read.

It joins a codec with `replies`, and sends nothing. GraphPipe, unless the path of the URL ends in `/v2/models/NAME` or
`/v2/models/NAME/versions/V`: that is the Open Inference Protocol.

State of `OipWire`: `_binary`, whether the server takes binary tensors; None until an answer tells. Writes are atomic,
and whoever reads an old value makes one request more.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy.typing as npt

from remote_ops import graphpipe, oip
from remote_ops.errors import BadStatus, EncodeError, InvalidRequest, RemoteOpsError, SpecError
from remote_ops.replies import metadata_of, oip_metadata_of, oip_results_of, results_of
from remote_ops.signature import TensorSpec
from remote_ops.transport import Reply
from remote_ops.url import Url

__all__ = ["Ask", "GraphPipeWire", "OipWire", "Wire", "speaks_oip", "wire_of"]

log = logging.getLogger("remote_ops")
Array = npt.NDArray[Any]
Buffer: TypeAlias = "bytes | bytearray | memoryview"


class Ask(NamedTuple):
    """What is sent to an address of an endpoint: `aim` says where there; `read` takes the reply and the address's text.

    `runs` says whether the model runs for it: only then is it hedged, and tells how quick a replica is. `otherwise`
    makes the same call in a plainer form, for a server that refuses this one.
    """

    aim: Callable[[Url], Url]
    headers: tuple[tuple[str, str], ...]
    body: Sequence[Buffer]
    read: Callable[[Reply, str], Any]
    runs: bool = True
    otherwise: Callable[[], Ask] | None = None

    def plainer(self, error: RemoteOpsError) -> Ask:
        """The plainer form, after `error`; raises that where there is none, or where it is no refusal of this form."""
        refused = isinstance(error, InvalidRequest) or (isinstance(error, BadStatus) and error.status == 500)
        if self.otherwise is None or not refused:
            raise error
        try:
            return self.otherwise()
        except EncodeError as reason:
            raise error from reason


class Wire(Protocol):
    """A protocol, as one endpoint speaks it."""

    def metadata(self) -> Ask:
        """Ask what the model takes and gives; reading gives a `Signature`."""

    def infer(self, arrays: Mapping[str, Array], wanted: Sequence[TensorSpec], config: bytes) -> Ask:
        """Ask for outputs; reading gives them by name, in the order wanted, each as its spec says."""


def wire_of(urls: Sequence[Url]) -> Wire:
    """The protocol that the addresses of an endpoint mean.

    Raises:
        SpecError: they mean two, or one is no address of a model.
    """
    told = {speaks_oip(url) for url in urls}
    if len(told) > 1:
        raise SpecError(
            "replicas speak one protocol: got URLs of GraphPipe and of the Open Inference Protocol", path="url"
        )
    return OipWire() if told.pop() else GraphPipeWire()


_MODEL = re.compile(r".*/v2/models/[^/]+(/versions/[^/]+)?/?")


def speaks_oip(url: Url) -> bool:
    """Whether a model there is spoken to by the Open Inference Protocol.

    Raises:
        SpecError: a path below that of a model, such as `.../infer`.
    """
    path = url.target.partition("?")[0]
    if "/v2/models/" not in path:
        return False
    if not _MODEL.fullmatch(path):
        raise SpecError(f"expected .../v2/models/NAME or .../v2/models/NAME/versions/V, got {url.text!r}", path="url")
    return True


# --------------------------------------------------------------------------- GraphPipe


def _there(url: Url) -> Url:
    return url


class GraphPipeWire:
    """GraphPipe: every message is a POST to the address itself."""

    def metadata(self) -> Ask:
        """Ask what the model takes and gives; reading gives a `Signature`."""
        return Ask(_there, (), [graphpipe.METADATA_REQUEST], metadata_of, runs=False)

    def infer(self, arrays: Mapping[str, Array], wanted: Sequence[TensorSpec], config: bytes) -> Ask:
        """Ask for outputs; reading gives them by name."""
        names = tuple([spec.name for spec in wanted])
        body = graphpipe.encode_request(tuple(arrays), list(arrays.values()), names, config)
        return Ask(_there, (), body, lambda reply, url: results_of(reply, url, wanted))


# --------------------------------------------------------------------------- Open Inference Protocol


class OipWire:
    """Open Inference Protocol v2: metadata by GET, inference by POST to `.../infer`.

    Tensors go in binary form. Whether a server takes that no metadata tell (KServe does, and does not say so), but its
    first answer: where it refuses (400, 415, 422; or 500 without the protocol's words, as MLServer fails to read what
    is no text), the model did not run, and the same call goes as JSON; if that is answered, so does every other.
    Replies are read in whichever form they have.
    """

    def __init__(self) -> None:
        self._binary: bool | None = None

    def metadata(self) -> Ask:
        """Ask what the model takes and gives; reading gives a `Signature`."""
        return Ask(partial(_aimed, "", "GET", ""), (), [], oip_metadata_of, runs=False)

    def infer(self, arrays: Mapping[str, Array], wanted: Sequence[TensorSpec], config: bytes) -> Ask:
        """Ask for outputs; reading gives them by name."""
        if self._binary is False:
            return self._ask(arrays, wanted, config, binary=False)
        ask = self._ask(arrays, wanted, config, binary=True)
        if self._binary:
            return ask
        return ask._replace(otherwise=lambda: self._ask(arrays, wanted, config, binary=False))

    def _ask(self, arrays: Mapping[str, Array], wanted: Sequence[TensorSpec], config: bytes, *, binary: bool) -> Ask:
        names = tuple([spec.name for spec in wanted])
        message = oip.encode_request(tuple(arrays), list(arrays.values()), names, config, binary=binary)

        def read(reply: Reply, url: str) -> dict[str, Array]:
            results = oip_results_of(reply, url, wanted)
            if self._binary is None and not binary:
                log.info("%s takes tensors as JSON only: it refused them in binary form", url)
            self._binary = binary
            return results

        aim = partial(_aimed, "/infer", "POST", message.content_type)
        return Ask(aim, message.headers, message.buffers, read)


@lru_cache(maxsize=1024)
def _aimed(suffix: str, method: str, content_type: str, url: Url) -> Url:
    return url.below(suffix, method, content_type)
