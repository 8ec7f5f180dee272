"""The README of an exported model: what it is, how good, how it was made, how to load it. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from ucc_search.artifacts import Artifact
from ucc_search.costs import cost
from ucc_search.plan import CompressionPlan
from ucc_search.units import format_macs, format_params

_FRONT = """---
library_name: ucc-search
pipeline_tag: image-classification
tags: [vision-transformer, compression, ucc-search]
---
"""


def model_card(artifact: Artifact, usage: Sequence[str], checks: Sequence[str] = ()) -> str:
    """Markdown, with the metadata that the Hugging Face Hub reads.

    Args:
        usage: lines of Python that load this very format.
        checks: what was verified when it was exported, a sentence each.
    """
    model = artifact.arch["model"]["name"]
    parts = [
        _FRONT,
        f"# {model}, compressed ({artifact.name})\n",
        "A Vision Transformer compressed by [ucc-search](https://pypi.org/project/ucc-search/).\n",
        "## Cost and accuracy\n",
        _table(_facts(artifact)),
        "## How to load it\n",
        "```python\n" + "\n".join(usage) + "\n```\n",
        _preparation(artifact.arch),
        *(
            ["## Checked when it was exported\n", "\n".join(f"- {c}" for c in checks) + "\n"]
            if checks
            else []
        ),
        "## Architecture\n",
        _architecture(artifact),
        *_recipe(artifact),
    ]
    return "\n".join(parts)


def _facts(artifact: Artifact) -> list[tuple[str, str]]:
    plan, row = artifact.plan, artifact.row
    dense = cost(CompressionPlan.identity(plan.shape))
    if row is None:
        return [
            ("MACs of the uncompressed model, one image", format_macs(dense.macs)),
            ("parameters of the uncompressed model", format_params(dense.params)),
            ("accuracy", "not known: the folder does not lie in its run"),
        ]
    facts = [
        (
            "MACs, one image",
            f"{format_macs(row.macs)} ({100 * row.macs_ratio:.1f} % of {format_macs(dense.macs)})",
        ),
        ("parameters", f"{format_params(row.params)} (of {format_params(dense.params)})"),
        ("budget", row.target),
    ]
    measured = (
        ("accuracy on the selection split", row.accuracy),
        ("accuracy on the test split (never used to choose)", row.test_accuracy),
    )
    facts += [(name, f"{100 * value:.2f} %") for name, value in measured if value is not None]
    if row.kl is not None:
        facts.append(("KL to the teacher, calibration images", f"{row.kl:.4f} nats"))
    return facts


def _table(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts)]) + "\n"


def _preparation(arch: dict[str, Any]) -> str:
    shape = arch["plan"]["shape"]
    height, width = shape["image_size"]
    text = f"Images: {shape['channels']} x {height} x {width}, values from 0 to 1"
    known = arch.get("normalisation") or {}
    if known:
        text += f", then minus mean {known['mean']} and divided by std {known['std']} per channel"
    return f"{text}. The output is {shape['classes']} logits.\n"


def _architecture(artifact: Artifact) -> str:
    plan, parts = artifact.plan, artifact.arch["components"]
    lines = [
        f"- patch tokens after each block: {list(plan.tokens)} (of {plan.shape.tokens})",
        f"- embedding width: {list(plan.embed_dims)}; heads: {[b.heads for b in plan.blocks]}",
        f"- query/key and value widths per head: {[[b.qk_dim, b.v_dim] for b in plan.blocks]}",
        f"- hidden units of the MLPs: {[b.mlp_hidden for b in plan.blocks]}",
        *(f"- {kind}: `{json.dumps(parts[kind])}`" for kind in sorted(parts)),
    ]
    foreign = sorted(
        {
            str(i["plugin"])
            for kind, i in artifact.arch.get("identities", {}).items()
            if kind in parts and i.get("plugin") not in (None, "builtin")
        }
    )
    if foreign:
        lines.append(f"- **needs the plugin {', '.join(foreign)}** to load as safetensors")
    return "\n".join(lines) + "\n"


def _recipe(artifact: Artifact) -> list[str]:
    """How the trial was made: data, method, training, and the versions and commit behind it."""
    run, row = artifact.run, artifact.row
    if run is None or row is None:
        return []
    config = run.config
    train = config.train.model_dump(mode="json", exclude_defaults=True)
    recipe = {
        "model": config.model.model_dump(mode="json", exclude_defaults=True),
        "data": config.data.model_dump(mode="json", exclude_defaults=True),
        "method": row.method,
        "components": row.components,
        "rung": row.rung,
        "seed": row.seed,
        "train": train,
    }
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
    lines = ["## Recipe\n", f"```yaml\n{text}```\n"]
    path = run.path / "environment.json"
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        versions = ", ".join(f"{k} {v}" for k, v in known.get("versions", {}).items() if v)
        lines += [
            "## Provenance\n",
            f"- run `{config.name}`, trial {row.id}, plan `{row.plan_key}`, finished {row.finished_at or 'unknown'}",
            f"- command `{known.get('command', 'unknown')}`, commit `{known.get('commit') or 'unknown'}`",
            f"- {versions}; Python {known.get('python')}, {known.get('machine')}\n",
        ]
    return lines
