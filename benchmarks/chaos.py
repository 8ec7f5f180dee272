"""Kill a search at random instants, resume it, and compare it with the same search left in peace.

    python benchmarks/chaos.py --kills 20 --seed 0 --out results/chaos.json

A tiny model on digits, all rungs of a ladder, every process killed by SIGKILL: by turns at random the
command itself, which is then resumed, or the worker process that measures for it. What must hold is
that every trial is there exactly once and, with one worker, that the same was proposed, measured and
promoted as without the kills. Exit code 1 if it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from ucc_search.analysis import pareto_front
from ucc_search.runs import load_run
from ucc_search.store import TrialRow

SPACE: dict[str, Any] = {
    "name": "chaos",
    "model": {
        "name": "small_vit",
        "args": {
            "img_size": 8,
            "stem_channels": [8],
            "stem_strides": [2],
            "embed_dim": 16,
            "depth": 4,
            "num_heads": 2,
            "mlp_ratio": 2.0,
        },
        "checkpoint": "auto",
    },
    "data": {"name": "digits", "select": 0.2, "calibration": 200},
    "budget": {"macs": ["70%", "50%"]},
    "space": {
        "keep_ratio": {"low": 0.2, "high": 1.0},
        "scorer": "class_attention",
        "aggregator": "fuse",
        "distiller": {"name": "logits"},
    },
    "search": {
        "trials": 40,
        "executor": "local",
        "ladder": [
            {"rung": "zero-shot"},
            {"rung": "train", "steps": 10, "keep": 0.5},
            {"rung": "train", "keep": 2, "seeds": [0, 1]},
        ],
        "trial_timeout": 300,
    },
    "train": {"engine": "torch", "steps": 40, "batch_size": 64},
    "teacher": {"engine": "torch", "steps": 300, "batch_size": 64, "optimizer": {"lr": 0.01}},
    "baselines": [{"name": "random"}],
}
LATEST = 0.5  # seconds after a finished trial until which a process is killed
PATIENCE = 600.0  # seconds without a finished trial after which something hangs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the instants and of what is killed")
    parser.add_argument("--out", type=Path, help="JSON file for what was found")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), arguments.kills, arguments.seed)
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    expected = found["once"] and found["same_rows"] and len(found["events"]) == arguments.kills
    sys.exit(0 if expected else 1)


def compare(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """One run in peace and one that is killed; what differs between them."""
    space = folder / "space.yaml"
    space.write_text(yaml.safe_dump(SPACE))
    peaceful = launch(space, folder / "peaceful", resume=False)
    if peaceful.wait() != 0:
        sys.exit("the run without kills failed")
    events = torment(space, folder / "killed", random.Random(seed), kills, count(folder / "peaceful"))
    before, after = (load_run(folder / name).rows for name in ("peaceful", "killed"))
    ids = [r.id for r in after]
    return {
        "command": f"python benchmarks/chaos.py --kills {kills} --seed {seed}",
        "kills": {who: sum(e["killed"] == who for e in events) for who in ("driver", "worker")},
        "events": events,
        "trials": len(before),
        "trials_killed": len(after),
        "failed": sum(r.state == "failed" for r in after),
        "once": len(set(ids)) == len(ids) and sorted(map(work, after)) == sorted(map(work, before)),
        "same_rows": [identity(r) for r in after] == [identity(r) for r in before],
        "same_front": front(after) == front(before),
        "front": front(after),
    }


def launch(space: Path, out: Path, *, resume: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ucc_search", "search", str(space), "--out", str(out)]
    log = open(out.with_suffix(".log"), "ab")  # noqa: SIM115  (the child keeps it)
    return subprocess.Popen(
        command + (["--resume"] if resume else []), stdout=log, stderr=log, start_new_session=True
    )


def torment(space: Path, out: Path, chance: random.Random, kills: int, trials: int) -> list[dict[str, Any]]:
    """Run to the end through so many kills, at instants spread over the run's trials."""
    events: list[dict[str, Any]] = []
    process = launch(space, out, resume=False)
    for wanted in sorted(chance.randrange(trials) for _ in range(kills)):
        who = chance.choice(["driver", "worker"])
        await_rows(process, out, wanted)
        time.sleep(chance.uniform(0, LATEST))
        victims = [process.pid] if who == "driver" else worker_of(process)
        if process.poll() is not None:
            break
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        events.append({"killed": who, "trials": count(out)})
        if who == "driver":
            process.wait()
            # Killed before there was a run: the same command starts it.
            process = launch(space, out, resume=(out / "config.resolved.yaml").exists())
    if process.wait() != 0:
        sys.exit(f"the killed run could not be finished:\n{out.with_suffix('.log').read_text()[-2000:]}")
    return events


def await_rows(process: subprocess.Popen[bytes], out: Path, wanted: int) -> None:
    """Until so many trials are finished, or the process is."""
    since, seen = time.monotonic(), count(out)
    while process.poll() is None and (now := count(out)) < wanted:
        if now > seen:
            since, seen = time.monotonic(), now
        if time.monotonic() - since > PATIENCE:
            sys.exit(f"nothing was finished for {PATIENCE:.0f} s")
        time.sleep(0.02)


def count(out: Path) -> int:
    path = out / "trials.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def worker_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The process that measures for this one, once there is one (Linux)."""
    while process.poll() is None:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                if parent == process.pid and "supervisor" in (stat.parent / "cmdline").read_text():
                    return [int(stat.parent.name)]
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
        time.sleep(0.05)
    return []


def work(row: TrialRow) -> tuple[Any, ...]:
    """What a run must do exactly once."""
    return (
        row.method,
        row.target,
        row.rung,
        row.fidelity,
        row.seed,
        -1 if row.proposal is None else row.proposal,
    )


def identity(row: TrialRow) -> tuple[Any, ...]:
    """All of a row that does not depend on the clock."""
    measured = (row.state, row.kl, row.accuracy, row.test_accuracy, row.loss)
    return (*work(row), row.id, row.parent, row.plan_key, row.params_searched, *measured)


def front(rows: list[TrialRow]) -> list[list[Any]]:
    return [[p.plan_key, p.macs, p.accuracy, p.test_accuracy] for p in pareto_front(rows)]


if __name__ == "__main__":
    main()
