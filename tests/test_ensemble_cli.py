"""The command `ensemble`: what it prints and saves, and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import server_ref
from ensemble import __main__ as cli
from ensemble import spec
from ensemble.__main__ import _parser, main
from remote_ops import FunctionServable, TensorSpec, __version__

ROOT = Path(__file__).parents[1]
BAD = Path(__file__).parent / "ensemble_bad"
Array = npt.NDArray[Any]
Printed = pytest.CaptureFixture[str]

# --------------------------------------------------------------------------- models that the graphs here name

ROWS, TOTAL = TensorSpec("x", "float32", (-1, 4)), TensorSpec("t", "float32", (-1,))
both = threading.Barrier(2)


def positive(x: Array) -> Array:
    if (x < 0).any():
        raise ValueError("negative")
    return 2 * x


def met(x: Array) -> Array:
    both.wait(timeout=30)
    return x


def interrupting(x: Array) -> Array:
    if (x == 2).all():
        os.kill(os.getpid(), signal.SIGINT)
    return x


stopping = FunctionServable(interrupting, [ROWS], [TensorSpec("y", "float32", (-1, 4))])


def endless(x: Array) -> Array:
    threading.Event().wait(600)
    return x


slow = FunctionServable(endless, [ROWS], [TensorSpec("y", "float32", (-1, 4))])
stopped = FunctionServable(lambda x: 1 // 0, [ROWS], [TensorSpec("y", "float32", (-1, 4))])
double = FunctionServable(positive, [ROWS], [TensorSpec("y", "float32", (-1, 4))])
together = FunctionServable(met, [ROWS], [TensorSpec("y", "float32", (-1, 4))])
add = FunctionServable(lambda x, shift: (x + shift).sum(1), [ROWS, TensorSpec("shift", "float32", ())], [TOTAL])
sizes = FunctionServable(
    lambda image: np.array(image.shape), [TensorSpec("image", "uint8", None)], [TensorSpec("shape", "int64", (-1,))]
)
letters = FunctionServable(
    lambda text: np.array([len(item) for item in text]),
    [TensorSpec("text", "string", (-1,))],
    [TensorSpec("n", "int64", (-1,))],
)
odd = FunctionServable(
    lambda x: (
        x.astype(ml_dtypes.bfloat16),
        np.array(["café", b"\xff"], object),
        np.array([np.nan, np.inf], np.float32),
    ),
    [TensorSpec("x", "float32", (-1,))],
    [TensorSpec("b", "bfloat16", (-1,)), TensorSpec("s", "string", (2,)), TensorSpec("n", "float32", (-1,))],
)

SUMS = """\
ensemble: 1
name: sums
inputs:
  x: {dtype: float32, shape: [N, 4]}
  shift: {dtype: float32, shape: [], optional: true, default: 1.0}
outputs: {y: double.y, total: add.t}
nodes:
  double: {kind: python, call: test_ensemble_cli:double, inputs: {x: $inputs.x}}
  add: {kind: python, call: test_ensemble_cli:add, inputs: {x: double.y, shift: $inputs.shift}}
"""


@pytest.fixture
def sums(tmp_path: Path) -> str:
    """A graph of two nodes, whose first one takes no negative numbers."""
    return written(tmp_path / "sums.yaml", SUMS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five files, of which the fourth makes the graph fail."""
    (tmp_path / "in").mkdir()
    for number in range(5):
        np.save(tmp_path / "in" / f"f{number}.npy", np.full((2, 4), -1 if number == 3 else number, np.float32))
    return tmp_path / "in"


def written(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


def graph_of(path: Path, model: str, given: str, output: str) -> str:
    """A graph of one node, with one input and one output."""
    name = given.partition(":")[0]
    node = f"{{kind: python, call: test_ensemble_cli:{model}, inputs: {{{name}: $inputs.{name}}}}}"
    text = f"ensemble: 1\ninputs: {{{given}}}\noutputs: {{out: n.{output}}}\nnodes:\n  n: {node}\n"
    return written(path / f"{model}.yaml", text)


def shell(*args: str, stdin: bytes = b"", code: str = "", **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, *(["-c", code] if code else ["-m", "ensemble"]), *args]
    return subprocess.run(command, input=stdin, capture_output=True, check=False, env=environment, **options)


# --------------------------------------------------------------------------- check


def test_a_valid_graph_is_said_to_be_valid(sums: str, capsys: Printed) -> None:
    assert main(["check", sums]) == 0
    assert capsys.readouterr().out == f"{sums}: valid, 2 nodes\n"


def test_every_fault_is_a_line_in_the_order_of_the_file(capsys: Printed) -> None:
    file = str(BAD / "five_faults.yaml")
    assert main(["check", file]) == 1
    *faults, summary = capsys.readouterr().out.splitlines()
    assert summary == f"{file}: 5 faults"
    places = [re.match(r"E1\d\d (.*):(\d+):(\d+) ", fault) for fault in faults]
    assert len(faults) == 5
    assert all(place is not None and place[1] == file for place in places)
    lines = [int(place[2]) for place in places if place]
    assert lines == sorted(lines)


def test_warnings_alone_are_no_failure_unless_they_are_to_be(tmp_path: Path, capsys: Printed) -> None:
    unused = written(tmp_path / "g.yaml", SUMS.replace(", total: add.t", ""))
    assert main(["check", unused]) == 0
    *warnings, summary = capsys.readouterr().out.splitlines()
    assert all(line.startswith("W109 ") for line in warnings)
    assert re.search(r"valid, 2 nodes, \d warnings?$", summary)
    assert main(["check", unused, "--strict"]) == 1
    assert "E109" in capsys.readouterr().out


def test_several_graphs_are_checked_and_one_with_faults_is_enough(sums: str, capsys: Printed) -> None:
    assert main(["check", sums, str(BAD / "cycle_of_three.yaml"), sums]) == 1
    printed = capsys.readouterr().out
    assert printed.count("valid, 2 nodes") == 2
    assert " -> " in printed


REMOTE = """\
ensemble: 1
inputs: {{x: {{dtype: float32, shape: [N, 4]}}}}
outputs: {{y: far.y}}
nodes:
  far: {{kind: remote, url: "{url}", inputs: {{x: $inputs.x}}}}
"""


def test_offline_asks_nobody(tmp_path: Path, capsys: Printed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        file = written(tmp_path / "g.yaml", REMOTE.format(url=f"http://127.0.0.1:{door.getsockname()[1]}/m"))
        assert main(["check", file, "--offline"]) == 0
        door.setblocking(False)
        with pytest.raises(BlockingIOError):
            door.accept()
    assert "not asked, because of --offline" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_a_fault_or_a_warning_as_is_said(tmp_path: Path, capsys: Printed) -> None:
    file = written(tmp_path / "g.yaml", REMOTE.format(url="http://127.0.0.1:1/m"))
    assert main(["check", file]) == 1
    assert "E116" in capsys.readouterr().out
    assert main(["check", file, "--metadata", "warn"]) == 0
    assert "W116" in capsys.readouterr().out


def test_what_remote_models_say_is_recorded_and_checked_by_later(
    tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graphs").mkdir()
    with server_ref.running({"double": double}) as url:
        file = written(tmp_path / "graphs" / "g.yaml", REMOTE.format(url=url))
        assert main(["check", file, "--record", "models.json"]) == 0
    assert capsys.readouterr().err == "1 remote model -> models.json\n"
    assert main(["check", file]) == 1
    assert main(["check", file, "--metadata", "file:models.json"]) == 0
    (told,) = json.loads((tmp_path / "models.json").read_text()).values()
    assert (told["inputs"][0]["dtype"], told["inputs"][0]["shape"]) == ("float32", [-1, 4])
    wrong = written(tmp_path / "wrong.yaml", REMOTE.format(url=url).replace("float32", "int64"))
    capsys.readouterr()
    assert main(["check", wrong, "--metadata", "file:models.json"]) == 1
    assert "E106" in capsys.readouterr().out
    assert main(["check", file, file, "--record", "models.json"]) == 2


OUTER = """\
ensemble: 1
{metadata}
inputs: {{x: {{dtype: float32, shape: [N, 4]}}}}
outputs: {{y: again.y}}
nodes:
  inner: {{kind: graph, ref: inner.yaml, inputs: {{x: $inputs.x}}}}
  again: {{kind: graph, ref: ./inner.yaml, inputs: {{x: inner.y}}}}
"""


@pytest.mark.parametrize(
    ("flags", "metadata"),
    [(["--offline"], ""), (["--metadata", "warn"], ""), ([], "metadata: warn"), (["--offline"], "metadata: require")],
)
def test_what_is_said_of_remote_models_holds_for_graphs_in_graphs(
    flags: list[str], metadata: str, tmp_path: Path, capsys: Printed
) -> None:
    inner = written(tmp_path / "inner.yaml", REMOTE.format(url="http://127.0.0.1:1/m"))
    outer = written(tmp_path / "outer.yaml", OUTER.format(metadata=metadata))
    assert main(["check", outer, *flags]) == 0
    printed = capsys.readouterr().out
    assert f"W116 {inner}:5:8 node 'far'" in printed
    assert ("not asked, because of --offline" in printed) == ("--offline" in flags)


def test_what_remote_models_of_graphs_in_graphs_say_is_recorded_too(tmp_path: Path, capsys: Printed) -> None:
    models = str(tmp_path / "models.json")
    outer = written(tmp_path / "outer.yaml", OUTER.format(metadata=""))
    with server_ref.running({"double": double}) as url:
        written(tmp_path / "inner.yaml", REMOTE.format(url=url))
        assert main(["check", outer, "--record", models]) == 0
    assert [*json.loads(Path(models).read_text())] == ["inner/far", "again/far"]
    assert main(["check", outer]) == 1
    assert main(["check", outer, "--metadata", f"file:{models}"]) == 0
    told = written(tmp_path / "told.yaml", OUTER.format(metadata="metadata: file:models.json"))
    assert main(["check", told]) == 0
    Path(models).write_text("{}")
    capsys.readouterr()
    assert main(["check", told]) == 1
    assert "the metadata file has no 'inner/far'" in capsys.readouterr().out
    own = written(tmp_path / "own.json", json.dumps({"far": {"inputs": ["x: float32 [-1, 4]"], "outputs": []}}))
    text = (
        Path(tmp_path / "inner.yaml").read_text().replace("outputs: {y: far.y}", f"outputs: {{}}\nmetadata: file:{own}")
    )
    written(tmp_path / "inner.yaml", text)
    main(["check", told])
    assert "the metadata file has no" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    [
        *([], ["chekc"], ["check"], ["check", "none.yaml"], ["run"], ["run", "none.yaml"], ["plot", "none.yaml"]),
        *(["serve"], ["serve", "none.yaml"], ["check", "g.yaml", "--metadata", "maybe"]),
        *(["check", "g.yaml", "--offline", "--metadata", "warn"], ["run", "g.yaml", "--repeat", "0"]),
    ],
)
def test_wrong_arguments_exit_with_2(args: list[str], capsys: Printed) -> None:
    try:
        status = main(args)
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    assert "Traceback" not in capsys.readouterr().err


def test_it_says_its_version_and_every_command_explains_itself(capsys: Printed) -> None:
    for args, words in ((["--version"], __version__), (["run", "--help"], "--profile"), (["check", "--help"], "exits")):
        with pytest.raises(SystemExit) as end:
            _parser().parse_args(args)
        assert end.value.code == 0
        assert words in capsys.readouterr().out


# --------------------------------------------------------------------------- schema, plot, serve


def test_schema_prints_the_json_schema(capsys: Printed) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == spec.json_schema()


def test_plot_prints_mermaid_or_saves_by_the_ending_of_the_file(sums: str, tmp_path: Path, capsys: Printed) -> None:
    assert main(["plot", sums]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("flowchart TB\n")
    for file, start in (("g.mmd", "flowchart TB"), ("g.svg", "<svg "), ("g.md", "```mermaid\nflowchart TB")):
        assert main(["plot", sums, "-o", str(tmp_path / file)]) == 0
        assert (tmp_path / file).read_text("utf-8").startswith(start)
    assert main(["plot", sums, "-o", str(tmp_path / "g.png")]) == 2
    assert main(["plot", sums, "-o", str(tmp_path / "none" / "g.svg")]) == 2


def test_plot_shows_how_long_nodes_took_and_tells_an_old_trace(sums: str, tmp_path: Path, capsys: Printed) -> None:
    trace = str(tmp_path / "t.json")
    assert main(["run", sums, "-i", "x=[[1, 2, 3, 4]]", "--repeat", "3", "--trace", trace]) == 0
    capsys.readouterr()
    assert main(["plot", sums, "--trace", trace]) == 0
    printed = capsys.readouterr()
    assert len(re.findall(r"[\d.]+ ms, 3 calls", printed.out)) == 2
    assert printed.err == ""
    changed = written(tmp_path / "changed.yaml", SUMS + "# newer\n")
    assert main(["plot", changed, "--trace", trace]) == 0
    assert "another graph, or of an older version" in capsys.readouterr().err


def test_a_graph_with_faults_is_neither_drawn_nor_run(capsys: Printed) -> None:
    file = str(BAD / "cycle_of_three.yaml")
    for args in (["plot", file], ["run", file]):
        assert main(args) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "E104" in printed.err


def test_serve_becomes_the_server_with_its_flags(sums: str) -> None:
    done = shell("serve", sums, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(b"usage: python -m server_ref")


# --------------------------------------------------------------------------- run: inputs


def test_a_run_prints_its_outputs(sums: str, capsys: Printed) -> None:
    assert main(["run", sums, "-i", "x=[[1, 2, 3, 4]]"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["y: float32 [1, 4]", "[[2. 4. 6. 8.]]", "total: float32 [1]", "[24.]"]
    assert re.fullmatch(r"took [\d.]+ ms\n", printed.err)


def total(capsys: Printed, *args: str) -> list[float]:
    """What `total` is of one run."""
    assert main(["run", *args, "-o", "total"]) == 0
    return [float(number) for number in capsys.readouterr().out.splitlines()[1].strip("[]").split()]


def test_inputs_come_from_files_of_each_kind(sums: str, tmp_path: Path, capsys: Printed) -> None:
    x = np.ones((1, 4), np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "all.npz", x=x, shift=np.float32(2))
    np.savez(tmp_path / "one.npz", anything=x)
    written(tmp_path / "x.json", "[[1, 1, 1, 1]]")
    for name in ("x.npy", "one.npz", "all.npz", "x.json"):
        assert total(capsys, sums, "-i", f"x={tmp_path / name}") == [12.0]
    assert total(capsys, sums, "-i", str(tmp_path / "all.npz")) == [16.0]
    assert total(capsys, sums, "-i", str(tmp_path / "x.npy"), "-i", "3") == [20.0]
    assert total(capsys, sums, "-i", f"x={tmp_path / 'x.npy'}", "-i", "shift=0") == [8.0]


def test_an_input_may_come_from_stdin_and_an_output_go_to_stdout(sums: str) -> None:
    file = io.BytesIO()
    np.save(file, np.ones((1, 4), np.float32))
    done = shell("run", sums, "-i", "x=-", "-o", "total=-", stdin=file.getvalue())
    assert done.returncode == 0
    assert np.load(io.BytesIO(done.stdout)).tolist() == [12.0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "takes 'x', float32 [-1, 4], which is not given: say --input x=..."),
        (("-i", "X=1"), "no input 'X'"),
        (("-i", "shfit=1"), "no input 'shfit'; did you mean 'shift'?"),
        (("-i", "x=[[1"), "this is no JSON"),
        (("-i", "x=none.npy"), "cannot read 'none.npy' (No such file or directory)"),
        (("-i", "x=none/*.npy"), "no files in 'none/*.npy'"),
        (("-i", "x={}"), "expected JSON of numbers"),
        (("-i", "x=1", "-i", "x=2"), "'x' is given twice"),
        (("-i", "1", "-i", "2", "-i", "3"), "takes 2 inputs, got 3"),
        (("-i", "x=1", "-i", "2"), "all inputs with a name"),
        (("-i", "x=[[1, 2, 3]]"), "expected float32 [-1, 4], got float32 [1, 3]"),
        (("-i", "x=[[1, 2, 3, 4]]", "-o", "totl"), "did you mean 'total'?"),
        (("-i", "x=[[1, 2, 3, 4]]", "--out", "o.csv"), "ends in .npz or .jsonl"),
        (("-i", "x=[[1, 2, 3, 4]]", "--trace", "none/t.json"), "folder that exists"),
    ],
)
def test_what_is_wrong_with_an_argument_is_said_in_one_line(
    sums: str, args: Sequence[str], words: str, capsys: Printed
) -> None:
    assert main(["run", sums, *args]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""
    assert printed.err.count("\n") == 1


def test_a_node_that_fails_is_named_and_the_status_is_1(sums: str, capsys: Printed) -> None:
    assert main(["run", sums, "-i", "x=[[-1, 2, 3, 4]]"]) == 1
    assert capsys.readouterr().err.startswith(
        "NodeError: node 'double' of 'sums' (python) failed: ValueError: negative"
    )


def test_a_run_says_which_members_a_vote_did_without(tmp_path: Path, capsys: Printed) -> None:
    node = "{kind: python, call: 'test_ensemble_cli:%s', inputs: {x: $inputs.x}}"
    nodes = f"nodes: {{a: {node % 'double'}, b: {node % 'stopped'}, vote: {{kind: combine, method: mean,"
    nodes += " inputs: {a: a, b: b}, quorum: {min: 1, required: [a]}}}"
    graph = tmp_path / "vote.yaml"
    graph.write_text(f"ensemble: 1\ninputs: {{x: {{dtype: float32, shape: [N, 4]}}}}\noutputs: {{y: vote}}\n{nodes}\n")
    assert main(["run", str(graph), "-i", "x=[[1, 2, 3, 4]]"]) == 0
    assert capsys.readouterr().err.splitlines()[0] == "'vote' did without 'b'"


@pytest.mark.parametrize(
    ("shape", "mode", "expected"),
    [
        ("[H, W, 3]", "RGB", [20, 30, 3]),
        ("[H, W, C]", "L", [20, 30, 3]),
        ("[N, H, W, 3]", "RGBA", [1, 20, 30, 3]),
        ("[H, W, 1]", "RGB", [20, 30, 1]),
        ("[H, W]", "P", [20, 30]),
        ("[N, 20, 30, 4]", "RGB", [1, 20, 30, 4]),
    ],
)
def test_a_picture_becomes_an_array_as_the_shape_asks(
    shape: str, mode: str, expected: list[int], tmp_path: Path, capsys: Printed
) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new(mode, (30, 20)).save(tmp_path / "a.png")
    graph = graph_of(tmp_path, "sizes", f"image: {{dtype: uint8, shape: {shape}}}", "shape")
    assert main(["run", graph, "-i", f"image={tmp_path / 'a.png'}"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == str(np.array(expected))


def test_a_picture_is_turned_as_its_camera_was_held(tmp_path: Path, capsys: Printed) -> None:
    image = pytest.importorskip("PIL.Image")
    exif = image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    graph = graph_of(tmp_path, "sizes", "image: {dtype: uint8, shape: [H, W, 3]}", "shape")
    assert main(["run", graph, "-i", f"image={tmp_path / 'a.jpg'}"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "[30 20  3]"


def test_a_graph_that_reads_files_itself_gets_their_bytes(tmp_path: Path, capsys: Printed) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture at all")
    texts = graph_of(tmp_path, "letters", "text: {dtype: string, shape: [N]}", "n")
    assert main(["run", texts, "-i", f"text={tmp_path / 'a.png'}"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "[17]"
    encoded = graph_of(tmp_path, "sizes", "image: {dtype: uint8, shape: [L]}", "shape")
    assert main(["run", encoded, "-i", f"image={tmp_path / 'a.png'}"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "[17]"
    assert main(["run", texts, "-i", 'text=["é", "ab"]']) == 0
    assert capsys.readouterr().out.splitlines()[1] == "[2 2]"


@pytest.mark.parametrize("name", ["a.png", "a.npy", "a.npz", "a.json", "a.weights"])
def test_a_file_that_holds_something_else_is_told_in_one_line(name: str, tmp_path: Path, capsys: Printed) -> None:
    pytest.importorskip("PIL")
    (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    graph = graph_of(tmp_path, "sizes", "image: {dtype: uint8, shape: [H, W, 3]}", "shape")
    assert main(["run", graph, "-i", f"image={tmp_path / name}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("SpecError: ")
    assert printed.count("\n") == 1


# --------------------------------------------------------------------------- run: many files


def test_one_file_that_fails_does_not_lose_the_others(sums: str, folder: Path, tmp_path: Path, capsys: Printed) -> None:
    lines, archive = tmp_path / "o.jsonl", tmp_path / "o.npz"
    assert main(["run", sums, "-i", f"x={folder}", "--out", str(lines), "--output-dir", str(tmp_path / "each")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    failed, said = printed.err.splitlines()
    assert failed.startswith("f3: NodeError: node 'double'")
    assert re.fullmatch(r"5 runs in [\d.]+ s, [\d.]+ a second; 1 failed: f3", said)
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [one["run"] for one in told] == ["f0", "f1", "f2", "f3", "f4"]
    assert [one["outputs"]["total"][0] if "outputs" in one else None for one in told] == [4.0, 12.0, 20.0, None, 36.0]
    assert told[3]["error"].startswith("NodeError: ")
    assert sorted(file.name for file in (tmp_path / "each").iterdir()) == ["f0.npz", "f1.npz", "f2.npz", "f4.npz"]
    assert np.load(tmp_path / "each" / "f4.npz")["total"].tolist() == [36.0, 36.0]
    assert main(["run", sums, "-i", f"x={folder}", "--out", str(archive)]) == 1
    with np.load(archive) as arrays:
        assert sorted(arrays.files) == [f"f{number}/{name}" for number in (0, 1, 2, 4) for name in ("total", "y")]
        assert arrays["f2/total"].tolist() == [20.0, 20.0]


def test_files_of_a_pattern_run_in_the_order_of_their_names(sums: str, folder: Path, capsys: Printed) -> None:
    assert main(["run", sums, "-i", f"x={folder}/f[210].npy", "-o", "total"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[::3] == ["== f0", "== f1", "== f2"]
    assert printed[2::3] == ["[4. 4.]", "[12. 12.]", "[20. 20.]"]


def test_several_series_go_side_by_side(sums: str, folder: Path, tmp_path: Path, capsys: Printed) -> None:
    (tmp_path / "shifts").mkdir()
    for number in range(3):
        np.save(tmp_path / "shifts" / f"s{number}.npy", np.float32(number))
    args = ["-i", f"x={folder}/f[012].npy", "-i", f"shift={tmp_path / 'shifts'}"]
    assert main(["run", sums, *args, "-o", "total"]) == 0
    assert capsys.readouterr().out.splitlines()[2::3] == ["[0. 0.]", "[12. 12.]", "[24. 24.]"]
    assert main(["run", sums, "-i", f"x={folder}", *args[2:]]) == 2
    assert "5 for 'x', 3 for 'shift'" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_fails_alone(sums: str, folder: Path, capsys: Printed) -> None:
    (folder / "f1.npy").write_bytes(b"torn")
    (folder / "f3.npy").unlink()
    (folder / "notes.txt").write_text("not an array")
    (folder / ".hidden.npy").write_bytes(b"")
    assert main(["run", sums, "-i", f"x={folder}", "-o", "total"]) == 1
    printed = capsys.readouterr()
    assert re.findall(r"== (\w+)", printed.out) == ["f0", "f2", "f4"]
    assert printed.err.splitlines()[0].startswith("f1: SpecError: expected a .npy file")


def test_several_runs_are_in_flight(tmp_path: Path, folder: Path, capsys: Printed) -> None:
    """Each waits for another one, so that one at a time would not end."""
    graph = graph_of(tmp_path, "together", "x: {dtype: float32, shape: [N, 4]}", "y")
    written(Path(graph), Path(graph).read_text().replace("inputs: {x: $", "run_in: thread, inputs: {x: $"))
    assert main(["run", graph, "-i", f"x={folder}/f[0-3].npy", "--jobs", "2"]) == 0
    assert re.findall(r"== (\w+)", capsys.readouterr().out) == ["f0", "f1", "f2", "f3"]


def test_files_of_one_stem_are_told_apart(sums: str, tmp_path: Path, capsys: Printed) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", np.ones((1, 4), np.float32))
    written(tmp_path / "in" / "a.json", "[[2, 2, 2, 2]]")
    assert main(["run", sums, "-i", f"x={tmp_path / 'in'}", "-o", "total"]) == 0
    assert re.findall(r"== (.*)", capsys.readouterr().out) == ["a.json", "a.npy"]
    assert main(["run", sums, "-i", f"x={tmp_path / 'in'}", "-o", "total=t.npy"]) == 2
    assert "--output-dir or --out" in capsys.readouterr().err


# --------------------------------------------------------------------------- run: outputs


def test_outputs_are_saved_where_they_are_to_be(sums: str, tmp_path: Path, capsys: Printed) -> None:
    x = ["-i", "x=[[1, 2, 3, 4]]"]
    file = tmp_path / "t.npy"
    assert main(["run", sums, *x, "-o", f"total={file}", "-o", "y"]) == 0
    printed = capsys.readouterr()
    assert np.load(file).tolist() == [24.0]
    assert printed.out.splitlines()[0] == "y: float32 [1, 4]"
    assert f"total: float32 [1] -> {file}" in printed.err
    assert main(["run", sums, *x, "--out", str(tmp_path / "o.npz")]) == 0
    assert sorted(np.load(tmp_path / "o.npz").files) == ["total", "y"]
    assert main(["run", sums, *x, "--out", str(tmp_path / "o.jsonl"), "--output-dir", str(tmp_path / "d")]) == 0
    assert json.loads((tmp_path / "o.jsonl").read_text()) == {"outputs": {"y": [[2, 4, 6, 8]], "total": [24]}}
    assert np.load(tmp_path / "d" / "outputs.npz")["total"].tolist() == [24.0]
    assert capsys.readouterr().out == ""


def test_what_files_have_no_form_for_is_saved_in_the_nearest_one(tmp_path: Path) -> None:
    text = "ensemble: 1\ninputs: {x: {dtype: float32, shape: [N]}}\noutputs: {b: n.b, s: n.s, n: n.n}\nnodes:\n"
    text += "  n: {kind: python, call: test_ensemble_cli:odd, inputs: {x: $inputs.x}}\n"
    graph = written(tmp_path / "odd.yaml", text)
    for name in ("o.jsonl", "o.npz"):
        assert main(["run", graph, "-i", "x=[1, 0]", "--out", str(tmp_path / name)]) == 0
    told = json.loads((tmp_path / "o.jsonl").read_text())["outputs"]
    assert told == {"b": [1.0, 0.0], "s": ["café", "\\xff"], "n": [None, None]}
    with np.load(tmp_path / "o.npz") as arrays:
        assert arrays["b"].dtype == np.float32
        assert arrays["s"].tolist() == ["café".encode(), b"\xff"]


def test_what_ended_is_in_the_file_when_the_command_is_interrupted(folder: Path, tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "stopping", "x: {dtype: float32, shape: [N, 4]}", "y")
    done = shell("run", graph, "-i", f"x={folder}", "--out", str(tmp_path / "o.npz"), "--jobs", "1")
    assert (done.returncode, done.stderr) == (130, b"")
    with zipfile.ZipFile(tmp_path / "o.npz") as archive:
        assert archive.namelist() == ["f0/out.npy", "f1/out.npy"]


# --------------------------------------------------------------------------- run: traces


def test_a_trace_has_every_run_and_node(sums: str, folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    assert main(["run", sums, "-i", f"x={folder}/f[01].npy", "--trace", str(trace)]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"f0", "f1"}
    done = [(event["pid"], event["name"]) for event in events if event["ph"] == "X" and event["name"] != "queue"]
    assert sorted(done) == [(run, name) for run in (1, 2) for name in ("add", "double")]


def test_a_run_that_fails_has_a_trace_too(sums: str, tmp_path: Path, capsys: Printed) -> None:
    file = tmp_path / "t.json"
    assert main(["run", sums, "-i", "x=[[-1, 2, 3, 4]]", "--trace", str(file), "--profile"]) == 1
    events = json.loads(file.read_text())["traceEvents"]
    (failed,) = [event for event in events if event["ph"] == "X" and event["name"] == "double"]
    assert failed["args"]["outcome"] == "ValueError"
    printed = capsys.readouterr()
    assert "1 failed" in printed.out
    assert printed.err.splitlines()[0] == f"trace -> {file}"


def test_a_profile_has_a_line_for_each_node(sums: str, capsys: Printed) -> None:
    assert main(["run", sums, "-i", "x=[[1, 2, 3, 4]]", "-o", "total", "--repeat", "5", "--profile"]) == 0
    printed = capsys.readouterr()
    _, value, head, first, second, took, way = printed.out.splitlines()
    assert value == "[24.]"
    assert head.split()[:3] == ["node", "kind", "calls"]
    assert first.split()[:3] == ["double", "python", "1"]
    assert second.split()[:3] == ["add", "python", "1"]
    assert first.split()[-4:] == ["16", "B", "16", "B"]
    assert took.endswith("the median of 5")
    assert way == "longest way: double -> add"
    assert printed.err.startswith("5 runs in ")


# --------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("module", "package"), [("yaml", "pyyaml"), ("pydantic", "pydantic"), ("networkx", "networkx")]
)
def test_a_part_that_is_not_installed_is_named_in_one_line(module: str, package: str, sums: str) -> None:
    code = (
        f"import sys; sys.modules['{module}'] = None\nfrom ensemble.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = shell("check", sums, code=code)
    assert done.returncode == 1
    assert done.stderr.decode() == f"ImportError: ensemble needs {package}: pip install 'remote-ops[ensemble]'\n"
    code = f"import sys; sys.modules['{module}'] = None\nimport ensemble\nensemble.load('g.yaml')"
    assert shell(code=code).stderr.decode().splitlines()[-1].startswith(f"ImportError: ensemble needs {package}: pip")


def test_pillow_is_asked_for_where_a_picture_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    graph = graph_of(tmp_path, "sizes", "image: {dtype: uint8, shape: [H, W, 3]}", "shape")
    code = "import sys; sys.modules['PIL'] = None\nfrom ensemble.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    done = shell("run", graph, "-i", f"image={tmp_path / 'a.png'}", code=code)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1] == "ImportError: reading pictures needs Pillow: pip install pillow"


def test_a_node_that_goes_on_is_not_waited_for(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "slow", "x: {dtype: float32, shape: [N, 4]}", "y")
    written(Path(graph), Path(graph).read_text().replace("inputs: {x: $", "run_in: thread, inputs: {x: $"))
    done = shell("run", graph, "-i", "x=[[1, 2, 3, 4]]", "--timeout-s", "0.3", timeout=100)
    assert done.returncode == 1
    assert done.stderr.startswith(b"DeadlineExceeded: ")


def test_nobody_reading_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with contextlib.ExitStack() as closing:
        closing.callback(os.close, write)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "ensemble", "schema"]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False, env=environment)
    assert (done.returncode, done.stderr) == (141, b"")


def test_what_a_graph_says_does_nothing_to_a_terminal(tmp_path: Path, capsys: Printed) -> None:
    file = written(tmp_path / "g.yaml", SUMS.replace("double.y, total", '"\\x1B[31mred.y", total'))
    assert main(["check", file]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_help_needs_no_part_that_may_be_missing() -> None:
    code = (
        "import sys\n"
        "for name in ('yaml', 'pydantic', 'networkx', 'PIL', 'torch'): sys.modules[name] = None\n"
        "from ensemble.__main__ import main\n"
        "main(['--help'])\n"
    )
    done = shell(code=code)
    assert done.returncode == 0
    assert b"check" in done.stdout


HELP = (cli._CHECK, cli._PLOT, cli._RUN, cli._SERVE, cli._SCHEMA)
COMMANDS = [line for text in HELP for line in text.splitlines() if line.startswith("  ensemble ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_the_help_are_commands(command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    args = _parser().parse_args(words[: words.index(">")] if ">" in words else words)
    assert callable(args.run)


# --------------------------------------------------------------------------- docs/ensemble-cli.md


def page_folder(folder: Path, page: str) -> dict[str, str]:
    """Put the files of the page into a folder; an environment whose `ensemble` and `python` are of this checkout."""
    for name, kind in (("loans.py", "python"), ("loans.yaml", "yaml")):
        written(folder / name, "".join(re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)))
    (folder / "bin").mkdir()
    for name, words in (("python", ""), ("ensemble", "-m ensemble")):
        command = folder / "bin" / name
        written(command, f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} {words} "$@"\n')
        command.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def masked(printed: str) -> str:
    """Without times, the columns that they shift, and which of two equal ways was the longer one."""
    printed = re.sub(r"longest way: \w+", "longest way", printed)
    lines = [
        re.sub(r"\d+\.\d+(?= ms| s,| a second|  |$)", "T", re.sub(" +", " ", line)) for line in printed.splitlines()
    ]
    return re.sub(r"(?<= )\d+\.\d+(?= )|T", "T", "\n".join(lines))


def test_the_page_shows_what_the_commands_print(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "ensemble-cli.md").read_text("utf-8")
    environment = page_folder(tmp_path, page)
    shown = re.findall(r"^\$ (.*)\n((?:(?!\$ |```).*\n)*)", page, re.MULTILINE)
    assert len(shown) > 5
    for command, expected in shown:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert masked(done.stdout) == masked(expected), command
