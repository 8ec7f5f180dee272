"""A broken plugin breaks only what names it; names collide loudly; workers rebuild what the driver had."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ucc_search.errors import PluginError
from ucc_search.interfaces import ComponentRef
from ucc_search.plugins import HOOKS, PluginRecord, Plugins

GOOD = '''
from ucc_search.hookspecs import hookimpl
from ucc_search.interfaces import Scorer

__version__ = "1.2"


class Edge(Scorer):
    """Keeps the border of the image.

    More text.
    """

    ranges = {"width": {"low": 1, "high": 3}}

    def __init__(self, width: int = 1, *, power: float):
        if width < 1:
            raise ValueError(f"width is {width}, expected at least 1")
        self.width, self.power = width, 1 / power


@hookimpl
def ucc_scorers():
    return {"edge": Edge}
'''
HOOKIMPL = "from ucc_search.hookspecs import hookimpl\n"
BROKEN = {
    "imports": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "syntax": ("x = 1\ndef f(:\n", "syntax error at line 2"),
    "needs": ("import surely_not_installed", "needs the module 'surely_not_installed'"),
    "older_host": ("import ucc_search.gone", "which this version of ucc-search does not have"),
    "raises": (HOOKIMPL + "@hookimpl\ndef ucc_scorers(): raise KeyError('k')", "KeyError: 'k'"),
    "misspelt": (HOOKIMPL + "@hookimpl\ndef ucc_scorer(): return {}", "did you mean 'ucc_scorers'?"),
    "undecorated": ("def ucc_scorers(): return {}", "ucc_scorers is not decorated"),
    "arguments": (HOOKIMPL + "@hookimpl\ndef ucc_scorers(model): return {}", "'model'"),
    "a_list": (HOOKIMPL + "@hookimpl\ndef ucc_scorers(): return ['x']", "returned list, expected a mapping"),
    "no_class": (HOOKIMPL + "@hookimpl\ndef ucc_scorers(): return {'x': 1}", "offers 'x': 1, expected"),
    "slash": (HOOKIMPL + "@hookimpl\ndef ucc_scorers(): return {'a/b': int}", "expected a plain name"),
    "newer": (f"ucc_search_api = '>=2,<3'\n{GOOD}", "needs hook version >=2,<3, this ucc-search has 1"),
}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.delenv("UCC_SEARCH_PLUGINS", raising=False)
    monkeypatch.delenv("UCC_SEARCH_STRICT", raising=False)


def write(path: Path, text: str = GOOD) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def load(*sources: str, **options) -> Plugins:
    return Plugins.load(sources, entry_points=False, **options)


def record(plugins: Plugins, name: str) -> PluginRecord:
    return next(r for r in plugins.records if r.name == name)


# What is found


def test_builtins_are_a_plugin_like_any_other():
    plugins = load()
    assert [r.name for r in plugins.records] == ["builtin"]
    assert set(plugins.names("scorer")) == {"joint", "spatial", "spectral", "class_attention", "random"}
    assert set(plugins.names("aggregator")) == {"host", "drop", "fuse", "bipartite"}
    cascades = {"per_block", "keep_all", "constant", "geometric", "staged", "calibrated"}
    assert set(plugins.names("cascade")) == cascades
    assert set(plugins.names("importance")) == {"kl", "fisher", "magnitude", "random"}
    assert set(plugins.names("distiller")) == {"two_level", "logits", "features", "hard_align", "none"}


@pytest.mark.parametrize("kind", HOOKS)
def test_every_builtin_builds_from_its_defaults_and_explains_itself(kind):
    plugins = load()
    for name in plugins.names(kind):
        plugins.build(kind, ComponentRef(name))
        assert plugins.describe(kind, name)["summary"].endswith(".")


def test_listing_imports_nothing_heavy():
    # `plugins list` and `--help` must answer at once; one import of torch costs seconds.
    code = (
        "import sys; from ucc_search.plugins import Plugins; Plugins.load();"
        "print([m for m in ('torch', 'ray', 'optuna', 'timm', 'numpy') if m in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_file_folder_module_and_environment_are_read_in_order(tmp_path, monkeypatch):
    file = write(tmp_path / "one.py")
    write(tmp_path / "many" / "two.py")
    write(tmp_path / "many" / "_helper.py", "raise RuntimeError('private files are not plugins')")
    write(tmp_path / "lib" / "ucc_test_package" / "__init__.py", "")
    write(tmp_path / "lib" / "ucc_test_package" / "three.py")
    variable = os.pathsep.join([write(tmp_path / "four.py"), "", write(tmp_path / "five.py")])
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setenv("UCC_SEARCH_PLUGINS", variable)
    plugins = load(file, str(tmp_path / "many"), "ucc_test_package.three")
    assert [r.name for r in plugins.records] == [
        "builtin",
        "one",
        "two",
        "ucc_test_package.three",
        "four",
        "five",
    ]
    assert {r.status for r in plugins.records} == {"ok"}
    assert [r.name for r in load(environment=False).records] == ["builtin"]


def test_installed_plugins_carry_their_package_and_version(tmp_path, monkeypatch):
    write(tmp_path / "ucc_test_installed.py")
    info = tmp_path / "ucc_plugin_test-3.1.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: ucc-plugin-test\nVersion: 3.1\n")
    write(info / "entry_points.txt", "[ucc_search]\nborder = ucc_test_installed\nbad = ucc_test_absent\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = Plugins.load()
    assert plugins.get("scorer", "edge") is plugins.get("scorer", "border/edge")
    assert (record(plugins, "border").version, record(plugins, "bad").status) == ("3.1", "failed")
    assert record(plugins, "border").origin == "package ucc-plugin-test"
    assert "border" not in [r.name for r in load().records]


TRAPS = ("ucc_search_plugin.py", "conftest.py", "ucc_search_plugins/x.py", "json/x.py", "typer.py", "yaml.py")


def set_traps(folder: Path) -> None:
    """Whatever a program might look for, and an installed plugin; each shouts if it is run."""
    for name in (*TRAPS, "trap.py"):
        write(folder / name, "raise SystemExit('executed')")
    write(folder / "trap-1.dist-info" / "METADATA", "Metadata-Version: 2.1\nName: trap\nVersion: 1\n")
    write(folder / "trap-1.dist-info" / "entry_points.txt", "[ucc_search]\ntrap = trap\n")


def test_the_current_folder_is_never_executed(tmp_path, monkeypatch):
    set_traps(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert [r.name for r in load().records] == ["builtin"]
    with pytest.raises(PluginError, match="plugin ''"):
        load("")
    # A folder does not replace the module of the same name.
    assert [r.name for r in load("json").records] == ["builtin", "json"]
    # Not even where Python itself would look there.
    for here in ("", str(tmp_path)):
        monkeypatch.setattr(sys, "path", [here, *sys.path])
        assert "trap" not in [r.name for r in Plugins.load().records]


def test_python_m_does_not_execute_the_current_folder(tmp_path):
    set_traps(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "ucc_search", "plugins", "list"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("builtin")
    assert "trap" not in done.stdout


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("absent.py", "no such .py file or folder"),
        ("absent/folder", "no such .py file or folder"),
        ("ucc_test_no_module", "no module of this name"),
        ("json.ucc_test_absent", "no module 'json.ucc_test_absent'"),
        (".", "holds no .py file"),
        ("./notes.txt", "expected a .py file"),
    ],
)
def test_a_named_source_that_is_not_there_is_refused(source, reason, tmp_path, monkeypatch):
    write(tmp_path / "notes.txt", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError, match=r"^plugin ") as error:
        load(source)
    assert reason in str(error.value)
    assert source in str(error.value)


# What is broken


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_breaks_only_what_names_it(name, tmp_path):
    text, reason = BROKEN[name]
    plugins = load(write(tmp_path / f"{name}.py", text), write(tmp_path / "good.py"))
    broken = record(plugins, name)
    assert (broken.status, broken.provides) == ("failed", {})
    assert reason in (broken.error or "")
    assert "\n" not in (broken.error or "")
    assert plugins.names("scorer") == sorted([*load().names("scorer"), "edge"])
    plugins.build("scorer", ComponentRef("edge", {"power": 2.0}))
    with pytest.raises(PluginError, match=r"unknown scorer 'wanted'.*note that plugin") as error:
        plugins.get("scorer", "wanted")
    assert reason in str(error.value)


def test_a_plugin_that_fails_late_leaves_nothing_behind(tmp_path):
    late = GOOD + "\n@hookimpl\ndef ucc_distillers(): raise OSError('no licence')\n"
    plugins = load(write(tmp_path / "late.py", late))
    assert record(plugins, "late").error == "OSError: no licence"
    assert "edge" not in plugins.names("scorer")


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_strict_refuses_the_first_failure(how, tmp_path, monkeypatch):
    bad = write(tmp_path / "bad.py", "import surely_not_installed")
    if how == "environment":
        monkeypatch.setenv("UCC_SEARCH_STRICT", "1")
    with pytest.raises(PluginError, match=r"plugin 'bad' \(.*bad\.py\) failed: it needs the module"):
        load(bad, strict=how == "argument")


def test_strict_accepts_plugins_that_work(tmp_path):
    assert record(load(write(tmp_path / "good.py"), strict=True), "good").status == "ok"


def test_an_interrupt_is_not_a_plugin_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        load(write(tmp_path / "stop.py", "raise KeyboardInterrupt"))


# Which one is meant


def test_a_name_claimed_twice_must_be_qualified_when_used(tmp_path):
    first, second = write(tmp_path / "first.py"), write(tmp_path / "second.py")
    # A shadowed namesake offers nothing, so the message must not point to its file.
    plugins = load(first, second, write(tmp_path / "again" / "first.py"))
    assert plugins.collisions == {"scorer": {"edge": ["first", "second"]}}
    with pytest.raises(PluginError) as error:
        plugins.get("scorer", "edge")
    for part in (first, second, "version 1.2", "--disable-plugin second", "first/edge"):
        assert part in str(error.value)
    assert plugins.get("scorer", "first/edge") is not plugins.get("scorer", "second/edge")
    assert plugins.identity("scorer", "second/edge")["plugin"] == "second"
    with pytest.raises(PluginError, match="comes from both"):
        load(first, second, strict=True)
    assert load(first, second, disabled=["second"], strict=True).get("scorer", "edge")


def test_a_plugin_cannot_replace_a_builtin_unnoticed(tmp_path):
    plugins = load(write(tmp_path / "mine.py", GOOD.replace('"edge"', '"joint"')))
    with pytest.raises(PluginError, match=r"comes from both 'builtin' .* and 'mine'"):
        plugins.get("scorer", "joint")
    assert plugins.get("scorer", "builtin/joint").__module__ == "ucc_search.builtin.scorers"


def test_disabled_plugins_are_not_executed(tmp_path):
    plugins = load(write(tmp_path / "off.py", "raise RuntimeError('executed')"), disabled=["off"])
    assert (record(plugins, "off").status, record(plugins, "off").error) == ("disabled", None)
    with pytest.raises(PluginError, match=r"unknown scorer 'edge'.*plugin 'off' .* is disabled"):
        plugins.get("scorer", "edge")


def test_of_two_plugins_with_one_name_the_second_is_shadowed_and_says_so(tmp_path):
    first, second = write(tmp_path / "a" / "same.py"), write(tmp_path / "b" / "same.py")
    plugins = load(first, second)
    assert [r.status for r in plugins.records[1:]] == ["ok", "shadowed"]
    error = plugins.records[2].error or ""
    for part in ("already called 'same'", first, "version 1.2", "rename or uninstall one of the two"):
        assert part in error
    with pytest.raises(PluginError, match=r"plugin 'same' \(.*b/same\.py\) is shadowed: another"):
        load(first, second, strict=True)


def test_a_file_that_is_also_installed_is_one_plugin(tmp_path, monkeypatch):
    file = write(tmp_path / "ucc_test_both.py")
    info = tmp_path / "ucc_plugin_test-3.1.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: ucc-plugin-test\nVersion: 3.1\n")
    write(info / "entry_points.txt", "[ucc_search]\nborder = ucc_test_both\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = Plugins.load([file], strict=True)
    assert record(plugins, "ucc_test_both").error == "the same module is already loaded as 'border'"
    assert plugins.get("scorer", "edge")


def test_a_plugin_to_disable_must_exist(tmp_path):
    good = write(tmp_path / "good.py")
    with pytest.raises(PluginError, match=r"no plugin 'godo' to disable; did you mean 'good'\?"):
        load(good, disabled=["godo"])


def test_a_module_reached_by_two_names_is_loaded_once(tmp_path, monkeypatch):
    write(tmp_path / "ucc_test_real.py")
    write(
        tmp_path / "ucc_test_alias.py", "import sys, ucc_test_real; sys.modules[__name__] = ucc_test_real\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = load("ucc_test_real", "ucc_test_alias")
    assert record(plugins, "ucc_test_alias").status == "shadowed"
    assert "already loaded as 'ucc_test_real'" in (record(plugins, "ucc_test_alias").error or "")
    assert plugins.collisions == {}


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("scorer", "jiont", "unknown scorer 'jiont'; did you mean 'joint'? (available: class_"),
        ("scorer", "builtin/jiont", "did you mean 'builtin/joint'?"),
        ("scorer", "other/joint", "unknown scorer 'other/joint'"),
        ("aggregator", "joint", "unknown aggregator 'joint' (available: bipartite, drop"),
        ("cascade", "tome", "pip install ./plugins/NAME) or passed with --plugin"),
        ("scorers", "joint", "unknown kind 'scorers'; did you mean 'scorer'?"),
    ],
)
def test_unknown_names_list_what_there_is(kind, name, message):
    with pytest.raises(PluginError) as error:
        load().get(kind, name)
    assert message in str(error.value)


# Building


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"widht": 2, "power": 1.0}, "no parameter 'widht'; did you mean 'width'? (it has: width, power)"),
        ({"width": 0, "power": 1.0}, "scorer 'edge': width is 0, expected at least 1"),
        ({"width": "two", "power": 1.0}, "scorer 'edge': '<' not supported"),
        ({"width": 2}, "missing 1 required keyword-only argument: 'power'"),
        ({"width": {"low": 1, "high": 3}, "power": 1.0}, "width is a range, expected a value"),
        ({"power": 0}, "scorer 'edge' cannot be built: ZeroDivisionError"),
    ],
)
def test_parameters_that_do_not_fit_are_one_sentence(params, message, tmp_path):
    plugins = load(write(tmp_path / "good.py"))
    with pytest.raises(PluginError) as error:
        plugins.build("scorer", ComponentRef("edge", params))
    assert message in str(error.value)


def test_check_accepts_ranges_but_not_unknown_parameters(tmp_path):
    plugins = load(write(tmp_path / "good.py"))
    plugins.check("scorer", ComponentRef("edge", {"width": {"low": 1, "high": 3}}))
    with pytest.raises(PluginError, match="no parameter 'widht'"):
        plugins.check("scorer", ComponentRef("edge", {"widht": {"low": 1, "high": 3}}))


def test_a_component_of_another_kind_is_refused(tmp_path):
    plugins = load(write(tmp_path / "odd.py", GOOD.replace("ucc_scorers", "ucc_cascades")))
    with pytest.raises(PluginError, match=r"does not derive from ucc_search\.interfaces\.Cascade"):
        plugins.build("cascade", ComponentRef("edge", {"power": 1.0}))


def test_components_take_their_parameters(tmp_path):
    plugins = load(write(tmp_path / "good.py"))
    edge = ComponentRef("good/edge", {"width": 3, "power": 2.0})
    parts = plugins.components(edge, ComponentRef("drop"), ComponentRef("constant", {"gamma": 0.5}))
    assert (parts.scorer.width, parts.cascade.gamma) == (3, 0.5)


def test_description_and_identity_name_the_source(tmp_path):
    file = write(tmp_path / "good.py")
    plugins = load(file)
    assert plugins.describe("scorer", "edge") == {
        "kind": "scorer",
        "name": "edge",
        "summary": "Keeps the border of the image.",
        "params": {"width": 1, "power": None},
        "required": ["power"],
        "ranges": {"width": {"low": 1, "high": 3}},
        "plugin": "good",
    }
    # The hash is that of the file as any tool computes it.
    sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    identity = {"component": "edge", "plugin": "good", "version": "1.2", "sha256": sha256}
    assert plugins.identity("scorer", "edge") == plugins.identity("scorer", "good/edge") == identity


# Workers


def run_python(code: str, *arguments: str, cwd: Path | None = None, **variables: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


WORKER = """
import json, pickle, sys
from ucc_search.plugins import Plugins
worker = Plugins.from_bundle(pickle.loads(open(sys.argv[1], "rb").read()))
names = {n: getattr(worker.get("scorer", n), "__module__", "") for n in worker.names("scorer")}
print(json.dumps([[vars(r) for r in worker.records], worker.sources, worker.disabled, list(names)]))
"""


def in_worker(driver: Plugins, cwd: Path, **variables: str) -> list:
    """What a process in another folder makes of the driver's bundle."""
    file = cwd / "bundle.pickle"
    file.write_bytes(pickle.dumps(driver.bundle()))
    variables = {"UCC_SEARCH_CACHE": str(cwd / "cache"), **variables}
    return json.loads(run_python(WORKER, str(file), cwd=cwd, **variables))


def test_a_worker_in_another_folder_rebuilds_the_same_plugins(tmp_path, monkeypatch):
    # Ray Tune runs workers in the trial's folder, where relative paths of the driver mean nothing.
    write(tmp_path / "good.py")
    write(tmp_path / "off.py")
    write(tmp_path / "more" / "bad.py", "raise RuntimeError('boom')")
    write(tmp_path / "env.py", GOOD.replace('"edge"', '"rim"'))
    (tmp_path / "trial").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UCC_SEARCH_PLUGINS", "env.py")
    driver = load("good.py", "more", "off.py", disabled=["off"])
    records, sources, disabled, _ = in_worker(driver, tmp_path / "trial")
    assert records == [vars(r) for r in driver.records]
    assert (tuple(sources), tuple(disabled)) == (driver.sources, driver.disabled)
    assert driver.get("scorer", "rim")
    assert not (tmp_path / "trial" / "cache").exists()  # read in their own place


PACKAGE = {
    "__init__.py": GOOD.replace(
        "from ucc_search.interfaces", "from .names import NAME\nfrom ucc_search.interfaces"
    ).replace('{"edge": Edge}', "{NAME: Edge}"),
    "names.py": "from pathlib import Path\nNAME = (Path(__file__).parent / 'data' / 'name.txt').read_text()",
    "data/name.txt": "edge",
}


@pytest.mark.parametrize("kind", ["file", "folder", "package", "module"])
def test_local_plugins_travel_by_content(kind, tmp_path, monkeypatch):
    """To nodes that have no such files, and so that an edit during a run changes no trial."""
    home = tmp_path / "home"
    for name, text in PACKAGE.items():
        write(home / "ucc_test_mine" / name, text)
    write(home / "flat" / "mine.py")
    monkeypatch.syspath_prepend(str(home))
    source = {
        "file": str(home / "flat" / "mine.py"),
        "folder": str(home / "flat"),
        "package": str(home / "ucc_test_mine"),
        "module": "ucc_test_mine",
    }[kind]
    driver = load(source)
    assert (driver.records[1].status, driver.records[1].error) == ("ok", None)
    (tmp_path / "trial").mkdir()
    bundle = driver.bundle()
    shutil.rmtree(home)
    monkeypatch.setattr(driver, "bundle", lambda: bundle)
    for _ in range(2):  # unpacked, then found unpacked
        records, sources, _, scorers = in_worker(driver, tmp_path / "trial")
        assert records == [vars(r) for r in driver.records]
        assert sources == [source]
        assert "edge" in scorers
    # What was changed in the cache is not believed.
    changed = next((tmp_path / "trial" / "cache").rglob("*.py"))
    changed.write_text("raise SystemExit('executed')")
    assert "edge" in in_worker(driver, tmp_path / "trial")[3]


def test_any_file_of_a_package_counts_for_its_hash(tmp_path):
    hashes = set()
    for folder, name in (("a", None), ("b", "names.py"), ("c", "data/name.txt")):
        for file, text in PACKAGE.items():
            write(tmp_path / folder / "pack" / file, text + " " * (file == name))
        hashes.add(load(str(tmp_path / folder / "pack")).records[1].sha256)
    assert len(hashes) == 3
    assert None not in hashes


def test_a_node_with_another_version_of_an_installed_plugin_is_told(tmp_path, monkeypatch):
    (tmp_path / "trial").mkdir()
    for folder, version in (("here", "3.1"), ("there", "3.2")):
        write(tmp_path / folder / "ucc_test_versions.py", GOOD + f"# {version}\n")
        info = tmp_path / folder / f"ucc_plugin_test-{version}.dist-info"
        write(info / "METADATA", f"Metadata-Version: 2.1\nName: ucc-plugin-test\nVersion: {version}\n")
        write(info / "entry_points.txt", "[ucc_search]\nborder = ucc_test_versions\n")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    driver = Plugins.load()
    same, other = (
        next(
            r
            for r in in_worker(driver, tmp_path / "trial", PYTHONPATH=str(tmp_path / f))[0]
            if r["name"] == "border"
        )
        for f in ("here", "there")
    )
    assert (same["status"], other["status"]) == ("ok", "failed")
    assert "(version 3.2) are not those of the process that started the run" in other["error"]
    # What the driver did not load is not loaded there either.
    found = in_worker(load(), tmp_path / "trial", PYTHONPATH=str(tmp_path / "here"))[0]
    assert [r["name"] for r in found] == ["builtin"]


def test_what_is_too_large_stays(tmp_path):
    write(tmp_path / "pack" / "__init__.py")
    with open(tmp_path / "pack" / "weights.bin", "wb") as file:
        file.truncate(30_000_000)
    with pytest.raises(PluginError, match="30 MB cannot travel to workers"):
        load(str(tmp_path / "pack")).bundle()


def test_loading_twice_gives_the_same_and_shares_nothing(tmp_path):
    file = write(tmp_path / "good.py")
    first, second = load(file), load()
    assert load(*first.sources).records == first.records
    assert "edge" not in second.names("scorer")
