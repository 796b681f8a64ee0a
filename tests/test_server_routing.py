"""`server_ref.routing`: which version a request gets, and that a caller stays with it."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from remote_ops.errors import InvalidRequest, ModelNotFound, ModelUnavailable
from server_ref.routing import Choice, Routes, in_order, missing_versions, routes_of, served_versions
from server_ref.settings import Versions

ROOT = Path(__file__).parents[1]
KEYS = [f"user-{number}" for number in range(100_000)]


def routes(*versions: str, ready: str | None = None, **given: object) -> Routes:
    """The routes of model `m`, all of whose versions are ready unless said."""
    return Routes("m", in_order(versions), frozenset(versions if ready is None else ready.split()), **given)  # type: ignore[arg-type]


def split(by: Routes, keys: list[str]) -> list[str]:
    return [by.choose(key=key).version for key in keys]


# --------------------------------------------------------------------------- order and policy


@pytest.mark.parametrize(
    "versions",
    [
        ("1", "2", "10", "20200101"),
        ("v1", "v2", "v10"),
        ("1.2.9", "1.2.10", "1.10.0"),
        ("2024-05-06", "2024-11-01"),
        ("3", "007", "rc1", "rc2"),
        ("01", "1"),
        ("a", "b"),
        ("", "1", "v", "v1"),
    ],
)
def test_versions_come_in_the_order_that_people_count(versions: tuple[str, ...]) -> None:
    shuffled = list(versions)
    for seed in range(10):
        random.Random(seed).shuffle(shuffled)
        assert in_order(shuffled) == versions


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ({}, ("10",)),
        ({"count": 2}, ("9", "10")),
        ({"count": 9}, ("1", "2", "9", "10")),
        ({"policy": "all"}, ("1", "2", "9", "10")),
        ({"policy": "specific", "versions": ("9", "1", "7")}, ("1", "9")),
        ({"labels": {"stable": "2"}, "weights": {"1": 1, "10": 9}}, ("1", "2", "10")),
        ({"mirror": "9"}, ("9", "10")),
    ],
)
def test_the_policy_says_which_versions_are_served(policy: dict[str, object], served: tuple[str, ...]) -> None:
    assert served_versions(["10", "9", "2", "1"], Versions(**policy)) == served  # type: ignore[arg-type]


def test_versions_that_are_named_and_not_there_are_found() -> None:
    asked = Versions(policy="specific", versions=("1", "7"), labels={"stable": "1", "canary": "7"})
    assert missing_versions(["1", "2"], asked) == ("7",)
    assert missing_versions(["1", "7"], asked) == ()


def test_routes_are_made_from_settings() -> None:
    made = routes_of("m", ["10", "9"], ["9"], Versions(labels={"a": "9"}, weights={"9": 1}, mirror="10"))
    assert made == Routes("m", ("9", "10"), frozenset({"9"}), {"a": "9"}, {"9": 1}, "10")


# --------------------------------------------------------------------------- by name


def test_a_request_that_names_nothing_gets_the_latest_that_is_ready() -> None:
    assert routes("9", "10").choose() == Choice("10")
    assert routes("9", "10", ready="9").choose() == Choice("9")


def test_a_request_gets_the_version_or_the_label_that_it_names() -> None:
    by = routes("1", "2", labels={"stable": "1"})
    assert by.choose("1") == by.choose(label="stable") == by.choose("stable") == Choice("1")
    assert by.choose("2") == Choice("2")


def test_a_version_comes_before_a_label_of_the_same_name() -> None:
    assert routes("beta", "rc", labels={"beta": "rc"}).choose("beta") == Choice("beta")
    assert routes("beta", "rc", labels={"beta": "rc"}).choose(label="beta") == Choice("rc")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"version": "20201"}, r"model 'm' has no version '20201'; did you mean '20200'\?"),
        ({"version": "x"}, r"model 'm' has no version 'x': there is 7, 20200, stable, old"),
        ({"version": "stabel"}, r"did you mean 'stable'\?"),
        ({"label": "stabel"}, r"model 'm' has no label 'stabel'; did you mean 'stable'\?"),
        ({"label": "7"}, r"model 'm' has no label '7': there is stable, old"),
        ({"label": "old"}, r"label 'old' of model 'm' is version '3', which is not served"),
    ],
)
def test_an_unknown_name_is_an_error_that_says_what_there_is(asked: dict[str, str], message: str) -> None:
    with pytest.raises(ModelNotFound, match=message):
        routes("7", "20200", labels={"stable": "7", "old": "3"}).choose(**asked)  # type: ignore[arg-type]


def test_what_is_known_and_not_ready_is_unavailable_for_now() -> None:
    by = routes("1", "2", ready="2", labels={"stable": "1"}, weights={"1": 1})
    for asked in ({"version": "1"}, {"label": "stable"}, {"version": "stable"}, {}, {"key": "k"}):
        with pytest.raises(ModelUnavailable, match="not ready"):
            by.choose(**asked)  # type: ignore[arg-type]
    with pytest.raises(ModelUnavailable, match="not ready: expected version 1, 2 to be"):
        routes("1", "2", ready="").choose()


def test_a_model_without_versions_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="no version that is served"):
        routes().choose()


def test_a_request_cannot_name_a_version_and_a_label() -> None:
    with pytest.raises(InvalidRequest, match="got both"):
        routes("1", labels={"a": "1"}).choose("1", label="a")


# --------------------------------------------------------------------------- by weight


def test_a_split_of_90_to_10_holds_within_half_a_percent_over_100_000_keys() -> None:
    counts = Counter(split(routes("1", "2", weights={"1": 90, "2": 10}), KEYS))
    assert abs(counts["1"] / len(KEYS) - 0.9) < 0.005
    assert counts["1"] + counts["2"] == len(KEYS)


def test_a_key_goes_the_same_way_every_time_and_in_every_process() -> None:
    by = routes("1", "2", "3", weights={"1": 1, "2": 1, "3": 1})
    keys = KEYS[:200]
    assert split(by, keys) == split(by, keys) == [by.choose(key=key.encode(), chance=0.7).version for key in keys]
    code = (
        "from server_ref.routing import Routes\n"
        "by = Routes('m', ('1', '2', '3'), frozenset('123'), {}, {'3': 1, '2': 1, '1': 1})\n"
        "print(''.join(by.choose(key=f'user-{n}').version for n in range(200)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert printed.stdout.strip() == "".join(split(by, keys))


def test_the_split_of_one_model_says_nothing_of_that_of_another() -> None:
    weights = {"1": 1.0, "2": 1.0}
    one, other = (Routes(name, ("1", "2"), frozenset("12"), {}, weights) for name in ("a", "b"))
    same = sum(a == b for a, b in zip(split(one, KEYS[:10_000]), split(other, KEYS[:10_000]), strict=True))
    assert 4700 < same < 5300


def test_a_ramp_moves_only_the_keys_that_it_must() -> None:
    keys, by = KEYS[:20_000], routes("1", "2", weights={"1": 100, "2": 0})
    before = split(by, keys)
    for share in (1, 10, 50, 90, 100):
        after = split(by.with_weights({"1": 100 - share, "2": share}), keys)
        assert {(old, new) for old, new in zip(before, after, strict=True) if old != new} == {("1", "2")}
        assert abs(after.count("2") / len(keys) - share / 100) < 0.02
        before = after
    assert set(before) == {"2"}


@pytest.mark.parametrize("gone", ["1", "2", "3"])
def test_only_the_keys_of_a_version_that_is_not_ready_move_and_they_come_back(gone: str) -> None:
    weights = {"1": 50.0, "2": 30.0, "3": 20.0}
    keys, by = KEYS[:20_000], routes("1", "2", "3", weights=weights)
    before, less = split(by, keys), by.with_ready(weights, weights.keys() - {gone})
    without = split(less, keys)
    assert all(old == new for old, new in zip(before, without, strict=True) if old != gone)
    moved = Counter(new for old, new in zip(before, without, strict=True) if old == gone)
    for left in weights.keys() - {gone}:  # in proportion to the weights that are left
        assert abs(moved[left] / moved.total() - weights[left] / (100 - weights[gone])) < 0.03
    assert split(less.with_ready(weights, weights), keys) == before


def test_without_a_key_the_number_that_is_given_decides() -> None:
    by = routes("1", "2", weights={"1": 90, "2": 10})
    assert [by.choose(chance=chance).version for chance in (0.0, 0.5, 0.8999, 0.9, 0.9999)] == ["1", "1", "1", "2", "2"]
    assert by.choose(key="", chance=0.95) == by.choose(chance=0.95) == Choice("2")
    assert by.with_ready("12", "2").choose(chance=0.0) == Choice("2")


def test_a_choice_agrees_with_counting_the_weights_one_by_one() -> None:
    """2,000 random sets of versions, readiness and weights against a walk over the weights in order."""
    chance = random.Random(3)
    for _ in range(2000):
        versions = [str(number) for number in chance.sample(range(1, 30), chance.randint(1, 6))]
        ready = [version for version in versions if chance.random() < 0.8]
        weights = {version: chance.choice([0.0, 0.5, 1.0, 7.0, 90.0]) for version in versions}
        by = routes(*versions, ready=" ".join(ready), weights=weights)
        point = chance.choice([0.0, 0.25, 0.5, 1 - 2**-53, chance.random()])
        expected = walked({version: weights[version] for version in ready}, point)
        if expected is None and (any(weights.values()) or not ready):
            with pytest.raises(ModelUnavailable):
                by.choose(chance=point)
        elif expected is not None:
            assert by.choose(chance=point) == Choice(expected)
            assert by.choose(key=f"{point}").version in {version for version in ready if weights[version]}


def walked(weights: dict[str, float], point: float) -> str | None:
    """The version at a point, found in the plainest way."""
    left = point * sum(weights.values())
    last = None
    for version in sorted(weights, key=int):
        if weights[version]:
            last = version
            if left < weights[version]:
                return version
            left -= weights[version]
    return last


def test_a_mirror_gets_a_copy_of_what_names_no_version_if_it_is_ready_and_another() -> None:
    by = routes("1", "2", "3", mirror="3", weights={"1": 1}, labels={"a": "1"})
    assert by.choose() == Choice("1", "3")
    assert by.choose("1") == by.choose(label="a") == Choice("1", None)
    assert by.with_ready("123", "12").choose() == Choice("1", None)
    assert routes("1", "3", mirror="3").choose() == Choice("3", None)


# --------------------------------------------------------------------------- changes


def test_a_label_moves_to_a_version_that_is_ready() -> None:
    by = routes("1", "2", labels={"stable": "1"})
    moved = by.with_label("stable", "2").with_label("new", "1")
    assert (moved.choose(label="stable"), moved.choose(label="new")) == (Choice("2"), Choice("1"))
    assert by.choose(label="stable") == Choice("1")  # nothing changes for whoever holds the old ones
    assert moved.with_label("new", None).labels == {"stable": "2"}


def test_a_label_in_use_stays_rather_than_move_to_a_version_that_is_not_loaded() -> None:
    by = routes("1", "2", ready="1", labels={"stable": "1"})
    with pytest.raises(InvalidRequest, match="on version '2': expected one that is loaded and ready; it stays at '1'"):
        by.with_label("stable", "2")
    with pytest.raises(InvalidRequest, match="label 'new' of model 'm' on version '2': expected one that is loaded"):
        by.with_label("new", "2")
    with pytest.raises(ModelNotFound, match="no version '3'"):
        by.with_label("stable", "3")
    with pytest.raises(ModelNotFound, match=r"no label 'stabl'; did you mean 'stable'\?"):
        by.with_label("stabl", None)
    assert by.choose(label="stable") == Choice("1")


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"3": 1.0}, ModelNotFound, "no version '3'"),
        ({"1": 0.0, "2": 0.0}, InvalidRequest, "expected one weight of model 'm' that is not 0"),
        ({"1": -1.0}, InvalidRequest, "expected a weight of 0 or more for version '1', got -1"),
        ({"1": float("nan")}, InvalidRequest, "got nan"),
        ({"1": float("inf")}, InvalidRequest, "got inf"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        routes("1", "2").with_weights(weights)


def test_without_weights_the_latest_gets_all_again() -> None:
    assert routes("1", "2", weights={"1": 1}).with_weights({}).choose() == Choice("2")
