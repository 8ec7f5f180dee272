"""Time callables side by side: interleaved rounds in shuffled order, so that drift hits all alike.

A machine's speed drifts by more than the differences that matter here. So every round times every
callable once, in a new order, and ratios are taken within rounds. Imports no torch; a device that
works ahead of the caller is waited for by `sync`.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """Median and quartiles of repeated measurements."""

    median: float
    low: float  # first quartile
    high: float  # third quartile

    @classmethod
    def of(cls, values: list[float] | tuple[float, ...]) -> Spread:
        """Of one value or more; quartiles of the values themselves, not of a distribution behind them."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one call of every callable, round by round; all have the same number of rounds."""

    seconds: Mapping[str, tuple[float, ...]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def of(self, name: str) -> Spread:
        """Seconds of one call."""
        return Spread.of(self.seconds[name])

    def speedup(self, name: str, base: str) -> Spread:
        """How many times faster `name` is than `base`, from the ratios within rounds."""
        pairs = zip(self.seconds[base], self.seconds[name], strict=True)
        return Spread.of([slow / fast for slow, fast in pairs])

    def __add__(self, other: Timings) -> Timings:
        """The rounds of both, for measurements taken in pieces; the same callables in each."""
        if self.seconds.keys() != other.seconds.keys():
            raise ValueError(
                f"timings of {sorted(self.seconds)} and of {sorted(other.seconds)} do not add up"
            )
        return Timings({k: (*v, *other.seconds[k]) for k, v in self.seconds.items()})


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 9,
    warmup: int = 2,
    min_seconds: float | Mapping[str, float] = 0.0,
    max_seconds: float = math.inf,
    seed: int = 0,
    sync: Callable[[], Any] | None = None,
) -> Timings:
    """Time `calls` against each other.

    Args:
        calls: what to time, by name.
        rounds: how often each is measured; at least 1.
        warmup: unmeasured rounds before; the last of them tells how long one call takes.
        min_seconds: a measurement repeats its call until it should have lasted this long, so that
            short calls are not drowned by the clock; their mean counts. One for all, or by name.
        max_seconds: start no further round after this long (one round is always measured).
        seed: of the order within rounds.
        sync: waits until the device is done, for example `torch.cuda.synchronize`.

    Raises:
        ValueError: no calls, or fewer than one round.
    """
    if not calls or rounds < 1 or warmup < 0:
        raise ValueError(
            f"{len(calls)} calls, {rounds} rounds, {warmup} warm-ups: expected 1, 1 and 0 or more"
        )
    wait = sync or (lambda: None)
    least = min_seconds if isinstance(min_seconds, Mapping) else dict.fromkeys(calls, min_seconds)
    repeats = dict.fromkeys(calls, 1)
    for _ in range(max(warmup, 1 if any(v > 0 for v in least.values()) else 0)):
        for name, call in calls.items():
            took = _seconds(call, 1, wait)
            repeats[name] = max(1, math.ceil(least[name] / max(took, 1e-9)))
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for _ in range(rounds):
        for name in order.sample(sorted(calls), len(calls)):
            seconds[name].append(_seconds(calls[name], repeats[name], wait))
        if time.perf_counter() - start > max_seconds:
            break
    return Timings({name: tuple(values) for name, values in seconds.items()})


def _seconds(call: Callable[[], Any], repeats: int, wait: Callable[[], Any]) -> float:
    """Mean duration of one call."""
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats
