"""Does the wall clock follow the MACs? DeiT-S at 224 px, fp32 on a CPU: UCC, built-in methods and peers.

Dense is timm's model with fused attention. Every method is compressed to the same share of the MACs with the
exact class-token-only last block, and all are timed in interleaved rounds. The peers are the packages under
plugins/, which keep attention fused where their score allows it; their published code is not run.

One call measures one batch size at one budget and adds its rounds to those in the file:

    python benchmarks/speed.py --batch 32 --budget 63 --seconds 200
    python benchmarks/speed.py --table      # writes the table between the marks in results/README.md
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import timm
import torch

from ucc_search.budget import Budget, project
from ucc_search.compression import compress, shape_of
from ucc_search.costs import cost
from ucc_search.interfaces import ComponentRef, Components, ScheduleRequest
from ucc_search.latency.kept import cpu_name
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import Plugins
from ucc_search.timing import Spread, Timings, interleave

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "speed.json"
MODEL = "deit_small_patch16_224"
DEFAULT = "UCC, three stages"
STAGED = {"name": "staged", "gamma": 0}
PUBLISHED = {"name": "staged", "blocks": [3, 6, 9]}  # of EViT and TPS
METHODS: dict[str, tuple[str, str, Any, Any, Any]] = {
    # kind, plugin folder, scorer, aggregator, cascade
    DEFAULT: ("UCC", "", "joint", "host", "staged"),
    "UCC, blocks 3, 6, 9": ("UCC", "", "joint", "host", PUBLISHED),
    "UCC, every block": ("UCC", "", "joint", "host", "per_block"),
    "top-k, three stages": ("built-in", "", "class_attention", "drop", STAGED),
    "fuse, three stages": ("built-in", "", "class_attention", "fuse", STAGED),
    "bipartite, constant": ("built-in", "", "random", "bipartite", "constant"),
    "ToMe": ("peer", "ucc-plugin-tome", "random", "tome", "tome"),
    "EViT": ("peer", "ucc-plugin-evit", "evit", "evit", "evit"),
    "eTPS": ("peer", "ucc-plugin-prune-merge", "class_attention", "tps", {**PUBLISHED, "gamma": 0}),
    "DiffRate": ("peer", "ucc-plugin-prune-merge", "class_attention", "diffrate", "geometric"),
    "Zero-TPrune": (
        "peer",
        "ucc-plugin-zero-tprune",
        "zero_tprune",
        "zero_tprune",
        {**PUBLISHED, "gamma": 0},
    ),
}
MARKS = ("<!-- speed.json: begin -->", "<!-- speed.json: end -->")


def components(name: str) -> Components:
    """The method's components; its plugin is loaded from the repository."""
    _, folder, *parts = METHODS[name]
    sources = [str(ROOT / "plugins" / folder)] if folder else []
    plugins = Plugins.load(sources, entry_points=False, environment=False, strict=True)
    return plugins.components(
        *(ComponentRef.from_dict({"name": p} if isinstance(p, str) else p) for p in parts)
    )


def measure(batch: int, percent: int, seconds: float) -> dict[str, Any]:
    """One batch size at one budget: plans, MACs, and the seconds of every round."""
    torch.manual_seed(0)
    dense = timm.create_model(MODEL).eval()
    shape = shape_of(dense)
    whole = CompressionPlan.identity(shape)
    budget = Budget(f"macs={percent}%", max_macs=cost(whole).macs * percent // 100)
    models: dict[str, torch.nn.Module] = {"dense": dense}
    facts: dict[str, Any] = {"dense": {"kind": "dense", "macs": cost(whole).macs, "sites": 0}}
    for name, (kind, *_) in METHODS.items():
        parts = components(name)
        profile = parts.cascade.profile(ScheduleRequest(shape))
        plan = project(whole.replace(head_tokens_only=True), profile, budget, parts)
        models[name] = compress(dense, plan, parts)
        tokens, sites = list(plan.tokens), len(parts.sites(plan))
        facts[name] = {"kind": kind, "macs": cost(plan, parts).macs, "sites": sites, "tokens": tokens}
    images = torch.randn(batch, 3, *shape.image_size)
    calls = {name: (lambda m=model: m(images)) for name, model in models.items()}
    with torch.inference_mode():
        timings = interleave(calls, rounds=1000, warmup=1, max_seconds=seconds)
    return {
        name: {**fact, "seconds": [round(s, 6) for s in timings.seconds[name]]}
        for name, fact in facts.items()
    }


def added(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """New rounds after the old ones, unless a method or a plan has changed."""
    facts = [
        {n: {k: v for k, v in m.items() if k != "seconds"} for n, m in x.items()} for x in (old or {}, new)
    ]
    if old is None or facts[0] != facts[1]:
        return new
    return {n: {**m, "seconds": old[n]["seconds"] + m["seconds"]} for n, m in new.items()}


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """For every method: speed-up over dense, its share of the MAC ratio, and its time over UCC's."""
    timings = Timings({n: tuple(m["seconds"]) for n, m in found.items()})
    rows = []
    for name, method in found.items():
        speedup, ratio = timings.speedup(name, "dense"), found["dense"]["macs"] / method["macs"]
        rows.append(
            {
                "method": name,
                "kind": method["kind"],
                "gmacs": method["macs"] / 1e9,
                "sites": method["sites"],
                "ms": timings.of(name).median * 1e3,
                "speedup": speedup,
                "mac_ratio": ratio,
                "of_ratio": Spread(*(s / ratio for s in speedup)),
                "over_default": timings.speedup(DEFAULT, name),
            }
        )
    return rows


def table(results: dict[str, Any]) -> str:
    """Markdown, one table for each batch size and budget."""
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, fp32, torch {machine['torch']}, timm {machine['timm']}."
    ]
    for key, found in results["measured"].items():
        batch, percent = key.split("@")
        rounds = len(found["dense"]["seconds"])
        lines += [
            "",
            f"Batch {batch}, {percent} of the MACs, {rounds} rounds (median and quartiles of ratios within rounds):",
            "",
            "| method | kind | GMACs | sites | ms | speed-up | of the MAC ratio | time over that of UCC, three stages |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in summary(found):
            speed, share, over = (_spread(r[k]) for k in ("speedup", "of_ratio", "over_default"))
            lines.append(
                f"| {r['method']} | {r['kind']} | {r['gmacs']:.2f} | {r['sites']} | {r['ms']:.0f} | {speed} | {share} | {over} |"
            )
    return "\n".join(lines)


def _spread(value: Spread) -> str:
    return f"{value.median:.3f} ({value.low:.3f} to {value.high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--budget", type=int, default=63, help="percent of the MACs")
    parser.add_argument("--seconds", type=float, default=200.0, help="start no further round after this long")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only write the table into results/README.md")
    arguments = parser.parse_args()
    results = json.loads(OUT.read_text()) if OUT.exists() else {"measured": {}}
    if arguments.table:
        readme = OUT.parent / "README.md"
        before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
        text = f"{before}{MARKS[0]}\n{table(results)}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"
        readme.write_text(text, encoding="utf-8")
        return
    torch.set_num_threads(arguments.threads)
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": arguments.threads}
    results["machine"] = {**machine, "torch": torch.__version__, "timm": timm.__version__}
    key = f"{arguments.batch}@{arguments.budget}%"
    found = added(results["measured"].get(key), measure(arguments.batch, arguments.budget, arguments.seconds))
    results["measured"][key] = found
    OUT.write_text(json.dumps(results, indent=1) + "\n")
    for row in summary(found):
        share = row["of_ratio"].median
        print(
            f"{row['method']:22} {row['sites']:3} {row['ms']:8.1f} ms  {row['speedup'].median:.3f}  {share:.3f}"
        )


if __name__ == "__main__":
    main()
