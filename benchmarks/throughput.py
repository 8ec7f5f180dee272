"""Zero-shot trials per minute of one worker against two, one thread each, in interleaved rounds on one machine.

Prints a line of JSON. A rate is taken from the moment when every worker has finished two trials (the first
loads data and teacher) to the last trial; what that leaves out, Ray's start and the workers' warm-up, is given
as `warm_up_seconds`.

    python benchmarks/throughput.py [--trials 24] [--rounds 3] [--out results/worker-throughput.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from ucc_search.cluster import connected
from ucc_search.config import load_config
from ucc_search.runner import search

SPACE = Path(__file__).resolve().parent.parent / "search_spaces" / "fashion_mnist_ucc.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--space", type=Path, default=SPACE)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with connected(None):
        for _ in range(arguments.rounds):
            for workers, runs in found.items():
                runs.append(one_run(arguments.space, workers, arguments.trials))
    rates = {n: [r["trials_per_minute"] for r in runs] for n, runs in found.items()}
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    line = json.dumps(
        {
            "space": arguments.space.name,
            "trials": arguments.trials,
            "cpus": os.cpu_count(),
            "one_worker": found[1],
            "two_workers": found[2],
            "ratio_per_round": [round(r, 3) for r in ratios],
            "ratio": round(statistics.median(ratios), 3),
        }
    )
    print(line)
    if arguments.out is not None:
        arguments.out.write_text(line + "\n", encoding="utf-8")


def one_run(space: Path, workers: int, trials: int) -> dict[str, float]:
    sets = [f"search.trials={trials}", "search.promote=0", "search.seeds=[0]", "baselines=[]"]
    sets += [f"search.concurrency={workers}", "search.cpus_per_trial=1"]
    moments: list[float] = []

    def log(line: str) -> None:
        if line.startswith("["):
            moments.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = search(load_config(space, sets), out=Path(folder) / "run", log=log)
        rows: list[Any] = [r for r in run.rows if r.origin == "search"]
    assert all(r.state == "ok" for r in rows), [r.error for r in rows if r.error]
    warm = 2 * workers
    span = moments[len(rows) - 1] - moments[warm - 1]
    return {
        "trials_per_minute": round(60 * (len(rows) - warm) / span, 2),
        "compute_seconds_per_trial": round(statistics.mean(r.compute_seconds for r in rows[warm:]), 4),
        "seconds_per_trial": round(statistics.mean(r.seconds for r in rows[warm:]), 4),
        "warm_up_seconds": round(moments[warm - 1] - start, 2),
    }


if __name__ == "__main__":
    main()
