"""`latency:`, what a latency is measured under."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ucc_search.config.base import Frozen


class LatencyConfig(Frozen):
    """How a table of latencies and finished models are timed; see `budget.latency_ms`.

    With this section, and without a limit on latency, trials record latencies all the same.
    """

    batch: int = Field(1, ge=1)
    """Images at a time; milliseconds are those of one such batch."""
    threads: int = Field(1, ge=1)
    """Of torch, on a CPU. One is the steadiest while other trials run."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What weights and images are converted to."""
    device: Literal["cpu", "cuda"] | None = None
    """The default is a GPU where there is one."""
    table: str | None = None
    """A table that `ucc-search latency --out` wrote, for another machine than this; its conditions count."""
    measure: bool = True
    """Time finished models as well; without, trials have the table's prediction alone."""
