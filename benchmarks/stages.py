"""Where three stages should be: zero-shot KL of UCC with every choice of three blocks, at equal MACs.

One call measures one teacher and puts it beside the others: the shipped one of six blocks, or one of another depth,
or of embedded patches, that is trained first, as the space file's `teacher` says, for fewer epochs:

    python benchmarks/stages.py
    python benchmarks/stages.py --depth 12 --epochs 4
    python benchmarks/stages.py --depth 12 --epochs 3 --patches
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from ucc_search.config import Baseline, load_config
from ucc_search.errors import BudgetError
from ucc_search.interfaces import INFERENCE_KINDS
from ucc_search.plugins import Plugins
from ucc_search.schedule import Scheduler, candidate_of
from ucc_search.workbench import Workbench

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "stages.json"
SPACE = ROOT / "search_spaces" / "fashion_mnist_ucc.yaml"
SHIPPED = 6
PARTS = {"scorer": "joint", "aggregator": "host"}


def measure(depth: int, patches: bool, epochs: int, images: int, budgets: tuple[int, ...]) -> dict[str, Any]:
    """KL with one ratio for all blocks and with every choice of three blocks, at every budget (percent)."""
    sets = [f"data.calibration={images}", f"budget={{macs: [{', '.join(f'{b}%' for b in budgets)}]}}"]
    if patches:  # timm's own embedding of patches in place of the shipped teacher's convolutions
        shape = f"img_size: 28, patch_size: 4, embed_dim: 64, depth: {depth}, num_heads: 4, mlp_ratio: 2.0"
        sets += [f"model={{name: vit_tiny_patch16_224, args: {{{shape}}}, checkpoint: auto}}"]
        sets += [f"teacher.epochs={epochs}"]
    elif depth != SHIPPED:
        sets += [f"model.args.depth={depth}", "model.checkpoint=auto", f"teacher.epochs={epochs}"]
    config, plugins = load_config(SPACE, sets), Plugins.load(environment=False)
    bench = Workbench(config, plugins, log=print)
    scheduler = Scheduler(config, bench.shape, plugins, None, bench.depth_order)

    def kl(cascade: Any, budget: Any) -> float:
        candidate = candidate_of(Baseline(name="x", cascade=cascade, **PARTS))
        parts = plugins.components(*(candidate.components[k] for k in INFERENCE_KINDS))
        model = bench.compressed(scheduler.plan(candidate, budget), parts, candidate.components["importance"])
        return round(bench.zero_shot(model).kl, 6)

    triples = list(itertools.combinations(range(depth), 3))
    found: dict[str, Any] = {"depth": depth, "images": images, "budgets": {}}
    for percent, budget in zip(budgets, scheduler.budgets, strict=True):
        everywhere = kl({"name": "geometric", "first_block": 0}, budget)
        every = {}
        for blocks in triples:
            try:
                every[",".join(map(str, blocks))] = kl({"name": "staged", "blocks": list(blocks)}, budget)
            except BudgetError as error:  # late blocks alone cannot meet a small budget
                print(blocks, error)
        found["budgets"][f"{percent}%"] = {"every block": everywhere, "three blocks": every}
        best = min(every, key=lambda blocks: every[blocks])
        print(depth, percent, f"every block {everywhere}, best {best} {every[best]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=SHIPPED)
    parser.add_argument("--patches", action="store_true", help="embed patches of 4 x 4, without convolutions")
    parser.add_argument("--epochs", type=int, default=4, help="of the teacher, where it is not shipped")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--budgets", type=int, nargs="+", default=[63, 46], help="percent of the MACs")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    results = json.loads(OUT.read_text()) if OUT.exists() else {}
    key = f"{arguments.depth} blocks after {'patches' if arguments.patches else 'convolutions'}"
    results[key] = measure(
        arguments.depth, arguments.patches, arguments.epochs, arguments.images, tuple(arguments.budgets)
    )
    OUT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
