"""The contract of scorers, line by line."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ucc_search.builtin.distillers import NoDistillation
from ucc_search.config import AugmentConfig
from ucc_search.interfaces import DistillContext, Scorer, TokenView
from ucc_search.losses import CandidateLoss
from ucc_search.testing.core import Broken, Check
from ucc_search.testing.in_models import (
    components_with,
    cost_is_true,
    exports,
    move_to,
    refuse_changes,
    works_in_models,
)
from ucc_search.testing.models import CASES, Case, site_of, tiny_compressed, tiny_images, view_of


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
        refuse_changes(view, before, _method(scorer))


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
            move_to(build, "cuda")
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
    small, plan = tiny_compressed(components_with(scorer))
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
