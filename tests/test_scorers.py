from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from views import DIM, HEADS, QK_DIM, site, token_view

from ucc_search.builtin.scorers import ClassAttention, Joint, Random, Spatial, Spectral, fft_macs
from ucc_search.errors import ModelError
from ucc_search.interfaces import Scorer

SCORERS: list[Scorer] = [
    Spatial(),
    Spectral(),
    Spectral(fft_axis="channel"),
    Spectral(fft_axis="grid2d"),
    Spectral(sign="high"),
    Joint(),
    Joint(mix=0.5),
    ClassAttention(),
    Random(),
]


def patches(batch: int = 2, count: int = 12) -> torch.Tensor:
    return torch.randn(batch, count, DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_scores_are_finite_for_any_tokens(scorer, prefix):
    for tokens in (patches(), torch.zeros(2, 12, DIM), torch.ones(2, 12, DIM), patches(count=1)):
        view = token_view(tokens, prefix=prefix)
        scores_BN = scorer.build(site(tokens.shape[1], 1, prefix=prefix))(view)
        assert scores_BN.shape == tokens.shape[:2]
        assert bool(torch.isfinite(scores_BN).all())
        assert bool((scores_BN >= 0).all())


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("scorer", [Spatial(), Joint(), Spectral(), Random()], ids=lambda s: type(s).__name__)
def test_models_without_a_class_token_are_scored_too(scorer, prefix):
    view = token_view(patches(), prefix=prefix, class_token=False)
    scores_BN = scorer.build(site(12, 6, prefix=prefix, class_token=False))(view)
    assert scores_BN.shape == (2, 12)


def test_spatial_is_the_formula_written_out():
    view = token_view(patches(count=5), prefix=2)
    attn = view.attn_BHTT
    for j in range(5):
        expected = 0.0
        for h in range(HEADS):
            a, b = attn[0, h, :, 0].mean(), attn[0, h, 0, 0]
            expected += (a * attn[0, h, 0, 2 + j] + b * attn[0, h, :, 2 + j].mean()) / HEADS
        torch.testing.assert_close(Spatial().score(view)[0, j], expected)


def test_spatial_without_class_token_is_the_attention_received():
    view = token_view(patches(), prefix=0, class_token=False)
    # Every query gives away 1 in all, so the mean over queries sums to 1 over keys.
    torch.testing.assert_close(Spatial().score(view).sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("count", [8, 9, 196])
def test_constant_tokens_are_all_low_frequency(count):
    view = token_view(patches(count=1).expand(2, count, DIM))
    torch.testing.assert_close(Spectral().score(view), torch.ones(2, count), atol=1e-4, rtol=0)


def test_alternating_tokens_have_no_low_frequency():
    # The published filter is centred half a bin off Nyquist, so a little of it passes:
    # 1 - exp(-0.25 / (2 (0.15 n / 2)^2)), which is 0.0006 for 196 tokens and 0.107 for a side of 14.
    sign_N1 = torch.tensor([1.0, -1.0]).repeat(98)[:, None]
    view = token_view(patches(count=1) * sign_N1)
    assert float(Spectral().score(view).max()) < 1e-3
    rows_N1 = torch.tensor([1.0, -1.0]).repeat(7).repeat_interleave(14)[:, None]
    chessboard = token_view(patches(count=1) * sign_N1 * rows_N1, grid=(14, 14))
    scores_BN = Spectral(fft_axis="grid2d").score(chessboard)
    torch.testing.assert_close(scores_BN, torch.full((2, 196), 0.107**2), atol=1e-3, rtol=0)


def test_channel_axis_looks_within_each_token():
    smooth, rough = torch.ones(DIM), torch.tensor([1.0, -1.0]).repeat(DIM // 2)
    scores_BN = Spectral(fft_axis="channel", kappa=0.5).score(token_view(torch.stack([smooth, rough])[None]))
    assert scores_BN[0, 0] > 2 * scores_BN[0, 1]


def test_grid_scores_follow_positions_not_order():
    view = token_view(patches(count=16), grid=(4, 4))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = view._replace(
        x_BTD=torch.cat([view.x_BTD[:, :1], view.patches_BND[:, order]], dim=1),
        position_BN=view.position_BN[:, order],
    )
    scorer = Spectral(fft_axis="grid2d")
    torch.testing.assert_close(scorer.score(moved), scorer.score(view)[:, order])


def test_high_sign_prefers_tokens_far_from_the_mean():
    tokens = torch.ones(1, 6, DIM)
    tokens[0, 3] += 5
    assert int(Spectral(sign="high").score(token_view(tokens)).argmax()) == 3
    assert int(Spectral(sign="low").score(token_view(tokens)).argmax()) == 3  # also the one of most energy


def test_spectral_scores_carry_no_gradient():
    tokens = patches().requires_grad_()
    assert not Spectral().score(token_view(tokens)).requires_grad


def test_joint_is_a_product_or_a_weighted_sum():
    view = token_view(patches())
    spatial, spectral = Spatial().score(view), Spectral().score(view)
    torch.testing.assert_close(Joint().score(view), spatial * spectral)
    torch.testing.assert_close(Joint(mix=1.0).score(view).argsort(), spatial.argsort())
    torch.testing.assert_close(Joint(mix=0.0).score(view).argsort(), spectral.argsort())
    assert Joint(mix=0.5).score(view).amax() <= 1


def test_class_attention_is_the_class_row_of_the_map():
    view = token_view(patches(), prefix=2)
    expected = view.attn_BHTT[:, :, 0, 2:].mean(dim=1)
    torch.testing.assert_close(ClassAttention().score(view), expected)


def test_class_attention_costs_what_torch_counts():
    view = token_view(patches(batch=1), prefix=2)
    with FlopCounterMode(display=False) as counter:
        ClassAttention().score(view)
    assert counter.get_total_flops() == 2 * ClassAttention().macs(site(12, 6, prefix=2))
    assert ClassAttention().macs(site(12, 6, prefix=2)) == HEADS * 14 * QK_DIM


def test_class_attention_refuses_models_without_class_token():
    with pytest.raises(ModelError, match="no class token"):
        ClassAttention().build(site(12, 6, class_token=False))


def test_fft_costs_follow_the_convention():
    assert fft_macs(8) == 60  # 2.5 * 8 * 3
    assert fft_macs(196, 2) == round(5 * 196 * math.log2(196))
    assert fft_macs(1, 7) == 0
    here = dataclasses.replace(site(16, 8), grid=(2, 8))
    assert Spectral().macs(here) == fft_macs(16, 2 * DIM)
    assert Spectral(fft_axis="channel").macs(here) == fft_macs(DIM, 32)
    assert Spectral(fft_axis="grid2d").macs(here) == fft_macs(8, 4 * DIM) + fft_macs(2, 16 * DIM)
    assert Spectral(sign="high").macs(here) == 0
    assert Joint().macs(here) == Spectral().macs(here)
    assert Spatial().macs(here) == Random().macs(here) == 0


def test_random_scores_follow_seed_block_and_position():
    view = token_view(patches())
    first = Random(seed=1).build(site(12, 6))
    torch.testing.assert_close(first(view), Random(seed=1).build(site(12, 6))(view))
    assert not torch.equal(first(view), Random(seed=2).build(site(12, 6))(view))
    assert not torch.equal(first(view), Random(seed=1).build(site(12, 6, block=2))(view))
    fewer = view._replace(position_BN=torch.tensor([[7, 2], [0, 11]]))
    torch.testing.assert_close(first(fewer), first(view).gather(1, fewer.position_BN))


def test_random_scores_survive_half_precision_copies_and_stay_out_of_checkpoints():
    module = Random().build(site(196, 98))
    assert isinstance(module, nn.Module)
    assert module.state_dict() == {}
    view = token_view(patches(count=196))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module).to(torch.bfloat16)))
    assert torch.equal(twin(view), module(view))
    assert len(module(view)[0].unique()) == 196


@pytest.mark.parametrize("scorer", [Joint(), Joint(mix=0.3), Spectral(fft_axis="grid2d"), ClassAttention()])
def test_scorers_export_with_a_batch_of_any_size(scorer):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scorer = scorer.build(dataclasses.replace(site(12, 6), grid=(3, 4)))

        def forward(self, x_BND, q, k, received, row, position):
            tensors = {"x_BTD": x_BND, "q_BHTK": q, "k_BHTK": k, "position_BN": position}
            tensors |= {"received_BHT": received, "class_row_BHT": row}
            return self.scorer(view._replace(**tensors))

    view = token_view(patches(), grid=(3, 4))
    inputs = (view.x_BTD, view.q_BHTK, view.k_BHTK, view.received_BHT, view.class_row_BHT.contiguous())
    inputs = (*inputs, view.position_BN.contiguous())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Model(), inputs, dynamic_shapes=[{0: batch}] * 6)
    torch.testing.assert_close(program.module()(*inputs), scorer.score(view))
    targets = [str(n.target) for n in program.graph.nodes]
    assert not any("fft" in t or "complex" in t for t in targets)  # which ONNX does not know


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Spectral(fft_axis="row"), "token, channel, grid2d"),
        (lambda: Spectral(sign="mid"), "low, high"),
        (lambda: Spectral(kappa=0.0), "0 < kappa"),
        (lambda: Joint(mix=1.5), "0 to 1"),
        (lambda: Random(seed=-1), "0 or more"),
    ],
)
def test_bad_parameters_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_settings_without_effect_are_told():
    with pytest.warns(UserWarning, match="no effect"):
        Spectral(sign="high", kappa=0.3)


@pytest.mark.parametrize("module", ["scorers", "aggregators", "cascades"])
def test_components_are_listed_without_torch(module):
    code = f"import sys, ucc_search.builtin.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
