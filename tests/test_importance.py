"""Importance of units: what each criterion measures, that caches change nothing, and what is refused."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, dense, family, images
from torch import nn

from ucc_search import importance
from ucc_search.builtin.importances import KL, Fisher, Magnitude, Random
from ucc_search.checkpoints import ASSETS
from ucc_search.compression import compress, shape_of
from ucc_search.compression.masks import masked
from ucc_search.config import DataConfig, load_config
from ucc_search.data import FASHION_MNIST_DEBIAN, load_data, proxy_batches
from ucc_search.errors import PluginError
from ucc_search.importance import ModelProbe, unit_scores
from ucc_search.interfaces import Importance
from ucc_search.models import build_model, load_weights, small_vit
from ucc_search.plan import CompressionPlan

SPACE = Path(__file__).resolve().parent.parent / "search_spaces" / "fashion_mnist_ucc.yaml"


@functools.cache
def one_head():
    """A Vision Transformer of one head, whose channels can leave one at a time; and its shape."""
    torch.manual_seed(0)
    model = small_vit(
        classes=4,
        channels=1,
        img_size=8,
        stem_channels=(4,),
        stem_strides=(2,),
        embed_dim=8,
        depth=3,
        num_heads=1,
    )
    model = model.double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model, shape_of(model)


def subject(name):
    """(model, shape, proxy images in batches of different sizes)."""
    if name == "one_head":
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn(b, 1, 8, 8, generator=generator, dtype=torch.float64) for b in (3, 2)]
        return *one_head(), batches
    return family(name), dense(name).shape, [images(name, 2), images(name, 1, seed=5)]


def some_groups(shape):
    """Groups of every kind: all embeddings, whose prefixes differ, and the first and last block."""
    return [g for g in shape.unit_groups() if g.kind in ("embed", "depth") or g.index in (0, shape.depth - 1)]


def kl(whole, deleted):
    """Sum over images of KL(whole || deleted), written once more."""
    p, q = whole.double().softmax(dim=-1), deleted.double().softmax(dim=-1)
    return float((p * (p / q).log()).sum())


# The exact criterion


@pytest.mark.parametrize("name", FAMILIES)
def test_deleting_nothing_costs_nothing(name):
    model, shape, batches = subject(name)
    ones = {
        (g.kind, g.index): torch.ones(len(batches[0]), g.units, dtype=torch.float64)
        for g in shape.unit_groups()
    }
    with torch.no_grad():
        whole = model(batches[0])
        with masked(model, ones):
            assert kl(whole, model(batches[0])) == pytest.approx(0.0, abs=1e-12)
    assert all(len(module._forward_hooks) == 0 for module in model.modules())


class Unread(KL):
    """Deletes nothing: what is left of the criterion is its arithmetic."""

    def score(self, probe, group):
        everything = ((units, whole, whole.expand_as(out)) for units, whole, out in probe.deletions(group))
        return super().score(SimpleNamespace(deletions=lambda group: everything), group)


def test_equal_logits_score_zero_exactly():
    model, shape, batches = subject("one_head")
    scores = unit_scores(model, shape, Unread(), batches, groups=shape.unit_groups()[:2])
    assert all(not bool(s.any()) for s in scores.values())


def without(plan, group, unit):
    """The plan without one unit."""
    if group.kind == "embed":
        dims = list(plan.embed_dims)
        dims[group.index] -= 1
        return plan.replace(embed_dims=tuple(dims))
    if group.kind == "depth":
        attention, mlp = ([True] * plan.shape.depth for _ in range(2))
        block, odd = (unit, 0) if plan.shape.stages else divmod(unit, 2)
        attention[block + odd] = mlp[block] = False
        return plan.replace(attention=attention, mlp=mlp)
    block = plan.blocks[group.index]
    fewer = {"mlp_hidden": block.mlp_hidden - 1}
    if group.kind == "attention":
        fewer = {"qk_dim": block.qk_dim - 1, "v_dim": block.v_dim - 1}
    return plan.replace(
        **{
            key: [value if i == group.index else getattr(b, key) for i, b in enumerate(plan.blocks)]
            for key, value in fewer.items()
        }
    )


@pytest.mark.parametrize("name", ["one_head", "distilled", "pvt_v2_b0"])
def test_the_score_of_a_unit_is_the_divergence_of_the_model_without_it(name):
    # By slicing, while the criterion masks. Channels of one head can leave alone only where it is the only one.
    model, shape, batches = subject(name)
    plan = CompressionPlan.identity(shape)
    groups = [
        g
        for g in some_groups(shape)
        if g.units <= 64
        and g.index in (0, 3, shape.depth - 1)
        and (g.kind != "attention" or shape.blocks[g.index].heads == 1)
    ]
    assert name == "distilled" or {g.kind for g in groups} == {"embed", "attention", "mlp", "depth"}
    scores = unit_scores(model, shape, KL(), batches, groups=groups)
    for group in groups:
        for unit in {0, group.units // 2, group.units - 1}:
            key = group.kind, group.index
            others = {key: torch.arange(group.units) != unit}
            small = compress(model, without(plan, group, unit), scores=others)
            with torch.no_grad():
                by_hand = sum(kl(model(x), small(x)) for x in batches)
            assert float(scores[key][unit]) == pytest.approx(by_hand, rel=1e-6)
            assert by_hand > 1e-9


def test_deleting_a_channel_takes_its_rows_of_queries_keys_and_values():
    model, shape, batches = subject("vit")
    group = next(g for g in shape.unit_groups() if g.kind == "attention" and g.index == 1)
    scores = unit_scores(model, shape, KL(), batches, groups=[group])["attention", 1]
    for unit in (0, 9, 23):
        by_hand = copy.deepcopy(model)
        qkv = by_hand.blocks[1].attn.qkv
        for row in (unit, 24 + unit, 48 + unit):
            qkv.weight[row] = qkv.bias[row] = 0
        with torch.no_grad():
            expected = sum(kl(model(x), by_hand(x)) for x in batches)
        assert float(scores[unit]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [500, 5])
@pytest.mark.parametrize("name", ["one_head", "distilled", "pre_norm", "pvt_v2_b0"])
def test_starting_from_the_first_changed_block_changes_nothing(monkeypatch, name, rows):
    monkeypatch.setattr(importance, "_ROWS", rows)  # 5: units of one batch do not fit into one pass
    model, shape, batches = subject(name)
    probe = ModelProbe(model, shape, batches)
    for group in some_groups(shape):
        if group.units > (64 if rows == 500 else 16):
            continue
        seen = []
        for units, whole, deleted in probe.deletions(group):
            batch = next(x for x in batches if len(x) == len(whole))
            assert len(units) * len(batch) <= rows  # memory of one pass
            torch.testing.assert_close(whole, model(batch), rtol=0, atol=1e-9)
            for unit, logits in list(zip(units.tolist(), deleted, strict=True))[:: 1 + group.units // 4]:
                mask = torch.ones(len(batch), group.units, dtype=torch.float64)
                mask[:, unit] = 0
                with torch.no_grad(), masked(model, {(group.kind, group.index): mask}):
                    torch.testing.assert_close(logits, model(batch), rtol=0, atol=1e-9)
            seen += [(unit, len(whole)) for unit in units.tolist()]
        assert sorted(seen) == sorted(itertools.product(range(group.units), {len(x) for x in batches}))


# The second-order approximation


def fisher(name, **options):
    model, shape, batches = subject(name)
    inner = [g for g in some_groups(shape) if g.kind != "depth"]
    return unit_scores(model, shape, Fisher(**options), batches, groups=inner)


@pytest.mark.parametrize("name", ["one_head", "norms", "swiglu", "no_last_norm", "pvt_v2_b0"])
def test_fisher_is_the_curvature_of_the_divergence(name):
    # KL(1 - e) is e^2 times the score, up to terms of third order, which the mean of both sides cancels.
    model, shape, batches = subject(name)
    step = 1e-2
    found = fisher(name, samples=10)
    for group in some_groups(shape)[:-1]:
        for unit in (1, group.units - 1):
            expected = 0.0
            for batch, side in itertools.product(batches, (1 - step, 1 + step)):
                mask = torch.ones(len(batch), group.units, dtype=torch.float64)
                mask[:, unit] = side
                with torch.no_grad():
                    whole = model(batch)
                    with masked(model, {(group.kind, group.index): mask}):
                        expected += kl(whole, model(batch)) / step**2 / 2
            score = float(found[group.kind, group.index][unit])
            assert score == pytest.approx(expected, rel=1e-2, abs=1e-9)


def test_with_as_many_samples_as_classes_the_expectation_is_exact():
    exact = fisher("vit", samples=5)
    for other in (fisher("vit", samples=9), fisher("vit", samples=5, seed=7)):
        assert all(torch.equal(exact[key], other[key]) for key in exact)


def test_with_fewer_samples_the_draws_repeat_by_seed_and_are_right_on_average():
    exact = fisher("vit", samples=5)
    first, again, other = (fisher("vit", samples=2, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in exact)
    assert not any(torch.equal(first[key], other[key]) for key in exact)
    many = [fisher("vit", samples=4, seed=seed) for seed in range(12)]
    for key in exact:
        mean = torch.stack([scores[key] for scores in many]).mean(dim=0)
        assert mean.sum() == pytest.approx(float(exact[key].sum()), rel=0.2)


@pytest.mark.parametrize("name", ["vit", "pvt_v2_b0"])
def test_fisher_scores_depth_by_deletion(name):
    model, shape, batches = subject(name)
    depth = [shape.unit_groups()[-1]]
    exact, found = (unit_scores(model, shape, c, batches, groups=depth) for c in (KL(), Fisher()))
    assert torch.equal(exact["depth", 0], found["depth", 0])


def test_fisher_needs_a_sample():
    with pytest.raises(ValueError, match="samples is 0, expected 1 or more"):
        Fisher(samples=0)


def ranks(values):
    return torch.tensor(values).argsort().argsort().double()


@pytest.mark.parametrize("name", ["vit", "pre_norm", "norms", "pvt_v2_b0"])
def test_fisher_is_near_the_exact_score_whatever_norms_a_unit_passes(name):
    # A mask that stood twice on the way of what it deletes would double the score.
    model, shape, _ = subject(name)
    # One of eight units is much of the model, and normalised queries and keys lose whole heads only.
    kinds = ("embed", "mlp") if name == "norms" else ("embed", "mlp", "attention")
    groups = [g for g in some_groups(shape) if g.kind in kinds and 16 <= g.units <= 100]
    exact, found = (
        unit_scores(model, shape, criterion, [images(name, 6, seed=3)], groups=groups)
        for criterion in (KL(), Fisher())
    )
    for key in exact:
        assert 0.7 < (found[key] / exact[key]).median() < 1.4


@pytest.mark.skipif(not FASHION_MNIST_DEBIAN.is_dir(), reason="Fashion-MNIST is not installed")
def test_fisher_ranks_the_units_of_the_shipped_teacher_as_deleting_them_does():
    config = load_config(SPACE)
    splits = load_data(config.data)
    model = build_model(config.model, classes=splits.classes, channels=splits.channels)
    load_weights(model, ASSETS / "fashion-mnist")
    shape, proxy = shape_of(model.eval().requires_grad_(False)), proxy_batches(splits, 20)
    approximate = unit_scores(model, shape, Fisher(), proxy)
    (batch,) = proxy
    for kind, count in (("embed", 64), ("attention", 68), ("mlp", 68)):  # depth is exact
        units = [(g, u) for g in shape.unit_groups() if g.kind == kind for u in range(g.units)]
        chosen = [units[i * len(units) // count] for i in range(count)]
        found, expected = [], []
        with torch.no_grad():
            whole = model(batch)
            for group, unit in chosen:
                mask = torch.ones(len(batch), group.units)
                mask[:, unit] = 0
                with masked(model, {(kind, group.index): mask}):
                    expected.append(kl(whole, model(batch)))
                found.append(float(approximate[kind, group.index][unit]))
        assert torch.corrcoef(torch.stack([ranks(found), ranks(expected)]))[0, 1] >= 0.9
        assert 0.8 < (torch.tensor(found) / torch.tensor(expected)).median() < 1.25


# Criteria without images


def matrices(model):
    """Squares of all weights of linear layers and convolutions, summed."""
    layers = (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return float(sum(layer.weight.square().sum() for layer in layers))


@pytest.mark.parametrize("name", ["one_head", "swiglu", "distilled", "pvt_v2_b0"])
def test_magnitude_is_the_norm_of_the_weights_that_leave(name):
    model, shape, _ = subject(name)
    plan = CompressionPlan.identity(shape)
    groups = [g for g in some_groups(shape) if g.kind in ("embed", "mlp")]
    scores = unit_scores(model, shape, Magnitude(), groups=groups)
    for group in groups:
        key = group.kind, group.index
        for unit in (0, group.units - 1):
            small = compress(
                model, without(plan, group, unit), scores={key: torch.arange(group.units) != unit}
            )
            assert float(scores[key][unit]) ** 2 == pytest.approx(matrices(model) - matrices(small), rel=1e-9)


@pytest.mark.parametrize("name", ["vit", "pvt_v2_b0"])
def test_the_magnitude_of_a_channel_is_that_of_its_rows_and_its_column(name):
    model, shape, _ = subject(name)
    last = shape.depth - 1
    group = next(g for g in shape.unit_groups() if (g.kind, g.index) == ("attention", last))
    attention = importance.blocks_of(model)[last].attn
    layers = [attention.qkv] if name == "vit" else [attention.q, attention.kv]
    rows = torch.cat([layer.weight for layer in layers]).unflatten(0, (3, group.units))
    by_hand = (rows.square().sum(dim=(0, 2)) + attention.proj.weight.square().sum(dim=0)).sqrt()
    found = unit_scores(model, shape, Magnitude(), groups=[group])["attention", last]
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=0)


def test_the_magnitude_of_a_half_step_is_that_of_the_halves_that_leave():
    model, shape, _ = subject("vit")

    def squares(module):
        return sum(float(p.square().sum()) for p in module.parameters())

    attention, mlp = ([squares(getattr(b, half)) for b in model.blocks] for half in ("attn", "mlp"))
    by_hand = [
        attention[0] + mlp[0],
        attention[1] + mlp[0],
        attention[1] + mlp[1],
        attention[2] + mlp[1],
        attention[2] + mlp[2],
    ]
    found = unit_scores(model, shape, Magnitude(), groups=[shape.unit_groups()[-1]])["depth", 0]
    torch.testing.assert_close(found.square(), torch.tensor(by_hand).double(), rtol=1e-5, atol=0)


def test_compress_selects_by_magnitude_where_no_scores_are_given():
    model, shape, _ = subject("vit")
    plan = dense("vit").replace(embed_dim=20, heads=2, mlp_hidden=50)
    scores = unit_scores(model, shape, Magnitude())
    by_default, by_scores = (compress(model, plan, scores=s).state_dict() for s in (None, scores))
    assert all(torch.equal(by_default[key], by_scores[key]) for key in by_scores)


def test_chance_depends_on_the_seed_and_the_group_and_on_nothing_else():
    model, shape, batches = subject("vit")
    first = unit_scores(model, shape, Random())
    alone = unit_scores(model, shape, Random(), batches, groups=shape.unit_groups()[-2:])
    assert all(torch.equal(first[key], alone[key]) for key in alone)
    other = unit_scores(model, shape, Random(seed=1))
    assert not any(torch.equal(first[key], other[key]) for key in first)
    assert not torch.equal(first["attention", 0], first["attention", 1])
    assert set(first) == {(g.kind, g.index) for g in shape.unit_groups()}


# The cache


class Counting(Importance):
    """Notes what it is asked."""

    def __init__(self):
        self.asked = []

    def score(self, probe, group):
        self.asked.append((group.kind, group.index))
        return torch.arange(group.units) / (1 + group.index)


class Blind(Counting):
    needs_images = False


def stop_after(groups):
    def progress(done, total, text):
        if done == groups:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("criterion", [KL, functools.partial(Fisher, samples=2)], ids=["kl", "fisher"])
def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path, criterion):
    model, shape, batches = subject("one_head")
    whole = unit_scores(model, shape, criterion(), batches)
    with pytest.raises(KeyboardInterrupt):
        unit_scores(model, shape, criterion(), batches, cache=tmp_path, progress=stop_after(2))
    done = sorted(path.name for path in tmp_path.glob("*/*.safetensors"))
    assert done == ["attention-0.safetensors", "embed-0.safetensors"]
    again = unit_scores(model, shape, criterion(), batches, cache=tmp_path)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_only_what_is_missing_is_measured_again(tmp_path):
    model, shape, batches = subject("one_head")
    keys = [(g.kind, g.index) for g in shape.unit_groups()]
    first, second, third = Counting(), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        unit_scores(model, shape, first, batches, cache=tmp_path, progress=stop_after(2))
    assert first.asked == keys[:2]
    told = []
    scores = unit_scores(
        model, shape, second, batches, cache=tmp_path, progress=lambda *report: told.append(report)
    )
    assert second.asked == keys[2:]
    assert told == [
        *((i, len(keys), f"{kind} {index}") for i, (kind, index) in enumerate(keys)),
        (len(keys), len(keys), "done"),
    ]
    again = unit_scores(model, shape, third, batches, cache=tmp_path)
    assert third.asked == []
    assert all(torch.equal(scores[key], again[key]) for key in keys)
    assert all(scores[key].dtype == torch.float64 for key in keys)


def changed_weights(model, shape, batches):
    model = copy.deepcopy(model)
    model.blocks[1].norm1.bias[0] += 1e-6
    return {"model": model}


CHANGES = {
    "weights": changed_weights,
    "images": lambda model, shape, batches: {"images": [batches[0], batches[1] + 1e-6]},
    "fewer images": lambda model, shape, batches: {"images": batches[:1]},
    "parameters": lambda model, shape, batches: {"identity": ["counting", {"samples": 3}]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_images_or_parameters_are_measured_anew(tmp_path, change):
    model, shape, batches = subject("one_head")
    given = {"model": model, "images": batches, "identity": ["counting", {"samples": 2}]}
    for options, fresh in (
        (given, True),
        (given, False),
        (given | CHANGES[change](*subject("one_head")), True),
    ):
        criterion = Counting()
        unit_scores(shape=shape, criterion=criterion, cache=tmp_path, **options)
        assert bool(criterion.asked) == fresh


def test_images_do_not_matter_to_a_criterion_that_needs_none(tmp_path):
    model, shape, batches = subject("one_head")
    first, second = Blind(), Blind()
    unit_scores(model, shape, first, batches, cache=tmp_path)
    unit_scores(model, shape, second, (), cache=tmp_path)
    assert first.asked
    assert not second.asked


def test_without_a_cache_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("UCC_SEARCH_CACHE", str(tmp_path))
    model, shape, batches = subject("one_head")
    unit_scores(model, shape, Magnitude(), batches)
    assert list(tmp_path.iterdir()) == []
    assert importance.default_cache() == tmp_path / "importances"


# What is refused

WRONG = {
    r"of shape \(7,\), expected \(8,\): one per unit": lambda n: torch.ones(n - 1),
    r"of shape \(8, 1\), expected \(8,\)": lambda n: torch.ones(n, 1),
    "that are not finite": lambda n: torch.ones(n).index_fill(0, torch.tensor([1]), float("nan")),
    "that are not finite ": lambda n: torch.full((n,), float("inf")),
}


@pytest.mark.parametrize("message", WRONG)
def test_scores_that_are_none_name_the_criterion_and_the_group(tmp_path, message):
    class Mistaken(Importance):
        def score(self, probe, group):
            return WRONG[message](group.units)

    model, shape, batches = subject("one_head")
    with pytest.raises(PluginError, match=r"Mistaken gave embed\[0\] scores " + message.strip()):
        unit_scores(model, shape, Mistaken(), batches, cache=tmp_path)
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_a_criterion_without_a_score_says_what_to_define():
    model, shape, batches = subject("one_head")
    with pytest.raises(NotImplementedError, match=r"Importance must define score\(probe, group\) or build"):
        unit_scores(model, shape, Importance(), batches)


# Proxy images


class Numbered:
    """A split whose images are their own indices."""

    def __init__(self, labels):
        self.labels_B = torch.tensor(labels)

    def __len__(self):
        return len(self.labels_B)

    def batch(self, indices, *, train=False):
        assert not train  # augmented images would change from run to run
        return indices, self.labels_B[indices]


class Forbidden:
    """A split that must not be touched."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} of a held-out split was read")


LABELS = [0] * 50 + [1] * 20 + [2] * 30


def test_proxy_images_are_equally_many_of_each_class_and_from_no_held_out_split():
    splits = SimpleNamespace(train=Numbered(LABELS), select=Forbidden(), test=Forbidden(), classes=3)
    batches = proxy_batches(splits, 45, batch_size=10)
    assert [len(b) for b in batches] == [10, 10, 10, 10, 5]
    chosen = torch.cat(batches)
    assert len(chosen.unique()) == 45
    assert splits.train.labels_B[chosen].bincount().tolist() == [15, 15, 15]
    # Classes are mixed, so that no batch shows one alone.
    assert all(len(splits.train.labels_B[b].unique()) == 3 for b in batches[:4])
    again = proxy_batches(splits, 45, batch_size=10)
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_every_class_has_at_least_one_proxy_image_and_none_more_than_it_has():
    splits = SimpleNamespace(train=Numbered(LABELS), select=Forbidden(), test=Forbidden(), classes=3)
    assert sorted(Numbered(LABELS).labels_B[proxy_batches(splits, 1)[0]].tolist()) == [0, 1, 2]
    (all_there_are,) = proxy_batches(splits, 75, batch_size=100)
    assert Numbered(LABELS).labels_B[all_there_are].bincount().tolist() == [25, 20, 25]


def test_proxy_images_are_training_images():
    splits = load_data(DataConfig(name="digits", select=0.2))
    (batch,) = proxy_batches(splits, 50)

    def seen(split):
        everything, _ = split.batch(torch.arange(len(split)))
        return {image.numpy().tobytes() for image in everything}

    chosen = {image.numpy().tobytes() for image in batch}
    assert chosen <= seen(splits.train)
    assert not chosen & (seen(splits.select) | seen(splits.test))
