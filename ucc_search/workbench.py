"""One process's warm bench: data, teacher and teacher outputs loaded once, candidates measured on it."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ucc_search.binding import bind
from ucc_search.budget import with_tokens
from ucc_search.builtin.distillers import logit_kl
from ucc_search.compression import ProxyInputs, assemble, checked_scores, compress, set_tokens, shape_of
from ucc_search.compression.selection import Scores, first_units, narrows
from ucc_search.config import RunConfig, parse_config
from ucc_search.data import Splits, calibration_batches, load_data, proxy_batches
from ucc_search.importance import Progress, default_cache, unit_scores
from ucc_search.interfaces import ComponentRef, Components, DistillContext
from ucc_search.losses import CandidateLoss
from ucc_search.models import build_model
from ucc_search.plan import CompressionPlan, ModelShape
from ucc_search.plugins import Plugins
from ucc_search.saving import save_model
from ucc_search.schedule import scored_kinds
from ucc_search.teachers import accuracy, load_teacher
from ucc_search.train import Worker, device_for_training, fit


@dataclass(frozen=True)
class Measurement:
    """What one trial measured; rates from 0 to 1, KL in nats."""

    kl: float | None = None
    accuracy: float | None = None
    test_accuracy: float | None = None
    loss: float | None = None
    latency_ms: float | None = None
    compute_seconds: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    continued: int = 0
    """Optimiser steps that were taken over from the rung below."""


class Workbench:
    """Measures candidates of one run; built once per process.

    Args:
        config: the resolved space file.
        plugins: as loaded in the driver.
    """

    def __init__(
        self, config: RunConfig, plugins: Plugins, *, log: Callable[[str], None] = lambda text: None
    ) -> None:
        self.config, self.plugins = config, plugins
        self._scores: dict[str, Scores] = {}
        self.device = device_for_training()
        self.splits: Splits = load_data(config.data, config.train.augment)
        self.teacher: nn.Module = load_teacher(config, self.splits, log=log).to(self.device)
        self.shape: ModelShape = shape_of(
            self.teacher, config.model.name, image_size=(self.splits.image_size, self.splits.image_size)
        )

    @functools.cached_property
    def calibration(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, teacher's logits) of the calibration images, which come from select."""
        batches = calibration_batches(self.splits, self.config.data.calibration)
        with torch.inference_mode():
            on_device = ((x.to(self.device), y.to(self.device)) for x, y in batches)
            return [(x, y, self.teacher(x)) for x, y in on_device]

    @functools.cached_property
    def proxy(self) -> list[Tensor]:
        """Training images on which importance is measured."""
        return proxy_batches(self.splits, self.config.data.proxy)

    def scores(self, ref: ComponentRef, progress: Progress = lambda *_: None) -> Scores:
        """Importance by one criterion of whatever the space file allows to be pruned; kept on disk."""
        if ref.key not in self._scores:
            kinds = scored_kinds(self.config, self.shape).get(ref.key, set())
            criterion = self.plugins.build("importance", ref)
            self._scores[ref.key] = unit_scores(
                self.teacher,
                self.shape,
                criterion,
                self.proxy if criterion.needs_images and kinds else (),
                groups=[g for g in self.shape.unit_groups() if g.kind in kinds],
                identity=[ref.key, self.plugins.identity("importance", ref.name)],
                cache=default_cache(),
                progress=progress,
            )
        return self._scores[ref.key]

    def depth_order(self, ref: ComponentRef) -> list[int]:
        """Depth units, the least important first."""
        order: list[int] = self.scores(ref)["depth", 0].argsort(stable=True).tolist()
        return order

    def compressed(
        self,
        plan: CompressionPlan,
        components: Components,
        importance: ComponentRef,
        *,
        scratch: bool = False,
        whiten: bool = False,
    ) -> nn.Module:
        """What a candidate starts from: the teacher compressed, or the same architecture with new weights.

        Args:
            whiten: factorise for what layers give on the proxy images, not for their weights.
        """
        if scratch:
            unweighted = self.config.model.model_copy(update={"pretrained": False})
            dense = build_model(unweighted, classes=self.splits.classes, channels=self.splits.channels)
            return assemble(dense.to(self.device), plan, components, first_units(plan))
        scores = self.scores(importance) if narrows(plan) else {}
        return compress(
            self.teacher,
            plan,
            components,
            scores=scores,
            heads=self.config.space.fewer_heads,
            inputs=self.proxy_inputs if whiten else None,
        )

    @functools.cached_property
    def proxy_inputs(self) -> ProxyInputs:
        """What whitened factorisations look at."""
        return ProxyInputs(self.proxy)

    def zero_shot(self, model: nn.Module, latency: Mapping[str, Any] | None = None) -> Measurement:
        """KL to the teacher and accuracy on the calibration images, of a model as it is.

        Args:
            latency: time it too, see `Latency.to_measure`.
        """
        model.eval()
        start = time.perf_counter()
        kl, right = self._on_calibration(model)
        seconds = time.perf_counter() - start
        return Measurement(kl, right, latency_ms=self._latency(model, latency), compute_seconds=seconds)

    def _latency(self, model: nn.Module, how: Mapping[str, Any] | None) -> float | None:
        if how is None:
            return None
        from ucc_search.latency.measure import finished_ms

        return finished_ms(model, self.teacher, self.shape, how)

    def _on_calibration(self, model: nn.Module) -> tuple[float, float]:
        """(KL to the teacher, accuracy) on the calibration images."""
        kl, correct, seen = 0.0, 0, 0
        with torch.inference_mode(), checked_scores(model):
            for images, labels, teacher_logits in self.calibration:
                logits = model(images)
                kl += float(logit_kl(logits, teacher_logits)) * len(labels)
                correct += int((logits.argmax(1) == labels).sum())
                seen += len(labels)
        return kl / seen, correct / seen

    def dense(self, rung: str) -> Measurement:
        """The uncompressed model as it is, on the images that the candidates of this rung are measured on."""
        start = time.perf_counter()
        if rung == "zero-shot":
            right = sum(int((logits.argmax(1) == y).sum()) for _, y, logits in self.calibration)
            seen = sum(len(y) for _, y, _ in self.calibration)
            return Measurement(0.0, right / seen, compute_seconds=time.perf_counter() - start)
        chosen, test = (accuracy(self.teacher, s) for s in (self.splits.select, self.splits.test))
        return Measurement(0.0, chosen, test, compute_seconds=time.perf_counter() - start)

    def calibrated_accuracy(
        self, components: Components, plan: CompressionPlan, images: int = 500
    ) -> Callable:
        """Accuracy of `plan` with other tokens, on the first calibration images: for calibrated cascades."""

        def evaluate(tokens: Sequence[int]) -> float:
            model = compress(self.teacher, with_tokens(plan, list(tokens)), components).eval()
            correct = seen = 0
            with torch.inference_mode():
                for batch, labels, _ in self.calibration:
                    correct += int((model(batch).argmax(1) == labels).sum())
                    seen += len(labels)
                    if seen >= images:
                        break
            return correct / seen

        return evaluate

    def train(
        self,
        plan: CompressionPlan,
        components: Components,
        distiller: ComponentRef,
        importance: ComponentRef,
        *,
        seed: int,
        scratch: bool = False,
        whiten: bool = False,
        out: Path | None = None,
        arch: Mapping[str, Any] | None = None,
        worker: Worker | None = None,
        stop: int | None = None,
        resume: Path | None = None,
        save: Path | None = None,
        latency: Mapping[str, Any] | None = None,
    ) -> Measurement:
        """Train the compressed model and measure it on the selection split, then on the test split.

        Training that stops before its end is measured on the selection split alone, and leaves no model.

        Args:
            stop, resume, save: see `train.fit`.
            out: where rank 0 writes weights and `arch.json`.
            arch: what `arch.json` says of the dense model and the components.
            latency: time the trained model, see `Latency.to_measure`.
        """
        config = self.config.train
        torch.manual_seed(seed)
        student = self.compressed(plan, components, importance, scratch=scratch, whiten=whiten)
        student.requires_grad_(True)
        built = self.plugins.build("distiller", distiller)
        module = CandidateLoss(
            student,
            self.teacher if built.needs_teacher else None,
            built,
            DistillContext(plan, self.shape),
            label_smoothing=config.label_smoothing,
            augment=config.augment,
        )
        anneal = self._annealing(student, plan) if config.anneal else None
        start = time.perf_counter()
        result = fit(
            module,
            self.splits.train,
            config,
            seed=seed,
            worker=worker,
            before_step=anneal,
            stop=stop,
            resume=resume,
            save=save,
        )
        whole = len(result.losses) == config.total_steps(len(self.splits.train))
        set_tokens(student, plan.tokens)
        model = (result.averaged or student).float().eval()
        set_tokens(model, plan.tokens)
        if worker is not None and worker.rank > 0:
            return Measurement()  # rank 0 measures for all
        measured = Measurement(
            kl=self._on_calibration(model)[0],
            accuracy=accuracy(model, self.splits.select),
            test_accuracy=accuracy(model, self.splits.test) if whole else None,
            loss=sum(result.losses[-20:]) / len(result.losses[-20:]),
            compute_seconds=time.perf_counter() - start,
            metrics=_metrics(result.losses, result.parts),
            continued=result.continued,
            latency_ms=self._latency(model, latency),
        )
        if whole and out is not None and arch is not None and (worker is None or worker.rank == 0):
            save_model(model, out, plan, arch)
        return measured

    def _annealing(self, student: nn.Module, plan: CompressionPlan) -> Callable[[float], None]:
        """Keep ratios fall by a cosine from 1 to the plan (EViT, section 4.1)."""
        settings = self.config.train.anneal
        assert settings is not None

        def before_step(progress: float) -> None:
            set_tokens(student, annealed_tokens(plan, progress, settings.start, settings.end))

        return before_step


def annealed_tokens(plan: CompressionPlan, progress: float, start: float, end: float) -> list[int]:
    """Whole tokens per block at a share of the training; the plan's own from `end` on."""
    if progress >= end:
        return list(plan.tokens)
    through = max(0.0, (progress - start) / max(end - start, 1e-9))
    share = (1 - math.cos(math.pi * through)) / 2
    dense = plan.shape.tokens
    return [round(dense + (n - dense) * share) for n in plan.tokens]


def _metrics(losses: Sequence[float], parts: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """At most 50 points of the loss curve."""
    every = max(1, len(losses) // 50)
    chosen = sorted({*range(0, len(losses), every), len(losses) - 1})
    return [{"step": i + 1, "loss": losses[i], **parts[i]} for i in chosen]


_benches: dict[str, Workbench] = {}


def warm_bench(
    resolved: str, bundle: Mapping[str, Any], log: Callable[[str], None] = lambda text: None
) -> Workbench:
    """This process's bench for a resolved configuration and `Plugins.bundle`; a worker keeps only the newest."""
    key = repr((resolved, bundle))
    if key not in _benches:
        _benches.clear()
        loaded = Plugins.from_bundle(bundle)
        config = bind(parse_config(yaml.safe_load(resolved)), loaded)
        _benches[key] = Workbench(config, loaded, log=log)
    return _benches[key]
