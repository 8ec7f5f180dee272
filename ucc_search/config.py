"""The space file: YAML plus `--set` overrides, validated into frozen models. The only YAML reader."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PrivateAttr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from ucc_search.errors import ConfigError, UserError, did_you_mean
from ucc_search.interfaces import ComponentRef
from ucc_search.units import parse_amount


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Frozen):
    """One searched number: `{low, high}` with optional `log` or `step`, or `{choices: [...]}`."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    step: int | float | None = None
    """With whole low, high and step, whole numbers are searched."""
    choices: tuple[Any, ...] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Range:
        if self.choices is not None:
            if not self.choices or self.low is not None or self.high is not None:
                raise ValueError("give either a non-empty `choices` or `low` and `high`")
        elif self.low is None or self.high is None or not self.low <= self.high:
            raise ValueError(f"needs low <= high, got low={self.low} high={self.high}")
        elif self.log and self.low <= 0:
            raise ValueError(f"a log range needs low > 0, got {self.low}")
        elif self.log and self.step is not None:
            raise ValueError("a log range takes no step")
        return self


class KeepRatio(_Frozen):
    """Fraction of the arriving patch tokens that a block keeps; one searched number per block.

    The range is that of the proposals. Plans keep at least `low` (up to rounding to whole tokens); where
    the budget leaves room, projection gives tokens back beyond `high`.
    """

    low: float = 0.3
    high: float = 1.0

    @model_validator(mode="after")
    def _inside(self) -> KeepRatio:
        for name in ("low", "high"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected 0 < keep_ratio <= 1 "
                    "(the fraction of patch tokens a block keeps)"
                )
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}, expected low < high")
        return self


class WidthRange(_Frozen):
    """Fraction of the units that is kept: the budget decides between `low` and all of them.

    The search proposes one number per block (one in all for `embed` and `depth`) between `low` and
    `high`; projection moves it.
    """

    low: float = Field(0.25, gt=0.0, le=1.0)
    high: float = Field(1.0, gt=0.0, le=1.0)
    multiple: int | None = Field(None, ge=1)
    """Widths are multiples of this; by default 8, for channels and ranks per head 4, for heads 1."""

    @model_validator(mode="after")
    def _ordered(self) -> WidthRange:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}, expected low < high")
        return self


_TAGS = ("function-number", "function-range")  # in the place of an error, but not in the file


def _width_tag(value: Any) -> str:
    return _TAGS[isinstance(value, Mapping | WidthRange)]


Width = Annotated[
    Annotated[float, Field(gt=0.0, le=1.0), Tag(_TAGS[0])] | Annotated[WidthRange, Tag(_TAGS[1])],
    Discriminator(_width_tag),
]


class WidthsConfig(_Frozen):
    """What may become narrower (UP-ViT) or of lower rank (COMCAT). A number is fixed, a range follows the budget."""

    embed: Width = 1.0
    """Embedding channels, the same in all layers (of a stage)."""
    heads: Width = 1.0
    attention: Width = 1.0
    """Channels per head, of queries, keys and values alike."""
    mlp: Width = 1.0
    """Hidden units."""
    depth: Width = 1.0
    """Blocks; the least important half-steps leave first."""
    qk_rank: Width = 1.0
    """Rank of each head's query-key product; in place of `attention`, of what is left after the others."""
    v_rank: Width = 1.0
    """Rank of each head's value-output product."""
    mlp_rank: Width = 1.0
    """Rank of the MLP's matrices, as a fraction of the rank at which two thin ones cost as much as one."""
    head_rank: Width = 1.0
    """Rank of the classifier's matrix, as a fraction of the same."""

    @model_validator(mode="after")
    def _one_way(self) -> WidthsConfig:
        if self.attention != 1.0 and (self.qk_rank != 1.0 or self.v_rank != 1.0):
            raise ValueError(
                "channels per head are either selected (attention) or factorised (qk_rank, v_rank), not both"
            )
        return self


def _component_list(value: Any) -> Any:
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries:
        raise ValueError("is empty, expected a component name")
    return _component_refs(entries)


def _component_refs(value: Any) -> tuple[ComponentRef, ...]:
    entries = value if isinstance(value, list | tuple) else [value]
    refs = []
    for entry in entries:
        if isinstance(entry, ComponentRef):
            refs.append(entry)
            continue
        mapping = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(mapping, Mapping) or not isinstance(mapping.get("name"), str):
            raise ValueError(f"got {entry!r}, expected a component name or a mapping with `name`")
        refs.append(ComponentRef.from_dict(mapping))
    return tuple(refs)


def _component_dicts(refs: tuple[ComponentRef, ...]) -> list[dict[str, Any]]:
    return [ref.to_dict() for ref in refs]


Choices = Annotated[
    tuple[ComponentRef, ...], BeforeValidator(_component_list), PlainSerializer(_component_dicts)
]
Observers = Annotated[
    tuple[ComponentRef, ...], BeforeValidator(_component_refs), PlainSerializer(_component_dicts)
]


def _one_component(value: Any) -> Any:
    refs = _component_list(value)
    if len(refs) > 1:
        raise ValueError(f"got {len(refs)} components, expected one")
    return refs[0]


Choice = Annotated[ComponentRef, BeforeValidator(_one_component), PlainSerializer(ComponentRef.to_dict)]


class ComponentChoices(_Frozen):
    """Which plugins may be used; where several are listed, the choice is searched."""

    scorer: Choices = (ComponentRef("joint"),)
    aggregator: Choices = (ComponentRef("host"),)
    cascade: Choices = (ComponentRef("per_block"),)
    distiller: Choices = (ComponentRef("two_level"),)
    importance: Choices = (ComponentRef("fisher"),)
    """Which units narrower models keep."""


Factorization = Literal["plain", "whitened"]
"""How ranks are lowered: `plain` approximates the matrices and products themselves (COMCAT), `whitened` what
they give on the proxy training images (each layer's inputs are whitened by their second moments)."""


class SpaceConfig(ComponentChoices):
    """What the search may change."""

    keep_ratio: KeepRatio = KeepRatio()
    head_tokens_only: bool = True
    """Spare the last block's work on tokens the head does not read (exact; see the plan)."""
    widths: WidthsConfig = WidthsConfig()
    fewer_heads: Literal["fuse", "remove"] = "fuse"
    """New heads take the best channels of several old ones (UP-ViT), or the least important heads leave."""
    factorize: Factorization = "plain"
    """How ranks are lowered: `plain` approximates the weights, `whitened` what the layers give on proxy images."""


class Baseline(ComponentChoices):
    """One fixed method, measured at every budget with the same training as the search's candidates."""

    name: str
    """Its name in the tables."""
    scorer: Choices = (ComponentRef("random"),)
    aggregator: Choices = (ComponentRef("drop"),)
    cascade: Choices = (ComponentRef("geometric"),)
    distiller: Choices = (ComponentRef("logits"),)
    importance: Choices = (ComponentRef("fisher"),)
    widths: WidthsConfig = WidthsConfig()
    """Ranges follow the budget together: all at the same share of their way to `low`."""
    weights: Literal["teacher", "random"] = "teacher"
    """What training starts from; `random` is the same architecture from scratch."""
    factorize: Factorization = "plain"
    """As `space.factorize`, for this baseline alone."""

    @model_validator(mode="after")
    def _fixed(self) -> Baseline:
        for kind in ("scorer", "aggregator", "cascade", "distiller", "importance"):
            refs = getattr(self, kind)
            values = [v for ref in refs for v in ref.params.values()]
            searched = [v for v in values if isinstance(v, Mapping) or v == "search"]
            if len(refs) > 1 or searched:
                raise ValueError(f"{kind} of a baseline must be one component with fixed parameters")
        return self


class Bound(NamedTuple):
    """A plugin's component that a section names, built; and what tells its content from another's."""

    component: Any
    sha256: str | None


class _FromPlugin(_Frozen):
    """A section whose `name` may be `plugin:NAME`; see `binding`."""

    _bound: Bound | None = PrivateAttr(None)

    @property
    def bound(self) -> Bound | None:
        return self._bound

    def with_bound(self, bound: Bound) -> Self:
        copy = self.model_copy()
        copy._bound = bound
        return copy


class ModelConfig(_FromPlugin):
    """The model to compress; it is also the teacher."""

    name: str
    """A timm name, the reference model `small_vit`, or plugin:NAME."""
    args: Mapping[str, Any] = Field(default_factory=dict)
    """Passed to the model's constructor, for example img_size, patch_size, embed_dim, depth."""
    pretrained: bool = False
    """timm's weights, from the hub."""
    checkpoint: str | None = None
    """A .safetensors file, a .pth/.pt file (read with weights_only) or a folder of `train-teacher`;
    `auto` trains a teacher on first use by `teacher:` and caches it."""


class DataConfig(_FromPlugin):
    """Where images come from and how they are split."""

    name: str
    """digits, fashion-mnist, folder:PATH, torchvision:NAME, hf:NAME or plugin:NAME."""
    args: Mapping[str, Any] = Field(default_factory=dict)
    """Parameters of a plugin's data set."""
    root: str | None = None
    """Where the data set lies, for those that are not found by name."""
    select: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of the training split that is held out for selection, never trained on."""
    calibration: int = Field(1000, ge=1)
    """Images of the selection split used by zero-shot evaluation and calibrated schedules."""
    proxy: int = Field(1000, ge=1)
    """Images of the training split, equally many of each class, on which importance is measured."""
    image_size: int | None = Field(None, ge=1)
    limit_train: int | None = Field(None, ge=1)
    loader_workers: int = Field(0, ge=0)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """Per channel, of pixels from 0 to 1; likewise `mean`. Those of the data or of ImageNet by default."""


class OptimizerConfig(_Frozen):
    """Passed through to DeepSpeed (type and params), or to torch.optim under the plain engine."""

    type: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    lr: float = Field(1e-3, gt=0.0)
    weight_decay: float = Field(0.05, ge=0.0)
    params: Mapping[str, Any] = Field(default_factory=dict)
    """More arguments of the optimiser."""


class ScheduleConfig(_Frozen):
    """Learning rate over the run: linear warm-up, then cosine to `min_lr` (or constant)."""

    type: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of all steps."""
    min_lr: float = Field(1e-6, ge=0.0)


class AugmentConfig(_Frozen):
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


class AnnealConfig(_Frozen):
    """Keep ratios move by a cosine from 1 to the plan between these shares of training (EViT)."""

    start: float = Field(0.0, ge=0.0, le=1.0)
    end: float = Field(0.3, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _ordered(self) -> AnnealConfig:
        if self.start > self.end:
            raise ValueError(f"start is {self.start} and end is {self.end}, expected start <= end")
        return self


class EmaConfig(_Frozen):
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


class TrainConfig(_Frozen):
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


class RankSearchConfig(_Frozen):
    """Differentiable selection of ranks (COMCAT, section 3.3), whose result the search starts from."""

    levels: int = Field(6, ge=2)
    """Ranks to choose from, per product and MLP."""
    rounds: int = Field(4, ge=1)
    """Each updates the gates, then the weights."""
    gate_steps: int = Field(100, ge=1)
    weight_steps: int = Field(100, ge=1)
    batch_size: int = Field(96, ge=1)
    held_out: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of the training split that the gates alone are trained on."""
    lr: float = Field(1e-2, gt=0.0)
    weight_lr: float = Field(1e-4, gt=0.0)
    beta: float = Field(1.5, ge=1.0)
    """Exponent of the price in the loss, while that is above the budget."""


class RungConfig(_Frozen):
    """One step of the ladder: how trials are measured on it, and which of the rung below climb onto it."""

    rung: Literal["zero-shot", "train"]
    """`zero-shot`: KL and accuracy on the calibration images, without training. `train`: the start of the
    training that `train:` describes, or with neither steps nor epochs the whole of it."""
    steps: int | None = Field(None, ge=1)
    """Training stops here; a trial that climbs on goes on from this step, by the same learning rates."""
    epochs: float | None = Field(None, gt=0.0)
    """The same in passes over the training images."""
    keep: int | float | None = None
    """How many of the rung below climb on, per budget and set of components, the best first: a whole number, or
    a share (rounded up). The lowest rung takes every proposal."""
    seeds: tuple[int, ...] = (0,)
    """Each trial of this rung is trained once per seed."""

    @field_validator("keep", mode="before")
    @classmethod
    def _number_or_share(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is None or number or (isinstance(value, float) and 0.0 < value < 1.0):
            return value
        raise ValueError(f"got {value!r}, expected a whole number of trials or a share above 0 and below 1")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return _distinct_seeds(seeds)

    @model_validator(mode="after")
    def _length(self) -> RungConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give either `steps` or `epochs`")
        trained = {"steps", "epochs", "seeds"} & self.model_fields_set
        if self.rung == "zero-shot" and any(getattr(self, k) not in (None, (0,)) for k in trained):
            raise ValueError("a zero-shot rung trains nothing, leave steps, epochs and seeds out")
        return self

    @property
    def whole(self) -> bool:
        """Training to the end."""
        return self.rung == "train" and self.steps is None and self.epochs is None

    def stop(self, train: TrainConfig, images: int) -> int:
        """Optimiser steps that a trial of this rung has behind it, over a training split of this many images."""
        if self.rung == "zero-shot":
            return 0
        if self.whole:
            return train.total_steps(images)
        return train.model_copy(update={"steps": self.steps, "epochs": self.epochs}).total_steps(images)


def _distinct_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"got {list(seeds)}, expected one or more different integers")
    return seeds


class SearchConfig(_Frozen):
    """How much is tried, and what is promoted."""

    trials: int = Field(40, ge=0)
    """Proposals; 0 measures the baselines alone."""
    sampler: Choice = ComponentRef("shell")
    """What proposes: shell, tpe, random, nsga2, nsga3, cmaes, gp, grid, or a plugin's."""
    seed: int = 0
    """Of the sampler."""
    fidelity: Literal["zero-shot", "train"] = "zero-shot"
    """What one trial of the search measures; with `zero-shot` the best are trained afterwards."""
    promote: int = Field(1, ge=0)
    """Zero-shot trials trained afterwards, per budget and set of components."""
    seeds: tuple[int, ...] = (0,)
    """Each trained candidate is trained once per seed."""
    ladder: tuple[RungConfig, ...] | None = None
    """The rungs from cheap to dear, in place of fidelity, promote and seeds (see docs/ladder.md)."""
    executor: Literal["ray", "local"] = "ray"
    """`local` measures one trial after another in this process."""
    keep_weights: Literal["all", "front"] = "all"
    """Which trained models stay on disk when the run is done."""
    concurrency: int | None = Field(None, ge=1)
    """Trials at a time; the default is as many as the cluster has room for."""
    cpus_per_trial: int | None = Field(None, ge=1)
    """Cores of one trial, shared by its workers; the default is one each, more if `concurrency` leaves more."""
    gpus_per_trial: float | None = Field(None, ge=0.0)
    """GPUs of one trial, shared by its workers; the default is one each where the cluster has any."""
    ray_address: str | None = None
    """HOST:PORT of the head node of a Ray cluster, or `auto`; the default is this machine alone."""
    trial_timeout: float | None = Field(None, gt=0.0)
    """Seconds after which a trial's worker process is ended and the trial has failed; the default is never."""
    ranks: RankSearchConfig | None = None
    """Where ranks are searched: choose them by gradient descent first."""

    @field_validator("seeds")
    @classmethod
    def _some(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return _distinct_seeds(seeds)

    @field_validator("ladder")
    @classmethod
    def _climbs(cls, ladder: tuple[RungConfig, ...] | None) -> tuple[RungConfig, ...] | None:
        if ladder is not None:
            _check_ladder(ladder)
        return ladder

    @model_validator(mode="after")
    def _one_way(self) -> SearchConfig:
        for key in ("fidelity", "promote", "seeds"):
            if self.ladder is not None and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"give either `ladder` or `{key}`, which is short for one, not both")
        return self

    @model_validator(mode="after")
    def _on_a_cluster(self) -> SearchConfig:
        if self.ray_address is not None and self.executor != "ray":
            raise ValueError("ray_address needs executor: ray")
        return self

    @property
    def rungs(self) -> tuple[RungConfig, ...]:
        """The ladder, written out: never empty, the lowest first."""
        if self.ladder is not None:
            return self.ladder
        if self.fidelity == "train":
            return (RungConfig(rung="train", seeds=self.seeds),)
        top = (RungConfig(rung="train", keep=self.promote, seeds=self.seeds),) if self.promote else ()
        return (RungConfig(rung="zero-shot"), *top)


def _check_ladder(ladder: tuple[RungConfig, ...]) -> None:
    if not ladder:
        raise ValueError("is empty, expected one rung or more, such as [{rung: zero-shot}]")
    if ladder[0].keep is not None:
        raise ValueError("the lowest rung takes every proposal, leave its `keep` out")
    if ladder[0].seeds != (0,):
        raise ValueError("the lowest rung measures every proposal once, by search.seed: leave its seeds out")
    for number, (below, rung) in enumerate(itertools.pairwise(ladder), start=2):
        if rung.keep is None:
            raise ValueError(
                f"rung {number} needs `keep`, how many of the rung below climb onto it: a whole "
                "number, or a share below 1"
            )
        if rung.rung == "zero-shot":
            raise ValueError(f"rung {number} is zero-shot, which can be the lowest only")
        if below.whole:
            raise ValueError(f"rung {number - 1} trains to the end, so it must be the last")
        for unit in ("steps", "epochs"):
            before, now = getattr(below, unit), getattr(rung, unit)
            if before is not None and now is not None and before >= now:
                raise ValueError(f"rung {number} has {unit} {now}, expected more than the {before} below it")
    if ladder[-1].rung == "train" and not ladder[-1].whole:
        raise ValueError("the last rung trains to the end (train.steps), leave its steps and epochs out")


class TargetRange(_Frozen):
    """A whole front in one study: budgets from `low` to `high`, `step` apart; the target is a dimension.

    Percentages of the uncompressed model, or amounts; all three alike.
    """

    low: str | float
    high: str | float
    step: str | float | None = None
    """5 %, or a twelfth of the way for amounts."""

    @model_validator(mode="after")
    def _ordered(self) -> TargetRange:
        self.values()
        return self

    def values(self) -> tuple[str, ...]:
        """The budgets, the tightest first; the last is `high` even if that is no whole step away."""
        given = [str(v).replace(" ", "") for v in (self.low, self.high, self.step) if v is not None]
        sign = "%" if given[0].endswith("%") else ""
        if any(v.endswith("%") != bool(sign) for v in given):
            raise ValueError(f"mixes percentages and amounts: {', '.join(given)}")
        try:
            low, high, *step = (
                float(v[:-1]) if sign else float(parse_amount(v, key="budget")) for v in given
            )
        except (ValueError, UserError):
            raise ValueError(
                f"got {', '.join(given)}, expected percentages or amounts such as 2.1G"
            ) from None
        if not 0 < low < high or (sign and high > 100) or (step and step[0] <= 0):
            raise ValueError(f"got {', '.join(given)}, expected 0 < low < high (at most 100%) and step > 0")
        by = step[0] if step else 5.0 if sign else (high - low) / 12
        count = math.ceil((high - low) / by - 1e-9)
        if count > 200:
            raise ValueError(f"has {count + 1} budgets, expected 201 at most; make the step larger")
        return tuple(f"{min(low + i * by, high):.12g}{sign}" for i in range(count + 1))


def _budget_list(value: Any) -> Any:
    if isinstance(value, Mapping | TargetRange):
        return value
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _target_tag(value: Any) -> str:
    return _TAGS[isinstance(value, Mapping | TargetRange)]


Targets = Annotated[
    Annotated[tuple[str | float, ...], Tag(_TAGS[0])] | Annotated[TargetRange, Tag(_TAGS[1])],
    Discriminator(_target_tag),
    BeforeValidator(_budget_list),
]


class BudgetConfig(_Frozen):
    """Upper limits, ANDed; `macs` (or `flops`) may list several targets, each searched in turn.

    A value is a percentage of the uncompressed model ("50%") or absolute ("2.1G", 4500000000). In place
    of a list, `{low: 30%, high: 90%}` makes the target itself a dimension of one study.
    """

    macs: Targets | None = None
    flops: Targets | None = None
    """In place of `macs`: twice as many."""
    params: str | float | None = None
    metrics: Mapping[str, str | float] = Field(default_factory=dict)
    """Limits on prices of plugins (hook `ucc_metrics`), in their unit or in percent of the uncompressed model."""

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if self.macs is not None and self.flops is not None:
            raise ValueError("give `macs` or `flops`, not both (1 MAC is 2 FLOPs)")
        if self.macs is None and self.flops is None and self.params is None and not self.metrics:
            raise ValueError("needs at least one of macs, flops, params, metrics")
        return self

    @property
    def one_study(self) -> bool:
        """Whether one study covers all targets."""
        return isinstance(self.macs, TargetRange) or isinstance(self.flops, TargetRange)

    def targets(self) -> tuple[str, tuple[str | float, ...]]:
        """(macs, flops or "", its targets), in the order in which they are searched."""
        for name in ("macs", "flops"):
            found: tuple[str | float, ...] | TargetRange | None = getattr(self, name)
            if found is not None:
                return name, found.values() if isinstance(found, TargetRange) else found
        return "", ()


class RunConfig(_Frozen):
    """One whole space file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Of the run; its folder is `results/NAME` by default."""
    model: ModelConfig
    data: DataConfig
    budget: BudgetConfig
    space: SpaceConfig = SpaceConfig()
    search: SearchConfig = SearchConfig()
    train: TrainConfig = TrainConfig(epochs=1.0)
    teacher: TrainConfig | None = None
    """How `train-teacher` (or `checkpoint: auto`) trains the model first."""
    baselines: tuple[Baseline, ...] = ()
    plugins: tuple[str, ...] = ()
    """Plugins to load: .py files, folders or modules."""
    observers: Observers = ()
    """Who is told of trials as they finish, by name, with parameters."""

    @model_validator(mode="after")
    def _gpu_for_each(self) -> RunConfig:
        gpus, workers = self.search.gpus_per_trial, self.train.workers
        if gpus and workers > 1 and gpus < workers:
            raise ValueError(
                f"search.gpus_per_trial is {gpus:g} and train.workers is {workers}, expected a GPU for each worker"
            )
        return self

    @field_validator("teacher")
    @classmethod
    def _alone(cls, teacher: TrainConfig | None) -> TrainConfig | None:
        if teacher is not None and (teacher.workers > 1 or teacher.anneal is not None):
            raise ValueError(
                "a teacher is trained by one process and keeps its tokens: leave workers and anneal out"
            )
        return teacher

    @field_validator("baselines")
    @classmethod
    def _distinct(cls, baselines: tuple[Baseline, ...]) -> tuple[Baseline, ...]:
        names = [b.name for b in baselines]
        if len(set(names)) != len(names):
            raise ValueError(f"baselines need different names, got {names}")
        return baselines


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a space file and apply `key.sub=value` overrides (values are YAML).

    Raises:
        ConfigError: one sentence with the file, the key, what came and what is allowed.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = did_you_mean(
            path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        )
        raise ConfigError(f"{path}: no such file{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason}); expected a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{path}: not valid YAML{where}: {problem}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping with the keys {', '.join(RunConfig.model_fields)}")
    for override in overrides:
        _override(data, override)
    return parse_config(data, source=str(path))


def parse_config(data: Mapping[str, Any], *, source: str = "config") -> RunConfig:
    """Validate a mapping as a run's configuration."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal object."""
    return str(yaml.safe_dump(plain_config(config), sort_keys=False, allow_unicode=True))


def plain_config(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain mappings, lists and values; what is not set is left out."""
    plain: dict[str, Any] = _plain(config.model_dump(mode="python"))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: expected key=value, for example search.trials=20")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text!r}: the value is not valid YAML") from None
    *parents, leaf = key.strip().split(".")
    node = data
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {text!r}: {part!r} is not a section")
        node = child
    node[leaf] = parsed


def parse_pairs(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """`key=value` texts as a mapping; values are YAML.

    Raises:
        ConfigError: a text without a key.
    """
    found: dict[str, Any] = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{option} {text!r}: expected key=value")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{option} {text!r}: the value is not valid YAML") from None
    return found


def _explain(error: ValidationError, source: str) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"] if not str(part).startswith("function-")]
    key = ".".join(location) or "the file"
    if problem["type"] == "extra_forbidden":
        allowed = _allowed_keys(problem["loc"][:-1])
        return (
            f"{source}: unknown key {key!r}{did_you_mean(location[-1], allowed)}"
            f" (allowed here: {', '.join(allowed)})"
        )
    if problem["type"] == "missing":
        return f"{source}: the key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{source}: {key}: {message}"
    return f"{source}: {key} is {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _allowed_keys(location: Sequence[Any]) -> list[str]:
    """Field names of the model at this place, following annotations through optionals and tuples."""
    model: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, int) or str(part) in _TAGS:
            continue
        field = model.model_fields.get(str(part))
        nested = _models_in(field.annotation) if field else []
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _models_in(arg)]
