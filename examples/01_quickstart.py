"""Serve a trained model; call it from numpy and as a layer of a torch model; check both against onnxruntime.

It needs pip install 'remote-ops[torch,onnx,server]' magika: magika holds a 3 MB model that names the type of a file."""

import base64
import importlib.util
import json
import struct
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import server_ref
from remote_ops import Endpoint, load
from remote_ops.torch import RemoteModule

MODEL = Path(importlib.util.find_spec("magika").origin).parent / "models/standard_v3_3/model.onnx"
CONFIG = json.loads(MODEL.with_name("config.min.json").read_text())
BEG, END, BLOCK = CONFIG["beg_size"], CONFIG["end_size"], CONFIG["block_size"]
TONE = (9000 * np.sin(np.arange(8000) / 3)).astype("<i2").tobytes()
WAV = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 16036, b"WAVEfmt ", 16, 1, 1, 8000, 16000, 2, 16, b"data", 16000) + TONE
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
CPP = """#include <iostream>\n#include <vector>\n\ntemplate <typename T>\nT sum(const std::vector<T>& xs) {\n  T total{};
  for (const auto& x : xs) total += x;\n  return total;\n}\n\nint main() { std::cout << sum<int>({1, 2}) << '\\n'; }\n"""
MADE = {"pixel.png": base64.b64decode(PNG), "tone.wav": WAV, "sum.cpp": CPP.encode(), "model.onnx": MODEL.read_bytes()}
MADE["sensors.json"] = json.dumps([{"id": n, "on": n > 2, "at": [n / 2, 1], "unit": "°C"} for n in range(9)]).encode()
REPOSITORY = ("README.md", "Makefile", "pyproject.toml", "examples/01_quickstart.py")


class Featuriser(torch.nn.Module):
    def forward(self, files):  # the first and the last bytes of each file, white space around them stripped
        rows = torch.full((len(files), BEG + END), CONFIG["padding_token"], dtype=torch.int32)
        for row, file in zip(rows, files, strict=True):
            first, last = file[:BLOCK].lstrip()[:BEG], file[-BLOCK:].rstrip()[-END:]
            row[: len(first)] = torch.tensor(list(first))
            row[BEG + END - len(last) :] = torch.tensor(list(last))
        return rows


class Top3(torch.nn.Module):
    def forward(self, scores):
        return scores.topk(3)


def timed(call, *args):
    since = time.perf_counter()
    return call(*args), 1000 * (time.perf_counter() - since)


if __name__ == "__main__":
    ...
