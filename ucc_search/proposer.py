"""Optuna's side of the search: proposes points, is told the points that were measured."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from ucc_search.space import Dimension

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Proposer:
    """Points for one budget.

    Sampling happens in memory; the study on disk holds what was measured and nothing else, so that
    it opens in optuna-dashboard without proposals that were never run as they stood.

    Args:
        dimensions: the search space.
        sampler: `tpe` or `random`.
        seed: of the sampler; a resumed run passes another one, or it would propose the same again.
        direction: `minimize` or `maximize`.
        storage: journal file.
        study: name of the study in it.
    """

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        *,
        sampler: str,
        seed: int,
        direction: Literal["minimize", "maximize"],
        storage: Path,
        study: str,
    ) -> None:
        self._distributions = {d.name: _distribution(d) for d in dimensions}
        self._memory = optuna.create_study(sampler=_sampler(sampler, seed), direction=direction)
        backend = optuna.storages.journal.JournalFileBackend(str(storage))
        self._record = optuna.create_study(
            study_name=study,
            storage=optuna.storages.JournalStorage(backend),
            direction=direction,
            load_if_exists=True,
        )

    def start_from(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Propose these (possibly partial) points first."""
        for point in points:
            known = {k: v for k, v in point.items() if k in self._distributions}
            if known:
                self._memory.enqueue_trial(known)

    def propose(self) -> dict[str, Any]:
        """The next point."""
        with warnings.catch_warnings():
            # Enqueued points are partial on purpose.
            warnings.simplefilter("ignore")
            trial = self._memory.ask(self._distributions)
        # The point that will be measured differs (it is projected), so this one is closed at once.
        self._memory.tell(trial, state=optuna.trial.TrialState.FAIL)
        return dict(trial.params)

    def tell(
        self,
        params: Mapping[str, Any],
        value: float | None,
        attributes: Mapping[str, Any],
        *,
        record: bool = True,
    ) -> None:
        """Learn from a measured point; None records a failure.

        Args:
            record: also write it to the study on disk (False when a run is read back).
        """
        state = optuna.trial.TrialState.COMPLETE if value is not None else optuna.trial.TrialState.FAIL
        trial = optuna.trial.create_trial(
            params=dict(params),
            distributions=self._distributions,
            value=value,
            state=state,
            user_attrs=dict(attributes),
        )
        self._memory.add_trial(trial)
        if record:
            self._record.add_trial(trial)


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.choices is not None:
        return CategoricalDistribution(dimension.choices)
    whole = (dimension.low, dimension.high, dimension.step)
    if all(isinstance(v, int) for v in whole):
        low, high, step = (int(v or 1) if i == 2 else int(v or 0) for i, v in enumerate(whole))
        return IntDistribution(low, high, step=step)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=8)
