"""The search itself: best result against number of trials, ours against others, several seeds.

One trial is one proposal. Quality is the mean KL to the teacher on calibration images, without any
training, on the shipped Fashion-MNIST teacher, at 50 % of the MACs: nothing here trains a model. Two
spaces: tokens alone, and tokens with widths and depth. Compared are

- plain methods, whose proposals are taken as they are: random, TPE with a penalty on what is over the
  budget, NSGA-II on (KL, MACs) with the budget as a constraint. A proposal over the budget is a spent
  trial without a result (and takes no time);
- projected methods, whose proposals are put on the budget first: random, TPE, and the default;
- hand-made schedules, one value each.

`front` compares one study over budgets from 30 to 90 % with separate studies at five of them.

Measured plans are kept in `--cache` by their integers and finished runs in OUT/*.jsonl: an interrupted
benchmark goes on where it was.

    python benchmarks/search.py run --space tokens --method random --seeds 0 1 2 3 4
    python benchmarks/search.py hand --space tokens
    python benchmarks/search.py front --space tokens-widths --trials 100 --seeds 0 1
    python benchmarks/search.py report
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ucc_search.budget import Budget, whole_tokens, with_tokens
from ucc_search.config import Baseline, load_config
from ucc_search.costs import cost
from ucc_search.errors import BudgetError
from ucc_search.interfaces import INFERENCE_KINDS, ComponentRef, Dimension, Measured, SamplerRequest
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import Plugins
from ucc_search.schedule import Scheduler, candidate_of
from ucc_search.space import Candidate, SearchSpace
from ucc_search.store import plan_key

ROOT = Path(__file__).resolve().parent.parent
SPACES = {"tokens": "fashion_mnist_ucc.yaml", "tokens-widths": "fashion_mnist_ucc_upvit.yaml"}
IMAGES = 250
BUDGET = "50%"
FRONT = (30, 45, 60, 75, 90)
Point = dict[str, Any]
Measure = Callable[[Point], "float | None"]


class Problem:
    """One space at one or more budgets: what a proposal becomes, and what it is worth."""

    def __init__(self, space: str, cache: Path, budget: str = f"{{macs: {BUDGET}}}") -> None:
        sets = [f"data.calibration={IMAGES}", f"budget={budget}", "baselines=[]"]
        self.config = load_config(ROOT / "search_spaces" / SPACES[space], sets)
        self.plugins = Plugins.load(environment=False)
        self.scheduler = Scheduler(self.config, self.bench.shape, self.plugins, None, self.depth_order)
        self.space = SearchSpace.of(self.config.space, self.bench.shape, self.plugins)
        self.budget: Budget = self.scheduler.budgets[0]
        self._cache = cache / f"{space}-{IMAGES}.jsonl"
        self._known: dict[str, float] = {}
        if self._cache.is_file():
            for line in self._cache.read_text().splitlines():
                entry = json.loads(line)
                self._known[entry["plan"]] = entry["kl"]

    @functools.cached_property
    def bench(self) -> Any:
        import torch

        from ucc_search.workbench import Workbench

        torch.set_num_threads(1)
        return Workbench(self.config, self.plugins)

    def depth_order(self, ref: Any) -> list[int]:
        order: list[int] = self.bench.depth_order(ref)
        return order

    def parts(self, candidate: Candidate) -> Any:
        return self.plugins.components(*(candidate.components[k] for k in INFERENCE_KINDS))

    def as_proposed(self, point: Point) -> CompressionPlan:
        """The proposal rounded to integers, whatever it costs."""
        candidate = self.space.decode(point)
        _, family = self.scheduler._family(candidate)
        narrow = self.scheduler.widths(candidate).at(self.scheduler.base, candidate.ratios, 0.5)
        return with_tokens(narrow, whole_tokens(family(0.5), narrow.shape.tokens))

    def overshoot(self, plan: CompressionPlan, candidate: Candidate) -> float:
        """MACs over the budget, as a share of it; negative below."""
        assert self.budget.max_macs is not None
        return cost(plan, self.parts(candidate)).macs / self.budget.max_macs - 1

    def kl(self, plan: CompressionPlan, candidate: Candidate) -> float:
        refs = candidate.components
        key = plan_key(plan) + "/" + "/".join(refs[k].key for k in (*INFERENCE_KINDS, "importance"))
        if key not in self._known:
            model = self.bench.compressed(plan, self.parts(candidate), refs["importance"])
            measured = self.bench.zero_shot(model)
            self._known[key] = measured.kl
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with self._cache.open("a") as file:
                file.write(json.dumps({"plan": key, "kl": measured.kl}) + "\n")
        return self._known[key]

    def plain(self, point: Point) -> tuple[float | None, float]:
        """(KL or None over the budget, overshoot) of a proposal as it is."""
        candidate = self.space.decode(point)
        plan = self.as_proposed(point)
        over = self.overshoot(plan, candidate)
        return (self.kl(plan, candidate) if over <= 0 else None), over

    def projected(self, point: Point) -> tuple[float, Point]:
        """(KL, the point that was measured) of a proposal put on the budget."""
        candidate = self.space.decode(point)
        plan = self.scheduler.plan(candidate, self.budget)
        return self.kl(plan, candidate), self.space.at_plan(point, plan)


def uniform(problem: Problem, rng: random.Random) -> Point:
    return {d.name: rng.uniform(d.low, d.high) for d in problem.space.dimensions}


def plain_random(problem: Problem, seed: int, trials: int) -> Iterable[float | None]:
    rng = random.Random(seed)
    for _ in range(trials):
        yield problem.plain(uniform(problem, rng))[0]


def projected_random(problem: Problem, seed: int, trials: int) -> Iterable[float | None]:
    rng = random.Random(seed)
    for _ in range(trials):
        yield problem.projected(uniform(problem, rng))[0]


def _distributions(problem: Problem) -> Mapping[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return {d.name: optuna.distributions.FloatDistribution(d.low, d.high) for d in problem.space.dimensions}


def plain_tpe(problem: Problem, seed: int, trials: int) -> Iterable[float | None]:
    """A proposal over the budget is told 1 nat plus 10 times the share by which it is over."""
    import optuna

    found = _distributions(problem)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
    for _ in range(trials):
        trial = study.ask(found)
        kl, over = problem.plain(trial.params)
        study.tell(trial, 1 + 10 * over if kl is None else kl)
        yield kl


def plain_nsga2(problem: Problem, seed: int, trials: int) -> Iterable[float | None]:
    """On (KL, MACs) with the budget as a constraint; populations of 20."""
    import optuna

    found = _distributions(problem)
    sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
    study = optuna.create_study(sampler=sampler, directions=["minimize", "minimize"])
    for _ in range(trials):
        trial = study.ask(found)
        kl, over = problem.plain(trial.params)
        trial.set_constraint("over_budget", over)
        study.tell(trial, [10.0 if kl is None else kl, 1 + over])
        yield kl


def with_sampler(name: str, problem: Problem, seed: int, trials: int) -> Iterable[float | None]:
    """What `search.sampler: name` does in a run: known good points first, projection, and a word to the sampler."""
    sampler = problem.plugins.build("sampler", ComponentRef(name))

    def project(point: Mapping[str, Any]) -> Point:
        plan = problem.scheduler.plan(problem.space.decode(point), problem.budget)
        return problem.space.at_plan(point, plan)

    starts = problem.space.known_good()
    sampler.start(SamplerRequest(problem.space.dimensions, [False], seed, trials, starts, project))
    for _ in range(trials):
        kl, point = problem.projected(dict(sampler.propose()))
        sampler.tell(Measured(point, [kl], {"macs": 0.0}))
        yield kl


METHODS: dict[str, Callable[[Problem, int, int], Iterable[float | None]]] = {
    "random": plain_random,
    "tpe": plain_tpe,
    "nsga2": plain_nsga2,
    "random-projected": projected_random,
    **{name: functools.partial(with_sampler, name) for name in ("shell",)},
    "tpe-projected": functools.partial(with_sampler, "tpe"),
}


def run(arguments: argparse.Namespace) -> None:
    problem = Problem(arguments.space, arguments.cache)
    out: Path = arguments.out / "curves.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    for method in arguments.method:
        for seed in arguments.seeds:
            trials = arguments.trials
            done = {(r["space"], r["method"], r["seed"], len(r["values"])) for r in read(out)}
            if (arguments.space, method, seed, trials) in done:
                continue
            start = time.perf_counter()
            values = list(METHODS[method](problem, seed, trials))
            row = {"space": arguments.space, "method": method, "seed": seed}
            row["values"] = [None if v is None else round(v, 6) for v in values]
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            best = [best_after(values, n) for n in (25, 50, 100, 200) if n <= trials]
            print(arguments.space, method, seed, best, f"{time.perf_counter() - start:.0f} s", flush=True)


def hand(arguments: argparse.Namespace) -> None:
    """Hand-made schedules of tokens, and in the wider space of widths, projected onto the budget."""
    problem = Problem(arguments.space, arguments.cache)
    found: dict[str, float] = {}
    cascades = ["geometric", {"name": "geometric", "first_block": 0}, "staged", "constant"]
    cascades += [{"name": "staged", "blocks": [1]}, {"name": "staged", "blocks": [1, 3, 4]}]
    narrow = {"embed": {"low": 0.5}, "attention": {"low": 0.25}, "mlp": {"low": 0.25}}
    some = {"attention": {"low": 0.25}, "mlp": {"low": 0.25}}
    made = [{"name": str(c), "cascade": c} for c in cascades]
    if arguments.space == "tokens-widths":
        made += [{"name": "widths", "cascade": "keep_all", "widths": narrow}]
        made += [{"name": "inner widths", "cascade": "keep_all", "widths": some}]
        made += [{"name": "tokens and inner widths", "cascade": "geometric", "widths": some}]
    for settings in made:
        candidate = candidate_of(Baseline(**{"scorer": "joint", "aggregator": "host", **settings}))
        try:
            found[settings["name"]] = problem.kl(problem.scheduler.plan(candidate, problem.budget), candidate)
        except BudgetError as error:
            print(settings["name"], error)
    for number, start in enumerate(problem.space.known_good()):
        point = {d.name: start.get(d.name, d.high) for d in problem.space.dimensions}
        found[f"known good point {number}"] = problem.projected(point)[0]
    write(arguments.out / "hand.json", arguments.space, {k: round(v, 6) for k, v in found.items()})


def front(arguments: argparse.Namespace) -> None:
    """One study of all budgets with N trials against studies of one budget with N / 5 trials each."""
    steps = (FRONT[-1] - FRONT[0]) // (len(FRONT) - 1)
    whole = f"{{macs: {{low: {FRONT[0]}%, high: {FRONT[-1]}%, step: {steps}%}}}}"
    for seed in arguments.seeds:
        key = f"{arguments.space} {arguments.trials} {seed}"
        if key in stored(arguments.out / "front.json"):
            continue
        problem = Problem(arguments.space, arguments.cache, whole)
        together = _front_study(problem, seed, arguments.trials)
        alone, each = [], arguments.trials // len(FRONT)
        for budget in problem.scheduler.budgets:
            problem.budget = budget
            alone.append(min(v for v in with_sampler("shell", problem, seed, each) if v is not None))
        found = {"one": [round(v, 6) for v in together], "separate": [round(v, 6) for v in alone]}
        print(key, found, flush=True)
        write(arguments.out / "front.json", key, {"budgets": FRONT, **found})


def _front_study(problem: Problem, seed: int, trials: int) -> list[float]:
    """The best KL within each budget, of one study over all of them."""
    budgets, space = problem.scheduler.budgets, problem.space
    sampler = problem.plugins.build("sampler", ComponentRef("shell"))

    def project(point: Mapping[str, Any]) -> Point | None:
        try:
            plan = problem.scheduler.plan(space.decode(point), budgets[point["budget"]])
        except BudgetError:
            return None
        return space.at_plan(point, plan)

    dimensions = [*space.dimensions, Dimension("budget", 0, len(budgets) - 1, step=1)]
    sampler.start(SamplerRequest(dimensions, [False, False], seed, trials, space.known_good(), project))
    best = [float("inf")] * len(budgets)
    for _ in range(trials):
        point = dict(sampler.propose())
        problem.budget = budgets[point["budget"]]
        kl, measured = problem.projected(point)
        sampler.tell(Measured(measured, [kl, point["budget"]], {"macs": 0.0}))
        # What meets a tight budget meets the looser ones.
        best = [min(b, kl) if i >= point["budget"] else b for i, b in enumerate(best)]
    return best


def report(arguments: argparse.Namespace) -> None:
    """The table, and one plot per space (the extra `plots`)."""
    rows, hands = read(arguments.out / "curves.jsonl"), stored(arguments.out / "hand.json")
    lines: list[str] = []
    for space in SPACES:
        curves = {m: [r for r in rows if (r["space"], r["method"]) == (space, m)] for m in METHODS}
        curves = {m: c for m, c in curves.items() if c}
        if not curves:
            continue
        lines += [
            f"## {space}",
            "",
            "| method | seeds | 25 | 50 | 100 | 200 trials | trials in which `shell` gets as far as with 200 |",
            "|---|---|---|---|---|---|---|",
        ]
        for method, runs in curves.items():
            cells = [_cell(runs, n) for n in (25, 50, 100, 200)]
            fewer = "" if method == "shell" else needed(curves, method) or "more than it had"
            lines.append(f"| {method} | {len(runs)} | {' | '.join(cells)} | {fewer} |")
        for name, kl in sorted(hands.get(space, {}).items(), key=lambda x: x[1]):
            lines.append(f"| by hand: {name} | 1 | {kl:.4f} | | | | |")
        lines.append("")
        _plot(arguments.out / f"{space}.svg", space, curves, hands.get(space, {}))
    whole = stored(arguments.out / "front.json")
    if whole:
        lines += ["## one study of the whole front / five separate ones of a fifth of its trials", ""]
        lines += ["| space, trials, seed | " + " | ".join(f"{b}%" for b in FRONT) + " |"]
        lines += ["|---|" + "---|" * len(FRONT)]
    for key, found in whole.items():
        lines.append(_front_line(key, found["one"], found["separate"]))
    groups: dict[str, list[Any]] = {}
    for key, found in whole.items():
        groups.setdefault(key.rpartition(" ")[0], []).append(found)
    for group, members in groups.items():
        medians = [
            [statistics.median(column) for column in zip(*(m[side] for m in members), strict=True)]
            for side in ("one", "separate")
        ]
        lines.append(_front_line(f"{group}, median of {len(members)}", *medians))
    text = "\n".join(lines) + "\n"
    (arguments.out / "table.md").write_text(text)
    print(text)


def _front_line(name: str, one: Sequence[float], separate: Sequence[float]) -> str:
    return (
        f"| {name} | " + " | ".join(f"{a:.4f} / {b:.4f}" for a, b in zip(one, separate, strict=True)) + " |"
    )


def needed(curves: Mapping[str, Sequence[Any]], of: str, trials: int = 200) -> int | None:
    """After how many trials the median of `shell` is as low as that of another method after `trials`."""
    ours, theirs = ([r["values"] for r in curves.get(name, ())] for name in ("shell", of))
    goal = _median(theirs, trials)
    longest = min(map(len, ours), default=0)
    return next((n for n in range(1, longest + 1) if _median(ours, n) <= goal < math.inf), None)


def _median(runs: Sequence[Sequence[float | None]], trials: int) -> float:
    """Of the best after so many trials; infinite where there is none in half of the runs, or no run."""
    found = [best_after(values, trials) for values in runs if len(values) >= trials]
    return statistics.median([math.inf if v is None else v for v in found]) if found else math.inf


def _cell(runs: Sequence[Mapping[str, Any]], trials: int) -> str:
    """Median and range over the seeds of the best after so many trials."""
    found = [best_after(r["values"], trials) for r in runs if len(r["values"]) >= trials]
    known = [math.inf if v is None else v for v in found]
    if not known:
        return ""
    return f"{statistics.median(known):.4f} ({min(known):.4f} to {max(known):.4f})"


def _plot(path: Path, space: str, curves: Mapping[str, Sequence[Any]], hands: Mapping[str, float]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for method, runs in curves.items():
        count = min(len(r["values"]) for r in runs)
        best = [[best_after(r["values"], n) or math.nan for r in runs] for n in range(1, count + 1)]
        trials = range(1, count + 1)
        (line,) = axes.plot(trials, [statistics.median(v) for v in best], label=method)
        axes.fill_between(
            trials, [min(v) for v in best], [max(v) for v in best], alpha=0.15, color=line.get_color()
        )
    if hands:
        axes.axhline(min(hands.values()), color="black", linestyle=":", label="best by hand")
    axes.set(xlabel="trials", ylabel="lowest KL to the teacher (median, range)", yscale="log", title=space)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def stored(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def write(path: Path, key: str, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**stored(path), key: value}, indent=1) + "\n")


def best_after(values: Sequence[float | None], trials: int) -> float | None:
    """The lowest KL of the first `trials` proposals; None if none was within the budget."""
    return min((v for v in values[:trials] if v is not None), default=None)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run), ("hand", hand), ("front", front), ("report", report)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--out", type=Path, default=ROOT / "results" / "search-benchmark")
        command.add_argument("--cache", type=Path, default=Path("~/.cache/ucc-search/benchmark").expanduser())
        command.add_argument("--space", choices=SPACES, default="tokens")
        command.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS))
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
        command.add_argument("--trials", type=int, default=200)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
