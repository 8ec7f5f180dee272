"""The report: one offline file that says what the tables say, seen in a real browser where there is one."""

from __future__ import annotations

import csv
import itertools
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from rows import DENSE_MACS, config, row, zero_shot

from ucc_search.report import NAME, charts, pictures, render, svg, write_plots, write_report
from ucc_search.report.content import in_words
from ucc_search.runs import Run, load_run
from ucc_search.store import RunStore

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "results" / "fashion-mnist-ucc"
ASSETS = files("ucc_search") / "assets" / "report"


@pytest.fixture
def run(tmp_path) -> Run:
    """Every state a row can be in, and a name that must be escaped."""
    store = RunStore.create(
        tmp_path / "run", config(), {"command": "ucc-search search x.yaml", "python": "3"}
    )
    keep = [0.4 + 0.05 * i for i in range(10)]
    rows = [
        row(0, origin="dense", method="dense", target="", macs=DENSE_MACS, limit_macs=None, accuracy=0.95),
        *(zero_shot(i, kl=1.0 - keep[i - 1], params_searched={"keep.0": keep[i - 1]}) for i in range(1, 11)),
        *(row(20 + i, macs=(3 + i) * 10**6, accuracy=a) for i, a in enumerate([0.7, 0.88, 0.9])),
        row(30, seed=1, plan_key="plan22", macs=5_000_000, accuracy=0.92),
        row(31, method="<b>evit</b>", origin="baseline", accuracy=0.85, scorer="</script><i>x"),
        row(32, state="failed", failure="out_of_memory", error="no <memory> left"),
        row(33, feasible=False, accuracy=0.99),
    ]
    for one in rows:
        store.append(one)
    return Run(store.path)


class Tags(HTMLParser):
    """Checks that elements close in the order in which they opened."""

    VOID = frozenset({"meta", "link", "img", "br", "path", "rect", "circle", "line"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.ids += [v for k, v in attrs if k == "id"]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_endtag(self, tag):
        assert self.open
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()


def parsed(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids)), "two elements share an id"
    return tags


def test_the_page_is_whole_and_fetches_nothing(run):
    html = render(run)
    parsed(html)
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", html)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", html)
    assert "default-src 'none'" in html


def test_names_and_messages_cannot_become_markup(run):
    html = render(run)
    assert "<b>evit" not in html
    assert "</script><i>" not in html
    assert "no &lt;memory&gt; left" in html
    data = re.search(r'id="models">(.*?)</script>', html, re.DOTALL)
    assert data
    assert "<b>evit</b>" in {m["facts"]["method"] for m in json.loads(data[1]).values()}


def test_what_is_missing_is_said(run, tmp_path):
    html = render(run)
    assert "No weights are in the run folder" in html
    assert "1 finished trials were over their budget" in html
    assert "one seed each" not in html.split("Against the baselines")[0]
    empty = Run(RunStore.create(tmp_path / "empty", config(), {}).path)
    text = render(empty)
    parsed(text)
    assert "No trial was usable" in text
    assert "None of the 0 trials failed." in text


def test_a_run_without_training_is_shown_by_its_kl(tmp_path):
    store = RunStore.create(tmp_path / "run", config(), {})
    for i, kl in enumerate([0.3, 0.2, 0.1]):
        store.append(zero_shot(i, macs=(3 + i) * 10**6, kl=kl))
    html = render(Run(store.path))
    parsed(html)
    assert "KL to the teacher, nats (less is better)" in html
    assert "measured without training" in html


def test_the_command_names_the_file(run, tmp_path):
    path = write_report(run, tmp_path / "deep" / "r.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run.report() == run.path / NAME


def test_plots_are_written_where_there_is_data(run):
    pytest.importorskip("matplotlib")
    names = {p.name for p in write_plots(run)}
    assert names == {
        f"{n}.{s}" for n in ("front", "progress", "tokens", "importances") for s in ("png", "svg")
    }
    assert names == {p.name for p in (run.path / "plots").iterdir()}


def test_plots_without_matplotlib_are_left_out(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert write_plots(run) == []


# Charts


def test_ticks_are_round_and_inside():
    assert svg.ticks(5.2, 14.9, 5) == [6, 8, 10, 12, 14]
    assert svg.decimals([0.25, 0.5, 0.75]) == 2
    assert svg.decimals([90.0, 91.0]) == 0
    assert svg.log_ticks(0.04, 0.9) == pytest.approx([0.05, 0.1, 0.2, 0.5])


def test_points_that_cover_one_another_are_moved_apart_but_the_front_stays():
    at = dict.fromkeys(range(4), (100.0, 50.0))
    moved = charts._apart(at, fixed={0}, low=0, high=400)
    assert 0 not in moved
    xs = sorted([100.0, *(x for x, _ in moved.values())])
    assert all(b - a > 12 for a, b in itertools.pairwise(xs))
    assert {y for _, y in moved.values()} == {50.0}


def test_budgets_are_put_in_words():
    assert in_words("At macs=50%, params=5M") == "At MACs ≤ 50%, parameters ≤ 5M"


# Pictures


def test_a_patch_belongs_to_the_token_that_holds_most_of_it():
    compose_NO = torch.tensor([[0.6, 0.4, 0.0, 0.0], [0.0, 0.3, 0.7, 0.0]])
    assert pictures.owners(compose_NO, torch.tensor([0, 2])).tolist() == [0, 0, 2, -1]


def test_pictures_show_the_plan():
    """The quickstart's shipped run: tokens left after each block are those of the plan."""
    shipped = load_run(ROOT / "results" / "digits-ucc")
    best = shipped.pick()
    found = pictures.gallery(shipped, [best.id], images=2)
    assert (found.trial, found.reason) == (best.id, "")
    assert len(found.rows) == 2
    for shown in found.rows:
        left = [int(p.caption.split(": ")[1]) for p in shown if p.caption.startswith("block")]
        assert left == list(dict.fromkeys(n for n in best.tokens if n != 64))
        assert all(p.alt and p.uri.startswith("data:image/") for p in shown)
        merged, gone = map(int, re.findall(r"\d+", shown[-1].caption))
        assert merged + gone == 64 - best.tokens[-1]


def test_slate_covers_what_is_gone_and_nothing_else():
    pixels_CHW = torch.rand(3, 8, 8)
    kept = torch.ones(2, 2, dtype=torch.bool)
    assert pictures.dimmed(pixels_CHW, kept).equal(pixels_CHW)
    kept[0, 1] = False
    changed = (pictures.dimmed(pixels_CHW, kept) != pixels_CHW).any(dim=0)
    assert changed[:4, 4:].all()
    assert not changed[4:].any()
    assert not changed[:4, :4].any()


# In a browser


def test_the_shipped_report_is_small_and_of_this_version():
    text = (SHIPPED / NAME).read_text(encoding="utf-8")
    assert len(text.encode()) < 3_000_000
    for name in ("style.css", "script.js"):
        same = (ASSETS / name).read_text(encoding="utf-8") in text
        assert same, f"{name} has changed: ucc-search report results/fashion-mnist-ucc"
    tags = parsed(text)
    assert tags.images
    assert all(image.get("alt") for image in tags.images)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with Browser() as opened:
        yield opened


def test_its_numbers_equal_the_table(browser):
    browser.open(SHIPPED / NAME)
    header = browser.run(
        "[...document.querySelectorAll('#front-table thead th')].map(h => h.textContent.trim())"
    )
    shown = browser.run(
        "[...document.querySelectorAll('#front-table tbody tr[data-id]')].map(r => [...r.cells].map("
        "c => [c.textContent.trim(), c.dataset.value ?? null]))"
    )
    with open(SHIPPED / "pareto.csv", encoding="utf-8", newline="") as file:
        expected = list(csv.DictReader(file))
    assert len(shown) == len(expected) > 2
    exact = {"% of dense": "macs_ratio", "KL": "kl", "seeds": "seeds", "parameters": "params", "trial": "id"}
    exact |= {"accuracy %": "accuracy", "test %": "test_accuracy", "MMACs": "macs"}
    for cells, wanted in zip(shown, expected, strict=True):
        found = dict(zip(header, cells, strict=True))
        for name, column in exact.items():
            assert float(found[name][1]) == float(wanted[column]), (name, wanted["id"])
        for name, column in (("accuracy %", "accuracy"), ("test %", "test_accuracy")):
            mean, std = float(wanted[column]), float(wanted[f"{column}_std"])
            assert found[name][0] == f"{100 * mean:.2f} ± {100 * std:.2f}"
        assert found["MMACs"][0] == f"{int(wanted['macs']) / 1e6:.2f}"
        assert (found["method"][0], found["components"][0].split(" / ")[0]) == (
            wanted["method"],
            wanted["scorer"],
        )


def test_pointing_at_a_model_shows_its_plan(browser):
    browser.open(SHIPPED / NAME)
    front = load_run(SHIPPED).pareto().set_index("id")
    assert len(front) > 1
    for trial, point in front.iterrows():
        place = browser.run(
            f"(() => {{ const p = document.querySelector('.wide .pt[data-id=\"{trial}\"] .hit');"
            "p.scrollIntoView({block: 'center', behavior: 'instant'}); const r = p.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        browser.move(1, 1)
        browser.move(*place)
        # Two points of the front may lie under one another: then the upper one is meant.
        if browser.run("document.getElementById('detail').dataset.shown") == str(trial):
            text = browser.run("document.getElementById('detail').innerText")
            assert all(str(n) in text for n in point.tokens)
            assert f"{100 * point.accuracy:.2f}" in text
            break
    else:
        pytest.fail("no point of the front answers to the pointer")


def test_the_keyboard_reaches_every_model(browser):
    browser.open(SHIPPED / NAME)
    count = browser.run("document.querySelectorAll('.wide .pt').length")
    assert browser.run("document.querySelectorAll('.wide .pt[tabindex=\"0\"]').length") == 1
    browser.run("document.querySelector('.wide .pt[tabindex=\"0\"]').focus()")
    seen = {browser.run("document.getElementById('detail').dataset.shown")}
    for _ in range(count - 1):
        browser.press("ArrowRight")
        seen.add(browser.run("document.getElementById('detail').dataset.shown"))
    assert len(seen) == count
    browser.press("Home")
    cheapest = browser.run(
        "Math.min(...[...document.querySelectorAll('.wide .pt')].map(p => +p.dataset.macs))"
    )
    assert browser.run("+document.activeElement.dataset.macs") == cheapest


def test_tables_sort_by_value(browser):
    browser.open(SHIPPED / NAME)
    column = "[...document.querySelectorAll('#front-table tbody tr')].map(r => +r.cells[5].dataset.value)"
    button = "document.querySelectorAll('#front-table thead button')[5]"
    browser.run(f"{button}.click()")
    assert browser.run(column) == sorted(browser.run(column))
    browser.run(f"{button}.click()")
    assert browser.run(column) == sorted(browser.run(column), reverse=True)
    assert browser.run(f"{button}.parentElement.getAttribute('aria-sort')") == "descending"


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1100, True)])
def test_it_fits_every_screen_in_light_and_dark(browser, width, dark):
    browser.open(SHIPPED / NAME, width=width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    seen = browser.run("['.wide', '.narrow'].map(c => getComputedStyle(document.querySelector(c)).display)")
    assert seen == (["none", "block"] if width < 700 else ["block", "none"])
    light = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(light) > 380) is not dark


def test_nothing_was_said_on_the_console_and_nothing_was_asked_of_the_network(browser):
    """Last in the file: over all that the tests above did."""
    said = [e for e in browser.events if e["method"] in ("Runtime.consoleAPICalled", "Log.entryAdded")]
    thrown = [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"]
    asked = [
        e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"
    ]
    assert said == []
    assert thrown == []
    assert asked, "the browser reports its requests"
    assert {url for url in asked if not url.startswith("data:")} == {(SHIPPED / NAME).as_uri()}
