"""Two runs beside one another: per budget and method, with differences and their spread. No torch, no pandas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ucc_search.analysis import Point, compare_methods, dense_reference, hypervolume, measured, quality
from ucc_search.errors import RunError
from ucc_search.spread import gap, seed_noise
from ucc_search.store import TrialRow

if TYPE_CHECKING:
    from ucc_search.runs import Run

DECISIVE = ("data", "model", "teacher")
"""Sections that must be alike: otherwise the two runs answer different questions."""
_SILENT = ("name", "data.loader_workers", "data.root", "search.executor", "search.concurrency")


@dataclass(frozen=True, slots=True)
class Difference:
    """A key of the two configurations (or a measurement of the dense model) that differs."""

    key: str
    a: str
    b: str
    decisive: bool  # data, model or teacher: the numbers are not of one question


@dataclass(frozen=True, slots=True)
class MethodPair:
    """The best of one method at one budget in both runs; None where a run does not have it.

    Accuracies are from 0 to 1 on the selection split, test accuracies beside them; KL in nats.
    """

    target: str  # the budget
    method: str  # search or the baseline's name
    rung: str  # that both were measured on
    id_a: int | None  # the first trial in run A; likewise _b below, in run B
    id_b: int | None
    macs_a: int | None  # for one image
    macs_b: int | None
    seeds_a: int | None  # how many were averaged
    seeds_b: int | None
    accuracy_a: float | None  # on the selection split
    accuracy_b: float | None
    test_accuracy_a: float | None  # for the report only
    test_accuracy_b: float | None
    kl_a: float | None  # nats, on the calibration images
    kl_b: float | None
    difference: float | None  # b - a, of the selection accuracy (of minus the KL without training)
    margin: float | None  # half the width of its interval at 95 %; None where nothing was repeated
    verdict: str  # higher, lower, not told apart, unknown, or only A, only B


@dataclass(frozen=True, slots=True)
class BudgetPair:
    """Both runs at one budget: what the front dominates, and the trials it took."""

    target: str
    trials_a: int
    trials_b: int
    hypervolume_a: float | None  # MACs times quality, above a reference that both runs share
    hypervolume_b: float | None


@dataclass(frozen=True)
class RunComparison:
    """Run A beside run B."""

    a: str
    b: str
    differences: list[Difference]
    methods: list[MethodPair]
    budgets: list[BudgetPair]


def compare_runs(a: Run, b: Run, *, anyway: bool = False) -> RunComparison:
    """The same tables of two runs, side by side.

    Args:
        anyway: also where data, model or teacher differ; the differences are part of the result.

    Raises:
        RunError: they do, naming what.
    """
    differences = what_differs(a, b)
    decisive = [d for d in differences if d.decisive]
    if decisive and not anyway:
        shown = "; ".join(f"{d.key} is {d.a} in the one and {d.b} in the other" for d in decisive[:3])
        more = f" (and {len(decisive) - 3} more)" if len(decisive) > 3 else ""
        raise RunError(
            f"{a.path} and {b.path} do not answer the same question: {shown}{more}; "
            "compare them all the same with --anyway"
        )
    rows = a.rows, b.rows
    return RunComparison(str(a.path), str(b.path), differences, _methods(*rows), _budgets(*rows))


def what_differs(a: Run, b: Run) -> list[Difference]:
    """Configuration keys with different values, the decisive ones first; then the dense models' measurements.

    Baselines that one run lacks are not told here (the tables show them), nor is a teacher's recipe where
    both runs load the same checkpoint.
    """
    plain = [_plain_config(run) for run in (a, b)]
    shared = {name for name in plain[0] if name.startswith("baselines.")} & set(plain[1])
    known = {key.split(".")[1] for key in shared}
    found = []
    for key in dict.fromkeys((*plain[0], *plain[1])):
        before, after = (text.get(key, "not set") for text in plain)
        section, _, rest = key.partition(".")
        one_sided = section == "baselines" and rest.partition(".")[0] not in known
        if before != after and not one_sided and key not in _SILENT:
            found.append(Difference(key, before, after, section in DECISIVE))
    dense = [dense_reference(run.rows, "train") for run in (a, b)]
    if dense[0] and dense[1] and dense[0].rung == dense[1].rung:
        for name in ("macs", "accuracy", "test_accuracy"):
            before, after = (_short(getattr(d, name)) for d in dense)
            if before != after:  # another teacher, whatever the files call it
                found.append(Difference(f"the uncompressed model's {name}", before, after, decisive=True))
    return sorted(found, key=lambda d: (not d.decisive, _order(d.key)))


def _order(key: str) -> int:
    section = key.partition(".")[0]
    return DECISIVE.index(section) if section in DECISIVE else len(DECISIVE)


def _plain_config(run: Run) -> dict[str, str]:
    data = run.config.model_dump(mode="python", exclude_none=True)
    teacher = data.pop("teacher", None)
    if teacher is not None and run.config.model.checkpoint in (None, "auto"):
        data["teacher"] = [teacher]  # one leaf: the recipes are alike or they are not
    baselines = {b.pop("name"): b for b in data.pop("baselines", ())}
    return flatten(data) | {
        f"baselines.{name}.{key}": text for name, b in baselines.items() for key, text in flatten(b).items()
    }


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Leaves by dotted key, as short texts."""
    if isinstance(value, dict) and value and "low" not in value:  # a range is one value
        parts = [flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
        return {k: v for part in parts for k, v in part.items()}
    return {prefix: _short(value)}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_short, value)) + "]"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_short(v)}" for k, v in value.items())
    to_dict = getattr(value, "to_dict", None)
    text = _short(to_dict()) if to_dict else str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _methods(rows_a: Sequence[TrialRow], rows_b: Sequence[TrialRow]) -> list[MethodPair]:
    rung = _common_rung(rows_a, rows_b)
    a, b = ({(p.target, p.method): p for p in compare_methods(rows, rung)} for rows in (rows_a, rows_b))
    everything = [*measured(rows_a, rung), *measured(rows_b, rung)]
    keys = list(dict.fromkeys((*a, *b)))
    targets = list(dict.fromkeys(target for target, _ in keys))
    keys.sort(key=lambda k: targets.index(k[0]))
    pairs = []
    for target, method in keys:
        alike = [p for p in everything if p.target == target]
        pairs.append(_pair(target, method, rung, a.get((target, method)), b.get((target, method)), alike))
    return pairs


def _common_rung(rows_a: Sequence[TrialRow], rows_b: Sequence[TrialRow]) -> str:
    both = [{p.rung for p in measured(rows)} for rows in (rows_a, rows_b)]
    return "train" if all("train" in rungs for rungs in both) else "zero-shot"


def _pair(
    target: str, method: str, rung: str, a: Point | None, b: Point | None, alike: Sequence[Point]
) -> MethodPair:
    difference = margin = None
    verdict = "only B" if a is None else "only A"
    if a is not None and b is not None:
        noise = seed_noise((p.accuracy_std, p.seeds) for p in alike)
        seen = gap(quality(b), quality(a), seeds=(b.seeds, a.seeds), noise=noise)
        difference, margin, verdict = seen.difference, seen.margin, seen.verdict
    names = ("id", "macs", "seeds", "accuracy", "test_accuracy", "kl")
    sides = {
        f"{name}_{side}": getattr(point, name) if point is not None else None
        for side, point in (("a", a), ("b", b))
        for name in names
    }
    return MethodPair(
        target=target,
        method=method,
        rung=rung,
        difference=difference,
        margin=margin,
        verdict=verdict,
        **sides,
    )


def _budgets(rows_a: Sequence[TrialRow], rows_b: Sequence[TrialRow]) -> list[BudgetPair]:
    rung = _common_rung(rows_a, rows_b)
    points = [measured(rows, rung) for rows in (rows_a, rows_b)]
    pairs = []
    for target in dict.fromkeys(p.target for group in points for p in group):
        here = [[p for p in group if p.target == target] for group in points]
        both = [*here[0], *here[1]]
        # Beyond the dearest and below the worst of either run: each point of both counts.
        reference = 1.01 * max(p.macs for p in both), min(quality(p) for p in both) - 1e-9
        volumes = [hypervolume(group, reference) if group else None for group in here]
        counts = [sum(r.target == target for r in rows) for rows in (rows_a, rows_b)]
        pairs.append(BudgetPair(target, *counts, *volumes))
    return pairs
