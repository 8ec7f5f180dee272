"""What a plugin or a user may get wrong is refused in a sentence, where it happens."""

from __future__ import annotations

import json

import pytest
import torch
from shapes import small_shape
from timm.models.vision_transformer import VisionTransformer

from ucc_search.builtin.aggregators import Drop
from ucc_search.builtin.cascades import PerBlock
from ucc_search.builtin.scorers import Random
from ucc_search.compression import compress, shape_of
from ucc_search.config import parse_config
from ucc_search.errors import ConfigError, ModelError, PlanError, PluginError
from ucc_search.interfaces import Assignment, ComponentRef, Components, SamplerRequest, Scorer
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import Plugins
from ucc_search.space import SearchSpace
from ucc_search.teachers import load_teacher

BASE = {
    "name": "x",
    "model": {"name": "small_vit"},
    "data": {"name": "digits"},
    "budget": {"macs": "50%"},
}


def compressed(scorer, aggregator=None):
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8, patch_size=2, embed_dim=16, depth=3, num_heads=2, num_classes=3
    ).eval()
    plan = CompressionPlan.identity(shape_of(model)).replace(tokens_out=[10, 8, 8])
    return compress(model, plan, Components(scorer, aggregator or Drop(), PerBlock()))


@pytest.mark.parametrize(
    "scores",
    [
        lambda view: view.patches_BND.norm(dim=-1)[:, :1],  # would silently run with other tokens
        lambda view: view.x_BTD.norm(dim=-1),  # prefix tokens among them
        lambda view: view.patches_BND,
        lambda view: view.patches_BND.norm(dim=-1)[0],
    ],
)
def test_scores_of_a_wrong_shape_name_the_scorer_and_the_shape(scores):
    class Mistaken(Scorer):
        def score(self, view):
            return scores(view)

    with pytest.raises(PlanError, match=r"scorer Mistaken gave scores of shape .*, expected \(2, 16\)"):
        compressed(Mistaken())(torch.randn(2, 3, 8, 8))


def test_an_aggregator_that_keeps_too_few_is_named():
    class Greedy(Drop):
        def assign(self, view, scores_BN, keep):
            found = super().assign(view, scores_BN, keep)
            return Assignment(found.keep_BR[:, :2], found.prune_BP)

    with pytest.raises(PlanError, match="aggregator Greedy kept 2 tokens, expected at least 10"):
        compressed(Random(), Greedy())(torch.randn(2, 3, 8, 8))


def test_blocks_of_a_compressed_model_run_only_together():
    model = compressed(Random())
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(ModelError, match="use forward or forward_features"):
        model.forward_intermediates(images)
    with pytest.raises(ModelError, match="use forward or forward_features"):
        model.prune_intermediate_layers(1)
    model.set_grad_checkpointing(True)
    with pytest.raises(ModelError, match="use forward or forward_features"):
        model.train()(images)


def test_a_compressed_model_is_not_compressed_again():
    model = compressed(Random())
    with pytest.raises(ModelError, match="compressed already"):
        shape_of(model)


def test_scores_may_be_negative():
    """Centred scores have a mean near zero; dividing by it would let one block rule for ever."""
    first, second = torch.tensor([[1.0, -1.0, 0.001, 0.003]]), torch.tensor([[0.0, 8.0, 1.0, 1.0]])
    cascade = PerBlock()
    total = cascade.accumulate(cascade.accumulate(None, first), second)
    # Either block adds a mean magnitude of one.
    assert total.abs().mean() <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"steps": 1, "engine": "torch", "workers": 2}}, "need engine: deepspeed"),
        ({"train": {"steps": 1, "engine": "torch", "zero_stage": 1}}, "need engine: deepspeed"),
        ({"teacher": {"steps": 1, "workers": 2, "batch_size": 2}}, "a teacher is trained by one process"),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(BASE | change)


def test_a_log_range_with_a_step_is_refused_before_the_run():
    config = parse_config(
        BASE
        | {
            "space": {
                "distiller": {"name": "logits", "weight": {"low": 0.1, "high": 1, "log": True, "step": 0.1}}
            }
        }
    )
    with pytest.raises(ConfigError, match="takes no step"):
        SearchSpace.of(config.space, small_shape(), Plugins.load(entry_points=False, environment=False))


def test_whole_ranges_stay_whole():
    config = parse_config(
        BASE | {"space": {"scorer": {"name": "random", "seed": {"low": 0, "high": 9, "step": 1}}}}
    )
    plugins = Plugins.load(entry_points=False, environment=False)
    space = SearchSpace.of(config.space, small_shape(), plugins)
    sampler = plugins.build("sampler", ComponentRef("random"))
    sampler.start(SamplerRequest(space.dimensions, [False], 0, 5, (), dict))
    seeds = [sampler.propose()["scorer.random.seed"] for _ in range(5)]
    assert all(isinstance(s, int) for s in seeds)
    with pytest.raises(PluginError, match="seed"):
        plugins.build("scorer", config.space.scorer[0])  # a range is no value


def test_a_teacher_of_another_split_is_refused(tmp_path):
    """Else images the teacher was trained on would choose between candidates."""
    from ucc_search.data import load_data

    (tmp_path / "recipe.json").write_text(json.dumps({"data": {"name": "digits", "select": 0.02}}))
    config = parse_config(
        BASE | {"model": {"name": "small_vit", "args": {"img_size": 8}, "checkpoint": str(tmp_path)}}
    )
    with pytest.raises(ModelError, match=r"trained with data.select: 0.02, now it is 0.1"):
        load_teacher(config, load_data(config.data))
