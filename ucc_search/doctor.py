"""`ucc-search doctor`: what works on this machine, and what to do about what does not."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable

from ucc_search.errors import UserError

Check = dict[str, str]


def check_machine() -> list[Check]:
    """One entry per check: name, status (ok, note or failed) and a sentence."""
    checks = [_python(), *(_package(p) for p in ("timm", "optuna", "pluggy", "pandas"))]
    for name, probe in (("torch", _torch), ("deepspeed", _deepspeed), ("ray", _ray), ("data", _data)):
        checks.append(_guarded(name, probe))
    checks += [_compiler(), _cache(), *_plugins()]
    return checks


def doctor_text(checks: list[Check]) -> str:
    """The checks as lines."""
    return "\n".join(f"{c['status']:<7} {c['name']:<11} {c['detail']}" for c in checks)


def _entry(name: str, status: str, detail: str) -> Check:
    return {"name": name, "status": status, "detail": detail}


def _guarded(name: str, probe: Callable[[], Check]) -> Check:
    try:
        return probe()
    except Exception as error:  # a check must tell, whatever its package raises
        return _entry(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return _entry("python", "ok", f"{version}, {os.cpu_count()} CPU cores")


def _package(name: str) -> Check:
    try:
        return _entry(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return _entry(name, "failed", f"not installed; pip install {name}")


def _torch() -> Check:
    import torch
    import torchvision

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    where = f"{devices} GPU(s)" if devices else "no GPU: candidates train on the CPU"
    return _entry("torch", "ok", f"{torch.__version__}, torchvision {torchvision.__version__}; {where}")


def _deepspeed() -> Check:
    import torch

    from ucc_search.config import TrainConfig
    from ucc_search.train import DeepSpeedEngine, Worker

    module = torch.nn.Linear(2, 1)
    DeepSpeedEngine(module, TrainConfig(steps=1, batch_size=1), 1, Worker())
    version = importlib.metadata.version("deepspeed")
    return _entry("deepspeed", "ok", f"{version} starts an engine; nothing had to be compiled")


def _ray() -> Check:
    import ray.tune

    return _entry("ray", "ok", f"{ray.__version__} with Tune")


def _data() -> Check:
    from ucc_search.data import FASHION_MNIST_DEBIAN

    if FASHION_MNIST_DEBIAN.is_dir():
        return _entry("data", "ok", "digits (embedded), Fashion-MNIST (installed by Debian's package)")
    return _entry(
        "data", "note", "digits (embedded); Fashion-MNIST will be downloaded by torchvision at first use"
    )


def _compiler() -> Check:
    if shutil.which("c++") or shutil.which("g++"):
        return _entry("compiler", "ok", "found; needed only if you ask DeepSpeed for its fused optimisers")
    return _entry(
        "compiler", "note", "none; this only rules out DeepSpeed's fused optimisers, torch's are used"
    )


def _cache() -> Check:
    from ucc_search.shapes import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        return _entry("cache", "ok", f"{folder} (UCC_SEARCH_CACHE moves it)")
    return _entry("cache", "failed", f"{folder} cannot be written; set UCC_SEARCH_CACHE to another folder")


def _plugins() -> list[Check]:
    from ucc_search.plugins import Plugins

    try:
        records = Plugins.load().records
    except UserError as error:
        return [_entry("plugins", "failed", str(error))]
    return [
        _entry("plugin", "ok" if r.status == "ok" else "note", f"{r.name}: {r.error or r.status}")
        for r in records
    ]
