"""`train:` and `teacher:`, how a model is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from ucc_search.config.base import Frozen


class OptimizerConfig(Frozen):
    """Passed through to DeepSpeed (type and params), or to torch.optim under the plain engine."""

    type: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    lr: float = Field(1e-3, gt=0.0)
    weight_decay: float = Field(0.05, ge=0.0)
    params: Mapping[str, Any] = Field(default_factory=dict)
    """More arguments of the optimiser."""


class ScheduleConfig(Frozen):
    """Learning rate over the run: linear warm-up, then cosine to `min_lr` (or constant)."""

    type: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of all steps."""
    min_lr: float = Field(1e-6, ge=0.0)


class AugmentConfig(Frozen):
    """Augmentation of training images; on tensors, in batches."""

    crop_padding: int = Field(0, ge=0)
    flip: bool = False
    erase: float = Field(0.0, ge=0.0, le=1.0)
    mixup: float = Field(0.0, ge=0.0)
    cutmix: float = Field(0.0, ge=0.0)
    cutmix_fold: bool = False
    """CutMix keeps the larger share: lambda becomes max(lambda, 1 - lambda), so that the pasted box never
    covers more than half of an image (UP-ViT, arXiv:2111.15127)."""

    @model_validator(mode="after")
    def _folds_something(self) -> AugmentConfig:
        if self.cutmix_fold and not self.cutmix:
            raise ValueError("cutmix_fold needs cutmix above 0 (the parameter of its Beta distribution)")
        return self


class AnnealConfig(Frozen):
    """Keep ratios move by a cosine from 1 to the plan between these shares of training (EViT)."""

    start: float = Field(0.0, ge=0.0, le=1.0)
    end: float = Field(0.3, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _ordered(self) -> AnnealConfig:
        if self.start > self.end:
            raise ValueError(f"start is {self.start} and end is {self.end}, expected start <= end")
        return self


class EmaConfig(Frozen):
    """An exponential moving average of the weights: average = d * average + (1 - d) * weights.

    A number alone is the decay. The first update copies the weights.
    """

    decay: float = Field(gt=0.0, lt=1.0)
    ramp: bool = False
    """At the n-th update (from 1), d is min(decay, (1 + n) / (10 + n)), which soon forgets the first weights."""
    every: Literal["step", "epoch"] = "step"
    """What an update follows: an optimiser step, or a pass over the training images (and the last step).
    UP-ViT (arXiv:2111.15127) has decay 0.999, ramped, every epoch."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return data if isinstance(data, Mapping | cls) else {"decay": data}


class TrainConfig(Frozen):
    """How a model is trained, candidates and teachers alike."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch` needs no DeepSpeed; one process."""
    epochs: float | None = Field(None, gt=0.0)
    steps: int | None = Field(None, ge=1)
    batch_size: int = Field(96, ge=1)
    """Images per optimiser step over all workers and accumulation rounds."""
    gradient_accumulation: int = Field(1, ge=1)
    workers: int = Field(1, ge=1)
    """Processes that train one candidate together."""
    zero_stage: Literal[0, 1, 2] = 0
    """How much of the training state DeepSpeed shares out among the workers."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    deepspeed: Mapping[str, Any] = Field(default_factory=dict)
    """More keys for DeepSpeed's own configuration, passed through."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    augment: AugmentConfig = AugmentConfig()
    anneal: AnnealConfig | None = None
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    clip_grad: float | None = Field(None, gt=0.0)
    ema: EmaConfig | None = None
    """A moving average of the weights, which is then what is evaluated."""

    @model_validator(mode="after")
    def _length(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            both = self.epochs is not None
            raise ValueError(
                "give either `epochs` or `steps`" + (", and set the other to null" if both else "")
            )
        if self.engine == "torch" and (self.workers > 1 or self.zero_stage or self.deepspeed):
            raise ValueError("workers, zero_stage and deepspeed need engine: deepspeed")
        per_round = self.workers * self.gradient_accumulation
        if self.batch_size % per_round:
            raise ValueError(
                f"batch_size is {self.batch_size}, expected a multiple of "
                f"workers x gradient_accumulation = {per_round}"
            )
        return self

    def epoch_steps(self, images: int) -> int:
        """Optimiser steps of one pass over a training split of this many images."""
        return images // self.batch_size or 1

    def total_steps(self, images: int) -> int:
        """Optimiser steps of the whole run over a training split of this many images."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * self.epoch_steps(images)))
