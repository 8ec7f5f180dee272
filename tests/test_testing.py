"""The conformance suite passes what keeps the contract, and says which line another breaks, where, and what to do."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from test_learned import Predictor
from torch import nn

from ucc_search.builtin.aggregators import Drop, Host
from ucc_search.builtin.cascades import Geometric
from ucc_search.builtin.distillers import Logits
from ucc_search.builtin.importances import Magnitude
from ucc_search.builtin.scorers import ClassAttention
from ucc_search.errors import PluginError
from ucc_search.interfaces import Assignment, Component, Metric, Observer, Sampler, Scorer
from ucc_search.testing import assert_conforms, checks_for, conformance
from ucc_search.testing.core import run_checks


class Norm(Scorer):
    def score(self, view):
        return view.patches_BND.norm(dim=-1)


class Prefixed(Scorer):
    def score(self, view):
        return view.x_BTD.norm(dim=-1)


class Unreduced(Scorer):
    def score(self, view):
        return view.patches_BND


class Relative(Scorer):
    def score(self, view):
        norm_BN = view.patches_BND.norm(dim=-1)
        return norm_BN / norm_BN.sum(dim=1, keepdim=True)


class Noisy(Scorer):
    def score(self, view):
        return torch.rand(view.patches_BND.shape[:2])


class Centred(Scorer):
    def score(self, view):
        return (view.patches_BND - view.patches_BND.mean(dim=0)).norm(dim=-1)


class InPlace(Scorer):
    def score(self, view):
        view.x_BTD[:, : view.prefix] = 0
        return view.patches_BND.norm(dim=-1)


class Attends(Scorer):
    def score(self, view):
        return view.attn_BHTT.mean(dim=(1, 2))[:, view.prefix :]


class OnCpu(Scorer):
    def score(self, view):
        weight_N = torch.arange(view.patches_BND.shape[1])
        return view.patches_BND.norm(dim=-1) * weight_N


class Branches(Norm):
    def score(self, view):
        norm_BN = super().score(view)
        return norm_BN if float(norm_BN.max()) > 1 else -norm_BN


class Projected(Norm):
    def score(self, view):
        return (view.patches_BND @ view.patches_BND.transpose(1, 2)).sum(-1)


class Untrained(Predictor):
    learned = False


class Deaf(Predictor):
    def build(self, site):
        return Detached(super().build(site))


class Detached(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, view):
        return self.inner(view).detach()


class Undeclared(Predictor):
    def params(self, site):
        return 0


class Ranged(Norm):
    ranges: ClassVar = {"widht": {"low": 0, "high": 1}}

    def __init__(self, width: float = 1.0):
        self.width = width


class Everything(Drop):
    def assign(self, view, scores_BN, keep):
        order = scores_BN.argsort(dim=1)
        return Assignment(order[:, :0], order)


class Nothing(Drop):
    def assign(self, view, scores_BN, keep):
        order = scores_BN.argsort(dim=1).sort(dim=1).values
        return Assignment(order, order[:, :0])


class Twice(Drop):
    def assign(self, view, scores_BN, keep):
        found = super().assign(view, scores_BN, keep)
        return found._replace(prune_BP=torch.zeros_like(found.prune_BP))


class HostsOutside(Host):
    def assign(self, view, scores_BN, keep):
        found = super().assign(view, scores_BN, keep)
        return found._replace(host_BP=found.prune_BP)


class Free(Host):
    def macs(self, site):
        return 0


class Rising(Geometric):
    def profile(self, request):
        return lambda strength: [request.shape.tokens * (1 - 0.5 * strength), request.shape.tokens, 1.0]


class PerImage(Logits):
    def losses(self, student, teacher, progress):
        return {"logits": (student.logits_BC - teacher.logits_BC).square().mean(1)}


class Blind(Logits):
    def losses(self, student, teacher, progress):
        return {"logits": (student.logits_BC.detach() - teacher.logits_BC).square().mean()}


class OneScore(Magnitude):
    def score(self, probe, group):
        return torch.ones(1)


class Fixed(Sampler):
    def start(self, request):
        self.request = request

    def propose(self):
        return {d.name: d.choices[0] if d.choices else 2.0 for d in self.request.dimensions}

    def tell(self, measured):
        pass


class Growing(Metric):
    def value(self, plan, components):
        return 1000.0 - sum(plan.tokens)


class Proud(Observer):
    def trial_finished(self, row):
        row["accuracy"] = 1.0


BROKEN = [
    (Prefixed(), "shape", "prefix tokens are scored as well as the 16 patches", "scores[:, view.prefix:]"),
    (Unreduced(), "shape", "shape (2, 16, 16)", "reduce over the channels"),
    (Relative(), "finite", "32 of 32 scores are NaN for all-zero tokens", "clamp_min"),
    (Noisy(), "determinism", "other scores for the same tokens", "fixed seed"),
    (Centred(), "batch", "change with the images beside it", "dim=1"),
    (InPlace(), "prefix", "changed view.x_BTD, prefix tokens included", "no in-place"),
    (Attends(), "shape", "raised AttributeError: 'NoneType'", "needs_attention = True"),
    (OnCpu(), "device", "mixes tokens on a GPU with tensors on the CPU", "device=view.x_BTD.device"),
    (Branches(), "export", "torch.export cannot trace it", "no branches on values"),
    (Projected(), "cost", "MACs in a model of 3 blocks", "macs(site) must return"),
    (Untrained(), "gradient", "has parameters, and nothing trains them", "learned = True"),
    (Deaf(), "gradient", "the loss does not reach blocks.0.scorer.inner.net.0.weight", "detach()"),
    (Undeclared(), "cost", "parameters, ", "params(site) of the scorer must return +146"),
    (Ranged(), "ranges", "ranges has 'widht', which __init__ does not take", "name parameters"),
    (Everything(), "count", "keeps 0 tokens for keep=10 of 16", "at least one"),
    (Nothing(), "count", "prunes nothing", "keep fewer tokens"),
    (Twice(), "partition", "no partition of 0..15", "each token in one of them"),
    (HostsOutside(), "hosts", "host points outside 0..7", "places in keep_BR"),
    (Free(), "cost", "MACs in a model of 3 blocks", "macs(site)"),
    (Rising(), "monotone", "tokens come back", "non-increasing"),
    (PerImage(), "shape", "shape (1,) at progress 0.0, a batch of 1", "finite scalars"),
    (Blind(), "gradient", "no term has a gradient", "not detached"),
    (OneScore(), "shape", "scores of shape (1,), expected", "one per unit"),
    (Fixed(), "points", "proposed keep.0 = 2.0", "within its bounds"),
    (Growing(), "monotone", "costs more", "bisection"),
    (Proud(), "events", "changed the row", "copy it"),
]


def result_of(component: Component, name: str):
    (found,) = run_checks(component, [c for c in checks_for(component) if c.name == name])
    return found


@pytest.mark.parametrize(("component", "check", "problem", "fix"), BROKEN, ids=lambda v: type(v).__name__)
def test_a_broken_line_of_the_contract_is_named(component, check, problem, fix):
    found = result_of(component, check)
    assert not found.passed
    assert problem in found.problem
    assert fix in found.fix
    assert "test_testing.py:" in found.where
    for part in ("FAIL", found.contract, found.problem, found.fix, found.where):
        assert part in str(found)


SLOW = [pytest.param(c, marks=pytest.mark.slow) for c in (Norm(), ClassAttention(), Host())]


@pytest.mark.parametrize("component", [Predictor(), *SLOW], ids=lambda c: type(c).__name__)
def test_what_keeps_the_contract_passes(component):
    assert_conforms(component)


def test_every_check_is_made_whatever_the_others_find():
    results = conformance(Fixed())
    assert [r.check for r in results] == ["ranges", "points", "seed"]
    assert [r.passed for r in results] == [True, False, True]


def test_the_assertion_tells_all():
    with pytest.raises(AssertionError, match=r"Growing breaks its contract\nFAIL  monotone"):
        assert_conforms(Growing())
    with pytest.raises(PluginError, match="derives from none of Scorer, Aggregator"):
        assert_conforms(Component())


def test_every_builtin_conforms_where_it_is_cheap_to_see(builtin_components):
    for component in builtin_components:
        bad = [
            r
            for r in run_checks(component, [c for c in checks_for(component) if c.name != "export"])
            if not r.passed
        ]
        assert not bad, "\n".join(map(str, bad))


@pytest.fixture
def builtin_components():
    """Those whose whole suite takes no model to train or to score: the others have tests of their own."""
    from ucc_search.interfaces import ComponentRef
    from ucc_search.plugins import Plugins

    plugins = Plugins.load(entry_points=False, environment=False)
    kinds = {
        "cascade": ("geometric", "constant", "per_block", "staged"),
        "sampler": ("tpe", "random", "nsga2"),
    }
    return [plugins.build(k, ComponentRef(n)) for k, names in kinds.items() for n in names]
