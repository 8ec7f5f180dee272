"""How far a run is: trials done and planned, the best so far, failures, and the time left. Pure; no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ucc_search import estimate
from ucc_search.analysis import failures_by_class
from ucc_search.config import RunConfig
from ucc_search.errors import RunError
from ucc_search.store import RunStore, TrialRow
from ucc_search.units import target_order

FINISHED = ".finished"
"""In the run folder: nothing is left to do."""
_RECENT = 20
"""Trials by which the pace of a rung is judged: later ones say more about what is left."""


@dataclass(frozen=True)
class RungStatus:
    """One rung of a run."""

    name: str
    done: int
    planned: int
    failed: int
    pace: float | None
    """Seconds from one finished trial to the next; None before the second."""
    left: float | None
    """Seconds until the rung is done; None while its pace is unknown."""


@dataclass(frozen=True)
class Best:
    """The best proposal and the best baseline of one budget on one rung, as trial and value."""

    target: str
    rung: str
    measure: str  # KL (nats, lower is better) or accuracy (0 to 1)
    search: tuple[int, float] | None
    baseline: tuple[int, float] | None
    baseline_name: str = ""


@dataclass(frozen=True)
class Status:
    """A run at one moment; times in seconds."""

    name: str
    state: str  # running, stopped or finished
    rungs: tuple[RungStatus, ...]
    best: tuple[Best, ...]
    failures: Mapping[str, int] = field(default_factory=dict)
    answered: int = 0
    """Trials whose values are those of an earlier one that measured the same."""
    left: float | None = None
    """Until all rungs are done, as far as they can be judged; None before the first can be."""
    more: bool = False
    """Some rung has no pace yet, so it takes longer than `left`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def status_of(config: RunConfig, rows: Sequence[TrialRow], state: str = "running") -> Status:
    """The status of a run with these finished trials."""
    planned = estimate.jobs(config)
    found = _by_rung([r for r in rows if r.origin != "dense"], list(planned))
    rungs = tuple(_rung(name, found.get(name, []), count) for name, count in planned.items() if count)
    known = [r.left for r in rungs if r.left is not None]
    return Status(
        config.name,
        state,
        rungs,
        _best(found),
        failures_by_class(rows),
        answered=sum(r.same_as is not None for r in rows),
        left=sum(known) if known else None,
        more=len(known) < len(rungs),
    )


def run_status(path: str | Path) -> Status:
    """The status of the run in a folder, also while another process writes to it.

    Raises:
        RunError: no run folder.
    """
    store = RunStore.open(path)
    rest = "finished" if (store.path / FINISHED).is_file() else "stopped"
    return status_of(store.config(), store.rows(), "running" if _is_written(store) else rest)


def _is_written(store: RunStore) -> bool:
    try:
        with store.lock():
            return False
    except RunError:
        return True


def _by_rung(rows: Sequence[TrialRow], names: Sequence[str]) -> dict[str, list[TrialRow]]:
    """Rows by the name of their rung, in the order of the ladder.

    Trainings of several lengths are told apart by their steps: rungs get longer from one to the next, and are
    measured in that order.
    """
    found: dict[str, list[TrialRow]] = {name: [] for name in names}
    for rung in dict.fromkeys(r.rung for r in rows):
        same = [name for name in names if name.partition(" ")[0] == rung] or [rung]
        members = [r for r in rows if r.rung == rung]
        lengths = sorted({r.fidelity for r in members if r.state != "failed"})
        for row in members:
            # A trial that failed may not say how far it got: it belongs to the rung that was under way.
            place = lengths.index(row.fidelity) if row.fidelity in lengths else len(lengths) - 1
            found.setdefault(same[max(0, min(place, len(same) - 1))], []).append(row)
    return found


def _rung(name: str, rows: Sequence[TrialRow], planned: int) -> RungStatus:
    planned = max(planned, len(rows))  # a resumed run may have been shortened
    pace = _pace(rows[-_RECENT:])
    missing = planned - len(rows)
    left = 0.0 if not missing else None if pace is None else pace * missing
    return RungStatus(name, len(rows), planned, sum(r.state == "failed" for r in rows), pace, left)


def _pace(rows: Sequence[TrialRow]) -> float | None:
    """Seconds from one finished trial to the next."""
    times = [datetime.fromisoformat(r.finished_at) for r in rows if r.finished_at]
    if len(times) < 2:
        return None
    return (times[-1] - times[0]).total_seconds() / (len(times) - 1)


def _best(found: Mapping[str, Sequence[TrialRow]]) -> tuple[Best, ...]:
    best = []
    for rung, rows in found.items():
        by_target: dict[str, list[TrialRow]] = defaultdict(list)
        for row in rows:
            if row.state != "failed" and row.feasible:
                by_target[row.target].append(row)
        measure = "KL" if rung == "zero-shot" else "accuracy"
        for target in sorted(by_target, key=target_order):
            members = by_target[target]
            ours, fixed = (
                _first([r for r in members if (r.origin == "search") is searched], measure)
                for searched in (True, False)
            )
            name = fixed[0].method if fixed else ""
            pairs = [None if b is None else (b[0].id, b[1]) for b in (ours, fixed)]
            best.append(Best(target, rung, measure, pairs[0], pairs[1], name))
    return tuple(best)


def _first(rows: Sequence[TrialRow], measure: str) -> tuple[TrialRow, float] | None:
    values = [(r, r.kl if measure == "KL" else r.accuracy) for r in rows]
    measured = [(r, v) for r, v in values if v is not None]
    if not measured:
        return None
    return min(measured, key=lambda p: p[1] if measure == "KL" else -p[1])


def failures_text(failures: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(failures).most_common())


def duration(seconds: float) -> str:
    """`8 s`, `12 min`, `3 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
