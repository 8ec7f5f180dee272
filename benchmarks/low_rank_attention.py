"""Attention at low rank without fine-tuning: by head, whitened, and by matrix, at equal parameters.

Prints a line of JSON: test accuracy of the shipped Fashion-MNIST teacher, and the KL of its own predictions to
what is left of them, with at least 20, 40, 60 and 80 % fewer parameters in the attention of every block:
products of each head factorised (COMCAT, arXiv:2305.17235, section 3.2), the same for what layers read on 1000
training images, and queries, keys, values and output projection each truncated by SVD.

    python benchmarks/low_rank_attention.py > results/low-rank-attention.json
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ucc_search.builtin.distillers import logit_kl
from ucc_search.compression import ProxyInputs, compress, shape_of
from ucc_search.config import load_config
from ucc_search.data import load_data, ordered_batches, proxy_batches
from ucc_search.plan import CompressionPlan
from ucc_search.teachers import load_teacher

SPACE = Path(__file__).resolve().parent.parent / "search_spaces" / "fashion_mnist_comcat.yaml"
Tested = Sequence[tuple[Tensor, Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fewer", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(SPACE)
    splits = load_data(config.data)
    teacher = load_teacher(config, splits).eval()
    inputs = ProxyInputs(proxy_batches(splits, config.data.proxy))
    shape = shape_of(teacher)
    plan, full = CompressionPlan.identity(shape), shape.blocks[0]
    with torch.inference_mode():
        tested = [(x, y, teacher(x)) for x, y in ordered_batches(splits.test, 500)]
    rows = []
    for fewer in arguments.fewer:
        # A pair of a head has 2 D r numbers, one for its logits and one for its values; a matrix in two parts
        # has 2 D R, four times. So the ranks of both pairs together are R, where H heads of D / H make D.
        both = int((1 - fewer) * 2 * full.qk_dim)  # never more than the share that was asked for
        ranks = plan.replace(low_rank_attention=True, qk_dim=(both + 1) // 2, v_dim=both // 2)
        models = {
            "head_level": compress(teacher, ranks),
            "head_level_whitened": compress(teacher, ranks, inputs=inputs),
            "matrix_level": matrix_level(teacher, full.heads * both // 4),
        }
        rows.append(
            {
                "fewer_attention_weights": round(1 - both / (2 * full.qk_dim), 4),
                "ranks_per_head": [(both + 1) // 2, both // 2],
                "rank_per_matrix": full.heads * both // 4,
                **{name: measured(model, tested) for name, model in models.items()},
            }
        )
    report = {
        "teacher": config.model.checkpoint,
        "dense": measured(teacher, tested),
        "rows": rows,
        "torch": torch.__version__,
    }
    print(json.dumps(report))


def measured(model: nn.Module, tested: Tested) -> dict[str, float]:
    """Test accuracy, and the KL to the teacher's predictions in nats."""
    right = seen = 0
    kl = 0.0
    with torch.inference_mode():
        for images, labels, teacher in tested:
            logits = model.eval()(images)
            right += int((logits.argmax(1) == labels).sum())
            kl += float(logit_kl(logits, teacher)) * len(labels)
            seen += len(labels)
    return {"test_accuracy": right / seen, "kl": round(kl / seen, 6)}


def matrix_level(model: nn.Module, rank: int) -> nn.Module:
    """The model with each attention matrix replaced by its best approximation of this rank; biases stay."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in model.blocks:
            for weight in (*block.attn.qkv.weight.chunk(3), block.attn.proj.weight):
                left, singular, right = torch.linalg.svd(weight.double(), full_matrices=False)
                weight.copy_((left[:, :rank] * singular[:rank]) @ right[:rank])
    return model


if __name__ == "__main__":
    main()
