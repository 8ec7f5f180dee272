"""What a model is: the integers that plans and costs are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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
    kv_reduction: int = 1  # stride of the convolution that shrinks the grid of keys and values (PVT)
    kv_tokens: int = 0  # tokens on that smaller grid
    mlp_kernel: int = 0  # weights per hidden channel of a depth-wise convolution in the MLP; 0: none


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """What can be deleted one at a time: all channels, hidden units or depth steps of one place.

    Kinds: `embed` (channels of a stage's embedding, in all its layers), `attention` (channel j of a
    block, heads one after another: the same in Q, K, V and the projection), `mlp` (hidden units of a
    block) and `depth` (half-steps: unit 2 i is block i, unit 2 i + 1 the MLP of block i with the
    attention of block i + 1; in a pyramid unit i is block i).
    """

    kind: str
    index: int  # of the stage or the block; 0 for depth
    units: int


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
class StageShape:
    """One resolution of a pyramid: a patch embedding from the stage before, then blocks, then a norm."""

    grid: tuple[int, int]  # tokens, rows by columns
    embed_dim: int
    depth: int
    patch: int  # weights per pair of channels of the patch embedding: 49 for 7 x 7

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


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
    embed_dim: int  # what the head reads; the last stage's in a pyramid
    pool: str  # token, avg, avgmax, max, map or "" (timm's names)
    head_tokens: int  # leading tokens the head reads alone; 0 where it reads patches
    blocks: tuple[BlockShape, ...]
    stem: AffineCost
    head: AffineCost
    pool_macs_per_token: int = 0  # attention pooling reads every remaining token
    stages: tuple[StageShape, ...] = ()  # of a pyramid (PVTv2), whose tokens are never cut; else empty

    @property
    def tokens(self) -> int:
        """Patch tokens entering the first block."""
        return self.grid[0] * self.grid[1]

    @property
    def embed_dims(self) -> tuple[int, ...]:
        """Embedding width of every stage; a model of one resolution is one stage."""
        return tuple(s.embed_dim for s in self.stages) or (self.embed_dim,)

    @property
    def stage_of(self) -> tuple[int, ...]:
        """The stage each block belongs to."""
        return tuple(i for i, s in enumerate(self.stages) for _ in range(s.depth)) or (0,) * self.depth

    @property
    def block_tokens(self) -> tuple[int, ...]:
        """Patch tokens of every block in the uncompressed model."""
        return tuple(s.tokens for s in self.stages for _ in range(s.depth)) or (self.tokens,) * self.depth

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def classifiers(self) -> int:
        """Linear layers from the embedding to the classes: one, two in a distilled DeiT, none without a head."""
        return self.head.macs_per_channel // self.classes if self.classes else 0

    def unit_groups(self) -> tuple[UnitGroup, ...]:
        """Everything that can be deleted, in the order of the model; depth last."""
        groups = [UnitGroup("embed", i, dim) for i, dim in enumerate(self.embed_dims)]
        for i, block in enumerate(self.blocks):
            groups.append(UnitGroup("attention", i, block.heads * block.qk_dim))
            groups.append(UnitGroup("mlp", i, block.mlp_hidden))
        steps = self.depth if self.stages else 2 * self.depth - 1
        return (*groups, UnitGroup("depth", 0, steps))

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
                "stages": tuple(
                    StageShape(**{**s, "grid": tuple(s["grid"])}) for s in data.get("stages", ())
                ),
            }
        )
