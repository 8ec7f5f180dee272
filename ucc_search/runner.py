"""Run a campaign: on Ray Tune, or in this process. The only importer of ray."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ucc_search import estimate
from ucc_search.analysis import pareto_front, usable
from ucc_search.campaign import Campaign, Job, describe
from ucc_search.config import RunConfig, dump_config, plain_config
from ucc_search.environment import environment
from ucc_search.errors import DataError
from ucc_search.interfaces import INFERENCE_KINDS
from ucc_search.observers import Observers
from ucc_search.plugins import Plugins
from ucc_search.runs import Run
from ucc_search.schedule import Scheduler, check_budgets
from ucc_search.scoring import measure_importance, this_bench
from ucc_search.shapes import model_shape
from ucc_search.space import SearchSpace
from ucc_search.store import RunStore, replace_text
from ucc_search.widths import RANKS as RANK_KINDS

if TYPE_CHECKING:
    from ucc_search.workbench import Workbench

Log = Callable[[str], None]
RANKS = "ranks.json"
"""In the run folder: what the differentiable selection chose."""


class Interrupted(Exception):
    """The user stopped the run; what was finished is kept and the run can be resumed."""


def search(
    config: RunConfig,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    plugins: Plugins | None = None,
    log: Log = lambda text: None,
) -> Run:
    """Carry out a whole run; the same as `ucc-search search`.

    Args:
        config: as `load_config` returns it.
        out: the run folder; `results/<name>` by default.
        resume: go on with the run in that folder.
        log: gets a line for every event worth telling.

    Raises:
        UserError: the configuration cannot be run (nothing was written), or the folder is taken.
        Interrupted: stopped from outside; resumable.
    """
    plugins = plugins or Plugins.load(config.plugins)
    path = Path(out) if out is not None else Path("results") / config.name
    shape = model_shape(config)
    space = SearchSpace.of(config.space, shape, plugins)
    check_budgets(config, Scheduler(config, shape, plugins), space, plugins)
    observers = Observers.named(config.observers, plugins, log)
    here = functools.partial(this_bench, config, plugins)
    scheduler = Scheduler(config, shape, plugins, _bench_evaluate(here), lambda ref: here().depth_order(ref))
    if resume:
        store = RunStore.resume(path, config)
    else:
        RunStore.refuse_taken(path)
        _prepare_teacher(config, log)
    # Before a folder is made: a criterion that fails leaves nothing behind, and scores have a cache of their own.
    measure_importance(config, plugins, shape, log)
    if not resume:
        records = [vars(r) for r in plugins.records]
        store = RunStore.create(path, config, environment(config, records))
    with store.lock():
        start = time.monotonic()
        observers.run_started(path, plain_config(config))
        try:
            starts = _chosen_ranks(config, here, space, scheduler, store, log)
            campaign = Campaign(config, plugins, scheduler, space, store, starts, observers)
            if config.search.executor == "ray":
                _run_on_ray(campaign, log)
            else:
                _run_here(campaign, log)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; continue with --resume --out {path}") from None
        finally:
            Run(path).write_tables()
            observers.run_finished(path)
        estimate.remember(campaign.rows, config)
        if config.search.keep_weights == "front":
            _drop_weights(store)
        log(f"{len(campaign.rows)} trials in {time.monotonic() - start:.0f} s, in {path}")
    return Run(path)


def _drop_weights(store: RunStore) -> None:
    """Delete the trained models that are not on the front; their rows and plans stay."""
    from ucc_search.saving import ARCH, WEIGHTS

    kept = {trial for point in pareto_front(store.rows()) for trial in point.trials}
    for row in store.rows():
        if row.id not in kept:
            for name in (WEIGHTS, ARCH):
                (store.folder(row.id) / name).unlink(missing_ok=True)


def _prepare_teacher(config: RunConfig, log: Log) -> None:
    """Bad data, a bad checkpoint or a wrong class count must show before a folder is made."""
    from ucc_search.data import load_data
    from ucc_search.teachers import load_teacher

    splits = load_data(config.data, config.train.augment)
    load_teacher(config, splits, log=log)
    wanted = model_shape(config).image_size
    if set(wanted) != {splits.image_size}:
        raise DataError(
            f"the images have {splits.image_size} x {splits.image_size} pixels, the model takes "
            f"{wanted[0]} x {wanted[1]}; set data.image_size or model.args.img_size"
        )


def _chosen_ranks(
    config: RunConfig,
    bench: Callable[[], Workbench],
    space: SearchSpace,
    scheduler: Scheduler,
    store: RunStore,
    log: Log,
) -> dict[str, dict[str, float]]:
    """Points from the differentiable rank selection, by budget; made once, and kept in the run folder."""
    settings, path = config.search.ranks, store.path / RANKS
    if settings is None or not any(name.partition(".")[0] in RANK_KINDS for name in space.widths.searched()):
        return {}
    if path.is_file():
        known: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
        return known
    from ucc_search.rank_search import select_ranks

    here, starts = bench(), {}
    parts = here.plugins.components(*(space.corners()[0].components[k] for k in INFERENCE_KINDS))
    for budget in scheduler.budgets:
        log(f"choosing ranks by gradient descent for {budget.label}")
        ratios = select_ranks(
            here.teacher,
            scheduler.base,
            space.widths,
            budget,
            parts,
            here.splits.train,
            settings,
            seed=config.search.seed,
            log=log,
        )
        starts[budget.label] = space.starting_at(ratios)
    replace_text(path, json.dumps(starts, indent=1) + "\n")
    return starts


def _bench_evaluate(bench: Callable[[], Workbench]) -> Callable[..., Any]:
    """Loads the model in this process only if a cascade must be calibrated."""
    return lambda parts, plan: bench().calibrated_accuracy(parts, plan)


def _task_maker(campaign: Campaign, threads: int) -> Callable[[Job], dict[str, Any]]:
    """What is the same for every job of a run is made once."""
    common = {
        "config": dump_config(campaign.config),
        "plugins": list(campaign.plugins.sources),
        "disabled": list(campaign.plugins.disabled),
        "threads": threads,
    }

    def task(job: Job) -> dict[str, Any]:
        return {**common, "out": str(campaign.store.folder(job.id).resolve()), "job": job.to_dict()}

    return task


def _run_here(campaign: Campaign, log: Log) -> None:
    from ucc_search.worker import measure

    # Half of the logical cores: as many as there are real ones, and room for whatever else runs,
    # which OpenMP threads that wait for one another tolerate badly.
    task = _task_maker(campaign, threads=max(1, (os.cpu_count() or 1) // 2))
    with contextlib.suppress(StopIteration):
        while True:
            job = campaign.next_job()
            assert job is not None, "one job at a time leaves none in flight"
            row = campaign.finish(job.id, measure(task(job)))
            log(describe(row))


def _run_on_ray(campaign: Campaign, log: Log) -> None:
    _quiet_ray()
    import ray
    from ray import tune

    from ucc_search.tuning import CampaignSearcher, SilentReporter, trainable

    search = campaign.config.search
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    workers = campaign.config.train.workers
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus = int(resources.get("CPU", 1))
    at_once = search.concurrency or max(1, cpus // workers)
    threads = max(1, cpus // (at_once * workers))
    searcher = CampaignSearcher(campaign, _task_maker(campaign, threads), log)
    scratch = campaign.store.path / "ray"
    try:
        tuner = tune.Tuner(
            tune.with_resources(
                trainable,
                {"cpu": workers if at_once * workers <= cpus else 1, "gpu": search.gpus_per_trial},
            ),
            tune_config=tune.TuneConfig(
                search_alg=searcher, num_samples=-1, max_concurrent_trials=at_once, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch.resolve()),
                verbose=0,
                progress_reporter=SilentReporter(),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            ),
        )
        tuner.fit()
    finally:
        if started:
            ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
    if searcher.problem is not None:
        raise searcher.problem
    if not searcher.finished:
        raise KeyboardInterrupt


def _quiet_ray() -> None:
    """Ray prints its own tables and warnings even at verbosity 0; the run has its own lines."""
    settings = {
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_WARN_THRESHOLD_S": "60",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)


def exit_code(run: Run) -> int:
    """0 if the run has a usable trial, else 1; the uncompressed model is none."""
    return 0 if usable(run.rows) else 1
