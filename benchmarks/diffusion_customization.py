"""COMCAT's adapter against full fine-tuning, on a small diffusion U-Net and real images of a class it never saw.

A U-Net is trained on nine classes of Fashion-MNIST at 16 x 16 pixels, conditioned on two learned
tokens, [no word, class]. It is then customised to the tenth class by a few images, as [V*, thing],
where V* is a vector it never met and "thing" stood for any class in a tenth of its training.

Prints a line of JSON. Losses are mean squared errors of the predicted noise on test images, the same
noise and timesteps for all, as mean and standard deviation over seeds, each with images of its own;
`other_classes` is the loss on test images of the nine, in percent above what it was. Files and
step times are ratios to full fine-tuning, which runs at several learning rates; steps of both are
timed in turn, in the same process.

    python benchmarks/diffusion_customization.py > results/diffusion-customization.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ucc_search.config import DataConfig
from ucc_search.data import ImageSet, load_data
from ucc_search.diffusion import add_adapter, customize, noise_loss

NEW_CLASS = 8  # bags: unlike clothes and shoes, of which the U-Net sees nine kinds
THING, NO_WORD, V = 10, 11, 12  # rows of the token table after the ten classes
TOKEN_DIM = 32
FULL_RATES = (3e-5, 1e-4, 3e-4)
QUESTIONS = 512  # draws of image, noise and timestep per measured loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrain-steps", type=int, default=700)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    splits = load_data(DataConfig(name="fashion-mnist", image_size=16, mean=[0.5], std=[0.5]))
    scheduler = DDPMScheduler()
    torch.manual_seed(0)
    unet, tokens = _unet(), torch.randn(13, TOKEN_DIM)
    tokens = _pretrain(unet, tokens, splits.train, scheduler, arguments.pretrain_steps)
    concept = tokens[[V, THING]]
    new = _question(splits.test, concept.expand(10, -1, -1), classes=[NEW_CLASS])
    prompts = torch.stack([torch.stack([tokens[NO_WORD], tokens[c]]) for c in range(10)])
    others = _question(splits.test, prompts, classes=[c for c in range(10) if c != NEW_CLASS])

    def measure(model: nn.Module) -> tuple[float, float]:
        """Loss on the new class, and on the others."""
        return _loss(model, *new, scheduler), _loss(model, *others, scheduler)

    before = measure(unet)
    found: dict[str, list[tuple[float, float]]] = {}
    unmoved = []
    for seed in range(arguments.seeds):
        images = _some_images(splits.train, arguments.images, seed)
        for init in ("zero", "random"):
            model = copy.deepcopy(unet)
            torch.manual_seed(seed)
            adapter, _ = customize(
                model,
                images,
                concept,
                scheduler,
                init=init,
                steps=arguments.steps,
                generator=torch.Generator().manual_seed(seed),
            )
            found.setdefault(f"adapter, {init} start", []).append(measure(model))
            after = model.state_dict()
            unmoved.append(all(torch.equal(after[k], v) for k, v in unet.state_dict().items()))
            if init == "zero":
                adapter.merge(approximate=True)
                found.setdefault("adapter, zero start, merged approximately", []).append(measure(model))
        for rate in FULL_RATES:
            model = copy.deepcopy(unet)
            _fine_tune(model, images, concept, scheduler, steps=arguments.steps, rate=rate, seed=seed)
            found.setdefault(f"full fine-tuning, lr {rate:g}", []).append(measure(model))
    sizes, parameters = _file_sizes(unet), _parameters(unet)
    report = {
        "new_class": "bag",
        "images": arguments.images,
        "steps": arguments.steps,
        "pretrain_steps": arguments.pretrain_steps,
        "seeds": arguments.seeds,
        "loss_before": round(before[0], 5),
        "loss_after": {name: _spread([f[0] for f in runs]) for name, runs in found.items()},
        "other_classes_percent_worse": {
            name: _spread([100 * (f[1] / before[1] - 1) for f in runs]) for name, runs in found.items()
        },
        "frozen_weights_unmoved": all(unmoved),
        "parameters": parameters,
        "adapter_file_over_full": round(sizes["adapter"] / sizes["full"], 4),
        "adapter_file_bytes": sizes["adapter"],
        "adapter_step_time_over_full": _step_time_ratio(
            unet, _some_images(splits.train, 12, 0), concept, scheduler
        ),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    print(json.dumps(report))


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 48),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TOKEN_DIM,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=8,
    )


def _pretrain(
    unet: nn.Module,
    tokens: Tensor,
    images: ImageSet,
    scheduler: DDPMScheduler,
    steps: int,
    batch_size: int = 16,
) -> Tensor:
    """Train the U-Net and its tokens on all classes but the new one; returns the tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = nn.Parameter(tokens)
    weights = [*unet.parameters(), tokens]
    # Without weight decay: V* must stay what it was.
    optimiser = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    seen = (images.labels_B != NEW_CLASS).nonzero().flatten()
    for _ in range(steps):
        batch, labels_B = images.batch(seen[torch.randint(len(seen), (batch_size,), generator=generator)])
        forgotten_B = torch.rand(batch_size, generator=generator) < 0.1
        rows_B2 = torch.stack(
            [torch.full_like(labels_B, NO_WORD), labels_B.where(~forgotten_B, THING)], dim=1
        )
        loss = noise_loss(unet, batch, tokens[rows_B2], scheduler, generator=generator)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        decay.step()
    return tokens.detach()


def _some_images(images: ImageSet, count: int, seed: int) -> Tensor:
    """Images of the new class, [N, 1, 16, 16]; others for every seed."""
    members = (images.labels_B == NEW_CLASS).nonzero().flatten()
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
    return images.batch(members[order[:count]])[0]


def _question(images: ImageSet, prompts: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Test images of these classes, drawn once, and the prompts [2, E] of their classes."""
    generator = torch.Generator().manual_seed(1)
    members = torch.isin(images.labels_B, torch.tensor(classes)).nonzero().flatten()
    index = members[torch.randint(len(members), (QUESTIONS,), generator=generator)]
    batch, labels = images.batch(index)
    return batch, prompts[labels]


def _loss(unet: nn.Module, images: Tensor, prompts: Tensor, scheduler: DDPMScheduler) -> float:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        parts = [
            float(noise_loss(unet, x, c, scheduler, generator=generator))
            for x, c in zip(images.split(128), prompts.split(128), strict=True)
        ]
    return statistics.mean(parts)


def _fine_tune(
    unet: nn.Module,
    images: Tensor,
    concept: Tensor,
    scheduler: DDPMScheduler,
    *,
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """The adapter's recipe on all weights, at another learning rate."""
    generator = torch.Generator().manual_seed(seed)
    step = _stepper(unet, list(unet.parameters()), images, concept, scheduler, generator, rate, steps)
    for _ in range(steps):
        step()


def _stepper(
    unet: nn.Module,
    weights: list[nn.Parameter],
    images: Tensor,
    concept: Tensor,
    scheduler: DDPMScheduler,
    generator: torch.Generator,
    rate: float,
    steps: int,
) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)

    def step() -> None:
        index = torch.randint(len(images), (1,), generator=generator)
        loss = noise_loss(unet, images[index], concept[None], scheduler, generator=generator)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        decay.step()

    return step


def _step_time_ratio(unet: nn.Module, images: Tensor, concept: Tensor, scheduler: DDPMScheduler) -> float:
    """Median over median of 100 steps each, taken in turn."""
    steppers = []
    for adapted in (True, False):
        model = copy.deepcopy(unet)
        weights = list(model.parameters())
        if adapted:
            model.requires_grad_(False)
            weights = list(add_adapter(model).parameters())
        generator = torch.Generator().manual_seed(0)
        steppers.append(_stepper(model, weights, images, concept, scheduler, generator, 1e-4, 110))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(110):
        for step, taken in zip(steppers, seconds, strict=True):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    adapter, full = (statistics.median(taken[10:]) for taken in seconds)
    return round(adapter / full, 3)


def _file_sizes(unet: nn.Module) -> dict[str, int]:
    """Bytes on disk of what each way has to keep per concept."""
    with tempfile.TemporaryDirectory() as folder:
        full, adapter = Path(folder) / "full.safetensors", Path(folder) / "adapter.safetensors"
        save_file({k: v.contiguous() for k, v in unet.state_dict().items()}, full)
        add_adapter(copy.deepcopy(unet)).save(adapter)
        return {"full": full.stat().st_size, "adapter": adapter.stat().st_size}


def _parameters(unet: nn.Module) -> dict[str, int]:
    adapter = add_adapter(copy.deepcopy(unet))
    return {
        "adapter": sum(p.numel() for p in adapter.parameters()),
        "full": sum(p.numel() for p in unet.parameters()),
    }


def _spread(values: Sequence[float]) -> list[float]:
    """Mean and standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return [round(statistics.mean(values), 5), round(spread, 5)]


if __name__ == "__main__":
    main()
