"""The predictor's network; on its own because it needs torch when it is imported."""

from __future__ import annotations

import torch
from torch import nn


class KeepProbability(nn.Module):
    """scores_BN from 0 to 1: the probability to be kept; in training a sample of the Gumbel softmax.

    Args:
        widths: inputs and outputs of the four layers.
        temperature: of the Gumbel softmax.
    """

    def __init__(self, widths, temperature):
        super().__init__()
        first, second, third, last = (nn.Linear(*pair) for pair in widths)
        self.features = nn.Sequential(nn.LayerNorm(widths[0][0]), first, nn.GELU())
        self.decide = nn.Sequential(second, nn.GELU(), third, nn.GELU(), last)
        self.local, self.temperature = widths[0][1] // 2, temperature

    def forward(self, view):
        features_BND = self.features(view.patches_BND)
        local_BNF, others_BNG = features_BND[..., : self.local], features_BND[..., self.local :]
        global_BNG = others_BNG.mean(dim=1, keepdim=True).expand_as(others_BNG)
        logits_BN2 = self.decide(torch.cat([local_BNF, global_BNG], dim=-1)).float()
        if self.training:
            gumbel_BN2 = -torch.empty_like(logits_BN2).exponential_().log()
            logits_BN2 = (logits_BN2 + gumbel_BN2) / self.temperature
        return logits_BN2.softmax(dim=-1)[..., 0]
