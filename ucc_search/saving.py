"""Save a compressed model as safetensors plus `arch.json`, and rebuild it without unpickling anything."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ucc_search.binding import PREFIX, bind_model
from ucc_search.compression import assemble
from ucc_search.compression.selection import first_units
from ucc_search.config import ModelConfig
from ucc_search.errors import ModelError, PluginError
from ucc_search.hub import fetch, is_hub_id
from ucc_search.interfaces import INFERENCE_KINDS, ComponentRef
from ucc_search.models import build_model, load_weights
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import BUILTIN, Plugins

ARCH = "arch.json"
WEIGHTS = "model.safetensors"
ARCH_FORMAT = 1


def arch_of(
    model: ModelConfig,
    components: Mapping[str, ComponentRef],
    identities: Mapping[str, Any],
    sources: Any,
    normalisation: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """What `arch.json` needs beside the plan: the dense model and the components, by name."""
    return {
        "format": ARCH_FORMAT,
        "model": {"name": model.name, "args": dict(model.args)},
        "components": {k: components[k].to_dict() for k in INFERENCE_KINDS},
        "identities": dict(identities),
        "plugins": list(sources),
        "normalisation": {k: list(v) for k, v in normalisation.items()},
    }


def save_model(model: nn.Module, folder: Path, plan: CompressionPlan, arch: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and `arch.json` into `folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / ARCH).write_text(json.dumps({**arch, "plan": plan.to_dict()}, indent=1), encoding="utf-8")
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def load_model(source: str | Path, *, plugins: Plugins | None = None) -> nn.Module:
    """Rebuild a saved model, in eval mode. Runs no pickle; components of plugins need their plugin.

    Args:
        source: the model's folder, or its id on the Hugging Face Hub: `user/name`, `user/name@revision`.

    `model.pretrained_cfg` says how images must be prepared: `input_size`, `mean` and `std`.

    Raises:
        ModelError: there is no saved model, one of another format, or one that needs a plugin.
    """
    folder = Path(source)
    if not folder.exists() and is_hub_id(str(source)):
        folder = fetch(str(source))
    path = folder / ARCH
    if not path.is_file():
        raise ModelError(
            f"{folder}: no {ARCH}; give the folder of a trained trial, for example RUN/trials/12"
        )
    try:
        arch = json.loads(path.read_text(encoding="utf-8"))
        if arch["format"] != ARCH_FORMAT:
            raise ModelError(f"{path}: format {arch['format']}, expected {ARCH_FORMAT}; upgrade ucc-search")
        plan = CompressionPlan.from_dict(arch["plan"])
        config = ModelConfig(name=arch["model"]["name"], args=arch["model"]["args"])
        refs = {kind: ComponentRef.from_dict(arch["components"][kind]) for kind in INFERENCE_KINDS}
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: not readable ({type(error).__name__}: {error})") from None
    # A model of built-in components must load where the run's local plugins do not exist.
    identities = arch.get("identities", {})
    owners = {k: identities.get(k, {}).get("plugin") for k in INFERENCE_KINDS}
    foreign = {k: str(name) for k, name in owners.items() if name not in (None, BUILTIN)}
    sources = arch.get("plugins", ()) if foreign or config.name.startswith(PREFIX) else ()
    known = plugins or _plugins_of(arch, sources, foreign, folder)
    _warn_of_changes(arch, known)
    config = bind_model(config, known)
    dense = build_model(config, classes=plan.shape.classes, channels=plan.shape.channels)
    # Any units of the right number: their weights come from the file.
    model = assemble(dense, plan, known.components(**refs), first_units(plan))
    load_weights(model, folder)
    # Where timm's own models keep how their images must be prepared.
    size = (plan.shape.channels, *plan.shape.image_size)
    known_so_far = dict(getattr(model, "pretrained_cfg", None) or {})
    model.pretrained_cfg = {**known_so_far, "input_size": size, **arch.get("normalisation", {})}
    return model.eval()


def _plugins_of(
    arch: Mapping[str, Any], sources: Sequence[str], foreign: Mapping[str, str], folder: Path
) -> Plugins:
    """What provides the model's components; `foreign` names the plugin of those that are not built in."""
    try:
        known = Plugins.load(sources)
        for kind in foreign:
            known.identity(kind, arch["components"][kind]["name"])
    except PluginError as error:
        named = arch["model"]["name"]
        needed = ", ".join(
            f"{name!r} ({kind} {arch['components'][kind]['name']!r})" for kind, name in foreign.items()
        )
        raise ModelError(
            f"{folder}: this model needs the plugin {needed or f'of {named}'}, which is not here; install it, or pass "
            f"plugins=Plugins.load(['path/to/plugin.py']) ({error})"
        ) from None
    return known


def _warn_of_changes(arch: Mapping[str, Any], plugins: Plugins) -> None:
    """A component whose source has changed since may compute something else with the same weights."""
    for kind, recorded in arch.get("identities", {}).items():
        if kind not in INFERENCE_KINDS or recorded.get("plugin") == BUILTIN:
            continue
        now = plugins.identity(kind, arch["components"][kind]["name"])
        if now["sha256"] != recorded.get("sha256"):
            warnings.warn(
                f"{kind} {recorded['component']!r} of plugin {recorded['plugin']!r} has changed since this model was "
                "saved; its outputs may differ",
                stacklevel=3,
            )
