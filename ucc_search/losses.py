"""What a training step minimises: the task loss, and the distiller's terms from a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import AbsTransform, AffineTransform, Distribution, TransformedDistribution

from ucc_search.compression.blocks import CascadeBlocks, learned_blocks, noted_scores
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
        self._pooled = distiller.needs_pooled
        self._prefix, self._present = context.teacher.prefix_tokens, context.student.present
        # In a list, so that it is neither trained, saved nor sharded with the student.
        self._teacher = [teacher.eval().requires_grad_(False)] if teacher is not None else []
        self.distiller = distiller.build(context)
        self._learned = learned_blocks(model)  # a tuple, so that they are not registered twice

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, progress: float) -> dict[str, Tensor]:
        images_BCHW, targets = self._mixed(images_BCHW, labels_B)
        with noted_scores(self._learned) as scores:
            student = self._observe(self.model, images_BCHW, self._student_blocks, self._present)
        terms = dict(self.distiller(student, self._teach(images_BCHW), progress))
        if self._learned:
            extra = self._learned[0].components.scorer.losses(scores)
            terms |= {f"scorer.{name}": value for name, value in extra.items()}
        return {"task": self._task(student.logits_BC, targets), **terms}

    def _teach(self, images_BCHW: Tensor) -> Outputs | None:
        if not self._teacher:
            return None
        teacher = self._teacher[0].to(images_BCHW.device)
        dtype = next(teacher.parameters()).dtype
        with torch.no_grad():
            return self._observe(teacher, images_BCHW.to(dtype), self._teacher_blocks)

    def _observe(
        self,
        model: nn.Module,
        images_BCHW: Tensor,
        wanted: Collection[int],
        present: Sequence[int] | None = None,
    ) -> Outputs:
        """One forward pass, with what the distiller asked for."""
        tokens = record(model, wanted, self._prefix, present)
        with tokens as blocks, record_pooled(model, self._pooled) as pooled:
            logits = model(images_BCHW)
        return Outputs(_one(logits), blocks, pooled[0] if pooled else None)


@contextlib.contextmanager
def record(
    model: nn.Module, wanted: Collection[int], prefix: int, present: Sequence[int] | None = None
) -> Iterator[dict[int, Features]]:
    """The tokens that the wanted blocks put out while the context is open, by block index.

    Args:
        present: indices, in the uncompressed model, of the blocks that the model has; None for all.
            In place of one that is gone stands the last before it.
    """
    found: dict[int, Features] = {}
    if not wanted:
        yield found
        return
    blocks = model.blocks
    indices = range(len(blocks)) if present is None else present
    place = {w: max((p for p, i in enumerate(indices) if i <= w), default=0) for w in wanted}
    states: list[TokenState | None] = [None]

    def keep(here: int) -> object:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, TokenState]) -> None:
            if isinstance(output, tuple):
                tokens, states[0] = output
            else:
                tokens = output
            state = states[0]
            position, compose = (None, None) if state is None else (state.position_BN, state.compose_BNO)
            for index in (w for w, p in place.items() if p == here):
                found[index] = Features(tokens, prefix, position, compose)

        return hook

    last = max(place.values())
    handles = [b.register_forward_hook(keep(p)) for p, b in enumerate(blocks) if p <= last]
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


@contextlib.contextmanager
def record_pooled(model: nn.Module, wanted: bool = True) -> Iterator[list[Tensor]]:
    """What the classifier reads in each forward pass while the context is open; the first, where there are two."""
    found: list[Tensor] = []
    if not wanted:
        yield found
        return
    classifier = model.get_classifier()
    first = classifier[0] if isinstance(classifier, tuple) else classifier
    handle = first.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        handle.remove()


def _one(logits: Tensor | tuple[Tensor, ...]) -> Tensor:
    """DeiT's two heads averaged, as it predicts."""
    return logits if isinstance(logits, Tensor) else torch.stack(tuple(logits)).mean(dim=0)


def _mixing(augment: AugmentConfig, classes: int) -> nn.Module | None:
    from torchvision.transforms import v2

    kinds: list[nn.Module] = []
    if augment.mixup:
        kinds.append(v2.MixUp(alpha=augment.mixup, num_classes=classes))
    if augment.cutmix:
        cutmix = v2.CutMix(alpha=augment.cutmix, num_classes=classes)
        if augment.cutmix_fold:
            cutmix._dist = _folded(cutmix._dist)  # torchvision takes only a symmetric Beta
        kinds.append(cutmix)
    return v2.RandomChoice(kinds) if kinds else None


def _folded(shares: Distribution) -> Distribution:
    """max(s, 1 - s) of a share s from 0 to 1, drawn as 0.5 + |s - 0.5|."""
    steps = [AffineTransform(-0.5, 1.0), AbsTransform(), AffineTransform(0.5, 1.0)]
    return TransformedDistribution(shares, steps)
