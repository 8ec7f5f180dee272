"""What one block can spare: each is cut by itself, and the whole model measured without training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ucc_search.budget import with_tokens
from ucc_search.costs import cost
from ucc_search.errors import ConfigError, PlanError
from ucc_search.interfaces import INFERENCE_KINDS
from ucc_search.plan import CompressionPlan

if TYPE_CHECKING:
    from ucc_search.config import RunConfig
    from ucc_search.plugins import Plugins


@dataclass(frozen=True, slots=True)
class Probe:
    """One cut of one block, everything else left whole."""

    kind: str  # tokens (from this block on), attention, mlp (this half is gone) or block (of a pyramid)
    block: int
    tokens: int | None  # patch tokens left from this block on, where tokens were cut
    saved: float  # share of the dense MACs
    kl: float  # mean KL(teacher || student) on the calibration images, nats
    accuracy: float  # on the calibration images

    @property
    def price(self) -> float:
        """KL for each percent of the MACs that is saved: what is cheap to cut has little."""
        return self.kl / (100 * self.saved) if self.saved > 0 else float("inf")


def single_cuts(base: CompressionPlan, keep: float) -> Iterator[tuple[str, int, CompressionPlan]]:
    """(kind, block, plan) for every cut that the model allows.

    Args:
        base: what is cut, whole.
        keep: share of the patch tokens that stay from the block on.
    """
    shape, depth = base.shape, len(base.blocks)
    if not shape.stages:
        left = max(1, round(keep * shape.tokens))
        # Where only the class token is read, cutting the last block's tokens saves nothing.
        for block in range(depth - (1 if base.head_tokens_only else 0)):
            yield "tokens", block, with_tokens(base, [shape.tokens] * block + [left] * (depth - block))
    halves = (
        [("block", ("attention", "mlp"))]
        if shape.stages
        else [("attention", ("attention",)), ("mlp", ("mlp",))]
    )
    for kind, gone in halves:
        for block in range(depth):
            present = [i != block for i in range(depth)]
            try:
                yield kind, block, base.replace(**dict.fromkeys(gone, present))
            except PlanError:
                continue  # the first block of a stage, for one, has to stay


def probe_blocks(
    config: RunConfig, plugins: Plugins, *, keep: float = 0.5, log: Callable[[str], None] = lambda text: None
) -> list[Probe]:
    """Cut every block by itself, with the first components of the space file, and measure the KL to the teacher.

    Args:
        keep: share of the patch tokens that stay from the block on, above 0 and below 1.

    Raises:
        ConfigError: another `keep`.
    """
    if not 0.0 < keep < 1.0:
        raise ConfigError(
            f"--keep is {keep:g}, expected above 0 and below 1 (the share of the patch tokens that stay)"
        )
    from ucc_search.scoring import this_bench
    from ucc_search.space import spares_last_block

    bench = this_bench(config, plugins, log)
    space = config.space
    parts = plugins.components(*(getattr(space, kind)[0] for kind in INFERENCE_KINDS))
    dense = CompressionPlan.identity(bench.shape)
    base = dense.replace(head_tokens_only=spares_last_block(space, bench.shape))
    whole, found = cost(dense).macs, []
    for kind, block, plan in single_cuts(base, keep):
        measured = bench.zero_shot(bench.compressed(plan, parts, space.importance[0]))
        assert measured.kl is not None and measured.accuracy is not None
        saved = (cost(base).macs - cost(plan, parts).macs) / whole
        tokens = plan.tokens[block] if kind == "tokens" else None
        found.append(Probe(kind, block, tokens, saved, measured.kl, measured.accuracy))
        log(f"{kind} of block {block}: KL {measured.kl:.4f}")
    return found


def probe_json(found: list[Probe]) -> list[dict[str, Any]]:
    """JSON-able: the fields of `Probe`, and its price."""
    from dataclasses import asdict

    return [{**asdict(p), "price": p.price if p.saved > 0 else None} for p in found]
