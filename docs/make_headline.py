"""Write what was measured into the READMEs, from the files under `results/`: `make docs`. A test holds them to it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from ucc_search import load_run
from ucc_search.analysis import measured
from ucc_search.spread import Standing, standings
from ucc_search.strength import three_stages
from ucc_search.timing import Timings

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "results"
MARKS = ("<!-- measured: written by docs/make_headline.py -->\n", "<!-- /measured -->")
METHODS = {"random": "plain random", "tpe": "plain TPE", "random-projected": "random on the budget"}
SPACES = {"tokens": "tokens", "tokens-widths": "tokens and widths"}


def pages() -> dict[Path, str]:
    """The pages with the measured lines between their marks."""
    return {
        README: written(README, [*search(), *quality(), *speed(), *faults(), *delivery()]),
        RESULTS / "README.md": written(RESULTS / "README.md", [*delivery(), *stages()]),
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

        def after(method: str, trials: int, space: str = space) -> str:
            runs = [r["values"] for r in rows if (r["space"], r["method"]) == (space, method)]
            best = [min(v for v in r[:trials] if v is not None) for r in runs if len(r) >= trials]
            return f"{statistics.median(best):.3f} ({len(best)} seeds)"

        others = ", ".join(f"{name} {after(method, 200)}" for method, name in METHODS.items())
        starts = min(v for k, v in hand[space].items() if k.startswith("known good point"))
        found.append(
            f"**Search of {words}** at 50 % of the MACs; KL to the teacher without training (lower is better), median: "
            f"ours {after('shell', 50)} after 50 trials, {after('shell', 100)} after 100; after 200 trials {others}. "
            f"Ours starts from hand-made points, of which the best has {starts:.3f}; the best of all schedules by hand "
            f"has {min(hand[space].values()):.3f}."
        )
    return found


def quality() -> list[str]:
    """The shipped run in which all three methods meet, in test accuracy; which one is ahead was told on other images."""
    run = load_run(RESULTS / "fashion-mnist-all-three")
    found = standings(run.rows)
    front = run.pareto().set_index("id")

    def test(standing: Standing) -> str:
        return f"{100 * tested[standing.id]:.1f}"

    tested = {p.id: p.test_accuracy for p in measured(run.rows, "train") if p.test_accuracy is not None}
    best, *others = found
    saved = front.loc[best.id, "saved"]
    shares = ", ".join(f"{name} {100 * part:.0f} %" for name, part in saved.items() if part >= 0.005)
    level = ", ".join(f"{s.method} {test(s)}" for s in others if s.verdict == "not told apart")
    behind = ", ".join(f"{s.method} {test(s)}" for s in others if s.verdict == "behind")
    return [
        f"**One search over all three methods**, Fashion-MNIST at {best.target.removeprefix('macs=')} of the MACs, % test "
        f"accuracy, {best.seeds} seeds: {test(best)}, of the MACs it took off by {shares}. Rules that are not tuned, "
        f"within the seeds' noise of it: {level or 'none'}; behind it: {behind or 'none'}."
    ]


def speed() -> list[str]:
    """Of UCC beside its MAC ratio, and the peers that are faster at equal MACs."""
    found = read(RESULTS / "speed.json")["measured"]
    said = []
    for key, where in (
        ("32@63%", "batch 32, 63 % of the MACs"),
        ("32@46%", "batch 32, 46 %"),
        ("1@63%", "batch 1, 63 %"),
    ):
        methods = found[key]
        times = Timings({name: tuple(m["seconds"]) for name, m in methods.items()})
        three, every = (times.speedup(f"UCC, {name}", "dense") for name in ("three stages", "every block"))
        macs = methods["dense"]["macs"] / methods["UCC, three stages"]["macs"]
        gains = {
            name: times.speedup(name, "UCC, three stages").median
            for name, m in methods.items()
            if m["kind"] == "peer"
        }
        faster = ", ".join(f"{name} {gain:.2f}" for name, gain in gains.items() if gain > 1)
        said.append(
            f"{where} ({macs:.2f} times fewer): {three.median:.2f} ({three.low:.2f} to {three.high:.2f}), "
            f"cutting in every block {every.median:.2f}, peers that are faster: {faster or 'none'}"
        )
    return [
        f"**Speed-up of DeiT-S by UCC** in three stages on a CPU, median and quartiles. {_sentence(said)}."
    ]


def _sentence(parts: list[str]) -> str:
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


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


def stages() -> list[str]:
    """Of where three stages should be."""
    lines = []
    for teacher, found in read(RESULTS / "stages.json").items():
        depth = found["depth"]
        quarters = ",".join(str(q * depth // 4) for q in (1, 2, 3))
        default = ",".join(map(str, three_stages(depth)))
        said = []
        for budget, kl in found["budgets"].items():
            every = kl["three blocks"]
            best = min(every, key=every.__getitem__)
            closer = sum(v < every[default] for v in every.values())
            said.append(
                f"at {budget} {every[default]:.3f} ({closer} of {len(every)} choices are closer, the best {best} with "
                f"{every[best]:.3f}), at {quarters} {every[quarters]:.3f}, in every block {kl['every block']:.3f}"
            )
        lines.append(
            f"**Stages**, a teacher of {teacher}, KL without training when tokens leave at {default}: {'; '.join(said)}."
        )
    return lines


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
