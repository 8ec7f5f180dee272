"""A whole space file."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from ucc_search.config.base import Frozen
from ucc_search.config.budget import BudgetConfig
from ucc_search.config.components import Observers
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
