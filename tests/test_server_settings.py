"""`server_ref.settings`: what `model.yaml` may say, and what is told of one that says something else."""

from __future__ import annotations

import ast
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from ensemble.document import read_yaml
from remote_ops.errors import SpecError
from server_ref.settings import (
    Batching,
    Cache,
    Limits,
    ModelSettings,
    Options,
    Queue,
    SettingsFaults,
    json_schema,
    parse_settings,
    read_settings,
    schema_text,
)

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "server_ref" / "model.schema.json"

FULL = """\
# yaml-language-server: $schema=../server_ref/model.schema.json
file: resnet.onnx
options: {threads: 2, dtype: bfloat16, compile: true, signature: serve, inputs: ["x: float32 [-1, 3]"]}
instances: {count: 2, devices: [cpu, cuda, "cuda:1"]}
isolate: process
batching:
  max_rows: 32
  max_delay_ms: 1.5
  preferred_rows: [8, 16]
  allowed_rows: [1, 8, 32]
  priorities: 3
  default_priority: 2
queue: {max_requests: 100, max_mb: 64, timeout_ms: 500}
cache: {max_mb: 10, ttl_s: 60, path: rows}
warmup: {rows: [1, 8], inputs: {x: random, mask: mask.npy}}
limits: {max_body_mb: 10, response_timeout_s: 5}
versions:
  policy: specific
  versions: [1, 2, "3"]
  labels: {stable: 1, canary: "2"}
  weights: {"1": 90, "2": 10}
  sticky: X-User
  mirror: 3
swap: replace
"""


def brief(text: str) -> list[str]:
    """The faults with their places, without the name of the file and the path in it."""
    with pytest.raises(SettingsFaults) as caught:
        parse_settings(text, "m.yaml")
    return [f"{one.code} {one.place.line}:{one.place.column} {one.text}" for one in caught.value.faults]


def faults_of(text: str, *, of_version: bool = False) -> list[str]:
    with pytest.raises(SettingsFaults) as caught:
        parse_settings(text, "m.yaml", of_version=of_version)
    return [str(fault) for fault in caught.value.faults]


# --------------------------------------------------------------------------- what is valid


@pytest.mark.parametrize("text", ["", "# nothing said\n", "null\n", "{}\n", "---\n"])
def test_settings_that_say_nothing_are_the_usual_ones(text: str) -> None:
    assert parse_settings(text) == ModelSettings()


def test_the_usual_settings_batch_nothing_and_bound_the_queue() -> None:
    usual = ModelSettings()
    assert (usual.batching, usual.cache, usual.warmup, usual.isolate, usual.swap) == (
        None,
        None,
        None,
        "none",
        "overlap",
    )
    assert (usual.queue.max_requests, usual.queue.max_bytes) == (1024, 1 << 30)
    assert (usual.instances.count, usual.instances.devices) == (1, ("auto",))
    assert (usual.versions.policy, usual.versions.count, usual.versions.sticky) == ("latest", 1, "none")
    assert usual.options.given() == {}


def test_a_batch_waits_for_nobody_unless_it_is_told_to() -> None:
    batching = parse_settings("batching: {}").batching
    assert batching is not None
    assert batching.max_delay_ms == 0
    assert batching.usual_priority == 1


def test_everything_that_may_be_said_is_read() -> None:
    settings = parse_settings(FULL)
    assert settings.file == "resnet.onnx"
    assert settings.options.given() == {
        "threads": 2,
        "dtype": "bfloat16",
        "compile": True,
        "signature": "serve",
        "inputs": ("x: float32 [-1, 3]",),
    }
    assert settings.instances.devices == ("cpu", "cuda", "cuda:1")
    batching = settings.batching
    assert batching is not None
    assert (batching.max_rows, batching.max_delay_ms, batching.usual_priority) == (32, 1.5, 2)
    assert (batching.preferred_rows, batching.allowed_rows) == ((8, 16), (1, 8, 32))
    assert settings.cache is not None
    assert (settings.cache.max_bytes, settings.cache.ttl_s, settings.cache.path) == (10 << 20, 60, "rows")
    assert settings.warmup is not None
    assert (settings.warmup.rows, settings.warmup.inputs) == ((1, 8), {"x": "random", "mask": "mask.npy"})
    assert (settings.limits.max_body_bytes, settings.limits.response_timeout_s) == (10 << 20, 5)
    versions = settings.versions
    assert versions.versions == ("1", "2", "3")
    assert (versions.labels, versions.weights) == ({"stable": "1", "canary": "2"}, {"1": 90, "2": 10})
    assert (versions.sticky, versions.mirror, versions.named) == ("X-User", "3", {"1", "2", "3"})


def test_settings_cannot_be_changed() -> None:
    settings = parse_settings(FULL)
    with pytest.raises(ValidationError, match="frozen"):
        settings.batching.max_rows = 1  # type: ignore[misc, union-attr]


def test_requests_without_a_priority_get_the_last_one() -> None:
    assert Batching(priorities=4).usual_priority == 4


def test_a_version_has_its_own_keys_as_a_whole_and_the_others_of_its_model() -> None:
    model = parse_settings("queue: {max_requests: 5, max_mb: 1}\nbatching: {max_rows: 8}\nswap: replace")
    own = parse_settings("queue: {max_requests: 9}", of_version=True)
    both = own.over(model)
    assert (both.queue.max_requests, both.queue.max_mb) == (9, 1024)
    assert (both.batching, both.swap) == (model.batching, "replace")


def test_options_are_those_of_load_and_no_other() -> None:
    places = {
        "remote_ops/onnx.py": "OnnxModel",
        "remote_ops/torch/model.py": "TorchModel",
        "remote_ops/tf/model.py": "TFModel",
        "ensemble/ensemble.py": "load",
    }
    taken = {name for file, thing in places.items() for name in keywords_of(ROOT / file, thing)}
    given_by_the_server = {"device", "name", "file"}
    assert set(Options.model_fields) == taken - given_by_the_server | {"sha256"}


def keywords_of(path: Path, thing: str) -> Iterator[str]:
    """The arguments by keyword of a function, or of a class' `__init__`, without importing what it needs."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == thing:
            node = next(one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__")
        elif not isinstance(node, ast.FunctionDef) or node.name != thing:
            continue
        yield from (argument.arg for argument in node.args.kwonlyargs)


# --------------------------------------------------------------------------- what is not


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("batchng: {}", "E101 1:1 the settings have no key 'batchng'; did you mean 'batching'?"),
        (
            "instances:\n  count: 1\n  device: [cpu]",
            "E101 3:3 'instances' has no key 'device'; did you mean 'devices'?",
        ),
        (
            "max_delay_ms: 3",
            "E101 1:1 the settings have no key 'max_delay_ms'; did you mean 'batching.max_delay_ms'?",
        ),
        (
            "options: {swap: replace}",
            "E101 1:11 'options' has no key 'swap'; did you mean 'swap'?",
        ),
        (
            "isolate: proces",
            "E101 1:10 'isolate': expected 'none' or 'process', got 'proces'; did you mean 'process'?",
        ),
        (
            "instances: {count: 65}",
            "E101 1:20 'instances.count': expected 64 or less, got 65",
        ),
        (
            "instances: {devices: [cpu, gpu]}",
            "E101 1:28 'instances.devices.1': expected auto, cpu, cuda or cuda:N, got 'gpu'; did you mean 'cpu'?",
        ),
        (
            "queue: {max_requests: 1.5}",
            "E101 1:23 'queue.max_requests': expected a whole number, got 1.5",
        ),
        (
            "options: {compile: yes}",
            "E101 1:20 'options.compile': expected true or false, got 'yes'; only true and false are booleans here",
        ),
        (
            "options: {inputs: [1]}",
            "E101 1:20 'options.inputs.0': expected text, got 1; put it in quotes",
        ),
        (
            "cache: {ttl_s: .inf}",
            "E101 1:16 'cache.ttl_s': expected a number that is finite, got inf",
        ),
        (
            "batching:\nswap: replace",
            "E101 1:1 'batching': expected a mapping, got nothing; write {} to have it as usual, or no such key",
        ),
        (
            "warmup: {inputs: {x: zeroes}}",
            "E101 1:22 'warmup.inputs.x': expected zeros, ones, random or the path of a .npy file, "
            "got 'zeroes'; did you mean 'zeros'?",
        ),
        (
            "batching: {preferred_rows: [4, 2]}",
            "E101 1:28 'batching.preferred_rows': expected numbers that rise, got [4, 2]",
        ),
        (
            "batching: {max_rows: 4, allowed_rows: [1, 2]}",
            "E101 1:43 'batching.allowed_rows.1': expected the last to be max_rows, which is 4, got 2",
        ),
        (
            "batching: {max_rows: 4, preferred_rows: [2, 8]}",
            "E101 1:45 'batching.preferred_rows.1': expected 4 (max_rows) or less, got 8",
        ),
        (
            "batching: {priorities: 2, default_priority: 3}",
            "E101 1:45 'batching.default_priority': expected 2 (priorities) or less, got 3",
        ),
        (
            "instances: {devices: [cpu, cpu]}",
            "E102 1:28 'instances.devices.1': 'cpu' is named twice: raise 'count' to have more copies on each device",
        ),
        (
            "versions: {policy: specific}",
            "E101 1:11 'versions.versions': with 'policy: specific', expected one version or more, got none",
        ),
        (
            "versions: {versions: [1]}",
            "E101 1:22 'versions.versions': with 'policy: latest', expected none, got ['1']",
        ),
        (
            "versions: {policy: all, count: 2}",
            "E101 1:32 'versions.count': is for 'policy: latest', and the policy is all",
        ),
        (
            "versions: {weights: {1: 90}}",
            "E117 1:22 a key is text: expected '1' in quotes, got 1, which is a number",
        ),
        (
            'versions: {weights: {"1": 0}}',
            "E101 1:21 'versions.weights': expected one weight or more that is not 0",
        ),
        (
            'versions: {weights: {"1": -1}}',
            "E101 1:27 'versions.weights.1': expected 0 or more, got -1",
        ),
        (
            "versions: {labels: {1st: 1}}",
            "E101 1:21 'versions.labels': expected a label that begins with a letter, such as stable, got '1st'",
        ),
        (
            "versions: {labels: {stable: 1.10}}",
            "E101 1:29 'versions.labels.stable': expected text, got 1.1; put it in quotes",
        ),
        (
            "versions: {policy: specific, versions: [10, 2], labels: {stable: 20}}",
            "E103 1:66 'versions.labels.stable': no version '20' is served; did you mean '2'?",
        ),
        (
            "versions: {sticky: X User}",
            "E101 1:20 'versions.sticky': expected the name of a header such as X-User, or none, got 'X User'",
        ),
        ("- file: x", "E101 1:1 the settings: expected a mapping of keys, got a list"),
        ("3", "E101 1:1 the settings: expected a mapping of keys, got 3"),
        ("file: a: b", "E101 1:8 this is no YAML: mapping values are not allowed in this context"),
        (
            "file: a\nfile: b",
            "E117 2:1 key 'file' is written twice: first at m.yaml:1:1; keep one of them",
        ),
        (
            "file: !!python/object:os.system {}",
            "E101 1:7 tag '!!python/object:os.system' means nothing here: leave it out",
        ),
    ],
)
def test_a_fault_has_its_place_and_says_what_was_expected(text: str, fault: str) -> None:
    assert brief(text) == [fault]


def test_all_faults_come_at_once_in_the_order_of_the_file() -> None:
    faults = faults_of(
        "fil: m.onnx\n"
        "instances: {count: 0, devices: [gpu, auto, tpu]}\n"
        "batching: {max_rows: 8, allowed_rows: [1, 4], default_priority: 2}\n"
        "queue: {max_requests: none}\n"
        'versions: {policy: specific, versions: [1, 1], weights: {"2": 1}, mirror: 3}\n'
    )
    assert [fault.split()[1] for fault in faults] == [
        *("m.yaml:1:1", "m.yaml:2:20", "m.yaml:2:33", "m.yaml:2:44", "m.yaml:3:43", "m.yaml:3:65", "m.yaml:4:23"),
        *("m.yaml:5:44", "m.yaml:5:63", "m.yaml:5:75"),
    ]


def test_a_fault_is_not_followed_by_faults_that_it_seems_to_cause() -> None:
    (fault,) = faults_of("batching: {max_rows: four, allowed_rows: [1, 4]}")
    assert "max_rows" in fault
    (fault,) = faults_of("versions: {policy: specific, versions: [1, 2.5], labels: {stable: 1}}")
    assert "2.5" in fault
    (fault,) = faults_of("batching: {priorites: 3, default_priority: 2}")
    assert "did you mean 'priorities'?" in fault


@pytest.mark.parametrize("key", ["versions: {policy: all}", "swap: replace"])
def test_the_file_of_a_version_says_nothing_of_versions(key: str) -> None:
    (fault,) = faults_of(f"file: x.onnx\n{key}", of_version=True)
    assert fault.startswith("E101 m.yaml:2:1 ")
    assert "is for the file of the model, one folder up" in fault


def test_a_file_is_read_and_its_faults_name_it(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(FULL, "utf-8")
    assert read_settings(path) == parse_settings(FULL)
    path.write_text("swop: replace", "utf-8")
    with pytest.raises(SettingsFaults, match=r"model\.yaml:1:1 .*did you mean 'swap'\?") as caught:
        read_settings(path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"No such file.* - at .*model\.yaml"):
        read_settings(tmp_path / "model.yaml")
    (tmp_path / "model.yaml").write_bytes(b"file: \xff")
    with pytest.raises(SpecError, match=r"no text in UTF-8: byte 6"):
        read_settings(tmp_path / "model.yaml")


def test_settings_made_in_python_are_checked_too() -> None:
    with pytest.raises(ValidationError, match="expected the last to be max_rows"):
        Batching(max_rows=4, allowed_rows=(2,))


def test_whatever_is_written_gives_settings_or_faults() -> None:
    """Pieces of a valid file, cut and stuck together at random: 3,000 texts."""
    chance = random.Random(7)
    pieces = [part for line in FULL.splitlines(keepends=True) for part in (line, line[: len(line) // 2], line[2:])]
    for _ in range(3000):
        text = "".join(chance.choices(pieces, k=chance.randint(1, 6)))
        with suppress(SettingsFaults):
            assert parse_settings(text, of_version=chance.random() < 0.3).queue.max_requests > 0


# --------------------------------------------------------------------------- the JSON Schema


def properties_of(schema: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every property of a schema, with its path."""
    if isinstance(schema, dict):
        yield from ((f"{path}.{name}", part) for name, part in schema.get("properties", {}).items())
        for key, part in schema.items():
            yield from properties_of(part, f"{path}.{key}")
    elif isinstance(schema, list):
        for part in schema:
            yield from properties_of(part, path)


def test_the_schema_that_is_shipped_is_that_of_the_settings() -> None:
    code = 'from server_ref.settings import schema_text; print(schema_text(), end="")'
    command = f"python -c '{code}' > server_ref/model.schema.json"
    assert SCHEMA.read_text("utf-8") == schema_text(), f"write it anew: {command}"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert printed.stdout == schema_text()


def test_every_key_has_a_description_in_the_schema() -> None:
    assert [path for path, part in properties_of(json_schema()) if not part.get("description")] == []


def test_the_schema_takes_what_is_valid_and_refuses_what_is_not() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))
    validator.check_schema(validator.schema)
    for good in (FULL, "{}", "batching: {}"):
        assert list(validator.iter_errors(read_yaml(good, "m.yaml").value)) == []
    for bad in (
        "batchng: {}",
        "isolate: proces",
        "instances: {count: 65}",
        "queue: {max_mb: -1}",
        "versions: {policy: x}",
    ):
        assert list(validator.iter_errors(read_yaml(bad, "m.yaml").value))


# --------------------------------------------------------------------------- the page


def test_the_page_lists_every_key_and_its_example_is_valid() -> None:
    page = (ROOT / "docs" / "repository.md").read_text("utf-8")
    table = page.partition("| key | says |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(ModelSettings.model_fields)
    for name, part in (("batching", Batching), ("queue", Queue), ("cache", Cache), ("limits", Limits)):
        (row,) = re.findall(rf"^\| `{name}` .*", table, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", row)) - {name} == set(part.model_fields)
    example = page.partition("```yaml model.yaml\n")[2].partition("```")[0]
    assert parse_settings(example).versions.sticky == "X-User"
