"""When to try again: pure decisions, without I/O, clock or randomness of their own.

It does not send anything; `client` asks it and acts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from remote_ops.errors import RemoteOpsError, SpecError

__all__ = ["Retry"]


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a call that failed for a passing reason is sent again, within its deadline.

    Args:
        attempts: sendings in all, 1 or more; 1 means no retry.
        base_s: the longest wait before the second sending, in seconds; it doubles each time.
        max_s: the longest wait before any sending, in seconds.

    Raises:
        SpecError: a number out of its range.

    Source: exponential backoff with full jitter.
    """

    attempts: int = 3
    base_s: float = 0.05
    max_s: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.base_s < 0 or self.max_s < 0:
            raise SpecError(f"expected attempts >= 1, base_s >= 0 and max_s >= 0, got {self}", path="retry")

    def wait_s(self, error: RemoteOpsError, attempt: int, left_s: float, jitter: Callable[[], float]) -> float | None:
        """Seconds to wait before the next sending; None to give up.

        Args:
            error: what sending number `attempt` (from 1) ended with.
            left_s: seconds until the deadline.
            jitter: gives a number between 0 and 1.
        """
        if not error.retryable or attempt >= self.attempts:
            return None
        wait_s = min(self.max_s, self.base_s * 2.0 ** (attempt - 1)) * jitter()
        return wait_s if wait_s < left_s else None
