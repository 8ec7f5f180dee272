"""The space file: YAML plus `--set` overrides, validated into frozen models. The only YAML reader."""

from __future__ import annotations

from ucc_search.config.budget import BudgetConfig, TargetRange
from ucc_search.config.components import ComponentChoices
from ucc_search.config.latency import LatencyConfig
from ucc_search.config.loading import (
    RESOLVED,
    dump_config,
    load_config,
    parse_config,
    parse_pairs,
    plain_config,
)
from ucc_search.config.run import RunConfig
from ucc_search.config.search import RankSearchConfig, RungConfig, SearchConfig
from ucc_search.config.sources import Bound, DataConfig, ModelConfig
from ucc_search.config.space import Baseline, KeepRatio, Range, SpaceConfig, WidthRange, WidthsConfig
from ucc_search.config.training import (
    AnnealConfig,
    AugmentConfig,
    EmaConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "RESOLVED",
    "AnnealConfig",
    "AugmentConfig",
    "Baseline",
    "Bound",
    "BudgetConfig",
    "ComponentChoices",
    "DataConfig",
    "EmaConfig",
    "KeepRatio",
    "LatencyConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Range",
    "RankSearchConfig",
    "RunConfig",
    "RungConfig",
    "ScheduleConfig",
    "SearchConfig",
    "SpaceConfig",
    "TargetRange",
    "TrainConfig",
    "WidthRange",
    "WidthsConfig",
    "dump_config",
    "load_config",
    "parse_config",
    "parse_pairs",
    "plain_config",
]
