"""`space:` and `baselines:`, what a search may change and what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from ucc_search.config.base import TAGS, Frozen
from ucc_search.config.components import Choices, ComponentChoices
from ucc_search.interfaces import ComponentRef


class Range(Frozen):
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


class KeepRatio(Frozen):
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


class WidthRange(Frozen):
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


def _width_tag(value: Any) -> str:
    return TAGS[isinstance(value, Mapping | WidthRange)]


Width = Annotated[
    Annotated[float, Field(gt=0.0, le=1.0), Tag(TAGS[0])] | Annotated[WidthRange, Tag(TAGS[1])],
    Discriminator(_width_tag),
]


class WidthsConfig(Frozen):
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
