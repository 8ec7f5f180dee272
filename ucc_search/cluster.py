"""The Ray cluster a run uses: one of its own on this machine, or one that exists; and what a trial takes of it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray

from ucc_search.config import RunConfig
from ucc_search.errors import ClusterError
from ucc_search.shapes import cache_folder
from ucc_search.stopping import keeping

Resources = Mapping[str, float]
"""What a node has in all: `CPU`, `GPU` and others."""


@dataclass(frozen=True)
class Placement:
    """What one trial takes; always on a single node, since its processes meet at a file."""

    cpus: int
    gpus: float
    threads: int
    """Of each process that computes."""


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to the cluster at `address` (`host:port`, or `auto` for one that runs on this machine).

    Without an address, to that of RAY_ADDRESS; without that either, to a cluster of this run's own. Where Ray is
    connected already, that connection is used and left alone.

    Raises:
        ClusterError: no cluster answers there.
    """
    _quiet_ray()
    if ray.is_initialized():
        yield
        return
    address = check_address(address)
    try:
        with _elsewhere(), keeping():
            if address is not None:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                ray.init(
                    address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
                )
    except Exception as error:  # Ray raises whatever it likes: a slow start is a plain Exception
        where = f"no Ray cluster can be used at {address!r}" if address else "Ray cannot be started here"
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(f"{where} ({reason}); set search.executor: local to do without") from None
    _silence_ray()
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """In an empty folder: Ray puts the current one first on its workers' path, and files there would be imported."""
    before, empty = os.getcwd(), cache_folder() / "empty"
    empty.mkdir(parents=True, exist_ok=True)  # for good: it is the current folder of Ray's own processes
    os.chdir(empty)
    try:
        yield
    finally:
        os.chdir(before)


def check_address(address: str | None) -> str | None:
    """The address to connect to, None for a cluster of this run's own; asked here, since Ray waits for minutes.

    Raises:
        ClusterError: it is none, or nothing answers there.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address in ("auto", "local"):
        return None if address == "local" else address
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        raise ClusterError(
            f"--ray-address {address!r}: expected HOST:PORT of the head node (often port 6379), or auto on a node of "
            "the cluster; Ray Client addresses (ray://) cannot be used, since the run folder is written where the "
            "command runs"
        )
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or leave "
            "--ray-address out to use this machine alone"
        ) from None
    return address


def nodes() -> dict[str, Resources]:
    """Resources of the nodes that are alive, by their id."""
    return {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"]}  # type: ignore[no-untyped-call]


def placement(config: RunConfig, found: Sequence[Resources]) -> Placement:
    """What a trial takes, by the space file and what the nodes have.

    Raises:
        ClusterError: no node has that much.
    """
    search, workers = config.search, config.train.workers
    largest = max((int(n.get("CPU", 0)) for n in found), default=0)
    total = sum(int(n.get("CPU", 0)) for n in found)
    has_gpus = any(n.get("GPU", 0) for n in found)
    gpus = search.gpus_per_trial if search.gpus_per_trial is not None else float(workers if has_gpus else 0)
    if search.cpus_per_trial is not None:
        cpus = search.cpus_per_trial
    else:
        share = total // search.concurrency if search.concurrency else workers
        cpus = max(1, min(max(workers, share), largest))
    if not any(_fit(n, cpus, gpus) for n in found):
        most = max((n.get("GPU", 0) for n in found), default=0)
        raise ClusterError(
            f"a trial needs {cpus} CPU(s) and {gpus:g} GPU(s) on one node (search.cpus_per_trial, "
            f"search.gpus_per_trial), but the nodes have at most {largest} and {most:g}"
        )
    return Placement(cpus, gpus, threads=max(1, cpus // workers))


def at_once(config: RunConfig, one: Placement, found: Sequence[Resources]) -> int:
    """Trials that fit on these nodes at a time, or fewer if the space file says so; at least one."""
    room = sum(_fit(n, one.cpus, one.gpus) for n in found)
    return max(1, min(room, config.search.concurrency or room))


def _fit(node: Resources, cpus: int, gpus: float) -> int:
    by_cpu = int(node.get("CPU", 0) // cpus)
    return by_cpu if not gpus else min(by_cpu, int(node.get("GPU", 0) / gpus + 1e-9))


def _quiet_ray() -> None:
    """Ray's defaults that do not suit a run: tables and warnings beside its own lines, workers that give way."""
    settings = {
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_WARN_THRESHOLD_S": "60",
        # Tune's own snapshots are never read: what is finished is in the run's store.
        "TUNE_GLOBAL_CHECKPOINT_S": "100000",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
        # Ray's own default of 15 lets workers starve beside any other work on the machine.
        "RAY_worker_niceness": "0",
    }
    for key, value in settings.items():
        os.environ.setdefault(key, value)


def _silence_ray() -> None:
    """What Ray prints of a lost node is pages long; the run has a line for every trial that is made again."""
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # What is published to every driver (a lost node) comes past the loggers and past log_to_driver.
    if hasattr(ray._private.worker, "_worker_logs_enabled"):
        ray._private.worker._worker_logs_enabled = False
