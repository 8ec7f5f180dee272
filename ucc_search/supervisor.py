"""One job in a process of its own, which is ended from outside when it takes too long. No torch here.

Used where `search.trial_timeout` is set: by the run's process itself, or inside a Ray worker. The process
stays warm from job to job; only one that hung or died is replaced.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, Pipe
from typing import Any

DEATHS = 3
"""So often a trial's worker process may die before the trial is filed as failed."""
_READY = "ready"
_CODE = "from ucc_search.supervisor import serve; serve({fd})"
_GRACE = 60.0  # seconds after which the kernel ends a process whose supervisor has gone without it


def measure(task: Mapping[str, Any]) -> dict[str, Any]:
    """`worker.measure`, within the time limit that the task names (`timeout`, seconds; None: in this process).

    Raises:
        WorkerDiedError: the process ended, by itself or killed from outside.
    """
    if task.get("timeout") is None:
        from ucc_search import worker

        return worker.measure(task)
    return _supervisor.measure(task, float(task["timeout"]))


def measure_again(task: Mapping[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """`measure`, a few times if the process dies; then that is the outcome."""
    for left in reversed(range(DEATHS)):
        try:
            return measure(task)
        except WorkerDiedError as error:
            died = str(error)
            if left:
                log(f"trial {task['job']['id']} is made again: {died}")
    return {"state": "failed", "failure": "worker_died", "error": died}


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Ends this process's worker process, if there is one then."""
    try:
        yield
    finally:
        _supervisor.end()


class WorkerDiedError(RuntimeError):
    """The process that measured is gone; another may measure the same job."""


class Supervisor:
    """Holds one worker process and sees that it answers."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._key = ""

    def measure(self, task: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """One job; a hung process is killed and the outcome says so.

        The limit counts from when the process has data and teacher, so it need not cover their loading.
        """
        start = time.perf_counter()
        pipe = self._started()
        try:
            pipe.send(dict(task))
            assert pipe.recv() == _READY
            if pipe.poll(timeout):
                outcome: dict[str, Any] = pipe.recv()
                return outcome
        except (EOFError, OSError):
            raise WorkerDiedError(self._how_it_ended()) from None
        self.end()
        error = f"not done after {timeout:g} s (search.trial_timeout); its process was ended"
        seconds = time.perf_counter() - start
        return {"state": "failed", "failure": "timeout", "error": error, "seconds": seconds}

    def _started(self) -> Connection:
        """A pipe to a process that lives."""
        if self._process is not None and self._process.poll() is None and self._pipe is not None:
            return self._pipe
        self.end()
        self._process, self._pipe = started(_CODE, new_session=True)
        return self._pipe

    def end(self) -> None:
        """Kill the process, and those it started (several train one candidate together)."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def _how_it_ended(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self.end()
        if code >= 0:
            return f"the worker process ended with exit code {code}"
        hint = " (often the system's, for want of memory)" if -code == signal.SIGKILL else ""
        return f"the worker process ended by {signal.Signals(-code).name}{hint}"


_supervisor = Supervisor()


def started(code: str, *, new_session: bool) -> tuple[subprocess.Popen[bytes], Connection]:
    """A fresh process that runs some code, in which `{fd}` stands for its end of a pipe to here."""
    ours, theirs = Pipe()
    # Plugins given by name are found where this process finds them.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code.format(fd=theirs.fileno())],
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=new_session,
    )
    theirs.close()
    return process, ours


def requests(pipe: Connection, when_alone: Callable[[], None]) -> Iterator[Any]:
    """What comes through the pipe, one after the other.

    Args:
        when_alone: called when the other end is gone, also while a request is being worked on.
    """
    waiting: list[Any] = []
    arrived = threading.Condition()

    def listen() -> None:
        try:
            while True:
                request = pipe.recv()
                with arrived:
                    waiting.append(request)
                    arrived.notify()
        except (EOFError, OSError):
            when_alone()

    threading.Thread(target=listen, daemon=True).start()
    while True:
        with arrived:
            arrived.wait_for(lambda: bool(waiting))
            request = waiting.pop(0)
        yield request


def serve(fd: int) -> None:
    """What the worker process does: jobs from the pipe, until the other end is closed."""
    pipe = Connection(fd)
    # Also while a job runs: a supervisor that was killed must not leave a trial running behind.
    tasks = requests(pipe, lambda: os.killpg(0, signal.SIGKILL))
    from ucc_search import worker

    for task in tasks:
        worker.prepare(task)
        pipe.send(_READY)
        signal.setitimer(signal.ITIMER_REAL, float(task["timeout"]) + _GRACE)
        outcome = worker.measure(task)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(outcome)
