"""Images and their three splits: train, select (held out of train, for every choice), test (report only)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ucc_search.config import AugmentConfig, DataConfig
from ucc_search.errors import DataError, did_you_mean
from ucc_search.interfaces import ImageData
from ucc_search.shapes import FASHION_MNIST_DEBIAN

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SPLIT_SEED = 20240  # fixed: the split belongs to the data, not to the run's seed
_NAMES = ("digits", "fashion-mnist", "folder:PATH", "torchvision:NAME", "hf:NAME", "plugin:NAME")


class ImageSet(Protocol):
    """Images that come as normalised float tensors."""

    labels_B: Tensor

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, *, train: bool = False) -> tuple[Tensor, Tensor]:
        """images_BCHW (float32, normalised) and labels_B (int64) at these indices."""
        ...


@dataclass(frozen=True)
class Splits:
    """A data set, cut so that nothing chosen has seen the test split."""

    train: ImageSet
    select: ImageSet
    test: ImageSet
    classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...] = ()  # per channel, of pixels from 0 to 1; subtracted, then divided by std
    std: tuple[float, ...] = ()


class TensorImages:
    """A small data set held in memory as bytes."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor) -> None:
        self.images_BCHW, self.labels_B = images, labels
        self._mean, self._std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels_B)

    def batch(self, indices: Tensor, *, train: bool = False) -> tuple[Tensor, Tensor]:
        images = self.images_BCHW[indices].float().div_(255).sub_(self._mean).div_(self._std)
        return images, self.labels_B[indices]


class DecodedImages:
    """A data set whose images are read from disk when asked for.

    Args:
        train_transform: image and seed to tensor; the seeds are drawn from torch's generator before
            any thread starts, so that the number of threads changes nothing.
    """

    def __init__(
        self,
        dataset: Any,
        indices: Tensor,
        labels: Tensor,
        train_transform: Any,
        test_transform: Any,
        workers: int,
    ) -> None:
        self.labels_B = labels[indices]
        self._dataset, self._indices, self._workers = dataset, indices, workers
        self._transforms = {True: train_transform, False: test_transform}

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: Tensor, *, train: bool = False) -> tuple[Tensor, Tensor]:
        from concurrent.futures import ThreadPoolExecutor

        transform = self._transforms[train]

        def read(index: int, seed: int) -> tuple[Tensor, int]:
            image, label = self._dataset[index]
            return transform(image, seed), int(label)

        wanted = self._indices[indices].tolist()
        seeds = torch.randint(2**31, (len(wanted),)).tolist() if train else [0] * len(wanted)
        if self._workers:
            # Pillow releases the interpreter lock while it decodes, so threads suffice.
            with ThreadPoolExecutor(self._workers) as pool:
                pairs = list(pool.map(read, wanted, seeds))
        else:
            pairs = list(map(read, wanted, seeds))
        return torch.stack([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])


class Subset:
    """Some images of another set."""

    def __init__(self, images: ImageSet, indices: Tensor) -> None:
        self._images, self._indices = images, indices
        self.labels_B = images.labels_B[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: Tensor, *, train: bool = False) -> tuple[Tensor, Tensor]:
        return self._images.batch(self._indices[indices], train=train)


def load_data(config: DataConfig, augment: AugmentConfig | None = None) -> Splits:
    """The splits of the configured data set.

    Raises:
        DataError: unknown name, nothing found, or too few images to split.
    """
    kind, _, argument = config.name.partition(":")
    if config.name == "digits":
        return _split_tensors(config, *_digits())
    if config.name == "fashion-mnist":
        return _split_tensors(config, *_fashion_mnist(config.root))
    if kind in ("folder", "torchvision", "hf") and argument:
        from ucc_search import image_data

        return image_data.load(config, kind, argument, augment or AugmentConfig())
    if config.bound is not None:
        return _split_tensors(config, *checked_images(config.bound.component.load(), config.name))
    if kind == "plugin":
        raise DataError(f"data.name is {config.name!r}: the plugin that brings it is not loaded here")
    near = did_you_mean(config.name, ["digits", "fashion-mnist", "folder:", "torchvision:", "hf:"])
    raise DataError(f"data.name is {config.name!r}{near} (expected one of {', '.join(_NAMES)})")


def checked_images(found: ImageData, name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """What a plugin loaded, refused in a sentence if it is not what the contract says."""
    if not isinstance(found, ImageData):
        raise DataError(
            f"{name}: load() gave a {type(found).__name__}, expected ucc_search.interfaces.ImageData"
        )
    *tensors, classes = found
    for part, images, labels in (("train", *tensors[:2]), ("test", *tensors[2:])):
        what = f"{name}: the {part} images"
        if images.dim() != 4 or images.dtype != torch.uint8 or images.shape[2] != images.shape[3]:
            raise DataError(f"{what} are {images.dtype} {tuple(images.shape)}, expected uint8 [B, C, H, H]")
        if labels.dtype != torch.int64 or tuple(labels.shape) != (len(images),):
            raise DataError(
                f"{what} number {len(images)}, their labels are {labels.dtype} {tuple(labels.shape)}; expected one "
                "int64 for each image"
            )
        if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise DataError(f"{name}: the {part} labels do not lie in 0 to {classes - 1}, or there are none")
    if tensors[0].shape[1:] != tensors[2].shape[1:]:
        raise DataError(f"{name}: train and test images differ in shape")
    return (tensors[0], tensors[1]), (tensors[2], tensors[3]), classes


def calibration_batches(
    splits: Splits, images: int, *, batch_size: int = 250
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `images` of the selection split, in order."""
    yield from ordered_batches(splits.select, batch_size, limit=images)


def proxy_batches(splits: Splits, images: int, *, batch_size: int = 125) -> list[Tensor]:
    """Training images to measure importance on, [B, C, H, W]: equally many of each class, drawn once for all."""
    generator, labels = torch.Generator().manual_seed(_SPLIT_SEED), splits.train.labels_B
    per_class = max(1, images // splits.classes)
    chosen = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    # Mixed, so that every batch holds all classes.
    index = torch.cat(chosen)
    index = index[torch.randperm(len(index), generator=generator)]
    return [splits.train.batch(part)[0] for part in index.split(batch_size)]


def ordered_batches(
    images: ImageSet, batch_size: int, *, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in order, without augmentation."""
    count = min(len(images), limit or len(images))
    for start in range(0, count, batch_size):
        yield images.batch(torch.arange(start, min(start + batch_size, count)))


class TrainingBatches:
    """Endless shuffled batches; every rank draws the same order and takes its share of each batch.

    Args:
        batch_size: images over all ranks.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        augment: AugmentConfig,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._images, self._augment, self._rank, self._world = images, augment, rank, world
        self._size = min(batch_size, len(images))
        self._generator = torch.Generator().manual_seed(seed)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._epoch = self._generator.get_state()
        self._order = torch.randperm(len(self._images), generator=self._generator)
        self._start = 0

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._start + self._size > len(self._order):
            self._begin_epoch()
        chosen = self._order[self._start : self._start + self._size][self._rank :: self._world]
        self._start += self._size
        batch, labels = self._images.batch(chosen, train=True)
        return augment_batch(batch, self._augment, self._generator), labels

    def state_dict(self) -> dict[str, Any]:
        """Where the order of images and the augmentation stand."""
        return {"epoch": self._epoch, "now": self._generator.get_state(), "start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there: the batches that follow are those that would have followed."""
        self._generator.set_state(state["epoch"])
        self._begin_epoch()
        self._generator.set_state(state["now"])
        self._start = state["start"]


def augment_batch(images_BCHW: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Random shift (zero padding), flip and erasing, drawn per image."""
    batch, _, height, width = images_BCHW.shape
    if config.crop_padding:
        pad = config.crop_padding
        padded = torch.nn.functional.pad(images_BCHW, (pad,) * 4, value=float(images_BCHW.min()))
        top = torch.randint(2 * pad + 1, (batch, 1), generator=generator)
        left = torch.randint(2 * pad + 1, (batch, 1), generator=generator)
        rows = (top + torch.arange(height))[:, None, :, None]
        columns = (left + torch.arange(width))[:, None, None, :]
        index = torch.arange(batch)[:, None, None, None]
        channels = torch.arange(images_BCHW.shape[1])[None, :, None, None]
        images_BCHW = padded[index, channels, rows, columns]
    if config.flip:
        flip_B = torch.rand(batch, generator=generator) < 0.5
        images_BCHW = torch.where(flip_B[:, None, None, None], images_BCHW.flip(3), images_BCHW)
    if config.erase:
        images_BCHW = _erase(images_BCHW, config.erase, generator)
    return images_BCHW


def _erase(images_BCHW: Tensor, chance: float, generator: torch.Generator) -> Tensor:
    """Sets a random rectangle of 2 to 20 % of an image to zero (the mean, once normalised)."""
    batch, _, height, width = images_BCHW.shape
    area = (0.02 + 0.18 * torch.rand(batch, generator=generator)) * height * width
    aspect = torch.exp((2 * torch.rand(batch, generator=generator) - 1) * np.log(2.0))
    tall = (area * aspect).sqrt().clamp(1, height)
    wide = (area / aspect).sqrt().clamp(1, width)
    top = torch.rand(batch, generator=generator) * (height - tall)
    left = torch.rand(batch, generator=generator) * (width - wide)
    chosen_B = torch.rand(batch, generator=generator) < chance
    y, x = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
    inside = (y >= top[:, None, None]) & (y < (top + tall)[:, None, None])
    inside = inside & (x >= left[:, None, None]) & (x < (left + wide)[:, None, None])
    return images_BCHW.masked_fill((inside & chosen_B[:, None, None])[:, None], 0.0)


def split_indices(labels_N: Tensor, share: float, *, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(train, select) indices: `share` of every class is held out for selection; both shuffled."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    train, select = [], []
    for label in labels_N.unique().tolist():
        members = (labels_N == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        held = max(1, round(share * len(members)))
        if held >= len(members):
            raise DataError(
                f"class {label} has {len(members)} image(s), too few to hold out data.select={share} "
                "for selection; add images or lower data.select"
            )
        select.append(members[:held])
        train.append(members[held:])
    parts = [torch.cat(p) for p in (train, select)]
    first, second = [p[torch.randperm(len(p), generator=generator)] for p in parts]
    return first[:limit], second


def _split_tensors(
    config: DataConfig, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int
) -> Splits:
    images, labels = train
    size = config.image_size or images.shape[-1]
    if size != images.shape[-1]:
        images, test = _resize(images, size), (_resize(test[0], size), test[1])
    train_index, select_index = split_indices(labels, config.select, limit=config.limit_train)
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) not in (1, images.shape[1]):
            raise DataError(
                f"data.{name} has {len(values)} numbers, the images have {images.shape[1]} channel(s)"
            )
    # Statistics of the images that are trained on, alone.
    pixels = images[train_index].float().div(255)
    mean = torch.tensor(config.mean) if config.mean else pixels.mean(dim=(0, 2, 3))
    std = torch.tensor(config.std) if config.std else pixels.std(dim=(0, 2, 3))
    parts = [(images[i], labels[i]) for i in (train_index, select_index)] + [test]
    sets = [TensorImages(x, y, mean, std) for x, y in parts]
    return Splits(
        *sets,
        classes=classes,
        channels=images.shape[1],
        image_size=size,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
    )


def _resize(images_BCHW: Tensor, size: int) -> Tensor:
    resized = torch.nn.functional.interpolate(images_BCHW.float(), size=(size, size), mode="bilinear")
    return resized.round().clamp(0, 255).to(torch.uint8)


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; a fifth of every class is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    rest, test = split_indices(labels, 0.2)
    return (images[rest], labels[rest]), (images[test], labels[test]), 10


def _fashion_mnist(root: str | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    folder = Path(root) if root else FASHION_MNIST_DEBIAN
    if (folder / "train-images-idx3-ubyte.gz").is_file():
        train, test = (_read_idx_pair(folder, prefix) for prefix in ("train", "t10k"))
        return train, test, 10
    from torchvision.datasets import FashionMNIST

    cache = Path(root) if root else Path.home() / ".cache" / "ucc-search" / "data"
    try:
        parts = [FashionMNIST(str(cache), train=part, download=True) for part in (True, False)]
    except Exception as error:  # torchvision raises whatever the network raised
        raise DataError(
            f"Fashion-MNIST is neither in {folder} nor could it be downloaded to {cache} "
            f"({type(error).__name__}); install Debian's package dataset-fashion-mnist, or set data.root "
            "to a folder with its four .gz files"
        ) from None
    train, test = ((p.data[:, None], p.targets.long()) for p in parts)
    return train, test, 10


def _read_idx_pair(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    arrays = []
    for suffix, header, size in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
        path = folder / f"{prefix}-{suffix}-ubyte.gz"
        try:
            data = gzip.decompress(path.read_bytes())
            count = int.from_bytes(data[4:8], "big")
            if len(data) != header + count * size:
                raise ValueError(f"{len(data)} bytes for {count} entries")
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read ({error}); fetch the file again") from None
        arrays.append(np.frombuffer(data, np.uint8, offset=header))
    images, labels = arrays
    if len(images) != len(labels) * 28 * 28:
        raise DataError(
            f"{folder}: the {prefix} files hold different numbers of images and labels; fetch both again"
        )
    return (
        torch.from_numpy(images.reshape(-1, 1, 28, 28).copy()),
        torch.from_numpy(labels.astype(np.int64)),
    )
