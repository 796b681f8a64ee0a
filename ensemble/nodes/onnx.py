"""`kind: onnx`: a model in an ONNX file, run here."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ensemble.nodes.file import FileSpec

__all__ = ["OnnxSpec"]


class OnnxSpec(FileSpec):
    """A model in an ONNX file, run here by onnxruntime."""

    kind: Literal["onnx"]
    providers: list[Literal["cuda", "cpu"]] | None = None
    """What it may run on, the best first; another way to say `device`."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of one run; a quarter of the CPUs unless said."""

    OPENED_BY: ClassVar = ("path", "device", "sha256", "providers", "threads")
    SUFFIXES: ClassVar = (".onnx",)

    @model_validator(mode="after")
    def _one_way(self) -> OnnxSpec:
        if self.providers is not None and "device" in self.model_fields_set:
            raise ValueError("'device' and 'providers' say the same: write one of them")
        if self.providers == []:
            raise ValueError("'providers' is empty: expected cuda, cpu or both")
        return self

    def options(self, file: str) -> dict[str, Any]:
        """What `OnnxModel` takes besides."""
        return {"threads": self.threads}

    def _device(self) -> str:
        if self.providers is None:
            return self.device
        return "auto" if self.providers[:2] == ["cuda", "cpu"] else self.providers[0]
