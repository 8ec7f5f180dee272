"""What moved the quality: importances of searched parameters and of blocks, and each block's sensitivity.

All of it is read from the trials of the search, at one budget at a time. Under a budget the parameters
depend on one another (tokens kept in one block are paid for in another), so these are associations
within what the sampler visited, not effects of turning one knob.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucc_search.analysis import RUNGS, spearman
from ucc_search.store import TrialRow

LEAST_TRIALS = 8
"""Below so many trials at a budget, nothing is said."""
_BLOCK = re.compile(r"^(?:width\.)?(?P<kind>.+)\.(?P<block>\d+)$")


@dataclass(frozen=True, slots=True)
class Importance:
    """One searched parameter's share of the variance of the quality, at one budget."""

    target: str  # the budget
    parameter: str  # as in params_searched
    kind: str  # keep, mlp, attention, ... ; the parameter itself where it belongs to no block
    block: int | None  # None where it belongs to no block
    importance: float  # 0 to 1; those of one budget sum to 1
    trials: int  # that it was estimated from


@dataclass(frozen=True, slots=True)
class BlockImportance:
    """The importances of one block's parameters together, at one budget."""

    target: str  # the budget
    block: int  # of the uncompressed model
    importance: float  # the sum over its parameters
    trials: int  # that it was estimated from


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How one block's ratio went with the quality, at one budget."""

    target: str  # the budget
    kind: str  # keep: share of the arriving tokens that stay; mlp, attention, ...: share of the units
    block: int  # of the uncompressed model
    correlation: float | None  # Spearman, of ratio and quality; above 0: keeping more here went with better
    best: float  # mean ratio of the best quarter of the trials
    rest: float  # mean ratio of the other trials
    trials: int  # that were compared


def searched_trials(rows: Sequence[TrialRow]) -> dict[str, list[TrialRow]]:
    """Usable proposals by target, on the rung that has the most of them, at that rung's highest fidelity."""
    good = [
        r
        for r in rows
        if r.origin == "search"
        and r.state == "ok"
        and r.feasible
        and r.params_searched
        and _value(r) is not None
    ]
    # A promoted trial repeats a proposal, so the rung where all proposals met says most.
    rung = max(RUNGS, key=lambda name: sum(r.rung == name for r in good))
    of_rung = [r for r in good if r.rung == rung]
    fidelity = max((r.fidelity for r in of_rung), default=0)
    groups: dict[str, dict[tuple[Any, ...], TrialRow]] = defaultdict(dict)
    for row in of_rung:
        if row.fidelity == fidelity:
            groups[row.target].setdefault((row.plan_key, repr(row.params_searched)), row)
    return {target: list(group.values()) for target, group in groups.items()}


def parameter_importances(rows: Sequence[TrialRow]) -> list[Importance]:
    """Functional ANOVA (Optuna's default evaluator) on the points that were measured, per budget.

    A random forest fills in what was not measured: with few trials, differences of a few hundredths are
    noise. Budgets with fewer than `LEAST_TRIALS` trials are left out, as is a quality that does not vary.
    """
    found = []
    for target, trials in searched_trials(rows).items():
        if len(trials) < LEAST_TRIALS or len({_value(r) for r in trials}) < 2:
            continue
        for parameter, share in _fanova(trials).items():
            kind, block = block_of(parameter)
            found.append(Importance(target, parameter, kind, block, share, len(trials)))
    return found


def block_importances(found: Sequence[Importance]) -> list[BlockImportance]:
    """Importances summed by block; parameters that belong to no block are left out."""
    sums: dict[tuple[str, int, int], float] = defaultdict(float)
    for one in found:
        if one.block is not None:
            sums[one.target, one.block, one.trials] += one.importance
    return [
        BlockImportance(t, block, share, n)
        for (t, block, n), share in sorted(sums.items(), key=_by_target(found))
    ]


def _by_target(found: Sequence[Importance]) -> Any:
    order = list(dict.fromkeys(one.target for one in found))
    return lambda item: (order.index(item[0][0]), item[0][1])


def block_sensitivity(rows: Sequence[TrialRow]) -> list[Sensitivity]:
    """Ratio against quality, for every block and kind of ratio, per budget."""
    found = []
    for target, trials in searched_trials(rows).items():
        if len(trials) < LEAST_TRIALS:
            continue
        by_quality = sorted(trials, key=lambda r: -_quality(r))
        best, rest = by_quality[: len(trials) // 4], by_quality[len(trials) // 4 :]
        shared = [k for k in trials[0].params_searched if all(k in r.params_searched for r in trials)]
        for name in shared:
            kind, block = block_of(name)
            if block is None or not _numeric(trials, name):
                continue
            found.append(
                Sensitivity(
                    target=target,
                    kind=kind,
                    block=block,
                    correlation=spearman(
                        [r.params_searched[name] for r in trials], [_quality(r) for r in trials]
                    ),
                    best=_mean(best, name),
                    rest=_mean(rest, name),
                    trials=len(trials),
                )
            )
    return found


def block_of(parameter: str) -> tuple[str, int | None]:
    """`keep.3` is (keep, 3), `width.mlp.0` is (mlp, 0), anything else itself and no block."""
    match = _BLOCK.match(parameter)
    # The embedding has one width in all blocks; its number is a stage's.
    if match is None or match["kind"] == "embed":
        return parameter, None
    return match["kind"], int(match["block"])


def _value(row: TrialRow) -> float | None:
    return row.accuracy if row.rung == "train" else row.kl


def _quality(row: TrialRow) -> float:
    value = _value(row)
    assert value is not None
    return value if row.rung == "train" else -value


def _numeric(rows: Sequence[TrialRow], name: str) -> bool:
    return all(isinstance(r.params_searched[name], int | float) for r in rows)


def _mean(rows: Sequence[TrialRow], name: str) -> float:
    return sum(float(r.params_searched[name]) for r in rows) / len(rows)


def _fanova(trials: Sequence[TrialRow]) -> dict[str, float]:
    """Importance by parameter, the largest first; parameters that never varied have none and are left out."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [k for k in trials[0].params_searched if all(k in r.params_searched for r in trials)]
    varied = [k for k in names if len({repr(r.params_searched[k]) for r in trials}) > 1]
    if not varied:
        return {}
    distributions = {k: _distribution([r.params_searched[k] for r in trials]) for k in varied}
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={k: r.params_searched[k] for k in varied},
                distributions=distributions,
                value=_quality(r),
            )
            for r in trials
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares: Mapping[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {k: float(v) for k, v in shares.items()}


def _distribution(values: Sequence[Any]) -> Any:
    """Spans what was measured: the importance is of the region the run visited."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return FloatDistribution(float(min(values)), float(max(values)))
    return CategoricalDistribution(tuple(dict.fromkeys(values)))
