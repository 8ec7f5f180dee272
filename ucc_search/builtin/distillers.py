"""Distillers: UCC's two levels, plain logit or feature distillation, and none.

torch is imported inside the functions that need it, so that listing plugins starts without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ucc_search.interfaces import DistillContext, Distiller, Features, Outputs

if TYPE_CHECKING:
    from torch import Tensor, nn


class NoDistillation(Distiller):
    """The task loss alone."""

    needs_teacher: ClassVar[bool] = False

    def losses(self, student: Outputs, teacher: Outputs | None, progress: float) -> Mapping[str, Tensor]:
        return {}


class Logits(Distiller):
    """The teacher's class probabilities as targets: weight * tau^2 * KL(teacher || student).

    Args:
        weight: factor on the loss.
        tau: temperature of both softmaxes.

    Reference: Hinton et al. 2015, arXiv:1503.02531.
    """

    ranges: ClassVar = {"weight": {"low": 0.1, "high": 10.0, "log": True}}

    def __init__(self, weight: float = 0.5, tau: float = 1.0) -> None:
        _check_weights(weight=weight)
        _check_temperature(tau)
        self.weight, self.tau = weight, tau

    def losses(self, student: Outputs, teacher: Outputs | None, progress: float) -> Mapping[str, Tensor]:
        assert teacher is not None
        return {"logits": self.weight * logit_kl(student.logits_BC, teacher.logits_BC, self.tau)}


class PooledFeatures(Distiller):
    """The teacher's penultimate feature as target: weight * mean((A(student) - teacher)^2).

    The mean is over images and channels. A is the identity where student and teacher are equally wide,
    else a linear map that is learned.

    Args:
        weight: factor on the loss.

    Reference: UP-ViT (Yu and Wu, arXiv:2111.15127) trains PVTv2 by it; the linear map is reconstructed.
    """

    needs_pooled: ClassVar[bool] = True
    ranges: ClassVar = {"weight": {"low": 1.0, "high": 100.0, "log": True}}

    def __init__(self, weight: float = 20.0) -> None:
        _check_weights(weight=weight)
        self.weight = weight

    def build(self, context: DistillContext) -> nn.Module:
        return _pooled_loss(self.weight, context.student.embed_dim, context.teacher.embed_dim)


class TwoLevel(Distiller):
    """UCC's two-level distillation: imitation of shallow tokens and logits, exploration of deep ones.

    Imitation: sum over the shallow blocks of alpha / B * ||phi(F_s) - T F_t||^2, where T mixes the
    teacher's tokens as the student's tokens were mixed. Exploration: the student's last tokens go
    back to their places on the grid, further ones are hidden until a share eta is empty, a learned
    vector fills the gaps, and a small convolutional generator must restore the teacher's tokens
    there: beta / (eta B) * ||M (G(...) - F_t)||^2. Both squares are summed, not averaged, over
    tokens and channels, so their weights scale inversely with the size of the model.

    Args:
        logits: weight of the logit distillation; `tau` is its temperature.
        imitation: alpha.
        exploration: beta.
        mask_ratio: eta, the share of grid sites that is at least hidden.
        schedule: `parallel` sums all terms throughout; `sequential` imitates until `switch` of the
            training has passed, then explores.
        shallow: indices of the blocks to imitate.

    Reference: UCC (Neurocomputing 2024) names the two levels; their form is reconstructed from ViTKD
    (arXiv:2209.02432: mimicking and generation) and DearKD (arXiv:2204.12997: two stages).
    """

    ranges: ClassVar = {
        "logits": {"low": 0.1, "high": 10.0, "log": True},
        "imitation": {"low": 1e-6, "high": 1e-2, "log": True},
        "exploration": {"low": 1e-7, "high": 1e-3, "log": True},
    }

    def __init__(
        self,
        logits: float = 0.5,
        tau: float = 1.0,
        imitation: float = 3e-5,
        exploration: float = 3e-6,
        mask_ratio: float = 0.5,
        schedule: str = "parallel",
        switch: float = 0.5,
        shallow: Sequence[int] = (0, 1),
    ) -> None:
        _check_weights(logits=logits, imitation=imitation, exploration=exploration)
        _check_temperature(tau)
        if not 0.0 < mask_ratio <= 1.0:
            raise ValueError(f"mask_ratio is {mask_ratio}, expected 0 < mask_ratio <= 1")
        if schedule not in ("parallel", "sequential"):
            raise ValueError(f"schedule is {schedule!r}, expected parallel or sequential")
        if not 0.0 <= switch <= 1.0:
            raise ValueError(f"switch is {switch}, expected 0 to 1 (a share of the training)")
        if any(i < 0 for i in shallow):
            raise ValueError(f"shallow is {list(shallow)}, expected indices of blocks, 0 or more")
        self.logits, self.tau = logits, tau
        self.imitation, self.exploration, self.mask_ratio = imitation, exploration, mask_ratio
        self.schedule, self.switch, self.shallow = schedule, switch, tuple(shallow)

    def stages(self, progress: float) -> tuple[bool, bool]:
        """Whether imitation and exploration are on at this share of the training."""
        if self.schedule == "parallel":
            return True, True
        return progress < self.switch, progress >= self.switch

    def blocks(self, context: DistillContext) -> tuple[Sequence[int], Sequence[int]]:
        if context.teacher.stages:
            raise ValueError(
                f"two_level compares tokens on one grid, and {context.teacher.name} has several; use the distiller "
                "logits or features"
            )
        shallow = self._shallow(context)
        return (*shallow, self._deep(context)), (*shallow, context.teacher.depth - 1)

    def _shallow(self, context: DistillContext) -> tuple[int, ...]:
        return tuple(i for i in self.shallow if i < self._deep(context))

    def _deep(self, context: DistillContext) -> int:
        """The student's last block that still has patch tokens."""
        head_block, present = context.student.head_block, context.student.present
        return max((i for i in present if head_block is None or i < head_block), default=0)

    def build(self, context: DistillContext) -> nn.Module:
        return _two_level_losses(self, context, self._shallow(context), self._deep(context))


class HardAlign(Distiller):
    """COMCAT's fine-tuning: the teacher's decision as a label, and its block outputs aligned at first.

    weight * CE(student, argmax teacher) + align * max(cos(pi/2 progress), floor) * sum over blocks of
    MSE(block outputs). Where tokens were cut or merged, the teacher's are mixed as the student's were.
    The defaults are COMCAT's weights doubled, since the task loss has weight one here and a half there:
    a half for the hard labels, and for the alignment a half that falls to 0.01.

    Args:
        weight: of the hard labels, beside a task loss of weight 1.
        align: of the alignment at the start.
        floor: share of it that is left at the end.
        aligned: indices of the blocks, negative ones from the end.

    Reference: Xiao et al. 2023, COMCAT, arXiv:2305.17235, section 4; hard distillation without a token of
    its own is DeiT's (arXiv:2012.12877, section 4).
    """

    ranges: ClassVar = {
        "weight": {"low": 0.1, "high": 10.0, "log": True},
        "align": {"low": 0.01, "high": 5.0, "log": True},
    }

    def __init__(
        self,
        weight: float = 1.0,
        align: float = 1.0,
        floor: float = 0.02,
        aligned: Sequence[int] = (0, 1, -2, -1),
    ) -> None:
        _check_weights(weight=weight, align=align, floor=floor)
        self.weight, self.align, self.floor, self.aligned = weight, align, floor, tuple(aligned)

    def blocks(self, context: DistillContext) -> tuple[Sequence[int], Sequence[int]]:
        if context.teacher.stages:
            raise ValueError(
                f"hard_align compares tokens on one grid, and {context.teacher.name} has several; use the distiller "
                "logits or features"
            )
        depth = context.teacher.depth
        chosen = sorted({i % depth for i in self.aligned if -depth <= i < depth})
        return chosen, chosen

    def build(self, context: DistillContext) -> nn.Module:
        return _hard_align_losses(self, context, self.blocks(context)[0])


def logit_kl(student_BC: Tensor, teacher_BC: Tensor, tau: float = 1.0) -> Tensor:
    """tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)) in nats, mean over the batch."""
    student = (student_BC.float() / tau).log_softmax(dim=-1)
    teacher = (teacher_BC.float() / tau).log_softmax(dim=-1)
    return tau**2 * (teacher.exp() * (teacher - student)).sum(dim=-1).mean()


def _check_weights(**weights: float) -> None:
    for name, value in weights.items():
        if value < 0:
            raise ValueError(f"{name} is {value}, expected a loss weight of 0 or more")


def _check_temperature(tau: float) -> None:
    if tau <= 0:
        raise ValueError(f"tau is {tau}, expected a temperature above 0")


def _adapter(narrow: int, wide: int) -> nn.Module:
    """From the student's width to the teacher's."""
    from torch import nn

    return nn.Identity() if narrow == wide else nn.Linear(narrow, wide)


def _pooled_loss(weight: float, narrow: int, wide: int) -> nn.Module:
    from torch import nn

    class PooledLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapter = _adapter(narrow, wide)

        def forward(self, student: Outputs, teacher: Outputs, progress: float) -> dict[str, Tensor]:
            own, theirs = self.adapter(student.pooled_BD), teacher.pooled_BD
            assert theirs is not None
            return {"features": weight * nn.functional.mse_loss(own.float(), theirs.float())}

    return PooledLoss()


def _hard_align_losses(settings: HardAlign, context: DistillContext, blocks: Sequence[int]) -> nn.Module:
    from torch import nn

    narrow, wide = context.student.embed_dim, context.teacher.embed_dim

    class HardAlignLosses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = nn.ModuleDict({str(i): _adapter(narrow, wide) for i in blocks})

        def forward(self, student: Outputs, teacher: Outputs, progress: float) -> dict[str, Tensor]:
            decided_B = teacher.logits_BC.argmax(dim=-1)
            hard = nn.functional.cross_entropy(student.logits_BC.float(), decided_B)
            share = max(math.cos(math.pi / 2 * progress), settings.floor)
            total = student.logits_BC.new_zeros(())
            for i in blocks:
                own, theirs_BTD = student.blocks[i], _as_the_student(teacher.blocks[i], student.blocks[i])
                mine = self.adapters[str(i)](own.x_BTD)
                total = total + nn.functional.mse_loss(mine.float(), theirs_BTD.detach().float())
            return {"hard": settings.weight * hard, "align": settings.align * share * total}

    return HardAlignLosses()


def _as_the_student(teacher: Features, student: Features) -> Tensor:
    """The teacher's tokens, prefix first, mixed as the student's; its prefix alone where nothing else is left."""
    import torch

    prefix_BPD, patches_BND = teacher.x_BTD[:, : teacher.prefix], _patches(teacher)
    if student.x_BTD.shape[1] <= student.prefix:
        return prefix_BPD[:, : student.x_BTD.shape[1]]
    if student.compose_BRN is not None:
        patches_BND = student.compose_BRN.detach().to(patches_BND.dtype) @ patches_BND
    return torch.cat([prefix_BPD, patches_BND], dim=1)


def _two_level_losses(
    settings: TwoLevel, context: DistillContext, shallow: Sequence[int], deep: int
) -> nn.Module:
    import torch
    from torch import nn

    narrow, wide = context.student.embed_dim, context.teacher.embed_dim

    class TwoLevelLosses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.imitate = nn.ModuleDict({str(i): _adapter(narrow, wide) for i in shallow})
            self.explore = _adapter(narrow, wide)
            self.mask_token = nn.Parameter(torch.zeros(wide))
            self.generator = nn.Sequential(
                nn.Conv2d(wide, wide, 3, padding=1), nn.ReLU(), nn.Conv2d(wide, wide, 3, padding=1)
            )

        def forward(self, student: Outputs, teacher: Outputs, progress: float) -> dict[str, Tensor]:
            imitating, exploring = settings.stages(progress)
            # Every term stays in the graph, at weight zero when off: with several workers each
            # parameter must take part in every step.
            terms = {
                "logits": settings.logits
                * imitating
                * logit_kl(student.logits_BC, teacher.logits_BC, settings.tau),
                "exploration": settings.exploration * exploring * self._exploration(student, teacher),
            }
            if shallow:
                terms["imitation"] = settings.imitation * imitating * self._imitation(student, teacher)
            return terms

        def _imitation(self, student: Outputs, teacher: Outputs) -> Tensor:
            total = student.logits_BC.new_zeros(())
            for i in shallow:
                own, theirs = student.blocks[i], _patches(teacher.blocks[i]).detach()
                if own.compose_BRN is not None:
                    theirs = own.compose_BRN.detach().to(theirs.dtype) @ theirs
                difference = self.imitate[str(i)](_patches(own)) - theirs
                total = total + difference.float().pow(2).sum() / len(theirs)
            return total

        def _exploration(self, student: Outputs, teacher: Outputs) -> Tensor:
            own, theirs = student.blocks[deep], _patches(teacher.blocks[context.teacher.depth - 1]).detach()
            tokens_BRD = self.explore(_patches(own))
            position_BR = _positions(own)
            sites_BN1, filled_BND = hide(
                tokens_BRD, position_BR, theirs.shape[1], settings.mask_ratio, self.mask_token
            )
            rows, columns = context.teacher.grid
            image = filled_BND.transpose(1, 2).unflatten(2, (rows, columns))
            restored_BND = self.generator(image).flatten(2).transpose(1, 2)
            error = (sites_BN1 * (restored_BND - theirs)).float().pow(2).sum()
            return error / (settings.mask_ratio * len(theirs))

    return TwoLevelLosses()


def hide(
    tokens_BRD: Tensor, position_BR: Tensor, sites: int, mask_ratio: float, mask_token_D: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens back on the grid, with at least `mask_ratio` of its sites empty and filled by a vector.

    Returns:
        hidden_BN1: 1 where the site is empty, else 0.
        filled_BND: the grid.
    """
    import torch

    batch, remaining, dim = tokens_BRD.shape
    extra = max(0, math.ceil(mask_ratio * sites) - (sites - remaining))
    order_BR = torch.rand(batch, remaining, device=tokens_BRD.device).argsort(dim=1)
    shown_BR1 = (order_BR >= extra).to(tokens_BRD.dtype)[..., None]
    index_BR1 = position_BR[..., None]
    shown_BN1 = tokens_BRD.new_zeros(batch, sites, 1).scatter(1, index_BR1, shown_BR1)
    grid_BND = tokens_BRD.new_zeros(batch, sites, dim).scatter(
        1, index_BR1.expand(-1, -1, dim), tokens_BRD * shown_BR1
    )
    hidden_BN1 = 1 - shown_BN1
    return hidden_BN1, grid_BND + hidden_BN1 * mask_token_D.to(tokens_BRD.dtype)


def _patches(features: Features) -> Any:
    return features.x_BTD[:, features.prefix :]


def _positions(features: Features) -> Any:
    if features.position_BN is not None:
        return features.position_BN
    import torch

    x = features.x_BTD
    count = x.shape[1] - features.prefix
    return torch.arange(count, device=x.device).expand(x.shape[0], count)
