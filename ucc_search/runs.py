"""A run folder for reading: trials and front as pandas frames, the best trial under limits, the tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ucc_search.analysis import Point, best_under, pareto_front
from ucc_search.config import RunConfig
from ucc_search.store import RunStore, TrialRow, replace_text, replacing
from ucc_search.units import parse_amount

if TYPE_CHECKING:
    import pandas as pd


class Run:
    """A finished or running search, for reading.

    Attributes:
        path: the run folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._store = RunStore.open(self.path)

    @property
    def config(self) -> RunConfig:
        """The resolved space file."""
        return self._store.config()

    @property
    def rows(self) -> list[TrialRow]:
        """All finished trials, read anew each time."""
        return self._store.rows()

    def trials(self) -> pd.DataFrame:
        """One row a trial; the columns are the fields of `TrialRow`."""
        return _frame(self.rows, TrialRow)

    def pareto(self, rung: str | None = None, by: str | None = None) -> pd.DataFrame:
        """The front of one rung, repeated seeds averaged, cheapest first.

        Args:
            rung: `train` or `zero-shot`; the most expensive one present by default.
            by: `accuracy` or `kl`; by default accuracy of trained models and KL of untrained ones.

        Returns:
            Columns are the fields of `analysis.Point`. The dense model is not among the rows.
        """
        return _frame(pareto_front(self.rows, rung, by), Point)

    def pick(self, *, max_macs: int | str | None = None, max_params: int | str | None = None) -> TrialRow:
        """The best trial under these limits, by selection accuracy (by KL in a zero-shot run).

        Args:
            max_macs: for one image, a number or a text such as "2.1G"; likewise `max_params`.

        Raises:
            RunError: no trial fits.
            BudgetError: a limit is no amount.
        """
        macs = None if max_macs is None else parse_amount(max_macs, key="max_macs")
        params = None if max_params is None else parse_amount(max_params, key="max_params")
        return best_under(self.rows, max_macs=macs, max_params=params, where=str(self.path))

    def summary(self) -> dict[str, Any]:
        """The run in a few numbers; JSON-able."""
        rows = self.rows
        return {
            "path": str(self.path),
            "name": self.config.name,
            "model": self.config.model.name,
            "data": self.config.data.name,
            "trials": len(rows),
            "ok": sum(r.state == "ok" for r in rows),
            "failed": sum(r.state == "failed" for r in rows),
            "infeasible": sum(r.state == "ok" and not r.feasible for r in rows),
            "rungs": dict(Counter(r.rung for r in rows)),
            "targets": list(dict.fromkeys(r.target for r in rows if r.origin != "dense")),
            "seconds": sum(r.seconds for r in rows),
        }

    def write_tables(self) -> None:
        """`trials.csv`, `trials.parquet` and `pareto.csv`, each replaced as a whole.

        Lists and mappings are JSON text in them.
        """
        trials = _with_json_text(self.trials())
        replace_text(self.path / "trials.csv", trials.to_csv(index=False))
        with replacing(self.path / "trials.parquet") as temporary:
            trials.to_parquet(temporary, index=False)
        replace_text(self.path / "pareto.csv", _with_json_text(self.pareto()).to_csv(index=False))


def load_run(path: str | Path) -> Run:
    """Open a run folder for reading; RunError if it is none."""
    return Run(path)


def _frame(items: Sequence[Any], kind: type) -> pd.DataFrame:
    """A table of dataclasses, with the same column types however many values are missing."""
    import pandas as pd

    types = {"int | None": "Int64", "int": "int64", "float": "float64", "float | None": "float64"}
    frame = pd.DataFrame([asdict(item) for item in items], columns=[f.name for f in fields(kind)])
    return frame.astype({f.name: types[str(f.type)] for f in fields(kind) if f.type in types})


def _with_json_text(frame: pd.DataFrame) -> pd.DataFrame:
    """Lists and mappings as text, which csv and parquet both keep."""
    nested = [c for c in frame.columns if frame[c].map(lambda v: isinstance(v, list | tuple | dict)).any()]
    return frame.assign(**{c: frame[c].map(json.dumps) for c in nested})
