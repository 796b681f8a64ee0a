"""The examples from the second on: they run anywhere, and say so if what they show does not hold."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "examples" / "02_train_through_remote.py"
PARALLEL = ROOT / "examples" / "03_parallel_branches.py"
TF_GRAPH = ROOT / "examples" / "04_tf_graph.py"
SAME_NOTES = ROOT / "examples" / "06_same_notes.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run(script: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run an example in a fresh interpreter that finds our packages in this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, script], cwd=cwd, env=environment, capture_output=True, text=True)


def changed(script: Path, old: str, new: str, folder: Path) -> Path:
    """A copy of an example with one thing changed."""
    source = script.read_text("utf-8")
    assert source.count(old) == 1
    copy = folder / script.name
    copy.write_text(source.replace(old, new), "utf-8")
    return copy


def test_training_through_the_remote_network_learns_what_training_here_learns(tmp_path: Path) -> None:
    done = run(Path(shutil.copy(TRAIN, tmp_path)), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) % remote, (\d+) % local, (\d+) % with a head alone", done.stdout)
    assert found is not None, done.stdout
    remote, local, alone = map(int, found.groups())
    assert remote == local >= 90
    assert alone < 50  # so what it learned came through the network's gradient


def test_training_example_exits_with_1_if_the_gradient_is_not_the_networks(tmp_path: Path) -> None:
    wrong = changed(TRAIN, "served = TorchModel(crepe(),", "served = TorchModel(Crepe(),", tmp_path)
    wrong.write_text(
        wrong.read_text("utf-8").replace("STEPS, ROWS = 16000, 1024, 48, 16", "STEPS, ROWS = 16000, 1024, 3, 4")
    )
    done = run(wrong, tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == "training through the remote network is not what it is with the network here"


def test_branches_example_votes_for_the_best_model(tmp_path: Path) -> None:
    done = run(Path(shutil.copy(PARALLEL, tmp_path)), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(one by one|Parallel|compiled) ", done.stdout, re.MULTILINE) == [
        *("one by one", "Parallel", "compiled")
    ]
    votes = {name: int(percent) for name, percent in re.findall(r"(north|south|west) (\d+)%", done.stdout)}
    assert votes["north"] > 90


def test_tensorflow_example_learns_a_chord_and_the_keys_of_a_mixed_up_piano(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    done = run(Path(shutil.copy(TF_GRAPH, tmp_path)), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    strength = {name: float(value) for name, value in re.findall(r"^  ([A-G]) (\d\.\d+)", done.stdout, re.MULTILINE)}
    assert sorted(sorted(strength, key=strength.__getitem__)[-4:]) == ["B", "C", "E", "G"]
    assert "asked for C D E F G A B, the Keras model plays C D E F G A B" in done.stdout


def test_tensorflow_example_exits_with_1_if_nothing_is_learned_through_the_remote_model(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    wrong = changed(TF_GRAPH, 'remote_op(url, sound[None, :, None], output_name="note")',
                    'tf.stop_gradient(remote_op(url, sound[None, :, None], output_name="note")) + 0 * strength[0]',
                    tmp_path)  # fmt: skip
    wrong.write_text(wrong.read_text("utf-8").replace("steps=30", "steps=2").replace("epochs=12", "epochs=1"))
    done = run(wrong, tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("what was learned through the remote model is not what was to be learned")


def test_one_network_as_onnx_and_as_a_saved_model_hears_the_notes_that_were_played(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    pytest.importorskip("onnxruntime")
    done = run(Path(shutil.copy(SAME_NOTES, tmp_path)), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^([A-G]#?\d) +([\d.]+) to ([\d.]+) s +\1 +\2 to \3 s$", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["C4", "E4", "C5", "G4"]


@pytest.mark.parametrize("script", [TRAIN, PARALLEL, TF_GRAPH, SAME_NOTES])
def test_examples_stay_short(script: Path) -> None:
    assert len(script.read_text("utf-8").splitlines()) <= 130
