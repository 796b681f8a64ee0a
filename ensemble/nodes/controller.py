"""What the kinds that run other nodes share: the inputs they give on, and alternatives that must give the same.

A kind of them says which nodes it owns and when it runs which; this knows none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from ensemble.faults import Path
from ensemble.forms import Dim, Form
from ensemble.nodes.node import Batching, EdgeAt, EdgeText, NodeSpec, Owned, Scope, TensorText

__all__ = ["AlternativesSpec", "ControllerSpec", "agreed", "once", "with_rows"]


class ControllerSpec(NodeSpec):
    """A node that runs others."""

    @field_validator("outputs")
    @classmethod
    def _gives_what_they_give(cls, outputs: dict[str, str | TensorText] | None) -> None:
        if outputs is not None:
            raise ValueError("this gives what the nodes that it runs give: rename and declare 'outputs' there")

    @field_validator("batching")
    @classmethod
    def _batches_below(cls, batching: Batching | None) -> None:
        if batching is not None:
            raise ValueError("'batching' is for the nodes that this runs: write it there")


class AlternativesSpec(ControllerSpec):
    """A node that runs one of several others, all with its own inputs."""

    inputs: dict[str, EdgeText] = Field(default_factory=dict)
    """What its nodes get: each input's name, and where it comes from."""

    @field_validator("inputs")
    @classmethod
    def _are_names(cls, inputs: dict[str, EdgeText]) -> dict[str, EdgeText]:
        for name in inputs:
            if not name or name.startswith("$"):
                raise PydanticCustomError("E102", "expected the name of an input, got {name}", {"name": repr(name)})
        return inputs

    def edges(self) -> Iterator[EdgeAt]:
        """Its inputs; a kind adds what it decides by."""
        for name, edge in self.inputs.items():
            yield EdgeAt(name, edge, ("inputs", name))


def once(owned: Iterable[Owned]) -> Iterator[Owned]:
    """Each node where it is first written."""
    found: dict[str, Owned] = {}
    for one in owned:
        found.setdefault(one.name, one)
    return iter(found.values())


def agreed(scope: Scope, alternatives: Iterable[Owned]) -> dict[str, Form]:
    """What all these nodes give, by name, in the first one's order: what is known of each form by any of them.

    Notes `E110` where two differ. Those of which nothing is known agree with anything.
    """
    known = [(owned, scope.child(owned.name)) for owned in alternatives]
    known = [(owned, forms) for owned, forms in known if forms]
    if not known:
        return {}
    first, forms = known[0][0].name, dict(known[0][1])
    for (other, path), theirs in known[1:]:
        at = (*scope.path, *path)
        if set(theirs) != set(forms):
            scope.faults.add("E110", at, _unlike(first, forms, other, theirs))
            continue
        for name, form in forms.items():
            forms[name] = scope.equal(form, f"{first}.{name}", theirs[name], f"{other}.{name}", "E110", at)
    return forms


def _unlike(one: str, ones: Mapping[str, Form], other: str, others: Mapping[str, Form]) -> str:
    def words(forms: Mapping[str, Form]) -> str:
        return ", ".join(f"'{name}'" for name in forms)

    return (
        f"alternatives must give the same: '{one}' gives {words(ones)}, and '{other}' gives {words(others)};"
        f" rename with 'outputs: {{{next(iter(ones))}: {next(iter(others))}}}' in '{other}'"
    )


def with_rows(scope: Scope, forms: Mapping[str, Form], rows: Dim, by: str, path: Path) -> dict[str, Form]:
    """The same forms where axis 0 of each is `rows`, as `by` has them; notes `E110` where it cannot be."""
    found = {}
    for name, form in forms.items():
        if form.dims == ():
            text = f"output '{name}' is one value, {form}, and not one for each row of {by}, which is decided per row"
            scope.faults.add("E110", path, text)
        elif form.dims:
            form = scope.equal(Form(form.dtype, (rows, *form.dims[1:])), by, form, f"output '{name}'", "E110", path)
        found[name] = form
    return found
