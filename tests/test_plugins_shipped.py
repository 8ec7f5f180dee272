"""The packages under `plugins/`: complete, light, on the public hooks alone; and the tutorial that compares with them."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from views import token_view

from ucc_search.interfaces import ComponentRef
from ucc_search.plugins import HOOKS, Plugins
from ucc_search.testing import assert_conforms

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(p.parent for p in (ROOT / "plugins").glob("*/pyproject.toml"))
PUBLIC = {"ucc_search", "ucc_search.interfaces", "ucc_search.builtin.aggregators"}
"""What a package may import of ours: the public names, the contract, and built-in aggregators to extend."""
OTHER_SETTINGS = [
    ("aggregator", "tome", {"feature": "tokens", "proportional": False}),
    ("aggregator", "evit", {"fuse": False}),
    ("aggregator", "diffrate", {"dropped": 0.0}),
    ("aggregator", "diffrate", {"dropped": 1.0}),
    ("aggregator", "zero_tprune", {"similar": 0.0}),
    ("aggregator", "zero_tprune", {"similar": 1.0}),
]
"""Parameters beside the defaults, by which the code takes other ways."""


@pytest.fixture(params=PACKAGES, ids=lambda path: path.name)
def package(request) -> SimpleNamespace:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((request.param / "pyproject.toml").read_text(encoding="utf-8"))
    files = project["tool"]["setuptools"]
    (source,) = [request.param / f"{m}.py" for m in files.get("py-modules", ())] + [
        request.param / p for p in files.get("packages", ())
    ]
    return SimpleNamespace(path=request.param, project=project["project"], source=source)


def test_every_peer_is_there():
    names = {p.name.removeprefix("ucc-plugin-") for p in PACKAGES}
    assert names >= {"minimal", "tome", "evit", "dynamic-vit", "prune-merge", "zero-tprune"}


def test_its_metadata_is_complete(package):
    project = package.project
    assert project["name"] == package.path.name
    assert {"version", "description", "requires-python", "license"} <= project.keys()
    assert "ucc-search" in project["dependencies"]
    assert project["entry-points"]["ucc_search"] == {
        project["name"].removeprefix("ucc-plugin-"): package.source.stem
    }
    assert list((package.path / "tests").glob("test_*.py"))
    readme = (package.path / project["readme"]).read_text(encoding="utf-8")
    assert readme.startswith(f"# {project['name']}\n")
    assert len(readme.splitlines()) <= 16


def test_it_says_what_is_faithful_to_the_paper(package):
    readme = (package.path / "README.md").read_text(encoding="utf-8")
    if package.path.name != "ucc-plugin-minimal":  # an example has no paper
        assert all(word in readme for word in ("arxiv.org/abs/", "- Faithful:", "- Not faithful:"))


def test_it_uses_the_public_hooks_alone_and_loads_no_torch(package):
    files = [package.source] if package.source.is_file() else sorted(package.source.glob("*.py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ucc_search"):
                assert node.module in PUBLIC, file
    first = ast.parse(files[0].read_text(encoding="utf-8")).body  # the module, or __init__ of the package
    at_import = [n for n in first if isinstance(n, ast.Import | ast.ImportFrom)]
    assert "torch" not in {getattr(n, "module", None) or n.names[0].name for n in at_import}


def test_its_components_keep_the_contract(package):
    plugins = Plugins.load([str(package.source)], entry_points=False, environment=False, strict=True)
    (record,) = [r for r in plugins.records if r.name == package.source.stem]
    assert record.provides
    for kind, hook in HOOKS.items():
        for name in record.provides.get(hook, ()):
            described = plugins.describe(kind, name)
            assert described["summary"].endswith(".")
            assert not described["required"]
            assert_conforms(plugins.build(kind, ComponentRef(name)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "params"), OTHER_SETTINGS, ids=str)
def test_other_settings_keep_the_contract_too(kind, name, params):
    sources = [
        str(path) for path in sorted((ROOT / "plugins").glob("*/ucc_plugin_*")) if path.suffix != ".egg-info"
    ]
    plugins = Plugins.load(sources, entry_points=False, environment=False, strict=True)
    assert_conforms(plugins.build(kind, ComponentRef(name, params)))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> SimpleNamespace:
    """A copy of what a checkout holds, and an environment with ucc-search in it but none of the packages."""
    folder = tmp_path_factory.mktemp("fresh")
    shutil.copytree(
        ROOT / "plugins", folder / "plugins", ignore=shutil.ignore_patterns("build", "*.egg-info")
    )
    shutil.copytree(ROOT / "search_spaces", folder / "search_spaces")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # The packages of this environment are seen there, too: nothing is downloaded.
    seen = [str(ROOT), *(p for p in sys.path if p.endswith("site-packages"))]
    (packages / "seen.pth").write_text("\n".join(seen) + "\n", encoding="utf-8")
    for name, module in (("pip", "pip._internal.cli.main"), ("ucc-search", "ucc_search.cli")):
        script = environment / "bin" / name
        script.write_text(
            f"#!{environment}/bin/python\nimport sys\nfrom {module} import main\nsys.exit(main())\n"
        )
        script.chmod(0o755)
    variables = {
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "UCC_SEARCH_PLUGINS")},
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "UCC_SEARCH_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this one the wrong way round
        "PIP_NO_DEPS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }

    def run(line: str) -> str:
        done = subprocess.run(
            line, shell=True, cwd=folder, env=variables, capture_output=True, text=True, timeout=1500
        )
        assert done.returncode == 0, f"$ {line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return SimpleNamespace(folder=folder, run=run)


@pytest.mark.slow
def test_all_packages_install_into_a_fresh_environment(fresh):
    fresh.run("pip install ./plugins/*")
    listed = json.loads(fresh.run("ucc-search plugins list --json"))
    status = {
        p["name"]: p["status"] for p in listed["plugins"] if p["origin"].startswith("package ucc-plugin-")
    }
    assert status == {p.name.removeprefix("ucc-plugin-"): "ok" for p in PACKAGES}
    checked = json.loads(fresh.run("ucc-search plugins validate --json"))
    assert {c["plugin"] for c in checked} >= set(status)


TUTORIAL = (ROOT / "docs" / "tutorial-scorer.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL, re.DOTALL)


def test_the_tutorials_scorer_is_a_dozen_lines_that_work(tmp_path):
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    (tmp_path / "my_scorer.py").write_text(code, encoding="utf-8")
    plugins = Plugins.load([str(tmp_path / "my_scorer.py")], entry_points=False, environment=False)
    view = token_view(torch.tensor([[[0.0, 0.0], [1.0, 1.0], [5.0, 1.0]]]))
    scores_BN = plugins.build("scorer", ComponentRef("unusual")).score(view)
    mean = torch.tensor([2.0, 2 / 3])
    torch.testing.assert_close(scores_BN[0], (view.patches_BND[0] - mean).norm(dim=1))


def test_the_tutorial_compares_in_one_command():
    commands = [line for block in blocks("console") for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in commands)
    assert len([line for line in commands if " compare " in line]) == 1


@pytest.mark.slow
def test_the_tutorial_works_as_written(fresh):
    """Every command in its order, with less training behind those that train."""
    (fresh.folder / "my_scorer.py").write_text(blocks("python")[0], encoding="utf-8")
    less = [
        *("train.epochs=null", "train.steps=2", "teacher.epochs=null", "teacher.steps=20"),
        *("search.seeds=[0]", "search.executor=local"),
    ]
    for block in blocks("console"):
        for line in block.splitlines():
            command = line.removeprefix("$ ")
            if command.startswith(("ucc-search compare", "ucc-search search")):
                command += "".join(f" --set {setting}" for setting in less)
            if "search.trials" in command:
                command += " --set search.trials=2"
            output = fresh.run(command)
            if command.startswith("ucc-search compare"):
                for method in (
                    "unusual",
                    "tome",
                    "evit",
                    "dynamic-vit",
                    "tps",
                    "diffrate",
                    "zero-tprune",
                    "ucc",
                ):
                    assert len(re.findall(rf"^macs=\d+% +{method} ", output, re.MULTILINE)) == 2, method
