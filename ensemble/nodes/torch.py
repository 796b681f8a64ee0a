"""`kind: torch`: a model of PyTorch, run here."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from ensemble.nodes.file import FileSpec, is_file
from ensemble.nodes.model import beside

__all__ = ["TorchSpec"]


class TorchSpec(FileSpec):
    """A model of PyTorch, run here: an exported program, a TorchScript file, or a module by its Python name."""

    kind: Literal["torch"]
    dtype: Literal["bfloat16", "bf16", "float16", "fp16", "float32"] | None = None
    """What it computes in; callers see no difference but precision."""
    compile: bool = False
    """Whether it is compiled before the first run."""
    weights: str | None = None
    """For a module: the file of its weights, relative to the YAML file."""
    takes: list[str] | None = None
    """For a module or TorchScript: its inputs in order, each such as `x: float32 [-1, 1024]`."""
    gives: list[str] | None = None
    """Its outputs in order, each such as `y: float32 [-1, 10]`; learned from a dry run unless said."""

    OPENED_BY: ClassVar = ("path", "device", "sha256", "dtype", "compile", "weights", "takes", "gives")
    SUFFIXES: ClassVar = (".pt2", ".pt", ".pth", ".jit")

    def options(self, file: str) -> dict[str, Any]:
        """What `TorchModel` takes besides."""
        return {
            "dtype": self.dtype,
            "compile": self.compile or None,
            "weights": self.weights and beside(file, self.weights),
            "inputs": self.takes,
            "outputs": self.gives,
        }

    def _may_be(self, path: str, suffix: str) -> bool:
        return not is_file(path) and "://" not in path
