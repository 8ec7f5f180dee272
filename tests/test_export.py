"""Delivery: every format is checked against the model it came from, and says so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from test_saving import REFS, TIMM, edit, plugins, saved

from ucc_search import export as exporting
from ucc_search.artifacts import find_artifact
from ucc_search.compression import compress, shape_of
from ucc_search.errors import ModelError, PlanError, UserError
from ucc_search.export import export_model
from ucc_search.interfaces import ComponentRef
from ucc_search.models import build_model
from ucc_search.plan import CompressionPlan
from ucc_search.saving import arch_of, load_model, save_model

RUN = Path(__file__).resolve().parent.parent / "results" / "digits-ucc"
JOINT = {"scorer": ComponentRef("joint"), "aggregator": ComponentRef("host")}


def test_onnx_runs_for_any_batch_and_agrees(tmp_path):
    model, images = saved(tmp_path / "model", **JOINT)
    done = export_model(find_artifact(tmp_path / "model"), "onnx", tmp_path / "out")
    assert done.files == ("README.md", "model.onnx")
    assert done.difference <= 1e-5
    assert done.opset == exporting.OPSET
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (logits,) = session.run(["logits"], {"images": images[:1].repeat(3, 1, 1, 1).numpy()})
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(logits), model(images[:1]).expand(3, -1), rtol=0, atol=1e-5
        )


@pytest.mark.slow
def test_torch_export_runs_without_the_package_and_agrees(tmp_path):
    model, images = saved(tmp_path / "model", **JOINT)
    done = export_model(find_artifact(tmp_path / "model"), "torch-export", tmp_path / "out")
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(images), rtol=0, atol=1e-5)
    assert done.difference <= 1e-5


def test_safetensors_is_the_same_model_with_a_card(tmp_path):
    model, images = saved(tmp_path / "model")
    done = export_model(find_artifact(tmp_path / "model"), "safetensors", tmp_path / "out")
    assert done.files == ("README.md", "arch.json", "model.safetensors")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(images), model(images))


def test_logits_that_differ_are_refused_and_nothing_is_left(tmp_path, monkeypatch):
    saved(tmp_path / "model")
    monkeypatch.setitem(
        exporting.WRITERS, "onnx", lambda model, *rest: (lambda x: model(x) + 2e-4, ["unused"])
    )
    with pytest.raises(ModelError, match=r"differ by 2\.\de-04"):
        export_model(find_artifact(tmp_path / "model"), "onnx", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def narrow(folder, **changes):
    """A DeiT-like timm model compressed without cutting tokens."""
    torch.manual_seed(0)
    dense = build_model(TIMM, classes=5, channels=3)
    plan = CompressionPlan.identity(shape_of(dense)).replace(**changes)
    model = compress(dense, plan, plugins().components(**REFS)).eval()
    save_model(model, folder, plan, arch_of(TIMM, REFS, {}, (), {}))
    return model


def test_widths_alone_load_strictly_into_timm(tmp_path):
    # Narrower heads as well: their scale moves into the queries.
    widths = {"embed_dim": 18, "heads": [3] * 3, "qk_dim": [6] * 3, "v_dim": [6] * 3, "mlp_hidden": [30] * 3}
    model = narrow(tmp_path / "model", **widths, head_tokens_only=True)
    export_model(find_artifact(tmp_path / "model"), "timm", tmp_path / "out")
    named = json.loads((tmp_path / "out" / "timm.json").read_text())
    twin = timm.create_model(named["architecture"], **named["args"]).eval()
    twin.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), model(images), rtol=0, atol=1e-5)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
    exec(code.replace('"model.safetensors"', repr(str(tmp_path / "out" / "model.safetensors"))), {})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens_out": [16, 9, 9]}, "cuts tokens"),
        ({"mlp_hidden": [48, 96, 96]}, "blocks differ"),
        ({"qk_dim": [4] * 3}, "not the embedding's 24"),
        ({"mlp": [True, False, True]}, "lacks"),
        ({"mlp_rank": [4] * 3}, "factorised"),
    ],
)
def test_what_timm_cannot_express_is_refused_with_the_reason(tmp_path, changes, reason):
    narrow(tmp_path / "model", **changes)
    with pytest.raises(PlanError, match=reason):
        export_model(find_artifact(tmp_path / "model"), "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_of_a_trial_says_budget_accuracy_recipe_and_provenance(tmp_path):
    artifact = find_artifact(RUN, 45)
    export_model(artifact, "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "ucc-search"
    row = artifact.row
    for part in (row.target, f"{100 * row.accuracy:.2f} %", f"{100 * row.test_accuracy:.2f} %", row.plan_key):
        assert part in card
    assert "optimizer" in card
    assert json.loads((RUN / "environment.json").read_text())["commit"] in card
    assert find_artifact(RUN / "trials" / "45").row == row  # a trial's own folder knows as much


def test_a_model_of_a_plugin_says_which_plugin_it_needs(tmp_path):
    saved(tmp_path)
    known = {"component": "gone", "plugin": "my_plugin", "version": None, "sha256": "0"}

    def foreign(arch):
        arch["components"]["scorer"] = {"name": "gone"}
        arch["identities"]["scorer"] = known

    edit(tmp_path, foreign)
    with pytest.raises(ModelError, match=r"needs the plugin 'my_plugin' \(scorer 'gone'\)"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("source", "trial", "message"),
    [
        (RUN, None, r"choose one of its models with --trial ID; .*45"),
        (RUN, 9999, "no trial 9999"),
        (RUN, 0, "no saved model"),
        (RUN.parent, None, "no arch.json"),
        (RUN / "trials" / "45", 45, "no run folder"),
    ],
)
def test_a_wrong_source_is_named(source, trial, message):
    with pytest.raises(UserError, match=message):
        find_artifact(source, trial)


def test_a_taken_folder_and_a_file_name_are_refused(tmp_path):
    saved(tmp_path / "model")
    artifact = find_artifact(tmp_path / "model")
    with pytest.raises(ModelError, match="not empty"):
        export_model(artifact, "safetensors", tmp_path / "model")
    with pytest.raises(ModelError, match="expected a folder"):
        export_model(artifact, "onnx", tmp_path / "x.onnx")
    with pytest.raises(ModelError, match="expected safetensors"):
        export_model(artifact, "tflite", tmp_path / "x")


@pytest.mark.parametrize(
    "aggregator", ["host", *(pytest.param(a, marks=pytest.mark.slow) for a in ("fuse", "bipartite"))]
)
def test_compiling_breaks_the_graph_nowhere(tmp_path, aggregator):
    scorer = "joint" if aggregator == "host" else "class_attention"
    refs = {"scorer": ComponentRef(scorer), "aggregator": ComponentRef(aggregator)}
    model, images = saved(tmp_path, **refs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_commands_of_the_page_on_delivery_run(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from ucc_search.cli import app

    root = Path(__file__).resolve().parent.parent
    monkeypatch.chdir(root)
    page = (root / "docs" / "delivery.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\$ ucc-search (.*)$", page, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        done = CliRunner().invoke(app, line.replace("EXPORTED", str(tmp_path)).split())
        assert done.exit_code == 0, (line, done.output, done.exception)


SHIPPED = sorted(path.parent for path in RUN.parent.glob("*/trials/*/model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: f"{path.parts[-3]}-{path.name}")
def test_every_shipped_model_exports_and_compiles_as_one_graph(folder):
    """Whatever runs and trials are added to the results; seconds of computing each, most of it torch's."""
    script = RUN.parent.parent / "benchmarks" / "exports.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(done.stdout)["by_model"]
    assert all(found[kind] <= 1e-4 for kind in ("onnx", "torch-export", "compile"))
