from __future__ import annotations

import functools
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ucc_search.compression import compress, shape_of
from ucc_search.config import ModelConfig
from ucc_search.errors import ModelError, UserError
from ucc_search.interfaces import ComponentRef
from ucc_search.models import build_model
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import Plugins
from ucc_search.saving import ARCH, WEIGHTS, arch_of, load_model, save_model

SMALL = ModelConfig(
    name="small_vit",
    args={
        "img_size": 8,
        "stem_channels": [8],
        "stem_strides": [2],
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 3,
    },
)
TIMM = ModelConfig(
    name="vit_tiny_patch16_224", args={"img_size": 64, "depth": 3, "embed_dim": 24, "num_heads": 3}
)
REFS = {
    "scorer": ComponentRef("random", {"seed": 3}),
    "aggregator": ComponentRef("host", {"weighting": "similarity"}),
    "cascade": ComponentRef("per_block", {"gamma": 0.5}),
}


@functools.cache
def plugins():
    return Plugins.load((), environment=False)


def saved(folder, config=SMALL, **changes):
    """A compressed model with random weights, written to `folder`, and images for it."""
    torch.manual_seed(0)
    channels = 1 if config is SMALL else 3
    dense = build_model(config, classes=5, channels=channels)
    plan = CompressionPlan.identity(shape_of(dense)).replace(tokens_out=[16, 9, 9], head_tokens_only=True)
    refs = {**REFS, **changes}
    model = compress(dense, plan, plugins().components(**refs)).eval()
    identities = {kind: plugins().identity(kind, ref.name) for kind, ref in refs.items()}
    save_model(model, folder, plan, arch_of(config, refs, identities, (), {"mean": (0.5,), "std": (0.25,)}))
    size = shape_of(dense).image_size
    return model, torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [SMALL, TIMM], ids=lambda c: c.name)
def test_a_saved_model_gives_the_same_logits(tmp_path, config):
    model, images = saved(tmp_path, config)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(images), model(images))
    assert not load_model(tmp_path).training


FRESH = """
import sys
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
from ucc_search.saving import load_model
with torch.no_grad():
    save_file({"logits": load_model(sys.argv[1])(load_file(sys.argv[2])["images"])}, sys.argv[3])
"""


def test_a_fresh_process_gives_the_same_logits(tmp_path):
    model, images = saved(tmp_path / "model")
    given, found = tmp_path / "images.safetensors", tmp_path / "logits.safetensors"
    save_file({"images": images}, given)
    arguments = [sys.executable, "-c", FRESH, str(tmp_path / "model"), str(given), str(found)]
    subprocess.run(
        arguments, check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120
    )
    with torch.no_grad():
        torch.testing.assert_close(load_file(found)["logits"], model(images), rtol=0, atol=1e-6)


def test_the_folder_holds_weights_and_a_text_and_nothing_to_unpickle(tmp_path, monkeypatch):
    saved(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {ARCH, WEIGHTS}

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load_model(tmp_path)


def test_components_come_back_with_their_parameters(tmp_path):
    saved(tmp_path)
    parts = load_model(tmp_path).blocks[1].components
    assert (parts.scorer.seed, parts.aggregator.weighting, parts.cascade.gamma) == (3, "similarity", 0.5)


def test_built_in_components_load_where_the_runs_plugins_are_gone(tmp_path):
    model, images = saved(tmp_path)
    edit(tmp_path, lambda arch: arch.update(plugins=["/nowhere/plugin.py"]))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(images), model(images))


def edit(folder, change):
    arch = json.loads((folder / ARCH).read_text())
    change(arch)
    (folder / ARCH).write_text(json.dumps(arch))


def test_a_folder_without_a_model_says_which_folder_to_give(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError, match=r"no arch\.json; give the folder of a trained trial"):
            load_model(folder)


WEIGHT_DAMAGE = {
    "cut off": lambda p: p.write_bytes(p.read_bytes()[:-100]),
    "empty": lambda p: p.write_bytes(b""),
    "no safetensors": lambda p: p.write_bytes(pickle.dumps({"a": 1})),
    "gone": lambda p: p.unlink(),
    "a key too few": lambda p: save_file({k: v for k, v in load_file(p).items() if k != "norm.bias"}, p),
    "another shape": lambda p: save_file(
        {k: v[:3] if k == "norm.bias" else v for k, v in load_file(p).items()}, p
    ),
}


@pytest.mark.parametrize("damage", WEIGHT_DAMAGE)
def test_damaged_weights_are_a_users_error(tmp_path, damage):
    saved(tmp_path)
    WEIGHT_DAMAGE[damage](tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=r"model\.safetensors|norm\.bias"):
        load_model(tmp_path)


ARCH_DAMAGE = {
    "no JSON": lambda p: p.write_text("{"),
    "not a mapping": lambda p: p.write_text("[]"),
    "another format": lambda p: edit(p.parent, lambda a: a.update(format=99)),
    "no plan": lambda p: edit(p.parent, lambda a: a.pop("plan")),
    "no model": lambda p: edit(p.parent, lambda a: a.pop("model")),
    "no components": lambda p: edit(p.parent, lambda a: a.pop("components")),
    "a component too few": lambda p: edit(p.parent, lambda a: a["components"].pop("scorer")),
    "another plan format": lambda p: edit(p.parent, lambda a: a["plan"].update(format=0)),
    "an impossible plan": lambda p: edit(p.parent, lambda a: a["plan"]["blocks"][0].update(tokens_out=99)),
    "another model": lambda p: edit(p.parent, lambda a: a["model"]["args"].update(embed_dim=48)),
    "unknown scorer": lambda p: edit(p.parent, lambda a: a["components"]["scorer"].update(name="absent")),
    "bytes": lambda p: p.write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", ARCH_DAMAGE)
def test_a_damaged_description_is_a_users_error(tmp_path, damage):
    saved(tmp_path)
    ARCH_DAMAGE[damage](tmp_path / ARCH)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert str(caught.value)
