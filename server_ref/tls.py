"""Who the server is and which clients it lets in, from files of certificates that it reads again while it serves.

It opens no sockets.
"""

from __future__ import annotations

import logging
import ssl

from remote_ops.errors import SpecError

__all__ = ["Certificates"]

log = logging.getLogger("server_ref")


class Certificates:
    """The certificate of a server and, perhaps, who signs those of its clients; TLS 1.2 or newer.

    Args:
        certfile: path of the certificate, with those between it and its authority behind it (PEM).
        keyfile: path of its key (PEM, without a password); unless given, it is in `certfile`.
        client_ca: path of authorities (PEM); given, a client without a certificate of theirs is turned away.

    Raises:
        SpecError: a file is missing, is no such thing, or key and certificate do not belong together.

    `context` is for whoever listens. Each handshake uses what was read last, as a whole; connections stay.
    """

    def __init__(self, certfile: str, keyfile: str | None = None, client_ca: str | None = None) -> None:
        self._files = (certfile, keyfile, client_ca)
        self._newest = self._read()
        self.context = self._read()
        self.context.sni_callback = self._choose

    @property
    def mutual(self) -> bool:
        """Whether clients must show a certificate."""
        return self._files[2] is not None

    def reload(self) -> bool:
        """Read the files again; if they are not as they should be, those in use stay. Whether it went well."""
        try:
            self._newest = self._read()
        except SpecError as error:
            log.error("the certificate in use stays: %s", error)
            return False
        log.info("new connections see the certificate that is in %s now", self._files[0])
        return True

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Called in each handshake, whether the client names a host or not, before a certificate is sent."""
        connection.context = self._newest

    def _read(self) -> ssl.SSLContext:
        certfile, keyfile, client_ca = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # A ticket would let a client in on the certificate that it showed before the authorities were changed.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        try:
            context.load_cert_chain(certfile, keyfile, password="")  # a key with one would ask on the terminal
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(filter(None, (certfile, keyfile)))
            raise SpecError(f"this certificate and key do not load: {_reason(error)}", path=files) from error
        if client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(client_ca)
            except (OSError, ssl.SSLError) as error:
                raise SpecError(f"these authorities do not load: {_reason(error)}", path=client_ca) from error
        return context


def _reason(error: OSError) -> str:
    return f"{error.reason or error}" if isinstance(error, ssl.SSLError) else error.strerror or str(error)
