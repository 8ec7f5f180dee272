"""What plugins implement. Importing this module imports no torch.

Shape suffixes: B batch, N patch tokens arriving, R kept, P pruned, T prefix plus patch tokens,
H heads, K query/key width, D embedding.

A component is constructed once per model from the parameters in the space file, so its constructor
names its parameters and checks them. Anything that needs weights or buffers of its own returns an
`nn.Module` from `build`; the framework registers it in the block and trains it with the model.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from ucc_search.plan import CompressionPlan, ModelShape, UnitGroup

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Site:
    """One place where tokens are scored, and usually reduced: between a block's attention and MLP."""

    block: int
    tokens_in: int  # patch tokens
    tokens_out: int
    prefix_tokens: int
    class_token: bool
    dim: int
    heads: int
    qk_dim: int
    v_dim: int
    depth: int
    grid: tuple[int, int]


class TokenView(NamedTuple):
    """What a scorer or aggregator may look at, at one site."""

    x_BTD: Tensor  # tokens after attention and residual; prefix tokens first
    q_BHTK: Tensor  # queries of this block's attention
    k_BHTK: Tensor  # keys
    v_BHTK: Tensor  # values
    attn_BHTT: Tensor | None  # softmax attention, present where the scorer sets `needs_attention`
    scale: float  # factor on the attention logits
    prefix: int  # number of prefix tokens; they are never scored
    class_token: bool
    position_BN: Tensor  # original index of each patch token, row-major on `grid`
    size_BN: Tensor  # original patches each token stands for
    grid: tuple[int, int]
    received_BHT: Tensor | None = None
    """Mean of attn over all queries: what each token gets. Present where the scorer sets
    `needs_attention_means`, as is the next."""
    class_row_BHT: Tensor | None = None  # what the first token attends to

    @property
    def patches_BND(self) -> Tensor:
        """The patch tokens, without the prefix."""
        return self.x_BTD[:, self.prefix :]


class Assignment(NamedTuple):
    """Which patch tokens stay, and where those that go are added.

    The token kept at r becomes (self_r x_r + sum of weight_p x_p) / (self_r + sum of weight_p),
    summed over the pruned p whose host is r. A pruned token of weight 0 is dropped: it adds nothing to its
    host, not even its size (average pooling alone counts its patches as the host's). `keep` ascends, so that
    order on the grid survives.
    """

    keep_BR: Tensor  # int64 indices into the N patch tokens
    prune_BP: Tensor  # int64 indices; R + P = N
    host_BP: Tensor | None = None  # int64 indices into R; None: pruned tokens are dropped
    weight_BP: Tensor | None = None  # non-negative
    self_BR: Tensor | None = None  # positive


class Component:
    """Base of everything a hook hands out."""

    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Search ranges of constructor parameters, as a space file writes them: {"low": .., "high": ..}."""


class SiteScores(NamedTuple):
    """What a learned scorer gave at one site in one training step."""

    site: Site
    scores_BN: Tensor  # with gradient
    keep: int  # tokens kept of the N in this step; `site.tokens_out`, or more while keep ratios anneal


class Scorer(Component):
    """Scores patch tokens; tokens with higher scores are kept.

    A learned scorer sets `learned`, and its `build` returns an `nn.Module` whose parameters are trained
    with the model. Choosing the highest scores has no gradient, so while training every patch token x is
    multiplied by 1 + s - stop_gradient(s), s its score: a factor of exactly 1, through which the task and
    distillation losses reach s (dL/ds = <x, dL/dx>, also of a token that is merged into another). Give
    scores of the order of 1, such as the probability to be kept. In its `forward` the module may look at
    `self.training` to add noise (Gumbel noise explores, as in DynamicViT), and `losses` adds terms such as
    a keep-ratio loss. In eval mode nothing of this happens. An untrained predictor prunes at random:
    search with `fidelity: train`, since zero-shot trials say nothing about it.
    """

    learned: ClassVar[bool] = False
    """True: scores receive a gradient in training, and `losses` is asked."""
    needs_attention: ClassVar[bool] = False
    """True: the block forms its whole attention map and hands it over (not fused, in that block)."""
    needs_attention_means: ClassVar[bool] = False
    """True: the block hands over the means of its attention map's columns and the first token's row, without
    ever holding the map of the whole batch. Nearly as fast as fused attention."""
    needs_class_token: ClassVar[bool] = False

    def macs(self, site: Site) -> int:
        """MACs for one image at `site`, counted as in `ucc_search.costs`."""
        return 0

    def params(self, site: Site) -> int:
        """Parameters added to the model at `site` (those of the module `build` returns)."""
        return 0

    def build(self, site: Site) -> Callable[[TokenView], Tensor] | nn.Module:
        """What computes the scores at `site`; an `nn.Module` if it has parameters."""
        return self.score

    def losses(self, scores: Sequence[SiteScores]) -> Mapping[str, Tensor]:
        """Named, weighted scalars that are added to the loss of a training step; asked if `learned`.

        Args:
            scores: of every site, from the first block to the last. A keep-ratio loss in the spirit of
                DynamicViT is the mean over sites of (scores_BN.mean(1) - keep / N)^2.
        """
        return {}

    def score(self, view: TokenView) -> Tensor:
        """scores_BN, finite, larger is kept; called inside the model's forward."""
        raise NotImplementedError(f"{type(self).__name__} must define score(view) or build(site)")


class Aggregator(Component):
    """Decides which tokens stay and what becomes of the others."""

    needs_scores: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    """True: kept tokens stand for the pruned ones, so average pooling weighs them by size."""
    absorb_scores: ClassVar[bool] = True
    """True: a host's cumulative score grows by the weighted scores of what it takes in."""
    proportional_attention: ClassVar[bool] = False
    """True: attention logits get the log of each token's size (ToMe, section 3.2)."""

    def macs(self, site: Site) -> int:
        """MACs for one image at `site`."""
        return 0

    def assign(self, view: TokenView, scores_BN: Tensor | None, keep: int) -> Assignment:
        """Choose `keep` tokens (at least; the framework asks again until the count is reached)."""
        raise NotImplementedError(f"{type(self).__name__} must define assign(view, scores_BN, keep)")


class ScheduleRequest(NamedTuple):
    """What a cascade may know when it makes a schedule."""

    shape: ModelShape
    keep_ratios: Sequence[float] | None = None
    """Per-block keep ratios proposed by the search (tokens after / tokens before each block)."""
    min_keep: float = 0.0
    """No block may keep a smaller fraction of what it receives."""
    evaluate: Callable[[Sequence[int]], float] | None = None
    """Accuracy (0 to 1) on calibration images of the model with these tokens after each block."""


class Cascade(Component):
    """The token schedule over depth, and how scores accumulate along it.

    Args:
        gamma: how much of the accumulated score survives into the next block; 0 scores every
            block by itself, 1 sums all blocks.
    """

    needs_model: ClassVar[bool] = False
    """True: `profile` calls `request.evaluate`, so the schedule is calibrated before the search."""
    searched: ClassVar[bool] = False
    """True: reads `request.keep_ratios`, so the search proposes one ratio per block."""

    def __init__(self, gamma: float = 1.0, score_every_block: bool = False) -> None:
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma is {gamma}, expected 0 to 1")
        self.gamma = gamma
        self.score_every_block = score_every_block

    def profile(self, request: ScheduleRequest) -> Callable[[float], Sequence[float]]:
        """A family of schedules ordered by strength.

        Returns:
            A function from strength (0: nothing is pruned; 1: the most this cascade can prune)
            to real-valued patch tokens after each block. Every value is non-increasing in the
            strength and over the blocks. The framework finds the strength that meets the budget
            and rounds to whole tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} must define profile(request)")

    def accumulate(self, running_BN: Tensor | None, score_BN: Tensor) -> Tensor:
        """Cumulative score S = gamma * S + s / mean|s|: every block adds the same mass (reconstructed)."""
        mean_B1 = score_BN.abs().mean(dim=1, keepdim=True)  # scores may be negative
        share_BN = score_BN / mean_B1.clamp_min(1e-12)
        if running_BN is None or self.gamma == 0.0:
            return share_BN
        return self.gamma * running_BN + share_BN


@dataclass(frozen=True, slots=True)
class DistillContext:
    """Static facts a distiller builds its parameters from."""

    student: CompressionPlan
    teacher: ModelShape


class Features(NamedTuple):
    """Tokens of one block, as the student or the teacher left them."""

    x_BTD: Tensor
    prefix: int
    position_BN: Tensor | None = None  # original index of each patch token
    compose_BRN: Tensor | None = None  # each remaining token as a mix of the original N; rows sum to 1


class Outputs(NamedTuple):
    """What one forward pass gave."""

    logits_BC: Tensor
    blocks: Mapping[int, Features]  # only the blocks the distiller asked for
    pooled_BD: Tensor | None = None  # what the classifier reads, where the distiller `needs_pooled`


class Distiller(Component):
    """Extra training losses from a teacher."""

    needs_teacher: ClassVar[bool] = True
    needs_pooled: ClassVar[bool] = False
    """True: outputs carry the penultimate feature, which the classifier reads; its width is `embed_dim`."""

    def blocks(self, context: DistillContext) -> tuple[Sequence[int], Sequence[int]]:
        """Indices of the student's and the teacher's blocks whose tokens the losses need.

        Asked before a run as well, without torch.

        Raises:
            ValueError: the distiller cannot serve this model.
        """
        return (), ()

    def build(self, context: DistillContext) -> Callable[..., Mapping[str, Tensor]] | nn.Module:
        """What computes the losses; an `nn.Module` if it has parameters (discarded after training)."""
        return self.losses

    def losses(self, student: Outputs, teacher: Outputs | None, progress: float) -> Mapping[str, Tensor]:
        """Named, weighted scalars that are added to the task loss; `progress` runs from 0 to 1."""
        raise NotImplementedError(f"{type(self).__name__} must define losses(...) or build(context)")


class Probe(Protocol):
    """The uncompressed model and proxy images, as an importance criterion sees them."""

    model: nn.Module
    shape: ModelShape

    def batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """(images_BCHW, logits_BC of the whole model)."""

    def deletions(self, group: UnitGroup) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """(units_K, logits_BC whole, logits_KBC with each of these units deleted), exact; each pair once."""

    def weights(self, group: UnitGroup) -> Sequence[Tensor]:
        """Matrices [units, weights]: what leaves with each unit; for depth the norms of both halves."""

    def masked(self, masks: Mapping[tuple[str, int], Tensor]) -> AbstractContextManager[None]:
        """Units of the model multiplied by mask_BU (group kind and index), differentiably, while open."""


class Importance(Component):
    """Says how much would be lost with each unit; those with the highest scores are kept."""

    needs_images: ClassVar[bool] = True

    def build(self, probe: Probe) -> Callable[[UnitGroup], Tensor]:
        """What scores the groups, one after another; work for all of them is done here."""
        return functools.partial(self.score, probe)

    def score(self, probe: Probe, group: UnitGroup) -> Tensor:
        """scores_U, finite, larger is kept."""
        raise NotImplementedError(f"{type(self).__name__} must define score(probe, group) or build(probe)")


@dataclass(frozen=True, slots=True)
class Dimension:
    """One searched parameter: a number between bounds, or one of several choices."""

    name: str
    low: int | float = 0.0
    high: int | float = 1.0
    log: bool = False
    step: int | float | None = None
    choices: tuple[Any, ...] | None = None


class SamplerRequest(NamedTuple):
    """What a sampler may know when a search begins."""

    dimensions: Sequence[Dimension]
    """`keep.I` are keep ratios of tokens (after / before block I), `width.KIND.I` of widths. Where one study
    covers a range of budgets, `budget` numbers them, the tightest first."""
    maximize: Sequence[bool]
    """Of every objective: quality first; with a range of budgets also the share of the budgeted price."""
    seed: int
    trials: int
    """How many points will be measured, those told at the start included."""
    starts: Sequence[Mapping[str, Any]]
    """Known good points, possibly partial, best guess first."""
    project: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
    """Where a point lands once it is put on its budget; None where it cannot meet it. Pure, a few ms."""


class Measured(NamedTuple):
    """One measured point, as a sampler is told of it."""

    point: Mapping[str, Any]
    """The point that was measured: the proposal after projection."""
    values: Sequence[float] | None
    """One per objective; None: the trial failed."""
    constraints: Mapping[str, float]
    """By limited price: how far over its limit, as a share of it; at most 0 is within."""


class Sampler(Component):
    """Proposes the points of the search. One instance per study, in one process.

    Proposals are put on the budget before they are measured; a sampler learns from `Measured.point`.
    Several points may be asked for before the first is told. What is proposed must follow from the
    request and from the calls so far, by `request.seed` alone: after a resume, a new instance gets the
    calls that the old one got, and is expected to propose the same.
    """

    def start(self, request: SamplerRequest) -> None:
        """Called once, before anything else."""
        raise NotImplementedError(f"{type(self).__name__} must define start(request)")

    def propose(self) -> Mapping[str, Any]:
        """A value for every dimension."""
        raise NotImplementedError(f"{type(self).__name__} must define propose()")

    def tell(self, measured: Measured) -> None:
        """Learn from a point."""
        raise NotImplementedError(f"{type(self).__name__} must define tell(measured)")


class Metric(Component):
    """A price of a compressed model that a budget may limit, beside MACs and parameters."""

    unit: ClassVar[str] = ""

    def value(self, plan: CompressionPlan, components: Components) -> float:
        """The price of what `compress(model, plan, components)` builds; called often, without torch.

        Finite, not negative, and non-decreasing in every integer of the plan: a plan with more tokens
        or wider layers is never cheaper. Percentages in a budget are of the uncompressed plan's value.
        """
        raise NotImplementedError(f"{type(self).__name__} must define value(plan, components)")


class Observer(Component):
    """Watches a run from the process that drives it: for trackers, notifications, live views.

    Rows are those of `trials.csv`, the configuration that of `config.resolved.yaml`, both as plain
    values. What it returns is ignored; if it raises, it is told nothing more and the run goes on.
    """

    def run_started(self, run_path: Path, config: Mapping[str, Any]) -> None:
        """The run folder exists; called again when a run is resumed."""

    def trial_finished(self, row: Mapping[str, Any]) -> None:
        """One trial was filed, ok or failed; those of before a resume are not told again."""

    def run_finished(self, run_path: Path) -> None:
        """All tables are written; also called when the run was interrupted."""


class ImageData(NamedTuple):
    """A data set in memory, before it is split. `select` is cut out of `train` by the framework."""

    train_images_BCHW: Tensor  # uint8, square
    train_labels_B: Tensor  # int64, 0 to classes - 1
    test_images_BCHW: Tensor
    test_labels_B: Tensor
    classes: int


class Dataset(Component):
    """Labelled images, chosen by `data: {name: "plugin:NAME", args: {...}}`; `args` are its parameters."""

    def load(self) -> ImageData:
        """The images, equal each time. The test images are only ever reported on, so none may be in train."""
        raise NotImplementedError(f"{type(self).__name__} must define load()")


class Family(Component):
    """A model of your own, chosen by `model: {name: "plugin:NAME", args: {...}}`; `args` are its parameters.

    What can be compressed is read from timm's own modules, so `build` returns a timm `VisionTransformer` or
    `PyramidVisionTransformerV2` with timm's blocks: with a stem, pooling, size or weights of your own. What
    differs beyond that is refused with a reason by `models inspect plugin:NAME --plugin FILE`.
    """

    def build(self, *, classes: int, channels: int, pretrained: bool) -> nn.Module:
        """The uncompressed model; also called on the meta device, and without `pretrained` to be filled later."""
        raise NotImplementedError(f"{type(self).__name__} must define build(classes, channels, pretrained)")


INFERENCE_KINDS = ("scorer", "aggregator", "cascade")
"""The components that a model needs to run; the others are needed to make and train it."""


@dataclass(frozen=True, slots=True)
class ComponentRef:
    """A component as a space file names it: enough to build it again in another process."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Canonical text: equal for equal components."""
        return json.dumps(self.to_dict(), sort_keys=True, default=str)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **self.params}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ComponentRef:
        """The inverse of `to_dict`; raises KeyError without a name."""
        return cls(data["name"], {k: v for k, v in data.items() if k != "name"})


@dataclass(frozen=True, slots=True)
class Components:
    """The components that a compressed model needs at inference, built."""

    scorer: Scorer
    aggregator: Aggregator
    cascade: Cascade
    refs: tuple[ComponentRef, ComponentRef] | None = field(default=None, compare=False)
    """The names that scorer and aggregator were built by, where they were."""

    def sites(self, plan: CompressionPlan) -> list[Site]:
        """Where `plan` scores or reduces tokens, in order."""
        return [self.site(plan, i) for i in self.scored_blocks(plan)]

    def scored_blocks(self, plan: CompressionPlan) -> list[int]:
        """Indices of the blocks in which `plan` scores or reduces tokens."""
        tokens_in, head_block = plan.tokens_in, plan.head_block
        # Nothing reads the patch tokens after the head block's attention.
        blocks = plan.blocks if head_block is None else plan.blocks[:head_block]
        cuts = [i for i, block in enumerate(blocks) if block.tokens_out < tokens_in[i]]
        if not (cuts and self.scores_uncut):
            return cuts
        # Scores accumulate, up to the last cut.
        return [i for i in range(cuts[-1] + 1) if i in cuts or plan.blocks[i].attention]

    @property
    def scores_uncut(self) -> bool:
        """Whether tokens are scored in blocks that cut none, too."""
        return self.cascade.score_every_block and self.aggregator.needs_scores

    def site(self, plan: CompressionPlan, index: int) -> Site:
        """The site of one block."""
        block, shape = plan.blocks[index], plan.shape
        return Site(
            index,
            plan.tokens_in[index],
            block.tokens_out,
            shape.prefix_tokens,
            shape.class_token,
            plan.embed_dim,
            block.heads,
            block.qk_dim,
            block.v_dim,
            shape.depth,
            shape.grid,
        )
