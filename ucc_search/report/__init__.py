"""One offline HTML file about a run: `write_report`. No network, no font, no script but its own.

Plots on disk beside it: `write_plots`.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from ucc_search.errors import RunError
from ucc_search.report.content import content, in_words
from ucc_search.report.pictures import gallery
from ucc_search.report.plots import write_plots
from ucc_search.runs import Run
from ucc_search.store import replace_text
from ucc_search.tables import gmacs_limit
from ucc_search.units import format_macs

__all__ = ["NAME", "render", "write_plots", "write_report"]

NAME = "report.html"


def write_report(run: Run, out: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not.

    Args:
        out: the file; `report.html` in the run folder by default.

    Raises:
        RunError: it cannot be written.
    """
    path = run.path / NAME if out is None else Path(out)
    text = render(run)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
    return path


def render(run: Run) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    folder = files("ucc_search") / "assets" / "report"
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    jinja.filters["nice"] = in_words
    template = jinja.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    found = content(run)
    picked = _picked(found)
    # "</script>" in a component's name would end the element that holds the data.
    found["details"] = found["details"].replace("<", "\\u003c")
    return template.render(
        **found,
        gallery=gallery(run, _with_pictures(found, picked)),
        pick=picked,
        first=picked["id"] if picked else "",
        tiles=_tiles(found, picked),
        has_knee=any(r["is_knee"] for r in found["front"]["rows"]) if found["front"] else False,
        has_latency=bool(found["front"]) and any(r["latency_ms"] is not None for r in found["front"]["rows"]),
        has_intervals=any(r["standing"]["verdict"] for b in found["methods"] for r in b["rows"]),
        sections=_sections(found),
        versions=_versions(found["environment"]),
        version=version("ucc-search"),
        style=(folder / "style.css").read_text(encoding="utf-8"),
        script=(folder / "script.js").read_text(encoding="utf-8"),
    )


def _picked(found: dict[str, Any]) -> dict[str, Any] | None:
    """The model that the page opens with: the knee, else the best."""
    if not found["front"]:
        return None
    rows = {m["id"]: m for m in found["models"]}
    front = [rows[r["id"]] for r in found["front"]["rows"]]
    picked = next((m for m in front if m["is_knee"]), front[-1])
    return {**picked, "gmacs": gmacs_limit(picked["macs"])}


def _with_pictures(found: dict[str, Any], picked: dict[str, Any] | None) -> list[int]:
    """Trials in the order in which their pictures are wanted."""
    if picked is None:
        return []
    others = sorted(found["models"], key=lambda m: m["macs"])
    return list(dict.fromkeys([picked["id"], *(m["id"] for m in others)]))


def _tiles(found: dict[str, Any], picked: dict[str, Any] | None) -> list[dict[str, str]]:
    run, front = found["run"], found["front"]
    states = [f"{run['ok']} finished"] + ([f"{run['failed']} failed"] if run["failed"] else [])
    tiles = [{"name": "trials", "value": str(run["trials"]), "note": ", ".join(states)}]
    if front and front["dense"]:
        dense = front["dense"]
        note = f"{dense['test_text']} % test" if dense["test_accuracy"] is not None else ""
        tiles.append({"name": "uncompressed", "value": format_macs(dense["macs"]), "note": note})
    if picked is not None:
        name = "knee" if picked["is_knee"] else "best"
        share = f"{100 * picked['macs_ratio']:.1f} % of the MACs"
        if picked["test_accuracy"] is not None:
            tiles.append(
                {
                    "name": f"{name}: test accuracy",
                    "value": f"{100 * picked['test_accuracy']:.2f} %",
                    "note": share,
                }
            )
        else:
            tiles.append({"name": f"{name}: KL", "value": picked["kl_text"], "note": share})
    tiles.append(
        {"name": "time measuring", "value": _duration(run["seconds"]), "note": "all trials together"}
    )
    return tiles


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return (
        f"{minutes / 60:.1f} h"
        if minutes >= 90
        else f"{minutes:.0f} min"
        if minutes >= 2
        else f"{seconds:.0f} s"
    )


def _sections(found: dict[str, Any]) -> list[tuple[str, str]]:
    wanted = [
        ("short", "In short", True),
        ("front", "Front", bool(found["front"])),
        ("models-h", "Models", bool(found["front"])),
        ("methods", "Baselines", bool(found["methods"])),
        ("images", "Images", True),
        ("mattered", "What mattered", bool(found["influence"])),
        ("progress", "Progress", any(found["progress"][k] for k in ("best", "volume"))),
        ("space", "Searched", True),
        ("failures", "Failures", True),
        ("again", "Use it", True),
    ]
    return [(anchor, name) for anchor, name, there in wanted if there]


def _versions(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table: what the run was made with."""
    plain = ("python", "platform", "cpus", "commit", "seed", "seeds")
    found = [(k, str(environment[k])) for k in plain if environment.get(k) is not None]
    found += [(k, str(v)) for k, v in environment.get("versions", {}).items() if v]
    for plugin in environment.get("plugins", ()):
        about = f"{plugin.get('version') or ''} {plugin.get('status') or ''}, sha256 {str(plugin.get('sha256'))[:16]}"
        found.append((f"plugin {plugin.get('name')}", about.strip()))
    return found
