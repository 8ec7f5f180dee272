"""The teacher in the repository is the one its recipe describes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ucc_search.checkpoints import ASSETS
from ucc_search.config import TrainConfig, load_config
from ucc_search.data import FASHION_MNIST_DEBIAN, load_data
from ucc_search.models import build_model, load_weights
from ucc_search.teachers import accuracy

SPACE = Path(__file__).resolve().parent.parent / "search_spaces" / "fashion_mnist_ucc.yaml"
FOLDER = ASSETS / "fashion-mnist"
RECIPE = json.loads((FOLDER / "recipe.json").read_text(encoding="utf-8"))


def test_the_recipe_is_that_of_the_space_file():
    config = load_config(SPACE)
    # Through the reader, so that a key added since with a default is no difference.
    assert TrainConfig.model_validate(RECIPE["teacher"]) == config.teacher
    assert config.model.name == RECIPE["model"]["name"]
    assert dict(config.model.args) == RECIPE["model"]["args"]
    assert config.data.select == RECIPE["data"]["select"]


def test_the_weights_fit_and_are_as_many_as_recorded():
    config = load_config(SPACE)
    model = build_model(config.model, classes=RECIPE["classes"], channels=RECIPE["channels"])
    load_weights(model, FOLDER)
    assert sum(p.numel() for p in model.parameters()) == RECIPE["parameters"] < 1_600_000


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST_DEBIAN.is_dir(), reason="Fashion-MNIST is not installed")
def test_the_accuracy_is_the_recorded_one():
    config = load_config(SPACE)
    splits = load_data(config.data)
    model = build_model(config.model, classes=splits.classes, channels=splits.channels)
    load_weights(model, FOLDER)
    assert accuracy(model.eval(), splits.test) == pytest.approx(RECIPE["test_accuracy"], abs=2e-4)
    assert RECIPE["test_accuracy"] >= 0.92
