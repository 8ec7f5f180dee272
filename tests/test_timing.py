from __future__ import annotations

import pytest

from ucc_search import timing
from ucc_search.timing import Spread, Timings, interleave


class Clock:
    """A clock that only the timed calls move; `drift` stretches everything, as a busy machine does."""

    def __init__(self, monkeypatch):
        self.now, self.drift, self.log = 0.0, 1.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds * self.drift

        return run


def test_every_round_measures_every_call_once_in_a_new_order(monkeypatch):
    clock = Clock(monkeypatch)
    found = interleave({n: clock.call(n, 1.0) for n in "abcd"}, rounds=6, warmup=1)
    measured = [clock.log[4 * i : 4 * i + 4] for i in range(1, 7)]
    assert all(sorted(order) == list("abcd") for order in measured)
    assert len({tuple(order) for order in measured}) > 1
    assert found.rounds == 6


def test_a_ratio_within_rounds_survives_drift(monkeypatch):
    clock = Clock(monkeypatch)
    fast, slow = clock.call("fast", 1.0), clock.call("slow", 3.0)

    def drifting():
        fast()
        clock.drift *= 1.2

    found = interleave({"fast": drifting, "slow": slow}, rounds=9, warmup=0)
    assert found.of("fast").high > 2
    assert 2.5 <= found.speedup("fast", "slow").median <= 3.6


def test_short_calls_are_repeated_and_their_mean_counts(monkeypatch):
    clock = Clock(monkeypatch)
    found = interleave(
        {"short": clock.call("short", 0.01), "long": clock.call("long", 2.0)}, rounds=3, min_seconds=0.095
    )
    assert clock.log.count("short") == 2 + 3 * 10
    assert clock.log.count("long") == 2 + 3
    assert found.of("short").median == pytest.approx(0.01)
    assert found.speedup("short", "long").median == pytest.approx(200)


def test_no_round_is_started_after_the_time_is_up(monkeypatch):
    clock = Clock(monkeypatch)
    found = interleave({"a": clock.call("a", 1.0)}, rounds=100, warmup=0, max_seconds=2.5)
    assert found.rounds == 3
    assert interleave({"a": clock.call("a", 9.0)}, rounds=100, warmup=0, max_seconds=0.0).rounds == 1


def test_the_device_is_waited_for_inside_the_measurement(monkeypatch):
    clock = Clock(monkeypatch)
    waits = []
    interleave({"a": clock.call("a", 1.0)}, rounds=2, warmup=0, sync=lambda: waits.append(list(clock.log)))
    assert waits == [[], ["a"], ["a"], ["a", "a"]]


def test_rounds_measured_in_pieces_add_up():
    both = Timings({"a": (1.0,), "b": (2.0,)}) + Timings({"a": (3.0,), "b": (3.0,)})
    assert both.seconds == {"a": (1.0, 3.0), "b": (2.0, 3.0)}
    with pytest.raises(ValueError, match="do not add up"):
        both + Timings({"a": (1.0,)})


def test_spread_is_of_the_values_themselves():
    assert Spread.of([5.0]) == (5.0, 5.0, 5.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_nothing_to_time_is_refused():
    with pytest.raises(ValueError, match="0 calls"):
        interleave({})
