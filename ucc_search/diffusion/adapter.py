"""The adapter of a whole U-Net: added, scaled, saved, loaded, removed or merged; its own weights stay as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

from ucc_search.diffusion.attention import Init, LowRankAttention
from ucc_search.diffusion.merging import Lost, merge_term, refuse_unmergeable
from ucc_search.errors import ModelError, did_you_mean

KIND = "comcat"
FILE_FORMAT = "1"

_PLAIN = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
"""Processors that compute attention and nothing else: ours may stand in for them."""
_UNKNOWN = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")
"""Parts of an attention that `LowRankAttention` does not compute."""


class Adapter:
    """The low-rank terms of one U-Net. Made by `add_adapter` and `load_adapter`.

    Its modules are diffusers' attention processors, so `unet.to(...)` moves them with the U-Net. They
    are in `unet.state_dict()` too while attached: `remove()` or `merge()` before `unet.save_pretrained()`.

    Attributes:
        unet: the U-Net it belongs to.
        terms: a `LowRankAttention` per attention, by the attention's name in the U-Net.
        rank: r, per head.
    """

    def __init__(self, unet: nn.Module, terms: Mapping[str, LowRankAttention], rank: int) -> None:
        self.unet = unet
        self.terms = dict(terms)
        self.rank = rank
        self._replaced: dict[str, Any] = {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that is trained."""
        for term in self.terms.values():
            yield from term.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """Weights by name: that of the attention, then `u_q`, `s_k`, `u_v` or `s_o`."""
        return {
            f"{name}.{part}": getattr(term, part).weight
            for name, term in self.terms.items()
            for part in ("u_q", "s_k", "u_v", "s_o")
        }

    @property
    def scale(self) -> float:
        """a, at inference: q', k', v' and the output are multiplied by it, both terms thus by a².

        1 is as trained, 0 the U-Net as it was; the paper's example has 0.8.
        """
        return next(iter(self.terms.values())).scale

    @scale.setter
    def scale(self, value: float) -> None:
        for term in self.terms.values():
            term.scale = float(value)

    @property
    def attached(self) -> bool:
        """Whether every term is in use; diffusers' own `set_attn_processor` and its like replace them."""
        return all(attn.processor is self.terms[name] for name, attn in self._attentions().items())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the weights in their own precision, and what they fit."""
        from safetensors.torch import save_file

        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        metadata = {
            "format": "pt",
            "adapter": KIND,
            "adapter_format": FILE_FORMAT,
            "rank": str(self.rank),
            "base": _name(self.unet),
            "layout": layout_of(self.unet),
        }
        save_file(weights, path, metadata=metadata)

    def remove(self) -> None:
        """Give the U-Net its former processors back: it computes what it did before, bit for bit.

        The weights stay here and can still be saved.
        """
        self._refuse_detached("remove")
        self._restore()

    def merge(self, *, approximate: bool = False) -> dict[str, Lost]:
        """Put the terms, at the current scale, into the U-Net's own weights, and detach.

        Exactly, every head becomes d + r channels wide. The U-Net then runs with diffusers' own
        processors, and computes the same; its configuration cannot say so, hence `from_pretrained`
        does not load it. Approximately, the best d of each head's d + r ranks are kept, so that
        shapes, and thus files, are those of the base model. Neither can be undone.

        Returns:
            What was lost, per attention: 0 where exact, else shares of the adapter's change from 0 to 1.

        Raises:
            ModelError: it is not attached, or a projection is not a plain linear layer without bias.
        """
        self._refuse_detached("merge")
        attentions = self._attentions()
        for name, attn in attentions.items():
            refuse_unmergeable(name, attn)
        with torch.no_grad():
            lost = {n: merge_term(a, self.terms[n], approximate=approximate) for n, a in attentions.items()}
        self._restore()
        return lost

    def _attentions(self) -> dict[str, Attention]:
        return {name: self.unet.get_submodule(name) for name in self.terms}

    def _attach(self) -> None:
        self._replaced = {name: attn.processor for name, attn in self._attentions().items()}
        _set_processors(self.unet, self.terms)

    def _restore(self) -> None:
        _set_processors(self.unet, self._replaced)

    def _refuse_detached(self, verb: str) -> None:
        if not self.attached:
            raise ModelError(
                f"cannot {verb} an adapter that is not in use: it was removed or merged, or its attention "
                "processors were replaced since; add_adapter or load_adapter attaches a new one"
            )


def add_adapter(
    unet: nn.Module, rank: int = 2, *, init: Init = "zero", dtype: torch.dtype = torch.float32
) -> Adapter:
    """Add low-rank terms to self- and cross-attention of every transformer block of a U-Net of diffusers.

    Args:
        unet: a `UNet2DConditionModel` or another model of diffusers' with `BasicTransformerBlock`s.
            Its weights are not touched, nor is whether they require gradients.
        rank: r, per head, at least 1; published 2.
        init: `zero` (default) starts at the U-Net as it is, so that no step of a short training
            goes into undoing noise; `random` is as published.
        dtype: of the adapter's weights; float32 to train, whatever the U-Net's.

    Raises:
        ModelError: no transformer blocks, an attention of another kind, an adapter already there, or
            a bad rank or init.

    Reference: Xiao et al. 2023, COMCAT, arXiv:2305.17235, the section on customisation.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ModelError(f"rank is {rank!r}, expected a whole number of at least 1 (per head; published: 2)")
    if init not in get_args(Init):
        near = did_you_mean(str(init), get_args(Init))
        raise ModelError(f"init is {init!r}, expected one of {', '.join(get_args(Init))}{near}")
    adapter = _build(unet, rank, init, dtype)
    adapter._attach()
    return adapter


def load_adapter(unet: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None) -> Adapter:
    """Add a saved adapter to a U-Net of the layout it was trained with.

    Args:
        unet: as for `add_adapter`.
        path: the file that `Adapter.save` wrote.
        dtype: of the adapter's weights; default: the U-Net's, as is best for inference.

    Raises:
        ModelError: as `add_adapter`; not such a file, or of a U-Net with other attentions.
    """
    weights, metadata = _read(Path(path))
    if metadata["layout"] != layout_of(unet):
        raise ModelError(
            f"{path}: made for the U-Net {metadata['base']!r}, whose attentions are not those of this "
            f"one, {_name(unet)!r}; load the base model it was trained with"
        )
    adapter = _build(unet, int(metadata["rank"]), "zero", dtype or unet.dtype)
    own = adapter.state_dict()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in weights.items()}:
        raise ModelError(f"{path}: its weights are not those of rank {adapter.rank}; fetch the file again")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])
    adapter._attach()
    return adapter


def layout_of(unet: nn.Module) -> str:
    """A hash of the names and sizes of all attentions: what an adapter must fit.

    Not of the whole configuration, which gains keys with every version of diffusers.
    """
    rows = [
        [name, a.heads, a.query_dim, a.cross_attention_dim, a.out_dim]
        for name, a in _block_attentions(unet).items()
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _build(unet: nn.Module, rank: int, init: Init, dtype: torch.dtype) -> Adapter:
    """An adapter that fits, not yet attached."""
    attentions = _block_attentions(unet)
    for name, attn in attentions.items():
        _refuse_unknown(name, attn)
    terms = {n: LowRankAttention(attn, rank, init=init, dtype=dtype) for n, attn in attentions.items()}
    return Adapter(unet, terms, rank)


def _block_attentions(unet: nn.Module) -> dict[str, Attention]:
    """Self- and cross-attention of every transformer block, by name, in the order of the modules."""
    found = {
        f"{name}.{part}": getattr(block, part)
        for name, block in unet.named_modules()
        if isinstance(block, BasicTransformerBlock)
        for part in ("attn1", "attn2")
        if getattr(block, part) is not None
    }
    if not found or not hasattr(unet, "set_attn_processor"):
        raise ModelError(
            f"{type(unet).__name__} has no transformer blocks to adapt, expected a U-Net of diffusers with "
            "cross-attention, for example pipeline.unet"
        )
    return found


def _refuse_unknown(name: str, attn: Attention) -> None:
    """Dropping what we do not compute would change the model silently."""
    if isinstance(attn.processor, LowRankAttention):
        raise ModelError(f"{name} already has an adapter; remove() or merge() that one first")
    if type(attn.processor) not in _PLAIN:
        raise ModelError(
            f"{name} has the processor {type(attn.processor).__name__}, which an adapter would replace; "
            "call unet.set_default_attn_processor() or unload what set it"
        )
    extras = [part for part in _UNKNOWN if getattr(attn, part, None) is not None]
    extras += ["residual_connection"] if attn.residual_connection else []
    extras += ["rescale_output_factor"] if attn.rescale_output_factor != 1 else []
    if extras:
        raise ModelError(f"{name} has {', '.join(extras)}, which adapters do not support")


def _set_processors(unet: nn.Module, by_attention: Mapping[str, Any]) -> None:
    """diffusers wants a processor for every attention, so those not named here keep theirs."""
    unet.set_attn_processor(
        {**unet.attn_processors, **{f"{n}.processor": p for n, p in by_attention.items()}}
    )


def _name(unet: nn.Module) -> str:
    """The base model as the user named it; empty if it came from no file."""
    return str(unet.config.get("_name_or_path", ""))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not readable as safetensors ({type(error).__name__}: {error})") from None
    if metadata.get("adapter") != KIND:
        raise ModelError(f"{path}: not an adapter of ucc_search, expected a file that Adapter.save wrote")
    if metadata.get("adapter_format") != FILE_FORMAT:
        raise ModelError(
            f"{path}: adapter format {metadata.get('adapter_format')}, expected {FILE_FORMAT}; upgrade ucc-search"
        )
    return weights, metadata
