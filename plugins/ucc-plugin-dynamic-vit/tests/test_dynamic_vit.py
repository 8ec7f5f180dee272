"""The predictor is what the paper draws, costs what it says, and learns which tokens matter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import ucc_search
from ucc_search.interfaces import ComponentRef, Site, SiteScores, TokenView

PACKAGE = Path(__file__).resolve().parent.parent / "ucc_plugin_dynamic_vit"
PLUGINS = ucc_search.Plugins.load([str(PACKAGE)], entry_points=False, environment=False)
SITE = Site(1, 9, 4, 1, True, 16, 2, 8, 8, 4, (3, 3))


def build(**params):
    return PLUGINS.build("scorer", ComponentRef("dynamic_vit", params))


def view(x_BTD):
    batch, total = x_BTD.shape[:2]
    q = torch.zeros(batch, 2, total, 8)
    position, size = torch.arange(total - 1).expand(batch, -1), torch.ones(batch, total - 1)
    return TokenView(x_BTD, q, q, q, None, 0.5, 1, True, position, size, (3, 3))


def test_it_is_the_papers_predictor_written_out():
    torch.manual_seed(0)
    module = build().build(SITE).eval()
    x = torch.randn(2, 10, 16)
    first, second, third, last = (m for m in module.modules() if isinstance(m, nn.Linear))
    gelu = nn.functional.gelu
    for image in range(2):
        hidden = gelu(first(nn.functional.layer_norm(x[image, 1:], (16,))))  # the norm starts as the identity
        average = hidden[:, 8:].mean(dim=0)
        for token in range(9):
            joined = torch.cat([hidden[token, :8], average])
            keep, drop = last(gelu(third(gelu(second(joined)))))
            torch.testing.assert_close(module(view(x))[image, token], keep.exp() / (keep.exp() + drop.exp()))


def test_training_samples_around_the_probability_and_evaluation_repeats_itself():
    torch.manual_seed(0)
    module = build().build(SITE)
    x = torch.randn(4, 10, 16)
    module.eval()
    assert torch.equal(module(view(x)), module(view(x)))
    module.train()
    with torch.no_grad():
        module.decide[-1].bias.copy_(torch.tensor([2.0, 0.0]))
        samples = torch.stack([module(view(x)) for _ in range(300)])
        # A Gumbel softmax chooses with the softmax's probability.
        chosen = (samples > 0.5).float().mean(dim=0)
        torch.testing.assert_close(chosen, module.eval()(view(x)), atol=0.12, rtol=0)


def test_the_ratio_loss_is_the_squared_miss():
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 0.0, 0.0]])
    first, second = SiteScores(SITE, scores, 2), SiteScores(SITE, scores, 1)
    assert float(build(ratio_weight=3.0).losses([first, second])["ratio"]) == pytest.approx(3 * 0.25**2 / 2)


@pytest.mark.parametrize("dim", [16, 10, 3])
def test_its_cost_is_its_layers(dim):
    site = Site(1, 9, 4, 1, True, dim, 1, dim, dim, 4, (3, 3))
    scorer = build()
    module = scorer.build(site)
    assert scorer.params(site) == sum(p.numel() for p in module.parameters())
    matrices = [m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear)]
    assert scorer.macs(site) == 9 * sum(matrices)


def test_it_learns_to_keep_the_tokens_that_tell_the_class():
    """One patch of sixteen carries the class, at a random place and marked by one colour; the rest is noise."""
    torch.manual_seed(0)
    dense = VisionTransformer(img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=2)
    plan = ucc_search.CompressionPlan.identity(ucc_search.shape_of(dense)).replace(tokens_out=[4, 4])
    scorer = build()
    refs = (ComponentRef("dynamic_vit"), ComponentRef("drop"), ComponentRef("per_block"))
    model = ucc_search.compress(dense, plan, PLUGINS.components(*refs))
    generator = torch.Generator().manual_seed(1)

    def batch():
        place, label = (torch.randint(n, (64,), generator=generator) for n in (16, 2))
        grid = 0.3 * torch.randn(64, 16, 3, 2, 2, generator=generator)
        grid[torch.arange(64), place, 0] += 2.0
        grid[torch.arange(64), place, 1] += 4.0 * label[:, None, None] - 2.0
        return grid.view(64, 4, 4, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(64, 3, 8, 8), label, place

    def kept():
        images, _, place = batch()
        seen = []
        handle = model.blocks[0].scorer.register_forward_hook(lambda module, inputs, out: seen.append(out))
        with torch.no_grad():
            model.eval()(images)
        handle.remove()
        return float((seen[0].topk(4, dim=1).indices == place[:, None]).any(dim=1).float().mean())

    before = kept()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    noted = []
    model.blocks[0].scored = noted  # as the trainer collects them
    for _ in range(120):
        images, labels, _ = batch()
        noted.clear()
        loss = nn.functional.cross_entropy(model.train()(images), labels)
        loss = loss + sum(scorer.losses(noted).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.6
    assert kept() > 0.95


@pytest.mark.parametrize(
    ("params", "message"), [({"ratio_weight": -1}, "0 or more"), ({"temperature": 0}, "above 0")]
)
def test_what_it_cannot_do_is_refused(params, message):
    with pytest.raises(ucc_search.UserError, match=message):
        build(**params)
