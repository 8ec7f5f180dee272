"""What every section of a space file is built on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


TAGS = ("function-number", "function-range")  # in the place of an error, but not in the file
