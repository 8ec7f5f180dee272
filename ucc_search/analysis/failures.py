"""What failed, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ucc_search.analysis.points import usable
from ucc_search.store import TrialRow


def failures_by_class(rows: Iterable[TrialRow]) -> dict[str, int]:
    """Failed trials by class, the most frequent first."""
    return dict(Counter(r.failure or "error" for r in rows if r.state == "failed").most_common())


@dataclass(frozen=True, slots=True)
class FailureClass:
    """Trials that failed in one way."""

    failure: str  # the class: nan_loss, out_of_memory, ...
    trials: int  # how many
    first: int  # the id of one of them
    error: str | None  # what that one said


def failure_classes(rows: Sequence[TrialRow]) -> list[FailureClass]:
    """`failures_by_class` with an example of each."""
    failed = [r for r in rows if r.state == "failed"]
    first = {
        name: next(r for r in failed if (r.failure or "error") == name) for name in failures_by_class(rows)
    }
    counts = failures_by_class(rows)
    return [FailureClass(name, counts[name], row.id, row.error) for name, row in first.items()]


def lost_search(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The search's failed trials where not one can stand beside the baselines; empty if some trial can.

    They are those of the rung that the tables show, or all where none got so far.
    """
    shown = usable(rows)
    searched = [r for r in rows if r.origin == "search"]
    levels = {(r.rung, r.fidelity) for r in shown}
    there = [r for r in searched if (r.rung, r.fidelity) in levels] or searched
    return there if all(r.state == "failed" for r in there) else []
