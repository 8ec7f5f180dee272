"""Observers are told everything once, in order, and cannot harm the run."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_config

from ucc_search.errors import PluginError
from ucc_search.interfaces import ComponentRef, Observer
from ucc_search.observers import Observers
from ucc_search.plugins import Plugins
from ucc_search.runner import search
from ucc_search.store import MAY_CHANGE, RunStore

DIARY = '''
import json
from ucc_search import Observer, hookimpl


class Diary(Observer):
    """Writes down what it is told."""

    def __init__(self, path: str, angry_at: str = ""):
        self.path, self.angry_at = path, angry_at

    def _note(self, event, value):
        with open(self.path, "a") as file:
            file.write(json.dumps([event, value]) + "\\n")
        if event == self.angry_at:
            raise SystemExit("no server")

    def run_started(self, run_path, config):
        self._note("started", [str(run_path), config["search"]["trials"]])

    def trial_finished(self, row):
        self._note("trial", row)

    def run_finished(self, run_path):
        self._note("finished", (run_path / "trials.csv").is_file())


@hookimpl
def ucc_observers():
    return {"diary": Diary}
'''


def test_a_run_tells_its_observers_and_outlives_them(tmp_path):
    plugin = tmp_path / "diary.py"
    plugin.write_text(DIARY)
    calm, angry = tmp_path / "calm.jsonl", tmp_path / "angry.jsonl"
    config = tiny_config(
        search={"trials": 1, "promote": 0},
        budget={"macs": "60%"},
        plugins=[str(plugin)],
        observers=[
            {"name": "diary", "path": str(angry), "angry_at": "trial"},
            {"name": "diary", "path": str(calm)},
        ],
    )
    lines: list[str] = []
    run = search(config, out=tmp_path / "run", log=lines.append)
    events = [json.loads(line) for line in calm.read_text().splitlines()]
    assert events[0] == ["started", [str(run.path), 1]]
    assert [row["id"] for event, row in events[1:-1] if event == "trial"] == [r.id for r in run.rows]
    assert events[1][1] == json.loads(json.dumps(run.rows[0].to_dict()))
    assert events[-1] == ["finished", True]
    assert len(angry.read_text().splitlines()) == 2  # started, and the trial it failed at
    told = [line for line in lines if "diary" in line]
    assert told == [
        "observer 'diary' failed in trial_finished and is told nothing more: SystemExit: no server"
    ]
    # Other observers may watch a resumed run, which reads back what it wrote.
    assert "observers" in MAY_CHANGE
    RunStore.resume(run.path, config)
    RunStore.resume(run.path, config.model_copy(update={"observers": ()}))


def test_an_unknown_observer_is_refused_before_the_run(tmp_path):
    plugins = Plugins.load(entry_points=False, environment=False)
    with pytest.raises(PluginError, match="unknown observer 'diray'"):
        Observers.named([ComponentRef("diray")], plugins)
    with pytest.raises(PluginError, match="unknown observer"):
        search(tiny_config(observers="diray"), out=tmp_path / "run", plugins=plugins)
    assert not (tmp_path / "run").exists()


def test_an_interrupt_from_an_observer_stops_the_run():
    class Stop(Observer):
        def trial_finished(self, row):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Observers([("stop", Stop())]).trial_finished({})
