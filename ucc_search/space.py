"""What the search may change (`SearchSpace`) and one point of it (`Candidate`). No torch, no optuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ucc_search.config import Range, SpaceConfig, WidthsConfig
from ucc_search.errors import ConfigError
from ucc_search.interfaces import INFERENCE_KINDS, ComponentRef, Dimension
from ucc_search.plan import CompressionPlan, ModelShape
from ucc_search.plugins import Plugins
from ucc_search.strength import three_stages
from ucc_search.widths import Ratios, Widths

_WIDTH = "width."
KINDS = (*INFERENCE_KINDS, "distiller", "importance")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sampled point, decoded: components with their parameters, keep ratios and width ratios.

    A baseline is a point too, without ratios.
    """

    params: Mapping[str, Any]
    components: Mapping[str, ComponentRef]
    keep_ratios: tuple[float, ...] | None
    widths: WidthsConfig
    ratios: Ratios | None = None


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Named dimensions, stable across runs of one space file."""

    dimensions: tuple[Dimension, ...]
    config: SpaceConfig
    widths: Widths
    depth: int
    blocks_with_keep: int
    """Blocks whose keep ratio is searched; the last is not where nothing reads its patch tokens."""

    @classmethod
    def of(cls, config: SpaceConfig, shape: ModelShape, plugins: Plugins) -> SearchSpace:
        """The space of a space file for one model.

        Raises:
            PluginError: an unknown component or parameter.
            ConfigError: a parameter range that is no range.
        """
        dimensions: list[Dimension] = []
        declared = {k: tuple(plugins.with_ranges(k, ref) for ref in getattr(config, k)) for k in KINDS}
        config = config.model_copy(update=declared)
        for kind in KINDS:
            refs: Sequence[ComponentRef] = getattr(config, kind)
            if len(refs) > 1:
                dimensions.append(Dimension(kind, choices=tuple(range(len(refs)))))
            for ref in refs:
                plugins.check(kind, ref)
                dimensions += _parameter_dimensions(kind, ref)
        keep, widths = 0, Widths(config.widths, shape)
        proposes = any(getattr(plugins.get("cascade", ref.name), "searched", False) for ref in config.cascade)
        if proposes and not shape.stages:
            keep = shape.depth - (1 if spares_last_block(config, shape) else 0)
            bounds = config.keep_ratio
            dimensions += [Dimension(f"keep.{i}", bounds.low, bounds.high) for i in range(keep)]
        dimensions += [Dimension(_WIDTH + name, r.low, r.high) for name, r in widths.searched().items()]
        if widths:
            widths.at(CompressionPlan.identity(shape), None, 1.0)  # refuses what the model cannot have
        return cls(tuple(dimensions), config, widths, shape.depth, keep)

    def decode(self, params: Mapping[str, Any]) -> Candidate:
        """The candidate these sampled values stand for."""
        components = {}
        for kind in KINDS:
            refs: Sequence[ComponentRef] = getattr(self.config, kind)
            ref = refs[params[kind]] if len(refs) > 1 else refs[0]
            values = {
                key: params[_name(kind, ref, key)] if isinstance(value, Mapping) else value
                for key, value in ref.params.items()
            }
            components[kind] = ComponentRef(ref.name, values)
        keep = tuple(params[f"keep.{i}"] for i in range(self.blocks_with_keep))
        padded = keep + (1.0,) * (self.depth - len(keep))
        ratios = {name: params[_WIDTH + name] for name in self.widths.searched()}
        return Candidate(
            dict(params), components, padded if keep else None, self.config.widths, ratios or None
        )

    def corners(self) -> list[Candidate]:
        """One candidate for every combination of components, other parameters at the start of their range."""
        import itertools

        start = {d.name: d.choices[0] if d.choices is not None else d.low for d in self.dimensions}
        searched = [d for d in self.dimensions if d.name in KINDS]
        combinations = itertools.product(*(d.choices or () for d in searched))
        return [
            self.decode({**start, **dict(zip((d.name for d in searched), values, strict=True))})
            for values in combinations
        ]

    def at_plan(self, params: Mapping[str, Any], plan: CompressionPlan) -> dict[str, Any]:
        """The same point with the ratios of the plan that was measured.

        Many proposals are projected onto one plan; the optimiser must learn from the point that was
        measured, not from the one it proposed.
        """
        told = dict(params)
        for i in range(self.blocks_with_keep):
            ratio = plan.tokens[i] / plan.tokens_in[i]
            told[f"keep.{i}"] = min(max(ratio, self.config.keep_ratio.low), self.config.keep_ratio.high)
        ranges = self.widths.searched()
        for name, ratio in self.widths.ratios(plan).items():
            told[_WIDTH + name] = min(max(ratio, ranges[name].low), ranges[name].high)
        return told

    def known_good(self) -> list[dict[str, float]]:
        """Hand-made points to start from: schedules of tokens, uniform widths, and both together."""
        schedules, widths = self._known_schedules(), self._known_widths()
        if not schedules or not widths:
            return schedules or widths
        no_cuts = dict.fromkeys(schedules[0], self.config.keep_ratio.high)
        full = {_WIDTH + name: r.high for name, r in self.widths.searched().items()}
        return [
            *({**s, **full} for s in schedules[:2]),
            *({**no_cuts, **w} for w in widths),
            *({**schedules[0], **w} for w in widths[:1]),
        ]

    def starting_at(self, ratios: Ratios) -> dict[str, float]:
        """A point with these width ratios, and nothing else pruned."""
        high = {f"keep.{i}": self.config.keep_ratio.high for i in range(self.blocks_with_keep)}
        for name, bounds in self.widths.searched().items():
            high[_WIDTH + name] = min(max(ratios.get(name, bounds.high), bounds.low), bounds.high)
        return high

    def _known_widths(self) -> list[dict[str, float]]:
        """All alike; and all alike but for the embedding and the depth, which every layer depends on."""
        ranges = self.widths.searched()
        if not ranges:
            return []
        alike = {_WIDTH + name: max(0.7, r.low) for name, r in ranges.items()}
        inner = {
            _WIDTH + name: r.high if name.startswith(("embed", "depth")) else max(0.6, r.low)
            for name, r in ranges.items()
        }
        return [
            {k: min(v, ranges[k.removeprefix(_WIDTH)].high) for k, v in p.items()} for p in (inner, alike)
        ]

    def _known_schedules(self) -> list[dict[str, float]]:
        """Keep ratios: geometric, staged, early and late cuts."""
        count, bounds = self.blocks_with_keep, self.config.keep_ratio
        if not count:
            return []
        stages = three_stages(self.depth)
        shapes = [
            [0.8 if i else 1.0 for i in range(count)],
            [0.5 if i in stages else 1.0 for i in range(count)],
            [0.8 for _ in range(count)],
            [1.0 - 0.5 * i / max(1, count - 1) for i in range(count)],
        ]
        return [
            {f"keep.{i}": min(max(r, bounds.low), bounds.high) for i, r in enumerate(ratios)}
            for ratios in shapes
        ]


def spares_last_block(config: SpaceConfig, shape: ModelShape) -> bool:
    """Whether plans compute the last block only for the tokens the head reads."""
    return config.head_tokens_only and shape.head_tokens > 0 and shape.depth > 1


def _name(kind: str, ref: ComponentRef, key: str) -> str:
    return f"{kind}.{ref.name}.{key}"


def _parameter_dimensions(kind: str, ref: ComponentRef) -> list[Dimension]:
    found = []
    for key, value in ref.params.items():
        if not isinstance(value, Mapping):
            continue
        name = _name(kind, ref, key)
        try:
            wanted = Range.model_validate(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(
                f"space.{name} is {dict(value)}, expected a value, {{low, high, log, step}} or {{choices}} ({reason})"
            ) from None
        if wanted.choices is not None:
            found.append(Dimension(name, choices=wanted.choices))
        else:
            assert wanted.low is not None and wanted.high is not None
            found.append(Dimension(name, wanted.low, wanted.high, wanted.log, wanted.step))
    return found
