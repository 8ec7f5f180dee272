"""A run on the terminal, as plain text through a pipe, and as JSON. Decides nothing: see `analysis`."""

from __future__ import annotations

from ucc_search.tables.analysis import analysis_json, print_analysis
from ucc_search.tables.comparison import comparison_json, print_comparison
from ucc_search.tables.picking import pick_message
from ucc_search.tables.probes import print_probes
from ucc_search.tables.wording import compact_tokens, gmacs_limit

__all__ = [
    "analysis_json",
    "comparison_json",
    "compact_tokens",
    "gmacs_limit",
    "pick_message",
    "print_analysis",
    "print_comparison",
    "print_probes",
]
