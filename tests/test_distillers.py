from __future__ import annotations

import functools
import math

import pytest
import timm
import torch
from shapes import small_shape
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from ucc_search.builtin.aggregators import Bipartite, Drop, Fuse, Host
from ucc_search.builtin.cascades import PerBlock
from ucc_search.builtin.distillers import (
    HardAlign,
    Logits,
    NoDistillation,
    PooledFeatures,
    TwoLevel,
    hide,
    logit_kl,
)
from ucc_search.builtin.scorers import Joint
from ucc_search.compression import compress, shape_of
from ucc_search.config import AugmentConfig
from ucc_search.interfaces import Components, DistillContext, Features, Outputs
from ucc_search.losses import CandidateLoss, record, record_pooled
from ucc_search.models import small_vit
from ucc_search.plan import CompressionPlan


@functools.cache
def teacher():
    torch.manual_seed(0)
    return small_vit(
        classes=10,
        channels=1,
        img_size=8,
        stem_channels=(8,),
        stem_strides=(2,),
        embed_dim=24,
        depth=4,
        num_heads=3,
    ).eval()


def images(batch=3):
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def plan(tokens=(16, 10, 7, 3), *, head_tokens_only=False):
    tokens = [*tokens[:-1], tokens[-2]] if head_tokens_only else list(tokens)
    identity = CompressionPlan.identity(shape_of(teacher()))
    return identity.replace(tokens_out=tokens, head_tokens_only=head_tokens_only)


def student(tokens=(16, 10, 7, 3), *, aggregator=None, **changes):
    parts = Components(Joint(), aggregator or Host(), PerBlock())
    return compress(teacher(), plan(tokens, **changes), parts)


def outputs(model, blocks=range(4)):
    with record(model, list(blocks), 1) as found:
        return Outputs(model(images()), found)


def context(**changes):
    return DistillContext(plan(**changes), shape_of(teacher()))


# Logits


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_equal_logits_have_no_divergence(tau):
    logits_BC = torch.randn(5, 10)
    assert float(logit_kl(logits_BC, logits_BC + 3.0, tau)) == pytest.approx(0.0, abs=1e-6)


def test_divergence_is_the_formula_written_out():
    student_BC, teacher_BC, tau = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]]), 2.0
    p = [math.exp(1) / (math.exp(1) + 1), 1 / (math.exp(1) + 1)]
    q = [1 / (1 + math.exp(0.5)), math.exp(0.5) / (1 + math.exp(0.5))]
    expected = tau**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(logit_kl(student_BC, teacher_BC, tau)) == pytest.approx(expected, rel=1e-5)


def test_the_weight_scales_the_loss():
    one, two = (Outputs(torch.randn(4, 10), {}) for _ in range(2))
    light, heavy = (Logits(weight).losses(one, two, 0.0)["logits"] for weight in (0.5, 2.0))
    torch.testing.assert_close(heavy, 4 * light)


# Pooled features


POOLS = {
    **{p or "none": {"global_pool": p} for p in ("token", "avg", "avgmax", "max", "map", "")},
    "registers": {"reg_tokens": 4, "global_pool": "avg", "fc_norm": False},
}


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
def test_the_pooled_feature_is_what_the_classifier_reads(options):
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}
    model = VisionTransformer(img_size=8, in_chans=1, patch_size=2, **sizes, **options).eval()
    with torch.no_grad(), record_pooled(model) as found:
        logits = model(images())
        model(images(batch=5))
    first, second = found
    assert (len(second), first.shape[-1]) == (5, 24)
    torch.testing.assert_close(model.head(first), logits, rtol=0, atol=0)
    assert not model.head._forward_pre_hooks


def test_of_two_classifiers_the_first_counts():
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}
    model = VisionTransformerDistilled(img_size=8, in_chans=1, patch_size=2, **sizes).eval()
    with torch.no_grad(), record_pooled(model) as found:
        model(images())
        torch.testing.assert_close(found[0], model.forward_features(images())[:, 0])


def test_pyramids_have_a_pooled_feature_too():
    model = timm.create_model("pvt_v2_b0", num_classes=10, in_chans=1).eval()
    with torch.no_grad(), record_pooled(model) as found:
        logits = model(torch.randn(2, 1, 32, 32))
    assert found[0].shape == (2, 256)
    torch.testing.assert_close(model.head(found[0]), logits, rtol=0, atol=0)


def feature_loss(small, big, weight=20.0):
    """A student narrower than its teacher, whatever `compress` can make."""
    shape = shape_of(big)
    settings = DistillContext(CompressionPlan.identity(shape).replace(embed_dim=small.embed_dim), shape)
    rule = {"label_smoothing": 0.0, "augment": AugmentConfig()}
    return CandidateLoss(small, big, PooledFeatures(weight), settings, **rule)


def narrow():
    torch.manual_seed(1)
    return VisionTransformer(
        img_size=8, in_chans=1, patch_size=2, embed_dim=12, depth=2, num_heads=3, num_classes=10
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_the_feature_loss_is_the_mean_square_written_out(adapted):
    small, labels = narrow() if adapted else student(), torch.tensor([0, 1, 2])
    module = feature_loss(small, teacher(), weight=3.0).eval()
    assert isinstance(module.distiller.adapter, torch.nn.Linear if adapted else torch.nn.Identity)
    losses = module(images(), labels, 0.0)
    features = (m.forward_head(m.forward_features(images()), pre_logits=True) for m in (small, teacher()))
    own, theirs = features
    expected = 3.0 * (module.distiller.adapter(own) - theirs).pow(2).sum() / (3 * 24)
    assert set(losses) == {"task", "features"}
    torch.testing.assert_close(losses["features"], expected)
    task = torch.nn.functional.cross_entropy(small(images()), labels)
    torch.testing.assert_close(losses["task"], task)


def test_a_student_equal_to_its_teacher_has_no_feature_loss():
    labels = torch.tensor([0, 1, 2])
    assert feature_loss(student((16, 16, 16, 16)), teacher()).eval()(images(), labels, 0.0)["features"] == 0


@pytest.mark.parametrize("weight", [0.0, 20.0])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_feature_loss_reaches_every_parameter(adapted, weight):
    module = feature_loss(narrow() if adapted else student(), teacher(), weight).train()
    module.model.requires_grad_(True)
    losses = module(images(), torch.tensor([1, 2, 3]), 0.0)
    torch.stack(list(losses.values())).sum().backward()
    assert not [n for n, p in module.named_parameters() if p.grad is None]
    assert all(p.grad is None for p in teacher().parameters())
    alone = module(images(), torch.tensor([1, 2, 3]), 0.0)["features"]
    (slope,) = torch.autograd.grad(alone, module.model.blocks[0].norm1.weight)
    assert bool(slope.any()) == (weight > 0)


def test_features_are_recorded_for_distillers_that_ask():
    rule = {"label_smoothing": 0.0, "augment": AugmentConfig()}
    module = CandidateLoss(student(), teacher(), Logits(), context(), **rule)
    assert module._teach(images()).pooled_BD is None
    assert feature_loss(student(), teacher())._teach(images()).pooled_BD.shape == (3, 24)


# What the tokens are made of


@pytest.mark.parametrize("aggregator", [Host(), Drop(), Fuse(), Bipartite()], ids=lambda a: type(a).__name__)
def test_compositions_are_averages_of_the_teachers_tokens(aggregator):
    found = outputs(student(aggregator=aggregator)).blocks
    for i, tokens in ((1, 10), (2, 7), (3, 3)):
        compose_BRN = found[i].compose_BRN
        assert compose_BRN.shape == (3, tokens, 16)
        assert bool((compose_BRN >= 0).all())
        torch.testing.assert_close(compose_BRN.sum(dim=2), torch.ones(3, tokens))
        # Every token is at least partly the patch at its own position.
        own = compose_BRN.gather(2, found[i].position_BN[..., None])
        assert bool((own > 0).all())


def test_compositions_say_how_tokens_were_mixed():
    # A block whose attention and MLP add nothing hands on exactly the mixture.
    model = student((16, 10, 10, 10))
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    with torch.no_grad(), record(model, [0, 1], 1) as found:
        model(images())
    before, after = found[0].x_BTD[:, 1:], found[1]
    torch.testing.assert_close(after.compose_BRN @ before, after.x_BTD[:, 1:], rtol=1e-4, atol=1e-5)


# Two levels


def test_a_student_equal_to_its_teacher_has_nothing_to_imitate():
    settings = TwoLevel(imitation=1.0, logits=1.0)
    losses = settings.build(context(tokens=(16, 16, 16, 16)))
    same = outputs(teacher())
    found = losses(same, same, 0.0)
    assert found["imitation"].item() == 0.0
    assert found["logits"].item() == pytest.approx(0.0, abs=1e-6)
    assert found["exploration"].item() > 0  # the generator has learned nothing yet
    other = losses(outputs(student()), same, 0.0)
    assert other["imitation"].item() > 0


def test_imitation_compares_with_the_mixed_teacher():
    settings = TwoLevel(imitation=2.0, shallow=(1,))
    losses = settings.build(context())
    own, theirs = outputs(student()), outputs(teacher())
    mixed = own.blocks[1].compose_BRN @ theirs.blocks[1].x_BTD[:, 1:]
    expected = 2.0 * (own.blocks[1].x_BTD[:, 1:] - mixed).pow(2).sum() / 3
    torch.testing.assert_close(losses(own, theirs, 0.0)["imitation"], expected)


def test_sequential_imitates_first_and_explores_after_the_switch():
    settings = TwoLevel(schedule="sequential", switch=0.4, imitation=1.0, exploration=1.0)
    losses = settings.build(context())
    own, theirs = outputs(student()), outputs(teacher())
    for progress, imitating in ((0.0, True), (0.39, True), (0.4, False), (1.0, False)):
        found = losses(own, theirs, progress)
        assert (found["imitation"].item() > 0, found["exploration"].item() > 0) == (imitating, not imitating)
    parallel = TwoLevel(imitation=1.0, exploration=1.0).build(context())(own, theirs, 0.9)
    assert parallel["imitation"].item() > 0
    assert parallel["exploration"].item() > 0


@pytest.mark.parametrize("schedule", ["parallel", "sequential"])
@pytest.mark.parametrize("progress", [0.0, 0.9])
@pytest.mark.parametrize("head_tokens_only", [False, True])
def test_every_parameter_takes_part_in_every_step(schedule, progress, head_tokens_only):
    # With several workers a parameter without a gradient stops the run, whichever terms are on.
    module = CandidateLoss(
        student(head_tokens_only=head_tokens_only).train(),
        teacher(),
        TwoLevel(schedule=schedule),
        context(head_tokens_only=head_tokens_only),
        label_smoothing=0.0,
        augment=AugmentConfig(),
    )
    module.model.requires_grad_(True)
    losses = module(images(), torch.tensor([1, 2, 3]), progress)
    assert set(losses) == {"task", "logits", "imitation", "exploration"}
    torch.stack(list(losses.values())).sum().backward()
    assert not [n for n, p in module.named_parameters() if p.grad is None]
    assert all(p.grad is None for p in teacher().parameters())
    assert not any("teacher" in name for name in module.state_dict())


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_adapters_and_generator_learn_from_their_own_level(progress):
    narrow = small_shape()
    wide = context().teacher
    # A student of another width than its teacher needs phi, one adapter per level.
    student_plan = CompressionPlan.identity(wide).replace(
        embed_dim=narrow.embed_dim, tokens_out=[16, 10, 7, 3]
    )
    settings = TwoLevel(schedule="sequential", imitation=1.0, exploration=1.0, shallow=(0,))
    losses = settings.build(DistillContext(student_plan, wide))
    torch.nn.init.normal_(losses.mask_token)
    position = torch.arange(3).expand(2, 3)
    own = Outputs(
        torch.randn(2, 10),
        {
            0: Features(torch.randn(2, 17, 8), 1),
            3: Features(torch.randn(2, 4, 8), 1, position),
        },
    )
    theirs = Outputs(torch.randn(2, 10), {i: Features(torch.randn(2, 17, 24), 1) for i in (0, 3)})
    sum(losses(own, theirs, progress).values()).backward()
    moved = {name for name, p in losses.named_parameters() if p.grad is not None and bool(p.grad.any())}
    imitation = {n for n, _ in losses.named_parameters() if n.startswith("imitate")}
    assert imitation
    assert moved == (imitation if progress < 0.5 else {n for n, _ in losses.named_parameters()} - imitation)


@pytest.mark.parametrize("remaining", [1, 5, 8, 9, 16])
@pytest.mark.parametrize("mask_ratio", [0.1, 0.5, 0.75, 1.0])
def test_at_least_the_mask_ratio_is_hidden(remaining, mask_ratio):
    torch.manual_seed(0)
    tokens_BRD = torch.rand(4, remaining, 6) + 1.0
    position_BR = torch.stack([torch.randperm(16)[:remaining].sort().values for _ in range(4)])
    filler = torch.full((6,), -1.0)
    hidden_BN1, filled_BND = hide(tokens_BRD, position_BR, 16, mask_ratio, filler)
    hidden = hidden_BN1.sum(dim=(1, 2))
    # Sites are empty already where tokens are gone; no more are hidden than the ratio asks for.
    assert hidden.tolist() == [max(math.ceil(16 * mask_ratio), 16 - remaining)] * 4
    assert torch.equal(filled_BND == -1.0, (hidden_BN1 == 1).expand_as(filled_BND))
    restored = filled_BND.gather(1, position_BR[..., None].expand_as(tokens_BRD))
    shown = hidden_BN1.gather(1, position_BR[..., None]) == 0
    assert torch.equal(restored[shown.expand_as(restored)], tokens_BRD[shown.expand_as(tokens_BRD)])


def test_what_is_hidden_is_drawn_anew():
    tokens_BRD, position_BR = torch.ones(2, 16, 3), torch.arange(16).expand(2, 16)
    torch.manual_seed(0)
    first, second = (hide(tokens_BRD, position_BR, 16, 0.5, torch.zeros(3))[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_features_come_from_blocks_that_still_have_patches():
    assert TwoLevel().blocks(context()) == ((0, 1, 3), (0, 1, 3))
    assert TwoLevel().blocks(context(head_tokens_only=True)) == ((0, 1, 2), (0, 1, 3))
    # A block is not imitated and explored from at once.
    assert TwoLevel(shallow=(1, 3)).blocks(context())[0] == (1, 3)


def test_recording_leaves_no_hooks_and_no_trace():
    model = student()
    outputs(model)
    assert not any(b._forward_hooks for b in model.blocks)
    assert model.blocks.trace is False


def test_no_distillation_is_the_task_loss_alone():
    module = CandidateLoss(
        student(), None, NoDistillation(), context(), label_smoothing=0.0, augment=AugmentConfig()
    )
    labels = torch.tensor([0, 1, 2])
    losses = module(images(), labels, 0.0)
    expected = torch.nn.functional.cross_entropy(module.model(images()), labels)
    assert set(losses) == {"task"}
    torch.testing.assert_close(losses["task"], expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Logits(tau=0), "tau is 0"),
        (lambda: Logits(weight=-1), "weight is -1"),
        (lambda: PooledFeatures(weight=-1), "weight is -1"),
        (lambda: TwoLevel(mask_ratio=0.0), "mask_ratio is 0.0"),
        (lambda: TwoLevel(schedule="later"), "schedule is 'later'"),
        (lambda: TwoLevel(exploration=-1e-3), "exploration is -0.001"),
        (lambda: TwoLevel(tau=0.0), "tau is 0.0"),
        (lambda: TwoLevel(switch=1.5), "switch is 1.5"),
        (lambda: TwoLevel(shallow=(0, -1)), r"shallow is \[0, -1\]"),
    ],
)
def test_settings_out_of_range_say_what_came(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Hard labels and alignment (COMCAT)


def aligned(model, progress=0.0, settings=None, **changes):
    torch.manual_seed(0)
    losses = (settings or HardAlign()).build(context(**changes))
    blocks = (settings or HardAlign()).blocks(context(**changes))[0]
    return losses(outputs(model, blocks), outputs(teacher(), blocks), progress)


def test_a_student_equal_to_its_teacher_is_aligned():
    found = aligned(teacher(), tokens=(16, 16, 16, 16))
    assert float(found["align"]) == pytest.approx(0.0, abs=1e-10)
    logits = teacher()(images())
    expected = torch.nn.functional.cross_entropy(logits, logits.argmax(1))
    assert float(found["hard"]) == pytest.approx(float(expected))


def test_alignment_fades_by_a_cosine_down_to_its_floor():
    model = student()
    start, middle, end = (float(aligned(model, p)["align"]) for p in (0.0, 0.5, 1.0))
    assert start > 0
    assert middle == pytest.approx(start * math.cos(math.pi / 4))
    assert end == pytest.approx(start * 0.02)


def test_alignment_mixes_the_teachers_tokens_as_the_students_were():
    model = student(aggregator=Host())
    with record(model, [2], 1) as own, record(teacher(), [2], 1) as theirs:
        model(images()), teacher()(images())
    mixed = own[2].compose_BRN @ theirs[2].x_BTD[:, 1:]
    expected = torch.cat([theirs[2].x_BTD[:, :1], mixed], dim=1)
    by_hand = torch.nn.functional.mse_loss(own[2].x_BTD, expected)
    assert float(aligned(model, settings=HardAlign(aligned=[2]))["align"]) == pytest.approx(float(by_hand))


def test_alignment_of_a_last_block_that_serves_the_head_alone():
    found = aligned(student(head_tokens_only=True), head_tokens_only=True)
    assert float(found["align"]) > 0
