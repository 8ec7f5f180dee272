"""Amounts as people write them ("2.1G", "600M") and as tables show them."""

from __future__ import annotations

import re
from decimal import Decimal

from ucc_search.errors import BudgetError

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_NUMBER = r"(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?"
_AMOUNT = re.compile(rf"\s*({_NUMBER})\s*([kKmMgGtT]?)\s*", re.ASCII)


def parse_amount(value: str | float, *, key: str = "amount") -> int:
    """A positive integer from a number or a text with an optional k, M, G or T; fractions round down.

    Args:
        key: where the value came from, for the error.

    Raises:
        BudgetError: naming `key`.
    """
    match = _AMOUNT.fullmatch(str(value))
    # Decimal: 4.35 * 10**9 in binary floats is one short of 4350000000.
    amount = Decimal(match[1].replace("_", "")) * _FACTORS[match[2].lower()] if match else Decimal(0)
    if amount < 1:
        raise BudgetError(
            f"{key} is {str(value)!r}, expected an amount of at least 1 such as 2.1G, 600M or 4500000000"
        )
    return int(amount)


def format_macs(macs: int) -> str:
    """For example `0.61 GMACs` or `8.31 MMACs`; giga from a tenth of one up."""
    return f"{macs / 1e9:.2f} GMACs" if macs >= 10**8 else f"{macs / 1e6:.2f} MMACs"


def format_params(params: int) -> str:
    """For example `5.72 M parameters` or `97.5 k parameters`."""
    return f"{params / 1e6:.2f} M parameters" if params >= 10**6 else f"{params / 1e3:.1f} k parameters"


def target_order(label: str) -> tuple[str, bool, Decimal]:
    """Sorts the labels of budgets (`macs=50%`): by what they limit, amounts before shares, the loosest first."""
    name, _, value = label.partition(",")[0].partition("=")
    match = _AMOUNT.fullmatch(value.removesuffix("%"))
    # The uncompressed model is measured under no budget.
    amount = Decimal(match[1].replace("_", "")) * _FACTORS[match[2].lower()] if match else Decimal(0)
    return name, value.endswith("%"), -amount
