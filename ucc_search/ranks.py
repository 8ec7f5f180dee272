"""Processes that train one candidate together, on one machine; they stay warm from trial to trial. No torch here."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ucc_search.supervisor import DEATHS, WorkerDiedError, requests, started

_CODE = "from ucc_search.ranks import serve; serve({fd}, RANK, WORLD)"


class RankError(RuntimeError):
    """What went wrong in one of the processes; `failure` is its class in the table of failures."""

    def __init__(self, failure: str, text: str) -> None:
        super().__init__(text)
        self.failure = failure


class Ranks:
    """A group of processes, one per rank, that met at a file: no port can clash."""

    def __init__(self, world: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ucc-search-")
        self.world = world
        # In the session of this process: who ends it from outside ends them too.
        self._members: list[tuple[subprocess.Popen[bytes], Connection]] = [
            started(_CODE.replace("RANK", str(rank)).replace("WORLD", str(world)), new_session=False)
            for rank in range(world)
        ]

    def train(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """One candidate; what rank 0 measured, as the fields of `workbench.Measurement`.

        Raises:
            RankError: a process reported an error. The group is ended, since the others wait for that one for ever.
            WorkerDiedError: a process is gone; the group is ended.
        """
        rendezvous = str(Path(self._folder.name) / "rendezvous")
        answers: dict[int, Any] = {}
        try:
            for _, pipe in self._members:
                pipe.send((dict(task), rendezvous))
            while len(answers) < self.world:
                missing = {p: r for r, (_, p) in enumerate(self._members) if r not in answers}
                for pipe in wait(list(missing)):
                    assert isinstance(pipe, Connection)
                    kind, value = pipe.recv()
                    if kind == "error":
                        raise RankError(*value)
                    answers[missing[pipe]] = value
        except (EOFError, OSError):
            self.end()
            raise WorkerDiedError("one of the processes that train together ended") from None
        except BaseException:
            self.end()
            raise
        measured: dict[str, Any] = answers[0]
        return measured

    def end(self) -> None:
        for process, pipe in self._members:
            process.kill()
            process.wait()
            pipe.close()
        self._members = []
        self._folder.cleanup()

    @property
    def ended(self) -> bool:
        return not self._members or any(process.poll() is not None for process, _ in self._members)


_group: Ranks | None = None


def train_together(task: Mapping[str, Any], world: int) -> dict[str, Any]:
    """`Ranks.train` by this process's own group, which is made again if one of its processes dies."""
    global _group
    for left in reversed(range(DEATHS)):
        if _group is None or _group.ended or _group.world != world:
            if _group is not None:
                _group.end()
            _group = Ranks(world)
        try:
            return _group.train(task)
        except WorkerDiedError as error:
            if not left:
                raise RankError("worker_died", str(error)) from None
    raise AssertionError("the loop returns or raises")


def serve(fd: int, rank: int, world: int) -> None:
    """What the process of one rank does: candidates from the pipe, until the other end is closed."""
    os.environ["LOCAL_RANK"] = str(rank)
    pipe = Connection(fd)
    tasks = requests(pipe, lambda: os._exit(1))
    import torch

    from ucc_search import worker
    from ucc_search.train import Worker

    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    for task, rendezvous in tasks:
        try:
            answer: tuple[str, Any] = ("measured", worker.train_rank(task, Worker(rank, world, rendezvous)))
        except (Exception, SystemExit) as error:
            answer = ("error", (worker.failure_class(error), worker.one_line(error)))
        with contextlib.suppress(OSError):
            pipe.send(answer)
