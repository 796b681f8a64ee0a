"""The decisions of `policy`, as tables: numbers and a time in, a decision out."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from remote_ops.client import Endpoint
from remote_ops.errors import (
    BadStatus,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    FramingError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
    RemoteOpsError,
    SpecError,
)
from remote_ops.policy import (
    EJECTED,
    PROBING,
    UP,
    Breaker,
    Budget,
    Health,
    Hedge,
    Load,
    Retry,
    choose,
    faded,
    is_fault,
    is_left,
    quantile,
    typical_of,
)

BUSY = ModelUnavailable("busy")
REFUSED = ConnectError("refused")
LOST = ConnectionLost("lost")
ONCE_ONLY = Retry(idempotent=False)

# --------------------------------------------------------------------------- retry


@pytest.mark.parametrize(
    ("retry", "error", "attempt", "again"),
    [
        (Retry(), BUSY, 1, True),
        (Retry(), BUSY, 2, True),
        (Retry(), BUSY, 3, False),
        (Retry(), Overloaded("full"), 1, True),
        (Retry(), REFUSED, 1, True),
        (Retry(), LOST, 1, True),
        (Retry(), DeadlineExceeded("late"), 1, False),
        (Retry(), InvalidRequest("no"), 1, False),
        (Retry(), ModelNotFound("no"), 1, False),
        (Retry(), InternalError("no"), 1, False),
        (Retry(), DecodeError("junk"), 1, False),
        (Retry(), BadStatus("odd", status=418), 1, False),
        (Retry(attempts=1), BUSY, 1, False),
        (ONCE_ONLY, REFUSED, 1, True),
        (ONCE_ONLY, REFUSED, 3, False),
        (ONCE_ONLY, LOST, 1, False),
        (ONCE_ONLY, BUSY, 1, False),
        (ONCE_ONLY, Overloaded("full"), 1, False),
        (Retry(when=("connect",)), REFUSED, 1, True),
        (Retry(when=("connect",)), REFUSED, 3, False),
        (Retry(when=("connect",)), LOST, 1, False),
        (Retry(when=("connect",)), BUSY, 1, False),
        (Retry(when=("lost",)), LOST, 1, True),
        (Retry(when=("lost",)), REFUSED, 1, False),
        (Retry(when=("overloaded",)), Overloaded("full"), 1, True),
        (Retry(when=("overloaded",)), BUSY, 1, False),
        (Retry(when=("connect", "unavailable")), BUSY, 1, True),
        (Retry(when=("connect", "unavailable")), Overloaded("full"), 1, False),
        (Retry(when=("connect", "unavailable")), InvalidRequest("no"), 1, False),
        (Retry(when=("lost", "unavailable"), idempotent=False), LOST, 1, False),
        (Retry(when=()), REFUSED, 1, False),
    ],
)
def test_only_what_may_pass_and_cannot_have_happened_twice_is_tried_again(
    retry: Retry, error: RemoteOpsError, attempt: int, again: bool
) -> None:
    assert retry.repeats(error, attempt) is again
    assert (retry.wait_s(error, attempt, 9.0, lambda: 0.5) is not None) is again


@pytest.mark.parametrize(
    ("attempt", "jitter", "left_s", "options", "wait_s"),
    [
        (1, 1.0, 9.0, {}, 0.05),
        (2, 1.0, 9.0, {}, 0.1),
        (3, 1.0, 9.0, {}, 0.2),
        (3, 0.5, 9.0, {}, 0.1),
        (3, 0.0, 9.0, {}, 0.0),
        (9, 1.0, 9.0, {}, 2.0),
        (9998, 1.0, 9.0, {}, 2.0),
        (9, 1.0, 2.0, {}, None),
        (1, 0.0, 0.0, {}, None),
        (1, 1.0, 9.0, {"elsewhere": True}, 0.0),
        (1, 1.0, 9.0, {"held_s": 3.0}, 3.0),
        (1, 1.0, 9.0, {"held_s": 0.01}, 0.05),
        (1, 1.0, 9.0, {"held_s": 3.0, "elsewhere": True}, 3.0),
        (1, 1.0, 2.0, {"held_s": 3.0}, None),
    ],
)
def test_the_wait_doubles_to_its_cap_with_full_jitter_heeds_the_server_and_the_deadline(
    attempt: int, jitter: float, left_s: float, options: dict[str, Any], wait_s: float | None
) -> None:
    retry = Retry(attempts=9999)
    assert retry.wait_s(BUSY, attempt, left_s, lambda: jitter, **options) == (wait_s and pytest.approx(wait_s))


def test_the_failures_that_are_tried_again_survive_a_description_in_json() -> None:
    endpoint = Endpoint("http://localhost:1/m", retry=Retry(when=("connect", "lost")))
    described = json.loads(json.dumps(endpoint.describe()))
    assert Endpoint.from_description(described).describe() == endpoint.describe()
    assert Retry(**described["retry"]) == Retry(when=("connect", "lost"))
    del described["retry"]["when"]  # as an earlier version wrote it
    assert Retry(**described["retry"]) == Retry()


def test_a_failure_that_nobody_knows_is_a_spec_error_that_lists_them() -> None:
    with pytest.raises(
        SpecError, match="no failure 'timeout': expected some of connect, lost, overloaded, unavailable"
    ):
        Retry(when=("connect", "timeout"))


def test_only_a_sending_that_reached_nobody_is_made_up_for_elsewhere_for_free() -> None:
    assert Retry.is_free(REFUSED, elsewhere=True)
    assert not Retry.is_free(REFUSED, elsewhere=False)
    assert not Retry.is_free(LOST, elsewhere=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Retry(attempts=0), lambda: Retry(base_s=-1), lambda: Retry(max_s=-1), lambda: Retry(budget=-1),
        lambda: Retry(budget=math.nan), lambda: Hedge(after_s=-1), lambda: Hedge(after_s=math.nan),
        lambda: Hedge(budget=2), lambda: Hedge(budget=-1), lambda: Breaker(faults=0), lambda: Breaker(base_s=0),
        lambda: Breaker(base_s=2, max_s=1),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_a_spec_error(make: Any) -> None:
    with pytest.raises(SpecError):
        make()


# --------------------------------------------------------------------------- budget


def spendings(budget: Budget, calls: int, each: int, gap_s: float = 0.0) -> int:
    """How many sendings are added when each of so many calls, `gap_s` apart, asks for `each`."""
    purse, now, added = budget.opened(0.0), 0.0, 0
    for _ in range(calls):
        purse = budget.earned(purse)
        for _ in range(each):
            spent = budget.spent(purse, now)
            if spent is not None:
                purse, added = spent, added + 1
        now += gap_s
    return added


@pytest.mark.parametrize(
    ("budget", "calls", "each", "gap_s", "added"),
    [
        (Budget(0.2), 1, 2, 0.0, 2),
        (Budget(0.2), 1, 99, 0.0, 10),
        (Budget(0.2), 50, 2, 0.0, 10),
        (Budget(0.2), 1000, 2, 0.0, 200),
        (Budget(0.2), 1000, 2, 0.005, 200),
        (Budget(0.2), 10, 2, 10.0, 20),
        (Budget(0.07), 1000, 1, 0.0, 70),
        (Budget(0.0), 1000, 1, 1.0, 0),
        (Budget(math.inf), 10, 9, 0.0, 90),
    ],
)
def test_what_is_added_is_what_was_lent_or_a_share_of_the_calls(
    budget: Budget, calls: int, each: int, gap_s: float, added: int
) -> None:
    assert spendings(budget, calls, each, gap_s) == added


def test_a_purse_holds_no_more_than_so_much() -> None:
    budget = Budget(0.2, most=100)
    purse = budget.opened(0.0)
    for _ in range(10_000):
        purse = budget.earned(purse)
    assert purse.saved == 100


def test_retries_of_calls_at_any_pace_stay_within_a_fifth_and_the_loans() -> None:
    rng = random.Random(5)
    for _ in range(50):
        budget, now, calls, added = Budget(0.2), 0.0, 0, 0
        purse = budget.opened(now)
        for _ in range(400):
            now += rng.choice([0.0, 0.001, 0.1, 2.0])
            purse, calls = budget.earned(purse), calls + 1
            while (spent := budget.spent(purse, now)) is not None and rng.random() < 0.8:
                purse, added = spent, added + 1
        assert added <= 0.2 * calls + budget.reserve + budget.per_s * now


# --------------------------------------------------------------------------- hedge


@pytest.mark.parametrize(
    ("hedge", "took_s", "delay_s"),
    [
        (Hedge(after_s=0.3), [], 0.3),
        (Hedge(after_s=0.0), [9.0], 0.0),
        (Hedge(), [0.1] * 19, None),
        (Hedge(), [0.1] * 20, 1.0),
        (Hedge(), [0.1] * 99, 1.0),
        (Hedge(), [0.1] * 100, 0.1),
        (Hedge(), [float(n) for n in range(1, 101)], 95.0),
        (Hedge(), [0.01] * 94 + [9.0] * 6, 0.1),
        (Hedge(), [0.01] * 96 + [9.0] * 4, 0.01),
        (Hedge(), [0.0001] * 94 + [9.0] * 6, 0.005),
    ],
)
def test_a_copy_goes_out_after_p95_or_when_it_was_said_to(
    hedge: Hedge, took_s: list[float], delay_s: float | None
) -> None:
    assert hedge.delay_s(took_s) == (delay_s and pytest.approx(delay_s))


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1.0), (0.25, 1.0), (0.5, 2.0), (0.51, 3.0), (0.99, 4.0), (1.0, 4.0)]
)
def test_a_quantile_is_a_value_that_so_many_do_not_exceed(share: float, value: float) -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], share) == value


# --------------------------------------------------------------------------- breaker


def test_five_faults_in_a_row_eject_and_an_answer_between_them_forgives() -> None:
    breaker, health = Breaker(), Health()
    for _ in range(4):
        health = breaker.after_fault(health, 0.0, others=1)
    health = breaker.after_answer(health)
    for _ in range(4):
        health = breaker.after_fault(health, 0.0, others=1)
        assert breaker.state(health, 0.0) == UP
    health = breaker.after_fault(health, 0.0, others=1)
    assert breaker.state(health, 0.0) == EJECTED
    assert breaker.state(health, 0.999) == EJECTED
    assert breaker.state(health, 1.0) == PROBING


def ejected(breaker: Breaker, health: Health, now: float) -> Health:
    while breaker.state(health, now) != EJECTED:
        health = breaker.after_fault(health, now, others=1)
    return health


def test_an_ejection_is_twice_as_long_each_time_a_probe_fails_up_to_its_cap() -> None:
    breaker, now = Breaker(base_s=1.0, max_s=10.0), 0.0
    health = ejected(breaker, Health(), now)
    lengths = []
    for _ in range(6):
        lengths.append(health.until - now)
        now = health.until
        assert breaker.state(health, now) == PROBING
        health = breaker.after_fault(health, now, others=1)
    assert lengths == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_a_probe_that_is_answered_brings_back_and_a_soon_relapse_is_remembered() -> None:
    breaker = Breaker(base_s=1.0)
    back = breaker.after_answer(ejected(breaker, Health(), 0.0))
    assert breaker.state(back, 1.0) == UP
    assert ejected(breaker, back, 1.5).until == 1.5 + 2.0
    assert ejected(breaker, back, 2.5).until == 2.5 + 1.0


def test_the_last_replica_is_never_ejected() -> None:
    breaker, health = Breaker(), Health()
    for now in range(100):
        health = breaker.after_fault(health, float(now), others=0)
        assert breaker.state(health, float(now)) in (UP, PROBING)


def test_faults_of_calls_that_were_under_way_do_not_lengthen_an_ejection() -> None:
    breaker = Breaker()
    health = ejected(breaker, Health(), 0.0)
    assert breaker.after_fault(health, 0.5, others=1).until == health.until


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (REFUSED, True), (LOST, True), (BUSY, True), (DeadlineExceeded("late"), True), (FramingError("odd"), True),
        (DecodeError("junk"), True), (BadStatus("x", status=500), True), (BadStatus("x", status=418), False),
        (Overloaded("full"), False), (InvalidRequest("no"), False), (InternalError("raised"), False),
        (ModelNotFound("no"), False),
    ],
)  # fmt: skip
def test_what_speaks_against_the_replica_is_not_what_the_request_brought_about(
    error: RemoteOpsError, fault: bool
) -> None:
    assert is_fault(error, 0.1) is fault


@pytest.mark.parametrize(
    ("waited_s", "typical_s", "fault"),
    [(0.0, None, False), (0.0001, None, False), (0.1, None, True), (0.1, 0.2, False), (0.1, 0.05, True)],
)
def test_a_deadline_sooner_than_an_answer_can_be_is_not_the_replicas_fault(
    waited_s: float, typical_s: float | None, fault: bool
) -> None:
    assert is_fault(DeadlineExceeded("late"), waited_s, typical_s) is fault


# --------------------------------------------------------------------------- replica choice

OUT, PROBE, HELD, SEEN = Load(EJECTED), Load(PROBING), Load(held=True), Load(tried=True)


@pytest.mark.parametrize(
    ("loads", "may_be"),
    [
        ([Load()], {0}),
        ([OUT], {0}),
        ([Load(), Load()], {0, 1}),
        ([Load(in_flight=1), Load()], {1}),
        ([Load(), OUT], {0}),
        ([Load(in_flight=50), OUT], {0}),
        ([Load(), HELD], {0}),
        ([SEEN, Load()], {1}),
        ([SEEN, OUT], {0}),
        ([SEEN._replace(held=True), OUT], {1}),
        ([SEEN._replace(refused=True), OUT], {1}),
        ([SEEN._replace(refused=True), SEEN], {1}),
        ([SEEN._replace(refused=True), SEEN._replace(state=EJECTED)], {0, 1}),
        ([SEEN._replace(refused=True)], {0}),
        ([SEEN._replace(state=EJECTED), OUT], {1}),
        ([OUT, OUT], {0, 1}),
        ([HELD, HELD], {0, 1}),
        ([SEEN, SEEN], {0, 1}),
        ([Load(), PROBE], {1}),
        ([Load(), PROBE._replace(in_flight=1)], {0}),
        ([OUT, PROBE._replace(in_flight=1)], {1}),
        ([Load(typical_s=0.1), Load(typical_s=0.01)], {1}),
        ([Load(typical_s=0.02), Load(typical_s=0.01)], {0, 1}),
        ([Load(typical_s=0.1), Load()], {0, 1}),
        ([Load(typical_s=0.0009), Load(typical_s=0.0001)], {0, 1}),
        ([Load(typical_s=0.002), Load(typical_s=0.0002)], {1}),
        ([Load(typical_s=0.1), Load(typical_s=0.01, in_flight=1)], {1}),
        ([Load(typical_s=0.1), Load(typical_s=0.01, in_flight=4)], {0}),
        ([Load(), Load(in_flight=9), Load(in_flight=9)], {0, 1, 2}),
    ],
)
def test_the_choice_falls_on_one_of_these(loads: list[Load], may_be: set[int]) -> None:
    rng = random.Random(1)
    assert {choose(loads, turn, rng.randrange) for turn in range(200)} == may_be


def test_the_busiest_is_never_chosen_and_equals_take_turns() -> None:
    rng = random.Random(1)
    busy = [Load(in_flight=number) for number in range(4)]
    assert 3 not in {choose(busy, turn, rng.randrange) for turn in range(500)}
    assert [choose([Load()] * 3, turn, rng.randrange) for turn in range(6)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("load", "left"),
    [(Load(), True), (SEEN, True), (OUT, False), (HELD, False), (PROBE, True), (PROBE._replace(in_flight=1), False)],
)
def test_a_replica_is_left_unless_it_is_banned_or_probed(load: Load, left: bool) -> None:
    assert is_left(load) is left


def test_what_is_typical_is_a_median_that_fades() -> None:
    assert typical_of([1.0, 1.0, 1.0]) is None
    assert typical_of([9.0, 1.0, 2.0, 1.0]) == 1.0
    assert faded(8.0, 0.0) == 8.0
    assert faded(8.0, 5.0) == 4.0
