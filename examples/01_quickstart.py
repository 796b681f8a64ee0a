"""Serve a trained model; call it from numpy and as a layer of a torch model; check both against onnxruntime.

Needs, in a checkout: pip install '.[torch,onnx,server]' magika   (magika brings a 3 MB model that names file types)."""

import json
import time
from pathlib import Path

import magika
import numpy as np
import onnxruntime
import torch

import server_ref
from remote_ops import Endpoint, load
from remote_ops.torch import RemoteModule

MODEL = Path(magika.__file__).parent / "models/standard_v3_3/model.onnx"
CONFIG = json.loads(MODEL.with_name("config.min.json").read_text())
BEG, END, BLOCK = CONFIG["beg_size"], CONFIG["end_size"], CONFIG["block_size"]
PNG = b"""\x89PNG\r
\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\0\0\0\0:~\x9bU\0\0\0\nIDATx\x9cc`\0\0\0\2\0\1H\xaf\xa4q\0\0\0\0IEND\xaeB`\x82"""
WAV = b"RIFFd\x1f\0\0WAVEfmt \x10\0\0\0\1\0\1\0@\x1f\0\0@\x1f\0\0\1\0\x08\0data@\x1f\0\0" + bytes(range(250)) * 32
CPP = b"""#include <iostream>\n#include <vector>\n\ntemplate <typename T>\nT sum(const std::vector<T>& xs) {
  T total{};\n  for (const auto& x : xs) total += x;\n  return total;\n}\n
int main() { std::cout << sum<int>({1, 2, 3}) << '\n'; }\n"""
FACTS = json.dumps([{"id": n, "name": f"s-{n}", "on": n > 2, "at": [n / 2, 1]} for n in range(9)], indent=1).encode()


class Featuriser(torch.nn.Module):
    def forward(self, files):  # the first and the last bytes of each file, without the white space around it
        rows = torch.full((len(files), BEG + END), CONFIG["padding_token"], dtype=torch.int32)
        for row, file in zip(rows, files, strict=True):
            first, last = file[:BLOCK].lstrip()[:BEG], file[-BLOCK:].rstrip()[-END:]
            row[: len(first)] = torch.tensor(list(first))
            row[BEG + END - len(last) :] = torch.tensor(list(last))
        return rows


class Top3(torch.nn.Module):
    def forward(self, scores):
        return scores.topk(3)


if __name__ == "__main__":
    files = {"dot.png": PNG, "tone.wav": WAV, "sum.cpp": CPP, "facts.json": FACTS, "model.onnx": MODEL.read_bytes()}
    others = [Path(__file__).parents[1] / name for name in ("README.md", "Makefile", "pyproject.toml")]
    files |= {path.name: path.read_bytes() for path in (Path(__file__), *others) if path.exists()}
    in_process = onnxruntime.InferenceSession(MODEL)
    with server_ref.running({"magika": load(MODEL)}) as url:
        endpoint, model = Endpoint(url), torch.nn.Sequential(Featuriser(), RemoteModule(url), Top3())
        print(f"{url} serves {endpoint.signature}\n\n{'file':18}{'answer':10}{'score':>8}{'ms':>8}")
        for name, file in files.items():
            rows, since = model[0]([file]).numpy(), time.perf_counter()
            scores, ms = endpoint(rows), 1000 * (time.perf_counter() - since)
            (best, labels), expected = model([file]), in_process.run(None, {"bytes": rows})[0]
            print(f"{name:18}{CONFIG['target_labels_space'][labels[0, 0]]:10}{best[0, 0]:8.3f}{ms:8.1f}")
            if not (np.allclose(scores, expected, atol=1e-4) and np.allclose(best, expected[0, labels], atol=1e-4)):
                raise SystemExit(f"{name}: the server's answer is not what onnxruntime says in this process")
    print("\nEndpoint and nn.Sequential agree with onnxruntime in this process.")
