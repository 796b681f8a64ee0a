"""The Python in README.md and docs/ runs, each document top to bottom as one program."""

from __future__ import annotations

import re
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


def run(document: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the program of a document in a fresh interpreter, with `folder` as the working directory."""
    script = folder / f"{document.stem}_blocks.py"
    script.write_text(program_of(blocks_of(document.read_text("utf-8"))), "utf-8")
    return subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=100)


def name_of(document: Path) -> str:
    """The path of a document as a reader knows it."""
    return document.relative_to(ROOT).as_posix()


def test_readme_has_python_that_runs() -> None:
    assert any(block.runs for block in blocks_of((ROOT / "README.md").read_text("utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_python_block_compiles(document: Path) -> None:
    for block in blocks_of(document.read_text("utf-8")):
        if block.info[:1] == ("python",):
            assert block.info in (("python",), ("python", "no-run")), f"{document}:{block.line}"
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
