"""The thin layer between a campaign and Ray Tune; imported by `runner` alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray import tune
from ray.tune import ProgressReporter
from ray.tune.search import Searcher

from ucc_search.campaign import Campaign, Job, describe
from ucc_search.errors import UserError


class CampaignSearcher(Searcher):
    """Lets Ray Tune pull the campaign's jobs and hands their outcomes back; holds no state of its own.

    Attributes:
        finished: the campaign has no more jobs.
        problem: what went wrong while a job was being made, raised after Tune has stopped.
    """

    def __init__(
        self, campaign: Campaign, task: Callable[[Job], Mapping[str, Any]], log: Callable[[str], None]
    ) -> None:
        super().__init__(metric="seconds", mode="min")
        self._campaign, self._task, self._log = campaign, task, log
        self._jobs: dict[str, Job] = {}
        self.finished = False
        self.problem: UserError | None = None

    def suggest(self, trial_id: str) -> Any:
        try:
            job = self._campaign.next_job()
        except StopIteration:
            self.finished = True
            return Searcher.FINISHED
        except UserError as error:
            self.problem = error
            return Searcher.FINISHED
        if job is None:
            return None
        self._jobs[trial_id] = job
        return dict(self._task(job))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        job = self._jobs.pop(trial_id, None)
        if job is None:
            return
        if error or result is None or "state" not in result:
            result = {"state": "failed", "failure": "worker_died", "error": "the worker process ended"}
        self._log(describe(self._campaign.finish(job.id, result)))

    # Ray snapshots searchers as it goes; what ours knows is in the run's own store.
    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save(self, checkpoint_path: str) -> None:
        return None

    def restore(self, checkpoint_path: str) -> None:
        return None


class SilentReporter(ProgressReporter):
    """Keeps Ray's own tables off the terminal."""

    def should_report(self, trials: Any, done: bool = False) -> bool:
        return False

    def report(self, trials: Any, done: bool, *sys_info: Any) -> None:
        return None


def trainable(task: dict[str, Any]) -> None:
    """Ray Tune's function: one job on this worker's warm bench."""
    from ucc_search.worker import measure

    tune.report(measure(task))
