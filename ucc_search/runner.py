"""Run a campaign: on Ray Tune, or in this process."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ucc_search import estimate, supervisor
from ucc_search.analysis import failure_classes, lost_search, pareto_front, usable
from ucc_search.binding import bind
from ucc_search.campaign import Campaign
from ucc_search.checkpoints import remember_loaded, was_loaded
from ucc_search.config import RunConfig, plain_config
from ucc_search.environment import environment
from ucc_search.errors import DataError
from ucc_search.interfaces import INFERENCE_KINDS, Observer
from ucc_search.ladder import levels
from ucc_search.latency.kept import table_for
from ucc_search.observers import Observers
from ucc_search.parcel import Parcel, folders_of_teacher
from ucc_search.plugins import Plugins
from ucc_search.runs import Run
from ucc_search.schedule import Scheduler, check_budgets
from ucc_search.scoring import measure_importance, this_bench
from ucc_search.shapes import model_shape, train_images
from ucc_search.space import SearchSpace
from ucc_search.status import FINISHED
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
    view: Observer | None = None,
) -> Run:
    """Carry out a whole run; the same as `ucc-search search`.

    Args:
        config: as `load_config` returns it.
        out: the run folder; `results/<name>` by default.
        resume: go on with the run in that folder.
        log: gets a line for every event worth telling.
        view: told of the run beside the observers that the configuration names.

    Raises:
        UserError: the configuration cannot be run (nothing was written), or the folder is taken.
        Interrupted: stopped from outside; resumable.
    """
    plugins = plugins or Plugins.load(config.plugins)
    config = bind(config, plugins)
    path = Path(out) if out is not None else Path("results") / config.name
    shape = model_shape(config)
    space = SearchSpace.of(config.space, shape, plugins)
    unlimited = config.without_latency()
    check_budgets(unlimited, Scheduler(unlimited, shape, plugins), space, plugins)
    observers = Observers.named(config.observers, plugins, log)
    if view is not None:
        observers.add("view", view)
    here = functools.partial(this_bench, config, plugins)
    levels(config, train_images(config))  # refuses a ladder that does not rise
    if config.search.executor == "ray":
        from ucc_search.cluster import check_address

        check_address(config.search.ray_address)
    known = RunStore.resume(path, config) if resume else None
    if known is None:
        RunStore.refuse_taken(path)
    table = table_for(config, shape, plugins, log=log)
    if table is not None:
        check_budgets(config, Scheduler(config, shape, plugins, latency=table), space, plugins)
    if known is None:
        _prepare_teacher(config, plugins, log)
    scheduler = Scheduler(
        config, shape, plugins, _bench_evaluate(here), lambda ref: here().depth_order(ref), table
    )
    # Before a folder is made: a criterion that fails leaves nothing behind, and scores have a cache of their own.
    measure_importance(config, plugins, shape, log)
    with _cluster(config), _locked(known, path, config, plugins) as store:
        start = time.monotonic()
        (store.path / FINISHED).unlink(missing_ok=True)
        observers.run_started(path, plain_config(config))
        try:
            starts = _chosen_ranks(config, here, space, scheduler, store, log)
            campaign = Campaign(config, plugins, scheduler, space, store, starts, observers, log)
            parcel = Parcel.of(config, plugins, folders_of_teacher(config))
            if config.search.executor == "ray":
                from ucc_search.tuning import run_on_ray

                run_on_ray(campaign, parcel, log)
            else:
                _run_here(campaign, parcel, log)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; continue with --resume --out {path}") from None
        finally:
            _write_tables(path, log)
            observers.run_finished(path)
        estimate.remember(campaign.rows, config)
        if config.search.keep_weights == "front":
            _drop_weights(store)
        (store.path / FINISHED).touch()
        log(f"{len(campaign.rows)} trials in {time.monotonic() - start:.0f} s, in {path}")
    return Run(path)


def _write_tables(path: Path, log: Log) -> None:
    """They follow from the rows and are written again by --resume, so a full disk must not hide what went wrong."""
    try:
        Run(path).write_tables()
    except OSError as error:
        log(f"{path}: the tables could not be written ({error.strerror or error})")


def _drop_weights(store: RunStore) -> None:
    """Delete the trained models that are not on the front; their rows and plans stay."""
    from ucc_search.saving import ARCH, WEIGHTS

    kept = {trial for point in pareto_front(store.rows()) for trial in point.trials}
    for row in store.rows():
        if row.id not in kept:
            for name in (WEIGHTS, ARCH):
                (store.folder(row.id) / name).unlink(missing_ok=True)


def _cluster(config: RunConfig) -> contextlib.AbstractContextManager[None]:
    """Where the trials will run; also before a folder is made."""
    if config.search.executor == "local":
        return contextlib.nullcontext()
    from ucc_search.cluster import connected

    return connected(config.search.ray_address)


@contextlib.contextmanager
def _locked(known: RunStore | None, path: Path, config: RunConfig, plugins: Plugins) -> Iterator[RunStore]:
    """The run's store, made if there is none, for this process alone."""
    records = [vars(r) for r in plugins.records]
    store = known or RunStore.create(path, config, environment(config, records))
    with store.lock():
        yield store


def _prepare_teacher(config: RunConfig, plugins: Plugins, log: Log) -> None:
    """Bad data, a bad checkpoint or a wrong class count must show before a folder is made.

    What was loaded once and has not changed since is not loaded again here, where nothing needs it.
    """
    if was_loaded(config):
        return
    size = this_bench(config, plugins, log).splits.image_size
    wanted = model_shape(config).image_size
    if set(wanted) != {size}:
        raise DataError(
            f"the images have {size} x {size} pixels, the model takes "
            f"{wanted[0]} x {wanted[1]}; set data.image_size or model.args.img_size"
        )
    remember_loaded(config)


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
            inputs=here.proxy_inputs if config.space.factorize == "whitened" else None,
            log=log,
        )
        starts[budget.label] = space.starting_at(ratios)
    replace_text(path, json.dumps(starts, indent=1) + "\n")
    return starts


def _bench_evaluate(bench: Callable[[], Workbench]) -> Callable[..., Any]:
    """Loads the model in this process only if a cascade must be calibrated."""
    return lambda parts, plan: bench().calibrated_accuracy(parts, plan)


def _run_here(campaign: Campaign, parcel: Parcel, log: Log) -> None:
    # Half of the logical cores: as many as there are real ones, and room for whatever else runs,
    # which OpenMP threads that wait for one another tolerate badly.
    threads, timeout = max(1, (os.cpu_count() or 1) // 2), campaign.config.search.trial_timeout
    common = {**parcel.open(), "threads": threads, "timeout": timeout}
    with contextlib.suppress(StopIteration), supervisor.ending():
        while True:
            job = campaign.next_job()
            assert job is not None, "one job at a time leaves none in flight"
            outcome = supervisor.measure_again({**common, "job": job.to_dict()}, log)
            campaign.finish(job.id, outcome)


def exit_code(run: Run) -> int:
    """0 if the run has a usable trial and its search, if any, did not fail as a whole, else 1."""
    rows = run.rows
    return 0 if usable(rows) and not lost_search(rows) else 1


def lost_text(run: Run) -> str | None:
    """What became of a search of which every trial failed, and what to do."""
    lost = lost_search(run.rows)
    if not lost:
        return None
    worst, *others = failure_classes(lost)
    how = f"most of them ({worst.trials})" if others else "all"
    return (
        f"every trial of the search failed on the {lost[0].rung} rung ({len(lost)}), {how} with {worst.failure}; "
        f"trial {worst.first} says: {worst.error or 'nothing'}. Mend the cause and search again with another --out: "
        "--resume does not measure failed trials again"
    )
