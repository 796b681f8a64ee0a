"""What the numbers of a version say of late: percentiles and rates, of the requests in a window."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from server_ref.stats import Latencies, Snapshot, Stats, latencies


def snapshot(ended: Sequence[tuple[float, float, int]]) -> Snapshot:
    stats = Stats()
    for at, took_s, count in ended:
        stats.began(0)
        stats.ended(took_s, at=at, rows=count)
    return stats.snapshot()


def test_percentiles_and_rates_are_of_the_requests_in_the_window_alone() -> None:
    old = [(at, 9.0, 100) for at in (1.0, 2.0, 90.0)]
    late = [(90.0 + number / 10, number / 1000, 2) for number in range(1, 101)]
    assert latencies(snapshot(old + late), 100.0, 10.0) == pytest.approx(
        Latencies(100, 0.050, 0.095, 0.099, 10.0, 20.0)
    )


def test_percentiles_of_nothing_are_zero_and_of_one_are_that_one() -> None:
    assert latencies(snapshot([]), 5.0, 10.0) == Latencies()
    assert latencies(snapshot([(1.0, 0.5, 1)]), 100.0, 10.0) == Latencies()
    assert latencies(snapshot([(4.0, 0.5, 3)]), 5.0, 10.0) == pytest.approx(Latencies(1, 0.5, 0.5, 0.5, 0.1, 0.3))


def test_a_rate_is_over_the_time_that_is_kept_where_that_is_shorter_than_the_window() -> None:
    each_ms = [(number / 1000, 0.001, 4) for number in range(5000)]
    found = latencies(snapshot(each_ms), 4.999, 60.0)
    assert found.requests == 2047
    assert found.requests_per_s == pytest.approx(1000.0)
    assert found.rows_per_s == pytest.approx(4000.0)
