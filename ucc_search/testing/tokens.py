"""The contract of scorers and aggregators, line by line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ucc_search.builtin.aggregators import Drop
from ucc_search.builtin.cascades import PerBlock
from ucc_search.builtin.distillers import NoDistillation
from ucc_search.builtin.scorers import Random
from ucc_search.config import AugmentConfig
from ucc_search.costs import cost
from ucc_search.interfaces import (
    Aggregator,
    Assignment,
    Components,
    DistillContext,
    Scorer,
    TokenView,
)
from ucc_search.losses import CandidateLoss
from ucc_search.testing.core import Broken, Check
from ucc_search.testing.models import (
    CASES,
    Case,
    counted_macs,
    site_of,
    tiny_compressed,
    tiny_images,
    tiny_models,
    view_of,
)


def _cases(scorer: Scorer) -> Iterator[Case]:
    yield from (c for c in CASES if c.class_token or not scorer.needs_class_token)


def _scores(scorer: Scorer, case: Case) -> Tensor:
    return _built(scorer, case)(view_of(case, attention=scorer.needs_attention))


def _built(scorer: Scorer, case: Case) -> Callable[[TokenView], Tensor]:
    torch.manual_seed(1)
    built = scorer.build(site_of(case))
    return built.eval() if isinstance(built, nn.Module) else built


def _method(scorer: Scorer) -> str:
    return "score" if type(scorer).score is not Scorer.score else "build"


def scores_have_the_shape(scorer: Scorer) -> None:
    for case in _cases(scorer):
        scores = _scores(scorer, case)
        wanted = (case.batch, case.tokens)
        if not isinstance(scores, Tensor):
            raise Broken(
                f"gave a {type(scores).__name__}",
                "return a tensor [batch, patch tokens]",
                method=_method(scorer),
            )
        if tuple(scores.shape) == wanted:
            continue
        if tuple(scores.shape) == (case.batch, case.prefix + case.tokens):
            raise Broken(
                f"gave {tuple(scores.shape)} for {case}: prefix tokens are scored as well as the {case.tokens} patches",
                "score view.patches_BND, or cut the prefix off: scores[:, view.prefix:]",
                method=_method(scorer),
            )
        raise Broken(
            f"gave scores of shape {tuple(scores.shape)} for {case}, expected {wanted}",
            "reduce over the channels (and heads), for example .norm(dim=-1); keep batch and tokens",
            method=_method(scorer),
        )


def scores_are_finite(scorer: Scorer) -> None:
    for case in _cases(scorer):
        scores = _scores(scorer, case)
        bad = int((~scores.isfinite()).sum())
        if bad:
            kind = "NaN" if bool(scores.isnan().any()) else "infinite"
            raise Broken(
                f"{bad} of {scores.numel()} scores are {kind} for {case}",
                "guard divisions and logarithms, for example .clamp_min(1e-12)",
                method=_method(scorer),
            )


def scores_repeat(scorer: Scorer) -> None:
    case = CASES[0]
    view = view_of(case, attention=scorer.needs_attention)
    first = _built(scorer, case)(view)
    torch.manual_seed(99)
    built = scorer.build(site_of(case))
    if isinstance(built, nn.Module):  # its weights are drawn at random; what it does in eval mode is not
        torch.manual_seed(1)
        built = scorer.build(site_of(case)).eval()  # type: ignore[union-attr]
    torch.manual_seed(98)
    if not torch.equal(first, built(view)):
        raise Broken(
            "gave other scores for the same tokens",
            "draw random numbers from a generator of a fixed seed (as builtin/random_scores.py does), or only "
            "where self.training",
            method=_method(scorer),
        )


def scores_of_an_image_are_its_own(scorer: Scorer) -> None:
    view = view_of(Case("four images", batch=4), attention=scorer.needs_attention)
    build = _built(scorer, CASES[0])
    together = build(view)
    alone = build(TokenView(*(v[:1] if isinstance(v, Tensor) else v for v in view)))
    if not torch.allclose(together[:1], alone, rtol=1e-4, atol=1e-6):
        raise Broken(
            "the scores of an image change with the images beside it in the batch",
            "take means and extremes over dim=1 (the tokens), not over dim=0",
            method=_method(scorer),
        )


def tokens_are_left_alone(scorer: Scorer) -> None:
    for case in (CASES[0], CASES[3]):
        view = view_of(case, attention=scorer.needs_attention)
        before = [v.clone() if isinstance(v, Tensor) else v for v in view]
        _built(scorer, case)(view)
        _refuse_changes(view, before, _method(scorer))


def _refuse_changes(view: TokenView, before: list[Any], method: str) -> None:
    for name, then, now in zip(TokenView._fields, before, view, strict=True):
        if isinstance(now, Tensor) and not torch.equal(then, now):
            prefix = name == "x_BTD" and not torch.equal(then[:, : view.prefix], now[:, : view.prefix])
            what = "view.x_BTD, prefix tokens included" if prefix else f"view.{name}"
            raise Broken(
                f"changed {what}", "work on a copy: no in-place operations on the view", method=method
            )


def half_precision(scorer: Scorer) -> None:
    case = CASES[0]
    build = _built(scorer, case)
    if isinstance(build, nn.Module):
        build = build.to(torch.bfloat16)
    scores = build(view_of(case, attention=scorer.needs_attention, dtype=torch.bfloat16))
    if not scores.is_floating_point() or not bool(scores.isfinite().all()):
        raise Broken(
            f"gave {scores.dtype} scores for bfloat16 tokens, finite: {bool(scores.isfinite().all())}",
            "compute in the tokens' own type, or in .float()",
            method=_method(scorer),
        )


def other_devices(scorer: Scorer) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = CASES[0]
    with FakeTensorMode():
        build = _built(scorer, case)
        if isinstance(build, nn.Module):
            _move(build, "cuda")
        try:
            scores = build(view_of(case, attention=scorer.needs_attention, device="cuda"))
        except Exception as error:
            if "device" not in str(error).lower():
                raise
            raise Broken(
                "mixes tokens on a GPU with tensors on the CPU",
                "make tensors with device=view.x_BTD.device, or register them as buffers of a module",
                method=_method(scorer),
            ) from None
        if scores.device.type != "cuda":
            raise Broken(
                f"gave scores on {scores.device} for tokens on a GPU",
                "make tensors with device=view.x_BTD.device",
                method=_method(scorer),
            )


def _move(module: nn.Module, device: str) -> None:
    """`module.to(device)`, which does not know fake tensors."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(value.detach().to(device))
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)


def _parts(component: Scorer | Aggregator) -> Components:
    if isinstance(component, Scorer):
        return Components(component, Drop(), PerBlock())
    return Components(Random(), component, PerBlock())


def _needs_class_token(component: Scorer | Aggregator) -> bool:
    return isinstance(component, Scorer) and component.needs_class_token


def works_in_models(component: Scorer | Aggregator) -> None:
    for name, model in tiny_models(_needs_class_token(component)):
        for tokens_out in ((10, 6, 6), (16, 2, 1), (1, 1, 1)):
            small, _ = tiny_compressed(_parts(component), model, tokens_out)
            with torch.no_grad():
                logits = small(tiny_images(1))
            if not bool(logits.isfinite().all()):
                raise Broken(
                    f"logits are not finite in a model with {name} and {tokens_out} tokens after its blocks",
                    "look at what is merged or scaled",
                )


def learns(scorer: Scorer) -> None:
    built = _built(scorer, CASES[0])
    has = isinstance(built, nn.Module) and any(p.requires_grad for p in built.parameters())
    if has and not scorer.learned:
        raise Broken(
            "the module of build(site) has parameters, and nothing trains them",
            "set learned = True (and read Scorer's docstring), or freeze them with requires_grad_(False)",
            method="build",
        )
    if not scorer.learned:
        return
    if not has:
        raise Broken(
            "learned = True, but build(site) returns no module with parameters",
            "return an nn.Module from build(site)",
            method="build",
        )
    small, plan = tiny_compressed(_parts(scorer))
    small.requires_grad_(True)
    module = CandidateLoss(
        small,
        None,
        NoDistillation(),
        DistillContext(plan, plan.shape),
        label_smoothing=0.0,
        augment=AugmentConfig(),
    ).train()
    terms = module(tiny_images(4), torch.tensor([0, 1, 2, 0]), 0.0)
    for name, term in terms.items():
        if term.dim() or not bool(term.isfinite()):
            raise Broken(
                f"losses() gave {name} of shape {tuple(term.shape)}, finite: {bool(term.isfinite().all())}",
                "return finite scalars",
                method="losses",
            )
    sum(terms.values()).backward()  # type: ignore[union-attr]
    still = [
        n for n, p in small.named_parameters() if ".scorer." in n and (p.grad is None or not p.grad.any())
    ]
    if still:
        raise Broken(
            f"the loss does not reach {still[0]}",
            "let the scores depend on every parameter; detach() and topk stop gradients",
            method="build",
        )


def cost_is_true(component: Scorer | Aggregator) -> None:
    parts = _parts(component)
    small, plan = tiny_compressed(parts)
    price, own = cost(plan, parts), "scorer" if isinstance(component, Scorer) else "aggregator"
    params = sum(p.numel() for p in small.parameters())
    if params != price.params:
        raise Broken(
            f"the model has {params} parameters, {price.params} are declared",
            f"params(site) of the {own} must return {params - price.params:+d} over all sites of this model",
            method="params",
        )
    counted, fft = counted_macs(small)
    off = counted - price.macs
    if abs(off) > fft + (1 if fft else 0):
        raise Broken(
            f"torch counts {counted:.0f} MACs in a model of 3 blocks, {price.macs} are declared ({off:+.0f})",
            "macs(site) must return the matrix products and convolutions for one image at that site "
            "(an FFT: ucc_search.builtin.scorers.fft_macs)",
            method="macs",
        )


def exports(component: Scorer | Aggregator) -> None:
    small, _ = tiny_compressed(_parts(component))
    images = tiny_images()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = small(images)
        try:
            program = torch.export.export(small, (images,))
        except Exception as error:
            text = " ".join(str(error).split())[:160]
            raise Broken(
                f"torch.export cannot trace it: {type(error).__name__}: {text}",
                "no branches on values of tensors, no .item(), .tolist() or numpy inside; shapes must follow from shapes",
            ) from None
        if not torch.allclose(program.module()(images), expected, rtol=1e-4, atol=1e-5):
            raise Broken(
                "the exported model gives other outputs",
                "no state that changes between calls, no random numbers in eval mode",
            )


# Aggregators

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
    _refuse_changes(view, before, "assign")
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
        small, plan = tiny_compressed(_parts(aggregator), model)
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


SCORER_CHECKS = (
    Check("shape", "one score for each patch token, none for prefix tokens", scores_have_the_shape),
    Check("finite", "scores are finite, whatever the tokens", scores_are_finite),
    Check("determinism", "equal tokens get equal scores in eval mode", scores_repeat),
    Check("batch", "an image is scored by its own tokens alone", scores_of_an_image_are_its_own),
    Check(
        "prefix",
        "the view is only looked at: prefix and patch tokens stay as they are",
        tokens_are_left_alone,
    ),
    Check("dtype", "bfloat16 tokens get finite floating-point scores", half_precision),
    Check("device", "tokens on another device are scored there", other_devices),
    Check("models", "a compressed model runs with it, down to a batch of 1 and one token", works_in_models),
    Check("gradient", "learned: the loss reaches every parameter; else there is none to train", learns),
    Check("cost", "macs(site) and params(site) are what torch counts", cost_is_true),
    Check("export", "torch.export traces a model with it", exports),
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
