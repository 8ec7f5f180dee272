"""One study of a search: a sampler, and the record of what was measured, which optuna-dashboard opens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from ucc_search.builtin.optuna_samplers import closed_trial, distribution
from ucc_search.interfaces import Measured, Sampler, SamplerRequest

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Proposer:
    """Points for one budget, or for a range of them.

    The study on disk holds what was measured and nothing else: no proposals that were never run as
    they stood.

    Args:
        sampler: fresh; it is started here.
        storage: journal file.
        study: name of the study in it.
    """

    def __init__(self, sampler: Sampler, request: SamplerRequest, *, storage: Path, study: str) -> None:
        self._sampler = sampler
        sampler.start(request)
        self._distributions = {d.name: distribution(d) for d in request.dimensions}
        backend = optuna.storages.journal.JournalFileBackend(str(storage))
        self._record = optuna.create_study(
            study_name=study,
            storage=optuna.storages.JournalStorage(backend),
            directions=["maximize" if m else "minimize" for m in request.maximize],
            load_if_exists=True,
        )
        self._recorded = {t.user_attrs.get("trial") for t in self._record.trials}

    def propose(self) -> dict[str, Any]:
        """The next point."""
        return dict(self._sampler.propose())

    def tell(self, measured: Measured, attributes: Mapping[str, Any]) -> None:
        """Learn from a measured point, and write it to the study on disk unless it is there already.

        Args:
            attributes: of the point in the study; `trial` is its number in the run.
        """
        self._sampler.tell(measured)
        if attributes["trial"] not in self._recorded:
            self._record.add_trial(closed_trial(measured, self._distributions, attributes))
