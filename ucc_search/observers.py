"""Tell the observers of a run what happens, and let none of them harm it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ucc_search.interfaces import ComponentRef, Observer
from ucc_search.plugins import Plugins

Log = Callable[[str], None]


class Observers:
    """Those of one run, in the order of the space file.

    Args:
        named: name and observer; one that raises is told nothing more.
        log: gets one line when that happens.
    """

    def __init__(self, named: Sequence[tuple[str, Observer]], log: Log = lambda text: None) -> None:
        self._active, self._log = list(named), log

    @classmethod
    def named(cls, refs: Sequence[ComponentRef], plugins: Plugins, log: Log = lambda text: None) -> Observers:
        """Build the observers of a space file.

        Raises:
            PluginError: an unknown name or parameter.
        """
        return cls([(ref.name, plugins.build("observer", ref)) for ref in refs], log)

    def add(self, name: str, observer: Observer) -> None:
        self._active.append((name, observer))

    def run_started(self, run_path: Path, config: Mapping[str, Any]) -> None:
        self._tell("run_started", run_path, config)

    def trial_finished(self, row: Mapping[str, Any]) -> None:
        self._tell("trial_finished", row)

    def run_finished(self, run_path: Path) -> None:
        self._tell("run_finished", run_path)

    def _tell(self, event: str, *values: Any) -> None:
        for entry in list(self._active):
            name, observer = entry
            try:
                getattr(observer, event)(*values)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a tracker may even exit; the trials are worth more
                self._active.remove(entry)
                reason = " ".join(str(error).split())
                self._log(
                    f"observer {name!r} failed in {event} and is told nothing more: {type(error).__name__}: {reason}"
                )
