"""The command line: parse, call one function, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

# In the order in which the help lists them.
# isort: off
from ucc_search.cli import searching, reading, delivery, measuring, plugins, machine

# isort: on
from ucc_search.cli.app import app, main

__all__ = ["app", "delivery", "machine", "main", "measuring", "plugins", "reading", "searching"]
