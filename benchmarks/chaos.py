"""Kill a search at random instants, resume it, and compare it with the same search left in peace.

    python benchmarks/chaos.py --kills 20 --seed 0 --out results/chaos.json
    python benchmarks/chaos.py --kills 10 --seed 0 --executor ray --out results/chaos.json

A tiny model on digits, all rungs of a ladder, one trial at a time. What is killed, always by SIGKILL, is
by turns at random the command itself, which is then resumed, or the process that measures for it (on
Ray also the worker that watches that process). What must hold: every trial is there exactly once, and
the same was proposed, measured and promoted as in peace. Exit code 1 if it does not.
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
from collections import Counter
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
        "concurrency": 1,
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
    parser.add_argument("--executor", choices=("local", "ray"), default="local")
    parser.add_argument(
        "--out", type=Path, help="JSON file for what was found, by executor; others in it stay"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), arguments.kills, arguments.seed, arguments.executor)
    print(json.dumps(found, indent=1))
    if arguments.out:
        known = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
        text = json.dumps({**known, arguments.executor: found}, indent=1)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    expected = found["once"] and found["same_rows"] and len(found["events"]) == arguments.kills
    sys.exit(0 if expected else 1)


def compare(folder: Path, kills: int, seed: int, executor: str) -> dict[str, Any]:
    """One run in peace and one that is killed; what differs between them."""
    space = folder / "space.yaml"
    space.write_text(yaml.safe_dump({**SPACE, "search": {**SPACE["search"], "executor": executor}}))
    peaceful = launch(space, folder / "peaceful", resume=False)
    if peaceful.wait() != 0:
        sys.exit("the run without kills failed")
    events = torment(
        space, folder / "killed", random.Random(seed), kills, count(folder / "peaceful"), executor == "ray"
    )
    before, after = (load_run(folder / name).rows for name in ("peaceful", "killed"))
    ids = [r.id for r in after]
    return {
        "command": f"python benchmarks/chaos.py --kills {kills} --seed {seed} --executor {executor}",
        "kills": dict(Counter(e["killed"] for e in events)),
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
        command + (["--resume"] if resume else []),
        stdout=log,
        stderr=log,
        start_new_session=True,
        env={**os.environ, "CHAOS_MARK": str(out)},
    )


def torment(
    space: Path, out: Path, chance: random.Random, kills: int, trials: int, ray: bool
) -> list[dict[str, Any]]:
    """Run to the end through so many kills, at instants spread over the run's trials."""
    events: list[dict[str, Any]] = []
    process = launch(space, out, resume=False)
    for wanted in sorted(chance.randrange(trials) for _ in range(kills)):
        who = chance.choice(["driver", "worker", "ray worker"] if ray else ["driver", "worker"])
        await_rows(process, out, wanted)
        time.sleep(chance.uniform(0, LATEST))
        victim = process.pid if who == "driver" else worker_of(process, str(out))
        if process.poll() is not None or victim is None:
            break
        if who == "ray worker":
            victim = parent_of(victim)
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


def worker_of(process: subprocess.Popen[bytes], mark: str) -> int | None:
    """The process that measures for the command with this mark, once there is one; None if the command is over."""
    while process.poll() is None:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if b"supervisor" in (folder / "cmdline").read_bytes() and mark.encode() in (
                    (folder / "environ").read_bytes()
                ):
                    return int(folder.name)
            except OSError:
                continue  # it ended while we looked, or is somebody else's
        time.sleep(0.05)
    return None


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


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
