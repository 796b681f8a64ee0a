"""`kind: tf`: a model of TensorFlow, run here."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any, ClassVar, Literal

from ensemble.nodes.file import FileSpec

__all__ = ["TfSpec"]


class TfSpec(FileSpec):
    """A model of TensorFlow, run here: the folder of a SavedModel, a frozen graph or a Keras file."""

    kind: Literal["tf"]
    signature: str | None = None
    """Which signature of a SavedModel; `serving_default` unless said."""
    takes: list[str] | None = None
    """Names of its inputs in order; of a frozen graph any tensors."""
    gives: list[str] | None = None
    """Names of its outputs in order; of a frozen graph any tensors."""

    OPENED_BY: ClassVar = ("path", "device", "sha256", "signature", "takes", "gives")
    SUFFIXES: ClassVar = (".pb", ".keras", ".h5", "")

    def options(self, file: str) -> dict[str, Any]:
        """What `TFModel` takes besides."""
        return {"signature": self.signature, "inputs": self.takes, "outputs": self.gives}

    def _may_be(self, path: str, suffix: str) -> bool:
        return FilePath(path).is_dir()
