"""The contract of data sets, line by line."""

from __future__ import annotations

import torch
from torch import Tensor

from ucc_search.interfaces import Dataset, ImageData
from ucc_search.testing.core import Broken, Check


def images_are_as_said(dataset: Dataset) -> None:
    from ucc_search.data import checked_images
    from ucc_search.errors import DataError

    try:
        checked_images(dataset.load(), type(dataset).__name__)
    except DataError as error:
        raise Broken(str(error), "see ucc_search.interfaces.ImageData", method="load") from None


def images_repeat(dataset: Dataset) -> None:
    for name, a, b in zip(ImageData._fields, dataset.load(), dataset.load(), strict=True):
        if not (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b):
            raise Broken(
                f"{name} differs between two calls of load()",
                "draw from a generator of a fixed seed, and sort what is read from folders",
                method="load",
            )


def images_of_the_test_are_new(dataset: Dataset) -> None:
    found = dataset.load()
    train, test = (
        {image.numpy().tobytes() for image in images}
        for images in (found.train_images_BCHW, found.test_images_BCHW)
    )
    if shared := len(train & test):
        raise Broken(
            f"{shared} test images are among the training images",
            "leave them out of one of the two: what is reported would not be what was not seen",
            method="load",
        )


DATASET_CHECKS = (
    Check("shape", "uint8 images [B, C, H, H] with int64 labels from 0 to classes - 1", images_are_as_said),
    Check("determinism", "load() gives the same images each time", images_repeat),
    Check("test", "no test image is among the training images", images_of_the_test_are_new),
)
