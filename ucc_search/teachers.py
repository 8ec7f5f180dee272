"""The uncompressed model with good weights: loaded, shipped, or trained here and cached."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from ucc_search.checkpoints import checkpoint_path
from ucc_search.config import RunConfig
from ucc_search.data import Splits, load_data, ordered_batches
from ucc_search.errors import ConfigError, ModelError
from ucc_search.losses import TaskLoss
from ucc_search.models import build_model, load_weights
from ucc_search.train import fit

RECIPE = "recipe.json"
WEIGHTS = "model.safetensors"


def load_teacher(config: RunConfig, splits: Splits, *, log: Callable[[str], None] = print) -> nn.Module:
    """The model of the space file with its weights, in eval mode.

    With `model.checkpoint: auto` it is trained at first use by the `teacher:` recipe and cached.

    Raises:
        ModelError: the weights cannot be found or do not fit.
    """
    model = build_model(config.model, classes=splits.classes, channels=splits.channels)
    path = checkpoint_path(config)
    if path is not None:
        if config.model.checkpoint == "auto":
            with FileLock(str(path) + ".lock"):
                if not (path / WEIGHTS).is_file():
                    log(f"training the teacher once, into {path}")
                    train_teacher(config, splits, path, log=log)
        _refuse_other_split(config, path)
        load_weights(model, path)
    elif not config.model.pretrained:
        log("note: the model has random weights (model.pretrained and model.checkpoint are unset)")
    return model.eval()


def _refuse_other_split(config: RunConfig, path: Path) -> None:
    """A teacher that was trained on images that are now held out would spoil every choice."""
    try:
        trained = json.loads((path / RECIPE).read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # weights from elsewhere: what they saw is the user's to know
    now = config.data.model_dump()
    if trained.get("name") == now["name"] and trained.get("select") != now["select"]:
        raise ModelError(
            f"{path}: this teacher was trained with data.select: {trained.get('select')}, now it is {now['select']}, "
            "so selection would use images it was trained on; set it back, or train another teacher"
        )


def train_teacher(
    config: RunConfig, splits: Splits, out: Path, *, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train the uncompressed model on the training split and write weights and recipe to `out`.

    The test split is read once, at the end.

    Returns:
        The recipe: configuration, versions, seconds, and accuracy on the selection and test splits.
    """
    if config.teacher is None:
        raise ConfigError("the space file has no `teacher:` section to train by")
    if (out / WEIGHTS).exists():
        raise ModelError(f"{out} already holds a teacher; choose another --out, or delete it first")
    torch.manual_seed(config.search.seed)
    model = build_model(config.model, classes=splits.classes, channels=splits.channels)
    module = TaskLoss(
        model,
        classes=splits.classes,
        label_smoothing=config.teacher.label_smoothing,
        augment=config.teacher.augment,
    )
    started = time.time()
    result = fit(module, splits.train, config.teacher, seed=config.search.seed, after_step=_reporter(log))
    final = (result.averaged or model).cpu().eval()
    recipe = {
        "model": config.model.model_dump(exclude={"checkpoint"}),
        "data": config.data.model_dump(),
        "teacher": config.teacher.model_dump(),
        "seed": config.search.seed,
        "classes": splits.classes,
        "channels": splits.channels,
        "images": {"train": len(splits.train), "select": len(splits.select), "test": len(splits.test)},
        "parameters": sum(p.numel() for p in final.parameters()),
        "steps": len(result.losses),
        "final_loss": sum(result.losses[-50:]) / len(result.losses[-50:]),
        "seconds": round(time.time() - started, 1),
        "threads": torch.get_num_threads(),
        "select_accuracy": accuracy(final, splits.select),
        "test_accuracy": accuracy(final, splits.test),
        "torch": torch.__version__,
    }
    _write(out, final, recipe)
    log(f"teacher: test accuracy {recipe['test_accuracy']:.4f}, {recipe['seconds']:.0f} s, in {out}")
    return recipe


def _write(out: Path, model: nn.Module, recipe: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    (out / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    temporary = out / (WEIGHTS + ".part")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary)
    temporary.replace(out / WEIGHTS)  # last: a folder with weights is a finished teacher


def _reporter(log: Callable[[str], None]) -> Callable[[int, int, float], None]:
    started = time.monotonic()

    def report(step: int, total: int, loss: float) -> None:
        if step in (1, total) or step % max(1, total // 20) == 0:
            spent = time.monotonic() - started
            log(
                f"step {step}/{total}  loss {loss:.3f}  {spent:.0f} s  ({spent / step * (total - step):.0f} s left)"
            )

    return report


@torch.inference_mode()
def accuracy(model: nn.Module, images: Any, *, batch_size: int = 500) -> float:
    """Top-1 accuracy, 0 to 1."""
    device = next(model.parameters()).device
    right = 0
    for batch, labels in ordered_batches(images, batch_size):
        right += int((model(batch.to(device)).argmax(1).cpu() == labels).sum())
    return right / len(images)


def teacher_for_command(
    config: RunConfig, out: Path, *, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """`ucc-search train-teacher`: load the data, train, write."""
    splits = load_data(config.data, config.teacher.augment if config.teacher else None)
    return train_teacher(config, splits, out, log=log)
