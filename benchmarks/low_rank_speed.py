"""How much faster factorised models run than dense ones, beside their share of the MACs.

Prints a line of JSON: for timm models with random weights at low ranks, the speed over the dense model (median and
quartiles of the ratios within interleaved rounds), the ratio of the MACs and of the parameters, per batch size. The
row `uneven` has values four times as wide as keys; `uneven_unfused` is the same model without the padding that
keeps it on torch's fused attention kernel. `in_products` is the share of the dense model's time in what MACs count:
the rest (softmax inside attention aside) no rank can make faster.

    python benchmarks/low_rank_speed.py > results/low-rank-speed.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ucc_search.compression import attention, compress, shape_of
from ucc_search.costs import cost
from ucc_search.plan import CompressionPlan
from ucc_search.timing import interleave

_COUNTED = ("addmm", "aten::mm", "bmm", "scaled_dot_product", "convolution")


def plans(plan: CompressionPlan) -> dict[str, CompressionPlan]:
    """Low ranks of attention, of MLPs, and of both, as shares of the full ones."""
    full, dim = plan.shape.blocks[0], plan.embed_dim
    even = dim * full.mlp_hidden // (dim + full.mlp_hidden)  # two thin matrices cost what the dense one does

    def low(attend: float, mlp: float) -> CompressionPlan:
        rank = int(full.qk_dim * attend)
        attending = {"low_rank_attention": True, "qk_dim": rank, "v_dim": rank} if attend < 1 else {}
        return plan.replace(**attending, mlp_rank=int(even * mlp) // 8 * 8 if mlp < 1 else None)

    return {
        "attention_half": low(0.5, 1),
        "mlp_half": low(1, 0.5),
        "both_half": low(0.5, 0.5),
        "both_quarter": low(0.25, 0.25),
        "uneven": plan.replace(low_rank_attention=True, qk_dim=full.qk_dim // 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["deit_small_patch16_224"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=90.0, help="start no further round after this long")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = [
        row
        for name in arguments.model
        for row in compare(name, arguments.batch, arguments.rounds, arguments.seconds)
    ]
    print(json.dumps({"threads": arguments.threads, "torch": torch.__version__, "rows": rows}))


def compare(name: str, batches: list[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One row per batch size and plan of one model."""
    model = timm.create_model(name).eval()
    dense = CompressionPlan.identity(shape_of(model, name))
    chosen = plans(dense)
    models = {"dense": model, **{k: compress(model, p).eval() for k, p in chosen.items()}}
    chosen["uneven_unfused"] = chosen["uneven"]
    price, rows = cost(dense), []
    for batch in batches:
        images = torch.randn(batch, 3, *dense.shape.image_size)
        with torch.inference_mode():
            calls = {k: run(m, images) for k, m in models.items()}
            calls["uneven_unfused"] = unfused(calls["uneven"])
            times = interleave(calls, rounds=rounds, warmup=1, max_seconds=seconds)
            share = in_products(calls["dense"])
        for k, plan in chosen.items():
            speed, own = times.speedup(k, "dense"), cost(plan)
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "plan": k,
                    "macs_over": round(price.macs / own.macs, 3),
                    "params_over": round(price.params / own.params, 3),
                    "speed_over_dense": [round(v, 3) for v in (speed.median, speed.low, speed.high)],
                    "images_per_second": round(batch / times.of(k).median, 2),
                    "dense_images_per_second": round(batch / times.of("dense").median, 2),
                    "dense_in_products": round(share, 3),
                    "rounds": times.rounds,
                }
            )
    return rows


def run(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    return lambda: model(images)


def unfused(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call with torch's attention as it would be without `fused_attention`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=how["scale"])

    def patched() -> Tensor:
        with mock.patch.object(attention, "fused_attention", attend):
            return call()

    return patched


def in_products(call: Callable[[], Tensor]) -> float:
    """The share of time in convolutions, matrix products and attention."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    events = profiler.key_averages()
    counted = sum(e.self_cpu_time_total for e in events if any(c in e.key for c in _COUNTED))
    return counted / sum(e.self_cpu_time_total for e in events)


if __name__ == "__main__":
    main()
