"""What a user installs: the wheel holds the three packages only, and the first example runs on it alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"remote_ops", "ensemble", "server_ref"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command far from this checkout's settings; its output, or a failure that shows it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_tree(destination: Path) -> None:
    """Copy what git would carry: tracked files and new ones that it does not ignore, as they are now."""
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, destination / name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built once."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    copy_tree(tree)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=tree)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    (metadata,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops - {metadata} == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert {"ensemble/schema.json", "server_ref/model.schema.json"} <= set(names)  # which editors are pointed to
    assert "server_ref/page/index.html" in names
    assert f"{metadata}/licenses/LICENSE" in names
    kernel = {path.name for path in (ROOT / "remote_ops/tf/kernel").iterdir() if path.suffix in (".cc", ".h")}
    assert {f"remote_ops/tf/kernel/{name}" for name in kernel} <= set(names)  # what the TensorFlow ops are built from
    assert [name for name in names if "/test" in f"/{name}"] == []


def test_quickstart_runs_on_the_installed_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = (python, "-m", "pip", "-qq", "--disable-pip-version-check", "install", "--no-compile")
    run(*install, "-c", ROOT / "constraints.txt", f"{wheel}[torch,onnx,server]", "magika", cwd=tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    run(python, tmp_path / "examples" / "01_quickstart.py", cwd=tmp_path)
