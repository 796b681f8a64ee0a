"""What is to be served, and how: a value, made by whoever finds it and opened by `opening`.

It needs no library: what its settings say is read by whoever opens it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server_ref.settings import ModelSettings

__all__ = ["Progress", "Source"]

# Told of each step: what is done ("load", "warm"), how many of it are, of how many.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """What is to be served, and how.

    Args:
        name: of the model.
        version: its version; empty: what the model says of itself.
        what: as `remote_ops.load` takes it.
        settings: how it is opened and run; None: as usual.
        fingerprint: what changes when its files do.
        device: where it runs, unless the settings say.
        options: more for `load`; those of the settings win.
        concurrency: how many calls each copy takes at a time; 0: what it says itself.
    """

    name: str
    version: str
    what: str
    settings: ModelSettings | None = None
    fingerprint: str = ""
    device: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 0

    @property
    def rules(self) -> ModelSettings:
        """What its settings say, or what holds where they say nothing."""
        from server_ref.settings import ModelSettings

        return self.settings or ModelSettings()

    @property
    def folder(self) -> Path:
        """What the paths in its settings are relative to."""
        path = Path(self.what)
        return path.parent if path.exists() else Path()

    @property
    def copies(self) -> list[str]:
        """The device of each copy."""
        instances = self.rules.instances
        devices = [self.device] if instances.devices == ("auto",) else instances.devices
        return [device for device in devices for _ in range(instances.count)]
