"""Run checks of a contract and say which line of it broke, where, and what to do."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ucc_search
from ucc_search.interfaces import Component

_OURS = str(Path(ucc_search.__file__).parent)


class Broken(Exception):
    """A line of the contract does not hold.

    Args:
        problem: what came.
        fix: what to do about it.
        method: of the component, whose place in the source is shown.
    """

    def __init__(self, problem: str, fix: str, *, method: str = "") -> None:
        super().__init__(problem)
        self.problem, self.fix, self.method = problem, fix, method


@dataclass(frozen=True)
class Check:
    """One line of the contract of a kind of component.

    Args:
        name: one word.
        contract: the line, as `ucc_search.interfaces` means it.
        run: gets the component and raises `Broken`; whatever else it raises comes from the component.
    """

    name: str
    contract: str
    run: Callable[[Any], None]


@dataclass(frozen=True)
class Result:
    """What became of one check."""

    check: str
    contract: str
    passed: bool
    problem: str = ""
    fix: str = ""
    where: str = ""  # file:line in the component's own source

    def __str__(self) -> str:
        if self.passed:
            return f"ok    {self.check:<14} {self.contract}"
        place = f" ({self.where})" if self.where else ""
        return (
            f"FAIL  {self.check:<14} {self.problem}{place}\n"
            f"      contract: {self.contract}\n      what to do: {self.fix}"
        )


def run_checks(component: Component, checks: Sequence[Check]) -> list[Result]:
    """All checks, whatever the first of them find."""
    import torch

    results = []
    for check in checks:
        torch.manual_seed(0)  # a check draws the same numbers, alone or after others
        try:
            check.run(component)
        except Broken as error:
            place = _defined(component, error.method)
            results.append(Result(check.name, check.contract, False, error.problem, error.fix, place))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a plugin raises
            text = " ".join(str(error).split())[:300]
            problem = f"raised {type(error).__name__}: {text}"
            fix = _advice(component, error)
            results.append(Result(check.name, check.contract, False, problem, fix, _raised(error)))
        else:
            results.append(Result(check.name, check.contract, True))
    return results


def _advice(component: Component, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"install {error.name}, and list it under the dependencies of the plugin's package"
    if "NoneType" in str(error) and getattr(component, "needs_attention", True) is False:
        return "view.attn_BHTT is None unless the class says needs_attention = True"
    return "the method must work for what this check gives it; run it with the tokens described above"


def _defined(component: Component, method: str) -> str:
    """Where the component defines a method, or itself."""
    for thing in (getattr(type(component), method, None) if method else None, type(component)):
        try:
            file = inspect.getsourcefile(thing) if thing is not None else None
            if file and not file.startswith(_OURS):
                return f"{Path(file).name}:{inspect.getsourcelines(thing)[1]}"
        except (OSError, TypeError):
            continue
    return ""


def _raised(error: BaseException) -> str:
    """The innermost line that is neither ours nor a library's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OURS)]
    own = [f for f in frames if not any(part in f.filename for part in ("site-packages", "/lib/python", "<"))]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
