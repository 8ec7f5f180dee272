"""The contract of samplers, line by line."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ucc_search.interfaces import Dimension, Measured, Sampler, SamplerRequest
from ucc_search.testing.core import Broken, Check

_DIMENSIONS = (
    Dimension("keep.0", 0.3, 1.0),
    Dimension("scorer.x.weight", 1e-3, 1.0, log=True),
    Dimension("scorer.x.count", 1, 9, step=1),
    Dimension("aggregator", choices=(0, 1, 2)),
)
_START = {"keep.0": 0.8, "aggregator": 1}


def _request(seed: int = 0, starts: Sequence[Mapping[str, Any]] = (_START,)) -> SamplerRequest:
    return SamplerRequest(_DIMENSIONS, (False,), seed, 12, starts, lambda point: dict(point))


def _searched(sampler: Sampler, request: SamplerRequest, count: int = 12) -> list[dict[str, Any]]:
    sampler = copy.deepcopy(sampler)  # an instance serves one study
    sampler.start(request)
    points: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    for index in range(count):
        point = dict(sampler.propose())
        points.append(point)
        waiting.append(point)
        if index % 3 == 0:
            continue  # several are asked for before the first is told
        while waiting:
            told = waiting.pop(0)
            value = None if len(points) % 5 == 0 else (told["keep.0"] - 0.6) ** 2
            sampler.tell(Measured(told, None if value is None else (value,), {"macs": -0.1}))
    return points


def proposals_are_points(sampler: Sampler) -> None:
    for point in (*_searched(sampler, _request()), *_searched(sampler, _request(starts=()))):
        for dimension in _DIMENSIONS:
            value = point.get(dimension.name)
            inside = (
                value in dimension.choices
                if dimension.choices is not None
                else isinstance(value, int | float) and dimension.low <= value <= dimension.high
            )
            whole = dimension.step != 1 or isinstance(value, int)
            if not inside or not whole:
                raise Broken(
                    f"proposed {dimension.name} = {value!r}, allowed is {dimension}",
                    "give every dimension a value within its bounds, on its step, or one of its choices",
                    method="propose",
                )


def the_seed_decides(sampler: Sampler) -> None:
    first, second, third = (_searched(sampler, _request(seed)) for seed in (0, 0, 1))
    if first != second:
        raise Broken("other proposals for the same seed", "draw from request.seed alone", method="start")
    if first == third and len({json.dumps(p, sort_keys=True) for p in first}) > 1:
        raise Broken("the same proposals for another seed", "draw from request.seed", method="start")


SAMPLER_CHECKS = (
    Check("points", "proposals have a value for every dimension, within bounds", proposals_are_points),
    Check("seed", "the seed, and nothing else, decides", the_seed_decides),
)
