"""What a model becomes: the integers of every block, checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ucc_search.errors import PlanError
from ucc_search.plan.model_shape import BlockShape, ModelShape

PLAN_FORMAT = 2
_OLDER_FORMATS = (1,)  # 1: one embedding width, before models of several stages


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block of the compressed model.

    Tokens are reduced between attention and MLP: attention sees what the block before left,
    the MLP sees `tokens_out` patch tokens (plus the prefix tokens). A block without attention has
    nothing to score by, so it leaves as many tokens as it gets.
    """

    tokens_out: int
    heads: int
    qk_dim: int  # query and key channels per head
    v_dim: int  # value channels per head
    mlp_hidden: int
    mlp_rank: int | None = None  # None: dense MLP matrices
    attention: bool = True  # False: this half-block is removed (depth pruning)
    mlp: bool = True

    @property
    def present(self) -> bool:
        """Whether anything of the block is left."""
        return self.attention or self.mlp


WHOLE_FIELDS = ("embed_dims", "head_tokens_only", "low_rank_attention", "head_rank")
_PER_BLOCK = tuple(f.name for f in fields(BlockPlan))


@dataclass(frozen=True, slots=True)
class CompressionPlan:
    """Integers that fix a compressed model completely, before a weight is touched."""

    shape: ModelShape
    embed_dims: tuple[int, ...]
    """Embedding width of every stage; of one resolution there is one."""
    blocks: tuple[BlockPlan, ...]
    head_tokens_only: bool = False
    """Compute the last block's queries, projection and MLP for the tokens the head reads, alone.

    Exact: outputs are those of the full block. Possible where the head reads the class token.
    """

    low_rank_attention: bool = False
    """`qk_dim` and `v_dim` are ranks, to which each head's products are factorised (COMCAT); else they are
    channels, of which the most important are selected (UP-ViT)."""

    head_rank: int | None = None
    """Rank of the classifier's matrix (of each, where there are two); None: dense."""

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def identity(cls, shape: ModelShape) -> CompressionPlan:
        """The plan that changes nothing."""
        blocks = tuple(
            BlockPlan(tokens, b.heads, b.qk_dim, b.v_dim, b.mlp_hidden)
            for tokens, b in zip(shape.block_tokens, shape.blocks, strict=True)
        )
        return cls(shape, shape.embed_dims, blocks)

    def replace(self, **changes: Any) -> CompressionPlan:
        """A copy with some fields changed.

        Args:
            changes: `embed_dim` (of a model of one resolution), `embed_dims` (one per stage),
                `head_tokens_only`, `low_rank_attention`, `head_rank`, or any field of `BlockPlan`; a block field
                takes one value for all blocks or a sequence with one value per block.
        """
        whole = {k: changes.pop(k) for k in WHOLE_FIELDS if k in changes}
        if "embed_dim" in changes:
            whole["embed_dims"] = (changes.pop("embed_dim"),)
        blocks = self.blocks
        if changes:
            # Column by column: a projection makes thousands of plans, and dataclasses.replace is slow.
            columns = {name: self._column(name, value) for name, value in changes.items()}
            fields = (columns.get(name) or [getattr(b, name) for b in blocks] for name in _PER_BLOCK)
            blocks = tuple(map(BlockPlan, *fields))
        kept = {name: whole.get(name, getattr(self, name)) for name in WHOLE_FIELDS}
        return CompressionPlan(self.shape, blocks=blocks, **kept)

    def unchecked(self, blocks: Iterable[BlockPlan]) -> CompressionPlan:
        """A copy with other blocks that are known to be sound: projections try hundreds of plans."""
        copy = object.__new__(CompressionPlan)
        for name in _WHOLE_PLAN:
            object.__setattr__(copy, name, getattr(self, name))
        object.__setattr__(copy, "blocks", tuple(blocks))
        return copy

    def _column(self, name: str, value: Any) -> Sequence[Any]:
        if name not in _PER_BLOCK:
            raise PlanError(f"a plan has no field {name!r}, expected one of {', '.join(_PER_BLOCK)}")
        values = value if isinstance(value, Sequence) else [value] * len(self.blocks)
        if len(values) != len(self.blocks):
            raise PlanError(
                f"{name} has {len(values)} values, expected {len(self.blocks)} (one per block of {self.shape.name})"
            )
        return values

    @property
    def embed_dim(self) -> int:
        """Embedding width that the head reads."""
        return self.embed_dims[-1]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Patch tokens after each block."""
        return tuple(b.tokens_out for b in self.blocks)

    @property
    def tokens_in(self) -> tuple[int, ...]:
        """Patch tokens that the attention of each block sees."""
        return self.shape.block_tokens if self.shape.stages else (self.shape.tokens, *self.tokens[:-1])

    @property
    def present(self) -> tuple[int, ...]:
        """Indices of the blocks of which something is left."""
        return tuple(i for i, b in enumerate(self.blocks) if b.present)

    @property
    def head_block(self) -> int | None:
        """The block computed for the tokens the head reads alone: the last that is left; or None."""
        return self.present[-1] if self.head_tokens_only else None

    @property
    def key(self) -> str:
        """Canonical text of the integers: equal keys are equal architectures."""
        numbers = [[getattr(b, name) for name in _PER_BLOCK] for b in self.blocks]
        width = self.embed_dims if len(self.embed_dims) > 1 else self.embed_dim
        flags: list[Any] = [self.head_tokens_only] + [True] * self.low_rank_attention
        flags += [] if self.head_rank is None else [{"head_rank": self.head_rank}]
        return json.dumps([width, *flags, numbers], separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        return {"format": PLAN_FORMAT, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionPlan:
        if data.get("format") not in (PLAN_FORMAT, *_OLDER_FORMATS):
            raise PlanError(
                f"plan format is {data.get('format')!r}, expected {PLAN_FORMAT}; "
                "write the plan again with this version of ucc-search"
            )
        return cls(
            ModelShape.from_dict(data["shape"]),
            tuple(data["embed_dims"]) if "embed_dims" in data else (data["embed_dim"],),
            tuple(BlockPlan(**b) for b in data["blocks"]),
            data["head_tokens_only"],
            data.get("low_rank_attention", False),
            data.get("head_rank"),
        )

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        return cls.from_dict(json.loads(text))


_WHOLE_PLAN = tuple(f.name for f in fields(CompressionPlan) if f.name != "blocks")


def _check(plan: CompressionPlan) -> None:
    shape = plan.shape
    if len(plan.blocks) != shape.depth:
        raise PlanError(f"the plan has {len(plan.blocks)} blocks, {shape.name} has {shape.depth}")
    if plan.head_tokens_only and not shape.head_tokens:
        raise PlanError(
            f"head_tokens_only needs a head that reads the class token, {shape.name} pools by {shape.pool!r}; "
            "leave it False"
        )
    _check_embed_dims(plan)
    if not plan.present:
        raise PlanError(f"the plan leaves no block of {shape.name}, expected one at least")
    for i, (block, full, most) in enumerate(zip(plan.blocks, shape.blocks, plan.tokens_in, strict=True)):
        if shape.stages and block.tokens_out != most:
            raise PlanError(
                f"blocks[{i}].tokens_out is {block.tokens_out}, expected {most}: {shape.name} reduces its keys by "
                "convolutions on the whole grid, so its tokens cannot be cut"
            )
        if shape.stages and block.attention != block.mlp:
            raise PlanError(f"blocks[{i}] lacks one half; a pyramid loses whole blocks only")
        if not block.attention and block.tokens_out != most:
            raise PlanError(
                f"blocks[{i}].tokens_out is {block.tokens_out}, expected {most}: a block without attention has "
                "nothing to score its tokens by"
            )
        if not 1 <= block.tokens_out <= most:
            raise PlanError(
                f"blocks[{i}].tokens_out is {block.tokens_out}, expected 1 to {most} "
                "(tokens never grow with depth)"
            )
        _check_widths(f"blocks[{i}]", block, full)
        _check_ranks(f"blocks[{i}]", plan, i)
    _check_head_rank(plan)


def _check_embed_dims(plan: CompressionPlan) -> None:
    shape = plan.shape
    if len(plan.embed_dims) != len(shape.embed_dims):
        raise PlanError(
            f"embed_dims has {len(plan.embed_dims)} values, expected {len(shape.embed_dims)} "
            f"(one per stage of {shape.name})"
        )
    for i, (dim, full) in enumerate(zip(plan.embed_dims, shape.embed_dims, strict=True)):
        name = f"embed_dims[{i}]" if shape.stages else "embed_dim"
        if not 1 <= dim <= full:
            raise PlanError(f"{name} is {dim}, expected 1 to {full}")
    if shape.pool == "map" and plan.embed_dims != shape.embed_dims:
        raise PlanError(
            f"embed_dim is {plan.embed_dim}, expected {shape.embed_dim}: the attention pooling of {shape.name} "
            "is not pruned"
        )


def _check_widths(where: str, block: BlockPlan, full: BlockShape) -> None:
    for name in ("heads", "mlp_hidden"):
        value, most = getattr(block, name), getattr(full, name)
        if not 1 <= value <= most:
            raise PlanError(f"{where}.{name} is {value}, expected 1 to {most}")
    # One new head may take channels of several old ones (UP-ViT fuses them).
    most = full.heads // block.heads * full.qk_dim
    for name in ("qk_dim", "v_dim"):
        value = getattr(block, name)
        if not 1 <= value <= most:
            raise PlanError(
                f"{where}.{name} is {value}, expected 1 to {most} ({full.heads} heads of {full.qk_dim} for "
                f"{block.heads})"
            )
        if value != getattr(full, name) and name == "qk_dim" and full.qk_norm_vectors:
            raise PlanError(
                f"{where}.qk_dim is {value}, expected {full.qk_dim}: the norm of queries and keys is shared by "
                "all heads, so heads cannot keep different channels"
            )


def _check_ranks(where: str, plan: CompressionPlan, index: int) -> None:
    block, full = plan.blocks[index], plan.shape.blocks[index]
    if block.mlp_rank is not None:
        most = min(block.mlp_hidden, plan.embed_dims[plan.shape.stage_of[index]])
        if not 1 <= block.mlp_rank <= most:
            raise PlanError(f"{where}.mlp_rank is {block.mlp_rank}, expected 1 to {most}, or None for dense")
    if not plan.low_rank_attention:
        return
    for name, value, most in (("qk_dim", block.qk_dim, full.qk_dim), ("v_dim", block.v_dim, full.v_dim)):
        if value > most:
            raise PlanError(f"{where}.{name} is {value}, expected a rank of 1 to {most}")
    if full.attn_norm_vectors and block.v_dim != full.v_dim:
        raise PlanError(
            f"{where}.v_dim is {block.v_dim}, expected {full.v_dim}: a norm stands in the product"
        )
    if full.qkv_bias and not full.proj_bias:
        raise PlanError(f"{where}: attention with a bias of values but none of its output is not factorised")


def _check_head_rank(plan: CompressionPlan) -> None:
    if plan.head_rank is None:
        return
    if not plan.shape.classifiers:
        raise PlanError(
            f"head_rank is {plan.head_rank}, but {plan.shape.name} has no classifier; leave it None"
        )
    most = min(plan.embed_dim, plan.shape.classes)
    if not 1 <= plan.head_rank <= most:
        raise PlanError(f"head_rank is {plan.head_rank}, expected 1 to {most}, or None for dense")
