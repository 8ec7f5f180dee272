"""Write a model in a form that others run: safetensors, ONNX, torch.export or a timm state dict, each checked."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ucc_search.artifacts import Artifact
from ucc_search.errors import ModelError
from ucc_search.model_card import model_card
from ucc_search.plan import ModelShape
from ucc_search.plugins import Plugins
from ucc_search.saving import WEIGHTS, load_model, save_model
from ucc_search.timm_weights import timm_model

TOLERANCE = 1e-4
"""Largest difference of a logit that an export may show."""
OPSET = 18
BATCHES = (1, 2, 5)
"""Numbers of images that every export is checked with: traces are made with 2."""
CARD = "README.md"

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and how far its logits are from the trial's model."""

    format: str
    folder: str
    files: tuple[str, ...]
    difference: float  # largest absolute difference of a logit
    images: int  # that were compared, in batches of 1, 2 and 5
    opset: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_model(artifact: Artifact, format: str, out: Path, *, plugins: Plugins | None = None) -> Exported:
    """Write `artifact` into the new folder `out`, with a model card, after comparing logits.

    Args:
        format: safetensors, onnx, torch-export or timm.
        plugins: loaded plugins; by default those the model names.

    Raises:
        ModelError: unknown format, a folder that is taken, a missing package, a plan that the format cannot
            hold, or logits that differ by more than TOLERANCE (then nothing is left).
    """
    if format not in WRITERS:
        raise ModelError(f"format {format!r}: expected {', '.join(WRITERS)}")
    if out.suffix in (".onnx", ".pt2", ".safetensors"):
        raise ModelError(f"--out {out}: expected a folder, in which the model and its card are written")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"--out {out}: exists and is not empty; give a new folder")
    model = load_model(artifact.folder, plugins=plugins)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        run, usage = WRITERS[format](model, artifact, work, plugins)
        difference, images = _difference(model, run, artifact)
        if not difference <= TOLERANCE:
            raise ModelError(
                f"{format}: logits differ by {difference:.1e} from the trial's model, more than {TOLERANCE:.0e}; "
                "nothing was written"
            )
        opset = OPSET if format == "onnx" else None
        check = f"{format}: logits differ by at most {difference:.1e} from the trial's model ({images} random images)"
        extra = [f"ONNX opset {OPSET}, any batch size"] if opset else []
        (work / CARD).write_text(model_card(artifact, usage, [check, *extra]), encoding="utf-8")
        if out.exists():
            out.rmdir()
        work.chmod(0o755)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    files = tuple(sorted(p.name for p in out.iterdir()))
    return Exported(format, str(out), files, difference, images, opset)


def _difference(model: nn.Module, run: Run, artifact: Artifact) -> tuple[float, int]:
    """(largest difference of a logit, images compared)."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch in BATCHES:
        images_BCHW = torch.randn(batch, *_size(artifact), generator=generator)
        with torch.no_grad():
            wanted = model(images_BCHW)
            found = run(images_BCHW)
        if found.shape != wanted.shape or not bool(found.isfinite().all()):
            raise ModelError(f"the exported model gave {tuple(found.shape)} logits that cannot be compared")
        worst = max(worst, float((found - wanted).abs().max()))
    return worst, sum(BATCHES)


def _size(artifact: Artifact) -> tuple[int, int, int]:
    shape = artifact.plan.shape
    return (shape.channels, *shape.image_size)


def _safetensors(
    model: nn.Module, artifact: Artifact, out: Path, plugins: Plugins | None
) -> tuple[Run, list[str]]:
    arch = {k: v for k, v in artifact.arch.items() if k != "plan"}
    save_model(model, out, artifact.plan, arch)
    usage = [
        "import ucc_search",
        "",
        'model = ucc_search.load_model("PATH_OR_HUB_ID")',
        "logits = model(images)",
    ]
    return load_model(out, plugins=plugins), usage


def _onnx(model: nn.Module, artifact: Artifact, out: Path, plugins: Plugins | None) -> tuple[Run, list[str]]:
    session = onnx_session(model, artifact.plan.shape, out / "model.onnx")
    usage = [
        "import onnxruntime",
        "",
        'session = onnxruntime.InferenceSession("model.onnx")',
        '(logits,) = session.run(["logits"], {"images": images})  # float32, any batch size',
    ]
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]), usage


def onnx_session(model: nn.Module, shape: ModelShape, path: Path, threads: int = 0) -> Any:
    """Write `model` as ONNX for any batch size, and open it in onnxruntime (0 threads: its own choice).

    Raises:
        ModelError: a package of the extra `onnx` is missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ModelError(f"ONNX needs {error.name}: pip install 'ucc-search[onnx]'") from None
    torch.onnx.export(
        model,
        (torch.randn(2, shape.channels, *shape.image_size),),
        path,
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
        external_data=False,
        verbose=False,
        custom_translation_table={torch.ops.aten.sort.stable: _sorted},
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _sorted(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Stable sorting in ONNX, which torch's exporter lacks: TopK of everything puts the first of equals first."""
    from onnxscript import opset18 as op

    count = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(values, count, axis=dim, largest=int(descending), sorted=1)


def _torch_export(
    model: nn.Module, artifact: Artifact, out: Path, plugins: Plugins | None
) -> tuple[Run, list[str]]:
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    program = torch.export.export(model, (torch.randn(2, *_size(artifact)),), dynamic_shapes=shapes)
    path = out / "model.pt2"
    torch.export.save(program, path)
    usage = ["import torch", "", 'model = torch.export.load("model.pt2").module()', "logits = model(images)"]
    return torch.export.load(path).module(), usage


def _timm(model: nn.Module, artifact: Artifact, out: Path, plugins: Plugins | None) -> tuple[Run, list[str]]:
    from safetensors.torch import save_file

    twin, name, args = timm_model(model, artifact.plan, artifact.arch["model"])
    save_file(
        {k: v.contiguous() for k, v in twin.state_dict().items()}, out / WEIGHTS, metadata={"format": "pt"}
    )
    (out / "timm.json").write_text(
        json.dumps({"architecture": name, "args": args}, indent=1), encoding="utf-8"
    )
    given = ", ".join(f"{k}={v!r}" for k, v in args.items())
    usage = [
        "import timm",
        "from safetensors.torch import load_file",
        "",
        f'model = timm.create_model("{name}", {given})',
        'model.load_state_dict(load_file("model.safetensors"))',
    ]
    return twin, usage


WRITERS: dict[str, Callable[[nn.Module, Artifact, Path, Plugins | None], tuple[Run, list[str]]]] = {
    "safetensors": _safetensors,
    "onnx": _onnx,
    "torch-export": _torch_export,
    "timm": _timm,
}
