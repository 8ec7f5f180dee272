"""The run folder: an append-only record of trials, and the tables derived from it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ucc_search.config import RunConfig, dump_config, load_config
from ucc_search.errors import RunError, did_you_mean
from ucc_search.plan import CompressionPlan

if TYPE_CHECKING:
    import pandas as pd

CONFIG, ENVIRONMENT, TRIALS = "config.resolved.yaml", "environment.json", "trials.jsonl"
MAY_CHANGE = ("search.trials", "search.concurrency", "search.executor")
"""Keys of the configuration that may differ when a run is resumed."""


@dataclass(frozen=True)
class TrialRow:
    """One finished trial: a column each in `trials.csv`.

    Rates are from 0 to 1, KL in nats, times in seconds, MACs and parameters for one image.
    """

    id: int
    state: str  # ok or failed
    method: str  # "search", "dense" or the baseline's name
    origin: str  # search, baseline or dense
    rung: str  # zero-shot or train
    fidelity: int  # optimiser steps; 0 is zero-shot
    seed: int
    target: str  # the budget as the user wrote it
    macs: int
    params: int
    macs_ratio: float  # of the dense model
    limit_macs: int | None
    feasible: bool
    tokens: list[int]  # patch tokens after each block
    plan_key: str
    kl: float | None = None
    accuracy: float | None = None  # on the selection split: what choices are made by
    test_accuracy: float | None = None  # for the report only
    loss: float | None = None
    scorer: str = ""
    aggregator: str = ""
    cascade: str = ""
    distiller: str = ""
    components: dict[str, Any] = field(default_factory=dict)
    identities: dict[str, Any] = field(default_factory=dict)
    params_searched: dict[str, Any] = field(default_factory=dict)
    parent: int | None = None  # the zero-shot trial this one was promoted from
    failure: str | None = None
    error: str | None = None
    seconds: float = 0.0
    compute_seconds: float = 0.0  # forward and training passes alone
    finished_at: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialRow:
        """Keys that a newer version added are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in data.items() if k in known})


def plan_key(plan: CompressionPlan) -> str:
    """Short hash of a plan's integers."""
    return hashlib.sha256(plan.key.encode()).hexdigest()[:16]


class RunStore:
    """Writes and reads one run folder. `trials.jsonl` is the truth; every table is derived from it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: RunConfig, environment: Mapping[str, Any]) -> RunStore:
        """Start a run folder.

        Raises:
            RunError: the folder already holds something.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"{path} already exists; continue it with --resume, or choose another --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
            _replace(path / CONFIG, dump_config(config))
            _replace(path / ENVIRONMENT, json.dumps(environment, indent=1) + "\n")
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunStore:
        """An existing run folder.

        Raises:
            RunError: it is none.
        """
        if not (path / CONFIG).is_file():
            siblings = [p.name for p in path.parent.glob("*/") if (p / CONFIG).is_file()] if path.parent.is_dir() else []
            near = did_you_mean(path.name, siblings)
            raise RunError(f"{path}: not a run folder (it has no {CONFIG}){near}; make one with ucc-search search")
        return cls(path)

    @classmethod
    def resume(cls, path: Path, config: RunConfig) -> RunStore:
        """An existing run folder, whose configuration must still be the same.

        Raises:
            RunError: naming the first key that differs.
        """
        store = cls.open(path)
        before = _flat(yaml.safe_load((path / CONFIG).read_text(encoding="utf-8")))
        now = _flat(yaml.safe_load(dump_config(config)))
        for key in sorted({*before, *now}):
            if key not in MAY_CHANGE and before.get(key) != now.get(key):
                raise RunError(
                    f"{path} was made with {key}: {before.get(key)!r}, now it is {now.get(key)!r}; "
                    "set it back to resume, or start a new run with another --out"
                )
        _replace(path / CONFIG, dump_config(config))
        return store

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a search writes here.

        Raises:
            RunError: another process holds it.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{self.path}: another ucc-search is writing to this run; wait for it or stop it") from None
        try:
            yield
        finally:
            lock.release()

    def config(self) -> RunConfig:
        return load_config(self.path / CONFIG)

    def rows(self) -> list[TrialRow]:
        """All finished trials, in the order they finished; a line torn by a kill is left out."""
        return [TrialRow.from_dict(data) for data in self._lines()[0]]

    def append(self, row: TrialRow) -> None:
        """Record a finished trial for good: flushed to the disk before this returns."""
        path = self.path / TRIALS
        whole = self._lines()[1]
        with open(path, "ab") as file:
            if file.tell() != whole:
                file.truncate(whole)
            file.write((json.dumps(row.to_dict(), allow_nan=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> tuple[list[dict[str, Any]], int]:
        """Parsed lines, and the number of bytes they take up."""
        path = self.path / TRIALS
        if not path.is_file():
            return [], 0
        parsed, whole = [], 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n"):
                    break
                parsed.append(json.loads(line))
            except ValueError:
                break
            whole += len(line)
        return parsed, whole

    def folder(self, trial: int) -> Path:
        return self.path / "trials" / str(trial)

    def write_trial(
        self, trial: int, params: Mapping[str, Any], plan: CompressionPlan, metrics: Sequence[Mapping[str, Any]]
    ) -> None:
        """The trial's own folder: parameters, plan and loss curve."""
        folder = self.folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "params.json", json.dumps(params, indent=1) + "\n")
        _replace(folder / "plan.json", plan.to_json() + "\n")
        if metrics:
            _replace(folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics))

    def write_tables(self) -> None:
        """`trials.csv`, `trials.parquet` and `pareto.csv`, each replaced as a whole."""
        run = Run(self.path)
        frame = run.trials()
        if frame.empty:
            return
        flat = frame.copy()
        for column in flat.columns[flat.map(lambda v: isinstance(v, list | dict)).any()]:
            flat[column] = flat[column].map(json.dumps)
        _replace(self.path / "trials.csv", flat.to_csv(index=False))
        temporary = self.path / "trials.parquet.part"
        flat.to_parquet(temporary, index=False)
        temporary.replace(self.path / "trials.parquet")
        _replace(self.path / "pareto.csv", run.pareto().to_csv(index=False))


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
        return self._store.rows()

    def trials(self) -> pd.DataFrame:
        """One row a trial; the columns are the fields of `TrialRow`."""
        import pandas as pd

        return pd.DataFrame([r.to_dict() for r in self.rows], columns=[f.name for f in fields(TrialRow)])

    def pareto(self, rung: str | None = None) -> pd.DataFrame:
        """The front of one rung (the most expensive one present, by default), repeated seeds averaged.

        Columns: those of `analysis.Point`.
        """
        import pandas as pd

        from ucc_search.analysis import Point, pareto_front

        front = pareto_front(self.rows, rung)
        return pd.DataFrame([asdict(p) for p in front], columns=[f.name for f in fields(Point)])

    def pick(self, *, max_macs: int | None = None, max_params: int | None = None) -> TrialRow:
        """The best trial under these limits, by selection accuracy (by KL in a zero-shot run).

        Raises:
            RunError: no trial fits.
        """
        from ucc_search.analysis import best_under

        return best_under(self.rows, max_macs=max_macs, max_params=max_params, where=str(self.path))


def load_run(path: str | Path) -> Run:
    """Open a run folder for reading.

    Raises:
        RunError: it is none.
    """
    return Run(path)


def environment(config: RunConfig, plugins: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Versions, commit, hardware, seeds and plugins: what a run depends on besides its space file."""
    packages = ("ucc-search", "torch", "torchvision", "timm", "optuna", "ray", "deepspeed", "pandas")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "versions": {p: _version(p) for p in packages},
        "commit": _commit(),
        "seed": config.search.seed,
        "seeds": list(config.search.seeds),
        "plugins": list(plugins),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this package runs from, if it is one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _replace(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    return {k: v for key, value in data.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}
