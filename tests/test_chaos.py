"""Everything that can go wrong, in real runs. Minutes long: processes start, hang and are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_config, write_space

from ucc_search.analysis import failures_by_class
from ucc_search.runner import search
from ucc_search.store import RunStore
from ucc_search.tables import analysis_json

pytestmark = pytest.mark.slow

CHAOS = Path(__file__).resolve().parent.parent / "benchmarks" / "chaos.py"

FAULTS = """
import os
import signal
from pathlib import Path

import torch

from ucc_search import Distiller, Scorer, hookimpl


class Faulty(Scorer):
    def score(self, view):
        self.fault()
        return view.patches_BND.sum(-1)


class Hangs(Faulty):
    def fault(self):
        while True:
            pass


class Crashes(Faulty):
    def fault(self):
        os.kill(os.getpid(), signal.SIGSEGV)


class KilledOnce(Faulty):
    def fault(self):
        mark = Path(os.environ["CHAOS_MARK"])
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Raises(Faulty):
    def fault(self):
        raise RuntimeError("boom")


class Exits(Faulty):
    def fault(self):
        raise SystemExit(3)


class Greedy(Faulty):
    def fault(self):
        torch.empty(1 << 50)


class NanLoss(Distiller):
    def losses(self, student, teacher, progress):
        return {"bad": student.logits_BC.sum() * float("nan")}


@hookimpl
def ucc_scorers():
    faults = (Hangs, Crashes, KilledOnce, Raises, Exits, Greedy)
    return {kind.__name__.lower(): kind for kind in faults}


@hookimpl
def ucc_distillers():
    return {"nan_loss": NanLoss}
"""

CLASSES = {
    "hangs": "timeout",
    "crashes": "worker_died",
    "killedonce": None,
    "raises": "error",
    "exits": "error",
    "greedy": "out_of_memory",
    "nan": "nan_loss",
}


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_each_fault_is_a_row_of_its_class_and_the_run_goes_on(executor, tmp_path, monkeypatch):
    monkeypatch.setenv("UCC_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CHAOS_MARK", str(tmp_path / "mark"))
    plugin = tmp_path / "faults.py"
    plugin.write_text(FAULTS, encoding="utf-8")
    # The ladder gives the distiller its chance; the scorers fail on the lowest rung already.
    config = tiny_config(
        plugins=[str(plugin)],
        budget={"macs": "50%"},
        search={"trials": 2, "executor": executor, "concurrency": 2, "trial_timeout": 5, "fidelity": "train"},
        baselines=[
            *({"name": name, "scorer": name} for name in CLASSES if name != "nan"),
            {"name": "nan", "distiller": "nan_loss"},
        ],
    )
    run = search(config, out=tmp_path / "run")
    rows = {r.method: r for r in run.rows if r.origin == "baseline"}
    assert {name: r.failure for name, r in rows.items()} == CLASSES
    assert all(r.error and "\n" not in r.error for r in rows.values() if r.state == "failed")
    assert [r.state for r in run.rows if r.origin == "search"] == ["ok", "ok"]
    assert sorted(r.id for r in run.rows) == list(range(len(CLASSES) + 3))
    shown = analysis_json(run)["failures"]
    assert shown == failures_by_class(run.rows)
    assert sum(shown.values()) == len(CLASSES) - 1
    before = run.rows
    assert search(config, out=tmp_path / "run", resume=True).rows == before, "failures are not made again"
    with RunStore.open(run.path).lock():
        again = [sys.executable, "-m", "ucc_search", "search", str(run.path / "config.resolved.yaml")]
        second = subprocess.run(
            [*again, "--out", str(run.path), "--resume"], capture_output=True, text=True, check=False
        )
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert "another ucc-search is writing to this run" in second.stderr


def test_a_run_killed_at_twenty_instants_ends_as_one_left_in_peace(tmp_path):
    found = tmp_path / "chaos.json"
    subprocess.run([sys.executable, str(CHAOS), "--kills", "20", "--out", str(found)], check=True)
    summary = json.loads(found.read_text())["local"]
    assert len(summary["events"]) == 20
    assert min(summary["kills"].values()) > 0
    assert summary["once"] and summary["same_rows"] and summary["same_front"]
    assert summary["failed"] == 0
    assert summary["front"]


@pytest.mark.parametrize("executor", ["local", "ray"])
@pytest.mark.parametrize(
    ("number", "to_all"),
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)],
    ids=["terminated", "interrupted", "Ctrl-C in a terminal"],
)
def test_a_stopped_command_says_how_to_go_on_and_leaves_nothing_running(tmp_path, number, to_all, executor):
    """A terminal sends Ctrl-C to all processes of the command, not to the first alone."""
    settings = {"trials": 200, "promote": 0, "executor": executor, "trial_timeout": 300}
    space = write_space(tmp_path, search=settings)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "ucc_search", "search", str(space), "--out", str(out)]
    environment = {**os.environ, "CHAOS_MARK": str(out)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )
    record = out / "trials.jsonl"
    while process.poll() is None and not (record.exists() and record.read_bytes().count(b"\n") >= 3):
        time.sleep(0.02)
    (os.killpg if to_all else os.kill)(process.pid, number)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 128 + number, told
    assert told == f"stopped; continue with --resume --out {out}\n"
    assert patiently(lambda: not marked(str(out)))
    rows = RunStore.open(out).rows()
    assert len({r.id for r in rows}) == len(rows) >= 3
    assert all(r.state == "ok" for r in rows)
    assert (out / "trials.csv").is_file()


def marked(mark: str) -> list[str]:
    """Command lines of the processes with this mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"CHAOS_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended while we looked, or is somebody else's
    return found


def patiently(holds) -> bool:
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
    return holds()
