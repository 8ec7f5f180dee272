"""The seam into timm: blocks that score and reduce tokens, and the sequence that carries their state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ucc_search.batches import gather_rows
from ucc_search.compression.attention import Attended, CompressedAttention, Shown
from ucc_search.compression.tokens import TokenState, initial_state, reduce_tokens
from ucc_search.errors import ModelError, PlanError
from ucc_search.interfaces import Components, Scorer, Site, SiteScores, TokenView
from ucc_search.plan import BlockPlan

_BLOCKS_TOGETHER = (
    "a compressed model hands what it knows of its tokens from block to block, so its blocks cannot be called, "
    "sliced or checkpointed one by one; use forward or forward_features"
)


class CompressedBlock(nn.Module):
    """A timm `Block` that may lack a half, score its patch tokens after attention and hand fewer to its MLP.

    Args:
        block: the block, cut to the plan's widths, whose submodules are taken over under their names.
        index: its place in the uncompressed model.
        plan: its widths, and which halves are left.
        components: scorer, aggregator and cascade.
        site: where tokens are scored; None if this block leaves them alone.
        prefix: prefix tokens.
        head_tokens: compute queries, projection and MLP for this many leading tokens only.
        carries: False where no block of the model changes its tokens: then it is called with the
            tokens alone and returns them alone, as timm's own.
    """

    def __init__(
        self,
        block: Block,
        index: int,
        plan: BlockPlan,
        components: Components,
        site: Site | None,
        *,
        prefix: int,
        class_token: bool,
        grid: tuple[int, int],
        head_tokens: int | None = None,
        carries: bool = True,
    ) -> None:
        super().__init__()
        self.attn: CompressedAttention | None = None
        self.mlp: nn.Module | None = None
        if plan.attention:
            self.norm1, self.ls1, self.drop_path1 = block.norm1, block.ls1, block.drop_path1
            self.attn = CompressedAttention(
                block.attn, heads=plan.heads, qk_dim=plan.qk_dim, v_dim=plan.v_dim, queries=head_tokens
            )
        if plan.mlp:
            self.norm2, self.ls2, self.drop_path2 = block.norm2, block.ls2, block.drop_path2
            self.mlp = block.mlp
        self.index, self.carries = index, carries
        self.prefix, self.class_token, self.grid = prefix, class_token, grid
        self.head_tokens = head_tokens
        self.components = components
        self.tokens_out = site.tokens_out if site else None
        scores = site is not None and components.aggregator.needs_scores
        self.scorer = components.scorer.build(site) if scores and site else None
        self.shown = _shown(components.scorer) if scores else "nothing"
        self.check = False
        """Refuse scores that are not finite, which would keep arbitrary tokens without a word."""
        self.site = site
        self.scored: list[SiteScores] | None = None
        """Where the scores of a training step are noted, while somebody asks for them."""

    def forward(
        self, x_BTD: Tensor, state: TokenState | None = None
    ) -> Tensor | tuple[Tensor, TokenState | None]:
        if state is None and self.carries:
            raise ModelError(_BLOCKS_TOGETHER)
        x = x_BTD if self.head_tokens is None else x_BTD[:, : self.head_tokens]
        if self.attn is not None:
            attended = self.attn(self.norm1(x_BTD), show=self.shown, key_bias_BT=self._size_bias(state))
            x = x + self.drop_path1(self.ls1(attended.out_BQD))
            if self.tokens_out is not None:
                assert state is not None
                x, state = self._reduce(x, attended, state)
        if self.mlp is not None:
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return (x, state) if self.carries else x

    def _size_bias(self, state: TokenState | None) -> Tensor | None:
        """Log of each token's size on the attention logits (ToMe, section 3.2); prefix tokens count one."""
        if state is None or not self.components.aggregator.proportional_attention:
            return None
        ones = state.size_BN.new_ones(state.size_BN.shape[0], self.prefix)
        return torch.cat([ones, state.size_BN], dim=1).log()

    def _reduce(self, x_BTD: Tensor, attended: Attended, state: TokenState) -> tuple[Tensor, TokenState]:
        aggregator, cascade = self.components.aggregator, self.components.cascade
        assert self.tokens_out is not None and self.attn is not None
        keys = attended.k_BHTK
        view = self._view(x_BTD, attended, keys, state)
        if self.scorer is not None:
            score_BN = self._score(view)
            if self.check and not bool(score_BN.isfinite().all()):
                scorer = type(self.components.scorer).__name__
                raise FloatingPointError(f"the scorer {scorer} gave scores that are not finite")
            if self.training and self.components.scorer.learned:
                x_BTD = self._learn(x_BTD, score_BN)
            state = state._replace(score_BN=cascade.accumulate(state.score_BN, score_BN))
        # Bipartite merging halves at most, so a deep cut takes several rounds; their number is static.
        while x_BTD.shape[1] - self.prefix > self.tokens_out:
            assignment = aggregator.assign(view, state.score_BN, self.tokens_out)
            if assignment.keep_BR.shape[1] < self.tokens_out:
                raise PlanError(
                    f"the aggregator {type(aggregator).__name__} kept {assignment.keep_BR.shape[1]} tokens, "
                    f"expected at least {self.tokens_out}"
                )
            if assignment.prune_BP.shape[1] == 0:  # asked again, it would answer the same for ever
                raise PlanError(
                    f"the aggregator {type(aggregator).__name__} prunes nothing of {assignment.keep_BR.shape[1]} "
                    f"tokens, where {self.tokens_out} should stay"
                )
            x_BTD, state = reduce_tokens(
                x_BTD, state, assignment, prefix=self.prefix, absorb_scores=aggregator.absorb_scores
            )
            if x_BTD.shape[1] - self.prefix > self.tokens_out:
                keys = self._kept_keys(keys, assignment.keep_BR)
                view = self._view(x_BTD, attended, keys, state)
        return x_BTD, state

    def _learn(self, x_BTD: Tensor, score_BN: Tensor) -> Tensor:
        """The same tokens, through which the loss reaches their scores (straight-through)."""
        if self.scored is not None:
            assert self.site is not None and self.tokens_out is not None
            self.scored.append(SiteScores(self.site, score_BN, self.tokens_out))
        one_BN1 = (1.0 + (score_BN - score_BN.detach()))[..., None].to(x_BTD.dtype)
        return torch.cat([x_BTD[:, : self.prefix], x_BTD[:, self.prefix :] * one_BN1], dim=1)

    def _score(self, view: TokenView) -> Tensor:
        """The shape is known from integers, so its check costs nothing and survives an export."""
        assert self.scorer is not None
        score_BN = self.scorer(view)
        expected = tuple(view.patches_BND.shape[:2])
        if tuple(score_BN.shape) != expected:
            raise PlanError(
                f"the scorer {type(self.components.scorer).__name__} gave scores of shape "
                f"{tuple(score_BN.shape)}, expected {expected}: one for each patch token, none for the "
                f"{self.prefix} prefix tokens"
            )
        return score_BN.float()

    def _kept_keys(self, k_BHTK: Tensor, keep_BR: Tensor) -> Tensor:
        rows_BTX = k_BHTK.transpose(1, 2).flatten(2)
        kept = (
            gather_rows(rows_BTX, keep_BR, self.prefix).unflatten(-1, (k_BHTK.shape[1], -1)).transpose(1, 2)
        )
        return torch.cat([k_BHTK[:, :, : self.prefix], kept], dim=2)

    def _view(self, x_BTD: Tensor, attended: Attended, k_BHTK: Tensor, state: TokenState) -> TokenView:
        assert self.attn is not None
        return TokenView(
            x_BTD,
            attended.q_BHQK,
            k_BHTK,
            attended.v_BHTV,
            attended.map_BHQT,
            self.attn.scale,
            self.prefix,
            self.class_token,
            state.position_BN,
            state.size_BN,
            self.grid,
            attended.received_BHT,
            attended.class_row_BHT,
        )


def _shown(scorer: Scorer) -> Shown:
    if scorer.needs_attention:
        return "map"
    return "means" if scorer.needs_attention_means else "nothing"


class CascadeBlocks(nn.Sequential):
    """The blocks of a compressed model; hands the token state from block to block as a value.

    Args:
        blocks: timm's own blocks where nothing changes, `CompressedBlock` elsewhere.
        prefix: prefix tokens.
        restore: give every original patch its token back at the end, so that average pooling
            weighs merged tokens by the patches they stand for.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, prefix: int, restore: bool) -> None:
        super().__init__(*blocks)
        self.prefix, self.restore = prefix, restore
        self.trace = False
        """Keep the composition of every token; set while a distiller or a picture needs it."""

    def __getitem__(self, index: int | slice) -> nn.Module:  # type: ignore[override]
        if isinstance(index, slice):
            raise ModelError(_BLOCKS_TOGETHER)
        return super().__getitem__(index)

    def forward(self, x_BTD: Tensor) -> Tensor:
        state = initial_state(x_BTD[:, self.prefix :], owners=self.restore, trace=self.trace)
        for block in self:
            if isinstance(block, CompressedBlock):
                x_BTD, state = block(x_BTD, state)
            else:
                x_BTD = block(x_BTD)
        if self.restore and state.owner_BO is not None:
            patches = gather_rows(x_BTD, state.owner_BO, self.prefix)
            x_BTD = torch.cat([x_BTD[:, : self.prefix], patches], dim=1)
        return x_BTD


@contextlib.contextmanager
def checked_scores(model: nn.Module) -> Iterator[None]:
    """Scores that are not finite raise FloatingPointError while the context is open.

    Not always on: it looks at values, so a GPU must wait and `torch.export` could not trace it.
    """
    blocks = [b for b in model.modules() if isinstance(b, CompressedBlock)]
    for block in blocks:
        block.check = True
    try:
        yield
    finally:
        for block in blocks:
            block.check = False


def learned_blocks(model: nn.Module) -> tuple[CompressedBlock, ...]:
    """Those whose scorer learns."""
    blocks = (b for b in model.modules() if isinstance(b, CompressedBlock))
    return tuple(b for b in blocks if b.scorer is not None and b.components.scorer.learned)


@contextlib.contextmanager
def noted_scores(blocks: Sequence[CompressedBlock]) -> Iterator[list[SiteScores]]:
    """The scores of these blocks, with their gradient, in the training steps made while the context is open."""
    found: list[SiteScores] = []
    for block in blocks:
        block.scored = found
    try:
        yield found
    finally:
        for block in blocks:
            block.scored = None


def set_tokens(model: nn.Module, tokens: Sequence[int]) -> None:
    """Change the patch tokens after each reducing block, for keep ratios that anneal in training.

    Args:
        tokens: one count per block of the uncompressed model.
    """
    for block in model.modules():
        if isinstance(block, CompressedBlock) and block.tokens_out is not None:
            block.tokens_out = tokens[block.index]
