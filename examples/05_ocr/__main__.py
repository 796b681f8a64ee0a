"""Read pictures with a graph of three trained models, two of them behind a server: see ocr.yaml.

A rendered picture with a line upside down, a scan, and a blank picture are read, and what is read is held against the
package that the models come from, called by itself. The pictures with frames around the lines, the plot of the graph,
and for each run a table of what each node did and a trace for chrome://tracing go to a folder, build/ocr unless said:

    python examples/05_ocr [FOLDER]

Needs, in a checkout: pip install '.[onnx,ensemble,server]' opencv-python-headless pyclipper shapely pillow
                      pip install --no-deps rapidocr-onnxruntime scikit-image   (the models, and the scan)"""

import importlib.util
import os
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rapidocr_onnxruntime import RapidOCR

import ensemble
import server_ref
import stages
from ensemble.latency import chrome, latencies_in, table
from ensemble.plot import plot
from remote_ops import load

GRAPH = Path(__file__).with_name("ocr.yaml")


def rendered():
    """Two lines of text, the second upside down: `(320, 800, 3)`."""
    picture, font = Image.new("RGB", (800, 320), "white"), ImageFont.load_default(40)
    draw = ImageDraw.Draw(picture)
    draw.text((30, 60), "as if it were a layer of this one.", "black", font)
    picture.paste(picture.crop((0, 40, 800, 120)).rotate(180), (0, 200))
    draw.rectangle((0, 40, 800, 120), "white")
    draw.text((30, 60), "Call a model on another machine", "black", font)
    return np.array(picture)


def scanned():
    """A page of a book: `(191, 384, 3)`."""
    package = Path(importlib.util.find_spec("skimage").origin).parent
    return np.array(Image.open(package / "data/page.png").convert("RGB"))


def drawn(picture, boxes, texts):
    """The picture with a frame around each line, and what it says above it."""
    picture = cv2.polylines(picture.copy(), boxes.astype(np.int32), True, (0, 0, 255), 2)
    for (x, y), text in zip(boxes.min(1).astype(int).tolist(), texts, strict=True):
        cv2.putText(picture, text, (x, max(10, y - 5)), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 255))
    return picture


def best_ms(run, times=3):
    """What a run takes, in milliseconds, at best."""
    took = []
    for _ in range(times):
        since = time.perf_counter()
        run()
        took.append(1000 * (time.perf_counter() - since))
    return min(took)


def read(ocr, package, picture, place):
    """Read a picture with both, and print it; whether they read the same. What the graph did goes to files."""
    ocr.infer({"picture": picture})  # the first of each size is slower
    result = ocr.run({"picture": picture}, trace=True)
    boxes, lines, scores = result["boxes"], [line.decode() for line in result["text"]], result["score"].tolist()
    cv2.imwrite(f"{place}.png", drawn(picture, boxes, lines))
    Path(f"{place}.txt").write_text(table([result.trace]) + "\n", "utf-8")
    Path(f"{place}.trace.json").write_text(chrome([(place.name, result.trace)]), "utf-8")
    ms, alone = best_ms(lambda: ocr.infer({"picture": picture})), best_ms(lambda: package(picture))
    print(f"{place.name}: {len(lines)} lines in {ms:.0f} ms; the package by itself: {alone:.0f} ms")
    print("".join(f"  {score:.3f}  {line}\n" for line, score in zip(lines, scores, strict=True)), end="")
    found = [[*line] for line in zip(boxes.tolist(), lines, scores, strict=True)]
    return found == (package(picture)[0] or [])


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/ocr")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"rendered": rendered(), "scan": scanned(), "blank": np.full((320, 640, 3), 255, np.uint8)}
    models = {"detection": stages.DETECTION, "recognition": stages.RECOGNITION}
    with server_ref.running({name: load(path, threads=os.cpu_count()) for name, path in models.items()}) as url:
        graph = GRAPH.read_text("utf-8").replace("http://127.0.0.1:9000/", url)
        with ensemble.load(graph, file=GRAPH) as ocr:
            package = RapidOCR()
            wrong = [name for name, picture in pictures.items() if not read(ocr, package, picture, folder / name)]
            took = latencies_in(str(folder / "rendered.trace.json"))
            (folder / "graph.svg").write_text(plot(ocr.plan, "svg", took), "utf-8")
    if wrong:
        raise SystemExit(f"{', '.join(wrong)}: what the graph reads is not what the package reads by itself")
    print("\nText, scores and boxes are exactly those of the package.", end=" ")
    print(f"Pictures, graph and what each node did are in {folder}/")
