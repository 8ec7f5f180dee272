"""Measure a compressed model beside the uncompressed one: latency, throughput, and where the time went."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ucc_search.artifacts import Artifact
from ucc_search.binding import PREFIX, bind_model
from ucc_search.compression.blocks import CompressedBlock
from ucc_search.config import ModelConfig
from ucc_search.costs import cost
from ucc_search.errors import ModelError
from ucc_search.models import build_model
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import Plugins
from ucc_search.saving import load_model
from ucc_search.timing import Spread, Timings, interleave

GROUPS = ("matmul", "attention", "norm", "scoring", "gather and merge", "other")
_SCORING, _MERGING = "ucc-search: scoring", "ucc-search: merging"
_MATMUL = ("addmm", "aten::mm", "linear", "convolution", "conv2d")
_ATTENTION = ("scaled_dot_product", "flash_attention", "bmm", "baddbmm", "softmax")

Run = Callable[[Tensor], Any]


def bench(
    artifact: Artifact,
    *,
    batches: Sequence[int] = (1, 32),
    threads: int | None = None,
    device: str = "cpu",
    compiled: bool = False,
    onnx: bool = False,
    rounds: int = 30,
    seconds: float = 20.0,
    plugins: Plugins | None = None,
) -> dict[str, Any]:
    """Time both models in interleaved rounds; JSON-able.

    Args:
        batches: images at a time.
        threads: of torch and onnxruntime; torch's own choice by default.
        compiled: also with torch.compile.
        onnx: also in onnxruntime (on a CPU).
        rounds: of each batch size and runtime, at most.
        seconds: start no further round of a batch size and runtime after this long.

    Returns:
        `device`, `threads`, `torch`, `dense` and `compressed` (`macs`, `params`), `mac_ratio`,
        `measured`: for each batch and runtime `batch`, `runtime`, `rounds`, `dense_ms` and `compressed_ms`
        (of a batch), `dense_images_per_second`, `compressed_images_per_second`, `speedup`, each with
        `median`, `low` and `high` (quartiles), and `became_time`, the share of the MAC cut that became time;
        `profile`: for each batch the milliseconds by group of operations in both models, what the MAC ratio
        alone would leave (`expected_ms`), and the rest (`beyond_ms`).
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device != "cpu" and not torch.cuda.is_available():
        raise ModelError(f"--device {device}: torch sees no GPU here; use cpu")
    compressed = load_model(artifact.folder, plugins=plugins).to(device)
    dense = _dense(artifact, plugins).to(device)
    plan = artifact.plan
    whole = cost(CompressionPlan.identity(plan.shape))
    parts = _macs(artifact, plan, compressed)
    found: dict[str, Any] = {
        "model": artifact.name,
        "device": torch.cuda.get_device_name()
        if device != "cpu"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dense": {"macs": whole.macs, "params": whole.params},
        "compressed": {"macs": parts, "params": sum(p.numel() for p in compressed.parameters())},
        "mac_ratio": whole.macs / parts,
        "measured": [],
        "profile": [],
    }
    sync = torch.cuda.synchronize if device != "cpu" else None
    models = {"dense": dense, "compressed": compressed}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for runtime, runs in _runtimes(models, artifact, Path(folder), compiled, onnx):
            for batch in batches:
                images = torch.randn(batch, plan.shape.channels, *plan.shape.image_size, device=device)
                calls = {name: functools.partial(run, images) for name, run in runs.items()}
                timings = interleave(calls, rounds=rounds, min_seconds=0.01, max_seconds=seconds, sync=sync)
                found["measured"].append(_measured(timings, batch, runtime, found["mac_ratio"]))
        for batch in batches:
            images = torch.randn(batch, plan.shape.channels, *plan.shape.image_size, device=device)
            found["profile"].append({"batch": batch, "groups": _profiles(models, images, found["mac_ratio"])})
    return found


def _dense(artifact: Artifact, plugins: Plugins | None) -> nn.Module:
    """The uncompressed model; speed does not depend on its weights."""
    named, shape = artifact.arch["model"], artifact.plan.shape
    known = plugins or Plugins.load(
        artifact.arch.get("plugins", ()) if named["name"].startswith(PREFIX) else ()
    )
    config = bind_model(ModelConfig(name=named["name"], args=named["args"]), known)
    return build_model(config, classes=shape.classes, channels=shape.channels).eval()


def _macs(artifact: Artifact, plan: CompressionPlan, model: nn.Module) -> int:
    """Those of the plan with the components that the model runs."""
    parts = next((b.components for b in model.modules() if isinstance(b, CompressedBlock)), None)
    return cost(plan, parts).macs


def _runtimes(
    models: Mapping[str, nn.Module], artifact: Artifact, folder: Path, compiled: bool, onnx: bool
) -> Iterator[tuple[str, dict[str, Run]]]:
    yield "eager", dict(models)
    if compiled:
        torch._dynamo.reset()
        yield "torch.compile", {name: torch.compile(model) for name, model in models.items()}
    if onnx:
        yield "onnxruntime", {n: _session(m, artifact, folder / f"{n}.onnx") for n, m in models.items()}


def _session(model: nn.Module, artifact: Artifact, path: Path) -> Run:
    from ucc_search.export import onnx_session

    session = onnx_session(model, artifact.plan.shape, path, threads=torch.get_num_threads())
    return lambda images: session.run(None, {"images": images.cpu().numpy()})


def _measured(timings: Timings, batch: int, runtime: str, mac_ratio: float) -> dict[str, Any]:
    speedup = timings.speedup("compressed", "dense")
    result: dict[str, Any] = {"batch": batch, "runtime": runtime, "rounds": timings.rounds}
    for name in ("dense", "compressed"):
        took = timings.of(name)
        result[f"{name}_ms"] = _scaled(took, 1e3)
        rates = Spread(*(batch / s for s in (took.median, took.high, took.low)))
        result[f"{name}_images_per_second"] = rates._asdict()
    cut = 1 - 1 / mac_ratio
    became = (1 - 1 / speedup.median) / cut if cut > 0 else None
    return {**result, "speedup": speedup._asdict(), "became_time": became}


def _scaled(value: Spread, factor: float) -> dict[str, float]:
    return Spread(*(v * factor for v in value))._asdict()


def _profiles(models: Mapping[str, nn.Module], images: Tensor, mac_ratio: float) -> list[dict[str, Any]]:
    """Milliseconds by group in both, and what is beyond the dense model's time at the MAC ratio."""
    by_group = {name: profile_groups(model, images) for name, model in models.items()}
    rows = []
    for group in GROUPS:
        dense, compressed = (by_group[n].get(group, 0.0) for n in ("dense", "compressed"))
        expected = dense / mac_ratio
        times = {"dense_ms": dense, "compressed_ms": compressed, "expected_ms": expected}
        rows.append({"group": group, **times, "beyond_ms": compressed - expected})
    return rows


def profile_groups(model: nn.Module, images: Tensor, calls: int = 3) -> dict[str, float]:
    """Milliseconds that one forward pass spends in each of GROUPS, from torch.profiler.

    What a scorer or an aggregator does is theirs, whatever the operation; the attention map that some
    scorers need is part of attention.
    """
    # Its marks and its word that there is no GPU would go to the terminal.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if images.is_cuda else [])
    model(images)
    with _marked(model), profile(activities=activities) as profiled:
        for _ in range(calls):
            model(images)
    spent: dict[str, float] = defaultdict(float)
    for event in profiled.events():
        took = event.self_device_time_total if images.is_cuda else event.self_cpu_time_total
        spent[_group(event)] += took / 1e3 / calls
    return dict(spent)


def _group(event: Any) -> str:
    above = event
    while above is not None:
        if above.name == _SCORING:
            return "scoring"
        if above.name == _MERGING:
            return "gather and merge"
        above = above.cpu_parent
    if "layer_norm" in event.name:
        return "norm"
    if any(part in event.name for part in _ATTENTION):
        return "attention"
    return "matmul" if any(part in event.name for part in _MATMUL) else "other"


@contextlib.contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Name in a profile what scorers and aggregators do; undone afterwards."""
    blocks = [b for b in model.modules() if isinstance(b, CompressedBlock)]

    def named(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with torch.profiler.record_function(label):
                return function(*args)

        return call

    for block in blocks:
        block.__dict__["_reduce"] = named(_MERGING, block._reduce)
        block.__dict__["_score"] = named(_SCORING, block._score)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["_reduce"], block.__dict__["_score"]


def bench_text(found: Mapping[str, Any]) -> str:
    """The measurements in words and two tables."""
    dense, small = found["dense"], found["compressed"]
    lines = [
        f"{found['model']}: {small['macs'] / 1e9:.3f} of {dense['macs'] / 1e9:.3f} GMACs, a ratio of {found['mac_ratio']:.2f}",
        f"{found['device']}, {found['threads']} threads, torch {found['torch']}, random images, interleaved rounds",
        "",
        f"{'runtime':14}{'batch':>6}{'rounds':>7}  {'dense ms':>24}  {'compressed ms':>24}  {'images/s':>15}  {'speed-up':>20}  of the MAC cut",
    ]
    for m in found["measured"]:
        rates = f"{m['dense_images_per_second']['median']:.0f} -> {m['compressed_images_per_second']['median']:.0f}"
        became = (
            "nothing was cut" if m["became_time"] is None else f"{100 * m['became_time']:.0f} % became time"
        )
        if m["speedup"]["median"] < 1:
            became = "none became time: it is slower"
        lines.append(
            f"{m['runtime']:14}{m['batch']:>6}{m['rounds']:>7}  {_spread(m['dense_ms']):>24}  {_spread(m['compressed_ms']):>24}"
            f"  {rates:>15}  {_spread(m['speedup']):>20}  {became}"
        )
    for profile in found["profile"]:
        lines += [
            "",
            f"Where the time went (profiled, ms per batch of {profile['batch']}):",
            f"{'':18}{'dense':>10}{'compressed':>12}{'at MAC ratio':>14}{'beyond':>10}",
        ]
        for g in profile["groups"]:
            lines.append(
                f"{g['group']:18}{g['dense_ms']:>10.2f}{g['compressed_ms']:>12.2f}{g['expected_ms']:>14.2f}{g['beyond_ms']:>+10.2f}"
            )
    return "\n".join(lines)


def _spread(value: Mapping[str, float]) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"
