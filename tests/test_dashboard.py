"""optuna-dashboard on a run that goes on: it opens the run folder's journal and sees trials as they come."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tiny import write_space

pytestmark = pytest.mark.slow
PATIENCE = 120.0  # seconds


def await_value(ask, holds):
    """What `ask` gives once it holds."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if holds(value := ask()):
                return value
        except OSError:
            value = None  # nobody answers yet
        assert time.monotonic() < deadline, value
        time.sleep(0.1)


def test_the_study_opens_while_the_run_goes_on(tmp_path):
    pytest.importorskip("optuna_dashboard")
    out = tmp_path / "run"
    space = write_space(tmp_path, search={"trials": 400, "promote": 0})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    search = [sys.executable, "-m", "ucc_search", "search", str(space), "--out", str(out)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen(search, env={**os.environ, "UCC_SEARCH_CACHE": str(tmp_path / "cache")}, **quiet)
    dashboard = None

    def finished() -> int:
        record = out / "trials.jsonl"
        return record.read_bytes().count(b"\n") if record.exists() else 0

    def api(path: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=30) as answer:
            return json.load(answer)

    try:
        await_value(finished, lambda count: count >= 4)
        command = Path(sys.executable).with_name("optuna-dashboard")
        dashboard = subprocess.Popen([command, out / "study.journal", "--port", str(port)], **quiet)
        studies = await_value(lambda: api("studies")["study_summaries"], lambda found: len(found) == 2)
        assert [s["study_name"] for s in studies] == ["tiny macs=70%", "tiny macs=50%"]
        before = api("studies/0")["trials"]
        assert {t["state"] for t in before} == {"Complete"}
        assert run.poll() is None, "the run ended before anybody looked at it"
        more = await_value(lambda: api("studies/0")["trials"], lambda now: len(now) > len(before))
        assert more[: len(before)] == before
        rows = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
        kls = {r["id"]: r["kl"] for r in rows}
        for trial in more:
            attributes = {a["key"]: a["value"] for a in trial["user_attrs"]}
            assert trial["values"] == [kls[int(attributes["trial"])]]
    finally:
        for process in filter(None, (dashboard, run)):
            process.terminate()
            process.wait()
