"""What the kinds of node share that are a model in a file: where it is, and where it runs."""

from __future__ import annotations

import re
from pathlib import Path as FilePath
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

from ensemble.nodes.function import modules_in
from ensemble.nodes.model import ServableSpec, beside
from remote_ops.errors import SpecError
from remote_ops.servable import Servable, load

__all__ = ["FileSpec", "is_file"]


def is_file(path: str) -> bool:
    """Whether what is written is the path of a file, and neither a URL nor the Python name of a module."""
    return "://" not in path and not re.fullmatch(r"[\w.]+:[\w.]+", path)


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {value!r}")
    return value


Device = Annotated[str, AfterValidator(_device)]


class FileSpec(ServableSpec):
    """A model in a file."""

    path: str
    """The model, relative to the YAML file; or `https://host/model.onnx#sha256=...`, which is downloaded once."""
    device: Device = "auto"
    """Where it runs: `cpu`, `cuda`, `cuda:1`, or `auto` for CUDA where it works."""
    sha256: str | None = None
    """The 64 hex digits that the file must have."""

    SUFFIXES: ClassVar[tuple[str, ...]] = ()

    @property
    def what(self) -> str:
        """The path as it is written, without a query, which may hold a secret."""
        return self.path.partition("?")[0] if "://" in self.path else self.path

    def open(self, file: str) -> Servable:
        """Load the file."""
        path = beside(file, self.path) if is_file(self.path) else self.path
        self._require_kind(path)
        options = {name: value for name, value in self.options(file).items() if value is not None}
        with modules_in(str(FilePath(file).parent)):
            return load(path, sha256=self.sha256, device=self._device(), **options)

    def options(self, file: str) -> dict[str, Any]:
        """What the class of servable takes besides."""
        return {}

    def _device(self) -> str:
        return self.device

    def _require_kind(self, path: str) -> None:
        """Refuse what `load` would open as a model of another kind, or not as a model in a file at all."""
        bare = re.split(r"[?#]", path)[0].lower() if "://" in path else path.lower()
        suffix = FilePath(bare).suffix
        if suffix not in self.SUFFIXES and not self._may_be(path, suffix):
            expected = ", ".join(filter(None, self.SUFFIXES))
            raise SpecError(f"'{self.what}' is not for kind '{self.kind}': expected a file ending in {expected}")

    def _may_be(self, path: str, suffix: str) -> bool:
        return False
