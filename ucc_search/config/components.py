"""Components named in a space file: one, or several among which the search chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from ucc_search.config.base import Frozen
from ucc_search.interfaces import ComponentRef


def _component_list(value: Any) -> Any:
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries:
        raise ValueError("is empty, expected a component name")
    return _component_refs(entries)


def _component_refs(value: Any) -> tuple[ComponentRef, ...]:
    entries = value if isinstance(value, list | tuple) else [value]
    refs = []
    for entry in entries:
        if isinstance(entry, ComponentRef):
            refs.append(entry)
            continue
        mapping = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(mapping, Mapping) or not isinstance(mapping.get("name"), str):
            raise ValueError(f"got {entry!r}, expected a component name or a mapping with `name`")
        refs.append(ComponentRef.from_dict(mapping))
    return tuple(refs)


def _component_dicts(refs: tuple[ComponentRef, ...]) -> list[dict[str, Any]]:
    return [ref.to_dict() for ref in refs]


Choices = Annotated[
    tuple[ComponentRef, ...], BeforeValidator(_component_list), PlainSerializer(_component_dicts)
]
Observers = Annotated[
    tuple[ComponentRef, ...], BeforeValidator(_component_refs), PlainSerializer(_component_dicts)
]


def _one_component(value: Any) -> Any:
    refs = _component_list(value)
    if len(refs) > 1:
        raise ValueError(f"got {len(refs)} components, expected one")
    return refs[0]


Choice = Annotated[ComponentRef, BeforeValidator(_one_component), PlainSerializer(ComponentRef.to_dict)]


class ComponentChoices(Frozen):
    """Which plugins may be used; where several are listed, the choice is searched."""

    scorer: Choices = (ComponentRef("joint"),)
    aggregator: Choices = (ComponentRef("host"),)
    cascade: Choices = (ComponentRef("per_block"),)
    distiller: Choices = (ComponentRef("two_level"),)
    importance: Choices = (ComponentRef("fisher"),)
    """Which units narrower models keep."""
