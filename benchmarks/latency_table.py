"""Is a latency that the table predicts the latency of the finished model?

For one space file, batch size and thread count: measures the table, projects known good points, random ones and the
baselines onto latencies (onto the file's own budgets where no latency below the dense one is in reach), builds the models (random weights, on which speed does not depend), and times them beside the
uncompressed one in interleaved rounds. Both numbers are shares of the uncompressed model's time. Adds one entry to the
file, in place of one of the same settings:

    python benchmarks/latency_table.py search_spaces/digits_ucc.yaml --batch 32
    python benchmarks/latency_table.py --table      # writes the table between the marks in results/README.md
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ucc_search.budget import LATENCY
from ucc_search.compression import assemble, shape_of
from ucc_search.compression.selection import first_units
from ucc_search.config import RunConfig, load_config
from ucc_search.costs import cost
from ucc_search.errors import BudgetError
from ucc_search.interfaces import INFERENCE_KINDS
from ucc_search.latency import Conditions
from ucc_search.latency.kept import cpu_name
from ucc_search.latency.layout import layout
from ucc_search.latency.measure import measure_table
from ucc_search.models import build_model
from ucc_search.plan import CompressionPlan, ModelShape
from ucc_search.plugins import Plugins
from ucc_search.schedule import Scheduler, candidate_of
from ucc_search.shapes import model_shape
from ucc_search.space import Candidate, SearchSpace
from ucc_search.timing import interleave

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "latency-table.json"
MARKS = ("<!-- latency-table.json: begin -->", "<!-- latency-table.json: end -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("space", nargs="?")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plans", type=int, default=12, help="models to time, at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing finished models")
    parser.add_argument("--calibrate", type=float, default=40.0, help="seconds of timing parts")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        write_table()
        return
    entry = compare(arguments)
    known = json.loads(OUT.read_text()) if OUT.is_file() else []
    same = ("space", "batch", "threads")
    known = [e for e in known if any(e[k] != entry[k] for k in same)]
    OUT.write_text(json.dumps([*known, entry], indent=1) + "\n")
    print(json.dumps({k: v for k, v in entry.items() if k != "models"}))


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured shares of the dense time, of every model."""
    path = Path(arguments.space)
    config = load_config(path, ["model.pretrained=false"])
    plugins, shape = Plugins.load(config.plugins), shape_for(config)
    conditions = Conditions(arguments.batch, arguments.threads, "fp32", "cpu", cpu_name(), torch.__version__)
    wanted, started = layout(config, shape, plugins), time.perf_counter()
    table = measure_table(config.model, shape, wanted, conditions, plugins, seconds=arguments.calibrate)
    took = time.perf_counter() - started
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dense = build_model(config.model, classes=shape.classes, channels=shape.channels).eval()
    budget = config.budget.model_copy(
        update={"macs": None, "flops": None, "params": None, LATENCY: ("90%", "75%", "60%")}
    )
    by_macs = Scheduler(config, shape, plugins)
    scheduler = Scheduler(config.model_copy(update={"budget": budget}), shape, plugins, latency=table)
    assert scheduler.latency is not None
    rows, calls = [], {}
    images = torch.randn(arguments.batch, shape.channels, *shape.image_size)
    price = cost(scheduler.largest(next(points(config, shape, plugins)))).macs
    for candidate in points(config, shape, plugins):
        parts = plugins.components(*(candidate.components[k] for k in INFERENCE_KINDS))
        if parts.cascade.needs_model or len(rows) == arguments.plans:
            continue
        plan = tightest(scheduler, candidate, len(rows)) or tightest(by_macs, candidate, len(rows))
        if plan is None:
            continue
        model = assemble(dense, plan, parts, first_units(plan)).eval()
        calls[str(len(rows))] = functools.partial(model, images)
        rows.append(
            {
                "components": " ".join(candidate.components[k].name for k in INFERENCE_KINDS),
                "macs_share": round(cost(plan, parts).macs / price, 4),
                "predicted": scheduler.latency.value(plan, parts) / table.dense_ms,
                "tokens": list(plan.tokens),
                "embed_dims": list(plan.embed_dims),
            }
        )
    calls["dense"] = functools.partial(dense, images)
    with torch.inference_mode():
        times = interleave(calls, rounds=25, warmup=1, min_seconds=0.02, max_seconds=arguments.seconds)
    for number, row in enumerate(rows):
        share = 1 / times.speedup(str(number), "dense").median
        row |= {"predicted": round(row["predicted"], 4), "measured": round(share, 4)}
        row["error"] = round(row["predicted"] / share - 1, 4)
    errors = [abs(row["error"]) for row in rows]
    return {
        "space": path.name,
        "model": shape.name,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "hardware": cpu_name(),
        "torch": torch.__version__,
        "points": sum(math.prod(len(a) for a in axes if a) for axes in wanted.parts.values()),
        "calibration_seconds": round(took, 1),
        "dense_ms": {"table": round(table.dense_ms, 3), "later": round(1e3 * times.of("dense").median, 3)},
        "rounds": times.rounds,
        "median_error": round(statistics.median(errors), 4),
        "largest_error": round(max(errors), 4),
        "models": rows,
    }


def shape_for(config: RunConfig) -> ModelShape:
    """The model's shape, without its data set where that is a folder of images that is not here."""
    if not config.data.name.startswith("folder:"):
        return model_shape(config)
    with torch.device("meta"):
        model = build_model(config.model, classes=1000, channels=3)
    return shape_of(model, config.model.name)


def points(config: RunConfig, shape: ModelShape, plugins: Plugins) -> Iterator[Candidate]:
    """Known good ones, each baseline, and random ones, in turn."""
    space, rng = SearchSpace.of(config.space, shape, plugins), random.Random(0)
    start = {d.name: d.choices[0] if d.choices is not None else d.low for d in space.dimensions}
    good = [space.decode({**start, **point}) for point in space.known_good()]
    fixed = [candidate_of(b) for b in config.baselines]
    for number in range(100):
        yield from good[number : number + 1]
        yield from fixed[number : number + 1]
        yield space.decode(
            {
                d.name: rng.choice(d.choices) if d.choices is not None else rng.uniform(d.low, d.high)
                for d in space.dimensions
            }
        )


def tightest(scheduler: Scheduler, candidate: Candidate, number: int) -> CompressionPlan | None:
    """The plan at one of the budgets, in turn, or at one before it; None where all are out of reach."""
    budgets = scheduler.budgets
    for budget in reversed(budgets[: number % len(budgets) + 1]):
        try:
            plan = scheduler.plan(candidate, budget)
        except BudgetError:
            continue
        return plan if plan != scheduler.largest(candidate) else None
    return None


def write_table() -> None:
    """The entries as a table between the marks in results/README.md."""
    lines = [
        "| space file | batch | threads | timings | calibration, s | models | median error | largest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for e in sorted(json.loads(OUT.read_text()), key=lambda e: (e["space"], e["batch"], e["threads"])):
        lines.append(
            f"| `{e['space']}` | {e['batch']} | {e['threads']} | {e['points']} | {e['calibration_seconds']:.0f} "
            f"| {len(e['models'])} | {100 * e['median_error']:.1f} % | {100 * e['largest_error']:.1f} % |"
        )
    path = ROOT / "results" / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    path.write_text(before + "\n".join([MARKS[0], "", *lines, "", MARKS[1]]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
