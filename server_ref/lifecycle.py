"""From launch to exit: listeners, the line that says what runs, signals, and the drain that loses no request.

What happens on a connection is `front`'s; what a model is, `remote_ops`'.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

from remote_ops import http1
from remote_ops.connection import new_loop
from remote_ops.errors import RemoteOpsError, SpecError
from remote_ops.servable import Servable
from server_ref.access import Access
from server_ref.connection import Timeouts
from server_ref.front import Front
from server_ref.graphs import watched
from server_ref.journal import Journal
from server_ref.listen import Listen, remove_stale
from server_ref.model import Version
from server_ref.plane import ControlPlane
from server_ref.repository import Repository, Told
from server_ref.tls import Certificates

if TYPE_CHECKING:
    from server_ref.folder import Scan
    from server_ref.source import Source

__all__ = ["Server", "running", "serve"]

_BACKLOG = 1024
_RESERVED = ("", "control", "v1", "v2")  # what paths begin with that name no model

Models: TypeAlias = "Mapping[str, Servable | Version] | str | os.PathLike[str]"


class Server:
    """A front with its listeners and its models, on the running loop.

    Args:
        models: name -> servable, or the folder of a repository.
        listen: where; see `Listen.parse`.
        folder: a folder of models besides.
        watch_s: seconds between two looks at the folder; 0: it is looked at once.
        device: where models of the folder run, unless their settings say.
        told: is told how far loading is.
        journal: what is told of requests that end.
        tls: makes it https; `Certificates` are read again by `reload`, a context is what it is.
        limits, timeouts, access, cors_origins: as in `front`.
        allow_changes: whether clients of the data plane may load and unload models too.
        model_urls: how the URLs of model files begin that may be loaded; none unless said.
        control: an API that says how it does, on a listener of its own.
    """

    def __init__(
        self,
        models: Models,
        listen: str = "127.0.0.1:0",
        *,
        tls: Certificates | ssl.SSLContext | None = None,
        limits: http1.Limits = http1.Limits(),  # noqa: B008 (immutable)
        timeouts: Timeouts = Timeouts(),  # noqa: B008 (immutable)
        access: Access | None = None,
        cors_origins: Sequence[str] = (),
        allow_changes: bool = False,
        model_urls: Sequence[str] = (),
        control: ControlPlane | None = None,
        on_shutdown: Callable[[], None] | None = None,
        folder: str | os.PathLike[str] | None = None,
        watch_s: float = 0.0,
        device: str = "auto",
        told: Told | None = None,
        journal: Journal | None = None,
    ) -> None:
        if isinstance(models, str | os.PathLike):
            folder, models = models, {}
        self._folder = None if folder is None else Path(folder)
        self._seen: Scan | None
        sources: list[Source]
        self._seen, sources = (None, []) if self._folder is None else _look_at(self._folder, device)
        if not models and not sources:
            raise SpecError("a server needs at least one model: got none", path="models")
        self.listen = Listen.parse(listen)
        if tls is not None and self.listen.unix_path:
            raise SpecError("a unix socket takes no TLS: only this machine can reach it", path="tls")
        names = {*models, *(source.name for source in sources)}
        for name in names:
            if len(names) > 1 and ("/" in name or name in _RESERVED):
                raise SpecError(f"no model can be called {name!r}: its name is its path", path="models")
        if control is not None:  # which shows how long the nodes of a graph take
            models = {name: what if isinstance(what, Version) else watched(what) for name, what in models.items()}
        self.control = control
        self.front = Front(
            models, limits=limits, timeouts=timeouts, on_shutdown=on_shutdown, access=access,
            cors_origins=cors_origins, journal=journal,
        )  # fmt: skip
        self.repository = Repository(
            self.front.catalog, told=told, fetched=_fetching(model_urls) if model_urls else None
        )
        self.front.index = self.repository.index
        guarded = self.listen.loopback or (access is not None and access.has_admin)
        allowed = allow_changes or (control is not None and control.allow_changes)
        if allowed and guarded:  # whoever loads models runs code
            self.front.control = self.repository
        self.url = ""
        self.certificates = tls if isinstance(tls, Certificates) else None
        self._tls = tls.context if isinstance(tls, Certificates) else tls
        self._listener: asyncio.AbstractServer | None = None
        self._sources = sources
        self._watch_s, self._device = watch_s, device
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen and be ready.

        Raises:
            SpecError: the address is taken or not ours.
        """
        loop = asyncio.get_running_loop()
        where = self.listen
        try:
            # Who does not finish a handshake holds a connection as much as who does not finish a request.
            handshake_s = self.front.timeouts.head_s if self._tls else None
            if where.unix_path:
                remove_stale(where.unix_path)
                self._listener = await loop.create_unix_server(
                    self.front.connection, where.unix_path, ssl=self._tls, backlog=_BACKLOG
                )
                self.url = f"http+unix://{quote(where.unix_path, safe='')}/"
            else:
                listener = await loop.create_server(
                    self.front.connection, where.host or None, where.port, backlog=_BACKLOG,
                    ssl=self._tls, ssl_handshake_timeout=handshake_s,
                )  # fmt: skip
                self._listener = listener
                port = listener.sockets[0].getsockname()[1]
                host = "127.0.0.1" if where.host in ("", "0.0.0.0") else where.host
                self.url = f"{'https' if self._tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}/"
        except OSError as error:
            named = error.errno and not isinstance(error, socket.gaierror)
            reason = os.strerror(error.errno) if named and error.errno else error.strerror or str(error)
            place = where.unix_path or f"{where.host}:{where.port}"
            raise SpecError(f"cannot listen on {place}: {reason}", path="listen") from error
        self.front.start(loop)
        self.front.ready = not self._sources
        if self.control is not None:
            try:
                self._start_control(self.control)
            except Exception:
                self.close()
                raise

    def _start_control(self, control: ControlPlane) -> None:
        where = Listen.parse(control.listen)
        if where.unix_path:
            raise SpecError(f"expected host:port, got {control.listen!r}", path="--control")
        control.start(self, self.repository, host=where.host, port=where.port, loopback=where.loopback, tls=self._tls)

    async def load(self) -> None:
        """Open what is to be served, and be ready; then follow the folder, if that is wanted.

        Raises:
            SpecError: some of it cannot be opened; has a line for each.
        """
        faults = []
        for source in self.repository.declare(self._sources):
            try:
                await self.repository.open(source)
            except (RemoteOpsError, ImportError) as error:
                faults.append(f"model '{source.name}': {error}")
        if faults:
            raise SpecError("\n".join(faults) if len(faults) == 1 else f"{len(faults)} models:\n" + "\n".join(faults))
        self.front.ready = True
        if self._watch_s and self._folder is not None and self._seen is not None:
            from server_ref.watch import Watch

            watch = Watch(self._folder, self.repository, self._seen.found, every_s=self._watch_s, device=self._device)
            self._watching = asyncio.get_running_loop().create_task(watch.run())

    async def drain(self, *, grace_s: float, exit_timeout_s: float) -> bool:
        """Stop without losing a request: not ready at once, `grace_s` of further service, then finish what runs.

        Args:
            grace_s: how long new requests are still taken, so that whoever routes to us has time to notice.
            exit_timeout_s: how long requests in flight may then take.

        Returns:
            Whether every request was answered.
        """
        self.front.ready = False
        self.front.draining = True  # every answer from now on asks its client to connect anew, elsewhere
        await asyncio.sleep(grace_s)
        loop = asyncio.get_running_loop()
        give_up = loop.time() + exit_timeout_s
        # What calls other models may call those of this server: they are let in until it is done.
        self.front.catalog.refuse_callers()
        while self.front.catalog.calls_others and loop.time() < give_up:
            await asyncio.sleep(0.01)
        for _ in range(3):  # whoever has connected already is let in: closing the listener would reset them
            await asyncio.sleep(0)
        if self._listener is not None:
            self._listener.close()
        self.front.close_idle()
        while self.front.in_flight and loop.time() < give_up:
            await asyncio.sleep(0.01)
        finished = not self.front.in_flight
        # What was just answered is still being sent.
        while self.front.connections and loop.time() < give_up:
            await asyncio.sleep(0.01)
        self.close()
        return finished

    def close(self) -> None:
        """Stop at once."""
        if self._watching is not None:
            self._watching.cancel()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.front.stop()
        if self.listen.unix_path and self.url:  # a socket that it never listened on is another's
            with contextlib.suppress(OSError):
                os.unlink(self.listen.unix_path)

    @property
    def rereads(self) -> bool:
        """Whether it was made from files that `reload` reads again."""
        return self.front.access is not None or self.certificates is not None

    def reload(self) -> None:
        """Read tokens and certificates again; what is wrong now is logged, and the old stays. Connections stay, too."""
        for read in (self.front.access, self.certificates):
            if read is not None:
                read.reload()

    def describe(self) -> str:
        """What runs where: a line per model with its signature and the device it really runs on."""
        lines = []
        for version in self.front.catalog:
            name = version.name
            url = self.url if self.front.catalog.only else f"{self.url}{quote(name, safe='')}"
            device = getattr(version.servable, "device", "remote" if hasattr(version.servable, "url") else "cpu")
            lines.append(f"{name} at {url} on {device}, {version.at_once}\n  {version.signature}")
        if self.control is not None:
            lines.append(f"control plane at {self.control.url}")
        return "\n".join(lines)


def _look_at(folder: Path, device: str) -> tuple[Scan, list[Source]]:
    """What lies in a folder; reading it needs more than serving what is handed over, and is imported only now."""
    from server_ref.folder import scan
    from server_ref.watch import sources_in

    seen = scan(folder)
    return seen, sources_in(seen, device=device)


def _fetching(model_urls: Sequence[str]) -> Callable[[str, str], Path]:
    from server_ref.sources import Sources

    return Sources(model_urls).fetch


@contextlib.contextmanager
def running(models: Models, listen: str = "127.0.0.1:0", **options: Any) -> Iterator[str]:
    """Serve `models` from a background thread while the block runs; for tests and notebooks.

    Args:
        models: name -> servable, or the folder of a repository.
        listen: where; a free port of the loopback address unless said.
        options: more for `Server`, such as `tls`, `limits`, `timeouts`, `access`, `control` and `watch_s`.

    Yields:
        The URL. One model answers any path under it; several answer `<url><name>`.

    Raises:
        SpecError: no models, or the address is taken.
    """
    loop = new_loop()
    server = Server(models, listen, **options)
    thread = threading.Thread(target=loop.run_forever, name="server_ref", daemon=True)
    thread.start()

    def end() -> None:
        if thread.is_alive():  # not again, and not in a forked child
            asyncio.run_coroutine_threadsafe(_close_soon(server), loop).result()
            if server.control is not None:
                server.control.stop()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    # A block that a program never leaves ends while its thread still runs, and not with the interpreter.
    atexit.register(end)
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        asyncio.run_coroutine_threadsafe(server.load(), loop).result()
        yield server.url
    finally:
        atexit.unregister(end)
        end()


async def _close_soon(server: Server) -> None:
    server.close()
    await server.repository.close()
    await _settle()


async def _settle() -> None:
    """Let every transport see its end before the loop does, those of the endpoints that were served included."""
    for _ in range(3):
        await asyncio.sleep(0)
    await asyncio.get_running_loop().shutdown_asyncgens()
    for _ in range(3):
        await asyncio.sleep(0)


def serve(
    models: Models,
    listen: str = "127.0.0.1:9000",
    *,
    grace_s: float = 5.0,
    exit_timeout_s: float = 30.0,
    **options: Any,
) -> int:
    """Serve `models` until SIGTERM, Ctrl-C or `/control/shutdown`, then drain.

    On SIGHUP it reads the files again that `access` and `tls` came from; without either it ends by it, as programs do.

    Args:
        models: name -> servable, or the folder of a repository.
        listen: where; see `Listen.parse`.
        grace_s: after SIGTERM, how long requests are still taken while `/control/is_ready` says 503.
        exit_timeout_s: how long requests in flight may then take.
        options: more for `Server`.

    Returns:
        The exit code: 0 if every request was answered, 1 if some were cut off.

    Raises:
        SpecError: no models, one cannot be opened, or the address is taken.
    """
    if threading.current_thread() is not threading.main_thread():
        raise SpecError("serve() waits for signals, which only the main thread gets; use server_ref.running() here")
    loop = new_loop()
    try:
        return loop.run_until_complete(_serve(models, listen, grace_s, exit_timeout_s, options))
    finally:
        if options.get("control") is not None:
            options["control"].stop()
        loop.run_until_complete(_settle())
        loop.close()


async def _serve(models: Models, listen: str, grace_s: float, exit_timeout_s: float, options: Mapping[str, Any]) -> int:
    loop = asyncio.get_running_loop()
    asked: asyncio.Queue[str] = asyncio.Queue()
    server = Server(models, listen, on_shutdown=lambda: asked.put_nowait("shutdown"), **options)
    await server.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.put_nowait, number.name)
    if server.rereads:
        loop.add_signal_handler(signal.SIGHUP, server.reload)
    stop = loop.create_task(asked.get())
    loading = loop.create_task(server.load())
    await asyncio.wait((stop, loading), return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        try:
            loading.result()
        except BaseException:
            stop.cancel()
            await _close_soon(server)
            raise
        print(server.describe(), file=sys.stderr, flush=True)
    why = await stop
    loading.cancel()
    # Ctrl-C comes from a person who waits; SIGTERM from an orchestrator whose routing needs time to notice.
    grace_s = 0.0 if why == "SIGINT" else grace_s
    print(
        f"draining after {why}: {grace_s:g} s of grace, {server.front.in_flight} in flight", file=sys.stderr, flush=True
    )
    drain = loop.create_task(server.drain(grace_s=grace_s, exit_timeout_s=exit_timeout_s))
    again = loop.create_task(asked.get())
    await asyncio.wait((drain, again), return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not drain.done():
        drain.cancel()
        server.close()
        return 1
    await server.repository.close()
    return 0 if drain.result() else 1
