"""The built-in components, registered through the same hooks as any plugin. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from ucc_search.hookspecs import hookimpl
from ucc_search.interfaces import (
    Aggregator,
    Cascade,
    Components,
    Distiller,
    Importance,
    Metric,
    Observer,
    Sampler,
    Scorer,
)


@hookimpl
def ucc_scorers() -> Mapping[str, Callable[..., Scorer]]:
    from ucc_search.builtin import scorers

    return {
        "joint": scorers.Joint,
        "spatial": scorers.Spatial,
        "spectral": scorers.Spectral,
        "class_attention": scorers.ClassAttention,
        "random": scorers.Random,
    }


@hookimpl
def ucc_aggregators() -> Mapping[str, Callable[..., Aggregator]]:
    from ucc_search.builtin import aggregators

    return {
        "host": aggregators.Host,
        "drop": aggregators.Drop,
        "fuse": aggregators.Fuse,
        "bipartite": aggregators.Bipartite,
    }


@hookimpl
def ucc_cascades() -> Mapping[str, Callable[..., Cascade]]:
    from ucc_search.builtin import cascades

    return {
        "per_block": cascades.PerBlock,
        "keep_all": cascades.KeepAll,
        "constant": cascades.Constant,
        "geometric": cascades.Geometric,
        "staged": cascades.Staged,
        "calibrated": cascades.Calibrated,
    }


@hookimpl
def ucc_distillers() -> Mapping[str, Callable[..., Distiller]]:
    from ucc_search.builtin import distillers

    return {
        "two_level": distillers.TwoLevel,
        "logits": distillers.Logits,
        "features": distillers.PooledFeatures,
        "hard_align": distillers.HardAlign,
        "none": distillers.NoDistillation,
    }


@hookimpl
def ucc_importances() -> Mapping[str, Callable[..., Importance]]:
    from ucc_search.builtin import importances

    return {
        "kl": importances.KL,
        "fisher": importances.Fisher,
        "magnitude": importances.Magnitude,
        "random": importances.Random,
    }


@hookimpl
def ucc_observers() -> Mapping[str, Callable[..., Observer]]:
    from ucc_search.builtin import trackers

    return {"tensorboard": trackers.TensorBoard, "mlflow": trackers.MLflow, "wandb": trackers.WandB}


@hookimpl
def ucc_samplers() -> Mapping[str, Callable[..., Sampler]]:
    from ucc_search.builtin import optuna_samplers, shell

    return {
        "shell": shell.Shell,
        "random": optuna_samplers.Random,
        "tpe": optuna_samplers.TPE,
        "nsga2": optuna_samplers.NSGA2,
        "nsga3": optuna_samplers.NSGA3,
        "cmaes": optuna_samplers.CMAES,
        "gp": optuna_samplers.GP,
        "grid": optuna_samplers.Grid,
    }


@hookimpl
def ucc_metrics() -> Mapping[str, Callable[..., Metric]]:
    return {}


@functools.cache
def default_components() -> Components:
    """UCC's scorer, aggregator and cascade."""
    from ucc_search.builtin.aggregators import Host
    from ucc_search.builtin.cascades import PerBlock
    from ucc_search.builtin.scorers import Joint

    return Components(Joint(), Host(), PerBlock())
