"""A whole space file."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from ucc_search.config.base import Frozen
from ucc_search.config.budget import BudgetConfig
from ucc_search.config.components import Observers
from ucc_search.config.latency import LatencyConfig
from ucc_search.config.search import SearchConfig
from ucc_search.config.sources import DataConfig, ModelConfig
from ucc_search.config.space import Baseline, SpaceConfig
from ucc_search.config.training import TrainConfig


class RunConfig(Frozen):
    """One whole space file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Of the run; its folder is `results/NAME` by default."""
    model: ModelConfig
    data: DataConfig
    budget: BudgetConfig
    latency: LatencyConfig | None = None
    """What `budget.latency_ms` is measured under; given alone, latencies are recorded without a limit."""
    space: SpaceConfig = SpaceConfig()
    search: SearchConfig = SearchConfig()
    train: TrainConfig = TrainConfig(epochs=1.0)
    teacher: TrainConfig | None = None
    """How `train-teacher` (or `checkpoint: auto`) trains the model first."""
    baselines: tuple[Baseline, ...] = ()
    plugins: tuple[str, ...] = ()
    """Plugins to load: .py files, folders or modules."""
    observers: Observers = ()
    """Who is told of trials as they finish, by name, with parameters."""

    @model_validator(mode="after")
    def _gpu_for_each(self) -> RunConfig:
        gpus, workers = self.search.gpus_per_trial, self.train.workers
        if gpus and workers > 1 and gpus < workers:
            raise ValueError(
                f"search.gpus_per_trial is {gpus:g} and train.workers is {workers}, expected a GPU for each worker"
            )
        return self

    @model_validator(mode="after")
    def _ranks_by_price(self) -> RunConfig:
        budget = self.budget
        if self.search.ranks is not None and not (budget.targets()[0] in ("macs", "flops") or budget.params):
            raise ValueError(
                "search.ranks weighs MACs and parameters alone: give budget.macs, flops or params as well, or leave "
                "search.ranks out"
            )
        return self

    @property
    def timing(self) -> LatencyConfig | None:
        """What latencies are measured under; None where none are asked for."""
        return self.latency or (LatencyConfig() if self.budget.latency_ms is not None else None)

    def without_latency(self) -> RunConfig:
        """The same without the limits on latency, for those who know no table."""
        return self.model_copy(
            update={"budget": self.budget.model_copy(update={"latency_ms": None}), "latency": None}
        )

    @field_validator("teacher")
    @classmethod
    def _alone(cls, teacher: TrainConfig | None) -> TrainConfig | None:
        if teacher is not None and (teacher.workers > 1 or teacher.anneal is not None):
            raise ValueError(
                "a teacher is trained by one process and keeps its tokens: leave workers and anneal out"
            )
        return teacher

    @field_validator("baselines")
    @classmethod
    def _distinct(cls, baselines: tuple[Baseline, ...]) -> tuple[Baseline, ...]:
        names = [b.name for b in baselines]
        if len(set(names)) != len(names):
            raise ValueError(f"baselines need different names, got {names}")
        return baselines
