"""Expected durations: what one model taught says nothing of another."""

from __future__ import annotations

import pytest
from rows import config, row, zero_shot

from ucc_search import estimate


def test_a_model_is_judged_by_its_own_trials(tmp_path, monkeypatch):
    monkeypatch.setenv("UCC_SEARCH_CACHE", str(tmp_path))
    small, other = config(), config(model={"name": "small_vit", "args": {"depth": 3}})
    assert estimate.seconds(small, 10_000_000, 1000) is None
    estimate.remember([zero_shot(0, seconds=2.0), row(1, seconds=8.0)], small)
    expected = estimate.seconds(small, 10_000_000, 1000)
    assert expected is not None and expected > 0
    assert estimate.seconds(other, 10_000_000, 1000) is None
    estimate.remember([zero_shot(0, seconds=200.0), row(1, seconds=800.0)], other)
    assert estimate.seconds(small, 10_000_000, 1000) == expected
    assert estimate.seconds(other, 10_000_000, 1000) == pytest.approx(100 * expected)
