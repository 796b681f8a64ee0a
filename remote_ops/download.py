"""Model files from http and https addresses, kept in a folder under a digest of the URL.

It knows no model formats, and shows neither the query nor the user of a URL: those hold secrets.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import parse_qs, unquote, urldefrag, urlsplit

from remote_ops.errors import BadStatus, ConnectError, ConnectionLost, SpecError, TransportError

if TYPE_CHECKING:
    from requests import RequestException, Response, Session

__all__ = ["cache_folder", "check_sha256", "fetch"]

MAX_BYTES = 20 * 2**30
CHUNK_BYTES = 1 << 20


def fetch(
    url: str,
    *,
    sha256: str | None = None,
    max_bytes: int = MAX_BYTES,
    connect_timeout_s: float = 10.0,
    read_timeout_s: float = 60.0,
    session: Session | None = None,
) -> Path:
    """Give the path of a file from the web, downloading it unless it is kept already.

    Args:
        url: an http or https address; `#sha256=<hex>` at its end is the same as `sha256`.
        sha256: 64 hex digits that the file must have; without it a kept file is never compared with anything.
        max_bytes: most bytes to accept, 20 GiB unless said.
        connect_timeout_s: most seconds until there is a connection.
        read_timeout_s: most seconds between two pieces of the body.
        session: sends the requests, those of redirects included; a plain one unless said. What it raises that is no
            error of `requests` reaches the caller.

    Raises:
        SpecError: no such scheme, no such digest, or the file has another digest; then it is not kept.
        BadStatus: the server answered with anything but 200.
        ConnectError, ConnectionLost: nobody answered, or the file came incomplete; then nothing is kept.
        TransportError: it is larger than `max_bytes`, https led to http, or the file could not be written.

    Reads a kept file once where a digest is given. Safe from several processes at once: each writes a file of its
    own, and the last to finish names it.
    """
    url, expected = _pinned(url, sha256)
    shown = _shown(url)
    path = cache_folder() / _file_name(url)
    if path.exists():
        if expected is None or _sha256_of(path) == expected:
            return path
        path.unlink(missing_ok=True)  # another version, or damaged: the pin decides what is fetched now
    try:
        with _new_file(path) as file:
            got = _receive(url, shown, file, max_bytes, (connect_timeout_s, read_timeout_s), session)
            if expected not in (None, got):
                raise _wrong_digest(shown, str(expected), got, "nothing was kept")
    except OSError as error:
        if isinstance(error, TransportError):
            raise
        raise TransportError(f"cannot keep {shown} in {path.parent}: {error.strerror or error}") from error
    return path


def check_sha256(path: Path, sha256: str) -> None:
    """Compare a file with a digest.

    Args:
        path: a file that exists.
        sha256: 64 hex digits.

    Raises:
        SpecError: no such digest, or the file has another; names both.

    Reads the whole file.
    """
    expected, got = _digest(sha256), _sha256_of(path)
    if got != expected:
        raise _wrong_digest(str(path), expected, got, "the file was left as it is")


def cache_folder() -> Path:
    """Give the folder of kept files: `$REMOTE_OPS_CACHE`, else `~/.cache/remote-ops/models`; made with mode 0700."""
    given = os.environ.get("REMOTE_OPS_CACHE")
    folder = Path(given) if given else Path.home() / ".cache" / "remote-ops" / "models"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot make the folder for downloads: {error.strerror}"
        raise SpecError(reason, path=str(folder)) from error
    return folder


def _pinned(url: str, sha256: str | None) -> tuple[str, str | None]:
    """The URL without its fragment, and the digest that the argument or the fragment asks for."""
    try:
        url, fragment = urldefrag(url)
        scheme, port = urlsplit(url).scheme, urlsplit(url).port
    except ValueError:  # its text may hold what the URL holds
        raise SpecError("cannot download from this URL: it is malformed", path="url") from None
    if scheme not in ("http", "https") or port == 0:
        raise SpecError(f"cannot download {_shown(url)}: expected an http or https URL")
    pins = {
        _digest(pin)
        for pin in (*parse_qs(fragment, keep_blank_values=True).get("sha256", ()), sha256)
        if pin is not None
    }
    if len(pins) > 1:
        raise SpecError("sha256 and the '#sha256=' of the URL differ", path="sha256")
    if fragment and not fragment.startswith("sha256="):
        raise SpecError(f"the URL {_shown(url)} ends in '#' and something other than 'sha256=<hex>'")
    return url, next(iter(pins), None)


def _digest(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise SpecError(f"a SHA-256 digest is 64 hex digits: got {len(text)} characters", path="sha256")
    return text.lower()


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _wrong_digest(what: str, expected: str, got: str, done: str) -> SpecError:
    return SpecError(f"{what} is not the file it should be: expected sha256 {expected}, got {got}; {done}")


def _shown(url: str) -> str:
    """A URL as messages show it: no user, no query, no fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _file_name(url: str) -> str:
    base = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path).rpartition("/")[2], flags=re.ASCII)
    return f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{base[-80:]}"


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` only if the block ends well, and leaves nothing behind otherwise."""
    number, part = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with open(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(number)
        os.replace(part, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(part)
        raise


def _receive(
    url: str, shown: str, file: BinaryIO, max_bytes: int, timeouts: tuple[float, float], session: Session | None
) -> str:
    """Write what the URL answers into `file`, and give its digest."""
    import requests

    get = requests.get if session is None else session.get
    connected = False
    try:
        with get(url, stream=True, timeout=timeouts, headers={"Accept-Encoding": "identity"}) as response:
            connected = True
            length = _check_head(response, url, shown, max_bytes)
            digest = hashlib.sha256()
            received = 0
            with _progress(unquote(shown.rpartition("/")[2]), length) as advance:
                for piece in response.iter_content(CHUNK_BYTES):
                    received += len(piece)
                    if received > max_bytes:
                        raise _too_large(shown, received, max_bytes)
                    digest.update(piece)
                    file.write(piece)
                    advance(len(piece))
    except requests.RequestException as error:
        # Its text, and so its traceback, holds the query of the URL.
        raise _transport_error(error, shown, connected) from None
    if length not in (None, received):
        raise ConnectionLost(f"{shown} ended early: expected {length} bytes, got {received}")
    return digest.hexdigest()


def _check_head(response: Response, url: str, shown: str, max_bytes: int) -> int | None:
    """The length that the answer promises, if it does; raises where it is not an answer to download."""
    if url.startswith("https:") and any(not hop.url.startswith("https:") for hop in (*response.history, response)):
        raise TransportError(f"{shown} redirects from https to http, which anyone on the way can change")
    if response.status_code != 200:
        raise BadStatus(
            f"{shown} answered {response.status_code} {response.reason}, expected 200 and the file",
            status=response.status_code,
        )
    text = response.headers.get("Content-Length", "")
    if "Content-Encoding" in response.headers or not text.isdecimal():
        return None
    if int(text) > max_bytes:
        raise _too_large(shown, int(text), max_bytes)
    return int(text)


def _too_large(shown: str, size: int, max_bytes: int) -> TransportError:
    return TransportError(f"{shown} is too large: expected at most {max_bytes} bytes (max_bytes), got {size} or more")


def _transport_error(error: RequestException, shown: str, connected: bool) -> TransportError:
    """One of our errors for one of theirs, in words without the URL's secrets."""
    import requests

    root: BaseException = error
    while root.__context__ is not None:
        root = root.__context__
    # The system's own errors name no URL; of the libraries' errors only the kind is safe to show.
    plain = isinstance(root, OSError) and not isinstance(root, requests.RequestException)
    reason = str(root) if plain and str(root) else type(error).__name__
    if connected or isinstance(error, requests.ReadTimeout):
        return ConnectionLost(f"{shown} stopped sending before the whole file had come: {reason}")
    cls = ConnectError if isinstance(error, requests.ConnectionError) else TransportError
    return cls(f"cannot download {shown}: {reason}")


@contextmanager
def _progress(name: str, total: int | None) -> Iterator[Any]:
    """A bar on a terminal, silence elsewhere; gives the function to call with each number of bytes."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr) as bar:
        yield bar.update
