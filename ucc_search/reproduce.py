"""Measure a trial again, as it was measured first, and compare the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ucc_search.config import dump_config
from ucc_search.environment import environment
from ucc_search.errors import PluginError, RunError
from ucc_search.interfaces import INFERENCE_KINDS
from ucc_search.plugins import Plugins
from ucc_search.store import ENVIRONMENT, JOB, RunStore, TrialRow

NUMBERS = ("kl", "accuracy", "test_accuracy", "loss")


def reproduce(
    path: str | Path,
    trial: int,
    *,
    sources: Sequence[str] = (),
    allow_changes: bool = False,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Rebuild a trial from its run folder, with the same seed and as many threads, and measure it.

    Equal to the last digit is what to expect on the same machine with the same packages. Nothing is
    written to the run folder.

    Args:
        sources: plugins beside those of the space file and those that the run recorded.
        allow_changes: go on, with a line each, where a component's version or content has changed.

    Returns:
        trial, changes (of components), environment (of packages and machine), numbers (before and
        now, by name), failure (before and now), equal.

    Raises:
        RunError: no such trial, what it needs is not recorded, or a component has changed.
    """
    store = RunStore.open(path)
    row, job = _row(store, trial), _job(store, trial)
    recorded = json.loads((store.path / ENVIRONMENT).read_text(encoding="utf-8"))
    config = store.config()
    plugins = Plugins.load([*config.plugins, *sources, *_recorded_sources(recorded, config.plugins, row)])
    changes = _changes(row, plugins)
    if changes and not allow_changes:
        raise RunError(
            f"trial {trial} cannot be reproduced: {'; '.join(changes)}; put the recorded version back, or "
            "measure it with what is here by --allow-changes"
        )
    for change in changes:
        log(f"changed: {change}")
    now = environment(config, [])
    differs = _environment_changes(recorded, now)
    for change in differs:
        log(f"changed: {change}")
    from ucc_search.worker import measure

    threads = job.pop("threads")
    task = {"config": dump_config(config), "plugins": plugins.bundle(), "threads": threads, "job": job}
    outcome = measure(task)
    numbers = {k: {"before": getattr(row, k), "now": outcome.get(k)} for k in NUMBERS}
    failure = {"before": row.failure, "now": outcome.get("failure")}
    return {
        "trial": trial,
        "changes": changes,
        "environment": differs,
        "numbers": {k: v for k, v in numbers.items() if v != {"before": None, "now": None}},
        "failure": failure,
        "error": outcome.get("error"),
        "equal": all(v["before"] == v["now"] for v in (*numbers.values(), failure)),
    }


def reproduce_text(found: Mapping[str, Any]) -> str:
    """`reproduce` for people."""
    lines = [f"trial {found['trial']}  {'before':>24} {'now':>24}"]
    for name, values in found["numbers"].items():
        shown = [f"{v!r:>24}" for v in (values["before"], values["now"])]
        lines.append(
            f"  {name:<13} {' '.join(shown)}{'' if values['before'] == values['now'] else '  differs'}"
        )
    if any(found["failure"].values()):
        lines.append(f"  failure       {found['failure']['before']!r:>24} {found['failure']['now']!r:>24}")
    if found["equal"]:
        lines.append("equal to the last digit")
    else:
        known = [*found["changes"], *found["environment"]]
        why = (
            f"what has changed: {'; '.join(known)}"
            if known
            else "no change of components or packages is known"
        )
        lines.append(f"not equal ({why})")
    return "\n".join(lines)


def _row(store: RunStore, trial: int) -> TrialRow:
    rows = {row.id: row for row in store.rows()}
    if trial not in rows:
        known = f"its trials are {min(rows)} to {max(rows)}" if rows else "it has none"
        raise RunError(f"{store.path} has no trial {trial}; {known}")
    return rows[trial]


def _job(store: RunStore, trial: int) -> dict[str, Any]:
    path = store.folder(trial) / JOB
    try:
        job: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError(
            f"{path}: not there or not readable; only trials whose worker kept what it was given can be reproduced"
        ) from None
    return job


def _recorded_sources(recorded: Mapping[str, Any], named: Sequence[str], row: TrialRow) -> list[str]:
    """Where the files were that the run was given on its command line, as far as this trial needs them."""
    needed = {identity["plugin"] for identity in row.identities.values()}
    given = {str(Path(source).expanduser().resolve()) for source in named}
    origins = [
        r["origin"].removeprefix("module ")
        for r in recorded.get("plugins", ())
        if r["name"] in needed and not r.get("installed") and r["origin"] != "ucc_search"
    ]
    return [
        origin
        for origin in origins
        if origin not in named
        and not any(origin == g or Path(origin).parent == Path(g) for g in given)
        and (not Path(origin).is_absolute() or Path(origin).exists())
    ]


def _changes(row: TrialRow, plugins: Plugins) -> list[str]:
    """The components that this trial used and that are not what they were."""
    kinds = [*INFERENCE_KINDS, *(["distiller"] if row.rung != "zero-shot" else [])]
    kinds += ["importance"] if row.importance else []
    kinds += [kind for kind in ("dataset", "family") if kind in row.identities]
    found = []
    for kind in kinds:
        before = row.identities.get(kind)
        if before is None:
            continue
        what = f"{kind} {before['component']!r} of plugin {before['plugin']!r}"
        try:
            name = row.components[kind]["name"] if kind in row.components else before["component"]
            now = plugins.identity(kind, name)
        except PluginError as error:
            raise RunError(f"{what} is needed: {error}") from None
        if now["version"] != before["version"]:
            found.append(f"{what} was version {before['version']}, now it is {now['version']}")
        elif now["sha256"] != before["sha256"] or now["plugin"] != before["plugin"]:
            found.append(
                f"{what} has changed (sha256 {_short(before['sha256'])}, now {_short(now['sha256'])})"
            )
    return found


def _short(sha256: str | None) -> str:
    return "unknown" if sha256 is None else sha256[:12]


def _environment_changes(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Packages and machine: they decide about last digits."""
    pairs = [(key, recorded.get(key), now[key]) for key in ("python", "machine", "cpus")]
    versions = recorded.get("versions", {})
    pairs += [
        (name, versions.get(name), now["versions"].get(name)) for name in ("torch", "timm", "deepspeed")
    ]
    return [f"{key} was {before}, now it is {after}" for key, before, after in pairs if before != after]
