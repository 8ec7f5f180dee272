"""The run folder: nothing that finished is lost, nothing is written twice, refusals name what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from rows import config, row
from shapes import deit_shape

from ucc_search.environment import environment
from ucc_search.errors import BudgetError, RunError
from ucc_search.plan import CompressionPlan
from ucc_search.runs import Run, load_run
from ucc_search.store import RunStore, TrialRow, heal_journal, plan_key
from ucc_search.units import format_macs, format_params, parse_amount


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore.create(tmp_path / "run", config(), {})


def test_import_is_light():
    heavy = "{'torch', 'ray', 'optuna', 'pandas', 'pyarrow', 'deepspeed'}"
    code = f"import sys, ucc_search.store, ucc_search.analysis; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rows_come_back_as_they_went(store):
    rows = [row(0), row(1, state="failed", failure="nan_loss", error="loss is NaN", accuracy=None)]
    for one in rows:
        store.append(one)
    assert store.rows() == rows


@pytest.mark.parametrize("torn", [b'{"id": 1, "sta', b'{"id": 1}', b"\0\0\0\0"])
def test_torn_last_line_is_ignored_then_overwritten(store, torn):
    store.append(row(0))
    with open(store.path / "trials.jsonl", "ab") as file:
        file.write(torn)
    assert [r.id for r in store.rows()] == [0]
    store.append(row(1))
    assert [r.id for r in store.rows()] == [0, 1]
    assert (store.path / "trials.jsonl").read_bytes().count(b"\n") == 2


def test_damage_in_the_middle_is_named_and_loses_nothing(store):
    for i in range(3):
        store.append(row(i))
    path = store.path / "trials.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    damaged = "".join([lines[0], lines[1][:40] + "\n", lines[2]])
    path.write_text(damaged)
    for use in (store.rows, lambda: store.append(row(3))):
        with pytest.raises(
            RunError, match=r"line 2 of 3 cannot be read; .* other 2 are whole.*delete line 2"
        ):
            use()
    assert path.read_text() == damaged
    # What a kill tears has no end.
    for rubbish, named in (("{\n", "line 1 of 1 "), ("{\n{}\n[\n", "lines 1, 3 of 3 ")):
        path.write_text(rubbish)
        with pytest.raises(RunError, match=named):
            store.rows()


def test_a_record_that_is_gone_is_no_run_without_trials(store):
    assert store.rows() == []
    (store.path / "trials.jsonl").unlink()
    (store.path / "trials" / "0").mkdir(parents=True)
    for use in (store.rows, lambda: store.append(row(0)), Run(store.path).summary):
        with pytest.raises(
            RunError, match=r"trials.jsonl is missing.*folders of 1 trials are left.*from a copy"
        ):
            use()
    assert not (store.path / "trials.jsonl").exists()


def test_records_are_read_once_however_many_are_appended(store, monkeypatch):
    """Parsed anew each time, a run of n trials would take n squared."""
    store.append(row(0))
    again, reads = RunStore.open(store.path), []
    parse = RunStore._lines
    monkeypatch.setattr(RunStore, "_lines", lambda self: reads.append(1) or parse(self))
    for i in range(1, 6):
        again.append(row(i))
    assert len(reads) == 1
    monkeypatch.undo()
    assert [r.id for r in store.rows()] == list(range(6))


@pytest.fixture
def full_disk():
    """Files may not grow beyond so many bytes, as if the disk had no more."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_in_a_sentence_and_leaves_the_record_whole(store, full_disk):
    store.append(row(0))
    path = store.path / "trials.jsonl"
    before = path.read_bytes()
    full_disk(len(before) + 100)
    with pytest.raises(RunError, match=r"cannot be written \(File too large\).*go on with --resume"):
        store.append(row(1))
    assert path.read_bytes() == before
    full_disk(10 * len(before))
    store.append(row(1))
    assert [r.id for r in store.rows()] == [0, 1]


def test_a_full_disk_leaves_no_half_of_a_trial_folder(store, full_disk):
    plan = CompressionPlan.identity(deit_shape("tiny"))
    full_disk(50)
    with pytest.raises(RunError, match="cannot be written"):
        store.write_trial(0, {}, plan)
    assert [p.name for p in store.folder(0).iterdir()] == ["params.json"]


def test_the_study_is_healed_of_what_a_kill_left(tmp_path):
    journal = tmp_path / "study.journal"
    journal.write_text('{"op_code":0}\n{"op_')
    (tmp_path / "study.journal.lock").symlink_to(journal)
    (tmp_path / "study.journal.lock1234.rename").symlink_to(journal)
    heal_journal(journal)
    assert journal.read_text() == '{"op_code":0}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["study.journal"]
    heal_journal(tmp_path / "none yet")


def test_a_folder_that_was_never_finished_is_taken_over(tmp_path):
    """A kill while it was made leaves the environment but no configuration: neither a run nor in the way."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "environment.json").write_text("{}")
    (tmp_path / "run" / "config.resolved.yaml.part").write_text("na")
    assert RunStore.create(tmp_path / "run", config(), {}).rows() == []


def test_line_without_required_keys_is_named(store):
    (store.path / "trials.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(RunError, match="line 1 of 1 is not a trial"):
        store.rows()


def test_keys_of_a_newer_version_are_ignored(store):
    newer = {**row(0).to_dict(), "joules": 3.5, "nested": {"a": 1}}
    (store.path / "trials.jsonl").write_text(json.dumps(newer) + "\n")
    assert store.rows() == [row(0)]


def test_nan_and_odd_values_do_not_lose_the_trial(store):
    store.append(row(0, loss=float("nan"), kl=float("inf"), params_searched={"path": Path("a"), "x": (1, 2)}))
    read = store.rows()[0]
    assert read.loss is None
    assert read.kl is None
    assert read.params_searched == {"path": "a", "x": [1, 2]}


def test_overhead_is_what_computing_leaves():
    assert row(0, seconds=10.0, compute_seconds=7.5).overhead_seconds == 2.5
    assert row(0, seconds=10.0, overhead_seconds=1.0).overhead_seconds == 1.0
    assert row(0, seconds=10.0).overhead_seconds is None


def test_create_refuses_a_folder_in_use(store):
    with pytest.raises(RunError, match="--resume"):
        RunStore.create(store.path, config(), {})


def test_create_takes_an_empty_folder_and_refuses_a_file(tmp_path):
    (tmp_path / "empty").mkdir()
    RunStore.create(tmp_path / "empty", config(), {})
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose another --out"):
        RunStore.create(tmp_path / "file", config(), {})
    with pytest.raises(RunError, match="choose another --out"):
        RunStore.create(tmp_path / "file" / "below", config(), {})


def test_open_suggests_a_sibling(store):
    with pytest.raises(RunError, match="did you mean 'run'"):
        RunStore.open(store.path.parent / "rum")
    with pytest.raises(RunError, match="not a run folder"):
        load_run(store.path / "no" / "where")


def test_resume_allows_more_trials(store):
    more = config(search={"trials": 99, "concurrency": 2})
    assert RunStore.resume(store.path, more).config() == more


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"search": {"seed": 1}}, "search.seed: 0, now it is 1"),
        ({"budget": {"macs": ["75%"]}}, "budget.macs"),
        ({"train": {"steps": 5}}, "train.epochs: 1.0, now it is not set"),
        ({"baselines": [{"name": "a"}]}, "baselines"),
    ],
)
def test_resume_refuses_another_configuration(store, changes, key):
    before = (store.path / "config.resolved.yaml").read_text()
    with pytest.raises(RunError, match=key.replace(".", r"\.")):
        RunStore.resume(store.path, config(**changes))
    assert (store.path / "config.resolved.yaml").read_text() == before


def test_resume_takes_a_run_from_before_the_average_had_options(tmp_path):
    before = RunStore.create(tmp_path / "run", config(train={"epochs": 1, "ema": 0.999}), {})
    path = before.path / "config.resolved.yaml"
    written = path.read_text()
    mapping = "  ema:\n    decay: 0.999\n    ramp: false\n    every: step\n"
    assert mapping in written
    path.write_text(written.replace(mapping, "  ema: 0.999\n").replace("    cutmix_fold: false\n", ""))
    assert "cutmix_fold" not in path.read_text()
    RunStore.resume(before.path, config(train={"epochs": 1, "ema": {"decay": 0.999}}))
    assert path.read_text() == written
    with pytest.raises(RunError, match=r"train\.ema\.every: 'step', now it is 'epoch'"):
        RunStore.resume(before.path, config(train={"epochs": 1, "ema": {"decay": 0.999, "every": "epoch"}}))


def test_resume_names_the_entry_of_a_list(tmp_path):
    store = RunStore.create(tmp_path / "run", config(baselines=[{"name": "a", "scorer": "random"}]), {})
    with pytest.raises(RunError, match=r"baselines\[0\]\.scorer\[0\]\.name: 'random', now it is 'joint'"):
        RunStore.resume(store.path, config(baselines=[{"name": "a", "scorer": "joint"}]))


def test_second_process_is_refused_until_the_first_ends(store):
    code = (
        "import sys; from ucc_search.store import RunStore; from ucc_search.errors import RunError\n"
        "try:\n    with RunStore.open(sys.argv[1]).lock(): print('free')\n"
        "except RunError as error: print(error)"
    )

    def other_process() -> str:
        command = [sys.executable, "-c", code, str(store.path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with store.lock():
        assert "another ucc-search is writing" in other_process()
        with pytest.raises(RunError, match="another ucc-search"):
            RunStore.resume(store.path, config(search={"trials": 99}))
    assert other_process().strip() == "free"


def test_trial_folder(store):
    plan = CompressionPlan.identity(deit_shape("tiny"))
    store.write_trial(3, {"ratio": 0.5}, plan, [{"step": 1, "loss": float("nan")}])
    folder = store.path / "trials" / "3"
    assert json.loads((folder / "params.json").read_text()) == {"ratio": 0.5}
    assert CompressionPlan.from_json((folder / "plan.json").read_text()) == plan
    assert json.loads((folder / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}
    store.write_trial(3, {}, plan)
    assert (folder / "metrics.jsonl").read_text() == ""


def test_plan_key_follows_the_integers():
    plan = CompressionPlan.identity(deit_shape("tiny"))
    assert plan_key(plan) == plan_key(CompressionPlan.from_json(plan.to_json()))
    assert plan_key(plan) != plan_key(plan.replace(tokens_out=100))
    assert len(plan_key(plan)) == 16


def test_tables_hold_every_row_and_column(store):
    import pandas as pd

    store.append(row(0))
    store.append(row(1, state="failed", failure="timeout", accuracy=None, parent=0, params_searched={"a": 1}))
    Run(store.path).write_tables()
    for table in (pd.read_csv(store.path / "trials.csv"), pd.read_parquet(store.path / "trials.parquet")):
        assert list(table.columns) == [f.name for f in fields(TrialRow)]
        assert list(table["id"]) == [0, 1]
        assert json.loads(table["tokens"][0]) == row(0).tokens
        assert json.loads(table["params_searched"][1]) == {"a": 1}
    front = pd.read_csv(store.path / "pareto.csv")
    assert list(front["id"]) == [0]
    assert not list(store.path.glob("*.part"))


def test_tables_of_an_empty_run_have_their_columns(store):
    import pandas as pd

    Run(store.path).write_tables()
    assert list(pd.read_parquet(store.path / "trials.parquet").columns) == [f.name for f in fields(TrialRow)]
    assert "accuracy" in pd.read_csv(store.path / "pareto.csv").columns


def test_interrupted_table_keeps_the_old_one(store, monkeypatch):
    store.append(row(0))
    Run(store.path).write_tables()
    before = (store.path / "trials.csv").read_bytes()
    store.append(row(1))

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Run(store.path).write_tables()
    assert (store.path / "trials.csv").read_bytes() == before
    assert not list(store.path.glob("*.part"))


def test_frame_types_do_not_depend_on_what_is_missing(store):
    store.append(row(0, parent=None, loss=None, limit_macs=None))
    first = load_run(store.path).trials().dtypes
    store.append(row(1, parent=0, loss=0.5, limit_macs=9))
    both = load_run(store.path).trials()
    assert (first == both.dtypes).all()
    assert both["parent"].iloc[1] == 0
    assert both["tokens"].iloc[0] == row(0).tokens


def test_run_reads_the_folder(store):
    store.append(row(0, macs=3_000_000, accuracy=0.8))
    store.append(row(1, macs=5_000_000, accuracy=0.9))
    store.append(row(2, state="failed", failure="error"))
    run = Run(store.path)
    assert run.config == config()
    assert list(run.pareto()["id"]) == [0, 1]
    assert run.pick(max_macs="4M").id == 0
    assert run.pick(max_params=10**6).id == 1
    with pytest.raises(BudgetError, match="max_macs"):
        run.pick(max_macs="half")
    summary = json.loads(json.dumps(run.summary()))
    assert (summary["trials"], summary["ok"], summary["failed"]) == (3, 2, 1)


def test_environment_is_json_and_names_versions():
    found = json.loads(json.dumps(environment(config(search={"seeds": [1, 2]}), [{"name": "x"}])))
    assert found["versions"]["torch"]
    assert found["seeds"] == [1, 2]
    assert found["plugins"] == [{"name": "x"}]
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2.1G", 2_100_000_000),
        ("4.35G", 4_350_000_000),
        ("600M", 600_000_000),
        (" 12 k ", 12_000),
        ("4500000000", 4_500_000_000),
        ("4_500", 4_500),
        (4.5e9, 4_500_000_000),
        (1e22, 10**22),
        (2**60 + 1, 2**60 + 1),
        ("1.9", 1),
    ],
)
def test_amounts(value, expected):
    assert parse_amount(value) == expected


@pytest.mark.parametrize(
    "value", ["", "half", "-3", "0", "0.5", "50%", "2.1GMACs", "1e999", "nan", True, float("inf")]
)
def test_bad_amounts_name_the_key(value):
    with pytest.raises(BudgetError, match=r"budget\.macs is .* expected an amount"):
        parse_amount(value, key="budget.macs")


def test_amounts_as_tables_show_them():
    assert format_macs(610_000_000) == "0.61 GMACs"
    assert format_macs(8_310_000) == "8.31 MMACs"
    assert format_params(5_720_000) == "5.72 M parameters"
    assert format_params(97_500) == "97.5 k parameters"
