"""`plugins new`, `info`, `validate` and `list` as a plugin's author uses them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ucc_search.cli import app
from ucc_search.errors import ConfigError, PluginError
from ucc_search.interfaces import ComponentRef
from ucc_search.plugins import HOOKS, Plugins
from ucc_search.scaffold import new_plugin
from ucc_search.space import SearchSpace
from ucc_search.testing import checks_for, run_checks


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["plugins", *arguments])


def refused(*arguments: str) -> str:
    """The sentence of a wrong call."""
    done = invoke(*arguments)
    assert isinstance(done.exception, PluginError | ConfigError), done.output
    return str(done.exception)


def test_the_commands_of_the_reference_work_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parent.parent / "docs" / "plugins.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ ucc-search (plugins .*)$", text, re.MULTILINE)
    assert [c.split()[1] for c in commands] == ["new", "validate", "info"]
    for command in commands:
        # A metric in place of a scorer: its suite takes no model, and the words are the same.
        done = CliRunner().invoke(app, command.replace("--kind scorer", "--kind metric").split())
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("kind", HOOKS)
def test_a_new_plugin_of_every_kind_keeps_its_contract(kind, tmp_path):
    (file,) = new_plugin(kind, "my_own", tmp_path, package=False)
    plugins = Plugins.load([str(file)], entry_points=False, strict=True)
    component = plugins.build(kind, ComponentRef("my_own"))
    checks = [c for c in checks_for(component) if c.name != "export"]  # seconds each; see the slow test
    bad = [str(r) for r in run_checks(component, checks) if not r.passed]
    assert not bad, "\n".join(bad)
    assert plugins.describe(kind, "my_own")["summary"].endswith(".")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["observer", "scorer"])
def test_a_new_package_passes_its_own_tests_at_once(kind, tmp_path):
    files = new_plugin(kind, "my_own", tmp_path, package=True)
    top = tmp_path / "ucc-plugin-my-own"
    assert {str(f.relative_to(top)) for f in files} == {
        "ucc_plugin_my_own.py",
        "pyproject.toml",
        "README.md",
        "tests/test_my_own.py",
    }
    if sys.version_info >= (3, 11):
        import tomllib

        project = tomllib.loads((top / "pyproject.toml").read_text())
        assert project["project"]["entry-points"]["ucc_search"] == {"my_own": "ucc_plugin_my_own"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={top}"],
        cwd=top,
        env={"PYTHONPATH": str(top), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_new_refuses_what_does_not_do(tmp_path):
    out = ("--out", str(tmp_path))
    assert invoke("new", "mine", *out).exit_code == 0
    assert "is there already" in refused("new", "mine", *out)
    assert "did you mean 'scorer'?" in refused("new", "x", "--kind", "scoer", *out)
    assert "small letters" in refused("new", "My Score", *out)


def test_info_tells_all_that_is_known(tmp_path):
    (file,) = new_plugin("scorer", "my_own", tmp_path, package=False)
    shown = invoke("info", "my_own", "--plugin", str(file)).output
    for part in (
        "scorer my_own",
        str(file),
        "sha256",
        "power: default 1.0",
        "{low: 0.5, high: 2.0}",
        "by its length",
    ):
        assert part in shown
    found = json.loads(invoke("info", "scorer:class_attention", "--json").output)
    assert [(c["kind"], c["name"], c["flags"]["needs_class_token"]) for c in found] == [
        ("scorer", "class_attention", True)
    ]
    several = json.loads(invoke("info", "random", "--json").output)
    assert {c["kind"] for c in several} >= {"scorer", "importance", "sampler"}
    assert "did you mean 'joint'?" in refused("info", "jiont")
    assert "did you mean 'scorer'?" in refused("info", "scoer:joint")
    assert {c["kind"] for c in json.loads(invoke("info", "builtin", "--json").output)} <= set(HOOKS)


WRONG_SHAPE = """
from ucc_search import Observer, hookimpl


class Proud(Observer):
    def trial_finished(self, row):
        row["accuracy"] = 1.0


@hookimpl
def ucc_observers():
    return {"proud": Proud}
"""


def test_validate_says_which_line_broke_where_and_what_to_do(tmp_path):
    file = tmp_path / "proud.py"
    file.write_text(WRONG_SHAPE)
    done = invoke("validate", "--plugin", str(file))
    assert done.exit_code == 1
    for part in (
        "observer proud (proud)",
        "FAIL  events",
        "changed the row (proud.py:6)",
        "contract:",
        "copy it",
    ):
        assert part in done.output
    found = json.loads(invoke("validate", "proud", "--plugin", str(file), "--json").output)
    assert [r["passed"] for r in found[0]["results"]] == [True, False]


def test_validate_passes_what_is_right_and_takes_parameters(tmp_path):
    (file,) = new_plugin("metric", "mine", tmp_path, package=False)
    needs = tmp_path / "needs.py"
    text = (
        file.read_text()
        .replace('"mine"', '"needy"')
        .replace("    unit", "    def __init__(self, size: int):\n        self.size = size\n\n    unit")
    )
    needs.write_text(text)
    done = invoke(
        "validate", "mine", "needy", "--plugin", str(file), "--plugin", str(needs), "--param", "size=3"
    )
    assert done.exit_code == 0, done.output
    assert "6 of 6 checks passed" in done.output
    assert "missing 1 required positional argument: 'size'" in refused(
        "validate", "needy", "--plugin", str(needs)
    )
    assert "expected key=value" in refused("validate", "mine", "--plugin", str(file), "--param", "size")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import surely_not_installed", "it needs the module 'surely_not_installed', which is not installed"),
        ("def f(:", "syntax error at line 1"),
        ("raise ImportError('no such thing')", "ImportError: no such thing"),
    ],
)
def test_validate_shows_why_a_plugin_does_not_load(text, reason, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(text)
    done = invoke("validate", "--plugin", str(file))
    assert done.exit_code == 1
    assert f"FAIL  load           {reason}" in done.output
    assert reason in refused("info", "broken", "--plugin", str(file))


def test_nothing_to_validate_is_said():
    assert "there is nothing to validate" in refused("validate", "--no-plugins")


def test_list_shows_the_order_and_what_collides(tmp_path):
    (first,) = new_plugin("metric", "mine", tmp_path, package=False)
    second = tmp_path / "theirs.py"
    second.write_text(first.read_text())
    shown = invoke("list", "--no-plugins", "--plugin", str(first), "--plugin", str(second)).output
    assert shown.index("builtin") < shown.index("\nmine") < shown.index("\ntheirs")
    assert "collision: metric 'mine' comes from both 'mine'" in shown
    assert shown.rstrip().endswith("and those of UCC_SEARCH_PLUGINS")


def test_a_space_file_searches_the_range_a_plugin_declares(tmp_path):
    from shapes import small_shape

    from ucc_search.config import parse_config

    (file,) = new_plugin("scorer", "mine", tmp_path, package=False)
    plugins = Plugins.load([str(file)], entry_points=False)
    base = {
        "name": "x",
        "model": {"name": "small_vit"},
        "data": {"name": "digits"},
        "budget": {"macs": "50%"},
    }

    def space(scorer):
        return SearchSpace.of(
            parse_config(base | {"space": {"scorer": scorer}}).space, small_shape(), plugins
        )

    found = space([{"name": "mine", "power": "search"}, {"name": "joint", "mix": "search", "kappa": 0.2}])
    searched = {d.name: (d.low, d.high) for d in found.dimensions if d.name.startswith("scorer.")}
    assert searched == {"scorer.mine.power": (0.5, 2.0), "scorer.joint.mix": (0.0, 1.0)}
    candidate = found.corners()[0]
    assert candidate.components["scorer"] == ComponentRef("mine", {"power": 0.5})
    with pytest.raises(PluginError, match=r"'joint' declares no range for sign \(it declares: mix, kappa\)"):
        space({"name": "joint", "sign": "search"})
    with pytest.raises(ConfigError, match="one component with fixed parameters"):
        parse_config(base | {"baselines": [{"name": "b", "scorer": {"name": "mine", "power": "search"}}]})
