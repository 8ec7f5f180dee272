"""The training loop, on DeepSpeed or on plain torch. The only importer of deepspeed."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ucc_search.config import TrainConfig
from ucc_search.data import ImageSet, TrainingBatches
from ucc_search.errors import ConfigError

_ENGINE = "engine"  # what the engine calls its own part of a saved training
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(RuntimeError):
    """Training went wrong in a way that belongs to the candidate: the loss is not finite."""


@dataclass(frozen=True)
class Worker:
    """This process's place among those that train one model together."""

    rank: int = 0
    world: int = 1
    rendezvous: str | None = None
    """File the processes meet at; a file cannot clash between trials as a TCP port can."""


@dataclass
class FitResult:
    """What one run of `fit` recorded."""

    losses: list[float] = field(default_factory=list)
    """Total training loss per optimiser step."""
    parts: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    averaged: nn.Module | None = None
    """The moving average of `module.model`, where `ema` is set and there was an update."""
    continued: int = 0
    """Steps that were taken over from an earlier training."""


class Engine(Protocol):
    """One optimiser step, however it is carried out."""

    def forward(self, images: Tensor, labels: Tensor, progress: float) -> Mapping[str, Tensor]: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> None: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


def device_for_training() -> torch.device:
    """The first GPU this process may see, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _subnormals_flushed() -> Iterator[None]:
    """Small loss weights can drive Adam's second moments below the smallest normal float, where a CPU is several
    times slower. What else runs in this process afterwards gets torch's default back."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@_subnormals_flushed()
def fit(
    module: nn.Module,
    images: ImageSet,
    config: TrainConfig,
    *,
    seed: int,
    worker: Worker | None = None,
    before_step: Callable[[float], None] | None = None,
    after_step: Callable[[int, int, float], None] | None = None,
    stop: int | None = None,
    resume: Path | None = None,
    save: Path | None = None,
) -> FitResult:
    """Train `module` in place.

    Training that was stopped and resumed takes the steps that it would have taken in one go.

    Args:
        module: maps (images_BCHW, labels_B, progress in [0, 1]) to named scalar losses, whose sum
            is minimised; the model it trains is its attribute `model`.
        before_step: called with the progress, before each optimiser step.
        after_step: called with step, total steps and loss.
        stop: the step to stop at; learning rates are those of the whole training all the same.
        resume: a folder that `save` wrote; where it is not there, training begins at the start.
        save: a folder for all that is needed to go on; replaced as a whole.

    Raises:
        TrainingError: the loss stopped being finite.
    """
    worker = worker or Worker()
    device = device_for_training()
    torch.manual_seed(seed)
    total = config.total_steps(len(images))
    module.to(device).train()
    engine = _make_engine(module, config, total, worker)
    average, every = _average(module.model, config, len(images))
    rounds = config.gradient_accumulation
    batches = TrainingBatches(
        images, config.batch_size // rounds, config.augment, seed=seed, rank=worker.rank, world=worker.world
    )
    result, start = FitResult(), time.perf_counter()
    loop = _Loop(engine, batches, average, result, worker.rank)
    if resume is not None and resume.is_dir():
        loop.load(resume)
    for step in range(result.continued, total if stop is None else stop):
        progress = step / total
        if before_step:
            before_step(progress)
        loss, parts = _step(engine, batches, rounds, progress, device)
        if not math.isfinite(loss):
            raise TrainingError(f"the training loss is {loss} at step {step} of {total}")
        if average is not None and ((step + 1) % every == 0 or step + 1 == total):
            average.update_parameters(module.model)
        result.losses.append(loss)
        result.parts.append(parts)
        if after_step:
            after_step(step + 1, total, loss)
    if save is not None:
        loop.save(save)
    result.seconds = time.perf_counter() - start
    result.averaged = average.module if average is not None and int(average.n_averaged) else None
    if worker.world > 1:
        for model in filter(None, (module.model, result.averaged)):
            combine_statistics(model, worker.world)
    module.eval()
    return result


@dataclass(frozen=True)
class _Loop:
    """All that a training stopped between two steps needs to go on as if nothing had happened."""

    engine: Engine
    batches: TrainingBatches
    average: Any
    result: FitResult
    rank: int

    def save(self, folder: Path) -> None:
        """Write the state of this process; `folder` appears once all of rank 0's is there."""
        partial = folder.with_name(folder.name + ".part")
        partial.mkdir(parents=True, exist_ok=True)
        self.engine.save(partial)
        state = {
            "losses": self.result.losses,
            "parts": self.result.parts,
            "batches": self.batches.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        torch.save(state, partial / f"loop-{self.rank}.pt")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote, in a process of the same rank."""
        self.engine.load(folder)
        state = torch.load(folder / f"loop-{self.rank}.pt", weights_only=True)
        self.batches.load_state_dict(state["batches"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.result.losses[:], self.result.parts[:] = state["losses"], state["parts"]
        self.result.continued = len(state["losses"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])


def combine_statistics(model: nn.Module, world: int) -> None:
    """Give batch norms the running mean and variance over the images of all ranks, each of which saw its own share.

    While training, every rank normalises by its own share of a batch, as data-parallel training does by default.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            mean, variance = module.running_mean, module.running_var
            moments = torch.stack((mean, variance + mean.square()))
            torch.distributed.all_reduce(moments)
            first, second = moments / world
            mean.copy_(first)
            variance.copy_((second - first.square()).clamp_min(0))


def _step(
    engine: Engine,
    batches: Iterator[tuple[Tensor, Tensor]],
    rounds: int,
    progress: float,
    device: torch.device,
) -> tuple[float, dict[str, float]]:
    """One optimiser step over `rounds` batches; returns the mean loss and its mean parts."""
    loss_sum, parts_sum = 0.0, dict[str, float]()
    for _ in range(rounds):
        images, labels = next(batches)
        parts = engine.forward(images.to(device), labels.to(device), progress)
        loss = torch.stack([v.float() for v in parts.values()]).sum()
        engine.backward(loss)
        engine.step()
        loss_sum += float(loss.detach()) / rounds
        for name, value in parts.items():
            parts_sum[name] = parts_sum.get(name, 0.0) + float(value.detach()) / rounds
    return loss_sum, parts_sum


def _average(model: nn.Module, config: TrainConfig, images: int) -> tuple[Any, int]:
    """The moving average of `model`, or None, and the optimiser steps from one update to the next."""
    ema = config.ema
    if ema is None:
        return None, 1
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    def update(averages: list[Tensor], weights: list[Tensor], done: Tensor) -> None:
        n = int(done) + 1
        decay = min(ema.decay, (1 + n) / (10 + n)) if ema.ramp else ema.decay
        get_ema_multi_avg_fn(decay)(averages, weights, done)

    every = config.epoch_steps(images) if ema.every == "epoch" else 1
    return AveragedModel(model, multi_avg_fn=update, use_buffers=True), every


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices; none for biases, norms, LayerScale and tokens, as DeiT trains."""
    decay, plain = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_vector = parameter.ndim <= 1 or name.endswith(("_token", "pos_embed", "latent"))
        (plain if is_vector else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def learning_rate_factor(config: TrainConfig, total: int) -> Callable[[int], float]:
    """Factor on the base learning rate at each step: linear warm-up, then cosine to `min_lr`."""
    schedule, floor = config.schedule, config.schedule.min_lr / config.optimizer.lr
    warmup = math.ceil(schedule.warmup * total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule.type == "constant":
            return 1.0
        through = (step - warmup) / max(1, total - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, through)))

    return factor


def _make_engine(module: nn.Module, config: TrainConfig, total: int, worker: Worker) -> Engine:
    if config.engine == "deepspeed":
        return DeepSpeedEngine(module, config, total, worker)
    if worker.world > 1:
        raise ConfigError("train.workers above 1 needs train.engine: deepspeed")
    return TorchEngine(module, config, total)


class TorchEngine:
    """Plain torch: the reference that DeepSpeed is tested against."""

    def __init__(self, module: nn.Module, config: TrainConfig, total: int) -> None:
        self._module, self._config, self._calls = module, config, 0
        optimizer = config.optimizer
        make = getattr(torch.optim, optimizer.type)
        options = {k: v for k, v in optimizer.params.items() if k != "torch_adam"}
        groups = parameter_groups(module, optimizer.weight_decay)
        self._optimizer = make(groups, lr=optimizer.lr, **options)
        self._rates = torch.optim.lr_scheduler.LambdaLR(self._optimizer, learning_rate_factor(config, total))
        self._amp = _AMP.get(config.precision)

    def forward(self, images: Tensor, labels: Tensor, progress: float) -> Mapping[str, Tensor]:
        if self._amp is None:
            return self._module(images, labels, progress)
        with torch.autocast(images.device.type, dtype=self._amp):
            return self._module(images, labels, progress)

    def backward(self, loss: Tensor) -> None:
        (loss / self._config.gradient_accumulation).backward()

    def step(self) -> None:
        self._calls += 1
        if self._calls % self._config.gradient_accumulation:
            return
        if self._config.clip_grad:
            nn.utils.clip_grad_norm_(self._module.parameters(), self._config.clip_grad)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._rates.step()

    def save(self, folder: Path) -> None:
        parts = (self._module, self._optimizer, self._rates)
        torch.save([part.state_dict() for part in parts], folder / _ENGINE)

    def load(self, folder: Path) -> None:
        # Everything counts gradients from a whole step, so `_calls` need not be kept.
        states = torch.load(folder / _ENGINE, weights_only=True)
        for part, state in zip((self._module, self._optimizer, self._rates), states, strict=True):
            part.load_state_dict(state)


class DeepSpeedEngine:
    """DeepSpeed, without a TCP port, an MPI search or a compiler (none is needed for one process)."""

    def __init__(self, module: nn.Module, config: TrainConfig, total: int, worker: Worker) -> None:
        deepspeed = _import_deepspeed()
        _join(deepspeed, worker)
        factor = learning_rate_factor(config, total)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module, config.optimizer.weight_decay),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
            config=deepspeed_config(config, worker.world),
            dist_init_required=False,
        )

    def forward(self, images: Tensor, labels: Tensor, progress: float) -> Mapping[str, Tensor]:
        return self._engine(images, labels, progress)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=_ENGINE, save_latest=False)

    def load(self, folder: Path) -> None:
        self._engine.load_checkpoint(str(folder), tag=_ENGINE)


def deepspeed_config(config: TrainConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's own configuration of this run; `train.deepspeed` is merged over it."""
    optimizer = config.optimizer
    options = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay, **optimizer.params}
    if optimizer.type in ("Adam", "AdamW"):
        # The default, FusedAdam, compiles a C++ extension for minutes at its first use.
        options.setdefault("torch_adam", True)
        options.setdefault("adam_w_mode", optimizer.type == "AdamW")
    resolved: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // (config.gradient_accumulation * world),
        "gradient_accumulation_steps": config.gradient_accumulation,
        "optimizer": {"type": optimizer.type, "params": options},
        "zero_optimization": {"stage": config.zero_stage},
        "gradient_clipping": config.clip_grad or 0.0,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if config.precision in _AMP:
        # Autocast keeps the weights in float32: DeepSpeed's own bf16 mode casts them, but not the
        # running statistics of batch norms, which a convolution stem has.
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[config.precision]
        resolved["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return {**resolved, **config.deepspeed}


def _import_deepspeed() -> Any:
    # DeepSpeed logs its whole life at INFO, part of it while it is imported.
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found nothing better
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        # Else init_distributed compiles a shared-memory op for a minute, even for a single process.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    except AttributeError:
        logging.getLogger(__name__).warning(
            "this DeepSpeed compiles an op at first use; the first trial is slow"
        )
    return deepspeed


def _join(deepspeed: Any, worker: Worker) -> None:
    """A process group for this trial alone: in memory for one process, through a file for several."""
    os.environ.update(LOCAL_RANK=str(worker.rank), RANK=str(worker.rank), WORLD_SIZE=str(worker.world))
    if torch.distributed.is_initialized():
        if torch.distributed.get_world_size() == worker.world:
            return
        torch.distributed.destroy_process_group()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if worker.world == 1:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        torch.distributed.init_process_group(
            backend, init_method=f"file://{worker.rendezvous}", rank=worker.rank, world_size=worker.world
        )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
