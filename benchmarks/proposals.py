"""That no proposal of the search is over its budget: 500 of every sampler's kind, without measuring any.

Prints a line of JSON per space: proposals, those over the budget, the mean share of the budget that is
used, and the time of one proposal (sampler and projection).

    python benchmarks/proposals.py [--trials 500]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from ucc_search.config import load_config
from ucc_search.costs import cost
from ucc_search.interfaces import INFERENCE_KINDS, Measured, SamplerRequest
from ucc_search.plugins import Plugins
from ucc_search.schedule import Scheduler
from ucc_search.shapes import model_shape
from ucc_search.space import SearchSpace

SPACES = Path(__file__).resolve().parent.parent / "search_spaces"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=500)
    trials = parser.parse_args().trials
    for name in ("fashion_mnist_ucc.yaml", "fashion_mnist_ucc_upvit.yaml"):
        config = load_config(SPACES / name, ["budget={macs: 50%}", "baselines=[]"])
        plugins, shape = Plugins.load(environment=False), model_shape(config)
        space, scheduler = SearchSpace.of(config.space, shape, plugins), Scheduler(config, shape, plugins)
        budget, over, used = scheduler.budgets[0], 0, 0.0
        assert budget.max_macs is not None
        sampler = plugins.build("sampler", config.search.sampler)

        def project(point, space=space, scheduler=scheduler, budget=budget):
            return space.at_plan(point, scheduler.plan(space.decode(point), budget))

        sampler.start(SamplerRequest(space.dimensions, [False], 0, trials, space.known_good(), project))
        start = time.process_time()
        for number in range(trials):
            point = dict(sampler.propose())
            candidate = space.decode(point)
            plan = scheduler.plan(candidate, budget)
            macs = cost(plan, plugins.components(*(candidate.components[k] for k in INFERENCE_KINDS))).macs
            over, used = over + (macs > budget.max_macs), used + macs / budget.max_macs / trials
            # Nothing is measured here: any landscape keeps the sampler moving.
            sampler.tell(Measured(space.at_plan(point, plan), [1.0 + number % 7], {"macs": 0.0}))
        seconds = (time.process_time() - start) / trials
        row = {"space": name, "proposals": trials, "over_budget": over, "budget_used": round(used, 5)}
        print(json.dumps({**row, "cpu_seconds_per_proposal": round(seconds, 4)}), flush=True)


if __name__ == "__main__":
    main()
