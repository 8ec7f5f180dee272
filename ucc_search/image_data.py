"""Data sets whose images are decoded when asked for: image folders, torchvision's, Hugging Face's."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional

from ucc_search.config import AugmentConfig, DataConfig
from ucc_search.data import IMAGENET_MEAN, IMAGENET_STD, DecodedImages, Splits, split_indices
from ucc_search.errors import DataError, did_you_mean

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_TEST_SHARE = 0.2  # where a data set has no test split of its own
_DEFAULT_SIZE = 224
_CACHE = Path.home() / ".cache" / "ucc-search" / "data"
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises


@dataclass(frozen=True)
class Labelled:
    """Images by index, and the label of each without decoding any."""

    images: Any  # images[i] is (PIL image, label)
    labels: Tensor


def load(config: DataConfig, kind: str, argument: str, augment: AugmentConfig) -> Splits:
    """The splits of `folder:PATH`, `torchvision:NAME` or `hf:NAME`.

    Where the data set brings no test split, a fifth of every class becomes it.

    Args:
        argument: what follows the colon of `data.name`.
        augment: with `crop_padding`, training images are cropped as test images are and then
            shifted; without it a random area is cut out and resized, as for ImageNet.

    Raises:
        DataError: nothing usable is found, or it cannot be fetched.
    """
    readers = {"folder": _folder, "torchvision": _torchvision, "hf": _hugging_face}
    train, test, names = readers[kind](config, argument)
    _check_counts(train.labels, names, needed=2 if test else 3)
    if test is None:
        rest, test_index = split_indices(train.labels, _TEST_SHARE)
        test = train
    else:
        rest, test_index = torch.arange(len(train.labels)), torch.arange(len(test.labels))
    train_index, select_index = split_indices(train.labels[rest], config.select, limit=config.limit_train)
    size = config.image_size or _DEFAULT_SIZE
    transforms = _transforms(config, size, random_area=not augment.crop_padding)
    parts = ((train, rest[train_index]), (train, rest[select_index]), (test, test_index))
    first, second, third = (
        DecodedImages(s.images, i, s.labels, *transforms, config.loader_workers) for s, i in parts
    )
    return Splits(
        first,
        second,
        third,
        classes=len(names),
        channels=3,
        image_size=size,
        mean=config.mean or IMAGENET_MEAN,
        std=config.std or IMAGENET_STD,
    )


def _check_counts(labels_N: Tensor, names: Sequence[str], *, needed: int) -> None:
    counts = torch.bincount(labels_N, minlength=len(names)).tolist()
    for name, count in zip(names, counts, strict=True):
        if 0 < count < needed:
            raise DataError(
                f"class {name!r} has {count} training image(s), too few to hold some out for selection"
                f"{' and test' if needed > 2 else ''}; add images or remove the class"
            )


# Transforms


def _transforms(config: DataConfig, size: int, *, random_area: bool) -> tuple[Any, Any]:
    """(train, test): functions of a PIL image and a seed. Flips are drawn per batch, see `augment_batch`."""
    mean, std = config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD
    for key, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, 3):
            raise DataError(f"data.{key} has {len(values)} values, expected 3 (images are read as RGB) or 1")

    def finish(image: Image.Image) -> Tensor:
        normalised: Tensor = functional.normalize(functional.to_tensor(image), list(mean), list(std))
        return normalised

    def test(image: Image.Image, seed: int) -> Tensor:
        short_side = round(size * 256 / 224)
        resized = functional.resize(image.convert("RGB"), [short_side], InterpolationMode.BICUBIC)
        return finish(functional.center_crop(resized, [size, size]))

    def train(image: Image.Image, seed: int) -> Tensor:
        # torchvision's RandomResizedCrop draws from the global generator, so that with reading
        # threads the order of the draws would differ from run to run.
        area = random_crop(image.width, image.height, torch.Generator().manual_seed(seed))
        return finish(
            functional.resized_crop(image.convert("RGB"), *area, [size, size], InterpolationMode.BICUBIC)
        )

    return train if random_area else test, test


def random_crop(width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of 8 to 100 % of the area, sides 3:4 to 4:3 (Inception's crop)."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    for _ in range(10):
        area = width * height * uniform(0.08, 1.0)
        ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            top = round(uniform(0, height - tall))
            return top, round(uniform(0, width - wide)), tall, wide
    side = min(width, height)
    return (height - side) // 2, (width - side) // 2, side, side


# Image folders


class ImageFiles:
    """Image files and their labels."""

    def __init__(self, files: Sequence[tuple[str, int]]) -> None:
        self._files = files

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self._files[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB"), label
        except _UNREADABLE as error:
            raise DataError(
                f"{path}: not a readable image ({type(error).__name__}); replace or delete the file"
            ) from None


def _folder(config: DataConfig, argument: str) -> tuple[Labelled, Labelled | None, list[str]]:
    path = Path(config.root or "") / Path(argument).expanduser()
    if not path.is_dir():
        problem = "is a file, not a folder" if path.exists() else "no such folder"
        raise DataError(f"{path}: {problem}; data.name takes folder:PATH")
    if (path / "train").is_dir():
        classes = _classes(path / "train")
        held_out = [p for p in (path / "test", path / "val") if p.is_dir()]
        # ImageNet's own test images are unlabelled and lie in no class folders.
        labelled = [p for p in held_out if _subfolders(p)]
        test = _read_classes(labelled[0], classes) if labelled else None
        if held_out and test is None:
            raise DataError(f"{held_out[0]}: no class folders; give it one folder per class, as in train")
        return _read_classes(path / "train", classes), test, classes
    for name in ("val", "test"):
        if (path / name).is_dir():
            raise DataError(
                f"{path}: has the folder {name!r} but no 'train'; name the training split 'train'"
            )
    classes = _classes(path)
    return _read_classes(path, classes), None, classes


def _subfolders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _classes(path: Path) -> list[str]:
    """Names of the class folders; a class without images is a mistake worth stopping at."""
    classes = _subfolders(path)
    if not classes:
        if _images_in(path):
            raise DataError(f"{path}: images but no class folders; put the images of each class in a folder")
        raise DataError(f"{path}: holds no images; expected one folder per class")
    counts = {name: len(_images_in(path / name)) for name in classes}
    if not any(counts.values()):
        raise DataError(f"{path}: its folders hold no images ({', '.join(_SUFFIXES)})")
    for name, count in counts.items():
        if not count:
            raise DataError(f"{path / name}: a class folder without images; add images or delete it")
    if len(classes) < 2:
        raise DataError(f"{path}: only the class {classes[0]!r}, expected at least two class folders")
    return classes


def _images_in(path: Path) -> list[str]:
    found = []
    for folder, _, names in os.walk(path, followlinks=True):
        found += [os.path.join(folder, n) for n in names if n.lower().endswith(_SUFFIXES)]
    return sorted(found)


def _read_classes(path: Path, classes: Sequence[str]) -> Labelled:
    label_of = {name: label for label, name in enumerate(classes)}
    files = []
    for name in _subfolders(path):
        if name not in label_of:
            raise DataError(f"{path / name}: this class is not in train{did_you_mean(name, classes)}")
        files += [(file, label_of[name]) for file in _images_in(path / name)]
    if not files:
        raise DataError(f"{path}: its folders hold no images ({', '.join(_SUFFIXES)})")
    return Labelled(ImageFiles(files), torch.tensor([label for _, label in files]))


# torchvision's data sets


def _torchvision(config: DataConfig, argument: str) -> tuple[Labelled, Labelled | None, list[str]]:
    from torchvision import datasets

    known = {n: c for n in datasets.__all__ if (c := getattr(datasets, n)) and _split_argument(c)}
    if argument not in known:
        near = did_you_mean(argument, known) or did_you_mean(argument.upper(), known)
        raise DataError(
            f"data.name is 'torchvision:{argument}', no data set of torchvision with a training split{near}"
        )
    make = known[argument]
    root = Path(config.root).expanduser() if config.root else _CACHE
    if _split_argument(make) == "train":
        splits = [_fetch(make, argument, root, train=part) for part in (True, False)]
    else:
        splits = [_fetch(make, argument, root, split="train")]
        try:
            splits.append(_fetch(make, argument, root, split="test"))
        except _SplitError:
            splits.append(_fetch(make, argument, root, split="val"))
    train, test = (Labelled(s, _labels(s, argument)) for s in splits)
    count = 1 + int(max(train.labels.max(), test.labels.max()))
    names = list(getattr(splits[0], "classes", ()))
    return train, test, names if len(names) == count else [str(i) for i in range(count)]


class _SplitError(DataError):
    """The data set has other splits than the one asked for."""


def _split_argument(make: Any) -> str | None:
    """How a data set of torchvision is asked for its training split; None if it has none."""
    parameters = inspect.signature(make).parameters
    return next((name for name in ("train", "split") if name in parameters and "root" in parameters), None)


def _fetch(make: Any, name: str, root: Path, **split: Any) -> Any:
    options = {"download": True} if "download" in inspect.signature(make).parameters else {}
    try:
        root.mkdir(parents=True, exist_ok=True)
        return make(str(root), **split, **options)
    except ValueError as error:
        raise _SplitError(f"torchvision:{name} takes no {split}: {_line(error)}") from None
    except Exception as error:  # torchvision raises whatever the network or the archive raised
        raise DataError(
            f"torchvision:{name} is not in {root} and could not be fetched ({type(error).__name__}: "
            f"{_line(error)}); go online once, or set data.root to a folder that holds it"
        ) from None


def _labels(dataset: Any, name: str) -> Tensor:
    """Labels without decoding images, from where torchvision's data sets keep them."""
    found = next((getattr(dataset, a) for a in ("targets", "labels", "_labels") if hasattr(dataset, a)), None)
    if found is None:
        pairs = getattr(dataset, "_samples", None)
        found = [p[-1] for p in (pairs if pairs is not None else (dataset[i] for i in range(len(dataset))))]
    try:
        return torch.as_tensor(found).long().reshape(len(dataset))
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"torchvision:{name} has no single class per image, so no classifier can learn it"
        ) from None


# Hugging Face's data sets


def _hugging_face(config: DataConfig, argument: str) -> tuple[Labelled, Labelled | None, list[str]]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data.name is 'hf:{argument}', which needs the package datasets: pip install 'ucc-search[hf]'"
        ) from None
    try:
        splits = datasets.load_dataset(argument, cache_dir=config.root)
    except Exception as error:  # datasets raises whatever the hub or the network raised
        raise DataError(
            f"hf:{argument} could not be fetched ({type(error).__name__}: {_line(error)}); "
            "check the name on huggingface.co/datasets, or go online once"
        ) from None
    if "train" not in splits:
        raise DataError(f"hf:{argument} has the splits {', '.join(splits)}, expected one named 'train'")
    image, label = _columns(splits["train"].features, argument)
    train = _hub_split(splits["train"], image, label)
    named = (splits[n] for n in ("test", "validation", "valid", "val") if n in splits)
    # Competitions publish test images with the label -1.
    labelled = (s for s in (_hub_split(n, image, label) for n in named) if int(s.labels.min()) >= 0)
    test = next(labelled, None)
    names = getattr(splits["train"].features[label], "names", None)
    return train, test, list(names or map(str, range(1 + int(train.labels.max()))))


def _columns(features: Mapping[str, Any], name: str) -> tuple[str, str]:
    """The columns of images and labels, by their types, then by their usual names."""

    def choose(what: str, wanted_type: str, usual: Sequence[str]) -> str:
        typed = [c for c, feature in features.items() if type(feature).__name__ == wanted_type]
        found = [c for c in usual if c in (typed or features)] or typed
        if not found:
            raise DataError(f"hf:{name} has the columns {', '.join(features)}, none of which holds {what}")
        return found[0]

    labels = ("label", "labels", "fine_label", "target")
    return choose("images", "Image", ("image", "img")), choose("class labels", "ClassLabel", labels)


class HubImages:
    """One split of a Hugging Face data set."""

    def __init__(self, split: Any, image: str, label: str) -> None:
        self._split, self._image, self._label = split, image, label

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self._split[index]
        return row[self._image], int(row[self._label])


def _hub_split(split: Any, image: str, label: str) -> Labelled:
    return Labelled(HubImages(split, image, label), torch.as_tensor(list(split[label])).long())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
