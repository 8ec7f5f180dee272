"""Data sets and models that plugins bring, put into the sections of a space file that name them. No torch."""

from __future__ import annotations

from typing import Any

from ucc_search.config import Bound, ModelConfig, RunConfig
from ucc_search.errors import ConfigError
from ucc_search.interfaces import ComponentRef
from ucc_search.plugins import Plugins

PREFIX = "plugin:"


def bind(config: RunConfig, plugins: Plugins) -> RunConfig:
    """The same configuration, whose data set and model can be loaded where a plugin brings them.

    Raises:
        PluginError: no plugin brings one of that name, or its `args` do not fit.
        ConfigError: `data.args` for a data set that is no plugin's.
    """
    if config.data.args and not config.data.name.startswith(PREFIX):
        raise ConfigError(
            f"data.args are for data sets of plugins (plugin:NAME), data.name is {config.data.name!r}"
        )
    data = _bound(config.data, "dataset", plugins)
    return config.model_copy(update={"data": data, "model": bind_model(config.model, plugins)})


def bind_model(config: ModelConfig, plugins: Plugins) -> ModelConfig:
    """The section `model` alone."""
    model: ModelConfig = _bound(config, "family", plugins)
    return model


def identities(config: RunConfig, plugins: Plugins) -> dict[str, Any]:
    """What a trial records of the plugins that bring its data set and model, by kind."""
    named = {"dataset": config.data.name, "family": config.model.name}
    return {
        kind: plugins.identity(kind, name.removeprefix(PREFIX))
        for kind, name in named.items()
        if name.startswith(PREFIX)
    }


def _bound(section: Any, kind: str, plugins: Plugins) -> Any:
    if not section.name.startswith(PREFIX):
        return section
    name = section.name.removeprefix(PREFIX)
    component = plugins.build(kind, ComponentRef(name, section.args))
    return section.with_bound(Bound(component, plugins.identity(kind, name)["sha256"]))
