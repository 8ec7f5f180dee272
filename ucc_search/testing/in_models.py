"""The contract that scorers and aggregators share: what they do inside a model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ucc_search.builtin.aggregators import Drop
from ucc_search.builtin.cascades import PerBlock
from ucc_search.builtin.scorers import Random
from ucc_search.costs import cost
from ucc_search.interfaces import Aggregator, Components, Scorer, TokenView
from ucc_search.testing.core import Broken
from ucc_search.testing.models import counted_macs, tiny_compressed, tiny_images, tiny_models


def refuse_changes(view: TokenView, before: list[Any], method: str) -> None:
    for name, then, now in zip(TokenView._fields, before, view, strict=True):
        if isinstance(now, Tensor) and not torch.equal(then, now):
            prefix = name == "x_BTD" and not torch.equal(then[:, : view.prefix], now[:, : view.prefix])
            what = "view.x_BTD, prefix tokens included" if prefix else f"view.{name}"
            raise Broken(
                f"changed {what}", "work on a copy: no in-place operations on the view", method=method
            )


def move_to(module: nn.Module, device: str) -> None:
    """`module.to(device)`, which does not know fake tensors."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(value.detach().to(device))
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)


def components_with(component: Scorer | Aggregator) -> Components:
    if isinstance(component, Scorer):
        return Components(component, Drop(), PerBlock())
    return Components(Random(), component, PerBlock())


def _needs_class_token(component: Scorer | Aggregator) -> bool:
    return isinstance(component, Scorer) and component.needs_class_token


def works_in_models(component: Scorer | Aggregator) -> None:
    for name, model in tiny_models(_needs_class_token(component)):
        for tokens_out in ((10, 6, 6), (16, 2, 1), (1, 1, 1)):
            small, _ = tiny_compressed(components_with(component), model, tokens_out)
            with torch.no_grad():
                logits = small(tiny_images(1))
            if not bool(logits.isfinite().all()):
                raise Broken(
                    f"logits are not finite in a model with {name} and {tokens_out} tokens after its blocks",
                    "look at what is merged or scaled",
                )


def cost_is_true(component: Scorer | Aggregator) -> None:
    parts = components_with(component)
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
    small, _ = tiny_compressed(components_with(component))
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
