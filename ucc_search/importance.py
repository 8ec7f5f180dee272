"""Importance scores of a model's units: measured once per model, images and criterion, kept on disk."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn

from ucc_search.compression.masks import masked
from ucc_search.compression.parts import blocks_of, run_from
from ucc_search.compression.selection import Scores
from ucc_search.compression.weights import unit_weights
from ucc_search.errors import PluginError
from ucc_search.interfaces import Importance
from ucc_search.plan import ModelShape, UnitGroup
from ucc_search.shapes import cache_folder

_ROWS = 500  # images times deletions in one forward pass
_MEASURE = 2  # raise it when equal arguments no longer give equal scores: older caches then lapse
Progress = Callable[[int, int, str], None]
"""Called with groups done, groups in all, and what is next."""


class ModelProbe:
    """A dense model in eval mode and its proxy images (see `ucc_search.interfaces.Probe`)."""

    def __init__(self, model: nn.Module, shape: ModelShape, images: Sequence[Tensor]) -> None:
        self.model, self.shape, self._images = model.eval(), shape, list(images)
        self._device = next(model.parameters()).device

    @functools.cached_property
    def _logits(self) -> list[Tensor]:
        with torch.no_grad():
            return [self.model(x.to(self._device)) for x in self._images]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, logits in zip(self._images, self._logits, strict=True):
            yield images.to(self._device), logits

    def masked(self, masks: Mapping[tuple[str, int], Tensor]) -> AbstractContextManager[None]:
        return masked(self.model, masks)

    def weights(self, group: UnitGroup) -> list[Tensor]:
        if group.kind != "depth":
            return unit_weights(self.model, group.kind, group.index)
        halves_L2 = torch.tensor([self._half_norms(i) for i in range(self.shape.depth)])
        if self.shape.stages:
            return [halves_L2]
        steps = [
            halves_L2[u // 2] if u % 2 == 0 else torch.stack([halves_L2[u // 2 + 1, 0], halves_L2[u // 2, 1]])
            for u in range(group.units)
        ]
        return [torch.stack(steps)]

    def _half_norms(self, block: int) -> list[float]:
        """L2 norm of the weights of attention and of the MLP."""
        module = blocks_of(self.model)[block]
        return [
            sum(float(p.detach().square().sum()) for p in half.parameters()) ** 0.5
            for half in (module.attn, module.mlp)
        ]

    @torch.no_grad()
    def deletions(self, group: UnitGroup) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Exact, from the input of the first block that a deletion touches."""
        starts = torch.tensor([self._first_block(group, u) for u in range(group.units)])
        grids = [s.grid for s in self.shape.stages]
        for images, logits in self.batches():
            inputs = self._block_inputs(images, sorted({s for s in starts.tolist() if s >= 0}))
            for start in starts.unique().tolist():
                units = (starts == start).nonzero().flatten()
                # Whole batches are repeated: one pass deletes another unit in each copy.
                for units_K in units.split(max(1, _ROWS // len(images))):
                    x = inputs.get(start, images)
                    x = x.repeat(len(units_K), *[1] * (x.dim() - 1))
                    mask = x.new_ones(len(units_K), group.units)
                    mask[range(len(units_K)), units_K.to(mask.device)] = 0
                    mask = mask.repeat_interleave(len(images), dim=0)
                    with masked(self.model, {(group.kind, group.index): mask}):
                        out = self.model(x) if start < 0 else run_from(self.model, start, x, grids)
                    yield units_K, logits, out.unflatten(0, (len(units_K), len(images)))

    def _first_block(self, group: UnitGroup, unit: int) -> int:
        """The block from whose input on a deletion changes something; -1: from the image on."""
        if group.kind in ("attention", "mlp"):
            return group.index
        if group.kind == "depth":
            return unit if self.shape.stages else unit // 2
        # The last block before the stage: between them lies the stage's patch embedding.
        return self.shape.stage_of.index(group.index) - 1

    def _block_inputs(self, images: Tensor, wanted: Collection[int]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        blocks = blocks_of(self.model)

        def keep(index: int) -> Callable[..., None]:
            return lambda module, inputs: found.update({index: inputs[0]})

        handles = [blocks[i].register_forward_pre_hook(keep(i)) for i in wanted]
        try:
            if wanted:
                self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        return found


def unit_scores(
    model: nn.Module,
    shape: ModelShape,
    criterion: Importance,
    images: Sequence[Tensor] = (),
    *,
    groups: Collection[UnitGroup] | None = None,
    identity: object = None,
    cache: Path | None = None,
    progress: Progress = lambda done, total, text: None,
) -> Scores:
    """The importance of every unit, larger is kept.

    Args:
        model: dense, in eval mode.
        shape: `shape_of(model)` for the size of the images.
        images: batches of proxy images [B, C, H, W], normalised; never of the test split.
        groups: what to score; all by default.
        identity: what tells this criterion from others (name, parameters, hash); needed to cache.
        cache: folder to keep scores in; each group is written when it is done, so that an
            interrupted run goes on from there. None keeps nothing.

    Returns:
        scores_U in double precision by (kind, index).

    Raises:
        PluginError: a criterion gives scores of the wrong shape or not finite.
    """
    wanted = list(shape.unit_groups() if groups is None else groups)
    if cache is None:
        return _score(model, shape, criterion, images, wanted, None, progress)
    folder = cache / _digest(model, shape, images if criterion.needs_images else (), identity)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        return _score(model, shape, criterion, images, wanted, folder, progress)


def default_cache() -> Path:
    """Where scores are kept between runs; UCC_SEARCH_CACHE moves it."""
    return cache_folder() / "importances"


def _score(
    model: nn.Module,
    shape: ModelShape,
    criterion: Importance,
    images: Sequence[Tensor],
    groups: Sequence[UnitGroup],
    folder: Path | None,
    progress: Progress,
) -> Scores:
    from safetensors.torch import load_file, save_file

    scores: dict[tuple[str, int], Tensor] = {}
    measure: Callable[[UnitGroup], Tensor] | None = None
    for done, group in enumerate(groups):
        path = folder / f"{group.kind}-{group.index}.safetensors" if folder else None
        progress(done, len(groups), f"{group.kind} {group.index}")
        if path is not None and path.is_file():
            scores[group.kind, group.index] = load_file(path)["scores"]
            continue
        if measure is None:
            measure = criterion.build(ModelProbe(model, shape, images))
        found = _checked(measure(group), group, type(criterion).__name__)
        if path is not None:
            temporary = path.with_suffix(".part")
            save_file({"scores": found}, temporary)
            temporary.replace(path)
        scores[group.kind, group.index] = found
    progress(len(groups), len(groups), "done")
    return scores


def _checked(scores: Tensor, group: UnitGroup, name: str) -> Tensor:
    what = f"the importance {name} gave {group.kind}[{group.index}] scores"
    if tuple(scores.shape) != (group.units,):
        raise PluginError(f"{what} of shape {tuple(scores.shape)}, expected ({group.units},): one per unit")
    if not bool(scores.isfinite().all()):
        raise PluginError(f"{what} that are not finite")
    return scores.detach().double().cpu().contiguous()


def _digest(model: nn.Module, shape: ModelShape, images: Sequence[Tensor], identity: object) -> str:
    digest = hashlib.sha256(
        json.dumps([_MEASURE, identity, shape.to_dict()], sort_keys=True, default=str).encode()
    )
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for batch in images:
        digest.update(batch.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
