"""Fixtures that several test files share."""

from __future__ import annotations

import os

import pytest

# One thread per process, before torch is imported: threads of several processes on few cores wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """Whole runs of one file share their teachers, and see nobody's cache or plugins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCC_SEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("UCC_SEARCH_PLUGINS", raising=False)
        yield


@pytest.fixture
def always_fft(monkeypatch):
    """The spectral filter as FFTs at any length, which is what its declared cost counts.

    A narrow filter, short axes and single images multiply by the same filter as a matrix: more MACs in less time.
    """
    from ucc_search.builtin import low_pass

    monkeypatch.setattr(low_pass, "_TAIL", 0.0)
    monkeypatch.setattr(low_pass, "_SHORT", 0)
    monkeypatch.setattr(low_pass, "_FEW", 0)
