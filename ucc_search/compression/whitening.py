"""What the layers of a model read on proxy images: second moments, to whiten factorisations with.

The error of a layer x -> W x under inputs of covariance C is the Frobenius norm of (W - W') C^(1/2), so the best
approximation of a given rank is a truncated SVD of W C^(1/2), with the root taken back afterwards (data-aware SVD,
as Chen et al. 2021, DRONE, NeurIPS; here for products of two matrices as well).
Legend: B images, T tokens, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ucc_search.compression.parts import blocks_of, classifiers, parts_of

_RIDGE = 1e-4  # of the mean variance: what no proxy image shows must not be lost without a trace


@dataclass(frozen=True)
class Moments:
    """Of the inputs of one layer, in double precision, over the tokens of the proxy images."""

    mean_I: Tensor
    covariance_II: Tensor
    within_II: Tensor
    """Covariance about the mean of the same image: all of the keys that softmax sees."""

    def plus_one(self) -> Tensor:
        """Second moments of the inputs with a one appended, [I + 1, I + 1]."""
        mean_I1 = self.mean_I[:, None]
        second_II = self.covariance_II + mean_I1 @ mean_I1.t()
        one = self.mean_I.new_ones(1, 1)
        return torch.cat([torch.cat([second_II, mean_I1], 1), torch.cat([mean_I1.t(), one], 1)])


def root(moments_II: Tensor) -> tuple[Tensor, Tensor]:
    """(symmetric square root, its inverse) of second moments, with a ridge that keeps both finite."""
    values, vectors = torch.linalg.eigh(moments_II)
    values = values.clamp_min(0.0)
    scales = (values + _RIDGE * values.mean() + torch.finfo(values.dtype).tiny).sqrt()
    return (vectors * scales) @ vectors.t(), (vectors / scales) @ vectors.t()


class ProxyInputs:
    """Moments of the inputs of everything that can be factorised, measured where they are needed.

    Args:
        images: batches [B, C, H, W], normalised; of the training split.
    """

    def __init__(self, images: Sequence[Tensor]) -> None:
        self._images, self._dense = images, dict[nn.Module, Mapping[str, Moments]]()

    def of(self, model: nn.Module, dense: nn.Module | None) -> Mapping[str, Moments]:
        """By layer name.

        Args:
            model: to be factorised, with its other widths.
            dense: the model it is a plain copy of, which is measured once; None where it was cut.
        """
        if dense is None:
            return input_moments(model, self._images)
        if dense not in self._dense:
            self._dense = {dense: input_moments(model, self._images)}
        return self._dense[dense]


@torch.no_grad()
def input_moments(model: nn.Module, images: Sequence[Tensor]) -> dict[str, Moments]:
    """Moments of what every layer of attention and MLP, and the classifier, reads."""
    wanted: set[nn.Module] = set(classifiers(model))
    for block in blocks_of(model):
        parts = parts_of(block)
        wanted |= {*(layer for layer, _ in parts.projections), *parts.hidden_in, parts.hidden_out}
    sums = {name: _Sums() for name, module in model.named_modules() if module in wanted}
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(s.add) for name, s in sums.items()]
    training, device = model.training, next(model.parameters()).device
    try:
        model.eval()
        for batch in images:
            model(batch.to(device, next(model.parameters()).dtype))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: s.moments() for name, s in sums.items() if s.images}


class _Sums:
    """Running sums over the inputs of one layer."""

    def __init__(self) -> None:
        self.images = self._tokens = 0
        self._total: Tensor | float = 0.0
        self._second: Tensor | float = 0.0
        self._means: Tensor | float = 0.0  # second moments of every image's mean

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_BTI = inputs[0].double()
        x_BTI = x_BTI.flatten(1, -2) if x_BTI.dim() > 2 else x_BTI[:, None]
        flat, mean_BI = x_BTI.flatten(0, 1), x_BTI.mean(dim=1)
        self.images += len(mean_BI)
        self._tokens += len(flat)
        self._total = self._total + flat.sum(dim=0)
        self._second = self._second + flat.t() @ flat
        self._means = self._means + mean_BI.t() @ mean_BI

    def moments(self) -> Moments:
        assert isinstance(self._total, Tensor) and isinstance(self._means, Tensor)
        mean, second = self._total / self._tokens, self._second / self._tokens
        return Moments(mean, second - torch.outer(mean, mean), second - self._means / self.images)
