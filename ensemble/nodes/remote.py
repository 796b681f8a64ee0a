"""`kind: remote`: a model on another machine, and how its calls are tried again, doubled and given up.

An endpoint is opened without asking it anything.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ensemble.breaker import Guarded
from ensemble.nodes.model import ServableSpec, beside
from ensemble.nodes.node import Model, Seconds, Share
from remote_ops.client import Endpoint
from remote_ops.policy import Breaker, Hedge, Retry
from remote_ops.servable import Servable
from remote_ops.url import TLS

__all__ = ["RemoteSpec"]


def _failure(value: Any) -> Any:
    return "unavailable" if value in (503, "503") else value


Failure = Annotated[
    Literal["connect", "lost", "overloaded", "unavailable"],
    BeforeValidator(_failure, json_schema_input_type=Literal["connect", "lost", "overloaded", "unavailable", 503]),
]


class RetryText(Model):
    """How often a call that failed for a passing reason is sent again."""

    attempts: int = Field(default=3, ge=1)
    """Sendings in all; 1 for no retry."""
    when: list[Failure] | None = None
    """Which failures are tried again: `connect`, `lost`, `overloaded`, `unavailable` (or 503); all unless said."""
    idempotent: bool = True
    """Write false if a call must not happen twice: it is sent again only where no connection was made."""
    budget: Share = 0.2
    """Sendings that all calls together may add, as a share of the calls, such as `20%`."""

    def retry(self) -> Retry:
        """The same for an `Endpoint`."""
        when = None if self.when is None else tuple(self.when)
        return Retry(attempts=self.attempts, idempotent=self.idempotent, budget=self.budget, when=when)


def _after(value: Any) -> Any:
    if value == "p95" or (isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?\s*(us|ms|s|min|h)", value)):
        return value
    raise ValueError(f"expected p95 or a length such as 30ms, got {value!r}")


class HedgeText(Model):
    """When a call that is late is sent a second time; the first answer counts."""

    after: Annotated[Literal["p95"] | Seconds, BeforeValidator(_after, json_schema_input_type=str)] = "p95"
    """A length such as `30ms`, or `p95`: what 95 % of the last answers took."""
    budget: Share = 0.07
    """Copies that may be sent, as a share of the calls, such as `5%`."""

    def hedge(self) -> Hedge:
        """The same for an `Endpoint`."""
        return Hedge(None if isinstance(self.after, str) else self.after, min(self.budget, 1.0))


class BreakerText(Model):
    """When a replica that fails is left alone, and for how long."""

    failures: int = Field(default=5, ge=1)
    """Failures in a row."""
    reset: Annotated[Seconds, Field(gt=0)] = 1.0
    """How long it is left alone at first, such as `10s`; twice as long after each relapse, up to a minute."""

    def breaker(self) -> Breaker:
        """The same for an `Endpoint`."""
        return Breaker(self.failures, self.reset, max(60.0, self.reset))


class TlsText(Model):
    """Whom https trusts, and who we are; paths are relative to the YAML file."""

    ca: str | None = None
    """A file of CA certificates (PEM) to trust instead of the system's."""
    cert: str | None = None
    """The client certificate (PEM)."""
    key: str | None = None
    """Its key (PEM)."""
    password: str | None = None
    """Of the key; write `${NAME}` for an environment variable."""
    verify: bool = True
    """Whether certificates are checked; false trusts anybody."""

    def tls(self, file: str) -> TLS:
        """The same for an `Endpoint`."""
        ca, cert, key = [path and beside(file, path) for path in (self.ca, self.cert, self.key)]
        return TLS(ca, cert, key, self.password, self.verify)


def _urls(value: str | list[str]) -> str | list[str]:
    if not value:
        raise ValueError("expected a URL or more, got none")
    return value


class RemoteSpec(ServableSpec):
    """A model on another machine: a URL, or several that answer alike."""

    kind: Literal["remote"]
    url: Annotated[str | list[str], AfterValidator(_urls)]
    """`http://host:9000/model`, `https://`, `http+unix://`, or `gp://`, which means http; or a list of replicas."""
    retry: RetryText = RetryText()
    """When a call that failed is sent again: where the reason may pass, three times in all, unless said."""
    hedge: HedgeText | None = None
    """When a call that is late is sent a second time; never unless said."""
    breaker: BreakerText = BreakerText()
    """When a replica that fails is left alone; where this is written, the node too, be it the only one."""
    headers: dict[str, str] = Field(default={})
    """Sent with every request; write `${NAME}` for an environment variable."""
    tls: TlsText | None = None
    """Whom https trusts, and who we are."""
    config: str = ""
    """Handed to the model with every call."""

    MODEL: ClassVar = "remote"
    OPENED_BY: ClassVar = ("url", "timeout", "retry", "hedge", "breaker", "headers", "tls")
    PLACE: ClassVar = "loop"

    @property
    def what(self) -> str:
        """The first URL, without its query, which may hold a secret."""
        return self.urls[0].partition("?")[0]

    @property
    def urls(self) -> list[str]:
        """The URLs, `gp://` read as `http://`."""
        urls = [self.url] if isinstance(self.url, str) else self.url
        return [re.sub(r"\Agp://", "http://", url) for url in urls]

    @property
    def sent(self) -> bytes:
        """The `config` that goes with every call."""
        return self.config.encode()

    def open(self, file: str) -> Servable:
        """Make the endpoint; it is not asked anything."""
        endpoint = self._endpoint(file)
        return Guarded(endpoint, self.breaker.breaker()) if "breaker" in self.model_fields_set else endpoint

    def _endpoint(self, file: str) -> Endpoint:
        return Endpoint(
            self.urls,
            timeout_s=30.0 if self.timeout is None else self.timeout,
            headers=self.headers,
            tls=None if self.tls is None else self.tls.tls(file),
            retry=self.retry.retry(),
            hedge=None if self.hedge is None else self.hedge.hedge(),
            breaker=self.breaker.breaker(),
        )
