"""The default sampler: a model of the plans themselves, searched on the shell of the budget."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ucc_search.interfaces import Dimension, Measured, Sampler, SamplerRequest

Point = dict[str, Any]
Key = tuple[Any, ...]
_POOL = 400
_LOSSLESS = 1e-5
"""A plan that loses less than this share of what the worst loses ends the search at its budget."""
_TAUGHT = 256
"""Points at most that the model learns from: its time grows with their cube."""


class Shell(Sampler):
    """Gaussian process over projected plans; candidates are changed copies of the best, projected again.

    Every plan that meets a budget to the last token lies on a thin shell of the space, and only what
    lies there is worth a trial. So the sampler projects before it chooses: it changes one to all
    coordinates of a good plan, projects the result, and keeps what comes out in a pool. From the pool
    it takes the plan with the largest expected improvement, by a Gaussian process over the logarithms
    of the token shares and widths of all plans measured so far. First come the known good points and
    a few random ones.

    Where a study covers a range of budgets, its trials go round the budgets at which there is anything
    new to find. A quarter of each budget's trials goes to known good points, those first of which the
    model expects most there; the model learns from the plans of this budget and of its neighbours; and
    the best plans of these, projected onto this budget, are candidates here.

    Args:
        startup: points before the model is asked, known good ones included; 2 or more.
        candidates: projections per proposal; 1 or more.
    """

    def __init__(self, startup: int = 8, candidates: int = 12) -> None:
        if startup < 2 or candidates < 1:
            raise ValueError(f"startup is {startup} and candidates {candidates}, expected 2 and 1 or more")
        self.startup, self.candidates = startup, candidates

    def start(self, request: SamplerRequest) -> None:
        from ucc_search.builtin.surrogate import Surrogate

        self._request, self._rng = request, random.Random(request.seed)
        self._searched = [d for d in request.dimensions if d.name != "budget"]
        levels = next((d for d in request.dimensions if d.name == "budget"), None)
        self._levels = range(int(levels.low), int(levels.high) + 1) if levels else range(1)
        self._starts = {level: self._starts_of(level) for level in self._levels}
        each = max(1, request.trials // len(self._levels) // 4)
        self._tries = {level: each if levels else len(self._starts[level]) for level in self._levels}
        self._dry: set[int] = set()  # budgets at which nothing is left to find
        self._measured: dict[Key, tuple[Point, float]] = {}
        self._pending: dict[Key, Point] = {}
        self._pool: dict[Key, Point] = {}
        self._model = Surrogate(_groups(self._searched))
        self._turn = 0

    def propose(self) -> Point:
        for _ in self._levels:
            level = self._next_level()
            point = self._first(level) or self._best_candidate(level) or self._random(level)
            if self._new(point):
                break
            self._dry.add(level)
        self._pending[self._key(point)] = point
        self._pool.pop(self._key(point), None)
        return point

    def tell(self, measured: Measured) -> None:
        point, key = dict(measured.point), self._key(measured.point)
        self._pending.pop(key, None)
        self._pool.pop(key, None)
        if measured.values is None:
            value = max((v for _, v in self._measured.values()), default=0.0)  # as bad as anything so far
        else:
            value = -measured.values[0] if self._request.maximize[0] else measured.values[0]
        self._measured[key] = (point, value)
        worst = max(v for _, v in self._measured.values())
        if not self._request.maximize[0] and value < _LOSSLESS * worst:
            self._dry.add(point.get("budget", 0))

    def _starts_of(self, level: int) -> list[Point]:
        """Known good points to try at a budget, those meant for it first; what they leave open is drawn."""
        starts = []
        for start in sorted(self._request.starts, key=lambda s: "budget" not in s):
            if start.get("budget", level) == level:
                starts.append({**{d.name: _uniform(d, self._rng) for d in self._searched}, **start})
        return starts

    def _next_level(self) -> int:
        """Round the budgets, past those at which nothing is left."""
        while True:
            level = self._levels[_spread(self._turn, len(self._levels))]
            self._turn += 1
            if level not in self._dry or len(self._dry) == len(self._levels):
                return level

    def _first(self, level: int) -> Point | None:
        """A known good point, or a random one while few points are known."""
        starts = self._starts[level]
        while starts and self._tries[level] > 0:
            point = self._projected(starts.pop(self._most_promising(starts, level)), level)
            if point is not None and self._new(point):
                self._tries[level] -= 1
                return point
        few = len(self._measured) + len(self._pending) < self.startup
        return self._random(level) if few else None

    def _most_promising(self, starts: Sequence[Point], level: int) -> int:
        """The place of the start to try next at a budget."""
        if "budget" in starts[0] or len(self._levels) == 1:
            return 0
        if len(self._measured) < self.startup:
            return level % len(starts)  # a different one at every budget
        import numpy as np

        self._learn(level)
        points = [self._projected(start, level) or start for start in starts]
        return int(self._model.predict(np.array([self._features(p) for p in points]))[0].argmin())

    def _random(self, level: int) -> Point:
        """A new point anywhere on the shell, if there is one."""
        for _ in range(20):
            drawn = {d.name: _uniform(d, self._rng) for d in self._searched}
            point = self._projected(drawn, level)
            if point is not None and self._new(point):
                return point
        return point or self._with_level(drawn, level)

    def _best_candidate(self, level: int) -> Point | None:
        """The point of the pool from which most is expected."""
        import numpy as np

        from ucc_search.builtin.surrogate import expected_improvement

        if len(self._measured) < 2:
            return None
        known, y = self._learn(level)
        self._grow_pool(self._parents(known, y, level), level)
        pool = [p for p in self._pool.values() if p.get("budget", 0) == level]
        if not pool:
            return None
        x_MD = np.array([self._features(p) for p in pool])
        mean_M, deviation_M = self._model.predict(x_MD)
        # What meets a tighter budget meets this one.
        met = [value for (p, _), value in zip(known, y, strict=True) if p.get("budget", 0) <= level]
        best = min(met) if met else float(mean_M.min())
        gain_M = expected_improvement(mean_M, deviation_M, best)
        self._trim(pool, gain_M.tolist())
        return pool[int(gain_M.argmax())]

    def _learn(self, level: int) -> tuple[list[tuple[Point, float]], list[float]]:
        """Teach the model what matters at a budget: the points it learnt from, and their values for it."""
        import numpy as np

        def away(known: tuple[Point, float]) -> int:
            return abs(int(known[0].get("budget", level)) - level)

        known = list(self._measured.values())
        near = [k for k in known if away(k) <= max(1, round(len(self._levels) / 6))]
        known = near if len(near) >= self.startup else known
        if len(known) > _TAUGHT:
            known = sorted(known, key=lambda k: (away(k), k[1]))[:_TAUGHT]
        logarithmic = not self._request.maximize[0] and min(v for _, v in known) > 0
        # Nearly lossless plans would stretch the scale without end, and so would those of looser budgets.
        nearest = min(away(k) for k in known)
        here = [k[1] for k in known if away(k) == nearest]
        floor = max(1e-4 * max(here), 0.1 * min(here))
        y = [math.log(max(v, floor)) if logarithmic else v for _, v in known]
        self._model.fit(np.array([self._features(p) for p, _ in known]), np.array(y))
        if self._pending:
            self._model.extend(np.array([self._features(p) for p in self._pending.values()]))
        return known, y

    def _parents(self, known: Sequence[tuple[Point, float]], y: Sequence[float], level: int) -> list[Point]:
        """The best points, those of this budget first and of its neighbours next."""
        distance = [abs(p.get("budget", level) - level) for p, _ in known]
        near = sorted(set(distance))[:2]
        chosen = []
        for away in near:
            group = sorted((v, i) for i, v in enumerate(y) if distance[i] == away)
            chosen += [known[i][0] for _, i in group[:6]]
        return chosen

    def _grow_pool(self, parents: Sequence[Point], level: int) -> None:
        """The two best of each neighbouring budget, and changed copies of good points, projected."""
        taken: Counter[int] = Counter()
        for parent in parents:
            budget = parent.get("budget", level)
            taken[budget] += 1
            if budget != level and taken[budget] <= 2:
                self._admit(parent, level)
        for _ in range(self.candidates):
            # The better a parent, the likelier it is chosen.
            place = min(int(self._rng.expovariate(0.5)), len(parents) - 1)
            self._admit(self._changed(parents[place]), level)

    def _admit(self, raw: Point, level: int) -> None:
        point = self._projected(raw, level)
        if point is not None and self._new(point):
            self._pool[self._key(point)] = point

    def _trim(self, pool: Sequence[Point], gains: Sequence[float]) -> None:
        """Forget the least promising points of this budget."""
        most = max(40, _POOL // len(self._levels))
        for i in sorted(range(len(pool)), key=lambda i: -gains[i])[most:]:
            del self._pool[self._key(pool[i])]

    def _changed(self, parent: Point) -> Point:
        """A copy with one, two, three or all coordinates moved."""
        rng, point = self._rng, dict(parent)
        count = rng.choice([1, 2, 2, 3, 3, len(self._searched)])
        size = rng.choice([0.1, 0.3]) if count > 3 else rng.choice([0.1, 0.2, 0.4, 0.8])
        for d in rng.sample(self._searched, min(count, len(self._searched))):
            point[d.name] = _moved(d, point[d.name], size, rng)
        return point

    def _projected(self, point: Mapping[str, Any], level: int) -> Point | None:
        found = self._request.project(self._with_level(point, level))
        return None if found is None else dict(found)

    def _with_level(self, point: Mapping[str, Any], level: int) -> Point:
        return {**point, "budget": level} if len(self._levels) > 1 else dict(point)

    def _new(self, point: Point) -> bool:
        key = self._key(point)
        return key not in self._measured and key not in self._pending

    def _key(self, point: Mapping[str, Any]) -> Key:
        return tuple(round(v, 9) if isinstance(v, float) else v for _, v in sorted(point.items()))

    def _features(self, point: Mapping[str, Any]) -> list[float]:
        """Logarithms of the tokens' shares after each block and of the widths; the rest on 0 to 1."""
        features: list[float] = []
        tokens = 0.0
        for d in self._searched:
            if d.name.startswith("keep."):
                tokens += math.log(point[d.name])
                features.append(tokens)
            elif d.name.startswith("width."):
                features.append(math.log(point[d.name]))
            elif d.choices is not None:
                features += [float(point[d.name] == c) for c in d.choices]
            else:
                features.append(_place(d, point[d.name]))
        return features


def _groups(dimensions: Sequence[Dimension]) -> list[int]:
    """One group for all keep ratios, one per kind of width, one for every other dimension."""
    names: list[str] = []
    for d in dimensions:
        name = "keep" if d.name.startswith("keep.") else d.name
        if d.name.startswith("width."):
            name = ".".join(d.name.split(".")[:2])
        names += [name] * (1 if d.choices is None else len(d.choices))
    order = list(dict.fromkeys(names))
    return [order.index(name) for name in names]


def _spread(turn: int, count: int) -> int:
    """Goes round `count` places, far apart in a row, each equally often."""
    stride = next(s for s in range(max(1, round(0.382 * count)), count + 1) if math.gcd(s, count) == 1)
    return turn * stride % count


def _uniform(d: Dimension, rng: random.Random) -> Any:
    if d.choices is not None:
        return rng.choice(d.choices)
    return _at(d, rng.random())


def _place(d: Dimension, value: float) -> float:
    """Where a value lies in its range, 0 to 1."""
    if d.low == d.high:
        return 0.0
    if d.log:
        return math.log(value / d.low) / math.log(d.high / d.low)
    return (value - d.low) / (d.high - d.low)


def _at(d: Dimension, place: float) -> Any:
    """The value at this place of the range; the inverse of `_place`, on the dimension's steps."""
    value = d.low * (d.high / d.low) ** place if d.log else d.low + (d.high - d.low) * place
    if d.step:
        value = d.low + round((value - d.low) / d.step) * d.step
    return min(max(value, d.low), d.high)


def _moved(d: Dimension, value: Any, size: float, rng: random.Random) -> Any:
    """Another value, `size` away in the logarithm of a ratio, or in the place within a range."""
    if d.choices is not None:
        return rng.choice(d.choices)
    if d.name.startswith(("keep.", "width.")):
        return min(max(value * math.exp(rng.gauss(0.0, size)), d.low), d.high)
    return _at(d, min(max(_place(d, value) + rng.gauss(0.0, size), 0.0), 1.0))
