"""Write what was measured into the READMEs, from the files under `results/`: `make docs`. A test holds them to it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from ucc_search import load_run
from ucc_search.spread import standings

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "results"
MARKS = ("<!-- measured: written by docs/make_headline.py -->\n", "<!-- /measured -->")
METHODS = {"random": "plain random", "tpe": "plain TPE", "random-projected": "random on the budget"}
SPACES = {"tokens": "tokens", "tokens-widths": "tokens and widths"}


def pages() -> dict[Path, str]:
    """The pages with the measured lines between their marks."""
    return {
        README: written(README, [*search(), *quality(), *speed(), *faults(), *delivery()]),
        RESULTS / "README.md": written(RESULTS / "README.md", delivery()),
    }


def written(page: Path, lines: list[str]) -> str:
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    text = "".join(f"- {line}\n" for line in lines)
    return f"{before}{MARKS[0]}{text}{MARKS[1]}{rest.partition(MARKS[1])[2]}"


def search() -> list[str]:
    """Best KL after so many trials, median over the seeds."""
    folder = RESULTS / "search-benchmark"
    rows = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    hand = read(folder / "hand.json")
    found = []
    for space, words in SPACES.items():

        def after(method: str, trials: int, space: str = space) -> float:
            runs = [r["values"] for r in rows if (r["space"], r["method"]) == (space, method)]
            return statistics.median(
                min(v for v in r[:trials] if v is not None) for r in runs if len(r) >= trials
            )

        others = ", ".join(f"{name} {after(method, 200):.3f}" for method, name in METHODS.items())
        found.append(
            f"**Search of {words}** at 50 % of the MACs (KL to the teacher without training, lower is better): ours "
            f"{after('shell', 50):.3f} after 50 trials and {after('shell', 100):.3f} after 100; after 200 {others}; "
            f"the best schedule by hand {min(hand[space].values()):.3f}."
        )
    return found


def quality() -> list[str]:
    """The shipped run in which all three methods meet."""
    found = standings(load_run(RESULTS / "fashion-mnist-all-three").rows)
    best, *others = found
    level = ", ".join(f"{s.method} {100 * s.accuracy:.1f}" for s in others if s.verdict == "not told apart")
    behind = ", ".join(f"{s.method} {100 * s.accuracy:.1f}" for s in others if s.verdict == "behind")
    return [
        f"**All three methods in one plan**, Fashion-MNIST at {best.target.removeprefix('macs=')} of the MACs, % accuracy "
        f"on the selection images: searched {100 * best.accuracy:.1f}; not told apart: {level}; behind: {behind}."
    ]


def speed() -> list[str]:
    """Of UCC in three stages beside its MAC ratio."""
    measured = read(RESULTS / "speed.json")["measured"]
    found = []
    for key in ("32@63%", "32@46%"):
        dense, ours = measured[key]["dense"], measured[key]["UCC, three stages"]
        ratio = statistics.median(a / b for a, b in zip(dense["seconds"], ours["seconds"], strict=True))
        share = key.partition("@")[2].removesuffix("%")
        found.append(
            f"{ratio:.2f} times at {share} % of the MACs (whose ratio is {dense['macs'] / ours['macs']:.2f})"
        )
    return [f"**Speed-up of DeiT-S** by UCC on a CPU, batch 32, fused attention: {', '.join(found)}."]


def faults() -> list[str]:
    """Of the search that was killed at random instants."""
    lines = []
    for executor, where in (("local", "in one process"), ("ray", "on Ray")):
        found = read(RESULTS / "chaos.json")[executor]
        kills = ", ".join(f"the {what} {count} times" for what, count in found["kills"].items())
        same = "the same front as" if found["same_front"] else "another front than"
        once = "each trial once" if found["once"] else "trials lost or repeated"
        lines.append(
            f"**Killed {where}** ({kills}, by kill -9) and resumed: {found['trials_killed']} trials, {once}, {same} the "
            "unkilled run."
        )
    return lines


def delivery() -> list[str]:
    """Of the exports of all models whose weights are shipped."""
    found = read(RESULTS / "exports.json")
    far = {kind: f"within {d:.1e}" if d else "exactly" for kind, d in found["largest_difference"].items()}
    kept = "all" if found["hold"] == found["models"] else f"{found['hold']} of"
    return [
        f"**Delivery**: {kept} {found['models']} shipped models ({found['on_front']} of them on the front of their run) "
        f"give the logits of the trial's model as ONNX ({far['onnx']}), by torch.export ({far['torch-export']}) and "
        f"compiled as one graph without a break ({far['compile']})."
    ]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
