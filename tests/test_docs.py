"""The documentation is true: links lead somewhere, snippets run, the reference is what the code says."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from ucc_search import cli
from ucc_search.config import parse_config

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    p
    for folder in (ROOT, DOCS, DOCS / "reference", ROOT / "results", *ROOT.glob("plugins/*"))
    for p in folder.glob("*.md")
)
TUTORIALS = ("tutorial-search.md", "tutorial-results.md")
RUN_MADE_HERE = "runs/tutorial"


def load_generator(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator, headline = load_generator("make_reference"), load_generator("make_headline")


def prose(page: Path) -> str:
    """Without code, in which brackets are no links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda m: m[0].replace("](", "] ("), text)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_the_readme_says_what_was_measured():
    for page, text in headline.pages().items():
        assert page.read_text(encoding="utf-8") == text, "run make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name}: {target}"


def test_every_page_is_in_the_index():
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in [*DOCS.glob("*.md"), *DOCS.glob("reference/*.md")]:
        assert page.name == "README.md" or f"({page.relative_to(DOCS)})" in text, (
            f"{page.name}: run `make docs`"
        )


def test_the_reference_is_what_the_code_says():
    for name, text in generator.pages().items():
        assert (generator.FOLDER / name).read_text(encoding="utf-8") == text, (
            f"{name} is old: run `make docs`"
        )
    assert generator.INDEX.read_text(encoding="utf-8") == generator.index(), (
        "the index is old: run `make docs`"
    )


def test_every_column_of_the_frames_has_a_line():
    from ucc_search.analysis import Point
    from ucc_search.store import TrialRow

    text = (generator.FOLDER / "columns.md").read_text(encoding="utf-8")
    for kind in (TrialRow, Point):
        section = text.split(f"## {kind.__name__}\n")[1].split("\n## ")[0]
        assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == [f.name for f in fields(kind)]


def test_columns_are_explained():
    """A column without a word is one that only its author can use; components are explained by the first."""
    for _, name, _ in generator.FRAMES:
        section = (generator.FOLDER / "columns.md").read_text(encoding="utf-8").split(f"## {name}\n")[1]
        rows = re.findall(r"^\| `(\w+)` \|.*\| (.*?) ?\|$", section.split("\n## ")[0], re.MULTILINE)
        assert len(rows) > 3
        assert sum(bool(text) for _, text in rows) >= 0.55 * len(rows), name


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    assert all(line.startswith("$ ucc-search ") for line in lines), lines
    return [shlex.split(line.removeprefix("$ ucc-search ")) for line in lines]


def needs_a_search(text: str) -> bool:
    return RUN_MADE_HERE in text


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder like a checkout, in which commands may write."""
    for name in ("search_spaces", "results"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ucc-search", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0, arguments


LIGHT = [
    pytest.param(a, marks=[pytest.mark.slow] if a[0] in ("report", "sensitivity") else [])
    for page in TUTORIALS
    for a in commands(page)
    if not needs_a_search(" ".join(a))
]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_commands_run(arguments, here, monkeypatch, capsys):
    call(arguments, monkeypatch)
    assert capsys.readouterr().out


def test_python_of_the_results_runs(here):
    (text,) = blocks("tutorial-results.md", "python")
    names: dict[str, object] = {}
    exec(text, names)  # the page's own code
    for name in (
        "trials",
        "front",
        "cheap",
        "standings",
        "importances",
        "sensitivity",
        "progress",
        "pairs",
        "spread",
    ):
        assert len(names[name]) > 0, name
    assert names["knee"].id in set(names["front"].id)
    assert names["pairs"].attrs["differences"]


def test_space_files_of_the_pages_are_valid():
    texts = blocks("tutorial-search.md", "yaml")
    assert len(texts) == 2
    for text in texts:
        parse_config(yaml.safe_load(text))


def test_the_quoted_statement_is_the_shipped_runs():
    from ucc_search.runs import load_run
    from ucc_search.spread import standings, statements

    page = (DOCS / "tutorial-results.md").read_text(encoding="utf-8")
    quoted = re.search(r"^> (.*)$", page, re.MULTILINE)
    assert quoted
    said = statements(standings(load_run(ROOT / "results" / "fashion-mnist-ucc").rows))
    start, end = quoted[1].split(", ... ")
    assert any(line.startswith(start) and line.endswith(end) for line in said)


@pytest.mark.slow
def test_latencies_are_measured_and_budgets_met_as_their_page_says(here, monkeypatch, capsys):
    for command, *arguments in commands("latency.md"):
        if command == "search":  # what a search would refuse, a plan refuses
            call(["plan", *arguments], monkeypatch)
            assert "phone.json" not in " ".join(arguments) or "at most" in capsys.readouterr().out
        else:
            call([command, *arguments], monkeypatch)


@pytest.mark.slow
def test_the_tutorial_of_a_search_runs(here, monkeypatch, capsys):
    for arguments in commands("tutorial-search.md"):
        call(arguments, monkeypatch)
    assert (here / RUN_MADE_HERE / "report.html").is_file()
    for text in blocks("tutorial-search.md", "python"):
        exec(text, {})  # the page's own code
