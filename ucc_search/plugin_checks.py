"""What a module must be to serve as a plugin, each failure in one sentence. Imports no torch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from ucc_search.errors import PluginError, UserError
from ucc_search.hookspecs import HOOKSPEC_VERSION, PROJECT


def check_version(module: Any) -> None:
    wanted = getattr(module, "ucc_search_api", None)
    if wanted is None:
        return
    from packaging.specifiers import SpecifierSet

    if str(HOOKSPEC_VERSION) not in SpecifierSet(str(wanted)):
        raise PluginError(
            f"it needs hook version {wanted}, this ucc-search has {HOOKSPEC_VERSION}; "
            "upgrade the older of the two"
        )


def checked_mapping(offered: Any, hook: str) -> dict[str, Any]:
    if not isinstance(offered, Mapping):
        kind = type(offered).__name__
        raise PluginError(f"{hook} returned {kind}, expected a mapping of names to factories")
    for name, factory in offered.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w.-]*", name) or not callable(factory):
            raise PluginError(
                f"{hook} offers {name!r}: {factory!r}, expected a plain name and a class or function"
            )
    return dict(offered)


def parameters_of(factory: Callable[..., Any]) -> dict[str, Any] | None:
    """Parameter names and defaults, `inspect.Parameter.empty` if required; None where any are taken."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def one_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UserError) and text:
        return text
    if isinstance(error, SyntaxError):
        return f"syntax error at line {error.lineno}: {error.msg}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        if error.name.partition(".")[0] == PROJECT:
            return f"it needs {error.name!r}, which this version of ucc-search does not have"
        return f"it needs the module {error.name!r}, which is not installed; install it with pip"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
