"""Export every trained model that the shipped results hold, and compare logits with the trial's model.

    python benchmarks/exports.py --out results/exports.json

ONNX and torch.export on random images in batches of 1, 2 and 5; torch.compile as one graph (fullgraph,
backend aot_eager). Peers' plugins are taken from `plugins/`. Exit code 1 if a model does not export, its
logits differ by more than 1e-4, or its graph breaks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ucc_search.artifacts import find_artifact
from ucc_search.export import TOLERANCE, export_model
from ucc_search.plugins import Plugins
from ucc_search.runs import load_run
from ucc_search.saving import WEIGHTS, load_model

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("onnx", "torch-export")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path, help="trials' folders; by default all with weights")
    parser.add_argument("--out", type=Path, help="JSON file for what was found")
    arguments = parser.parse_args()
    plugins = Plugins.load(peers(), entry_points=False)
    found = [check(folder, plugins) for folder in arguments.models or shipped()]
    text = json.dumps(summary(found), indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(0 if all(holds(f) for f in found) else 1)


def shipped() -> list[Path]:
    """Folders of the trials whose weights are in `results/`."""
    folders = [path.parent for path in (ROOT / "results").glob(f"*/trials/*/{WEIGHTS}")]
    return sorted(folders, key=lambda folder: (folder.parts[-3], int(folder.name)))


def peers() -> list[str]:
    """The plugins of this repository: a file or a package each."""
    return [str(p) for p in sorted((ROOT / "plugins").glob("*/ucc_plugin_*"))]


def check(folder: Path, plugins: Plugins) -> dict[str, Any]:
    """How far the exports of one trial's model are from it; an error in place of a number where one fails."""
    folder = folder.resolve()
    run, trial = folder.parent.parent, int(folder.name)
    front = {int(i) for i in load_run(run).pareto()["trials"].explode()}
    found: dict[str, Any] = {"run": run.name, "trial": trial, "on_front": trial in front}
    start = time.perf_counter()
    artifact = find_artifact(folder)
    for kind in FORMATS:
        with tempfile.TemporaryDirectory() as out:
            try:
                found[kind] = export_model(artifact, kind, Path(out) / kind, plugins=plugins).difference
            except Exception as error:
                found[kind] = f"{type(error).__name__}: {error}"
    try:
        found["compile"] = compiled_difference(folder, plugins)
    except Exception as error:
        found["compile"] = f"{type(error).__name__}: {error}"
    print(json.dumps(found), f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def compiled_difference(folder: Path, plugins: Plugins) -> float:
    """Largest difference of a logit after torch.compile, which raises where the graph breaks."""
    model = load_model(folder, plugins=plugins)
    images_BCHW = torch.randn(
        2, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0)
    )
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        return float((compiled(images_BCHW) - model(images_BCHW)).abs().max())


def holds(found: dict[str, Any]) -> bool:
    return all(isinstance(found[k], float) and found[k] <= TOLERANCE for k in (*FORMATS, "compile"))


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "models": len(found),
        "on_front": sum(f["on_front"] for f in found),
        "hold": sum(map(holds, found)),
        "largest_difference": {
            kind: max((f[kind] for f in found if isinstance(f[kind], float)), default=None)
            for kind in (*FORMATS, "compile")
        },
        "by_model": found,
    }


if __name__ == "__main__":
    main()
