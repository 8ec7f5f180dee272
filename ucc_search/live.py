"""A run while it goes on: one table that stays in place on a terminal, plain lines elsewhere. No torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ucc_search.config import RunConfig, parse_config
from ucc_search.interfaces import Observer
from ucc_search.status import Best, Status, duration, failures_text, status_of
from ucc_search.store import RunStore, TrialRow

EVERY = 30.0
"""Seconds from one line on progress to the next, where there is no terminal."""


class LiveView(Observer):
    """Shows a run to people; also takes its log lines, so that the two do not write over one another."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._rows: list[TrialRow] = []
        self._config: RunConfig | None = None
        self._told = time.monotonic()

    def log(self, line: str) -> None:
        """A line of the run's log; one on a trial that went well is left to the table."""
        if self._live is None:
            self._console.out(line, highlight=False)
        elif not line.startswith("[") or ": failed (" in line:
            self._live.console.out(line, highlight=False)

    def run_started(self, run_path: Path, config: Mapping[str, Any]) -> None:
        self._config, self._rows = parse_config(config), RunStore.open(run_path).rows()
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, refresh_per_second=2, transient=True)
            self._live.start()

    def trial_finished(self, row: Mapping[str, Any]) -> None:
        self._rows.append(TrialRow.from_dict(row))
        if self._live is not None:
            self._live.update(self._table())
        elif time.monotonic() - self._told > EVERY:
            self._told = time.monotonic()
            self._console.out(status_line(self._status()), highlight=False)

    def run_finished(self, run_path: Path) -> None:
        self.close()

    def close(self) -> None:
        """Free the terminal, however the run ended."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _status(self) -> Status:
        assert self._config is not None
        return status_of(self._config, self._rows)

    def _table(self) -> RenderableType:
        return status_table(self._status())


def status_line(status: Status) -> str:
    """The status in one line."""
    done = ", ".join(f"{r.done}/{r.planned} {r.name}" for r in status.rungs)
    best = "; ".join(f"{b.target} {_value(b, b.search)}" for b in _newest(status.best) if b.search)
    parts = [f"{status.name}: {done}", f"best {best}" if best else "", left_text(status)]
    parts.append(answered_text(status))
    parts.append(f"failed: {failures_text(status.failures)}" if status.failures else "")
    return "; ".join(filter(None, parts))


def status_text(status: Status) -> str:
    """The status as plain lines, for a pipe."""
    lines = [f"{status.name}: {status.state}; {left_text(status)}"]
    for rung in status.rungs:
        failed = f", {rung.failed} failed" if rung.failed else ""
        lines.append(f"  {rung.name}: {rung.done} of {rung.planned} trials{failed}")
    for best in status.best:
        fixed = f", {best.baseline_name} {_value(best, best.baseline)}" if best.baseline else ""
        lines.append(f"  best {best.rung} at {best.target}: search {_value(best, best.search)}{fixed}")
    if status.answered:
        lines.append(f"  {answered_text(status)}")
    if status.failures:
        lines.append(f"  failed: {failures_text(status.failures)}")
    return "\n".join(lines)


def status_table(status: Status) -> RenderableType:
    """The status as one table, for a terminal."""
    rungs = Table(title=Text(f"{status.name}: {status.state}; {left_text(status)}"), title_justify="left")
    for name in ("rung", "trials", "failed", "s a trial", "left"):
        rungs.add_column(name, justify="left" if name == "rung" else "right")
    for r in status.rungs:
        pace = "-" if r.pace is None else f"{r.pace:.1f}"
        left = "-" if r.left is None else duration(r.left)
        rungs.add_row(Text(r.name), f"{r.done} / {r.planned}", str(r.failed), pace, left)
    parts: list[RenderableType] = [rungs]
    if status.best:
        best = Table()
        for name in ("budget", "rung", "search (trial)", "best baseline (trial)"):
            best.add_column(name, justify="left" if name in ("budget", "rung") else "right")
        for b in status.best:
            fixed = f"{b.baseline_name} {_value(b, b.baseline)}" if b.baseline else "-"
            best.add_row(Text(b.target), Text(b.rung), _value(b, b.search), Text(fixed))
        parts.append(best)
    if status.answered:
        parts.append(Text(answered_text(status)))
    if status.failures:
        parts.append(Text(f"failed: {failures_text(status.failures)}"))
    return Group(*parts)


def answered_text(status: Status) -> str:
    return f"{status.answered} answered from the store" if status.answered else ""


def left_text(status: Status) -> str:
    if status.state == "finished":
        return "all trials are done"
    if status.left is None:
        return "time left is not known yet"
    if status.state == "stopped" and not status.left and not status.more:
        return "all trials are done, but the run was not ended here (--resume ends it)"
    if status.state == "stopped":
        return f"{'at least ' if status.more else 'about '}{duration(status.left)} to go with --resume"
    return f"{'at least ' if status.more else 'about '}{duration(status.left)} left"


def _value(best: Best, pair: tuple[int, float] | None) -> str:
    if pair is None:
        return "-"
    shown = f"KL {pair[1]:.4f}" if best.measure == "KL" else f"{100 * pair[1]:.2f} %"
    return f"{shown} ({pair[0]})"


def _newest(best: tuple[Best, ...]) -> list[Best]:
    """Of each budget, the entry of the highest rung."""
    return list({b.target: b for b in best}.values())
