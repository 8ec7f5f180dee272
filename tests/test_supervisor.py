"""A worker that hangs or dies costs its own trial; whoever watches it goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ucc_search import supervisor

FAKE = """
import os, signal, time
from pathlib import Path

prepared = []


def prepare(task):
    prepared.append(task["job"]["id"])


def measure(task):
    what = task["job"]["what"]
    if what == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        while True:
            pass
    if what == "die" or (what == "die once" and not Path(task["mark"]).exists()):
        Path(task["mark"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        os._exit(7)
    if what == "child":
        os.system(f"sleep 300 & echo $! > {task['mark']}")
        time.sleep(300)
    return {"state": "ok", "pid": os.getpid(), "prepared": list(prepared)}
"""


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """`measure_again` with a worker that needs no torch; what it logged is in `lines`."""
    (tmp_path / "fake_worker.py").write_text(FAKE)
    code = "import sys, ucc_search, fake_worker; sys.modules['ucc_search.worker'] = fake_worker; "
    monkeypatch.setattr(supervisor, "_CODE", code + "ucc_search.worker = fake_worker; " + supervisor._CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    lines: list[str] = []

    def run(what: str, timeout: float = 30.0) -> dict:
        job = {"id": len(lines), "what": what}
        task = {"job": job, "timeout": timeout, "mark": str(tmp_path / "mark")}
        return supervisor.measure_again(task, lines.append)

    run.lines, run.mark = lines, tmp_path / "mark"
    with supervisor.ending():
        yield run


def test_a_worker_that_hangs_is_ended_and_another_takes_its_place(watched):
    first = watched("fine")
    assert watched("fine")["pid"] == first["pid"], "it stays warm"
    hung = watched("hang", timeout=0.3)
    assert (hung["state"], hung["failure"]) == ("failed", "timeout")
    assert "0.3 s (search.trial_timeout)" in hung["error"]
    assert 0.3 <= hung["seconds"] < 30
    after = watched("fine")
    assert after["state"] == "ok"
    assert after["pid"] != first["pid"]
    assert not Path(f"/proc/{first['pid']}").exists()


def test_a_trial_whose_worker_dies_is_measured_again(watched):
    assert watched("die once")["state"] == "ok"
    assert len(watched.lines) == 1
    assert "made again: the worker process ended by SIGKILL" in watched.lines[0]


@pytest.mark.parametrize(("what", "told"), [("die", "SIGKILL"), ("exit", "exit code 7")])
def test_a_trial_that_always_kills_its_worker_fails(watched, what, told):
    outcome = watched(what)
    assert (outcome["state"], outcome["failure"]) == ("failed", "worker_died")
    assert told in outcome["error"]
    assert len(watched.lines) == supervisor.DEATHS - 1


def test_processes_that_a_worker_started_end_with_it(watched):
    assert watched("child", timeout=0.5)["failure"] == "timeout"
    child = int(watched.mark.read_text())
    deadline = time.monotonic() + 10
    while _running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _running(child)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_ends_when_its_supervisor_is_gone(watched):
    """A killed run must not leave a trial behind that writes where the resumed run does."""
    pid = watched("fine")["pid"]
    supervisor._supervisor._pipe.close()
    assert os.waitpid(pid, 0)[1] == 9
