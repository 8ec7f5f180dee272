"""Imports point one way, and only the modules that must be slow to import are."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ucc_search

PACKAGE = Path(__file__).resolve().parent.parent / "ucc_search"
HEAVY = {"torch", "torchvision", "timm", "ray", "optuna", "deepspeed", "pandas", "numpy", "sklearn"}

LIGHT = [
    *("errors", "plan", "costs", "interfaces", "hookspecs", "units", "builtin", "plugins", "config"),
    *("space", "budget", "schedule", "shapes", "store", "environment", "analysis", "estimate", "preview"),
    *("tables", "cli", "strength", "widths", "progress", "parcel", "checkpoints", "timing", "status"),
    *("spread", "influence", "comparison", "report", "live"),
    *("observers", "plugin_checks", "plugin_sources", "stopping"),
    *("latency", "latency.layout", "latency.kept"),
]
"""Importing these loads none of HEAVY, themselves or through others."""

ALLOWED = {
    "errors": set(),
    "plan": {"errors"},
    "units": {"errors"},
    "costs": {"plan", "interfaces", "builtin"},
    "interfaces": {"plan"},
    "hookspecs": {"interfaces"},
    "config": {"errors", "interfaces", "units"},
    "plugin_checks": {"errors", "hookspecs"},
    "plugin_sources": {"errors", "hookspecs", "shapes"},
    "plugins": {"builtin", "errors", "hookspecs", "interfaces", "plugin_checks", "plugin_sources"},
    "observers": {"interfaces", "plugins"},
    "strength": set(),
    "timing": set(),
    "latency": {
        *("batches", "budget", "builtin", "compression", "config", "errors", "interfaces", "models", "plan"),
        *("plugins", "shapes", "store", "timing", "widths"),
    },
    "widths": {"config", "errors", "plan", "strength"},
    "budget": {"config", "costs", "errors", "interfaces", "plan", "units", "widths"},
    "space": {"config", "errors", "interfaces", "plan", "plugins", "strength", "widths"},
    "schedule": {
        *(
            "budget",
            "config",
            "costs",
            "errors",
            "interfaces",
            "latency",
            "plan",
            "plugins",
            "space",
            "widths",
        ),
    },
    "analysis": {"errors", "store", "units"},
    "ladder": {"analysis", "config", "errors", "store"},
    "proposer": {"builtin", "interfaces"},
    "spread": {"analysis", "store"},
    "influence": {"analysis", "store"},
    "comparison": {"analysis", "errors", "runs", "spread", "store"},
    "batches": set(),
    "compression": {"batches", "builtin", "errors", "interfaces", "plan"},
    "builtin": {"batches", "errors", "hookspecs", "interfaces", "plan", "strength"},
}
"""All that these modules may import of ours, wherever in the file; others are not restricted."""

OWNERS = {
    "ray": {"cluster", "tuning", "doctor"},
    "optuna": {"proposer", "builtin", "influence"},
    "deepspeed": {"train"},
}
"""The only modules that name these packages; doctor asks whether they work."""


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """`builtin` for everything in `builtin/`, `space` for `space.py`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, at_import_time: bool = False, typing_too: bool = True) -> set[str]:
    """Dotted names that a file imports; `from ucc_search import x` counts as `ucc_search.x`."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; this test would not see it"
            whole = node.module or ""
            found.update(f"{whole}.{a.name}" if whole == "ucc_search" else whole for a in node.names)
        elif (at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing_too
        ):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def ours(names: set[str]) -> set[str]:
    return {n.split(".")[1] for n in names if n.startswith("ucc_search.")}


@pytest.mark.parametrize("module", ALLOWED)
def test_a_module_imports_only_what_lies_below_it(module):
    files = [p for p in sources() if module_of(p) == module]
    assert files, f"{module} is gone; take it out of ALLOWED"
    for path in files:
        above = ours(imports(path)) - ALLOWED[module] - {module}
        assert not above, f"{path.relative_to(PACKAGE)} imports {sorted(above)}"


@pytest.mark.parametrize("package", OWNERS)
def test_every_heavy_tool_has_one_door(package):
    """A change of Ray, Optuna or DeepSpeed must touch one place."""
    users = {module_of(p) for p in sources() if package in {n.partition(".")[0] for n in imports(p)}}
    assert users <= OWNERS[package]
    assert users - {"doctor"}, f"nothing imports {package} any more; take it out of OWNERS"


def test_nothing_below_imports_the_command_line():
    users = {module_of(p) for p in sources() if "cli" in ours(imports(p))}
    assert users - {"cli"} == {"__main__"}


def test_modules_import_one_another_in_no_circle():
    """Judged by what is needed at import time: a circle there depends on who is imported first."""
    # A package's __init__ stands for it; the next test looks inside.
    edges: dict[str, set[str]] = {}
    for path in sources():
        needed = ours(imports(path, at_import_time=True, typing_too=False))
        edges.setdefault(module_of(path), set()).update(needed - {module_of(path)})
    assert_no_circle(edges)


@pytest.mark.parametrize("package", ["analysis", "cli", "config", "latency", "plan", "tables", "testing"])
def test_files_of_a_package_import_one_another_in_no_circle(package):
    dotted = f"ucc_search.{package}."
    files = [p for p in sources() if module_of(p) == package and p.stem != "__init__"]
    edges = {p.stem: {n.removeprefix(dotted) for n in imports(p) if n.startswith(dotted)} for p in files}
    assert any(edges.values())
    assert_no_circle(edges)


def assert_no_circle(edges: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def walk(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"circle: {' -> '.join((*above, module))}"
        if module not in done:
            for below in sorted(edges.get(module, ())):
                walk(below, (*above, module))
            done.add(module)

    for module in edges:
        walk(module, ())


def loads(modules: list[str], heavy: set[str]) -> str:
    """What goes wrong when a fresh process imports these: empty if none of `heavy` comes along."""
    code = (
        "import importlib, sys, ucc_search\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(f'ucc_search.{name}')\n"
        f"    found = sorted({heavy} & set(sys.modules))\n"
        "    if found: sys.exit(f'ucc_search.{name} loads {found}')\n"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False).stderr


def test_light_modules_load_nothing_heavy():
    """One import of torch costs seconds, and `--help`, `plan` and `plugins list` import all of these."""
    assert loads(LIGHT, HEAVY) == ""


def test_the_campaign_decides_without_torch_or_ray():
    assert loads(["campaign", "runner"], {"torch", "timm", "ray", "deepspeed"}) == ""


def test_public_names_exist_and_no_submodule_takes_one():
    """Importing a submodule binds its name in the package: a function of that name would be lost."""
    submodules = {info.name for info in pkgutil.iter_modules([str(PACKAGE)])}
    assert "costs" in submodules
    assert not submodules & set(ucc_search.__all__)
    assert all(getattr(ucc_search, name) is not None for name in ucc_search.__all__)
