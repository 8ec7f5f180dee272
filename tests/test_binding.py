"""Data sets and models of plugins: a whole run on them, and what is refused."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import tiny_config

from ucc_search.binding import bind
from ucc_search.config import DataConfig, ModelConfig, dump_config
from ucc_search.data import load_data
from ucc_search.errors import ConfigError, DataError, ModelError, PluginError, RunError
from ucc_search.interfaces import Dataset, Family, ImageData
from ucc_search.models import build_model
from ucc_search.plugins import Plugins
from ucc_search.preview import inspect_model, preview
from ucc_search.reproduce import reproduce
from ucc_search.runner import search
from ucc_search.saving import load_model
from ucc_search.scaffold import new_plugin
from ucc_search.testing import checks_for
from ucc_search.testing.core import run_checks


def plugin_config(folder, **changes):
    files = [new_plugin(kind, f"my_{kind}", folder, package=False)[0] for kind in ("dataset", "family")]
    return tiny_config(
        **{
            "plugins": [str(f) for f in files],
            "model": {"name": "plugin:my_family", "args": {"embed_dim": 16}, "checkpoint": "auto"},
            "data": {"name": "plugin:my_dataset", "args": {"images": 200}, "select": 0.2, "calibration": 20},
            "budget": {"macs": "60%"},
            "search": {"trials": 1, "promote": 1},
            **changes,
        }
    )


def test_a_whole_run_on_a_data_set_and_a_model_of_plugins(tmp_path):
    config = plugin_config(tmp_path)
    plugins = Plugins.load(config.plugins, entry_points=False)
    assert preview(config, plugins)["model"] == "plugin:my_family"
    run = search(config, out=tmp_path / "run", plugins=plugins)
    assert {r.state for r in run.rows} == {"ok"}, [r.error for r in run.rows]
    row = next(r for r in run.rows if r.origin == "search" and r.rung == "train")
    for kind in ("dataset", "family"):
        file = tmp_path / f"my_{kind}.py"
        assert row.identities[kind]["plugin"] == f"my_{kind}"
        assert row.identities[kind]["sha256"] == next(
            r.sha256 for r in plugins.records if r.origin == str(file)
        )
    model = load_model(run.path / "trials" / str(row.id))
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 2)
    assert reproduce(run.path, row.id)["equal"]
    file = tmp_path / "my_dataset.py"
    file.write_text(file.read_text().replace("+= 120", "+= 90"))
    with pytest.raises(RunError, match="dataset 'my_dataset' of plugin 'my_dataset' has changed"):
        reproduce(run.path, row.id)


def test_what_a_plugin_brings_is_bound_and_dumped_by_name(tmp_path):
    config = plugin_config(tmp_path)
    plugins = Plugins.load(config.plugins, entry_points=False)
    bound = bind(config, plugins)
    assert dump_config(bound) == dump_config(config)
    splits = load_data(bound.data)
    assert (len(splits.train) + len(splits.select), len(splits.test), splits.classes) == (150, 50, 2)
    model = build_model(bound.model, classes=2, channels=1)
    assert model.embed_dim == 16
    shown = inspect_model("plugin:my_family", ["depth=3"], plugins)
    assert (shown["supported"], list(shown["shape"]["image_size"])) == (True, [8, 8])
    assert len(shown["shape"]["blocks"]) == 3


def test_names_and_arguments_that_do_not_fit(tmp_path):
    config = plugin_config(tmp_path)
    plugins = Plugins.load(config.plugins, entry_points=False)
    none = Plugins.load(entry_points=False)
    with pytest.raises(PluginError, match="unknown dataset 'my_dataset'"):
        bind(config, none)
    wrong = config.model_copy(update={"model": ModelConfig(name="plugin:my_family", args={"widht": 3})})
    with pytest.raises(PluginError, match="family 'my_family' has no parameter 'widht'"):
        bind(wrong, plugins)
    with pytest.raises(ConfigError, match=r"data\.args are for data sets of plugins"):
        bind(tiny_config(data={"args": {"images": 3}}), plugins)
    with pytest.raises(DataError, match="the plugin that brings it is not loaded here"):
        load_data(DataConfig(name="plugin:my_dataset"))
    with pytest.raises(ModelError, match="the plugin that brings it is not loaded here"):
        build_model(ModelConfig(name="plugin:my_family"), classes=2, channels=1)


IMAGES, LABELS = torch.randint(0, 255, (9, 1, 8, 8), dtype=torch.uint8), torch.arange(9) % 3


class Given(Dataset):
    def __init__(self, *found):
        self.found = found

    def load(self):
        return ImageData(*self.found)


class Shuffled(Given):
    def load(self):
        order = torch.randperm(len(IMAGES))
        return ImageData(IMAGES[order], LABELS[order], 255 - IMAGES, LABELS, 3)


class Vit(Family):
    def build(self, *, classes, channels, pretrained):
        return VisionTransformer(
            img_size=8,
            patch_size=2,
            embed_dim=16,
            depth=2,
            num_heads=2,
            num_classes=classes,
            in_chans=channels,
        )


class Fixed(Vit):
    def build(self, *, classes, channels, pretrained):
        return super().build(classes=10, channels=channels, pretrained=pretrained)


class Foreign(Family):
    def build(self, *, classes, channels, pretrained):
        return torch.nn.Linear(channels, classes)


class OnCpu(Vit):
    def build(self, *, classes, channels, pretrained):
        with torch.device("cpu"):
            return super().build(classes=classes, channels=channels, pretrained=pretrained)


class Extra(Vit):
    def build(self, **options):
        model = super().build(**options)
        model.extra = torch.nn.Linear(4, 4)
        return model


@pytest.mark.parametrize(
    ("component", "check", "problem"),
    [
        (Given(IMAGES.float(), LABELS, IMAGES, LABELS, 3), "shape", "float32 (9, 1, 8, 8), expected uint8"),
        (
            Given(IMAGES, LABELS[:5], IMAGES, LABELS, 3),
            "shape",
            "number 9, their labels are torch.int64 (5,)",
        ),
        (Given(IMAGES, LABELS, IMAGES, LABELS, 2), "shape", "do not lie in 0 to 1"),
        (Given(IMAGES, LABELS, IMAGES[:1], LABELS[:1], 3), "test", "1 test images are among"),
        (Shuffled(), "determinism", "train_images_BCHW differs between two calls"),
        (Foreign(), "readable", "cannot be compressed"),
        (Fixed(), "readable", "10 classes and 3 channels, 7 and 3 were asked for"),
        (OnCpu(), "meta", "made on cpu"),
        (Extra(), "cost", "torch counts"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_the_contract_of_data_sets_and_models(component, check, problem):
    (found,) = run_checks(component, [c for c in checks_for(component) if c.name == check])
    assert not found.passed
    assert problem in found.problem
    good = Given(IMAGES, LABELS, 255 - IMAGES, LABELS, 3) if isinstance(component, Dataset) else Vit()
    (found,) = run_checks(good, [c for c in checks_for(good) if c.name == check])
    assert found.passed, str(found)
