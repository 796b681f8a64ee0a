"""Which version of a model a request gets: by number, by label, or by weight, and who gets a copy of it.

It only chooses: no clock, no chance of its own, no model. `Routes` never changes; what changes is which one is in use.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from remote_ops.errors import InvalidRequest, ModelNotFound, ModelUnavailable
from remote_ops.signature import did_you_mean

if TYPE_CHECKING:
    from server_ref.settings import Versions

__all__ = ["Choice", "Routes", "in_order", "missing_versions", "routes_of", "served_versions"]


class Choice(NamedTuple):
    """The version that answers a request, and the one that gets a copy of it, if one does."""

    version: str
    mirror: str | None = None


def in_order(versions: Iterable[str]) -> tuple[str, ...]:
    """Put versions in order, the latest last: numbers in them count as numbers, so `v9` is before `v10`.

    What is only text comes after what begins with a number; equal numbers, as `1` and `01`, go by their text.
    """
    return tuple(sorted(versions, key=_place))


def _place(version: str) -> tuple[list[Any], str]:
    parts = re.split(r"(\d+)", version)  # text and numbers by turns, text first
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], version


def served_versions(found: Iterable[str], versions: Versions) -> tuple[str, ...]:
    """Choose which of the versions that are there are to be loaded, in order.

    Args:
        found: those that are there.
        versions: the policy. With `latest`, those that a label, a weight or `mirror` names are served besides.
    """
    there = in_order(found)
    if versions.policy == "all":
        return there
    if versions.policy == "specific":
        return tuple([version for version in there if version in versions.versions])
    kept = {*there[-versions.count :], *versions.named}
    return tuple([version for version in there if version in kept])


def missing_versions(found: Iterable[str], versions: Versions) -> tuple[str, ...]:
    """Name the versions that the settings name and that are not there, in order."""
    return in_order({*versions.versions, *versions.named}.difference(found))


def routes_of(model: str, served: Iterable[str], ready: Collection[str], versions: Versions) -> Routes:
    """Make the routes of a model from its settings: `served` are all of its versions, `ready` those that answer now."""
    mirror = versions.mirror
    return Routes(model, in_order(served), frozenset(ready), dict(versions.labels), dict(versions.weights), mirror)


@dataclass(frozen=True)
class Routes:
    """What the requests to one model are routed by; another one is made for each change.

    Args:
        model: its name, for messages; and so that no two models split the same keys the same way.
        versions: all that are served, in order, the latest last.
        ready: those of them that answer now.
        labels: label -> version.
        weights: version -> weight, 0 or more; without any, the latest that is ready gets all.
        mirror: the version that gets copies.

    A choice costs about 1 us, 3 us with a key.
    """

    model: str
    versions: tuple[str, ...]
    ready: frozenset[str]
    labels: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    mirror: str | None = None
    _all: _Ranges = field(init=False, repr=False, compare=False)
    _ready: _Ranges = field(init=False, repr=False, compare=False)
    _latest: str | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ready = [version for version in self.versions if version in self.ready]
        object.__setattr__(self, "_all", _Ranges(self.weights))
        there = {version: weight for version, weight in self.weights.items() if version in ready}
        object.__setattr__(self, "_ready", _Ranges(there))
        object.__setattr__(self, "_latest", ready[-1] if ready else None)

    def knows(self, name: str) -> bool:
        """Whether it is a version or a label of the model."""
        return name in self.versions or name in self.labels

    # ----------------------------------------------------------------------- choosing

    def choose(
        self,
        version: str | None = None,
        *,
        label: str | None = None,
        key: str | bytes | None = None,
        chance: float = 0.0,
    ) -> Choice:
        """Choose the version of one request.

        Args:
            version: the one asked for; a label will do.
            label: the label asked for.
            key: what requests stay with a version by, such as the value of a header; none, or an empty one, if by
                nothing. It goes the same way in every process, as long as the weights are the same.
            chance: a random number in [0, 1), for requests without a key.

        Where a weighted version is not ready, what it would have got goes to the others that have a weight, in
        proportion. Only its own keys move, and they come back with it.

        Raises:
            ModelNotFound: no such version or label; says what was perhaps meant.
            ModelUnavailable: it is not ready, or none that has a weight is.
            InvalidRequest: both a version and a label.
        """
        if label is not None:
            if version is not None:
                raise InvalidRequest(f"expected a version or a label of model '{self.model}', got both")
            return Choice(self._required(self._labelled(label), f"label '{label}' of model '{self.model}' is "))
        if version is not None:
            return Choice(self._named(version))
        chosen = self._weighed(key, chance) if self.weights else self._latest
        if chosen is None:
            raise self._none_ready()
        mirror = self.mirror if self.mirror in self.ready and self.mirror != chosen else None
        return Choice(chosen, mirror)

    def _named(self, name: str) -> str:
        if name in self.ready:
            return name
        if name not in self.versions and name in self.labels:
            return self._required(self.labels[name], f"label '{name}' of model '{self.model}' is ")
        return self._required(name)

    def _labelled(self, label: str) -> str:
        if label in self.labels:
            return self.labels[label]
        there = ", ".join(self.labels) or "none"
        hint = did_you_mean(label, self.labels) or f": there is {there}"
        raise ModelNotFound(f"model '{self.model}' has no label '{label}'{hint}")

    def _required(self, version: str, why: str = "") -> str:
        """A version that is ready."""
        if version in self.ready:
            return version
        if version not in self.versions:
            raise self._unknown(version, why)
        raise ModelUnavailable(f"{why}version '{version}' of model '{self.model}', which is not ready")

    def _unknown(self, version: str, why: str = "") -> ModelNotFound:
        if why:
            return ModelNotFound(f"{why}version '{version}', which is not served")
        hint = did_you_mean(version, [*self.versions, *self.labels])
        there = ", ".join([*self.versions, *self.labels]) or "none"
        return ModelNotFound(f"model '{self.model}' has no version '{version}'{hint or f': there is {there}'}")

    def _none_ready(self) -> ModelNotFound | ModelUnavailable:
        if not self.versions:
            return ModelNotFound(f"model '{self.model}' has no version that is served")
        waited = ", ".join(version for version in self.versions if not self.weights or self.weights.get(version))
        return ModelUnavailable(
            f"model '{self.model}' is not ready: expected version {waited or 'with a weight'} to be"
        )

    def _weighed(self, key: str | bytes | None, chance: float) -> str | None:
        if not key:
            return self._ready.at(chance)
        chosen = self._all.at(self._point(key))
        return chosen if chosen in self.ready else self._ready.at(self._point(key, b"again"))

    def _point(self, key: str | bytes, salt: bytes = b"") -> float:
        """Where a key lies in [0, 1), evenly."""
        text = key if isinstance(key, bytes) else key.encode("utf-8", "surrogatepass")
        digest = blake2b(self.model.encode() + b"\0" + text, digest_size=8, salt=salt).digest()
        return (int.from_bytes(digest, "big") >> 11) / 2**53  # as many bits as a float has below 1

    # ----------------------------------------------------------------------- changing

    def with_ready(self, served: Iterable[str], ready: Iterable[str]) -> Routes:
        """Make the routes for other versions; labels and weights stay, those of versions that are gone too."""
        return replace(self, versions=in_order(served), ready=frozenset(ready))

    def with_label(self, label: str, version: str | None) -> Routes:
        """Make the routes where a label stands for another version, or for none (None).

        Raises:
            ModelNotFound: no such version; or no such label, where it is to go.
            InvalidRequest: the version is not loaded: the label stays where it is, since requests use it.
        """
        if version is None:
            self._labelled(label)
            return replace(self, labels={name: to for name, to in self.labels.items() if name != label})
        if version not in self.versions:
            raise self._unknown(version)
        if version not in self.ready:
            kept = f"; it stays at '{self.labels[label]}'" if label in self.labels else ""
            raise InvalidRequest(
                f"cannot put label '{label}' of model '{self.model}' on version '{version}': "
                f"expected one that is loaded and ready{kept}; load it first"
            )
        return replace(self, labels={**self.labels, label: version})

    def with_weights(self, weights: Mapping[str, float]) -> Routes:
        """Make the routes with other weights; none of them sends all to the latest version again.

        A key moves only if a border between two versions, laid end to end in their order, moves across it.

        Raises:
            ModelNotFound: a weight of a version that is not served; one that is not ready yet is accepted.
            InvalidRequest: a weight that is no number of 0 or more, or all of them 0.
        """
        for version, weight in weights.items():
            if version not in self.versions:
                raise self._unknown(version)
            if not 0 <= weight < float("inf"):
                raise InvalidRequest(f"expected a weight of 0 or more for version '{version}', got {weight}")
        if weights and not any(weights.values()):
            raise InvalidRequest(f"expected one weight of model '{self.model}' that is not 0, got {dict(weights)}")
        return replace(self, weights=dict(weights))


class _Ranges:
    """Weights laid end to end in the order of their versions, and the version at a point."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._versions = [version for version in in_order(weights) if weights[version] > 0]
        self._ends = list(accumulate(weights[version] for version in self._versions))

    def at(self, point: float) -> str | None:
        """The version at a point in [0, 1); None where no version has a weight."""
        if not self._versions:
            return None
        return self._versions[min(bisect_right(self._ends, point * self._ends[-1]), len(self._versions) - 1)]
