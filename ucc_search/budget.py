"""Budgets, and the projection of a plan onto them: whole units, never over, nothing left unused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ucc_search.config import BudgetConfig
from ucc_search.costs import Cost, Price, Pricer, cost
from ucc_search.errors import BudgetError
from ucc_search.interfaces import Components, Metric
from ucc_search.plan import WHOLE_FIELDS, BlockPlan, CompressionPlan
from ucc_search.units import format_macs, format_params, parse_amount
from ucc_search.widths import Ratios, Widths

Profile = Callable[[float], Sequence[float]]
_FULL = 0.995
"""A plan that uses this share of the MACs is not worth a further cut."""
LATENCY = "latency_ms"
"""The limit that is priced by a table of measured times (`ucc_search.latency`)."""


@dataclass(frozen=True, slots=True)
class Limit:
    """An upper limit on latency, or on a price of a plugin."""

    name: str
    most: float
    metric: Metric
    whole: float
    """The uncompressed model's value."""

    def over(self, value: float) -> float:
        """How far over the limit a value is, as a share of it; at most 0 is within."""
        return value / self.most - 1


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper limits on a plan, all of which must hold; integers per image."""

    label: str
    """As the user wrote the target, for example `macs=50%`."""
    max_macs: int | None = None
    max_params: int | None = None
    limits: tuple[Limit, ...] = ()
    """Of other prices: latency, and those of plugins."""

    def holds(self, value: Cost | Price) -> bool:
        within_macs = self.max_macs is None or value.macs <= self.max_macs
        return within_macs and (self.max_params is None or value.params <= self.max_params)

    def admits(self, plan: CompressionPlan, price: Cost | Price, components: Components) -> bool:
        """Whether all limits hold; the cheap ones are asked first."""
        return self.holds(price) and all(x.metric.value(plan, components) <= x.most for x in self.limits)

    def over(self, macs: int, params: int) -> dict[str, float]:
        """By limit, how far over it a price is, as a share of it; at most 0 is within. Other prices: `Limit.over`."""
        limits = {"macs": (macs, self.max_macs), "params": (params, self.max_params)}
        return {k: value / most - 1 for k, (value, most) in limits.items() if most is not None}


def budgets(
    config: BudgetConfig, dense: Cost, limits: Mapping[str, tuple[Metric, float]] | None = None
) -> list[Budget]:
    """One budget per listed target.

    Args:
        limits: by name of `config.metrics`, and for `latency_ms`, the metric and its value for the uncompressed model.

    Raises:
        BudgetError: a value is neither a percentage nor an amount.
    """
    one = config.params_limit
    params = None if one is None else _limit(one, dense.params, "budget.params")
    limits = limits or {}

    def limit(name: str, value: str | float, section: str = "budget.metrics") -> Limit:
        metric, whole = limits[name]
        return Limit(name, _limit_of(value, whole, f"{section}.{name}"), metric, whole)

    others = [limit(name, value) for name, value in config.metrics.items()]
    timed = [limit(LATENCY, value, "budget") for value in config.latency_ms or ()]
    metric, targets = config.targets()
    given = {} if one is None else {"params": one}
    if metric != LATENCY and config.latency_ms is not None:
        others += timed
        given[LATENCY] = config.latency_ms[0]  # beside other targets there is one alone
    beside = [label(name, v) for name, v in (given | dict(config.metrics)).items() if name != metric]

    def budget(value: str | float | None, **limits: Any) -> Budget:
        target = [] if value is None else [label(metric, value)]
        return Budget(",".join(target + beside), **{"max_params": params, "limits": tuple(others), **limits})

    if not targets:
        return [budget(None)]
    if metric == LATENCY:
        return [budget(v, limits=(*others, t)) for v, t in zip(targets, timed, strict=True)]
    if metric == "params":
        return [budget(v, max_params=_limit(v, dense.params, "budget.params")) for v in targets]
    per_mac = 2 if metric == "flops" else 1
    return [
        budget(v, max_macs=_limit(v, per_mac * dense.macs, f"budget.{metric}") // per_mac) for v in targets
    ]


def label(metric: str, value: str | float) -> str:
    """How a limit is named in tables: `macs=50%`."""
    return f"{metric}={_text(value)}"


def _limit_of(value: str | float, whole: float, key: str) -> float:
    """A limit in the metric's own unit; a percentage is of the uncompressed model's value."""
    text = _text(value)
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    percent = text.endswith("%")
    if not 0 < number < math.inf or (percent and number > 100):
        raise BudgetError(f"{key} is {text!r}, expected a percentage up to 100% or a positive number")
    return whole * number / 100 if percent else number


def _text(value: str | float | None) -> str:
    whole = isinstance(value, float) and value.is_integer()
    return f"{value:.0f}" if whole else str(value).replace(" ", "")


def _limit(value: str | float, dense: int, key: str) -> int:
    text = _text(value)
    if not text.endswith("%"):
        amount = parse_amount(text, key=key)
        if amount <= 100:
            raise BudgetError(f"{key} is {text}, less than any model costs; did you mean {text}%?")
        return amount
    try:
        percent = float(text[:-1])
    except ValueError:
        percent = math.nan
    if not 0.0 < percent <= 100.0:
        raise BudgetError(
            f"{key} is {text!r}, expected a percentage above 0% and up to 100%, or an amount such as 2.1G"
        )
    return int(dense * percent / 100.0)


def project(
    plan: CompressionPlan,
    profile: Profile,
    budget: Budget,
    components: Components,
    widths: Widths | None = None,
    ratios: Ratios | None = None,
    price: Pricer | None = None,
) -> CompressionPlan:
    """The largest plan of a family that meets the budget, filled to the last token.

    One strength moves tokens and widths together. It is bisected to where the rounded plan first
    fits. What is left of the budget is then spent on single steps of width, those that keep least
    first, and after them token by token, in the order in which the family itself would give tokens
    back, until nothing fits any more; blocks that keep equally many get their token together, unless
    more than 0.5 % of the MACs would stay unused (see `_fill`). The result is a pure function of its
    arguments; a larger budget never gives a cheaper plan, and projecting the result's own ratios again
    gives the result.

    Args:
        plan: everything but tokens and widths.
        profile: real-valued tokens after each block for a strength from 0 to 1, non-increasing.
        widths: what may become narrower; None leaves all widths.
        ratios: the proposed widths (see `Widths.family`).
        price: of plans with these components; one that is kept from call to call knows most blocks.

    Raises:
        BudgetError: even the strongest plan is too expensive.
    """

    narrowed = widths.family(plan, ratios) if widths else None

    def at(strength: float) -> CompressionPlan:
        narrow = narrowed(strength) if narrowed else plan
        return with_tokens(narrow, whole_tokens(profile(strength), plan.shape.tokens))

    price = price or Pricer(components)

    def fits(candidate: CompressionPlan) -> bool:
        return budget.admits(candidate, price(candidate), components)

    weakest, strongest = at(0.0), at(1.0)
    if fits(weakest):
        return weakest.replace()
    if not fits(strongest):
        dense = cost(CompressionPlan.identity(plan.shape))
        advice = _advice(plan, narrows=bool(widths))
        for limit in budget.limits if budget.holds(price(strongest)) else ():
            least = limit.metric.value(strongest, components)
            if least > limit.most:
                raise _below(budget, limit, least, advice)
        raise unreachable(budget, cost(strongest, components), dense, advice, narrows=bool(widths))
    found, high = _first_that_fits(at, fits, weakest, strongest)
    before, real = None, profile(high)
    while found != before:
        # Tokens given back may end a cut, and what scoring it cost pays for another step of width.
        before = found
        found = _fill(_widen(found, widths, fits) if widths else found, real, fits)
        if budget.max_macs is None or price(found).macs < _FULL * budget.max_macs:
            found = _fill(found, real, fits, split=True)
    return found.replace()  # checked


def _first_that_fits(
    at: Callable[[float], CompressionPlan],
    fits: Callable[[CompressionPlan], bool],
    above: CompressionPlan,
    below: CompressionPlan,
) -> tuple[CompressionPlan, float]:
    """The largest plan of the family that fits, and its strength, to 1e-12 or until no plan lies between.

    Args:
        above: at strength 0, does not fit.
        below: at strength 1, fits.
    """
    low, high = 0.0, 1.0
    while high - low > 1e-12 and not _one_token_apart(above, below):
        middle = (low + high) / 2
        plan = at(middle)
        if fits(plan):
            below, high = plan, middle
        else:
            above, low = plan, middle
    return below, high


def _one_token_apart(above: CompressionPlan, below: CompressionPlan) -> bool:
    """Whether the plans differ by one token in one block and nothing else, so that none lies between."""
    more = [(a, b) for a, b in zip(above.blocks, below.blocks, strict=True) if a != b]
    if len(more) != 1 or any(getattr(above, n) != getattr(below, n) for n in WHOLE_FIELDS):
        return False
    a, b = more[0]
    return a.tokens_out == b.tokens_out + 1 and replace(a, tokens_out=b.tokens_out) == b


def _widen(plan: CompressionPlan, widths: Widths, fits: Callable[[CompressionPlan], bool]) -> CompressionPlan:
    """Single steps of width, as long as one fits."""
    too_much: set[str] = set()  # a step that does not fit costs no less when others were taken
    while True:
        for name, narrow in widths.grown(plan, too_much):
            wider = with_tokens(narrow, plan.tokens)
            if wider != plan and fits(wider):
                plan = wider
                break
            too_much.add(name)
        else:
            return plan


def with_tokens(plan: CompressionPlan, tokens: Sequence[int]) -> CompressionPlan:
    """The plan with these tokens; none are cut where nothing scores them or nothing reads them after.

    Args:
        tokens: from 1 to the model's, never growing with depth.
    """
    if plan.shape.stages:
        return plan  # a pyramid's tokens are never cut
    blocks, left, head_block = [], plan.shape.tokens, plan.head_block
    for i, (b, count) in enumerate(zip(plan.blocks, tokens, strict=True)):
        if b.attention and (head_block is None or i < head_block):
            left = count
        blocks.append(
            b
            if b.tokens_out == left
            else BlockPlan(left, b.heads, b.qk_dim, b.v_dim, b.mlp_hidden, b.mlp_rank, b.attention, b.mlp)
        )
    return plan.unchecked(blocks)


def whole_tokens(real: Sequence[float], most: int) -> list[int]:
    """Rounded to the nearest whole token, at least 1, never growing with depth."""
    tokens: list[int] = []
    for value in real:
        most = min(most, max(1, math.floor(value + 0.5)))
        tokens.append(most)
    return tokens


def _fill(
    plan: CompressionPlan,
    real: Sequence[float],
    fits: Callable[[CompressionPlan], bool],
    *,
    split: bool = False,
) -> CompressionPlan:
    """Give tokens back while any fit; first where the family is nearest to one more.

    A token goes to a whole run of blocks that keep equally many. With `split` it may also go to the first
    of them alone: that spends more of the budget, but opens one more place where tokens are scored and cut,
    which takes time that no MAC counts. Or a run gets as many as the block before it: a cut that costs more
    than it saves ends.
    """
    last = plan.shape.depth
    grew = True
    while grew:
        grew = False
        now = plan.tokens
        for first in sorted(range(last), key=lambda i: (now[i] - real[i], -i)):
            run = _end_of_run(plan.tokens, first, last)
            ones = [(first + 1, False)] if split else []
            for end, whole in (*ones, (run, False), (run, True)):
                candidate = _more(plan, first, end, whole=whole)
                if candidate is not None and fits(candidate):
                    plan, grew = candidate, True
                    break
    return plan


def _end_of_run(tokens: Sequence[int], first: int, last: int) -> int:
    end = first + 1
    while end < last and tokens[end] == tokens[first]:
        end += 1
    return end


def _more(plan: CompressionPlan, first: int, end: int, *, whole: bool) -> CompressionPlan | None:
    """More tokens in the blocks from `first` up to `end`: one, or as many as the block before has, if more."""
    tokens = list(plan.tokens)
    most = tokens[first - 1] if first else plan.shape.tokens
    least = tokens[first] + (2 if whole else 1)
    if least > most:
        return None
    count = most if whole else least
    more = with_tokens(plan, [count if first <= i < end else n for i, n in enumerate(tokens)])
    return more if more.tokens != plan.tokens else None


def _below(budget: Budget, limit: Limit, least: float, advice: str) -> BudgetError:
    unit, share = limit.metric.unit, 100 * least / limit.whole if limit.whole else math.inf
    text = (
        f"budget {budget.label}: {limit.name} of at most {limit.most:.4g} {unit} is below the smallest "
        f"plan's {least:.4g} {unit}; "
    )
    if share >= 100:
        batch = ", or a larger latency.batch" if limit.name == LATENCY else ""
        return BudgetError(
            f"{text}the uncompressed model has {limit.whole:.4g} {unit}, so what is cut costs as much as it saves; "
            f"{advice}{batch}"
        )
    return BudgetError(f"{text}reachable are {share:.1f}% to 100% of {limit.whole:.4g} {unit}; {advice}")


def unreachable(budget: Budget, smallest: Cost, dense: Cost, advice: str, *, narrows: bool) -> BudgetError:
    """Names the reachable range and what to do."""
    if budget.max_params is not None and smallest.params > budget.max_params:
        return BudgetError(
            f"budget {budget.label}: {format_params(budget.max_params)} are below the smallest plan's "
            f"{format_params(smallest.params)}; pruning tokens removes none: raise the budget or {_narrower(narrows)}"
        )
    share = 100 * smallest.macs / dense.macs
    return BudgetError(
        f"budget {budget.label}: {format_macs(budget.max_macs or 0)} is below the smallest plan's "
        f"{format_macs(smallest.macs)}; reachable are {share:.1f}% to 100% of {format_macs(dense.macs)}; {advice}"
    )


def _advice(plan: CompressionPlan, *, narrows: bool) -> str:
    tokens = [] if plan.shape.stages else ["lower space.keep_ratio.low"]
    return ", ".join(["raise the budget", *tokens]) + f" or {_narrower(narrows)}"


def _narrower(narrows: bool) -> str:
    return "lower the bounds of space.widths" if narrows else "give space.widths ranges"
