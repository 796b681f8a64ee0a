"""The listener of the control plane: a thread of its own, so that what is asked there holds up no answer of a model.

What it answers is `control`'s.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from remote_ops.errors import SpecError

if TYPE_CHECKING:
    import uvicorn
    from starlette.routing import BaseRoute

    from server_ref.control import Controlled, ModelControl

__all__ = ["ControlPlane"]


class ControlPlane:
    """The API on a listener and a thread of its own.

    Args:
        listen: `host:port`; port 0 is any free one. Beyond the loopback address only with a token of class `admin`.
        allow_changes: whether it may change anything.
        models: what changes models; unless given, the server's own repository.
        metrics_compat: whose names `/metrics` has besides ours; see `Metrics`.
        extra_routes: of Starlette, in addition; one at `/` is there in place of the page.

    `url` is known once the server has started.
    """

    def __init__(
        self,
        listen: str = "127.0.0.1:9001",
        *,
        allow_changes: bool = False,
        models: ModelControl | None = None,
        metrics_compat: Sequence[str] = (),
        extra_routes: Sequence[BaseRoute] = (),
    ) -> None:
        self.listen = listen
        self.models = models
        self.allow_changes = allow_changes
        self.metrics_compat = tuple(metrics_compat)
        self.extra_routes = tuple(extra_routes)
        self.url = ""
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(
        self,
        server: Controlled,
        models: ModelControl,
        *,
        host: str,
        port: int,
        loopback: bool,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Listen, and answer from now on.

        Args:
            server: what it looks after.
            models: what changes its models, unless the plane was made with something else that does.
            host, port, loopback: what `listen` says.
            tls: a context; makes it https.

        Raises:
            SpecError: others could reach it, and there is no admin token; or the address is taken.
            ImportError: starlette or uvicorn is missing.
        """
        access = server.front.access
        if not loopback and not (access is not None and access.has_admin):
            raise SpecError(
                f"{self.listen} can be reached from other machines: expected an admin token with it; "
                "pass --admin-token-file FILE",
                path="--control",
            )
        try:
            import uvicorn

            from server_ref.control import control_app
            from server_ref.metrics import metrics_routes
            from server_ref.page import page_routes
            from server_ref.tryit import tryit_routes

            metrics = metrics_routes(server, self.metrics_compat)
            routes = (*self.extra_routes, *metrics, *page_routes(server), *tryit_routes(server))
            app = control_app(
                server, models=self.models or models, allow_changes=self.allow_changes, loopback=loopback,
                extra_routes=routes, url=lambda: self.url,
            )  # fmt: skip
        except ImportError as error:
            raise ImportError(
                "the control plane needs starlette and prometheus_client: pip install 'remote-ops[server]'"
            ) from error
        listener = _bound(host, port)
        where = f"[{host}]" if ":" in host else "127.0.0.1" if host in ("", "0.0.0.0") else host
        self.url = f"{'https' if tls else 'http'}://{where}:{listener.getsockname()[1]}/"
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, lifespan="off", loop="asyncio", ws="none",
            server_header=False, proxy_headers=False, limit_concurrency=100, timeout_graceful_shutdown=2,
        )  # fmt: skip
        config.load()
        config.ssl = tls
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="server_ref-control", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Finish what is being answered, and end; takes some 0.2 s, and does nothing if it has not started."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(5.0)
            self._server = self._thread = None


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SpecError(f"cannot listen on {host}:{port}: {reason}", path="--control") from error
