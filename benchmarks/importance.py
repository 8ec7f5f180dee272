"""The second-order importance against exact deletion, on the shipped teacher: rank correlation and time.

Prints a line of JSON: Spearman's rank correlation of each criterion with `kl` over 200 units drawn
with a fixed seed from all kinds but depth (which `fisher` scores exactly), over all units of each
kind, and seconds as a ratio to `kl`'s in the same process.

    python benchmarks/importance.py [--images 300] > results/importance.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr

from ucc_search.builtin.importances import KL, Fisher, Magnitude, Random
from ucc_search.compression import shape_of
from ucc_search.config import load_config
from ucc_search.data import load_data, proxy_batches
from ucc_search.importance import unit_scores
from ucc_search.teachers import load_teacher

SPACE = Path(__file__).resolve().parent.parent / "search_spaces" / "fashion_mnist_upvit.yaml"
KINDS = ("embed", "attention", "mlp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--units", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(SPACE)
    splits = load_data(config.data)
    teacher = load_teacher(config, splits)
    shape, images = shape_of(teacher), proxy_batches(splits, arguments.images)
    groups = [g for g in shape.unit_groups() if g.kind in KINDS]
    criteria = {
        "kl": KL(),
        "fisher": Fisher(),
        "fisher, 1 sample": Fisher(samples=1),
        "magnitude": Magnitude(),
        "random": Random(),
    }
    found, seconds = {}, {}
    for name, criterion in criteria.items():
        start = time.perf_counter()
        scores = unit_scores(teacher, shape, criterion, images, groups=groups)
        seconds[name] = time.perf_counter() - start
        found[name] = {k: torch.cat([s for g, s in scores.items() if g[0] == k]) for k in KINDS}
    every = {name: torch.cat(list(by_kind.values())) for name, by_kind in found.items()}
    generator = torch.Generator().manual_seed(arguments.seed)
    sample = torch.randperm(len(every["kl"]), generator=generator)[: arguments.units]
    report = {
        "teacher": config.model.checkpoint,
        "images": sum(map(len, images)),
        "units": len(every["kl"]),
        "sampled_units": len(sample),
        "seed": arguments.seed,
        "kl_seconds": round(seconds["kl"], 1),
        "criteria": {
            name: {
                "spearman": _spearman(every[name][sample], every["kl"][sample]),
                "spearman_by_kind": {k: _spearman(found[name][k], found["kl"][k]) for k in KINDS},
                "time_over_kl": round(seconds[name] / seconds["kl"], 4),
            }
            for name in criteria
            if name != "kl"
        },
        "torch": torch.__version__,
    }
    print(json.dumps(report))


def _spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    return round(float(spearmanr(one, other).statistic), 4)


if __name__ == "__main__":
    main()
