"""Customise text-to-image diffusion models of diffusers by low-rank attention terms: the extra `diffusion`.

Everything of the model stays frozen; a few megabytes are trained on 4 to 12 images. How to:
docs/diffusion.md.

Reference: Xiao et al. 2023, COMCAT, arXiv:2305.17235, the section on customisation.
"""

from __future__ import annotations

try:
    import diffusers  # noqa: F401 (asked first, so that its absence has a sentence)
except ModuleNotFoundError as error:
    if error.name != "diffusers":
        raise  # it is there, something that it needs is not
    raise ImportError("ucc_search.diffusion needs diffusers: pip install 'ucc-search[diffusion]'") from None

from ucc_search.diffusion.adapter import Adapter, LowRankAttention, add_adapter, load_adapter
from ucc_search.diffusion.merging import Lost
from ucc_search.diffusion.training import Customization, customize, customize_pipeline, noise_loss

__all__ = [
    "Adapter",
    "Customization",
    "LowRankAttention",
    "Lost",
    "add_adapter",
    "customize",
    "customize_pipeline",
    "load_adapter",
    "noise_loss",
]
