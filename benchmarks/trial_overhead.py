"""What a zero-shot trial costs beyond its own forward passes: 40 trials in one run, warm workers.

Prints a line of JSON. Overhead is worker time per trial (wall time of the run's trial phase times
the number of workers, over the trials) minus the forward passes that the trials report themselves;
Ray's start-up and the first trial of each worker, which loads data and teacher, are left out.

    python benchmarks/trial_overhead.py [--trials 40]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from ucc_search.config import load_config
from ucc_search.runner import search

SPACE = Path(__file__).resolve().parent.parent / "search_spaces" / "digits_ucc.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--space", type=Path, default=SPACE)
    arguments = parser.parse_args()
    sets = [f"search.trials={arguments.trials + 4}", "search.promote=0", "baselines=[]"]
    moments: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = search(
            load_config(arguments.space, sets),
            out=Path(folder) / "run",
            log=lambda line: moments.append(time.perf_counter()) if line.startswith("[") else None,
        )
        rows = [r for r in run.rows if r.origin == "search"]
    # The first trials of each worker load data and teacher.
    warm, workers = rows[4:], 2
    span = moments[len(rows) - 1] - moments[3]
    wall = span / len(warm)
    compute = sum(r.compute_seconds for r in warm) / len(warm)
    print(
        json.dumps(
            {
                "trials": len(warm),
                "wall_seconds_per_trial": round(wall, 4),
                "forward_seconds_per_trial": round(compute, 4),
                "overhead_seconds_per_trial": round(max(0.0, wall - compute / workers), 4),
                "overhead_worker_seconds_per_trial": round(wall * workers - compute, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
