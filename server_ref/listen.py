"""Where a server listens, as it is written, and who can reach it there.

It opens no listener.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass

from remote_ops.errors import SpecError

__all__ = ["Listen", "remove_stale"]


@dataclass(frozen=True)
class Listen:
    """Where to listen: a host and a port (0: any free one), or the path of a unix socket."""

    host: str = "127.0.0.1"
    port: int = 0
    unix_path: str = ""

    @classmethod
    def parse(cls, text: str) -> Listen:
        """Read `host:port`, `[::1]:port`, `:port` (every address) or `unix:/path.sock`.

        Raises:
            SpecError: no such form.
        """
        if text.startswith("unix:"):
            return cls(unix_path=text.removeprefix("unix:").removeprefix("//"))
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdigit() or int(port) > 65535:
            hint = f"; did you mean 127.0.0.1:{text}?" if text.isdigit() else ""
            raise SpecError(f"expected host:port or unix:/path.sock, got {text!r}{hint}", path="listen")
        return cls(host.strip("[]"), int(port))

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it; a name other than localhost may be anybody's."""
        if self.unix_path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on any more; a live one, or another file, stays and is reported."""
    try:
        # Connecting to any other file is refused as well, and the loop would replace a live socket unasked.
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)
        return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
