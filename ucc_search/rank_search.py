"""Ranks by gradient descent: COMCAT's differentiable selection, in the form of nested gates.

A factorised layer has its directions in order of their singular values, so a mixture of its ranks is
one diagonal gate: sum_a p_a U[:, :r_a] S[:r_a] = U diag(pi) S with pi_k the sum of p_a over ranks r_a
above k. No candidate matrix is ever formed.

Reference: Xiao et al. 2023, COMCAT, ICML, arXiv:2305.17235, section 3.3. Its released code learns the
gates on validation images; here they are a part of the training split.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ucc_search.budget import Budget
from ucc_search.compression import ProxyInputs, assemble
from ucc_search.compression.parts import blocks_of, parts_of
from ucc_search.compression.selection import first_units
from ucc_search.config import AugmentConfig, OptimizerConfig, RankSearchConfig, TrainConfig
from ucc_search.costs import cost
from ucc_search.data import ImageSet, Subset
from ucc_search.interfaces import Components
from ucc_search.losses import TaskLoss
from ucc_search.plan import CompressionPlan
from ucc_search.train import fit
from ucc_search.widths import RANKS, Widths, split_name


@dataclass(frozen=True)
class Choice:
    """The ranks one product or MLP may have, and what each saves of the whole model."""

    name: str  # coordinate of `Widths`: qk_rank.3
    ranks: tuple[int, ...]  # ascending; the last is the full one
    ratios: tuple[float, ...]
    macs: tuple[int, ...]  # saved, of one image
    params: tuple[int, ...]


def rank_choices(plan: CompressionPlan, widths: Widths, components: Components, levels: int) -> list[Choice]:
    """Evenly spaced ranks from each range's lower bound up to the dense layer."""
    dense = cost(plan, components)
    found = []
    for name, bounds in widths.searched().items():
        kind, index = split_name(name)
        if kind not in RANKS:
            continue
        steps = [bounds.low + (1 - bounds.low) * i / (levels - 1) for i in range(levels)]
        plans = [widths.with_ratio(plan, name, ratio) for ratio in steps]
        prices = [cost(p, components) for p in plans]
        ranks = [_rank(p, kind, index) for p in plans]
        found.append(
            Choice(
                name,
                tuple(ranks),
                tuple(steps),
                tuple(dense.macs - p.macs for p in prices),
                tuple(dense.params - p.params for p in prices),
            )
        )
    return found


def _rank(plan: CompressionPlan, kind: str, index: int) -> int:
    if kind == "head_rank":
        return min(plan.embed_dim, plan.shape.classes) if plan.head_rank is None else plan.head_rank
    block = plan.blocks[index]
    if kind == "mlp_rank":
        dim = plan.embed_dims[plan.shape.stage_of[index]]
        return min(block.mlp_hidden, dim) if block.mlp_rank is None else block.mlp_rank
    return block.qk_dim if kind == "qk_rank" else block.v_dim


class GatedRanks(nn.Module):
    """A factorised model whose ranks are mixed; cross-entropy times the price where that is too high.

    L = CE * (price / limit)^beta while the expected price is above the limit, else CE.

    Args:
        model: at full rank.
        spare: MACs and parameters that must be saved to meet the budget; None where unlimited.
    """

    def __init__(
        self, model: nn.Module, choices: Sequence[Choice], budget: Budget, dense: tuple[int, int], beta: float
    ) -> None:
        super().__init__()
        self.frozen = [model.requires_grad_(False)]  # in a list: neither trained nor moved with the gates
        self.model = nn.Module()
        self.model.alpha = nn.ParameterList(torch.zeros(len(c.ranks)) for c in choices)
        self.choices, self.beta, self.temperature = list(choices), beta, 1.0
        self._limits = [(dense[0], budget.max_macs, "macs"), (dense[1], budget.max_params, "params")]

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, progress: float) -> dict[str, Tensor]:
        shares = [nn.functional.gumbel_softmax(a, tau=self.temperature) for a in self.model.alpha]
        with gated(self.frozen[0], self.choices, shares):
            logits = self.frozen[0](images_BCHW)
        loss = nn.functional.cross_entropy(logits.float(), labels_B)
        return {"task": loss * self.price(shares).clamp_min(1.0) ** self.beta}

    def price(self, shares: Sequence[Tensor]) -> Tensor:
        """Expected price over the limit; the tighter one of MACs and parameters."""
        over = []
        for dense, limit, field in self._limits:
            if limit is not None:
                saved = sum(
                    (share * share.new_tensor(getattr(c, field))).sum()
                    for share, c in zip(shares, self.choices, strict=True)
                )
                over.append((dense - saved) / limit)
        return torch.stack(over).max()

    def chosen(self) -> list[int]:
        """The likeliest rank of every choice, by its place."""
        return [int(a.argmax()) for a in self.model.alpha]


@contextlib.contextmanager
def gated(model: nn.Module, choices: Sequence[Choice], shares: Sequence[Tensor]) -> Iterator[None]:
    """Inner channels of a factorised model multiplied by their gates while the context is open."""
    blocks = blocks_of(model)
    gates: dict[int, dict[str, Tensor]] = {}
    for choice, share in zip(choices, shares, strict=True):
        kind, index = split_name(choice.name)
        gates.setdefault(index, {})[kind] = _gate(choice.ranks, share)
    with contextlib.ExitStack() as stack:

        def scale(layer: nn.Module, gate: Tensor) -> None:
            handle = layer.register_forward_hook(lambda _, inputs, output: output * gate.to(output.dtype))
            stack.callback(handle.remove)

        for index, of_block in gates.items():
            parts = parts_of(blocks[index])
            for layer, roles in parts.projections:
                width = layer.out_features // len(roles)
                by_role = {"q": of_block.get("qk_rank"), "v": of_block.get("v_rank")}
                rows = [_repeated(by_role.get(role), width, layer.weight) for role in roles]
                scale(layer, torch.cat(rows))
            if "mlp_rank" in of_block:
                for layer in (*parts.hidden_in, parts.hidden_out):
                    scale(layer.reduce, of_block["mlp_rank"])
            if "head_rank" in of_block:
                for layer in (model.head, getattr(model, "head_dist", None)):
                    if layer is not None:
                        scale(layer.reduce, of_block["head_rank"])
        yield


def _gate(ranks: Sequence[int], share_A: Tensor) -> Tensor:
    """pi_k: the share of the ranks that keep direction k."""
    keeps_AK = torch.arange(max(ranks))[None, :] < torch.tensor(ranks)[:, None]
    return share_A @ keeps_AK.to(share_A)


def _repeated(gate: Tensor | None, width: int, like: Tensor) -> Tensor:
    return torch.ones(width, device=like.device) if gate is None else gate.repeat(width // len(gate))


def select_ranks(
    teacher: nn.Module,
    plan: CompressionPlan,
    widths: Widths,
    budget: Budget,
    components: Components,
    images: ImageSet,
    config: RankSearchConfig,
    *,
    seed: int,
    inputs: ProxyInputs | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """The ratio of every searched rank, to start a search from or to project onto the budget.

    Rounds alternate between the gates, on held-out training images with all weights frozen, and the
    weights, on the others with the likeliest ranks in force, while the temperature falls.

    Args:
        plan: of the uncompressed model (tokens and widths full).
        images: the training split; `config.held_out` of it trains the gates.
        inputs: proxy images, where factorisations are whitened: the directions are then ordered by what they give.

    Raises:
        PlanError: attention or MLPs that cannot be factorised.
    """
    choices = rank_choices(plan, widths, components, config.levels)
    model = assemble(teacher, _full_rank(plan, choices), components, first_units(plan), inputs)
    dense = cost(plan, components)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held = max(1, int(config.held_out * len(images)))
    for_gates, for_weights = Subset(images, order[:held]), Subset(images, order[held:])
    gates = GatedRanks(model, choices, budget, (dense.macs, dense.params), config.beta)
    for number in range(config.rounds):
        gates.temperature = 5.0 * (0.1 / 5.0) ** (number / max(1, config.rounds - 1))
        recipe = _recipe(config, config.gate_steps, config.lr, 5e-4)
        fit(gates, for_gates, recipe, seed=seed + number)
        shares = [nn.functional.one_hot(torch.tensor(i), len(c.ranks)).float() for i, c in _both(gates)]
        log(f"ranks, round {number + 1} of {config.rounds}: {float(gates.price(shares)):.3f} of the budget")
        if number + 1 < config.rounds:
            _train_weights(model, choices, shares, for_weights, config, plan.shape.classes, seed + number)
    return {c.name: c.ratios[i] for i, c in _both(gates)}


def _both(gates: GatedRanks) -> list[tuple[int, Choice]]:
    return list(zip(gates.chosen(), gates.choices, strict=True))


def _full_rank(plan: CompressionPlan, choices: Sequence[Choice]) -> CompressionPlan:
    """Every layer that has a choice, factorised without loss."""
    kinds: Mapping[str, set[int]] = {k: set() for k in RANKS}
    full = {c.name: c.ranks[-1] for c in choices}
    for name in full:
        kind, index = split_name(name)
        kinds[kind].add(index)
    return plan.replace(
        low_rank_attention=bool(kinds["qk_rank"] | kinds["v_rank"]),
        mlp_rank=[full.get(f"mlp_rank.{i}") for i in range(plan.shape.depth)],
        head_rank=full.get("head_rank"),
    )


def _train_weights(
    model: nn.Module,
    choices: Sequence[Choice],
    shares: Sequence[Tensor],
    images: ImageSet,
    config: RankSearchConfig,
    classes: int,
    seed: int,
) -> None:
    module = TaskLoss(
        model.requires_grad_(True), classes=classes, label_smoothing=0.0, augment=AugmentConfig()
    )
    with gated(model, choices, shares):
        fit(module, images, _recipe(config, config.weight_steps, config.weight_lr, 0.05), seed=seed)
    model.eval().requires_grad_(False)


def _recipe(config: RankSearchConfig, steps: int, lr: float, decay: float) -> TrainConfig:
    return TrainConfig(
        engine="torch",
        steps=steps,
        batch_size=config.batch_size,
        optimizer=OptimizerConfig(lr=lr, weight_decay=decay),
    )
