"""The first example: it runs anywhere, its answers are right, and its featuriser is magika's."""

from __future__ import annotations

import io
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "01_quickstart.py"
RIGHT = {
    "dot.png": "png",
    "tone.wav": "wav",
    "sum.cpp": "cpp",
    "facts.json": "json",
    "model.onnx": "onnx",
    "01_quickstart.py": "python",
}
OF_THE_REPOSITORY = {"README.md": "markdown", "Makefile": "makefile", "pyproject.toml": "toml"}

pytestmark = pytest.mark.slow
magika = pytest.importorskip("magika")


def run(script: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run an example in a fresh interpreter that finds our packages in this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, script], cwd=cwd, env=environment, capture_output=True, text=True)


def answers(output: str) -> dict[str, str]:
    """The table that the example prints, as file -> answer."""
    rows = [line.split() for line in output.splitlines()]
    head = rows.index(["file", "answer", "score", "ms"])
    return {row[0]: row[1] for row in rows[head + 1 :] if len(row) == 4}


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The names that the example defines, without its run."""
    return runpy.run_path(str(EXAMPLE), run_name="example")


def test_quickstart_names_files_of_the_repository_and_of_its_own(tmp_path: Path) -> None:
    done = run(EXAMPLE, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert answers(done.stdout) == {**RIGHT, **OF_THE_REPOSITORY}
    assert "agree with onnxruntime" in done.stdout


def test_quickstart_runs_from_a_copied_folder_alone(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE.parent, tmp_path / "examples")
    done = run(tmp_path / "examples" / EXAMPLE.name, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert answers(done.stdout) == RIGHT


def test_quickstart_says_so_and_exits_with_1_if_the_answers_differ(tmp_path: Path) -> None:
    source = EXAMPLE.read_text("utf-8")
    wrong = source.replace('{"bytes": rows}', '{"bytes": rows // 2}')
    assert wrong != source
    (tmp_path / "wrong.py").write_text(wrong, "utf-8")
    done = run(tmp_path / "wrong.py", tmp_path)
    assert done.returncode == 1
    assert "dot.png: the server's answer is not what onnxruntime says in this process" in done.stderr
    assert "Traceback" not in done.stderr


def test_quickstart_fits_on_a_screen() -> None:
    assert len(EXAMPLE.read_text("utf-8").splitlines()) <= 60


def samples() -> dict[str, bytes]:
    """Contents at the edges of the featuriser: short, padded with white space, around a block, all byte values."""
    noise = np.random.default_rng(7).integers(0, 256, 20_000, np.uint8).tobytes()
    text = "".join(f"line {number} of a text, which is longer than a block\n" for number in range(200)).encode()
    blank = b" \t\r\n\x0b\x0c"
    return {
        "eight bytes": b"GIF89a\1\2",
        "blank around it": blank * 100 + EXAMPLE.read_bytes() + blank * 100,
        "a block of blanks before it": b" " * 4080 + b"import sys\nprint(sys)" * 3 + b"\n" * 4096,
        "a byte less than a half": text[:1023],
        "a half": text[:1024],
        "a byte more than a half": text[:1025],
        "a block": text[:4096],
        "a byte more than a block": text[:4097],
        "long text": text,
        "noise": noise,
        "zeros": bytes(5000),
        "this file": Path(__file__).read_bytes(),
        "magika's own source": Path(magika.__file__).with_name("magika.py").read_bytes(),
    }


@pytest.mark.parametrize("name", samples())
def test_quickstart_cuts_files_as_magika_does(example: dict[str, Any], name: str) -> None:
    from remote_ops import load

    content = samples()[name]
    expected = magika.Magika().identify_bytes(content)
    rows = example["Featuriser"]()([content]).numpy()
    assert (rows.dtype, rows.shape) == (np.dtype(np.int32), (1, 2048))
    scores = load(example["MODEL"]).infer({"bytes": rows})["target_label"][0]
    assert example["CONFIG"]["target_labels_space"][scores.argmax()] == expected.dl.label
    assert scores.max() == pytest.approx(expected.score, abs=1e-5)


def test_quickstart_features_equal_magikas_byte_for_byte(example: dict[str, Any]) -> None:
    from magika.types.seekable import Seekable

    config = example["CONFIG"]
    contents = [*samples().values(), b"", b"x", b"  x  "]
    rows = example["Featuriser"]()(contents).numpy()
    for row, content in zip(rows, contents, strict=True):
        theirs = magika.Magika._extract_features_from_seekable(
            Seekable(io.BytesIO(content)), 1024, 0, 1024, config["padding_token"], config["block_size"], False
        )
        assert row.tolist() == [*theirs.beg, *theirs.end]
