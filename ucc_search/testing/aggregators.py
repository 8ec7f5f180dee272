"""The contract of aggregators, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ucc_search.interfaces import Aggregator, Assignment
from ucc_search.testing.core import Broken, Check
from ucc_search.testing.in_models import (
    components_with,
    cost_is_true,
    exports,
    refuse_changes,
    works_in_models,
)
from ucc_search.testing.models import CASES, Case, tiny_compressed, tiny_images, tiny_models, view_of

_KEEPS = ((16, 10), (16, 8), (16, 1), (2, 1), (7, 6))


def _assignments(aggregator: Aggregator, **options: Any) -> Iterator[tuple[str, Assignment, int, int]]:
    for batch in (1, 2):
        for tokens, keep in _KEEPS:
            case = Case("", batch=batch, tokens=tokens, after_cut=tokens == 7)
            view = view_of(case, attention=False, **options)
            scores = torch.rand(batch, tokens, device=view.x_BTD.device)
            name = f"keep={keep} of {tokens} tokens, a batch of {batch}"
            yield (
                name,
                aggregator.assign(view, scores if aggregator.needs_scores else None, keep),
                tokens,
                keep,
            )


def keeps_what_is_asked(aggregator: Aggregator) -> None:
    for name, found, tokens, keep in _assignments(aggregator):
        if not isinstance(found, Assignment):
            raise Broken(f"gave a {type(found).__name__} for {name}", "return an Assignment", method="assign")
        kept = found.keep_BR.shape[1]
        if kept < keep:
            raise Broken(
                f"keeps {kept} tokens for {name}",
                "keep at least `keep` tokens, so at least one",
                method="assign",
            )
        if kept >= tokens:
            raise Broken(
                f"prunes nothing for {name}",
                "keep fewer tokens in every call; the framework asks again until the count is reached",
                method="assign",
            )


def assigns_every_token_once(aggregator: Aggregator) -> None:
    for name, found, tokens, _ in _assignments(aggregator):
        both = torch.cat([found.keep_BR, found.prune_BP], dim=1)
        whole = torch.arange(tokens).expand(both.shape[0], tokens)
        if (
            both.dtype != torch.int64
            or both.shape != whole.shape
            or not torch.equal(both.sort(1).values, whole)
        ):
            raise Broken(
                f"keep and prune are no partition of 0..{tokens - 1} for {name}",
                "both are int64 indices of patch tokens (the first after the prefix is 0), each token in one of them",
                method="assign",
            )
        if not bool((found.keep_BR.diff(dim=1) > 0).all()):
            raise Broken(
                f"keep is not ascending for {name}", "sort it: keep.sort(dim=1).values", method="assign"
            )


def hosts_and_weights_fit(aggregator: Aggregator) -> None:
    for name, found, _, _ in _assignments(aggregator):
        if found.host_BP is None:
            continue
        kept = found.keep_BR.shape[1]
        if found.host_BP.shape != found.prune_BP.shape or found.weight_BP is None or found.self_BR is None:
            raise Broken(
                f"host is there, but its shape differs from prune's or weight or self is missing for {name}",
                "give host_BP, weight_BP (both shaped as prune_BP) and self_BR (shaped as keep_BR) together",
                method="assign",
            )
        if found.host_BP.dtype != torch.int64 or not bool(
            ((found.host_BP >= 0) & (found.host_BP < kept)).all()
        ):
            raise Broken(
                f"host points outside 0..{kept - 1} for {name}",
                "hosts are places in keep_BR, not patch tokens",
                method="assign",
            )
        weight, own = found.weight_BP, found.self_BR
        if not bool(
            weight.isfinite().all() and (weight >= 0).all() and own.isfinite().all() and (own > 0).all()
        ):
            raise Broken(
                f"weights are not finite, weight < 0 or self <= 0 for {name}",
                "clamp them: weight_BP at 0, self_BR above 0",
                method="assign",
            )


def assignments_repeat(aggregator: Aggregator) -> None:
    view = view_of(CASES[0], attention=False)
    scores = torch.rand(2, 16)
    before = [v.clone() if isinstance(v, Tensor) else v for v in view]

    def found() -> Assignment:
        return aggregator.assign(view, scores if aggregator.needs_scores else None, 8)

    first, second = found(), found()
    refuse_changes(view, before, "assign")
    for name, a, b in zip(Assignment._fields, first, second, strict=True):
        if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b)):
            raise Broken(
                f"{name} differs between two calls with the same tokens",
                "use no random numbers but those of a fixed seed",
                method="assign",
            )


def half_precision_assignments(aggregator: Aggregator) -> None:
    for name, found, _, _ in _assignments(aggregator, dtype=torch.bfloat16):
        for value in (found.weight_BP, found.self_BR):
            if value is not None and not bool(value.isfinite().all()):
                raise Broken(
                    f"weights are not finite in bfloat16 for {name}",
                    "compute them in .float()",
                    method="assign",
                )


def other_devices_assignments(aggregator: Aggregator) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        try:
            view = view_of(CASES[0], attention=False, device="cuda")
            scores = torch.rand(2, 16, device="cuda") if aggregator.needs_scores else None
            found = aggregator.assign(view, scores, 8)
        except Exception as error:
            if "device" not in str(error).lower():
                raise
            raise Broken(
                "mixes tokens on a GPU with tensors on the CPU",
                "make tensors with device=view.x_BTD.device",
                method="assign",
            ) from None
        wrong = [n for n, v in found._asdict().items() if v is not None and v.device.type != "cuda"]
        if wrong:
            raise Broken(
                f"{wrong[0]} is on the CPU for tokens on a GPU",
                "make tensors with device=view.x_BTD.device",
                method="assign",
            )


def prefix_stays(aggregator: Aggregator) -> None:
    for name, model in tiny_models():
        small, plan = tiny_compressed(components_with(aggregator), model)
        seen: dict[str, Tensor] = {}
        block, prefix = small.blocks[0], plan.shape.prefix_tokens
        block.norm1.register_forward_hook(lambda m, i, o, seen=seen: seen.update(before=i[0]))
        block.ls1.register_forward_hook(lambda m, i, o, seen=seen: seen.update(added=o))
        block.norm2.register_forward_hook(lambda m, i, o, seen=seen: seen.update(after=i[0]))
        with torch.no_grad():
            small(tiny_images())
        then = (seen["before"] + seen["added"])[:, :prefix]
        if not torch.equal(then, seen["after"][:, :prefix]):
            raise Broken(
                f"prefix tokens change in a model with {name}",
                "merge into patch tokens alone",
                method="assign",
            )


AGGREGATOR_CHECKS = (
    Check("count", "at least `keep` tokens stay and at least one leaves", keeps_what_is_asked),
    Check(
        "partition", "every patch token is kept or pruned, once; kept ones ascend", assigns_every_token_once
    ),
    Check("hosts", "hosts are kept tokens, weights make an average", hosts_and_weights_fit),
    Check(
        "determinism", "equal tokens are assigned alike, and the view is only looked at", assignments_repeat
    ),
    Check("prefix", "prefix tokens stay as they are", prefix_stays),
    Check("dtype", "weights of bfloat16 tokens are finite", half_precision_assignments),
    Check("device", "tokens on another device are assigned there", other_devices_assignments),
    Check("models", "a compressed model runs with it, down to a batch of 1 and one token", works_in_models),
    Check("cost", "macs(site) is what torch counts", cost_is_true),
    Check("export", "torch.export traces a model with it", exports),
)
