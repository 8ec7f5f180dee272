from __future__ import annotations

import gzip
import struct
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from ucc_search.config import AugmentConfig, DataConfig
from ucc_search.data import (
    TrainingBatches,
    augment_batch,
    calibration_batches,
    load_data,
    ordered_batches,
    split_indices,
)
from ucc_search.errors import DataError

# Splits


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_held_out_images_are_never_trained_on_and_every_class_is_held_out(share):
    labels = torch.arange(300) % 7
    train, select = split_indices(labels, share)
    assert sorted([*train.tolist(), *select.tolist()]) == list(range(300))
    for label in range(7):
        held = int((labels[select] == label).sum())
        assert held == round(share * int((labels == label).sum()))


def test_the_split_belongs_to_the_data_and_not_to_the_run():
    labels = torch.arange(200) % 5
    first = split_indices(labels, 0.2)
    torch.manual_seed(1)
    again = split_indices(labels, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_limiting_the_training_images_leaves_the_held_out_ones_alone():
    labels = torch.arange(200) % 5
    train, select = split_indices(labels, 0.2)
    limited, same = split_indices(labels, 0.2, limit=30)
    assert torch.equal(limited, train[:30])
    assert torch.equal(same, select)
    assert set(labels[limited].tolist()) == set(range(5))


def test_a_class_of_one_image_cannot_be_split():
    with pytest.raises(DataError, match=r"class 1 has 1 image"):
        split_indices(torch.tensor([0, 0, 0, 1]), 0.1)


def everything(images):
    """All images and labels of a split."""
    batches = list(ordered_batches(images, 500))
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def test_digits_are_cut_into_three_parts_that_share_no_image():
    splits = load_data(DataConfig(name="digits", select=0.2))
    parts = [everything(s) for s in (splits.train, splits.select, splits.test)]
    assert sum(len(labels) for _, labels in parts) == 1797
    # scikit-learn's digits hold no image twice, so pixels identify them.
    pixels = [{image.numpy().tobytes() for image in images} for images, _ in parts]
    assert sum(map(len, pixels)) == len(set.union(*pixels)) == 1797
    assert all(set(labels.tolist()) == set(range(10)) for _, labels in parts)
    images, _ = parts[0]
    assert images.shape[1:] == (splits.channels, splits.image_size, splits.image_size) == (1, 8, 8)
    assert abs(float(images.mean())) < 1e-4  # normalised by what is trained on
    assert float(images.std()) == pytest.approx(1.0, abs=1e-3)


def test_the_test_split_does_not_depend_on_what_is_held_out_for_selection():
    few, many = (load_data(DataConfig(name="digits", select=s, mean=(0.0,), std=(1.0,))) for s in (0.1, 0.6))
    for one, other in zip(everything(few.test), everything(many.test), strict=True):
        assert torch.equal(one, other)


def test_calibration_images_come_from_the_selection_split():
    splits = load_data(DataConfig(name="digits", select=0.2))
    images = torch.cat([x for x, _ in calibration_batches(splits, 100, batch_size=30)])
    assert torch.equal(images, everything(splits.select)[0][:100])


def test_image_size_resizes_every_split():
    splits = load_data(DataConfig(name="digits", image_size=12))
    assert {s.batch(torch.arange(2))[0].shape[2:] for s in (splits.train, splits.test)} == {(12, 12)}
    assert splits.image_size == 12


# Batches


def test_an_epoch_shows_every_image_once_and_ranks_share_it():
    splits = load_data(DataConfig(name="digits", limit_train=96))
    wanted = sorted(everything(splits.train)[0].sum(dim=(1, 2, 3)).tolist())

    def epoch(rank, world):
        batches = TrainingBatches(splits.train, 24, AugmentConfig(), seed=3, rank=rank, world=world)
        return [next(batches)[0] for _ in range(4)]

    alone = epoch(0, 1)
    assert sorted(torch.cat(alone).sum(dim=(1, 2, 3)).tolist()) == wanted
    assert {len(b) for b in epoch(0, 2)} == {12}
    both = [torch.cat(pair) for pair in zip(epoch(0, 2), epoch(1, 2), strict=True)]
    for one, other in zip(alone, both, strict=True):
        assert sorted(one.sum(dim=(1, 2, 3)).tolist()) == sorted(other.sum(dim=(1, 2, 3)).tolist())


def test_training_batches_repeat_by_seed():
    splits = load_data(DataConfig(name="digits", limit_train=60))
    augment = AugmentConfig(crop_padding=1, flip=True, erase=0.5)

    def first(seed):
        return next(TrainingBatches(splits.train, 16, augment, seed=seed))[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def augmented(**settings):
    images = torch.randn(64, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    result = augment_batch(images, AugmentConfig(**settings), torch.Generator().manual_seed(1))
    assert result.shape == images.shape
    return images, result


def test_flips_mirror_whole_images():
    images, result = augmented(flip=True)
    same = (result == images).flatten(1).all(dim=1)
    mirrored = (result == images.flip(3)).flatten(1).all(dim=1)
    assert bool((same ^ mirrored).all())
    assert 10 < int(same.sum()) < 54


def test_shifts_move_images_by_at_most_the_padding():
    images, result = augmented(crop_padding=1)
    padded = torch.nn.functional.pad(images, (1,) * 4, value=float(images.min()))
    windows = torch.stack([padded[:, :, y : y + 6, x : x + 9] for y in range(3) for x in range(3)])
    matches = (windows == result).flatten(2).all(dim=2)
    assert bool((matches.sum(dim=0) == 1).all())
    assert bool(matches.any(dim=1).all())  # every shift occurs


def test_erasing_blanks_part_of_some_images():
    images, result = augmented(erase=0.5)
    changed = (result != images).flatten(1).float().mean(dim=1)
    assert 10 < int((changed > 0).sum()) < 54
    assert float(changed.max()) < 0.5
    assert bool((result[result != images] == 0).all())


# Fashion-MNIST's files


def write_idx(folder, prefix, count):
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for name, header, data in (
        ("images-idx3", struct.pack(">IIII", 2051, count, 28, 28), images),
        ("labels-idx1", struct.pack(">II", 2049, count), labels),
    ):
        path = folder / f"{prefix}-{name}-ubyte.gz"
        path.write_bytes(gzip.compress(header + data.tobytes()))
    return images


@pytest.fixture
def fashion(tmp_path):
    write_idx(tmp_path, "train", 60)
    write_idx(tmp_path, "t10k", 20)
    return tmp_path


def fashion_config(folder):
    return DataConfig(name="fashion-mnist", root=str(folder), select=0.2, mean=(0.0,), std=(1.0,))


def test_fashion_mnist_is_read_from_its_own_files(fashion, tmp_path):
    splits = load_data(fashion_config(fashion))
    assert [len(s) for s in (splits.train, splits.select, splits.test)] == [50, 10, 20]
    written = write_idx(tmp_path, "t10k", 20)
    images, labels = everything(splits.test)
    torch.testing.assert_close(images[:, 0], torch.from_numpy(written).float() / 255)
    assert labels.tolist() == [i % 10 for i in range(20)]


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b[:20] + b"x" * 20 + b[40:], lambda b: b"not gzip", lambda b: b""],
)
@pytest.mark.parametrize("name", ["train-images-idx3", "t10k-labels-idx1"])
def test_a_damaged_file_is_named(fashion, name, damage):
    path = fashion / f"{name}-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=name):
        load_data(fashion_config(fashion))


def test_files_of_different_lengths_do_not_belong_together(fashion):
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes((fashion / "t10k-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(DataError, match="different numbers of images and labels"):
        load_data(fashion_config(fashion))


@pytest.mark.parametrize("cut", [7, 28 * 28])
def test_a_file_that_unpacks_to_too_little_is_named(fashion, cut):
    path = fashion / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-cut]))
    with pytest.raises(DataError, match="train-images-idx3"):
        load_data(fashion_config(fashion))


def test_an_unknown_data_set_suggests_a_known_one():
    with pytest.raises(DataError, match="did you mean 'digits'"):
        load_data(DataConfig(name="digit"))


# Image folders


def colour(label):
    return (40 + 60 * label, 20, 200 - 50 * label)


def write_images(folder, counts, *, suffix=".png", size=(20, 30)):
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", size, colour(label)).save(folder / name / f"{i}{suffix}")


def folder_splits(path, **changes):
    settings = {"image_size": 16, "select": 0.25, "mean": (0.0,), "std": (1.0,), **changes}
    return load_data(DataConfig(name=f"folder:{path}", **settings))


def check_colours(images):
    """Every image has the colour of its label, so pixels and labels belong together."""
    pixels, labels = images.batch(torch.arange(len(images)))
    expected = torch.tensor([colour(label) for label in labels.tolist()]) / 255
    torch.testing.assert_close(pixels, expected[:, :, None, None].expand_as(pixels))
    return labels


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_imagenet_layout(tmp_path, held_out):
    write_images(tmp_path / "train", {"ant": 8, "bee": 12})
    write_images(tmp_path / held_out, {"ant": 2, "bee": 3}, suffix=".bmp")
    splits = folder_splits(tmp_path)
    assert [len(s) for s in (splits.train, splits.select, splits.test)] == [15, 5, 5]
    assert (splits.classes, splits.channels, splits.image_size) == (2, 3, 16)
    for part in (splits.train, splits.select, splits.test):
        check_colours(part)


def test_without_a_test_folder_a_fifth_of_every_class_becomes_the_test_split(tmp_path):
    write_images(tmp_path, {"ant": 10, "bee": 20, "cat": 5})
    splits = folder_splits(tmp_path)
    assert torch.bincount(check_colours(splits.test)).tolist() == [2, 4, 1]
    assert torch.bincount(check_colours(splits.select)).tolist() == [2, 4, 1]
    assert torch.bincount(check_colours(splits.train)).tolist() == [6, 12, 3]


def test_no_file_lies_in_two_splits(tmp_path):
    for i in range(30):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        Image.new("L", (16, 16), 8 * i).save(folder / f"{i}.png")
    splits = folder_splits(tmp_path)
    values = [
        {round(float(x.mean()) * 255) for x in s.batch(torch.arange(len(s)))[0]}
        for s in (splits.train, splits.select, splits.test)
    ]
    assert sum(map(len, values)) == len(set.union(*values)) == 30


def test_test_images_are_cut_from_the_middle(tmp_path):
    # Half black, half white from left to right: the centre has the edge in its middle.
    picture = np.zeros((64, 256, 3), np.uint8)
    picture[:, 128:] = 255
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(picture).save(tmp_path / name / f"{i}.png")
    image = folder_splits(tmp_path, image_size=56).test.batch(torch.arange(1))[0][0]
    assert float(image[:, :, :26].max()) < 0.05
    assert float(image[:, :, 30:].min()) > 0.95


def test_training_crops_repeat_by_seed_and_not_by_the_number_of_threads(tmp_path):
    gradient = np.linspace(0, 255, 40 * 40 * 3).reshape(40, 40, 3).astype(np.uint8)
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.fromarray(gradient).save(tmp_path / name / f"{i}.png")

    def batch(seed, threads):
        torch.manual_seed(seed)
        return folder_splits(tmp_path, loader_workers=threads).train.batch(torch.arange(10), train=True)[0]

    alone = batch(0, 0)
    assert alone.shape == (10, 3, 16, 16)
    assert len({image.sum().item() for image in alone}) == 10  # equal pictures, different crops
    assert torch.equal(alone, batch(0, 4))
    assert not torch.equal(alone, batch(1, 0))


def test_grey_and_palette_images_become_rgb(tmp_path):
    for name, mode in (("a", "L"), ("b", "P"), ("c", "RGBA")):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new(mode, (20, 20), 100 if mode != "RGBA" else (1, 2, 3, 4)).save(
                tmp_path / name / f"{i}.png"
            )
    splits = folder_splits(tmp_path)
    assert splits.train.batch(torch.arange(len(splits.train)), train=True)[0].shape[1] == 3


def test_a_damaged_image_is_named(tmp_path):
    write_images(tmp_path, {"ant": 6, "bee": 6})
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"\d\.png: not a readable image"):
        folder_splits(tmp_path).train.batch(torch.arange(4))


def a_file(path):
    path.with_name("x").write_text("")
    return path.with_name("x")


FOLDER_MISTAKES = {
    "no such folder": lambda p: p / "absent",
    "is a file": lambda p: a_file(p / "x"),
    "holds no images": lambda p: p,
    "images but no class folders": lambda p: write_images(p, {".": 3}),
    "its folders hold no images": lambda p: (p / "ant").mkdir(),
    "ant: a class folder without images": lambda p: (write_images(p, {"bee": 5}), (p / "ant").mkdir()),
    "only the class 'ant'": lambda p: write_images(p, {"ant": 9}),
    "'bee' has 2 training image": lambda p: write_images(p, {"ant": 9, "bee": 2}),
    "name the training split 'train'": lambda p: write_images(p / "val", {"ant": 9, "bee": 5}),
    "bees: this class is not in train; did you mean 'bee'": lambda p: (
        write_images(p / "train", {"ant": 5, "bee": 5}),
        write_images(p / "val", {"ant": 1, "bees": 1}),
    ),
    "val: no class folders": lambda p: (
        write_images(p / "train", {"ant": 5, "bee": 5}),
        write_images(p / "val", {".": 3}),
    ),
}


@pytest.mark.parametrize("message", FOLDER_MISTAKES)
def test_mistakes_in_a_folder_are_told_in_one_sentence(tmp_path, message):
    made = FOLDER_MISTAKES[message](tmp_path)
    with pytest.raises(DataError) as caught:
        folder_splits(made if isinstance(made, type(tmp_path)) else tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# torchvision and Hugging Face


def test_a_torchvision_data_set_is_found_by_its_name(fashion, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in list(tmp_path.glob("*.gz")):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    config = DataConfig(name="torchvision:FashionMNIST", root=str(tmp_path), image_size=32)
    splits = load_data(config)
    assert (len(splits.test), splits.classes) == (20, 10)
    assert splits.train.batch(torch.arange(3), train=True)[0].shape == (3, 3, 32, 32)
    assert splits.test.batch(torch.arange(20))[1].tolist() == [i % 10 for i in range(20)]


@pytest.mark.parametrize(
    ("name", "near"), [("CIFAR", "CIFAR10"), ("cifar10", "CIFAR10"), ("Flower102", "Flowers102")]
)
def test_an_unknown_torchvision_data_set_suggests_a_known_one(name, near):
    with pytest.raises(DataError, match=f"did you mean '{near}"):
        load_data(DataConfig(name=f"torchvision:{name}"))


def test_a_failed_download_says_where_the_data_may_lie(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    def offline(self):
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(DataError, match=r"network is unreachable\); go online once, or set data\.root"):
        load_data(DataConfig(name="torchvision:CIFAR10", root=str(tmp_path)))


class HubSplit(list):
    """Rows with `features`, as the package datasets hands them out."""

    def __init__(self, rows, features):
        super().__init__(rows)
        self.features = features

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def hub(monkeypatch, labels, *, image="img", label="fine_label", names=("a", "b")):
    """A stand-in for the optional package datasets: `labels` per split."""
    image_type, class_type = type("Image", (), {}), type("ClassLabel", (), {"names": names})
    features = {image: image_type(), "coarse_label": class_type(), label: class_type()}
    splits = {
        split: HubSplit(
            [{image: Image.new("L", (20, 20), 90), "coarse_label": 0, label: k} for k in values], features
        )
        for split, values in labels.items()
    }
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, cache_dir=None: splits
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_columns_of_a_hub_data_set_are_found_by_type_and_name(monkeypatch):
    hub(monkeypatch, {"train": [0, 1] * 8, "test": [1, 0, 1]})
    splits = load_data(DataConfig(name="hf:some/set", image_size=16))
    assert (len(splits.train) + len(splits.select), splits.classes) == (16, 2)
    images, labels = splits.test.batch(torch.arange(3))
    assert labels.tolist() == [1, 0, 1]
    assert images.shape == (3, 3, 16, 16)


def test_unlabelled_test_images_of_the_hub_are_not_the_test_split(monkeypatch):
    hub(monkeypatch, {"train": [0, 1] * 8, "test": [-1, -1], "validation": [1, 0, 0]})
    assert len(load_data(DataConfig(name="hf:some/set")).test) == 3


@pytest.mark.parametrize("image", ["text", "image"])
def test_a_hub_data_set_without_images_or_training_split_is_refused(monkeypatch, image):
    hub(monkeypatch, {"test": [0, 1]} if image == "image" else {"train": [0, 1] * 8})
    if image == "text":
        sys.modules["datasets"].load_dataset(None)["train"].features.pop("img")
    with pytest.raises(DataError, match=r"none of which holds images|expected one named 'train'"):
        load_data(DataConfig(name="hf:some/set"))


def test_without_the_optional_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'ucc-search\[hf\]'"):
        load_data(DataConfig(name="hf:mnist"))
