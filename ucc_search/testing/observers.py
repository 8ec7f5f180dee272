"""The contract of observers, line by line."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ucc_search.interfaces import Observer
from ucc_search.testing.core import Broken, Check

_ROW: Mapping[str, Any] = {
    "id": 0,
    "state": "ok",
    "method": "search",
    "rung": "train",
    "macs": 10,
    "accuracy": 0.5,
}
_FAILED: Mapping[str, Any] = {**_ROW, "id": 1, "state": "failed", "accuracy": None, "error": "out of memory"}


def events_are_taken(observer: Observer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        for _ in range(2):  # a run that is resumed starts again
            observer.run_started(path, {"name": "conformance", "search": {"trials": 2}})
            for row in (_ROW, _FAILED):
                given = dict(row)
                observer.trial_finished(given)
                if given != row:
                    raise Broken("changed the row", "copy it: dict(row)", method="trial_finished")
            observer.run_finished(path)


OBSERVER_CHECKS = (Check("events", "takes every event, and changes no row", events_are_taken),)
