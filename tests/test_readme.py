"""The README is true: its YAML validates, its Python runs, its hook table is complete."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import yaml

from ucc_search import hookspecs
from ucc_search.config import parse_config
from ucc_search.interfaces import ComponentRef
from ucc_search.plugin_pages import hook_table
from ucc_search.plugins import HOOKS, Plugins
from ucc_search.testing import suite

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_space_file_is_valid():
    (text,) = blocks("yaml")
    config = parse_config(yaml.safe_load(text))
    assert config.space.scorer[1].name == "class_attention"


def test_the_scorer_loads_as_a_plugin(tmp_path):
    text = next(b for b in blocks("python") if "hookimpl" in b)
    file = tmp_path / "my_scorer.py"
    file.write_text(text, encoding="utf-8")
    plugins = Plugins.load([str(file)], entry_points=False, environment=False)
    assert plugins.records[-1].status == "ok"
    assert plugins.build("scorer", ComponentRef("norm")).score is not None
    code_lines = [line for line in text.splitlines() if line.strip()]
    assert len(code_lines) <= 15


def test_the_hook_table_is_the_one_of_the_hookspecs():
    """Write it anew with `ucc-search plugins hooks`."""
    hooks = {n for n, _ in inspect.getmembers(hookspecs, inspect.isfunction) if n.startswith("ucc_")}
    assert set(HOOKS.values()) == hooks
    for name in ("README.md", "docs/plugins.md"):
        assert f"{hook_table()}\n" in (ROOT / name).read_text(encoding="utf-8"), name


def test_the_reference_lists_every_check_and_every_line_of_the_contracts():
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    for kind in HOOKS:
        for check in suite(kind):
            assert f"| {kind} | `{check.name}` | {check.contract} |\n" in text


def test_the_library_example_runs():
    text = next(b for b in blocks("python") if "import timm" in b)
    names: dict[str, object] = {}
    exec(text, names)  # the README's own code
    small = names["small"]
    assert small.blocks[-1].tokens_out == 24


def test_the_gate_runs_every_command_of_the_readme():
    gate = (Path(__file__).resolve().parent.parent / ".ci" / "run").read_text(encoding="utf-8")
    for block in blocks("console"):
        for line in block.splitlines():
            assert line.startswith("$ "), line
            if line.startswith("$ make "):
                assert line.removeprefix("$ ") in gate
    assert "readme_commands.py" in gate
