"""The trial that was picked, and how to use it."""

from __future__ import annotations

from ucc_search.runs import Run
from ucc_search.store import TrialRow
from ucc_search.tables.wording import compact_tokens, component_names, milliseconds, number, percent_of
from ucc_search.units import format_macs, format_params


def pick_message(run: Run, row: TrialRow) -> str:
    """One trial in words, and how to use it."""
    folder = run.path / "trials" / str(row.id)
    measured = [
        f"{name} {text}"
        for name, value, text in (
            ("accuracy", row.accuracy, percent_of(row.accuracy)),
            ("test accuracy", row.test_accuracy, percent_of(row.test_accuracy)),
            ("KL", row.kl, f"{number(row.kl)} nats"),
        )
        if value is not None
    ]
    if row.latency_ms_predicted is not None:
        measured.append(f"latency {milliseconds(row)} ms, as measured (by table)")
    lines = [
        f"trial {row.id}: {row.method} at {row.target}, {row.rung}, seed {row.seed}",
        f"  {format_macs(row.macs)} ({100 * row.macs_ratio:.1f}% of dense), {format_params(row.params)}",
        f"  {', '.join(measured) or 'nothing measured'}",
        f"  tokens per block: {compact_tokens(row.tokens)}",
        f"  components: {component_names(row)}",
        "",
        *_usage(str(folder), row.rung, (folder / "arch.json").is_file()),
    ]
    return "\n".join(lines)


def _usage(folder: str, rung: str, saved: bool) -> list[str]:
    if saved:
        return ["Use it in Python:", "  import ucc_search", f"  model = ucc_search.load_model({folder!r})"]
    why = (
        ", since it was measured without training; search.promote trains the best" if rung != "train" else ""
    )
    return [f"The plan is {folder}/plan.json; no weights were saved with it{why}."]
