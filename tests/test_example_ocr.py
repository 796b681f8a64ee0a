"""The example that reads pictures: what it reads is what RapidOCR reads by itself, text, scores and boxes alike."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ensemble
import server_ref
from ensemble.serial import run_serial
from remote_ops import Endpoint, load
from remote_ops.signature import Array

pytest.importorskip("rapidocr_onnxruntime")
cv2 = pytest.importorskip("cv2")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "05_ocr"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Reading = list[list[Any]]


@pytest.fixture(scope="module")
def stages() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("stages")


@pytest.fixture(scope="module")
def main(stages: Any) -> Any:
    spec = importlib.util.spec_from_file_location("ocr_example", FOLDER / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package() -> Callable[[Array], Reading]:
    """What the package reads: corners, text and score of each line."""
    reader = importlib.import_module("rapidocr_onnxruntime").RapidOCR()
    return lambda picture: reader(picture)[0] or []


@pytest.fixture(scope="module")
def url(stages: Any) -> Iterator[str]:
    with server_ref.running({"detection": load(stages.DETECTION), "recognition": load(stages.RECOGNITION)}) as url:
        yield url


@pytest.fixture(scope="module")
def ocr(stages: Any, url: str) -> Iterator[ensemble.Ensemble]:
    with ensemble.load(document(url), file=FOLDER / "ocr.yaml") as ocr:
        yield ocr


def document(url: str) -> str:
    """The graph, with its models at a URL."""
    return (FOLDER / "ocr.yaml").read_text("utf-8").replace("http://127.0.0.1:9000/", url)


def picture_of(main: Any, kind: str) -> Array:
    """A picture `(H, W, 3)` of a kind that takes a way of its own through the stages."""
    rendered: Array = main.rendered()
    if kind == "many lines":  # more than one batch
        blank = np.full((1400, 800, 3), 255, np.uint8)
        for at, line in enumerate(("one", "two little words", "three", "one that is longer than the others") * 5):
            cv2.putText(blank, f"{at} {line}", (20, 60 + 65 * at), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (0, 0, 0), 2)
        return blank
    if kind == "slanted":
        turn = cv2.getRotationMatrix2D((400, 160), 7, 1)
        return np.asarray(cv2.warpAffine(rendered, turn, (800, 320), borderValue=(255, 255, 255)))
    return {
        "rendered": rendered,
        "scan": main.scanned(),
        "blank": np.full((320, 640, 3), 255, np.uint8),
        "on its side": np.ascontiguousarray(np.rot90(rendered)),
        "upside down": np.ascontiguousarray(np.rot90(main.scanned(), 2)),
        "strip": rendered[40:120],  # so wide that margins are added
        "small": np.asarray(cv2.resize(rendered[40:120], (200, 20))),
        "large": np.asarray(cv2.resize(rendered, (3000, 1200))),
    }[kind]


KINDS = ("rendered", "scan", "blank", "many lines", "slanted", "on its side", "upside down", "strip", "small", "large")
LINES = {"blank": 0, "rendered": 2, "many lines": 20, "strip": 1}


def as_reading(boxes: Array, text: Array, score: Array) -> Reading:
    """The same as the package gives it."""
    return [[box, line.decode(), sure] for box, line, sure in zip(boxes.tolist(), text, score.tolist(), strict=True)]


def by_hand(stages: Any, url: str, picture: Array) -> Reading:
    """What the graph does, written out; no stage can write to what it is given."""

    def sealed(*arrays: Array) -> Any:
        for array in arrays:
            array.flags.writeable = False
        return arrays if len(arrays) > 1 else arrays[0]

    direction = stages.direction()
    with Endpoint(f"{url}detection") as detection, Endpoint(f"{url}recognition") as recognition:
        page, making = sealed(*stages.page(sealed(picture.copy())))
        boxes = sealed(stages.boxes(page, sealed(detection(sealed(stages.detection_input(page))))))
        pixels, sizes, order = sealed(*stages.crops(page, boxes))
        text, score = [np.empty(0, object)], [np.empty(0)]
        for start in range(0, len(order), 6):
            crops = pixels, sizes, order[start : start + 6]
            likely = sealed(direction.infer({"x": stages.direction_input(*crops)})["save_infer_model/scale_0.tmp_1"])
            lines = stages.lines(sealed(recognition(stages.recognition_input(*crops, likely))))
            text.append(lines[0])
            score.append(lines[1])
        return as_reading(*stages.reading(picture, making, boxes, order, np.concatenate(text), np.concatenate(score)))


@pytest.mark.parametrize("kind", KINDS)
def test_stages_and_models_called_one_after_the_other_read_exactly_what_the_package_reads(
    stages: Any, main: Any, package: Callable[[Array], Reading], url: str, kind: str
) -> None:
    picture = picture_of(main, kind)
    expected = package(picture)
    assert len(expected) == LINES.get(kind, len(expected))
    assert by_hand(stages, url, picture) == expected


@pytest.mark.parametrize("kind", ["rendered", "scan", "blank", "many lines", "strip"])
def test_graph_reads_exactly_what_the_package_reads(
    ocr: ensemble.Ensemble, main: Any, package: Callable[[Array], Reading], kind: str
) -> None:
    picture = picture_of(main, kind)
    assert as_reading(**ocr.infer({"picture": picture})) == package(picture)


@pytest.mark.parametrize("kind", ["many lines", "blank"])
def test_graph_reads_the_same_one_node_after_the_other(ocr: ensemble.Ensemble, main: Any, kind: str) -> None:
    picture = picture_of(main, kind)
    serial: Any = run_serial(ocr.plan, {"picture": picture})
    assert as_reading(**serial) == as_reading(**ocr.infer({"picture": picture}))


def test_graph_gives_empty_tensors_for_a_blank_picture_and_asks_no_model_but_the_first(
    ocr: ensemble.Ensemble, main: Any
) -> None:
    read = ocr.run({"picture": picture_of(main, "blank")}, trace=True)
    assert {name: (array.dtype, array.shape) for name, array in read.items()} == {
        "boxes": (np.float32, (0, 4, 2)),
        "text": (object, (0,)),
        "score": (np.float64, (0,)),
    }
    assert read.trace is not None
    assert [span.node for span in read.trace.spans if span.kind == "remote"] == ["detection"]


def test_graph_asks_the_recognition_model_for_six_lines_at_a_time(ocr: ensemble.Ensemble, main: Any) -> None:
    read = ocr.run({"picture": picture_of(main, "many lines")}, trace=True)
    assert read.trace is not None
    asked = [span for span in read.trace.spans if span.node.endswith("/recognition")]
    assert len(asked) == 4  # 20 lines
    assert all(len(span.sent) == 1 for span in asked)


def test_graph_that_is_served_reads_what_it_reads_here(
    ocr: ensemble.Ensemble, main: Any, package: Callable[[Array], Reading]
) -> None:
    with server_ref.running({"ocr": ocr}) as url, Endpoint(url) as endpoint:
        for kind in ("rendered", "blank"):
            picture = picture_of(main, kind)
            assert as_reading(**endpoint.infer({"picture": picture})) == package(picture)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the example in a fresh interpreter that finds our packages in this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, folder, *arguments], env=environment, capture_output=True, text=True)


def test_example_reads_the_three_pictures_and_writes_what_it_saw(tmp_path: Path) -> None:
    done = run(FOLDER, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.findall(r"^(\w+): (\d+) lines", done.stdout, re.MULTILINE) == [
        *(("rendered", "2"), ("scan", "5"), ("blank", "0"))
    ]
    assert re.findall(r"^  0\.\d+  (.*)", done.stdout, re.MULTILINE)[:2] == [
        *("Call a model on another machine", "as if it were a layer of this one.")
    ]
    for name in ("rendered", "scan", "blank"):
        assert cv2.imread(str(tmp_path / f"{name}.png")).ndim == 3
        assert re.search(r"^detection +remote +1 ", (tmp_path / f"{name}.txt").read_text("utf-8"), re.MULTILINE)
        assert json.loads((tmp_path / f"{name}.trace.json").read_text("utf-8"))["traceEvents"]
    assert "recognition" in (tmp_path / "graph.svg").read_text("utf-8")


def test_example_exits_with_1_if_the_line_upside_down_is_not_turned(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "ocr"))
    stages = (folder / "stages.py").read_text("utf-8")
    program = (folder / "__main__.py").read_text("utf-8")
    assert stages.count("np.rot90(crop, 2)") == program.count("times=3") == 1
    (folder / "__main__.py").write_text(program.replace("times=3", "times=1"), "utf-8")  # to be quick
    (folder / "stages.py").write_text(stages.replace("np.rot90(crop, 2)", "crop"), "utf-8")
    done = run(folder, str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr == "rendered: what the graph reads is not what the package reads by itself\n"


def test_example_stays_short() -> None:
    for name in ("__main__.py", "stages.py", "ocr.yaml"):
        assert len((FOLDER / name).read_text("utf-8").splitlines()) <= 130
