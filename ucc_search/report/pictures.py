"""Pictures of what a trained model does with real images: tokens kept at each block, and what was merged.

Needs torch, the trial's weights and the run's data; the images are of the selection split. What is
missing is said in a sentence in place of the pictures.

Shape suffixes: B images, N tokens, O original patches, H and W pixels, C channels.
"""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ucc_search.errors import UserError
from ucc_search.runs import Run

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SMALLEST = 112
"""Pixels that a shown image has at least; smaller ones are enlarged in whole steps."""
LARGEST = 160
COLUMNS = 6
"""Blocks shown at most, beside the image and the merges."""


@dataclass(frozen=True)
class Picture:
    """One image of a row."""

    uri: str  # data:image/png or data:image/jpeg
    caption: str
    alt: str


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures of one trial, or the reason why there are none."""

    trial: int | None
    rows: list[list[Picture]]
    reason: str = ""


@dataclass(frozen=True)
class Trace:
    """What one model did with B images, on the CPU."""

    kept: list[tuple[int, Tensor]]  # block, bool_BO: patches whose token is still there
    compose_BNO: Tensor | None  # each token left at the end as a mix of the original patches
    position_BN: Tensor | None  # where the tokens left at the end were
    predicted_B: Tensor


def gallery(run: Run, trials: list[int], *, images: int = 4) -> Gallery:
    """Pictures of the first of these trials that has weights and cuts tokens; never raises for what is missing."""
    folders = [(t, run.path / "trials" / str(t)) for t in trials]
    saved = [(t, folder) for t, folder in folders if (folder / "arch.json").is_file()]
    if not saved:
        return Gallery(None, [], "No weights are in the run folder, so there are no pictures of images.")
    try:
        import torch  # noqa: F401

        from ucc_search.binding import bind
        from ucc_search.data import load_data
        from ucc_search.plugins import Plugins

        data = load_data(bind(run.config, Plugins.load(run.config.plugins)).data)
    except (ImportError, UserError, OSError) as error:
        return Gallery(None, [], f"No pictures of images: {_sentence(error)}")
    reason = "The models with weights keep all of their tokens, so there is nothing to show on images."
    for trial, folder in saved:
        try:
            rows = _pictures(folder, data, images)
        except (UserError, RuntimeError, OSError) as error:
            reason = f"No pictures of images: {_sentence(error)}"
            continue
        if rows:
            return Gallery(trial, rows)
    return Gallery(None, [], reason)


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _pictures(folder: Path, data: Any, count: int) -> list[list[Picture]]:
    import torch

    from ucc_search.plan import CompressionPlan
    from ucc_search.saving import load_model

    model = load_model(folder)
    plan = CompressionPlan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    if plan.shape.stages or all(n == plan.shape.tokens for n in plan.tokens):
        return []
    images_BCHW, labels_B = data.select.batch(_one_of_each(data.select.labels_B, count))
    trace = traced(model, images_BCHW)
    mean, std = (torch.tensor(v or (0.0,)).view(1, -1, 1, 1) for v in (data.mean, data.std))
    pixels_BCHW = (images_BCHW * (std if data.std else 1.0) + mean).clamp(0, 1)
    grid = plan.shape.grid
    return [_row(pixels_BCHW[i], int(labels_B[i]), trace, i, grid, plan.tokens) for i in range(len(labels_B))]


def _one_of_each(labels_B: Tensor, count: int) -> Tensor:
    """Indices of the first image of different classes, spread over the classes."""
    import torch

    classes = labels_B.unique()
    chosen = classes[torch.linspace(0, len(classes) - 1, min(count, len(classes))).round().long()]
    return torch.stack([(labels_B == c).nonzero()[0, 0] for c in chosen])


def traced(model: torch.nn.Module, images_BCHW: Tensor) -> Trace:
    """Run the model and note after every block that changed tokens which patches are left."""
    import torch

    from ucc_search.compression.blocks import CascadeBlocks, CompressedBlock

    kept: list[tuple[int, Tensor]] = []
    last: list[Any] = []

    def note(block: CompressedBlock) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            if block.tokens_out is None or not isinstance(output, tuple) or output[1] is None:
                return
            state = output[1]
            there_BO = torch.zeros(len(images_BCHW), patches, dtype=torch.bool)
            kept.append((block.index, there_BO.scatter(1, state.position_BN.cpu(), True)))
            last[:] = [state]

        return hook

    cascades = [m for m in model.modules() if isinstance(m, CascadeBlocks)]
    blocks = [m for m in model.modules() if isinstance(m, CompressedBlock)]
    patches = blocks[0].grid[0] * blocks[0].grid[1] if blocks else 0
    handles = [b.register_forward_hook(note(b)) for b in blocks]
    try:
        for cascade in cascades:
            cascade.trace = True
        with torch.inference_mode():
            predicted_B = model(images_BCHW).argmax(dim=1)
    finally:
        for cascade in cascades:
            cascade.trace = False
        for handle in handles:
            handle.remove()
    state = last[0] if last else None
    return Trace(
        kept,
        None if state is None or state.compose_BNO is None else state.compose_BNO.float().cpu(),
        None if state is None else state.position_BN.cpu(),
        predicted_B,
    )


def _row(
    pixels_CHW: Tensor, label: int, trace: Trace, i: int, grid: tuple[int, int], tokens: tuple[int, ...]
) -> list[Picture]:
    guess = int(trace.predicted_B[i])
    verdict = "right" if guess == label else f"taken for {guess}"
    row = [Picture(_encoded(_upscaled(pixels_CHW)), f"class {label}, {verdict}", f"image of class {label}")]
    shown = _few([k for j, k in enumerate(trace.kept) if j == 0 or not k[1].equal(trace.kept[j - 1][1])])
    for block, kept_BO in shown:
        left = int(kept_BO[i].sum())
        row.append(
            Picture(
                _encoded(dimmed(_upscaled(pixels_CHW), kept_BO[i].view(grid))),
                f"block {block}: {left}",
                f"the {left} of {kept_BO.shape[1]} tokens left after block {block}; the others are dark",
            )
        )
    if trace.compose_BNO is not None and trace.position_BN is not None:
        owner_O = owners(trace.compose_BNO[i], trace.position_BN[i])
        gone = int((owner_O < 0).sum())
        merged = len(owner_O) - gone - trace.compose_BNO.shape[1]
        row.append(
            Picture(
                _encoded(coloured(_upscaled(pixels_CHW), owner_O.view(grid))),
                f"{merged} merged, {gone} gone",
                f"patches of one colour end in one token: {merged} were merged, {gone} dropped",
            )
        )
    return row


def _few(kept: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """At most `COLUMNS` of them, with the first and the last."""
    if len(kept) <= COLUMNS:
        return kept
    return [kept[round(j * (len(kept) - 1) / (COLUMNS - 1))] for j in range(COLUMNS)]


def owners(compose_NO: Tensor, position_N: Tensor) -> Tensor:
    """int64_O: the patch whose token holds most of each original patch; -1 where nothing of it is left."""
    share_O, index_O = compose_NO.max(dim=0)
    return position_N[index_O].masked_fill(share_O <= 0, -1)


def _upscaled(pixels_CHW: Tensor) -> Tensor:
    """RGB, large enough to see: small images in whole steps, large ones brought down."""
    import torch.nn.functional as F

    rgb = pixels_CHW.expand(3, -1, -1) if pixels_CHW.shape[0] == 1 else pixels_CHW[:3]
    size = min(rgb.shape[1:])
    if size < SMALLEST:
        return F.interpolate(rgb[None], scale_factor=-(-SMALLEST // size), mode="nearest")[0]
    if size > LARGEST:
        return F.interpolate(rgb[None], scale_factor=LARGEST / size, mode="area")[0]
    return rgb


def dimmed(pixels_CHW: Tensor, kept_gg: Tensor) -> Tensor:
    """The image with slate over the patches whose token is gone; dark images have dark patches that stay."""
    import torch

    kept_HW = _stretched(kept_gg.float(), pixels_CHW)
    slate = torch.tensor((0.17, 0.21, 0.30)).view(3, 1, 1)
    covered = slate + 0.16 * pixels_CHW.mean(dim=0, keepdim=True)
    return pixels_CHW * kept_HW + covered * (1 - kept_HW)


def coloured(pixels_CHW: Tensor, owner_gg: Tensor) -> Tensor:
    """The image, patches that share a token tinted alike; patches of which nothing is left are slate."""
    import torch

    names, counts = owner_gg.flatten().unique(return_counts=True)
    shared = [n for n, c in zip(names.tolist(), counts.tolist(), strict=True) if n >= 0 and c > 1]
    palette = torch.zeros(3, *owner_gg.shape)
    for k, name in enumerate(shared):
        # The golden ratio keeps the hues of neighbours in the list apart.
        tint = torch.tensor(colorsys.hsv_to_rgb((0.08 + k * 0.618034) % 1.0, 0.62, 1.0))
        palette[:, owner_gg == name] = tint[:, None]
    tint_HW = _stretched(palette, pixels_CHW)
    light = pixels_CHW.mean(dim=0, keepdim=True)
    tinted = (tint_HW * (0.35 + 0.65 * light)).clamp(0, 1)
    alone = tint_HW.sum(dim=0) == 0
    left = dimmed(pixels_CHW, owner_gg >= 0)
    return torch.where(alone, left, tinted)


def _stretched(values: Tensor, pixels_CHW: Tensor) -> Tensor:
    """Values on the grid of tokens, for every pixel."""
    import torch.nn.functional as F

    batch = values[None, None] if values.dim() == 2 else values[None]
    return F.interpolate(batch, size=pixels_CHW.shape[1:], mode="nearest")[0]


def _encoded(pixels_CHW: Tensor) -> str:
    """A data URI: PNG of small images with few colours, JPEG where that is smaller."""
    from PIL import Image

    array = (pixels_CHW.permute(1, 2, 0) * 255).round().byte().numpy()
    best = b""
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 82})):
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, kind, **options)
        if not best or len(stream.getvalue()) < len(best):
            best, name = stream.getvalue(), kind.lower()
    return f"data:image/{name};base64,{base64.b64encode(best).decode()}"
