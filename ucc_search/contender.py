"""One more method beside a space file's baselines: measured at the same budgets, with the same training. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from ucc_search.config import Baseline, ComponentChoices, RunConfig
from ucc_search.errors import ConfigError
from ucc_search.interfaces import ComponentRef


def with_contender(config: RunConfig, chosen: Mapping[str, str]) -> RunConfig:
    """The run that measures the baselines of `config` and one method more, and searches nothing.

    Args:
        chosen: a component by its kind, each a name or a YAML mapping with `name` and parameters; kinds that
            are left out take the first one of the `space:` section.

    Returns:
        The configuration, with the method last among its baselines, and a name of its own.

    Raises:
        ConfigError: nothing is chosen, a choice is not a component with fixed parameters, or a baseline has
            this name.
    """
    if not chosen:
        raise ConfigError("compare: name your method, for example --scorer my_score")
    options: dict[str, Any] = {k: getattr(config.space, k)[0] for k in ComponentChoices.model_fields}
    options |= {kind: _parsed(kind, text) for kind, text in chosen.items()}
    try:
        contender = Baseline(name="contender", **options)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ").replace("a baseline", "a contender")
        raise ConfigError(f"compare: {reason}; name one, for example --distiller logits") from None
    name = "-".join(getattr(contender, kind)[0].name.replace("/", "-") for kind in chosen)
    if name in {b.name for b in config.baselines}:
        raise ConfigError(
            f"compare: {name!r} is among the baselines of the space file already; compare another"
        )
    return config.model_copy(
        update={
            "name": f"{config.name}-{name}",
            "baselines": (*config.baselines, contender.model_copy(update={"name": name})),
            "search": config.search.model_copy(update={"trials": 0}),
        }
    )


def _parsed(kind: str, text: str) -> ComponentRef:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if isinstance(value, str):
        return ComponentRef(value)
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return ComponentRef.from_dict(value)
    raise ConfigError(
        f"--{kind} {text!r}: expected a name, or a mapping such as {{name: {kind}, parameter: 1}}"
    )
