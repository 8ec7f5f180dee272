"""Following a run: its status from any process, the live view, and the trackers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from rich.console import Console
from rows import config, row, zero_shot
from tiny import tiny_config

from ucc_search.builtin import trackers
from ucc_search.errors import PluginError
from ucc_search.interfaces import ComponentRef
from ucc_search.live import LiveView, status_line, status_text
from ucc_search.observers import Observers
from ucc_search.plugins import Plugins
from ucc_search.runner import search
from ucc_search.status import run_status, status_of

START = datetime(2030, 1, 1, tzinfo=timezone.utc)
RUN = config(search={"trials": 10, "promote": 1, "seeds": [0, 1]})


def at(seconds: float) -> str:
    return (START + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def proposals(count: int, every: float = 6.0):
    return [zero_shot(i, kl=0.5 - 0.01 * i, finished_at=at(every * i)) for i in range(count)]


# Status


def test_done_planned_and_the_time_left():
    status = status_of(RUN, proposals(4))
    first, second = status.rungs
    assert (first.name, first.done, first.planned, first.pace) == ("zero-shot", 4, 10, 6.0)
    assert first.left == pytest.approx(36.0)
    assert (second.name, second.done, second.planned) == ("train", 0, 4)
    assert status.left == pytest.approx(36.0)
    assert status.more, "how long a training takes is not known yet"
    assert "at least 36 s left" in status_line(status)


def test_the_pace_is_that_of_the_last_trials():
    """The first ones wait for workers to load data and teacher."""
    slow = proposals(2, every=100.0)
    late = [zero_shot(10 + i, finished_at=at(200 + i)) for i in range(20)]
    assert status_of(RUN, [*slow, *late]).rungs[0].pace == pytest.approx(1.0)


def test_best_so_far_stands_beside_the_best_baseline():
    rows = [
        *proposals(3),
        zero_shot(3, kl=0.01, feasible=False, finished_at=at(20)),
        zero_shot(4, kl=0.47, method="evit", origin="baseline", finished_at=at(24)),
        row(5, accuracy=0.8, fidelity=50, finished_at=at(30)),
        row(6, accuracy=0.7, fidelity=50, finished_at=at(40)),
        row(7, state="failed", failure="nan_loss", kl=None, accuracy=None, fidelity=0, finished_at=at(50)),
    ]
    status = status_of(RUN, rows)
    untrained, trained = status.best
    assert (untrained.rung, untrained.search) == ("zero-shot", (2, 0.48)), "what is over budget is no best"
    assert (untrained.baseline_name, untrained.baseline) == ("evit", (4, 0.47))
    assert (trained.measure, trained.search) == ("accuracy", (5, 0.8))
    assert status.failures == {"nan_loss": 1}
    assert status.rungs[1].done == 3 and status.rungs[1].failed == 1
    text = status_text(status)
    assert "best train at macs=50%: search 80.00 % (5)" in text
    assert "failed: 1 nan_loss" in text
    json.dumps(status.to_dict())


def test_rungs_of_a_ladder_are_told_apart_by_their_length():
    ladder = [
        {"rung": "zero-shot"},
        {"rung": "train", "steps": 10, "keep": 4},
        {"rung": "train", "keep": 1},
    ]
    run = config(search={"trials": 10, "ladder": ladder}, train={"steps": 30})
    rows = [
        *proposals(10),
        *(row(20 + i, fidelity=10, state="stopped") for i in range(8)),
        row(30, fidelity=30),
    ]
    done = {r.name: r.done for r in status_of(run, rows).rungs}
    assert done == {"zero-shot": 10, "train to step 10": 8, "train": 1}


# Whole runs


MLRUNS = "mlruns"


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A small run that every tracker is told of, and a plain view; also what was seen while it went on."""
    folder = tmp_path_factory.mktemp("followed")
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCC_SEARCH_CACHE", str(folder / "cache"))
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("WANDB_MODE", "offline")
        out = io.StringIO()
        view = LiveView(Console(file=out, width=100))

        def log(line: str) -> None:
            view.log(line)
            if line.startswith("[2]"):
                seen["status"] = run_status(folder / "run")
                seen["study"] = loaded_elsewhere(folder / "run")

        run = search(
            tiny_config(
                budget={"macs": ["50%"]},
                search={"trials": 4},
                teacher={"steps": 2},
                observers=[
                    "tensorboard",
                    {"name": "mlflow", "tracking_uri": (folder / MLRUNS).as_uri()},
                    "wandb",
                ],
            ),
            out=folder / "run",
            log=log,
            view=view,
        )
        return run, seen, out.getvalue()


def loaded_elsewhere(run: Path) -> int:
    """Trials of the study as another process (optuna-dashboard) reads it."""
    code = (
        "import optuna, sys; from optuna.storages.journal import JournalFileBackend\n"
        "storage = optuna.storages.JournalStorage(JournalFileBackend(sys.argv[1]))\n"
        "print(sum(len(s.trials) for s in optuna.get_all_study_summaries(storage) for s in"
        " [optuna.load_study(study_name=s.study_name, storage=storage)]))"
    )
    command = [sys.executable, "-c", code, str(run / "study.journal")]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_status_says_running_while_it_runs_and_finished_after(followed):
    run, seen, _ = followed
    assert (seen["status"].state, seen["status"].rungs[0].done) == ("running", 3)
    after = run_status(run.path)
    assert after.state == "finished"
    assert [(r.done, r.planned) for r in after.rungs] == [(4, 4), (1, 1)]


def test_the_study_opens_in_another_process_while_the_run_goes_on(followed):
    assert followed[1]["study"] == 3


def test_trackers_do_not_disturb_the_run(followed):
    assert "told nothing more" not in followed[2]


def test_the_event_files_hold_trials_and_loss_curves(followed):
    (file,) = (followed[0].path / "tensorboard").glob("events.out.tfevents.*")
    content = file.read_bytes()
    for name in (b"zero-shot/search_macs_50_percent/kl", b"training_of_trial_5/loss", b"run/failed"):
        assert name in content


def test_mlflow_holds_a_run_for_every_trial(followed, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = followed[0]
    client = MlflowClient(tracking_uri=(run.path.parent / MLRUNS).as_uri())
    home = client.get_experiment_by_name("tiny")
    runs = client.search_runs([home.experiment_id])
    children = {r.info.run_name: r for r in runs if "mlflow.parentRunId" in r.data.tags}
    assert len(children) == len(run.rows) and len(runs) == len(run.rows) + 1
    for row_ in run.rows:
        assert children[f"trial {row_.id}"].data.metrics["kl"] == pytest.approx(row_.kl)
    (trained,) = (r for r in run.rows if r.parent is not None)
    curve = client.get_metric_history(children[f"trial {trained.id}"].info.run_id, "training_loss")
    assert [m.step for m in curve] == [1, 2]


def test_wandb_leaves_an_offline_run(followed):
    assert list((followed[0].path / "wandb").glob("offline-run-*/run-*.wandb"))


# The view


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_table_takes_the_place_of_the_trials_lines(followed):
    run, out = followed[0], Terminal()
    view = LiveView(Console(file=out, width=100, force_terminal=True))
    view.run_started(run.path, json.loads(json.dumps(plain(run))))
    view.log("[4] search macs=50% zero-shot: KL 0.1")
    view.log("[5] search macs=50% zero-shot: failed (nan_loss: it is nan)")
    view.trial_finished(run.rows[-1].to_dict())
    view.run_finished(run.path)
    view.log("done")
    text = out.getvalue()
    assert "4 / 4" in text and "zero-shot" in text
    assert "[4] search" not in text
    assert "nan_loss" in text and "done" in text


def plain(run):
    from ucc_search.config import plain_config

    return plain_config(run.config)


def test_a_tracker_whose_package_is_missing_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for name, package in (("tensorboard", "tensorboardX"), ("mlflow", "mlflow"), ("wandb", "wandb")):
        with pytest.raises(PluginError, match=rf"needs the package {package}; .*ucc-search\[{name}\]"):
            Observers.named([ComponentRef(name)], Plugins.load())


def test_a_view_that_breaks_is_told_nothing_more():
    lines: list[str] = []
    observers = Observers((), lines.append)
    observers.add("view", LiveView(Console(file=io.StringIO())))
    observers.trial_finished({"id": 0})
    observers.trial_finished({"id": 1})
    assert len(lines) == 1 and "'view' failed in trial_finished" in lines[0]
