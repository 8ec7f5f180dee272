"""A scorer with parameters learns with the model, through the same hook as any other."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import tiny_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ucc_search.builtin.aggregators import Drop, Host
from ucc_search.builtin.cascades import PerBlock
from ucc_search.builtin.distillers import Logits
from ucc_search.compression import compress, set_tokens, shape_of
from ucc_search.config import AugmentConfig
from ucc_search.costs import cost
from ucc_search.interfaces import Components, DistillContext
from ucc_search.losses import CandidateLoss
from ucc_search.plan import CompressionPlan
from ucc_search.runner import search
from ucc_search.saving import load_model

PLUGIN = '''
"""A predictor of one hidden layer, after DynamicViT's."""
from ucc_search import Scorer, hookimpl


class Predictor(Scorer):
    """Learned probability of a token to be kept."""

    learned = True
    ranges = {"ratio_weight": {"low": 0.1, "high": 10.0, "log": True}}

    def __init__(self, ratio_weight: float = 2.0):
        self.ratio_weight = ratio_weight

    def macs(self, site):
        return site.tokens_in * (site.dim * 4 + 4)

    def params(self, site):
        return site.dim * 4 + 4 + 4 + 1

    def build(self, site):
        from torch import nn

        class Keep(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Linear(site.dim, 4), nn.GELU(), nn.Linear(4, 1))

            def forward(self, view):
                return self.net(view.patches_BND).squeeze(-1).sigmoid()

        return Keep()

    def losses(self, scores):
        terms = [(s.scores_BN.mean(1) - s.keep / s.scores_BN.shape[1]).square().mean() for s in scores]
        return {"ratio": self.ratio_weight * sum(terms) / len(terms)}


@hookimpl
def ucc_scorers():
    return {"predictor": Predictor}
'''
names: dict = {}
exec(PLUGIN, names)
Predictor = names["Predictor"]


def dense():
    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=2, embed_dim=16, depth=3, num_heads=2, num_classes=3)


def student(scorer, aggregator=None):
    model = dense()
    plan = CompressionPlan.identity(shape_of(model)).replace(tokens_out=[10, 6, 6])
    torch.manual_seed(1)
    parts = Components(scorer, aggregator or Drop(), PerBlock())
    return compress(model, plan, parts), plan, parts


def loss_of(model, plan) -> CandidateLoss:
    return CandidateLoss(
        model,
        dense(),
        Logits(),
        DistillContext(plan, plan.shape),
        label_smoothing=0.0,
        augment=AugmentConfig(),
    ).train()


class Deaf(Predictor):
    learned = False


@pytest.mark.parametrize("aggregator", [Drop(), Host()], ids=["drop", "host"])
def test_the_loss_reaches_every_predictor_and_changes_no_output(aggregator):
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    model, plan, _ = student(Predictor(), aggregator)
    parts = loss_of(model, plan)(images, labels, 0.0)
    assert set(parts) == {"task", "logits", "scorer.ratio"}
    parts["task"].backward()
    learned = {n: p for n, p in model.named_parameters() if "scorer" in n}
    assert len(learned) == 2 * 4  # two sites
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in learned.values())
    deaf, _, _ = student(Deaf(), aggregator)
    assert torch.equal(deaf.train()(images), model.train()(images))
    told = loss_of(deaf, plan)(images, labels, 0.0)
    assert set(told) == {"task", "logits"}
    assert torch.equal(told["task"], parts["task"])
    told["task"].backward()
    assert all(p.grad is None for n, p in deaf.named_parameters() if "scorer" in n)


def test_the_gradient_of_a_score_is_that_of_scaling_its_token():
    """dL/ds = <x, dL/dx>: compared with the loss when a kept token is really scaled."""
    model, _, _ = student(Predictor())
    images = torch.randn(1, 3, 8, 8).double()
    model = model.double().train()
    block = model.blocks[0]
    seen = {}
    handle = block.scorer.register_forward_hook(
        lambda module, args, out: (out.retain_grad(), seen.update(s=out))[0]
    )
    model(images).square().sum().backward()
    handle.remove()
    grad_N = seen["s"].grad[0]
    token = int(grad_N.abs().argmax())

    def scaled(factor: float) -> float:
        original = block._learn

        def learn(x_BTD, score_BN):
            x_BTD = original(x_BTD, score_BN).clone()
            x_BTD[:, block.prefix + token] *= factor
            return x_BTD

        block._learn = learn
        try:
            with torch.no_grad():
                return float(model(images).square().sum())
        finally:
            del block._learn

    step = 1e-6
    slope = (scaled(1 + step) - scaled(1 - step)) / (2 * step)
    assert math.isclose(slope, float(grad_N[token]), rel_tol=1e-4)
    # Tokens that leave under `drop` have none.
    kept = int((grad_N != 0).sum())
    assert kept == 10


def test_the_ratio_loss_moves_the_scores_towards_the_plan():
    model, plan, _ = student(Predictor())
    module = loss_of(model, plan)
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(3, (8,))
    only = [p for n, p in model.named_parameters() if "scorer" in n]
    optimizer = torch.optim.Adam(only, lr=0.05)
    first = last = math.inf
    for step in range(40):
        term = module(images, labels, 0.0)["scorer.ratio"]
        first, last = (float(term.detach()) if step == 0 else first), float(term.detach())
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
    assert last < 0.1 * first


def test_losses_see_the_tokens_of_this_step():
    seen = []

    class Watching(Predictor):
        def losses(self, scores):
            seen.extend((s.site.block, s.keep, tuple(s.scores_BN.shape)) for s in scores)
            return {}

    model, plan, _ = student(Watching())
    module = loss_of(model, plan)
    set_tokens(model, [16, 12, 12])
    module(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), 0.0)
    assert seen == [(0, 16, (2, 16)), (1, 12, (2, 16))]


def test_what_it_costs_is_counted():
    model, plan, parts = student(Predictor())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to("meta").eval()(torch.randn(1, 3, 8, 8, device="meta"))
    assert counter.get_total_flops() == 2 * cost(plan, parts).macs
    assert sum(p.numel() for p in model.parameters()) == cost(plan, parts).params


def test_a_whole_run_trains_and_saves_it(tmp_path):
    plugin = tmp_path / "predictor.py"
    plugin.write_text(PLUGIN)
    config = tiny_config(
        plugins=[str(plugin)],
        budget={"macs": "60%"},
        space={
            "scorer": {"name": "predictor", "ratio_weight": {"low": 0.1, "high": 1.0}},
            "aggregator": "drop",
        },
        search={"trials": 1, "promote": 0, "fidelity": "train"},
        train={"engine": "torch", "steps": 3, "batch_size": 32},
    )
    run = search(config, out=tmp_path / "run")
    row = next(r for r in run.rows if r.origin == "search")
    assert (row.state, row.error) == ("ok", None)
    curve = (run.path / "trials" / str(row.id) / "metrics.jsonl").read_text()
    assert "scorer.ratio" in curve
    model = load_model(run.path / "trials" / str(row.id))
    scorers = [b.scorer for b in model.blocks if getattr(b, "scorer", None) is not None]
    assert scorers
    assert all(isinstance(s, nn.Module) for s in scorers)
