"""`server_ref.folder`: what a folder of models holds, what has changed in it, and when a change counts."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from remote_ops.errors import SpecError
from remote_ops.servable import MODEL_FILES, load
from server_ref.folder import Changes, Found, Scan, Settling, changes, scan
from server_ref.settings import ModelSettings, SettingsFaults

GRAPH = "ensemble: 1\nnodes: {}\noutputs: {}\n"


def lay(root: Path, *paths: str, **texts: str) -> Path:
    """Put files into a folder; a path that ends in `/` is an empty folder."""
    for path in paths:
        place = root / path
        (place if path.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
        if not path.endswith("/"):
            place.write_text(texts.get(place.name, f"what is in {path}"), "utf-8")
    return root


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def paths(root: Path) -> dict[tuple[str, str], str]:
    """What a scan finds, as relative paths; it has to find nothing wrong."""
    seen = scan(root)
    seen.raise_if_any()
    return {key: found.path.relative_to(root).as_posix() for key, found in seen.found.items()}


def trouble(root: Path) -> str:
    """The only trouble of a scan."""
    (found,) = scan(root).troubles
    return str(found.error)


# --------------------------------------------------------------------------- layouts


def test_a_folder_of_versions_of_files_and_saved_models_is_read(tmp_path: Path) -> None:
    lay(tmp_path, "resnet/1/model.onnx", "resnet/2/model.onnx", "bert/7/saved_model.pb", "bert/7/variables/v.index")
    lay(tmp_path, "bert/8/model.savedmodel/saved_model.pb", "text/2024-05/net.pt2")
    assert paths(tmp_path) == {
        ("bert", "7"): "bert/7",
        ("bert", "8"): "bert/8/model.savedmodel",
        ("resnet", "1"): "resnet/1/model.onnx",
        ("resnet", "2"): "resnet/2/model.onnx",
        ("text", "2024-05"): "text/2024-05/net.pt2",
    }


def test_models_without_versions_are_version_1(tmp_path: Path) -> None:
    lay(tmp_path, "a.onnx", "b.PT2", "resnet/model.onnx", "bert/saved_model.pb", "bert/variables/x", "bert/assets/1/y")
    write(tmp_path / "fraud.yaml", GRAPH)
    write(tmp_path / "vote/graph.yml", GRAPH)
    assert paths(tmp_path) == {
        ("a", "1"): "a.onnx",
        ("b", "1"): "b.PT2",
        ("bert", "1"): "bert",
        ("fraud", "1"): "fraud.yaml",
        ("resnet", "1"): "resnet/model.onnx",
        ("vote", "1"): "vote/graph.yml",
    }


@pytest.mark.parametrize("kind", MODEL_FILES)
def test_every_kind_of_file_that_load_opens_is_a_model(tmp_path: Path, kind: str) -> None:
    assert paths(lay(tmp_path, f"m{kind}")) == {("m", "1"): f"m{kind}"}


def test_what_is_hidden_or_still_being_written_is_no_model(tmp_path: Path) -> None:
    lay(
        tmp_path, "a.onnx", ".b.onnx", "c.onnx.part", "d.onnx.tmp", "_old/1/m.onnx", ".git/1/m.onnx", "__pycache__/x.pt"
    )
    lay(tmp_path, "e.tmp/1/m.onnx", "a2/.DS_Store", "a2/m.onnx", "a2/_tmp/m.onnx")
    assert paths(tmp_path) == {("a", "1"): "a.onnx", ("a2", "1"): "a2/m.onnx"}


def test_files_that_go_with_a_model_are_part_of_it_and_others_are_named(tmp_path: Path) -> None:
    lay(tmp_path, "a.onnx", "a.onnx.data", "a.onnx_data", "README.md", "labels.yaml", labels="a: 1")
    seen = scan(tmp_path)
    assert set(seen.found) == {("a", "1")}
    assert seen.ignored == ("README.md", "labels.yaml")


def test_a_graph_may_have_its_models_beside_it(tmp_path: Path) -> None:
    lay(tmp_path, "vote/a.onnx", "vote/b.pt2", "versioned/3/a.onnx", "versioned/3/saved/saved_model.pb")
    write(tmp_path / "vote/graph.yaml", GRAPH)
    write(tmp_path / "versioned/3/graph.yaml", GRAPH)
    assert paths(tmp_path) == {("vote", "1"): "vote/graph.yaml", ("versioned", "3"): "versioned/3/graph.yaml"}


def test_a_yaml_without_nodes_is_no_graph_and_a_broken_one_with_them_is(tmp_path: Path) -> None:
    write(tmp_path / "good.yaml", GRAPH)
    write(tmp_path / "broken.yaml", "ensemble: 1\nnodes: [\n")
    write(tmp_path / "other.yaml", "labels:\n  nodes: 3\n")
    assert paths(tmp_path) == {("good", "1"): "good.yaml", ("broken", "1"): "broken.yaml"}


def test_folders_of_data_beside_a_model_are_no_versions(tmp_path: Path) -> None:
    lay(tmp_path, "m/model.onnx", "m/vocabulary/words.txt", "m/1/notes.txt")
    assert paths(tmp_path) == {("m", "1"): "m/model.onnx"}


# --------------------------------------------------------------------------- settings


def test_a_version_has_the_settings_of_its_own_file_and_else_those_of_its_model(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/a.onnx", "m/1/b.onnx", "m/2/a.onnx", "m/2/b.onnx")
    write(tmp_path / "m/model.yaml", "file: a.onnx\nbatching: {max_rows: 8}\nversions: {policy: all}\n")
    write(tmp_path / "m/2/model.yaml", "file: b.onnx\n")
    found = scan(tmp_path).found
    one, two = found["m", "1"], found["m", "2"]
    assert (one.path.name, two.path.name) == ("a.onnx", "b.onnx")
    assert one.settings.batching == two.settings.batching is not None
    assert two.settings.versions.policy == "all"


def test_paths_in_settings_are_relative_to_their_file(tmp_path: Path) -> None:
    text = "options: {weights: w.safetensors}\ncache: {path: rows}\nwarmup: {inputs: {x: x.npy, y: zeros}}\n"
    lay(tmp_path, "m/1/a.onnx")
    write(tmp_path / "m/model.yaml", text)
    settings = scan(tmp_path).found["m", "1"].settings
    assert settings.options.given() == {"weights": str(tmp_path / "m/w.safetensors")}
    assert settings.cache is not None
    assert settings.cache.path == str(tmp_path / "m/rows")
    assert settings.warmup is not None
    assert settings.warmup.inputs == {"x": str(tmp_path / "m/x.npy"), "y": "zeros"}


def test_a_file_may_be_named_by_the_settings_where_there_are_several(tmp_path: Path) -> None:
    lay(tmp_path, "m/a.onnx", "m/b.onnx", "n/x/saved_model.pb", "n/y.onnx")
    write(tmp_path / "m/model.yaml", "file: b.onnx")
    write(tmp_path / "n/model.yaml", "file: x")
    assert paths(tmp_path) == {("m", "1"): "m/b.onnx", ("n", "1"): "n/x"}


def test_faults_in_settings_name_their_place_and_leave_other_models_alone(tmp_path: Path) -> None:
    lay(tmp_path, "bad/m.onnx", "good/m.onnx", "half/1/m.onnx", "half/2/m.onnx")
    write(tmp_path / "bad/model.yaml", "batchng: {}\nswap: no\n")
    write(tmp_path / "half/2/model.yaml", "versions: {}\n")
    seen = scan(tmp_path)
    assert set(seen.found) == {("good", "1"), ("half", "1")}
    bad, half = seen.troubles
    assert (bad.name, bad.version, half.name, half.version) == ("bad", None, "half", "2")
    assert isinstance(bad.error, SettingsFaults)
    assert f"{tmp_path}/bad/model.yaml:1:1 the settings have no key 'batchng'; did you mean 'batching'?" in str(
        bad.error
    )
    with pytest.raises(SpecError, match=r"2 faults in the folder of models\n(.|\n)*half/2/model\.yaml:1:1"):
        seen.raise_if_any()


# --------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["m/"], "the folder of a model is empty: expected a file ending in .onnx, "),
        (["m/1/"], "the folder of a model is empty"),
        (["m/weights.bin", "m/a.txt"], "a folder with a saved_model.pb, got 'a.txt', 'weights.bin' - at "),
        (["m/1/weights.bin"], "got 'weights.bin' - at "),
        (["m/a.onnx", "m/b.pt2"], "'a.onnx', 'b.pt2': expected one model; write 'file: a.onnx' in model.yaml - at "),
        (["a.onnx", "a.pt2"], "two models are called 'a': 'a.onnx' and 'a.pt2'; rename one of them"),
        (["a.onnx", "a/1/m.onnx"], "two models are called 'a': 'a' and 'a.onnx'"),
        (["m/a.onnx", "m/1/a.onnx"], "model 'm' has both a model, 'a.onnx', and folders of versions, '1'"),
        (["m/my version/a.onnx"], "'my version' is no version of model 'm'"),
        (["a\nb/m.onnx"], r"expected a name of plain text, got 'a\nb'; rename it"),
        (["m.onnx", "model.yaml"], "settings belong to a model: put them in its folder"),
        (["m/m.onnx", "m/model.yml"], "settings are called model.yaml: rename it"),
        (["README.md", "b.bin"], "no model: expected folders of models, or a file ending in .onnx, "),
    ],
)
def test_what_cannot_be_served_is_told_with_what_to_do(tmp_path: Path, files: list[str], message: str) -> None:
    assert message in trouble(lay(tmp_path, *files))


def test_an_empty_folder_is_told_so(tmp_path: Path) -> None:
    assert trouble(tmp_path).endswith(f"it is empty - at {tmp_path}")


@pytest.mark.parametrize("file", ["b.onnx", "../other.onnx", "/etc/passwd", "a.txt"])
def test_settings_cannot_name_a_file_that_is_not_there_or_outside(tmp_path: Path, file: str) -> None:
    lay(tmp_path, "m/a.onnx", "m/a.txt", "m/other.txt")
    write(tmp_path / "m/model.yaml", f"file: {file}")
    assert f"'file' says '{file}': expected a file ending in " in trouble(tmp_path)


def test_a_root_that_is_no_folder_of_models_is_refused(tmp_path: Path) -> None:
    lay(tmp_path, "models/a.onnx", "saved/saved_model.pb")
    with pytest.raises(SpecError, match=r"expected a folder of models, got nothing; did you mean 'models'\?"):
        scan(tmp_path / "modles")
    with pytest.raises(SpecError, match="expected a folder of models, got a file"):
        scan(tmp_path / "models/a.onnx")
    with pytest.raises(SpecError, match="it is a SavedModel itself; serve its parent"):
        scan(tmp_path / "saved")


# --------------------------------------------------------------------------- links


def test_links_that_stay_in_the_folder_are_followed(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/a.onnx", "..data/cm/x.onnx")
    (tmp_path / "m/2").symlink_to("1")
    (tmp_path / "x.onnx").symlink_to("..data/cm/x.onnx")  # as Kubernetes mounts a ConfigMap
    assert paths(tmp_path) == {("m", "1"): "m/1/a.onnx", ("m", "2"): "m/2/a.onnx", ("x", "1"): "x.onnx"}


@pytest.mark.parametrize("link", ["m", "m.onnx", "n/1", "n/a.onnx", "n/1/a.onnx", "n/1/weights.bin", "n/1/sub/deep"])
def test_links_that_leave_the_folder_are_refused_unless_said(tmp_path: Path, link: str) -> None:
    outside, root = lay(tmp_path / "models-evil", "1/a.onnx", "f.onnx"), tmp_path / "models"
    if "1/" in link:
        lay(root, "n/1/b.onnx" if not link.endswith("onnx") else "n/1/")
    place = root / link
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside / ("f.onnx" if "." in link else "1"))
    assert "a symbolic link that leads out of the folder, to " in trouble(root)
    assert not scan(root).found
    assert not scan(root, follow_links=True).troubles


def test_a_settings_file_that_names_a_hidden_link_does_not_lead_out(tmp_path: Path) -> None:
    lay(tmp_path, "out.onnx", "models/m/.hidden/x")
    (tmp_path / "models/m/.hidden/a.onnx").symlink_to(tmp_path / "out.onnx")
    write(tmp_path / "models/m/model.yaml", "file: .hidden/a.onnx")
    assert "leads out of the folder" in trouble(tmp_path / "models")


def test_links_that_lead_nowhere_or_back_up_are_troubles(tmp_path: Path) -> None:
    lay(tmp_path, "m/a.onnx", "n/a.onnx")
    (tmp_path / "m/sub").symlink_to("../m")
    lay(tmp_path, "p/1/a.onnx")
    (tmp_path / "p/1/sub").symlink_to("../1")
    (tmp_path / "n/b.txt").symlink_to("gone")
    (tmp_path / "o.onnx").symlink_to("gone")
    messages = {one.name: str(one.error) for one in scan(tmp_path).troubles}
    assert "both a model, 'a.onnx', and folders of versions, 'sub'" in messages["m"]
    assert "no link back up" in messages["p"]
    assert "leads nowhere" in messages["n"]
    assert "leads nowhere" in messages["o"]


# --------------------------------------------------------------------------- fingerprints and changes


def replaced(path: Path) -> None:
    new = write(path.with_name(".new"), path.read_text("utf-8"))
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(new, path)


def touched(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def grown(path: Path) -> None:
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text(path.read_text("utf-8") + "+", "utf-8")
    os.utime(path, ns=times)


@pytest.mark.parametrize("change", [replaced, touched, grown])
@pytest.mark.parametrize("file", ["m/1/saved_model.pb", "m/1/variables/deep/v.data", "a.onnx", "a.onnx.data"])
def test_a_fingerprint_sees_each_file_that_is_new_later_or_longer(
    tmp_path: Path, change: Callable[[Path], None], file: str
) -> None:
    lay(tmp_path, "m/1/saved_model.pb", "m/1/variables/deep/v.data", "a.onnx", "a.onnx.data", "z.onnx")
    before = scan(tmp_path).found
    assert scan(tmp_path).found == before
    change(tmp_path / file)
    key = ("m" if file.startswith("m") else "a", "1")
    assert changes(before, scan(tmp_path).found) == Changes((), (key,), ())


def test_a_change_of_settings_alone_leaves_the_fingerprint(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/a.onnx")
    before = scan(tmp_path).found
    write(tmp_path / "m/model.yaml", "batching: {}")
    after = scan(tmp_path).found
    assert changes(before, after).changed == (("m", "1"),)
    assert before["m", "1"].fingerprint == after["m", "1"].fingerprint
    write(tmp_path / "m/model.yaml", "batching: {max_rows: 2}")
    assert changes(after, scan(tmp_path).found).changed == (("m", "1"),)


def test_a_new_name_and_a_missing_one_are_an_addition_and_a_removal(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/a.onnx", "b.onnx")
    before = scan(tmp_path).found
    (tmp_path / "m/1").rename(tmp_path / "m/2")
    assert changes(before, scan(tmp_path).found) == Changes((("m", "2"),), (), (("m", "1"),))


def test_settings_are_read_once_for_each_time_that_they_change(tmp_path: Path) -> None:
    for number in range(50):
        write(tmp_path / f"m{number}/model.yaml", "batching: {}")
        write(tmp_path / f"m{number}/a.onnx", "x")
    first, second = scan(tmp_path), scan(tmp_path)
    assert first == second
    assert all(first.found[key].settings is second.found[key].settings for key in first.found)


# --------------------------------------------------------------------------- when a change counts


def test_a_change_counts_once_it_was_seen_twice_and_rested(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/a.onnx")
    settling = Settling(2.0, scan(tmp_path).found)
    before = settling.counted["m", "1"]
    grown(tmp_path / "m/1/a.onnx")
    assert settling.seen(scan(tmp_path), 0.0)["m", "1"] == before
    assert settling.seen(scan(tmp_path), 1.0)["m", "1"] == before
    grown(tmp_path / "m/1/a.onnx")  # it is being copied: the time starts anew
    assert settling.seen(scan(tmp_path), 2.0)["m", "1"] == before
    assert settling.seen(scan(tmp_path), 3.9)["m", "1"] == before
    assert settling.waits
    assert settling.seen(scan(tmp_path), 4.0)["m", "1"] == scan(tmp_path).found["m", "1"] != before
    assert not settling.waits


def test_two_scans_have_to_agree_even_without_a_time_to_rest(tmp_path: Path) -> None:
    settling = Settling(0.0)
    lay(tmp_path, "a.onnx")
    assert settling.seen(scan(tmp_path), 5.0) == {}
    assert set(settling.seen(scan(tmp_path), 5.0)) == {("a", "1")}


def test_a_change_that_is_taken_back_never_counts(tmp_path: Path) -> None:
    lay(tmp_path, "a.onnx")
    first = scan(tmp_path)
    settling = Settling(1.0, first.found)
    lay(tmp_path, "b.onnx")
    settling.seen(scan(tmp_path), 0.0)
    (tmp_path / "b.onnx").unlink()
    assert settling.seen(scan(tmp_path), 5.0) == first.found
    assert settling.seen(scan(tmp_path), 9.0) == first.found


def test_a_model_that_is_gone_counts_until_that_has_rested_too(tmp_path: Path) -> None:
    lay(tmp_path, "a.onnx", "b.onnx")
    settling = Settling(1.0, scan(tmp_path).found)
    (tmp_path / "a.onnx").rename(tmp_path / "a.old")
    assert ("a", "1") in settling.seen(scan(tmp_path), 0.0)
    lay(tmp_path, "a.onnx")  # another one is put in its place
    assert ("a", "1") in settling.seen(scan(tmp_path), 2.0)
    (tmp_path / "b.onnx").unlink()
    settling.seen(scan(tmp_path), 3.0)
    assert set(settling.seen(scan(tmp_path), 4.0)) == {("a", "1")}


@pytest.mark.parametrize("file", ["m/2/a.onnx.part", "m/2/.a.onnx.xyz.part", "m/2/sub/x.tmp"])
def test_a_folder_with_a_file_that_is_being_written_does_not_count(tmp_path: Path, file: str) -> None:
    lay(tmp_path, "m/1/a.onnx", "m/2/a.onnx", file)
    settling = Settling(1.0, {})
    for now in (0.0, 5.0):
        seen = scan(tmp_path)
        assert not seen.troubles
        assert seen.unfinished == {("m", "2"): str(tmp_path / file)}
        assert ("m", "2") not in settling.seen(seen, now)
    (tmp_path / file).unlink()
    settling.seen(scan(tmp_path), 6.0)
    assert set(settling.seen(scan(tmp_path), 7.0)) == {("m", "1"), ("m", "2")}


def test_a_first_copy_into_an_empty_folder_is_unfinished_and_no_trouble(tmp_path: Path) -> None:
    lay(tmp_path, "m/1.tmp/a.onnx", "n/a.onnx.part", "o/1/a.onnx.part")
    seen = scan(tmp_path)
    assert not seen.troubles
    assert set(seen.unfinished) == {("m", None), ("n", None), ("o", "1")}


def test_what_got_into_trouble_counts_as_it_was(tmp_path: Path) -> None:
    lay(tmp_path, "m/1/a.onnx", "n.onnx")
    first = scan(tmp_path)
    settling = Settling(0.0, first.found)
    write(tmp_path / "m/model.yaml", "no such key: 1")
    lay(tmp_path, "m/1/b.onnx", "n.pt2")
    for now in (0.0, 1.0):
        assert settling.seen(scan(tmp_path), now) == first.found
    (tmp_path / "n.pt2").unlink()
    (tmp_path / "m/model.yaml").unlink()
    (tmp_path / "m/1/b.onnx").unlink()
    assert settling.seen(scan(tmp_path), 2.0) == first.found


def test_a_folder_swapped_by_rename_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    """The rule that people are told: write beside it, then rename. Seen after each step, in any of 30 timings."""
    for seed in range(30):
        root = tmp_path / str(seed)
        lay(root, "m/1/saved_model.pb", "m/1/variables/a")
        old = scan(root).found["m", "1"]
        settling, chance, now = Settling(1.0, {old.key: old}), random.Random(seed), 0.0
        counted = []
        for step in swap(root):
            step()
            for _ in range(chance.randint(0, 2)):
                now += chance.choice([0.1, 2.0])
                counted.append(settling.seen(scan(root), now).get(old.key))
        now += 2
        settling.seen(scan(root), now)
        new = settling.seen(scan(root), now + 2)["m", "1"]
        assert new == scan(root).found["m", "1"] != old
        assert all(one in (old, new, None) for one in counted)


def swap(root: Path) -> list[Callable[[], object]]:
    """The steps by which a version is replaced by another."""
    return [
        lambda: lay(root, "m/1.tmp/saved_model.pb"),
        lambda: lay(root, "m/1.tmp/variables/a", "m/1.tmp/variables/b"),
        lambda: (root / "m/1").rename(root / "m/_old"),
        lambda: (root / "m/1.tmp").rename(root / "m/1"),
    ]


# --------------------------------------------------------------------------- against a plain account


def test_changes_agree_with_a_plain_account_of_random_folders() -> None:
    chance = random.Random(5)
    usual = Found("", "", Path(), ModelSettings(), "")
    for _ in range(300):
        before, after = (
            {
                (name, "1"): replace(usual, name=name, version="1", fingerprint=chance.choice("xy"))
                for name in chance.sample("abcdef", chance.randint(0, 6))
            }
            for _ in range(2)
        )
        found = changes(before, after)
        assert set(found.added) == {key for key in after if key not in before}
        assert set(found.removed) == {key for key in before if key not in after}
        assert set(found.changed) == {key for key in after if key in before and after[key] != before[key]}
        kept = {key: one for key, one in before.items() if key not in found.removed}
        assert {**kept, **{key: after[key] for key in (*found.added, *found.changed)}} == after


def test_a_scan_is_sure_of_all_but_what_is_wrong_and_what_is_being_written() -> None:
    seen = Scan(unfinished={("a", "2"): "x", ("b", None): "y"})
    assert [seen.is_sure_of(key) for key in (("a", "1"), ("a", "2"), ("b", "1"), ("c", "1"))] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("name", ["m.mar", "m.zip", "m.tar.gz", "M.TGZ"])
def test_s8_archives_are_refused_by_name_with_what_to_do(tmp_path: Path, name: str) -> None:
    write(lay(tmp_path, "notes.txt") / name, "")
    advice = f"nothing is unpacked here: unpack {name} yourself, if you trust it, and name the model in it"
    assert advice in trouble(tmp_path)
    write(tmp_path / "in" / "m" / name, "")
    assert advice in trouble(tmp_path / "in")
    with pytest.raises(SpecError, match=re.escape(advice)):
        load(tmp_path / name)
