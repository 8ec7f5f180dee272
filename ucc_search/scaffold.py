"""`plugins new`: a plugin to start from, a single file or a package, that passes its own tests at once. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ucc_search.errors import PluginError, did_you_mean
from ucc_search.hookspecs import HOOKSPEC_VERSION
from ucc_search.plugins import HOOKS

_FILE = '''"""{summary}"""

{imports}

ucc_search_api = ">={version},<{next_version}"


{body}

@hookimpl
def {hook}():
    return {{"{component}": {cls}}}
'''

_SCORER = '''class {cls}(Scorer):
    """Scores a token by its length."""

    ranges = {{"power": {{"low": 0.5, "high": 2.0}}}}  # searched where a space file says power: search

    def __init__(self, power: float = 1.0):
        self.power = power

    def score(self, view):
        """scores_BN: one number per patch token, none for prefix tokens; larger is kept."""
        return view.patches_BND.norm(dim=-1) ** self.power
'''

_AGGREGATOR = '''class {cls}(Aggregator):
    """Keeps the tokens with the highest scores and drops the others."""

    merges = False

    def assign(self, view, scores_BN, keep):
        """Which of the N patch tokens stay (ascending), and which leave."""
        order_BN = scores_BN.argsort(dim=1, descending=True, stable=True)
        keep_BR, prune_BP = order_BN[:, :keep], order_BN[:, keep:]
        return Assignment(keep_BR.sort(dim=1).values, prune_BP.sort(dim=1).values)
'''

_CASCADE = '''class {cls}(Cascade):
    """Cuts the same share of the tokens in every block."""

    def profile(self, request):
        """Strength from 0 (nothing is pruned) to 1 -> patch tokens after each block."""
        tokens, depth = request.shape.tokens, request.shape.depth
        strongest = max(request.min_keep, 0.3)

        def schedule(strength):
            share = 1 - strength * (1 - strongest)
            return [max(1.0, tokens * share ** (block + 1)) for block in range(depth)]

        return schedule
'''

_DISTILLER = '''class {cls}(Distiller):
    """Mean squared difference of the logits."""

    ranges = {{"weight": {{"low": 0.1, "high": 10.0, "log": True}}}}

    def __init__(self, weight: float = 1.0):
        self.weight = weight

    def losses(self, student, teacher, progress):
        """Named, weighted scalars; progress runs from 0 to 1 over the training."""
        difference_BC = student.logits_BC.float() - teacher.logits_BC.float()
        return {{"{component}": self.weight * difference_BC.square().mean()}}
'''

_IMPORTANCE = '''class {cls}(Importance):
    """Largest weight that leaves with a unit."""

    needs_images = False

    def score(self, probe, group):
        """scores_U: one finite number per unit of the group, larger is kept."""
        return sum(matrix.detach().abs().amax(dim=1).double() for matrix in probe.weights(group))
'''

_SAMPLER = '''class {cls}(Sampler):
    """Random points; then steps away from the best one."""

    def start(self, request):
        self.request, self.random = request, random.Random(request.seed)
        self.waiting, self.best = list(request.starts), None

    def propose(self):
        """A value for every dimension."""
        known = self.waiting.pop(0) if self.waiting else (self.best or (None, {{}}))[1]
        return {{d.name: self._value(d, known.get(d.name)) for d in self.request.dimensions}}

    def _value(self, dimension, known):
        if known is not None and self.random.random() < 0.7:
            return known
        if dimension.choices is not None:
            return self.random.choice(dimension.choices)
        if dimension.step is not None:
            count = int((dimension.high - dimension.low) / dimension.step)
            return dimension.low + dimension.step * self.random.randint(0, count)
        if dimension.log:
            low, high = math.log(dimension.low), math.log(dimension.high)
            return min(max(math.exp(self.random.uniform(low, high)), dimension.low), dimension.high)
        return self.random.uniform(dimension.low, dimension.high)

    def tell(self, measured):
        """`measured.point` is the proposal after projection onto the budget."""
        if measured.values is None or any(over > 0 for over in measured.constraints.values()):
            return
        value = -measured.values[0] if self.request.maximize[0] else measured.values[0]
        if self.best is None or value < self.best[0]:
            self.best = (value, dict(measured.point))
'''

_METRIC = '''class {cls}(Metric):
    """Patch tokens in all blocks together: what activations take in memory, roughly."""

    unit = "tokens"

    def value(self, plan, components):
        """Finite, and never less for a plan with more tokens or wider layers."""
        return float(sum(plan.tokens))
'''

_OBSERVER = '''class {cls}(Observer):
    """Appends a line for every trial to trials.log in the run folder."""

    def run_started(self, run_path, config):
        self.path = run_path / "trials.log"

    def trial_finished(self, row):
        """`row` has the columns of trials.csv."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{{row['id']}} {{row['state']}} {{row.get('accuracy')}}\\n")
'''

_DATASET = '''class {cls}(Dataset):
    """Squares and crosses of 8 x 8 pixels, drawn with noise."""

    def __init__(self, images: int = 400):
        self.images = images

    def load(self):
        """Images as bytes [B, C, H, H] and labels [B], for training and for the test."""
        import torch

        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(self.images) % 2
        pictures = torch.randint(0, 100, (self.images, 1, 8, 8), generator=generator)
        pictures[labels == 0, :, 2:6, 2:6] += 120
        pictures[labels == 1, :, 3:5, :] += 120
        pictures = pictures.to(torch.uint8)
        test = self.images // 4
        return ImageData(pictures[test:], labels[test:], pictures[:test], labels[:test], classes=2)
'''

_FAMILY = '''class {cls}(Family):
    """A timm Vision Transformer of a size of its own."""

    def __init__(self, img_size: int = 8, patch_size: int = 2, embed_dim: int = 32, depth: int = 4):
        self.options = {{
            "img_size": img_size,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": 2,
        }}

    def build(self, *, classes, channels, pretrained):
        """timm's own VisionTransformer; change the stem, the pooling or the weights here."""
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(num_classes=classes, in_chans=channels, **self.options)
'''

_BODIES: Mapping[str, tuple[str, str]] = {
    "scorer": ("Scorer", _SCORER),
    "aggregator": ("Aggregator", _AGGREGATOR),
    "cascade": ("Cascade", _CASCADE),
    "distiller": ("Distiller", _DISTILLER),
    "importance": ("Importance", _IMPORTANCE),
    "sampler": ("Sampler", _SAMPLER),
    "metric": ("Metric", _METRIC),
    "observer": ("Observer", _OBSERVER),
    "dataset": ("Dataset", _DATASET),
    "family": ("Family", _FAMILY),
}

_PYPROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{package}"
version = "0.1.0"
description = "{summary}"
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["ucc-search"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points.ucc_search]
{component} = "{module}"

[tool.setuptools]
py-modules = ["{module}"]
"""

_TEST = '''"""It keeps the contract of ucc-search, line by line."""

import pytest
from {module} import {cls}

from ucc_search.testing import checks_for, run_checks


@pytest.mark.parametrize("check", checks_for({cls}()), ids=lambda check: check.name)
def test_contract(check):
    (result,) = run_checks({cls}(), [check])
    assert result.passed, str(result)
'''

_README = """# {package}

{summary}

```console
$ pip install -e '.[test]'
$ pytest                                    # the contract, line by line
$ ucc-search plugins info {component}
$ ucc-search search SPACE.yaml {use}
```
"""

_USES = {
    "sampler": "--set search.sampler={component}",
    "observer": "--set observers={component}",
    "dataset": "--set data.name=plugin:{component}",
    "family": "--set model.name=plugin:{component}",
    "metric": "--set budget.{component}=50%",
}


def one_name(name: str, more: Sequence[str]) -> None:
    """Refuse further words after the name.

    Raises:
        PluginError: with the command that was probably meant.
    """
    if not more:
        return
    words = [name, *more]
    kind = next((w for w in words if w in HOOKS), "KIND")
    meant = next((w for w in words if w != kind), name)
    raise PluginError(
        f"plugins new takes one name, got {' and '.join(map(repr, words))}; the kind is an option: "
        f"ucc-search plugins new {meant} --kind {kind}"
    )


def new_plugin(kind: str, name: str, folder: Path, *, package: bool) -> list[Path]:
    """Write a plugin that works, to be changed.

    Args:
        kind: one of `plugins.HOOKS`.
        name: of the component, as space files will say it; letters, digits and `_`.
        folder: where the file, or the package's own folder, is made.
        package: with pyproject.toml, README.md and a test.

    Returns:
        The files written.

    Raises:
        PluginError: an unknown kind, a name that does not do, or something is there already.
    """
    if kind not in _BODIES:
        raise PluginError(f"unknown kind {kind!r}{did_you_mean(kind, _BODIES)} (kinds: {', '.join(_BODIES)})")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise PluginError(
            f"the name {name!r} does not do: expected small letters, digits and _, beginning with a letter"
        )
    words = _words(kind, name, package)
    if package:
        top = folder / words["package"]
        files = {
            top / f"{words['module']}.py": _module(kind, words),
            top / "pyproject.toml": _PYPROJECT.format(**words),
            top / "README.md": _README.format(**words),
            top / "tests" / f"test_{name}.py": _TEST.format(**words),
        }
    else:
        files = {folder / f"{name}.py": _module(kind, words)}
    for path in files:
        if path.exists():
            raise PluginError(f"{path} is there already; choose another name or folder")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(files)


def _words(kind: str, name: str, package: bool) -> dict[str, str]:
    return {
        "component": name,
        "cls": "".join(part.capitalize() for part in name.split("_")),
        "package": f"ucc-plugin-{name.replace('_', '-')}",
        "module": f"ucc_plugin_{name}" if package else name,
        "summary": f"The {kind} {name!r} for ucc-search.",
        "hook": HOOKS[kind],
        "use": _USES.get(kind, f"--set space.{kind}={{component}}").format(component=name),
        "version": str(HOOKSPEC_VERSION),
        "next_version": str(HOOKSPEC_VERSION + 1),
    }


def _module(kind: str, words: Mapping[str, str]) -> str:
    base, body = _BODIES[kind]
    imports = f"from ucc_search import {base}, hookimpl"
    if kind == "aggregator":
        imports += "\nfrom ucc_search.interfaces import Assignment"
    if kind == "dataset":
        imports += "\nfrom ucc_search.interfaces import ImageData"
    if kind == "sampler":
        imports = f"import math\nimport random\n\n{imports}"
    return _FILE.format(imports=imports, body=body.format(**words), **words)
