"""What runs inside a worker process: measure one job on this process's warm bench."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ucc_search.errors import UserError
from ucc_search.interfaces import INFERENCE_KINDS, ComponentRef, Components
from ucc_search.plan import CompressionPlan
from ucc_search.ranks import RankError, train_together
from ucc_search.saving import arch_of
from ucc_search.store import JOB
from ucc_search.train import TrainingError, Worker
from ucc_search.workbench import Measurement, Workbench, warm_bench


def measure(task: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out one job; never raises, a failure is an outcome with its class.

    Args:
        task: `config` (resolved YAML), `plugins` (`Plugins.bundle`), `threads` and `job` (`campaign.Job.to_dict`).

    Returns:
        state, failure, error, kl, accuracy, test_accuracy, loss, latency_ms, metrics, continued, seconds,
        compute_seconds, and `files`: content by name, which the run's own process writes into the trial's folder.
    """
    start = time.perf_counter()
    try:
        torch.set_num_threads(task["threads"])
        bench = warm_bench(task["config"], task["plugins"])
        with tempfile.TemporaryDirectory(prefix="ucc-search-") as folder:
            outcome = _outcome(_measure(bench, {**task, "out": folder}))
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        outcome["files"] = files
    except (Exception, SystemExit) as error:  # a candidate's failure must not end the run
        logging.getLogger(__name__).debug("trial failed", exc_info=True)
        outcome = {"state": "failed", "failure": failure_class(error), "error": one_line(error)}
    given = {k: v for k, v in task["job"].items() if k not in ("id", "resume", "save")}
    kept = json.dumps({"threads": task["threads"], **given}, default=str).encode()
    outcome["files"] = {**outcome.get("files", {}), JOB: kept}
    return outcome | {"seconds": time.perf_counter() - start}


def prepare(task: Mapping[str, Any]) -> None:
    """Load what jobs like this one need; what goes wrong is left for `measure` to tell."""
    with contextlib.suppress(Exception, SystemExit):
        warm_bench(task["config"], task["plugins"])


def _measure(bench: Workbench, task: Mapping[str, Any]) -> Measurement:
    job = task["job"]
    if job["origin"] == "dense":
        return bench.dense(job["rung"])
    if job["rung"] == "zero-shot":
        plan, refs, parts = _decode(bench, job)
        torch.manual_seed(job["seed"])  # of learned scorers, and of all weights from scratch
        model = bench.compressed(plan, parts, refs["importance"], **_start(job))
        return bench.zero_shot(model, job.get("latency"))
    if bench.config.train.workers > 1:
        return Measurement(**train_together(task, bench.config.train.workers))
    return _train(bench, task, None)


def _decode(
    bench: Workbench, job: Mapping[str, Any]
) -> tuple[CompressionPlan, dict[str, ComponentRef], Components]:
    refs = {kind: ComponentRef.from_dict(value) for kind, value in job["components"].items()}
    parts = bench.plugins.components(*(refs[k] for k in INFERENCE_KINDS))
    return CompressionPlan.from_dict(job["plan"]), refs, parts


def _start(job: Mapping[str, Any]) -> dict[str, bool]:
    """What a candidate's first weights are made from."""
    return {"scratch": job["scratch"], "whiten": job["factorize"] == "whitened"}


def _train(bench: Workbench, task: Mapping[str, Any], worker: Worker | None) -> Measurement:
    job = task["job"]
    plan, refs, parts = _decode(bench, job)
    identities = {kind: bench.plugins.identity(kind, ref.name) for kind, ref in refs.items()}
    normalisation = {"mean": bench.splits.mean, "std": bench.splits.std}
    arch = arch_of(bench.config.model, refs, identities, bench.plugins.sources, normalisation)
    return bench.train(
        plan,
        parts,
        refs["distiller"],
        refs["importance"],
        **_start(job),
        seed=job["seed"],
        out=Path(task["out"]),
        arch=arch,
        worker=worker,
        stop=job["steps"],
        resume=_here(job.get("resume")),
        save=_here(job.get("save")),
        latency=job.get("latency"),
    )


def _here(state: str | None) -> Path | None:
    """Where a stopped training is kept; None on a machine that does not see the run's folder."""
    return Path(state) if state is not None and Path(state).parent.is_dir() else None


def train_rank(task: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """The part of one of several processes that train a candidate; rank 0 measures it."""
    torch.set_num_threads(task["threads"])
    return vars(_train(warm_bench(task["config"], task["plugins"]), task, worker))


def _outcome(measured: Measurement) -> dict[str, Any]:
    values = dict(vars(measured))
    bad = [k for k in ("kl", "loss") if values[k] is not None and not math.isfinite(values[k])]
    if bad:
        return {"state": "failed", "failure": "not_finite", "error": f"{bad[0]} is {values[bad[0]]}"}
    return {"state": "ok", **values}


DISK_FULL = "disk_full"
"""Not the candidate's fault: the run stops, and measures the trial again when it is resumed."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NO_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "cannot allocate memory")


def failure_class(error: BaseException) -> str:
    """A word for the table of failures."""
    if isinstance(error, RankError):
        return error.failure
    text = str(error).lower()
    if isinstance(error, TrainingError):
        return "nan_loss"
    if isinstance(error, FloatingPointError):
        return "not_finite"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(t in text for t in _NO_MEMORY):
        return "out_of_memory"
    # Libraries that write models wrap the system's error in one of their own.
    if (isinstance(error, OSError) and error.errno in _NO_ROOM) or any(
        os.strerror(code).lower() in text for code in _NO_ROOM
    ):
        return DISK_FULL
    return "user_error" if isinstance(error, UserError) else "error"


def one_line(error: BaseException) -> str:
    """An error's type and text, cut to 500 characters."""
    text = " ".join(str(error).split())
    # What a process of several reported names the type already.
    return (text if isinstance(error, RankError) else f"{type(error).__name__}: {text}")[:500]
