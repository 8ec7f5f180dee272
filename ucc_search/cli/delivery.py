"""Commands that bring a trained model elsewhere, or time it: export, push, bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ucc_search.cli.app import app
from ucc_search.cli.options import Json, PluginOption, Source, Trial, load_plugins


@app.command()
def export(
    source: Source,
    out: Annotated[Path, typer.Option(help="A new folder: the model and its card are written there.")],
    trial: Trial = None,
    format: Annotated[
        str, typer.Option(help="safetensors, onnx, torch-export or timm (widths only).")
    ] = "safetensors",
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Write a trained model for others to run, checked against the trial's model, with a model card."""
    from ucc_search.artifacts import find_artifact

    artifact = find_artifact(source, trial)
    from ucc_search.export import export_model

    plugins = load_plugins(None, plugin, None) if plugin else None
    done = export_model(artifact, format, out, plugins=plugins)
    opset = f", opset {done.opset}" if done.opset else ""
    text = (
        f"{done.folder}: {', '.join(done.files)}\n"
        f"{done.format}{opset}: logits differ by at most {done.difference:.1e} ({done.images} images in batches of 1, 2 and 5)"
    )
    typer.echo(json.dumps(done.to_dict(), indent=1) if as_json else text)


@app.command()
def push(
    source: Source,
    repo_id: Annotated[str, typer.Option(help="user/name on the Hugging Face Hub.")],
    trial: Trial = None,
    private: Annotated[bool, typer.Option("--private", help="Only you can see it.")] = False,
    plugin: PluginOption = None,
) -> None:
    """Upload a trained model, with its card, to the Hugging Face Hub."""
    from ucc_search.artifacts import find_artifact

    artifact = find_artifact(source, trial)
    from ucc_search.hub import push as push_model

    plugins = load_plugins(None, plugin, None) if plugin else None
    address = push_model(artifact, repo_id, private=private, plugins=plugins)
    typer.echo(f"{address}\nload it with ucc_search.load_model({repo_id!r})")


@app.command()
def bench(
    source: Source,
    trial: Trial = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images at a time; repeatable.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch and onnxruntime.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Also with torch.compile.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also in onnxruntime.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="At most, per batch size and runtime.")] = 30,
    seconds: Annotated[float, typer.Option(min=0.0, help="At most, per batch size and runtime.")] = 20.0,
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Latency and throughput beside the uncompressed model, and where the time went."""
    from ucc_search.artifacts import find_artifact

    artifact = find_artifact(source, trial)
    from ucc_search.bench import bench as run_bench
    from ucc_search.bench import bench_text

    found = run_bench(
        artifact,
        batches=batch or (1, 32),
        threads=threads,
        device=device,
        compiled=compiled,
        onnx=onnx,
        rounds=rounds,
        seconds=seconds,
        plugins=load_plugins(None, plugin, None) if plugin else None,
    )
    typer.echo(json.dumps(found, indent=1) if as_json else bench_text(found))
