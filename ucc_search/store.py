"""The run folder: an append-only record of trials. What is read from it: see `runs`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from io import FileIO
from pathlib import Path
from typing import Any

import yaml

from ucc_search.config import RESOLVED, RunConfig, dump_config, load_config
from ucc_search.errors import RunError, did_you_mean
from ucc_search.plan import CompressionPlan

CONFIG, ENVIRONMENT, TRIALS = RESOLVED, "environment.json", "trials.jsonl"
JOB = "job.json"
"""In a trial's folder: what its worker was given, to measure it again."""
MAY_CHANGE = (
    *("search.trials", "search.concurrency", "search.executor", "search.trial_timeout", "observers"),
    *("search.ray_address", "search.cpus_per_trial", "search.gpus_per_trial"),
)
"""Keys of the configuration that may differ when a run is resumed."""


@dataclass(frozen=True)
class TrialRow:
    """One finished trial: a column each in `trials.csv`.

    Rates are from 0 to 1, KL in nats, times in seconds, MACs and parameters for one image.
    """

    id: int  # of the trial and its folder
    state: str  # ok, stopped (at a rung, before the end of training) or failed
    method: str  # "search", "dense" or the baseline's name
    origin: str  # search, baseline or dense
    rung: str  # zero-shot or train
    fidelity: int  # optimiser steps behind it; 0 is zero-shot
    seed: int  # of training
    target: str  # the budget as the user wrote it, for example macs=50%
    macs: int  # of the compressed model
    params: int  # weights of the compressed model
    macs_ratio: float  # of the dense model
    limit_macs: int | None  # what the budget allowed
    feasible: bool  # within its budget
    tokens: list[int]  # patch tokens after each block
    plan_key: str  # short hash of the plan: equal architectures have equal keys
    kl: float | None = None  # mean KL(teacher || student) on the calibration images
    accuracy: float | None = None  # on the selection split: what choices are made by
    test_accuracy: float | None = None  # for the report only, never for a choice
    loss: float | None = None  # at the end of training
    latency_ms: float | None = None  # of a batch, timed on the finished model beside the dense one
    latency_ms_predicted: float | None = None  # by the table, which the budget goes by
    limit_latency_ms: float | None = None  # what the budget allowed
    latency_over: float | None = None  # measured over allowed, minus 1; above 0 is slower than the limit
    scorer: str = ""  # names of the components; their parameters are in `components`
    aggregator: str = ""
    cascade: str = ""
    distiller: str = ""
    importance: str = ""  # where widths or depth were pruned
    saved_tokens: float | None = None  # share of the dense MACs that cutting tokens took (costs.saved_macs)
    saved_widths: float | None = None  # the share that narrower layers took
    saved_depth: float | None = None  # missing half-blocks
    saved_ranks: float | None = None  # factorised matrices
    saved_unread: float | None = None  # work on tokens that nothing reads
    components: dict[str, Any] = field(default_factory=dict)  # kind to name and parameters
    identities: dict[str, Any] = field(default_factory=dict)  # kind to package, version and hash
    params_searched: dict[str, Any] = field(
        default_factory=dict
    )  # the point in the search space, as measured
    parent: int | None = None  # the trial of the rung below that this one was promoted from
    proposal: int | None = None  # its number among the search's proposals
    known: int | None = None  # how many proposals had been measured when it was made
    same_as: int | None = None  # the trial that had measured the same: its values are these, nothing was run
    continued: int = 0  # optimiser steps taken over from the rung below
    failure: str | None = (
        None  # nan_loss, not_finite, out_of_memory, timeout, worker_died, user_error or error
    )
    error: str | None = None  # one line
    seconds: float = 0.0  # from start to end
    compute_seconds: float | None = None  # forward and training passes alone
    overhead_seconds: float | None = None  # all the rest; from the two above where not given
    finished_at: str = ""  # ISO 8601, UTC

    def __post_init__(self) -> None:
        if self.overhead_seconds is None and self.compute_seconds is not None:
            object.__setattr__(self, "overhead_seconds", max(0.0, self.seconds - self.compute_seconds))
        if self.latency_over is None and self.latency_ms is not None and self.limit_latency_ms is not None:
            object.__setattr__(self, "latency_over", self.latency_ms / self.limit_latency_ms - 1)

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

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._whole: int | None = None  # bytes of whole lines in `trials.jsonl`, once they are known

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, environment: Mapping[str, Any]) -> RunStore:
        """Start a run folder.

        Raises:
            RunError: the folder already holds something, or cannot be written.
        """
        path = Path(path)
        cls.refuse_taken(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            replace_text(path / ENVIRONMENT, _json(environment, indent=1) + "\n")
            (path / TRIALS).touch()  # a run without one has lost it
            replace_text(path / CONFIG, dump_config(config))  # last: it is what makes the folder a run
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
        return cls(path)

    @staticmethod
    def refuse_taken(path: Path) -> None:
        """RunError if something is there already, or nobody may look."""
        try:
            # What a command that was killed while it made the folder has left is no run.
            unfinished = {ENVIRONMENT, TRIALS, *(f"{name}.part" for name in (ENVIRONMENT, CONFIG))}
            taken = path.exists() and (
                not path.is_dir() or any(p.name not in unfinished for p in path.iterdir())
            )
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error.strerror}); choose another --out") from None
        if taken and not (path / CONFIG).is_file():
            raise RunError(f"{path} already exists and is no run folder; choose another --out")
        if taken:
            raise RunError(f"{path} already exists; continue it with --resume, or choose another --out")

    @classmethod
    def open(cls, path: str | Path) -> RunStore:
        """An existing run folder; RunError if it is none."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            runs = [p.parent.name for p in path.parent.glob(f"*/{CONFIG}")]
            raise RunError(
                f"{path}: not a run folder (it has no {CONFIG}){did_you_mean(path.name, runs)}; "
                "make one with ucc-search search"
            )
        return cls(path)

    @classmethod
    def resume(cls, path: str | Path, config: RunConfig) -> RunStore:
        """An existing run folder, whose configuration must still be the same.

        Raises:
            RunError: naming the first key that differs, or a search is writing to the run.
        """
        store = cls.open(path)
        # Both through the reader, so that a key added since with a default is no difference.
        before = _flat(yaml.safe_load(dump_config(store.config())))
        now = _flat(yaml.safe_load(dump_config(config)))
        for key in dict.fromkeys((*before, *now)):
            if key.partition("[")[0] not in MAY_CHANGE and before.get(key) != now.get(key):
                was, became = (repr(d[key]) if key in d else "not set" for d in (before, now))
                raise RunError(
                    f"{path} was made with {key}: {was}, now it is {became}; "
                    "set it back to resume, or start a new run with another --out"
                )
        with store.lock():
            replace_text(store.path / CONFIG, dump_config(config))
        return store

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a search writes here; the system frees it when the process ends, however it ends.

        Raises:
            RunError: another process holds it.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"{self.path}: another ucc-search is writing to this run; wait for it or stop it"
            ) from None
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror}); choose another --out"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def config(self) -> RunConfig:
        return load_config(self.path / CONFIG)

    def rows(self) -> list[TrialRow]:
        """All finished trials, in the order they finished; a last line torn by a kill is left out.

        Raises:
            RunError: another line is damaged, or the file is gone.
        """
        rows, lines = [], self._lines()[0]
        for number, data in enumerate(lines, start=1):
            try:
                rows.append(TrialRow.from_dict(data))
            except (TypeError, AttributeError) as error:
                raise self._damaged([number], f"is not a trial ({error})", len(lines)) from None
        return rows

    def append(self, row: TrialRow) -> None:
        """Record a finished trial for good: on the disk before this returns. NaN and infinity become null.

        A last line torn by a kill is overwritten.

        Raises:
            RunError: another line is damaged, the file is gone, or the disk takes no more; it is then as it was.
        """
        path = self.path / TRIALS
        if self._whole is None or not path.is_file() or self._whole != path.stat().st_size:
            self._whole = self._lines()[1]
        line = (_json(row.to_dict()) + "\n").encode()
        with self.writing(), open(path, "ab", buffering=0) as file:
            if file.tell() != self._whole:
                file.truncate(self._whole)
            try:
                _write_all(file, line)
                os.fsync(file.fileno())
            except OSError:
                file.truncate(self._whole)
                raise
        self._whole += len(line)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turns what the disk refuses (it is full, gone, or there is a quota) into one sentence.

        Raises:
            RunError: in place of an OSError.
        """
        try:
            yield
        except OSError as error:
            raise disk_error(self.path, error.strerror or str(error)) from None

    def _lines(self) -> tuple[list[Any], int]:
        """Parsed lines, and the number of bytes they take up."""
        try:
            lines = (self.path / TRIALS).read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            raise self._lost() from None
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        try:
            return [json.loads(line) for line in lines], sum(map(len, lines))
        except ValueError:
            # A kill tears the last line alone, before its end; append would drop what follows any other.
            bad = [n for n, line in enumerate(lines, start=1) if not _is_json(line)]
            raise self._damaged(bad, "cannot be read", len(lines)) from None

    def _damaged(self, lines: Sequence[int], what: str, count: int) -> RunError:
        number = f"line {lines[0]}" if len(lines) == 1 else f"lines {', '.join(map(str, lines))}"
        trial = "its trial" if len(lines) == 1 else "their trials"
        return RunError(
            f"{self.path / TRIALS}: {number} of {count} {what}; nothing was changed, and the other "
            f"{count - len(lines)} are whole. Copy the file, delete {number} from it and go on without {trial}; "
            "search --resume measures what is missing again"
        )

    def _lost(self) -> RunError:
        folders = len(list((self.path / "trials").glob("*")))
        left = f"; folders of {folders} trials are left" if folders else ""
        return RunError(
            f"{self.path}: {TRIALS} is missing, which a run has from its start and keeps its results in{left}. "
            "Put it back from a copy, or search again with another --out"
        )

    def folder(self, trial: int) -> Path:
        return self.path / "trials" / str(trial)

    def plan(self, trial: int) -> CompressionPlan:
        """What a finished trial measured."""
        return CompressionPlan.from_json((self.folder(trial) / "plan.json").read_text(encoding="utf-8"))

    def write_trial(
        self,
        trial: int,
        params: Mapping[str, Any],
        plan: CompressionPlan,
        metrics: Sequence[Mapping[str, Any]] = (),
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """The trial's own folder: parameters, plan, loss curve, and the files that its worker made.

        Raises:
            RunError: the disk takes no more.
        """
        folder = self.folder(trial)
        with self.writing():
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(folder / "params.json", _json(params, indent=1) + "\n")
            replace_text(folder / "plan.json", plan.to_json() + "\n")
            # Written even when empty: a killed trial may have left a curve under the same id.
            replace_text(folder / "metrics.jsonl", "".join(_json(m) + "\n" for m in metrics))
            for name, content in (files or {}).items():
                with replacing(folder / name) as temporary:
                    temporary.write_bytes(content)


def disk_error(path: Path, reason: str) -> RunError:
    """What a full disk is called."""
    return RunError(
        f"{path}: cannot be written ({reason}); what was finished is kept: make room, then go on with --resume"
    )


def heal_lines(path: Path) -> None:
    """Cut a last line that a kill has torn off a file of JSON lines, so that the next one starts afresh."""
    if not path.is_file():
        return
    last = path.read_bytes().rpartition(b"\n")[2]
    if last:
        os.truncate(path, path.stat().st_size - len(last))


def heal_journal(path: Path) -> None:
    """Make Optuna's journal usable after a kill: no torn line, and no lock, which it would wait half a minute for.

    The caller holds the lock of the run folder, so nobody else writes to it.
    """
    for left in path.parent.glob(f"{path.name}.lock*"):
        left.unlink(missing_ok=True)
    heal_lines(path)


def _write_all(file: FileIO, data: bytes) -> None:
    """A raw file may take a part; the next call then says why."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) or 0 :]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`: readers see the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _json(value: Any, indent: int | None = None) -> str:
    """JSON that any reader takes. A trial is never lost to an odd value: what JSON lacks becomes text."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; a list of plain values is one leaf."""
    if isinstance(data, dict):
        parts = {f"{prefix}.{k}" if prefix else str(k): v for k, v in data.items()}
    elif isinstance(data, list) and any(isinstance(v, dict) for v in data):
        parts = {f"{prefix}[{i}]": v for i, v in enumerate(data)}
    else:
        return {prefix: data}
    return {k: v for name, part in parts.items() for k, v in _flat(part, name).items()}
