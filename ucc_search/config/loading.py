"""Reading and writing space files: YAML plus `--set` overrides, and errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ucc_search.config.base import TAGS
from ucc_search.config.run import RunConfig
from ucc_search.errors import ConfigError, did_you_mean

RESOLVED = "config.resolved.yaml"
"""In a run folder: the configuration of the run, all defaults written out."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a space file and apply `key.sub=value` overrides (values are YAML).

    Raises:
        ConfigError: one sentence with the file, the key, what came and what is allowed.
    """
    path = Path(path)
    if path.is_dir():
        run = f"; the space file of the run in it is {path / RESOLVED}" if (path / RESOLVED).is_file() else ""
        raise ConfigError(f"{path}: is a folder, expected a space file (YAML){run}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = did_you_mean(
            path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        )
        raise ConfigError(f"{path}: no such file{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason}); expected a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{path}: not valid YAML{where}: {problem}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping with the keys {', '.join(RunConfig.model_fields)}")
    for override in overrides:
        _override(data, override)
    return parse_config(data, source=str(path))


def parse_config(data: Mapping[str, Any], *, source: str = "config") -> RunConfig:
    """Validate a mapping as a run's configuration."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal object."""
    return str(yaml.safe_dump(plain_config(config), sort_keys=False, allow_unicode=True))


def plain_config(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain mappings, lists and values; what is not set is left out."""
    plain: dict[str, Any] = _plain(config.model_dump(mode="python"))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: expected key=value, for example search.trials=20")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text!r}: the value is not valid YAML") from None
    *parents, leaf = key.strip().split(".")
    node = data
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {text!r}: {part!r} is not a section")
        node = child
    node[leaf] = parsed


def parse_pairs(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """`key=value` texts as a mapping; values are YAML.

    Raises:
        ConfigError: a text without a key.
    """
    found: dict[str, Any] = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{option} {text!r}: expected key=value")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{option} {text!r}: the value is not valid YAML") from None
    return found


def _explain(error: ValidationError, source: str) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"] if not str(part).startswith("function-")]
    key = ".".join(location) or "the file"
    if problem["type"] == "extra_forbidden":
        allowed = _allowed_keys(problem["loc"][:-1])
        return (
            f"{source}: unknown key {key!r}{did_you_mean(location[-1], allowed)}"
            f" (allowed here: {', '.join(allowed)})"
        )
    if problem["type"] == "missing":
        return f"{source}: the key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{source}: {key}: {message}"
    return f"{source}: {key} is {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _allowed_keys(location: Sequence[Any]) -> list[str]:
    """Field names of the model at this place, following annotations through optionals and tuples."""
    model: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, int) or str(part) in TAGS:
            continue
        field = model.model_fields.get(str(part))
        nested = models_in(field.annotation) if field else []
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in models_in(arg)]
