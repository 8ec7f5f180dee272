"""`search:`, how much is tried, where, and what climbs the ladder."""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ucc_search.config.base import Frozen
from ucc_search.config.components import Choice
from ucc_search.config.training import TrainConfig
from ucc_search.interfaces import ComponentRef


class RankSearchConfig(Frozen):
    """Differentiable selection of ranks (COMCAT, section 3.3), whose result the search starts from."""

    levels: int = Field(6, ge=2)
    """Ranks to choose from, per product and MLP."""
    rounds: int = Field(4, ge=1)
    """Each updates the gates, then the weights."""
    gate_steps: int = Field(100, ge=1)
    weight_steps: int = Field(100, ge=1)
    batch_size: int = Field(96, ge=1)
    held_out: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of the training split that the gates alone are trained on."""
    lr: float = Field(1e-2, gt=0.0)
    weight_lr: float = Field(1e-4, gt=0.0)
    beta: float = Field(1.5, ge=1.0)
    """Exponent of the price in the loss, while that is above the budget."""


class RungConfig(Frozen):
    """One step of the ladder: how trials are measured on it, and which of the rung below climb onto it."""

    rung: Literal["zero-shot", "train"]
    """`zero-shot`: KL and accuracy on the calibration images, without training. `train`: the start of the
    training that `train:` describes, or with neither steps nor epochs the whole of it."""
    steps: int | None = Field(None, ge=1)
    """Training stops here; a trial that climbs on goes on from this step, by the same learning rates."""
    epochs: float | None = Field(None, gt=0.0)
    """The same in passes over the training images."""
    keep: int | float | None = None
    """How many of the rung below climb on, per budget and set of components, the best first: a whole number, or
    a share (rounded up). The lowest rung takes every proposal."""
    seeds: tuple[int, ...] = (0,)
    """Each trial of this rung is trained once per seed."""

    @field_validator("keep", mode="before")
    @classmethod
    def _number_or_share(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is None or number or (isinstance(value, float) and 0.0 < value < 1.0):
            return value
        raise ValueError(f"got {value!r}, expected a whole number of trials or a share above 0 and below 1")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return _distinct_seeds(seeds)

    @model_validator(mode="after")
    def _length(self) -> RungConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give either `steps` or `epochs`")
        trained = {"steps", "epochs", "seeds"} & self.model_fields_set
        if self.rung == "zero-shot" and any(getattr(self, k) not in (None, (0,)) for k in trained):
            raise ValueError("a zero-shot rung trains nothing, leave steps, epochs and seeds out")
        return self

    @property
    def whole(self) -> bool:
        """Training to the end."""
        return self.rung == "train" and self.steps is None and self.epochs is None

    def stop(self, train: TrainConfig, images: int) -> int:
        """Optimiser steps that a trial of this rung has behind it, over a training split of this many images."""
        if self.rung == "zero-shot":
            return 0
        if self.whole:
            return train.total_steps(images)
        return train.model_copy(update={"steps": self.steps, "epochs": self.epochs}).total_steps(images)


def _distinct_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"got {list(seeds)}, expected one or more different integers")
    return seeds


class SearchConfig(Frozen):
    """How much is tried, and what is promoted."""

    trials: int = Field(40, ge=0)
    """Proposals; 0 measures the baselines alone."""
    sampler: Choice = ComponentRef("shell")
    """What proposes: shell, tpe, random, nsga2, nsga3, cmaes, gp, grid, or a plugin's."""
    seed: int = 0
    """Of the sampler."""
    fidelity: Literal["zero-shot", "train"] = "zero-shot"
    """What one trial of the search measures; with `zero-shot` the best are trained afterwards."""
    promote: int = Field(1, ge=0)
    """Zero-shot trials trained afterwards, per budget and set of components."""
    seeds: tuple[int, ...] = (0,)
    """Each trained candidate is trained once per seed."""
    ladder: tuple[RungConfig, ...] | None = None
    """The rungs from cheap to dear, in place of fidelity, promote and seeds (see docs/ladder.md)."""
    executor: Literal["ray", "local"] = "ray"
    """`local` measures one trial after another in this process."""
    keep_weights: Literal["all", "front"] = "all"
    """Which trained models stay on disk when the run is done."""
    concurrency: int | None = Field(None, ge=1)
    """Trials at a time; the default is as many as the cluster has room for."""
    cpus_per_trial: int | None = Field(None, ge=1)
    """Cores of one trial, shared by its workers; the default is one each, more if `concurrency` leaves more."""
    gpus_per_trial: float | None = Field(None, ge=0.0)
    """GPUs of one trial, shared by its workers; the default is one each where the cluster has any."""
    ray_address: str | None = None
    """HOST:PORT of the head node of a Ray cluster, or `auto`; the default is this machine alone."""
    trial_timeout: float | None = Field(None, gt=0.0)
    """Seconds after which a trial's worker process is ended and the trial has failed; the default is never."""
    ranks: RankSearchConfig | None = None
    """Where ranks are searched: choose them by gradient descent first."""

    @field_validator("seeds")
    @classmethod
    def _some(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return _distinct_seeds(seeds)

    @field_validator("ladder")
    @classmethod
    def _climbs(cls, ladder: tuple[RungConfig, ...] | None) -> tuple[RungConfig, ...] | None:
        if ladder is not None:
            _check_ladder(ladder)
        return ladder

    @model_validator(mode="after")
    def _one_way(self) -> SearchConfig:
        for key in ("fidelity", "promote", "seeds"):
            if self.ladder is not None and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"give either `ladder` or `{key}`, which is short for one, not both")
        return self

    @model_validator(mode="after")
    def _on_a_cluster(self) -> SearchConfig:
        if self.ray_address is not None and self.executor != "ray":
            raise ValueError("ray_address needs executor: ray")
        return self

    @property
    def rungs(self) -> tuple[RungConfig, ...]:
        """The ladder, written out: never empty, the lowest first."""
        if self.ladder is not None:
            return self.ladder
        if self.fidelity == "train":
            return (RungConfig(rung="train", seeds=self.seeds),)
        top = (RungConfig(rung="train", keep=self.promote, seeds=self.seeds),) if self.promote else ()
        return (RungConfig(rung="zero-shot"), *top)


def _check_ladder(ladder: tuple[RungConfig, ...]) -> None:
    if not ladder:
        raise ValueError("is empty, expected one rung or more, such as [{rung: zero-shot}]")
    if ladder[0].keep is not None:
        raise ValueError("the lowest rung takes every proposal, leave its `keep` out")
    if ladder[0].seeds != (0,):
        raise ValueError("the lowest rung measures every proposal once, by search.seed: leave its seeds out")
    for number, (below, rung) in enumerate(itertools.pairwise(ladder), start=2):
        if rung.keep is None:
            raise ValueError(
                f"rung {number} needs `keep`, how many of the rung below climb onto it: a whole "
                "number, or a share below 1"
            )
        if rung.rung == "zero-shot":
            raise ValueError(f"rung {number} is zero-shot, which can be the lowest only")
        if below.whole:
            raise ValueError(f"rung {number - 1} trains to the end, so it must be the last")
        for unit in ("steps", "epochs"):
            before, now = getattr(below, unit), getattr(rung, unit)
            if before is not None and now is not None and before >= now:
                raise ValueError(f"rung {number} has {unit} {now}, expected more than the {before} below it")
    if ladder[-1].rung == "train" and not ladder[-1].whole:
        raise ValueError("the last rung trains to the end (train.steps), leave its steps and epochs out")
