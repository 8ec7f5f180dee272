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
from ucc_search.errors import ModelError
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


def load_model(folder: str | Path, *, plugins: Plugins | None = None) -> nn.Module:
    """Rebuild a saved model, in eval mode. Runs no pickle; components of plugins need their plugin.

    `model.pretrained_cfg` says how images must be prepared: `input_size`, `mean` and `std`.

    Raises:
        ModelError: the folder holds no saved model, or one of another format.
    """
    folder = Path(folder)
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
    foreign = any(identities.get(k, {}).get("plugin") not in (None, BUILTIN) for k in INFERENCE_KINDS)
    foreign = foreign or config.name.startswith(PREFIX)
    known = plugins or Plugins.load(arch.get("plugins", ()) if foreign else ())
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
