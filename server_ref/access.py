"""Who may do what: bearer tokens of two classes, and which of them each request needs.

`infer` is for metadata and inference, `admin` for that and for what changes the server. A class that has tokens asks
for them; with tokens for `infer` alone, nobody is `admin`. It knows no sockets; what it compares are digests.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from remote_ops.errors import RemoteOpsError, SpecError

__all__ = ["Access", "AccessDenied", "Kind", "classify", "loopback_or_guarded"]

Kind: TypeAlias = Literal["open", "infer", "admin"]
log = logging.getLogger("server_ref")

_OPEN = re.compile(r"/control/is_(?:ready|alive)|/v2/health/(?:ready|live)|/v2/models/[^/]+(?:/versions/[^/]+)?/ready")
_ADMIN = re.compile(
    r"/v2/repository/(?!index$)|/control/(?!client_count$)|/v2/(?:systemsharedmemory|cudasharedmemory|logging|trace)\b"
    r"|/v2/models/[^/]+(?:/versions/[^/]+)?/trace\b"
)
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")
_MAKE_ONE = "make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
_UNAUTHENTICATED, _PERMISSION_DENIED = 16, 7  # in the numbers of gRPC, as the other codes are


def classify(method: str, path: str) -> Kind:
    """Which class of token a request needs: none for health, `admin` for what changes the server, else `infer`.

    Args:
        method: as on the request line.
        path: without the query, decoded.
    """
    # A POST to a path of these may be a call of the only model, which answers any.
    if method == "OPTIONS" or (method in ("GET", "HEAD") and _OPEN.fullmatch(path)):
        return "open"
    return "admin" if _ADMIN.match(path) else "infer"


class AccessDenied(RemoteOpsError):
    """The caller has not said who it is, or may not do this: `.status` is 401 or 403, `.challenge` the header."""

    def __init__(self, message: str, *, status: int, challenge: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = _UNAUTHENTICATED if status == 401 else _PERMISSION_DENIED
        self.challenge = challenge


class Access:
    """The tokens that a server asks for.

    Args:
        infer: tokens that may ask for metadata and call models.
        admin: tokens that may do all.
        infer_file, admin_file: files of more of them, one a line; `#` begins a comment. Read again by `reload`.

    Raises:
        SpecError: a file cannot be read, is open to other users or has no tokens; a token is too short to keep anybody
            out, has a letter that headers do not carry, or is in both classes.
    """

    def __init__(
        self,
        infer: Iterable[str] = (),
        admin: Iterable[str] = (),
        *,
        infer_file: str | None = None,
        admin_file: str | None = None,
    ) -> None:
        self._given = {"infer": tuple(infer), "admin": tuple(admin)}
        self._files = {"infer": infer_file, "admin": admin_file}
        self._digests = self._read()
        if not any(self._digests.values()):
            raise SpecError(f"expected a token or more, got none; {_MAKE_ONE}", path="access")

    @classmethod
    def read(
        cls, infer_file: str | None = None, admin_file: str | None = None, env: Mapping[str, str] = os.environ
    ) -> Access | None:
        """The tokens of files and of `REMOTE_OPS_INFER_TOKEN` and `REMOTE_OPS_ADMIN_TOKEN`; None where there are none.

        Raises:
            SpecError: as the class.
        """
        infer, admin = (_lines(env.get(f"REMOTE_OPS_{name}_TOKEN", "")) for name in ("INFER", "ADMIN"))
        if not (infer or admin or infer_file or admin_file):
            return None
        return cls(infer, admin, infer_file=infer_file, admin_file=admin_file)

    @property
    def guards_infer(self) -> bool:
        """Whether metadata and inference want a token."""
        return bool(self._digests["infer"])

    @property
    def has_admin(self) -> bool:
        """Whether there is a token for what changes the server."""
        return bool(self._digests["admin"])

    def reload(self) -> bool:
        """Read the files again; if they are not as they should be, the tokens in use stay. Whether it went well."""
        try:
            self._digests = self._read()
        except SpecError as error:
            log.error("the tokens in use stay: %s", error)
            return False
        return True

    def allows(self, kind: Kind, authorization: str) -> bool:
        """Whether the value of an `Authorization` header has a token of this class."""
        return self.refusal_of(kind, authorization) is None

    def refusal(self, method: str, path: str, authorization: str) -> AccessDenied | None:
        """Why a request is refused, if it is.

        Args:
            method, path: as in `classify`.
            authorization: the value of that header; empty where there is none.
        """
        return self.refusal_of(classify(method, path), authorization)

    def refusal_of(self, kind: Kind, authorization: str) -> AccessDenied | None:
        """The same for a request of this class; costs some 3 us for a handful of tokens."""
        if kind == "open" or not (self._digests[kind] or kind == "admin"):
            return None
        if kind == "admin" and not self._digests["admin"]:
            return AccessDenied("nobody may do this here: the server has no admin token", status=403)
        scheme, _, token = authorization.partition(" ")
        if not authorization or scheme.lower() != "bearer":
            words = f"this needs a token: expected 'Authorization: Bearer TOKEN' of class {kind}, got none"
            return AccessDenied(f"{words}; pass headers={{'Authorization': ...}}", status=401, challenge=_challenge())
        known = self._class_of(token.strip())
        if known is None:
            return AccessDenied("this token is unknown here", status=401, challenge=_challenge("invalid_token"))
        if kind == "admin" and known != "admin":
            words = "this token may not do that: expected one of class admin, got one of class infer"
            return AccessDenied(words, status=403, challenge=_challenge("insufficient_scope"))
        return None

    def _class_of(self, token: str) -> Kind | None:
        digest = _digest(token)
        # Each is compared to its end, and all of them are: how long it takes says nothing of how near a guess is.
        found: dict[Kind, bool] = {
            kind: any([hmac.compare_digest(digest, known) for known in self._digests[kind]])  # noqa: C419
            for kind in ("infer", "admin")
        }
        return "admin" if found["admin"] else "infer" if found["infer"] else None

    def _read(self) -> dict[Kind, tuple[bytes, ...]]:
        infer, admin = ({*self._given[kind], *_tokens_in(self._files[kind])} for kind in ("infer", "admin"))
        if infer & admin:
            raise SpecError("a token is in both classes: expected another for admin", path="access")
        for token in infer | admin:
            _check(token)
        return {"infer": tuple(map(_digest, infer)), "admin": tuple(map(_digest, admin))}


def loopback_or_guarded(
    listen: str, *, loopback: bool, access: Access | None, mutual_tls: bool, insecure: bool
) -> None:
    """Raise where other machines could call models and nobody would ask who they are.

    Raises:
        SpecError: says what to pass.
    """
    if not (loopback or mutual_tls or insecure or (access is not None and access.guards_infer)):
        raise SpecError(
            f"{listen} can be reached from other machines, and nothing asks who calls: pass --infer-token-file FILE, "
            "or --client-ca FILE with a certificate, or --insecure if anybody may",
            path="--listen",
        )


def _challenge(error: str = "") -> str:
    return f'Bearer realm="remote-ops", error="{error}"' if error else 'Bearer realm="remote-ops"'


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _check(token: str) -> None:
    if not _TOKEN.fullmatch(token):
        got = f"{len(token)} letters" if len(token) < 16 else "others, or more"
        raise SpecError(f"a token: expected 16 to 512 letters, digits or any of ._~+/=-, got {got}; {_MAKE_ONE}",
                        path="access")  # fmt: skip


def _lines(text: str) -> Sequence[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _tokens_in(path: str | None) -> Sequence[str]:
    if path is None:
        return ()
    try:
        with Path(path).open(encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise SpecError(
                    f"a file of tokens: expected one that only its owner can read, got mode {mode:04o}; "
                    f"type: chmod 600 {path}",
                    path=path,
                )
            tokens = _lines(file.read(1 << 20))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise SpecError(f"cannot read this file of tokens: {reason}", path=path) from error
    if not tokens:
        raise SpecError(f"expected a token a line, got none; {_MAKE_ONE}", path=path)
    return tokens
