"""The contract of distillers, line by line."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ucc_search.config import AugmentConfig
from ucc_search.interfaces import DistillContext, Distiller
from ucc_search.losses import CandidateLoss
from ucc_search.testing.core import Broken, Check
from ucc_search.testing.models import TOKENS_OUT, tiny_compressed, tiny_images, tiny_model, tiny_plan


def _training(distiller: Distiller) -> tuple[CandidateLoss, nn.Module, nn.Module]:
    from ucc_search.builtin import default_components

    teacher = tiny_model()
    student, plan = tiny_compressed(default_components(), teacher, TOKENS_OUT)
    torch.manual_seed(3)
    for parameter in student.parameters():  # as after some training, or there is nothing to distil
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    loss = CandidateLoss(
        student.requires_grad_(True),
        teacher if distiller.needs_teacher else None,
        distiller,
        DistillContext(plan, plan.shape),
        label_smoothing=0.0,
        augment=AugmentConfig(),
    )
    return loss.train(), student, teacher


def _terms(loss: CandidateLoss, progress: float, batch: int = 4) -> dict[str, Tensor]:
    labels = torch.arange(batch) % 3
    return {k: v for k, v in loss(tiny_images(batch), labels, progress).items() if k != "task"}


def losses_are_scalars(distiller: Distiller) -> None:
    loss, _, _ = _training(distiller)
    for progress, batch in itertools.product((0.0, 0.5, 1.0), (1, 4)):
        for name, term in _terms(loss, progress, batch).items():
            if not isinstance(term, Tensor) or term.dim() or not bool(term.isfinite()):
                what = f"shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
                raise Broken(
                    f"losses gave {name}: {what} at progress {progress}, a batch of {batch}",
                    "return finite scalars (take the mean over the batch)",
                    method="losses",
                )


def losses_reach_the_student(distiller: Distiller) -> None:
    loss, student, teacher = _training(distiller)
    terms = _terms(loss, 0.5)
    if not terms:
        return
    total = sum(terms.values())
    if isinstance(total, Tensor) and total.requires_grad:
        total.backward()
    if not any(p.grad is not None and p.grad.any() for p in student.parameters()):
        raise Broken(
            "no term has a gradient for the student",
            "compute them from student.logits_BC or student.blocks, not detached",
            method="losses",
        )
    if any(p.grad is not None for p in teacher.parameters()):
        raise Broken("a term trains the teacher", "leave the teacher's tensors alone", method="losses")


def losses_repeat(distiller: Distiller) -> None:
    first, second = (_values(distiller) for _ in range(2))
    if first != second:
        raise Broken(
            "gave other losses for the same outputs", "draw no random numbers in losses", method="losses"
        )


def _values(distiller: Distiller) -> dict[str, float]:
    torch.manual_seed(0)
    return {k: float(v.detach()) for k, v in _terms(_training(distiller)[0], 0.5).items()}


def losses_in_half_precision(distiller: Distiller) -> None:
    loss, _, _ = _training(distiller)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bad = [k for k, v in _terms(loss, 0.5).items() if not bool(v.isfinite())]
    if bad:
        raise Broken(
            f"{bad[0]} is not finite under bfloat16 autocast", "compute it in .float()", method="losses"
        )


def blocks_exist(distiller: Distiller) -> None:
    plan = tiny_plan(tiny_model())
    for whose, wanted in zip(
        ("student", "teacher"), distiller.blocks(DistillContext(plan, plan.shape)), strict=True
    ):
        if any(not 0 <= b < 3 for b in wanted):
            raise Broken(
                f"asks for the {whose}'s blocks {list(wanted)} of 3",
                "indices from 0 to context.student.shape.depth - 1; raise ValueError for models that cannot be served",
                method="blocks",
            )


DISTILLER_CHECKS = (
    Check("blocks", "the blocks it asks for exist", blocks_exist),
    Check("shape", "losses are finite scalars, for a batch of 1 too", losses_are_scalars),
    Check("gradient", "losses train the student and not the teacher", losses_reach_the_student),
    Check("determinism", "equal outputs give equal losses", losses_repeat),
    Check("dtype", "losses are finite under bfloat16 autocast", losses_in_half_precision),
)
