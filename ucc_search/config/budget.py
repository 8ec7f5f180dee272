"""`budget:`, the limits a candidate must meet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from ucc_search.config.base import TAGS, Frozen
from ucc_search.errors import UserError
from ucc_search.units import parse_amount


class TargetRange(Frozen):
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


def _values(value: Any) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if any(isinstance(v, Mapping | list | tuple) for v in values):
        raise ValueError(
            "holds a range or a list where single values are expected; a range {low, high} stands alone, for macs, "
            "flops or params"
        )
    return values


def _budget_list(value: Any) -> Any:
    return value if isinstance(value, Mapping | TargetRange) else _values(value)


def _target_tag(value: Any) -> str:
    return TAGS[isinstance(value, Mapping | TargetRange)]


Targets = Annotated[
    Annotated[tuple[str | float, ...], Tag(TAGS[0])] | Annotated[TargetRange, Tag(TAGS[1])],
    Discriminator(_target_tag),
    BeforeValidator(_budget_list),
]


class BudgetConfig(Frozen):
    """Upper limits, ANDed; one of `macs`, `flops`, `latency_ms` and, alone, `params` may list several targets.

    Each is searched in turn. A value is a percentage of the uncompressed model ("50%") or absolute ("2.1G",
    4500000000). In place of a list, `macs: {low: 30%, high: 90%}` makes the target itself a dimension of one study.
    """

    macs: Targets | None = None
    flops: Targets | None = None
    """In place of `macs`: twice as many."""
    params: Targets | None = None
    latency_ms: Annotated[tuple[str | float, ...], BeforeValidator(_values)] | None = None
    """Milliseconds of one batch, or a percentage of the uncompressed model's; what batch says `latency`."""
    metrics: Mapping[str, str | float] = Field(default_factory=dict)
    """Limits on prices of plugins (hook `ucc_metrics`), in their unit or in percent of the uncompressed model."""

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if self.macs is not None and self.flops is not None:
            raise ValueError("give `macs` or `flops`, not both (1 MAC is 2 FLOPs)")
        if not self.targets()[0] and not self.metrics:
            raise ValueError("needs at least one of macs, flops, params, latency_ms, metrics")
        if self.latency_ms is not None and not self.latency_ms:
            raise ValueError("latency_ms is empty, expected milliseconds or a percentage such as 50%")
        if self.targets()[0] != "latency_ms" and len(self.latency_ms or ()) > 1:
            raise ValueError(
                "lists several targets of latency_ms beside macs or flops; only one may list several"
            )
        if self.targets()[0] != "params" and self.params is not None and self.params_limit is None:
            raise ValueError(
                f"lists several targets of params beside {self.targets()[0]}; give params one limit, or alone"
            )
        return self

    @property
    def params_limit(self) -> str | float | None:
        """The one limit on parameters; None where there is none, or several."""
        one = isinstance(self.params, tuple) and len(self.params) == 1
        return self.params[0] if one and isinstance(self.params, tuple) else None

    @property
    def one_study(self) -> bool:
        """Whether one study covers all targets."""
        return any(isinstance(x, TargetRange) for x in (self.macs, self.flops, self.params))

    def targets(self) -> tuple[str, tuple[str | float, ...]]:
        """(macs, flops, latency_ms, params or "", its targets), in the order in which they are searched."""
        for name in ("macs", "flops", "latency_ms", "params"):
            found: tuple[str | float, ...] | TargetRange | None = getattr(self, name)
            if found is not None:
                return name, found.values() if isinstance(found, TargetRange) else found
        return "", ()
