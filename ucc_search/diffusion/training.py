"""An adapter trained to draw a new concept, everything else frozen: from tensors, or with a whole pipeline.

B latents in a batch, N in all, of C channels and h x w cells; T conditioning tokens of E channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ucc_search.diffusion.adapter import Adapter, add_adapter
from ucc_search.diffusion.attention import Init
from ucc_search.errors import DataError, ModelError


class Customization(NamedTuple):
    """A trained adapter, attached, and how its training went."""

    adapter: Adapter
    losses: list[float]
    """Of every step: mean squared errors."""


def customize(
    unet: nn.Module,
    latents: Tensor,
    conditioning: Tensor,
    scheduler: Any,
    *,
    adapter: Adapter | None = None,
    rank: int = 2,
    init: Init = "zero",
    steps: int = 500,
    batch_size: int = 1,
    lr: float = 2.5e-3,
    weight_decay: float = 1e-2,
    max_grad_norm: float = 1.0,
    generator: torch.Generator | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Customization:
    """Train an adapter on a few images. The U-Net's own weights are frozen meanwhile and do not change.

    Defaults are published, but for `init`: AdamW (0.9, 0.999), a rate that falls linearly to zero, no warm-up.

    Args:
        unet: a `UNet2DConditionModel`, on the device to train on.
        latents: what it denoises, [N, C, h, w]: encoded by the VAE and scaled, or pixels from -1 to 1.
        conditioning: what its cross-attention reads, [T, E] for all or [N, T, E]: the text
            encoder's states for "a photo of V* <class>".
        scheduler: with `add_noise`, for example diffusers' `DDPMScheduler`.
        adapter: one to train on; default: a new one of this `rank` and `init`, see `add_adapter`.
        steps: number of updates.
        batch_size: latents per step, drawn in shuffled rounds.
        lr: learning rate at the first step.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm.
        generator: draws order, noise and timesteps; the adapter's start is drawn by torch's own.
        on_step: called with the number of updates made and the loss.

    Raises:
        ModelError: the U-Net or the adapter cannot be trained, or the loss became infinite or NaN.
        DataError: latents or conditioning that do not fit the U-Net, or no steps.

    Reference: Xiao et al. 2023, COMCAT, arXiv:2305.17235, the section on customisation.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise DataError(f"{name} is {value}, expected at least 1")
    conditioning_NTE = _check_inputs(unet, latents, conditioning)
    given = adapter is not None
    adapter = adapter or add_adapter(unet, rank, init=init)
    _check_adapter(adapter, unet)
    try:
        weights = list(adapter.parameters())
        optimiser = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)
        decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
        order = _shuffled_rounds(len(latents), batch_size, generator)
        losses = []
        with _only_trainable(unet, weights):
            for step in range(1, steps + 1):
                index = next(order)
                loss = noise_loss(
                    unet, latents[index], conditioning_NTE[index], scheduler, generator=generator
                )
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise ModelError(
                        f"step {step}: the loss is {losses[-1]}; lower lr, now {lr}, or load the U-Net in "
                        "bfloat16 or float32"
                    )
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(weights, max_grad_norm)
                optimiser.step()
                decay.step()
                if on_step is not None:
                    on_step(step, losses[-1])
    except BaseException:
        if not given and adapter.attached:
            adapter.remove()  # nobody else has it
        raise
    return Customization(adapter, losses)


def customize_pipeline(
    pipe: Any,
    images: Sequence[Any],
    prompt: str,
    *,
    resolution: int = 512,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Customization:
    """`customize` with tokenizer, text encoder and VAE of a Stable Diffusion pipeline; none of them is trained.

    Args:
        pipe: a `StableDiffusionPipeline`, on the device to train on; its scheduler is left as it is.
        images: PIL images of the concept, published 4 to 12; cropped at the centre.
        prompt: for all images, with a word that stands for the concept: "a photo of V* dog".
        resolution: rows and columns in pixels, a multiple of the VAE's stride.
        generator: as for `customize`; draws the latents too, once per image.
        options: of `customize`.

    Raises:
        ModelError: another kind of pipeline, or as `customize`.
        DataError: no images, or as `customize`.
    """
    missing = [p for p in ("vae", "unet", "encode_prompt", "image_processor") if not hasattr(pipe, p)]
    if missing:
        raise ModelError(
            f"{type(pipe).__name__} has no {', '.join(missing)}, expected a StableDiffusionPipeline; "
            "customize takes the U-Net, latents and text states of any other"
        )
    _refuse_other_inputs(pipe.unet)
    if not images:
        raise DataError("images is empty, expected PIL images of the concept (published: 4 to 12)")
    pixels = pipe.image_processor.preprocess(
        [image.convert("RGB") for image in images], height=resolution, width=resolution, resize_mode="crop"
    )
    with torch.no_grad():
        latents = [_encode(pipe.vae, image[None], generator) for image in pixels]
        conditioning, _ = pipe.encode_prompt(prompt, pipe.text_encoder.device, 1, False)
    # Samplers of pipelines skip timesteps; training needs the same noise levels, all of them.
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    return customize(
        pipe.unet, torch.cat(latents), conditioning[0], scheduler, generator=generator, **options
    )


def noise_loss(
    unet: nn.Module,
    latents_BChw: Tensor,
    conditioning_BTE: Tensor,
    scheduler: Any,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean squared error of the U-Net's prediction at uniformly drawn timesteps; a scalar in float32.

    What is predicted, noise or velocity, is `scheduler.config.prediction_type`. With a seeded generator it is
    the same question for every model, on held-out images for example.
    """
    device, dtype = unet.device, unet.dtype
    latents_BChw = latents_BChw.to(device, torch.float32)
    noise_BChw = randn_tensor(latents_BChw.shape, generator=generator, device=device)
    drawn_on = generator.device if generator is not None else "cpu"
    levels = scheduler.config.num_train_timesteps
    timesteps_B = torch.randint(levels, (len(latents_BChw),), generator=generator, device=drawn_on).to(device)
    noisy_BChw = scheduler.add_noise(latents_BChw, noise_BChw, timesteps_B)
    target_BChw = _target(scheduler, latents_BChw, noise_BChw, timesteps_B)
    predicted_BChw = unet(noisy_BChw.to(dtype), timesteps_B, conditioning_BTE.to(device, dtype)).sample
    return nn.functional.mse_loss(predicted_BChw.float(), target_BChw)


def _target(scheduler: Any, latents_BChw: Tensor, noise_BChw: Tensor, timesteps_B: Tensor) -> Tensor:
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise_BChw
    if kind == "v_prediction":
        return scheduler.get_velocity(latents_BChw, noise_BChw, timesteps_B)
    raise ModelError(f"the scheduler's prediction_type is {kind!r}, expected 'epsilon' or 'v_prediction'")


def _encode(vae: nn.Module, pixels_1CHW: Tensor, generator: torch.Generator | None) -> Tensor:
    """One image's latents as the U-Net takes them, [1, C, h, w]."""
    posterior = vae.encode(pixels_1CHW.to(vae.device, vae.dtype)).latent_dist
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (posterior.sample(generator).float() - shift) * vae.config.scaling_factor


def _shuffled_rounds(count: int, batch_size: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Endless batches of indices; every index comes once before any comes again."""
    device = generator.device if generator is not None else "cpu"
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator, device=device).cpu()])
        batch, waiting = waiting[:batch_size], waiting[batch_size:]
        yield batch


@contextmanager
def _only_trainable(unet: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for `weights` alone; what required them before does so afterwards."""
    before = {p: p.requires_grad for p in unet.parameters()}
    try:
        unet.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def _refuse_other_inputs(unet: nn.Module) -> None:
    added = unet.config.get("addition_embed_type")
    if added is not None:
        raise ModelError(
            f"this U-Net wants added conditions (addition_embed_type is {added!r}, as in Stable Diffusion XL), which "
            "customize does not pass; train add_adapter(unet).parameters() in a loop of your own"
        )


def _check_inputs(unet: nn.Module, latents: Tensor, conditioning: Tensor) -> Tensor:
    """The conditioning as [N, T, E]."""
    _refuse_other_inputs(unet)
    taken, given = unet.config.in_channels, unet.config.out_channels
    if latents.ndim != 4 or not len(latents) or latents.shape[1] != taken or taken != given:
        raise DataError(
            f"latents are {list(latents.shape)}, expected [N, {taken}, rows, columns] with N of at least 1, and a "
            f"U-Net that gives as many channels as it takes (this one takes {taken}, gives {given})"
        )
    # Some U-Nets project the text's states first.
    width = unet.config.get("encoder_hid_dim") or unet.config.cross_attention_dim
    if conditioning.ndim == 2:
        conditioning = conditioning[None]
    fits = conditioning.ndim == 3 and len(conditioning) in (1, len(latents))
    if not fits or (isinstance(width, int) and conditioning.shape[-1] != width):
        raise DataError(
            f"conditioning is {list(conditioning.shape)}, expected [tokens, {width}] or one such per latent, "
            f"[{len(latents)}, tokens, {width}]"
        )
    return conditioning.expand(len(latents), -1, -1)


def _check_adapter(adapter: Adapter, unet: nn.Module) -> None:
    if adapter.unet is not unet or not adapter.attached:
        raise ModelError("this adapter is not in use in this U-Net; load_adapter attaches a saved one")
    if adapter.scale != 1:
        raise ModelError(
            f"the adapter's scale is {adapter.scale}, expected 1 while training; set it afterwards"
        )
    precision = next(adapter.parameters()).dtype
    if precision != torch.float32 and precision != torch.float64:
        raise ModelError(
            f"the adapter is in {precision}, whose steps are too coarse to train; load or add it with "
            "dtype=torch.float32 (the U-Net may stay as it is)"
        )
