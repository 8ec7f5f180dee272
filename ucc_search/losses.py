"""What a training step minimises: the task loss, and the distiller's terms from a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from ucc_search.compression.blocks import CascadeBlocks
from ucc_search.compression.tokens import TokenState
from ucc_search.config import AugmentConfig
from ucc_search.interfaces import DistillContext, Distiller, Features, Outputs


class TaskLoss(nn.Module):
    """Cross-entropy of a classifier with label smoothing, on images mixed by mixup or CutMix."""

    def __init__(
        self, model: nn.Module, *, classes: int, label_smoothing: float, augment: AugmentConfig
    ) -> None:
        super().__init__()
        self.model = model
        self._smoothing = label_smoothing
        self._mix = _mixing(augment, classes)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, progress: float) -> dict[str, Tensor]:
        images_BCHW, targets = self._mixed(images_BCHW, labels_B)
        return {"task": self._task(self.model(images_BCHW), targets)}

    def _mixed(self, images_BCHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        return (images_BCHW, labels_B) if self._mix is None else self._mix(images_BCHW, labels_B)

    def _task(self, logits: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(_one(logits).float(), targets, label_smoothing=self._smoothing)


class CandidateLoss(TaskLoss):
    """The task loss of a compressed model plus what its distiller adds.

    Args:
        model: the student; the only part that is kept.
        teacher: in eval mode; None where the distiller needs none.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        distiller: Distiller,
        context: DistillContext,
        *,
        label_smoothing: float,
        augment: AugmentConfig,
    ) -> None:
        super().__init__(
            model, classes=context.student.shape.classes, label_smoothing=label_smoothing, augment=augment
        )
        needed = distiller.blocks(context)
        self._student_blocks, self._teacher_blocks = (frozenset(b) for b in needed)
        self._prefix = context.teacher.prefix_tokens
        # In a list, so that it is neither trained, saved nor sharded with the student.
        self._teacher = [teacher.eval().requires_grad_(False)] if teacher is not None else []
        self.distiller = distiller.build(context)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, progress: float) -> dict[str, Tensor]:
        images_BCHW, targets = self._mixed(images_BCHW, labels_B)
        with record(self.model, self._student_blocks, self._prefix) as blocks:
            logits = self.model(images_BCHW)
        student = Outputs(_one(logits), blocks)
        terms = self.distiller(student, self._teach(images_BCHW), progress)
        return {"task": self._task(logits, targets), **terms}

    def _teach(self, images_BCHW: Tensor) -> Outputs | None:
        if not self._teacher:
            return None
        teacher = self._teacher[0].to(images_BCHW.device)
        dtype = next(teacher.parameters()).dtype
        with torch.no_grad(), record(teacher, self._teacher_blocks, self._prefix) as blocks:
            return Outputs(_one(teacher(images_BCHW.to(dtype))), blocks)


@contextlib.contextmanager
def record(model: nn.Module, wanted: Collection[int], prefix: int) -> Iterator[dict[int, Features]]:
    """The tokens that the wanted blocks put out while the context is open, by block index."""
    found: dict[int, Features] = {}
    if not wanted:
        yield found
        return
    states: list[TokenState | None] = [None]

    def keep(index: int) -> object:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, TokenState]) -> None:
            if isinstance(output, tuple):
                tokens, states[0] = output
            else:
                tokens = output
            state = states[0]
            if index in wanted:
                position, compose = (None, None) if state is None else (state.position_BN, state.compose_BNO)
                found[index] = Features(tokens, prefix, position, compose)

        return hook

    blocks = model.blocks
    handles = [b.register_forward_hook(keep(i)) for i, b in enumerate(blocks) if i <= max(wanted)]
    traced = isinstance(blocks, CascadeBlocks)
    if traced:
        blocks.trace = True
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        if traced:
            blocks.trace = False


def _one(logits: Tensor | tuple[Tensor, ...]) -> Tensor:
    """DeiT's two heads averaged, as it predicts."""
    return logits if isinstance(logits, Tensor) else torch.stack(tuple(logits)).mean(dim=0)


def _mixing(augment: AugmentConfig, classes: int) -> nn.Module | None:
    from torchvision.transforms import v2

    kinds: list[nn.Module] = []
    if augment.mixup:
        kinds.append(v2.MixUp(alpha=augment.mixup, num_classes=classes))
    if augment.cutmix:
        kinds.append(v2.CutMix(alpha=augment.cutmix, num_classes=classes))
    return v2.RandomChoice(kinds) if kinds else None
