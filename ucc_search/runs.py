"""A run folder for reading: trials and front as pandas frames, the best trial under limits, the tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ucc_search import analysis
from ucc_search.analysis import Point
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
        return _frame(analysis.pareto_front(self.rows, rung, by), Point)

    def knee(self, rung: str | None = None, by: str | None = None) -> Point | None:
        """The front's point farthest above the line between its ends; None where no point is above it."""
        return analysis.knee(analysis.pareto_front(self.rows, rung, by), by)

    def hypervolume(self, rung: str | None = None) -> pd.DataFrame:
        """What the front dominates once each trial had finished; columns trial and hypervolume.

        In MACs times accuracy (nats on the zero-shot rung), above the worst quality and below the dense MACs.
        """
        import pandas as pd

        return pd.DataFrame(analysis.hypervolume_history(self.rows, rung), columns=["trial", "hypervolume"])

    def importances(self, of: Literal["parameters", "blocks"] = "parameters") -> pd.DataFrame:
        """Which searched parameters, or which blocks, the quality depended on, per budget (functional ANOVA).

        Returns:
            Columns are the fields of `influence.Importance` or `influence.BlockImportance`.
        """
        from ucc_search.influence import BlockImportance, Importance, block_importances, parameter_importances

        found = parameter_importances(self.rows)
        return (
            _frame(found, Importance)
            if of == "parameters"
            else _frame(block_importances(found), BlockImportance)
        )

    def sensitivity(self) -> pd.DataFrame:
        """Each block's ratios against the quality, per budget; columns are the fields of `influence.Sensitivity`."""
        from ucc_search.influence import Sensitivity, block_sensitivity

        return _frame(block_sensitivity(self.rows), Sensitivity)

    def standings(self) -> pd.DataFrame:
        """Which methods can be told from the best of their budget; columns are the fields of `spread.Standing`."""
        from ucc_search.spread import Standing, standings

        return _frame(standings(self.rows), Standing)

    def compare(self, other: Run, *, anyway: bool = False) -> pd.DataFrame:
        """This run (a) beside another (b), per budget and method.

        Args:
            anyway: also where data, model or teacher differ.

        Returns:
            Columns are the fields of `comparison.MethodPair`; `frame.attrs["differences"]` lists what differs
            between the configurations, as (key, a, b).

        Raises:
            RunError: data, model or teacher differ.
        """
        from ucc_search.comparison import MethodPair, compare_runs

        found = compare_runs(self, other, anyway=anyway)
        frame = _frame(found.methods, MethodPair)
        frame.attrs["differences"] = [(d.key, d.a, d.b) for d in found.differences]
        return frame

    def failures(self) -> pd.DataFrame:
        """Failed trials by class, the most frequent first; columns are the fields of `analysis.FailureClass`."""
        return _frame(analysis.failure_classes(self.rows), analysis.FailureClass)

    def report(self, out: str | Path | None = None) -> Path:
        """Write the offline HTML report; `report.html` in the run folder by default."""
        from ucc_search.report import write_report

        return write_report(self, out)

    def pick(
        self,
        *,
        max_macs: int | str | None = None,
        max_params: int | str | None = None,
        max_latency_ms: float | None = None,
    ) -> TrialRow:
        """The best trial under these limits, by selection accuracy (by KL in a zero-shot run).

        Args:
            max_macs: for one image, a number or a text such as "2.1G"; likewise `max_params`.
            max_latency_ms: where the run measured it.

        Raises:
            RunError: no trial fits.
            BudgetError: a limit is no amount.
        """
        macs = None if max_macs is None else parse_amount(max_macs, key="max_macs")
        params = None if max_params is None else parse_amount(max_params, key="max_params")
        return analysis.best_under(
            self.rows, max_macs=macs, max_params=params, max_latency_ms=max_latency_ms, where=str(self.path)
        )

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
            "stopped": sum(r.state == "stopped" for r in rows),
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
