"""What a model is (`ModelShape`) and what it becomes (`CompressionPlan`). Integers only; no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ucc_search.errors import PlanError

PLAN_FORMAT = 1


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Widths of one transformer block, and which of its parameters exist."""

    heads: int
    qk_dim: int  # query and key width per head
    v_dim: int  # value width per head
    mlp_hidden: int
    mlp_matrices: int = 2  # 3 for gated MLPs (SwiGLU)
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    channel_vectors: int = 4  # per-channel vectors of both norms and of LayerScale
    qk_norm_vectors: int = 0  # vectors of width qk_dim (query and key norms)
    attn_norm_vectors: int = 0  # vectors of width heads * v_dim
    mlp_norm_vectors: int = 0  # vectors of width mlp_hidden


@dataclass(frozen=True, slots=True)
class AffineCost:
    """Cost of a part outside the blocks: a constant plus a share per embedding channel."""

    macs: int = 0
    macs_per_channel: int = 0
    params: int = 0
    params_per_channel: int = 0

    def at(self, embed_dim: int) -> tuple[int, int]:
        """(MACs, parameters) at this embedding width."""
        return (
            self.macs + self.macs_per_channel * embed_dim,
            self.params + self.params_per_channel * embed_dim,
        )


@dataclass(frozen=True, slots=True)
class ModelShape:
    """All that plans and costs need to know of a Vision Transformer, read from the model once."""

    name: str
    image_size: tuple[int, int]
    channels: int
    classes: int
    grid: tuple[int, int]  # patch tokens, rows by columns
    prefix_tokens: int  # class, distillation and register tokens: never scored, never pruned
    class_token: bool
    embed_dim: int
    pool: str  # token, avg, avgmax, max, map or "" (timm's names)
    head_tokens: int  # leading tokens the head reads alone; 0 where it reads patches
    blocks: tuple[BlockShape, ...]
    stem: AffineCost
    head: AffineCost
    pool_macs_per_token: int = 0  # attention pooling reads every remaining token

    @property
    def tokens(self) -> int:
        """Patch tokens entering the first block."""
        return self.grid[0] * self.grid[1]

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelShape:
        return cls(
            **{
                **data,
                "image_size": tuple(data["image_size"]),
                "grid": tuple(data["grid"]),
                "blocks": tuple(BlockShape(**b) for b in data["blocks"]),
                "stem": AffineCost(**data["stem"]),
                "head": AffineCost(**data["head"]),
            }
        )


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block of the compressed model.

    Tokens are reduced between attention and MLP: attention sees what the block before left,
    the MLP sees `tokens_out` patch tokens (plus the prefix tokens).
    """

    tokens_out: int
    heads: int
    qk_dim: int  # rank of the query-key product per head, once factorised
    v_dim: int  # rank of the value-output product per head, once factorised
    mlp_hidden: int
    mlp_rank: int | None = None  # None: dense MLP matrices
    attention: bool = True  # False: this half-block is removed (depth pruning)
    mlp: bool = True


_PER_BLOCK = tuple(f.name for f in fields(BlockPlan))


@dataclass(frozen=True, slots=True)
class CompressionPlan:
    """Integers that fix a compressed model completely, before a weight is touched."""

    shape: ModelShape
    embed_dim: int
    blocks: tuple[BlockPlan, ...]
    head_tokens_only: bool = False
    """Compute the last block's queries, projection and MLP for the tokens the head reads, alone.

    Exact: outputs are those of the full block. Possible where the head reads the class token.
    """

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def identity(cls, shape: ModelShape) -> CompressionPlan:
        """The plan that changes nothing."""
        blocks = tuple(
            BlockPlan(shape.tokens, b.heads, b.qk_dim, b.v_dim, b.mlp_hidden) for b in shape.blocks
        )
        return cls(shape, shape.embed_dim, blocks)

    def replace(self, **changes: Any) -> CompressionPlan:
        """A copy with some fields changed.

        Args:
            changes: `embed_dim`, `head_tokens_only`, or any field of `BlockPlan`; a block field
                takes one value for all blocks or a sequence with one value per block.
        """
        whole = {k: changes.pop(k) for k in ("embed_dim", "head_tokens_only") if k in changes}
        blocks = list(self.blocks)
        for name, value in changes.items():
            if name not in _PER_BLOCK:
                raise PlanError(f"a plan has no field {name!r}, expected one of {', '.join(_PER_BLOCK)}")
            values = value if isinstance(value, Sequence) else [value] * len(blocks)
            if len(values) != len(blocks):
                raise PlanError(
                    f"{name} has {len(values)} values, expected {len(blocks)} (one per block of {self.shape.name})"
                )
            blocks = [replace(b, **{name: v}) for b, v in zip(blocks, values, strict=True)]
        return replace(self, blocks=tuple(blocks), **whole)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Patch tokens after each block."""
        return tuple(b.tokens_out for b in self.blocks)

    @property
    def tokens_in(self) -> tuple[int, ...]:
        """Patch tokens that the attention of each block sees."""
        return (self.shape.tokens, *self.tokens[:-1])

    @property
    def key(self) -> str:
        """Canonical text of the integers: equal keys are equal architectures."""
        numbers = [[getattr(b, name) for name in _PER_BLOCK] for b in self.blocks]
        return json.dumps([self.embed_dim, self.head_tokens_only, numbers], separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        return {"format": PLAN_FORMAT, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionPlan:
        if data.get("format") != PLAN_FORMAT:
            raise PlanError(
                f"plan format is {data.get('format')!r}, expected {PLAN_FORMAT}; "
                "write the plan again with this version of ucc-search"
            )
        return cls(
            ModelShape.from_dict(data["shape"]),
            data["embed_dim"],
            tuple(BlockPlan(**b) for b in data["blocks"]),
            data["head_tokens_only"],
        )

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        return cls.from_dict(json.loads(text))


def _check(plan: CompressionPlan) -> None:
    shape = plan.shape
    if len(plan.blocks) != shape.depth:
        raise PlanError(f"the plan has {len(plan.blocks)} blocks, {shape.name} has {shape.depth}")
    if plan.head_tokens_only and not shape.head_tokens:
        raise PlanError(
            f"head_tokens_only needs a head that reads the class token, {shape.name} pools by {shape.pool!r}; "
            "leave it False"
        )
    if not 1 <= plan.embed_dim <= shape.embed_dim:
        raise PlanError(f"embed_dim is {plan.embed_dim}, expected 1 to {shape.embed_dim}")
    tokens = shape.tokens
    for i, (block, full) in enumerate(zip(plan.blocks, shape.blocks, strict=True)):
        if not 1 <= block.tokens_out <= tokens:
            raise PlanError(
                f"blocks[{i}].tokens_out is {block.tokens_out}, expected 1 to {tokens} "
                "(tokens never grow with depth)"
            )
        tokens = block.tokens_out
        for name in ("heads", "qk_dim", "v_dim", "mlp_hidden"):
            value, most = getattr(block, name), getattr(full, name)
            if value < 1 or (name != "qk_dim" and name != "v_dim" and value > most):
                raise PlanError(f"blocks[{i}].{name} is {value}, expected 1 to {most}")
