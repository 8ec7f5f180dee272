"""Every hook, on one screen. A plugin implements the ones it needs and decorates them with `hookimpl`.

Each hook is called once per process, has no side effects, and returns a mapping from the name that
space files use to a factory: usually the class itself. Its keyword arguments are the component's
parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pluggy

from ucc_search.interfaces import (
    Aggregator,
    Cascade,
    Dataset,
    Distiller,
    Family,
    Importance,
    Metric,
    Observer,
    Sampler,
    Scorer,
)

PROJECT = "ucc_search"
HOOKSPEC_VERSION = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def ucc_scorers() -> Mapping[str, Callable[..., Scorer]]:  # type: ignore[empty-body]
    """Token scorers: score patch tokens, the highest are kept."""


@hookspec
def ucc_aggregators() -> Mapping[str, Callable[..., Aggregator]]:  # type: ignore[empty-body]
    """Aggregators: choose the tokens that stay and what becomes of the others."""


@hookspec
def ucc_cascades() -> Mapping[str, Callable[..., Cascade]]:  # type: ignore[empty-body]
    """Cascade schedulers: the token schedule over depth, and how scores accumulate."""


@hookspec
def ucc_distillers() -> Mapping[str, Callable[..., Distiller]]:  # type: ignore[empty-body]
    """Distillers: training losses from a teacher."""


@hookspec
def ucc_importances() -> Mapping[str, Callable[..., Importance]]:  # type: ignore[empty-body]
    """Importance criteria: choose the channels, heads, hidden units and half-blocks that stay."""


@hookspec
def ucc_samplers() -> Mapping[str, Callable[..., Sampler]]:  # type: ignore[empty-body]
    """Samplers: propose the points of the search."""


@hookspec
def ucc_metrics() -> Mapping[str, Callable[..., Metric]]:  # type: ignore[empty-body]
    """Metrics: prices that a budget may limit, beside MACs, parameters and latency."""


@hookspec
def ucc_observers() -> Mapping[str, Callable[..., Observer]]:  # type: ignore[empty-body]
    """Observers: are told when a run starts, a trial finishes and the run ends."""


@hookspec
def ucc_datasets() -> Mapping[str, Callable[..., Dataset]]:  # type: ignore[empty-body]
    """Data sets: images and labels of your own, as `data.name: plugin:NAME`."""


@hookspec
def ucc_families() -> Mapping[str, Callable[..., Family]]:  # type: ignore[empty-body]
    """Model families: build a model of timm's blocks, as `model.name: plugin:NAME`."""
