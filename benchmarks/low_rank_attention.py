"""Attention at low rank without fine-tuning: products of each head against single matrices, equal parameters.

Prints a line of JSON: test accuracy of the shipped Fashion-MNIST teacher with 20, 40, 60 and 80 % fewer
parameters in the attention of every block, factorised by head (COMCAT, arXiv:2305.17235, section 3.2)
and by matrix: queries, keys, values and output projection each truncated by SVD.

    python benchmarks/low_rank_attention.py > results/low-rank-attention.json
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import nn

from ucc_search.compression import compress, shape_of
from ucc_search.config import load_config
from ucc_search.data import load_data
from ucc_search.plan import CompressionPlan
from ucc_search.teachers import accuracy, load_teacher

SPACE = Path(__file__).resolve().parent.parent / "search_spaces" / "fashion_mnist_upvit.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fewer", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(SPACE)
    splits = load_data(config.data)
    teacher = load_teacher(config, splits)
    shape = shape_of(teacher)
    plan, full = CompressionPlan.identity(shape), shape.blocks[0]
    rows = []
    for fewer in arguments.fewer:
        rank = int((1 - fewer) * full.qk_dim)  # never more than the share that was asked for
        by_head = compress(teacher, plan.replace(low_rank_attention=True, qk_dim=rank, v_dim=rank))
        # A pair of a head has 2 D r numbers, twice; a matrix in two parts 2 D R, four times.
        by_matrix = matrix_level(teacher, full.heads * rank // 2)
        rows.append(
            {
                "fewer_attention_weights": round(1 - rank / full.qk_dim, 4),
                "rank_per_head": rank,
                "rank_per_matrix": full.heads * rank // 2,
                "test_accuracy_head_level": accuracy(by_head, splits.test),
                "test_accuracy_matrix_level": accuracy(by_matrix, splits.test),
            }
        )
    report = {
        "teacher": config.model.checkpoint,
        "test_accuracy": accuracy(teacher, splits.test),
        "rows": rows,
        "torch": torch.__version__,
    }
    print(json.dumps(report))


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
