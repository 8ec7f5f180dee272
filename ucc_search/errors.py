"""Errors a user can mend. The command line prints their one sentence and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave is wrong: says what, where, what is allowed and what to do next."""


class ConfigError(UserError):
    """A key or value of the search-space file or of `--set`."""


class BudgetError(UserError):
    """A budget that cannot be parsed or reached."""


class PlanError(UserError):
    """Integers that do not describe a compressed version of the model."""


class ModelError(UserError):
    """A model or checkpoint that cannot be used."""


class DataError(UserError):
    """A data set that cannot be used."""


class PluginError(UserError):
    """A plugin or component name that cannot be used."""


class RunError(UserError):
    """A run folder that cannot be written, read or resumed."""


class ClusterError(UserError):
    """A Ray cluster that cannot be reached, or has no node big enough for a trial."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest allowed word, or an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
