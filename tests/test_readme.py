"""The Python in README.md and docs/ runs, each document top to bottom as one program; so do its marked sessions."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>.*)$")


class Block(NamedTuple):
    """One fenced block: the number of its first line of code, the words after the fence, its code."""

    line: int
    info: tuple[str, ...]
    code: str

    @property
    def runs(self) -> bool:
        """Whether it is Python that is not marked `no-run`."""
        return self.info == ("python",)

    @property
    def is_file(self) -> bool:
        """Whether it is a file with a name."""
        return len(self.info) == 2 and "." in self.info[1]

    @property
    def is_session(self) -> bool:
        """Whether it is a session whose commands run here: one marked `console run`."""
        return self.info == ("console", "run")


def blocks_of(text: str) -> list[Block]:
    """Every fenced block of a Markdown document, in order."""
    blocks: list[Block] = []
    lines = enumerate(text.splitlines(), start=1)
    for number, line in lines:
        if (opening := FENCE.match(line)) is None:
            continue
        body: list[str] = []
        for _, inner in lines:
            if (closing := FENCE.match(inner)) and closing["fence"].startswith(opening["fence"]):
                break
            body.append(inner)
        code = textwrap.dedent("\n".join(body)) + "\n"
        blocks.append(Block(number + 1, tuple(opening["info"].split()), code))
    return blocks


def program_of(blocks: list[Block]) -> str:
    """The blocks that run as one program, each on the lines it has in the document."""
    program = ""
    for block in blocks:
        if block.runs:
            program += "\n" * (block.line - 1 - program.count("\n")) + block.code
    return program


def save_files(blocks: list[Block], folder: Path, port: int) -> None:
    """Write the blocks that are files, such as ```yaml vote.yaml, into a folder."""
    for block in blocks:
        if block.is_file:
            (folder / block.info[1]).write_text(with_port(block.code, port), "utf-8")


def with_port(text: str, port: int) -> str:
    """The text with a port of this run in place of the one that readers use; as long, for columns are counted."""
    return text.replace("127.0.0.1:9000", f"127.0.0.1:{port}")


def free_port() -> int:
    """A port of four digits that nobody listens at."""
    for port in range(9100, 10_000):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port of four digits")


def run(document: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run what a document runs, with `folder` as the working directory: its sessions, then its program."""
    blocks, port = blocks_of(document.read_text("utf-8")), free_port()
    script = folder / f"{document.stem}_blocks.py"
    script.write_text(with_port(program_of(blocks), port), "utf-8")
    save_files(blocks, folder, port)
    with contextlib.ExitStack() as servers:
        for block in blocks:
            if block.is_session:
                follow(block, folder, port, servers)
        return subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=100)


def follow(block: Block, folder: Path, port: int, servers: contextlib.ExitStack) -> None:
    """Type what a session types, and compare what comes; a line that ends in & is a server, which is waited for."""
    _, *turns = re.split(r"^\$ ", with_port(block.code, port), flags=re.MULTILINE)
    for turn in turns:
        command, _, expected = turn.partition("\n")
        if command.endswith(" &"):
            servers.callback(stop, started(command.removesuffix(" &"), folder))
        else:
            assert plain(typed(command, folder)) == plain(expected), f"line {block.line}: {command}"


def typed(command: str, folder: Path) -> str:
    """What a command prints; ours are those of this interpreter."""
    names = "".join(f'{name}() {{ "{sys.executable}" -m {name} "$@"; }}; ' for name in ("ensemble",))
    shell = f'python() {{ "{sys.executable}" "$@"; }}; {names}{command} 2>&1'
    return subprocess.run(["bash", "-c", shell], cwd=folder, capture_output=True, text=True, timeout=100).stdout


def started(command: str, folder: Path) -> subprocess.Popen[str]:
    """A server that listens."""
    words = [sys.executable, *command.split()[1:]]
    server = subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    assert " at http" in (line := server.stderr.readline()), line + server.stderr.read()
    return server


def stop(server: subprocess.Popen[str]) -> None:
    """End a server that was started."""
    server.kill()
    server.communicate()


def plain(text: str) -> str:
    """What was printed without what differs from run to run: times, last digits, and spaces that line them up."""
    text = re.sub(r"\d+(\.\d+)? ms", "some ms", text)
    return re.sub(r" +", " ", re.sub(r"(\d\.\d{4})\d+", r"\1", text)).strip()


def name_of(document: Path) -> str:
    """The path of a document as a reader knows it."""
    return document.relative_to(ROOT).as_posix()


def test_readme_has_python_that_runs() -> None:
    assert any(block.runs for block in blocks_of((ROOT / "README.md").read_text("utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_python_block_compiles(document: Path) -> None:
    for block in blocks_of(document.read_text("utf-8")):
        if block.info[:1] == ("python",):
            assert block.is_file or block.info in (("python",), ("python", "no-run")), f"{document}:{block.line}"
            compile("\n" * (block.line - 1) + block.code, str(document), "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_python_blocks_run_top_to_bottom(document: Path, tmp_path: Path) -> None:
    done = run(document, tmp_path)
    assert done.returncode == 0, f"{name_of(document)} (same line numbers):\n{done.stderr}"


SAMPLE = """
```python
x = 1
```
    ```python
    x += 1
    ```
```python no-run
import a_module_that_is_not_here
```
```sh
not python
```
````markdown
```python
raise SystemExit("inside another block")
```
````
```python
assert x == {expected}
```
"""


def test_blocks_share_one_namespace_and_no_run_is_skipped(tmp_path: Path) -> None:
    document = tmp_path / "sample.md"
    document.write_text(SAMPLE.format(expected=2), "utf-8")
    assert run(document, tmp_path).returncode == 0


def test_a_failing_block_is_reported_on_its_line_in_the_document(tmp_path: Path) -> None:
    document = tmp_path / "sample.md"
    text = SAMPLE.format(expected=3)
    document.write_text(text, "utf-8")
    done = run(document, tmp_path)
    assert done.returncode == 1
    assert f"line {text[: text.index('assert')].count(chr(10)) + 1}" in done.stderr
