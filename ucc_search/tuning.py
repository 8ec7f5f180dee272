"""The thin layer between a campaign and Ray Tune; imported by `runner` alone."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, ProgressReporter
from ray.tune.search import Searcher

from ucc_search.campaign import Campaign, Job
from ucc_search.cluster import Placement, at_once, nodes, placement
from ucc_search.errors import UserError
from ucc_search.parcel import Parcel
from ucc_search.supervisor import DEATHS, measure

LOSSES = 20
"""So often a trial is made again, whatever the reason."""

Log = Callable[[str], None]


def run_on_ray(campaign: Campaign, parcel: Parcel, log: Log) -> None:
    """Carry out a campaign on the cluster this process is connected to.

    Raises:
        UserError: a trial does not fit on any node, or what the campaign raises.
        KeyboardInterrupt: stopped from outside.
    """
    one = placement(campaign.config, list(nodes().values()))
    searcher = CampaignSearcher(campaign, one, log)
    scratch = campaign.store.path / "ray"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(trainable, sent=_send(parcel)), {"cpu": one.cpus, "gpu": one.gpus}
            ),
            tune_config=tune.TuneConfig(search_alg=searcher, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch.resolve()),
                verbose=0,
                progress_reporter=SilentReporter(),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                callbacks=[FileCatcher(searcher.files)],
            ),
        )
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if searcher.problem is not None:
        raise searcher.problem
    if not searcher.finished:
        raise KeyboardInterrupt


@dataclass
class _Flight:
    """A job that a worker has."""

    job: Job
    nodes: frozenset[str]  # alive when it was handed out


class CampaignSearcher(Searcher):
    """Lets Ray Tune pull the campaign's jobs and hands their outcomes back.

    A job whose worker dies is handed out again, unless that worker died DEATHS times while no node went away.

    Attributes:
        files: what a trial's result brought along for its folder, by Tune's id; see `FileCatcher`.
        finished: the campaign has no more jobs.
        problem: what went wrong while a job was made or filed, raised after Tune has stopped.
    """

    def __init__(self, campaign: Campaign, one: Placement, log: Log) -> None:
        super().__init__(metric="seconds", mode="min")
        self._campaign, self._placement, self._log = campaign, one, log
        self._flights: dict[str, _Flight] = {}
        self._again: deque[Job] = deque()
        self._lost: defaultdict[int, list[_Flight]] = defaultdict(list)
        self._seen = (0.0, dict[str, Any]())
        self.files: dict[str, Any] = {}
        self.finished = False
        self.problem: UserError | None = None

    def suggest(self, trial_id: str) -> Any:
        if self.problem is not None:
            return Searcher.FINISHED
        found = self._nodes()
        # Nodes may join or leave while the run goes on.
        if len(self._flights) >= at_once(self._campaign.config, self._placement, list(found.values())):
            return None
        try:
            job = self._again.popleft() if self._again else self._campaign.next_job()
        except StopIteration:
            self.finished = True
            return Searcher.FINISHED
        except UserError as error:
            self.problem = error
            return Searcher.FINISHED
        if job is None:
            return None
        self._flights[trial_id] = _Flight(job, frozenset(found))
        timeout = self._campaign.config.search.trial_timeout
        return {"threads": self._placement.threads, "timeout": timeout, "job": job.to_dict()}

    def _nodes(self, newest: bool = False) -> dict[str, Any]:
        """The cluster's nodes, asked for at most once a second unless the newest are needed."""
        asked, found = self._seen
        if newest or time.monotonic() - asked > 1:
            found = nodes()
            self._seen = (time.monotonic(), found)
        return found

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        files = self.files.pop(trial_id, ())
        flight = self._flights.pop(trial_id, None)
        if flight is None:
            return
        if error or result is None or "state" not in result:
            if self._made_again(flight):
                return
            result = {"state": "failed", "failure": "worker_died", "error": "the worker process ended"}
        try:
            self._campaign.finish(flight.job.id, {**result, "files": dict(files)})
        except UserError as problem:
            self.problem = self.problem or problem

    def _made_again(self, flight: _Flight) -> bool:
        """Whether a job whose worker died goes back into the queue."""
        lost, alive = self._lost[flight.job.id], set(self._nodes(newest=True))
        lost.append(flight)
        # All of them anew: Ray may notice that a node is gone only after its workers are.
        deaths = sum(f.nodes <= alive for f in lost)
        if deaths >= DEATHS or len(lost) > LOSSES:
            return False
        self._log(f"trial {flight.job.id} is made again: its worker or its node went away")
        self._again.append(flight.job)
        return True

    # Ray snapshots searchers as it goes; what ours knows is in the run's own store.
    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save(self, checkpoint_path: str) -> None:
        return None

    def restore(self, checkpoint_path: str) -> None:
        return None


class FileCatcher(Callback):
    """Takes the files (megabytes of weights) out of a result before Tune keeps and copies it."""

    def __init__(self, caught: dict[str, Any]) -> None:
        self._caught = caught

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        files = result.pop("files", ())
        if files:
            self._caught[trial.trial_id] = files


class SilentReporter(ProgressReporter):
    """Keeps Ray's own tables off the terminal."""

    def should_report(self, trials: Any, done: bool = False) -> bool:
        return False

    def report(self, trials: Any, done: bool, *sys_info: Any) -> None:
        return None


@dataclass(frozen=True)
class Sent:
    """A parcel in Ray's object store."""

    key: str
    parcel: Any
    """Its reference: a worker that has opened the parcel does not fetch it again."""


def _send(parcel: Parcel) -> Sent:
    packed = pickle.dumps(parcel)
    return Sent(hashlib.sha256(packed).hexdigest(), ray.put(packed))


_opened: dict[str, dict[str, Any]] = {}


def trainable(task: dict[str, Any], sent: Sent) -> None:
    """Ray Tune's function: one job on this worker's warm bench."""
    if sent.key not in _opened:
        _opened.clear()
        _opened[sent.key] = pickle.loads(ray.get(sent.parcel)).open()
    outcome: Mapping[str, Any] = measure({**_opened[sent.key], **task})
    # Pairs instead of a mapping, which Tune would flatten into its table of results. `done` ends the trial here.
    tune.report({**outcome, "files": list(outcome.get("files", {}).items()), "done": True})
