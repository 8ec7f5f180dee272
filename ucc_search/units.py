"""Amounts as people write them ("2.1G", "600M") and as tables show them."""

from __future__ import annotations

import re

from ucc_search.errors import BudgetError

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_AMOUNT = re.compile(r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([kKmMgGtT]?)\s*")


def parse_amount(value: str | float, *, key: str = "amount") -> int:
    """A positive integer from a number or a text with an optional k, M, G or T.

    Raises:
        BudgetError: naming `key`.
    """
    match = _AMOUNT.fullmatch(str(value))
    amount = float(match[1].replace("_", "")) * _FACTORS[match[2].lower()] if match else 0.0
    if amount < 1:
        raise BudgetError(f"{key} is {str(value)!r}, expected an amount such as 2.1G, 600M or 4500000000")
    return int(amount)


def format_macs(macs: int) -> str:
    """For example `1.254 GMACs` or `8.31 MMACs`."""
    return f"{macs / 1e9:.3f} GMACs" if macs >= 10**9 else f"{macs / 1e6:.2f} MMACs"


def format_params(params: int) -> str:
    """For example `5.72 M parameters`."""
    return f"{params / 1e6:.2f} M parameters" if params >= 10**6 else f"{params / 1e3:.1f} k parameters"
