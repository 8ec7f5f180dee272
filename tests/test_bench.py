from __future__ import annotations

import json

import pytest
import torch
from test_saving import SMALL, saved
from typer.testing import CliRunner

from ucc_search.artifacts import find_artifact
from ucc_search.bench import GROUPS, bench, bench_text, profile_groups
from ucc_search.cli import app
from ucc_search.costs import cost
from ucc_search.errors import ModelError
from ucc_search.interfaces import ComponentRef
from ucc_search.models import build_model
from ucc_search.plan import CompressionPlan

JOINT = {"scorer": ComponentRef("joint"), "aggregator": ComponentRef("host")}


def measured(folder, **options):
    saved(folder, **JOINT)
    return bench(find_artifact(folder), batches=(1, 3), rounds=3, seconds=5.0, **options)


def test_both_models_are_measured_and_the_numbers_belong_together(tmp_path):
    found = measured(tmp_path)
    artifact = find_artifact(tmp_path)
    assert found["dense"]["macs"] == cost(CompressionPlan.identity(artifact.plan.shape)).macs
    assert found["mac_ratio"] == found["dense"]["macs"] / found["compressed"]["macs"] > 1
    assert [(m["batch"], m["runtime"]) for m in found["measured"]] == [(1, "eager"), (3, "eager")]
    for m in found["measured"]:
        rate = m["dense_images_per_second"]["median"]
        assert rate == pytest.approx(1e3 * m["batch"] / m["dense_ms"]["median"])
        cut = 1 - 1 / found["mac_ratio"]
        assert m["became_time"] == pytest.approx((1 - 1 / m["speedup"]["median"]) / cut)
    for profile in found["profile"]:
        assert [g["group"] for g in profile["groups"]] == list(GROUPS)
        for g in profile["groups"]:
            assert g["beyond_ms"] == pytest.approx(g["compressed_ms"] - g["dense_ms"] / found["mac_ratio"])
    json.dumps(found)
    text = bench_text(found)
    assert "of the MAC cut" in text
    assert "gather and merge" in text


def test_scoring_and_merging_have_their_own_lines_and_leave_no_trace(tmp_path):
    model, images = saved(tmp_path, **JOINT)
    with torch.inference_mode():
        spent = profile_groups(model, images)
        assert spent["scoring"] > 0
        assert spent["gather and merge"] > 0
        assert spent["attention"] > 0
        assert spent["matmul"] > 0
    assert not any("_reduce" in b.__dict__ or "_score" in b.__dict__ for b in model.modules())
    with torch.inference_mode():
        dense = profile_groups(build_model(SMALL, classes=5, channels=1).eval(), images)
    assert dense.get("scoring", 0.0) == dense.get("gather and merge", 0.0) == 0.0


def test_the_command_prints_json_and_words(tmp_path):
    saved(tmp_path, **JOINT)
    options = ["bench", str(tmp_path), "--batch", "2", "--rounds", "2", "--seconds", "1"]
    done = CliRunner().invoke(app, [*options, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["measured"][0]["batch"] == 2


def test_a_gpu_that_is_not_there_is_named(tmp_path):
    saved(tmp_path)
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(ModelError, match="sees no GPU"):
        bench(find_artifact(tmp_path), device="cuda")


@pytest.mark.slow
def test_onnxruntime_and_torch_compile_are_measured_too(tmp_path):
    found = measured(tmp_path, onnx=True, compiled=True)
    assert {m["runtime"] for m in found["measured"]} == {"eager", "torch.compile", "onnxruntime"}
