"""Latency as a price: a table of measured times, and the sum over a plan's parts.

`table` prices plans and knows no torch; `layout` says which parts a space needs at which sizes; `modules` builds
them; `measure` times them, and finished models; `kept` finds the table of a run, and has it measured where there is
none. Each imports only those named before it.
"""

from ucc_search.latency.table import (
    NOISY,
    TABLE_FORMAT,
    Conditions,
    Grid,
    Latency,
    LatencyTable,
    Part,
    block_kinds,
    components_key,
)

__all__ = [
    "NOISY",
    "TABLE_FORMAT",
    "Conditions",
    "Grid",
    "Latency",
    "LatencyTable",
    "Part",
    "block_kinds",
    "components_key",
]
