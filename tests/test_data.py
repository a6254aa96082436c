"""flower_ldm/data.py: pixels of every kind of file, randomness, splits, classes, sources, bad input."""

import dataclasses
import hashlib
import io
import itertools
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from flower_ldm import data, files
from flower_ldm.errors import InputError
from flower_ldm.flags import FlagParser
from flower_ldm.synthetic import CLASS_NAMES


def load_images(
    dataset: str, data_dir: Path | None = None, *, seed=0, max_memory_gib=8.0, show_progress=False, **options
) -> tuple[data.ImageDataset, data.ImageDataset]:
    chosen = data.DataOptions(dataset, data_dir, **options)
    return chosen.load(seed=seed, max_memory_gib=max_memory_gib, show_progress=show_progress)


load_folder = partial(load_images, "imagefolder")


def all_images(dataset: data.ImageDataset) -> dict[str, torch.Tensor]:
    return dataset.__getitems__(list(range(len(dataset))))


def ramp_folder(root: Path, size: tuple[int, int] = (32, 16)) -> Path:
    """One class of two images in which the red value, 7 times the column, tells where a crop lies."""
    folder = root / "ramps" / "ramp"
    folder.mkdir(parents=True)
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[..., 0] = 7 * np.arange(size[0])
    for i in range(2):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder.parent


# --- randomness ------------------------------------------------------------------------------------------------------


def test_crops_stay_inside_and_reach_both_ends(tmp_path: Path) -> None:
    train, _ = load_folder(ramp_folder(tmp_path), resolution=16)
    lefts, flips = set(), []
    for epoch in range(300):
        columns = ((train[epoch, 0]["images"][0, 0] + 1) * 127.5 / 7).round().int()
        flips.append(bool(columns[0] > columns[-1]))
        columns = columns.flip(0) if flips[-1] else columns
        assert torch.equal(columns, torch.arange(16) + columns[0])
        lefts.add(int(columns[0]))
    assert lefts == set(range(17))
    assert 110 < sum(flips) < 190


def test_evaluation_takes_the_center_and_is_the_same_every_time(tmp_path: Path) -> None:
    _, val = load_folder(ramp_folder(tmp_path), resolution=16)
    val.carry_noise((4, 2, 2))
    sample = val[0]
    assert sample.keys() == {"images", "class_labels", "index"}
    assert torch.equal(((sample["images"][0] + 1) * 127.5 / 7).round()[0], torch.arange(8.0, 24.0))
    assert torch.equal(val[0]["images"], sample["images"])


def test_a_sample_depends_on_seed_epoch_and_index_alone(image_folder: Path) -> None:
    train, _ = load_folder(image_folder, resolution=16)
    train.carry_noise((4, 2, 2))
    alone = train[3, 5]
    batch = train.__getitems__([(3, 7), (3, 5), (0, 5)])
    for name, value in alone.items():
        assert torch.equal(batch[name][1], value), name
    again, _ = load_folder(image_folder, resolution=16)
    again.carry_noise((4, 2, 2))
    assert torch.equal(again[3, 5]["noise"], alone["noise"])
    other_seed, _ = load_folder(image_folder, resolution=16, seed=1)
    other_seed.carry_noise((4, 2, 2))
    draws = [batch["noise"][0], batch["noise"][1], batch["noise"][2], other_seed[3, 5]["noise"]]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_the_draw_order_is_crop_flip_noise(tmp_path: Path) -> None:
    train, _ = load_folder(ramp_folder(tmp_path), resolution=16, seed=5)
    image = train[2, 0]["images"]
    train.carry_noise((4, 8, 8))
    sample = train[2, 0]
    assert torch.equal(sample["images"], image)  # asking for noise changes no crop
    rng = data.image_rng(5, 2, 0)
    along, flip = rng.random(2)
    columns = torch.arange(16) + int(along * 17)
    columns = columns.flip(0) if flip < 0.5 else columns
    assert torch.equal(((image[0, 0] + 1) * 127.5 / 7).round().int(), columns.int())
    assert np.array_equal(sample["noise"].numpy(), rng.standard_normal((4, 8, 8), dtype=np.float32))
    assert sample["noise"].dtype == torch.float32


def test_image_rng_is_philox_keyed_by_seed_epoch_and_index() -> None:
    expected = np.random.Generator(np.random.Philox(key=[7, 3 * 2**32 + 11])).random(4)
    assert np.array_equal(data.image_rng(7, 3, 11).random(4), expected)


def epoch_order(num_images: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    return list(data.TrainingSampler(num_images, seed, epoch * num_images, (epoch + 1) * num_images))


def test_training_sampler_shuffles_by_seed_and_epoch() -> None:
    first = epoch_order(20, seed=1, epoch=0)
    assert epoch_order(20, seed=1, epoch=0) == first
    assert sorted(first) == [(0, i) for i in range(20)] != first
    fifth = epoch_order(20, seed=1, epoch=4)
    assert sorted(fifth) == [(4, i) for i in range(20)]
    assert [i for _, i in fifth] != [i for _, i in first] != [i for _, i in epoch_order(20, seed=2, epoch=0)]


def test_training_sampler_strings_epochs_together_and_resumes() -> None:
    epochs = [key for epoch in range(3) for key in epoch_order(10, seed=1, epoch=epoch)]
    for start, stop in ((0, 30), (0, 7), (3, 10), (9, 11), (14, 27), (20, 20)):
        sampler = data.TrainingSampler(10, seed=1, start=start, stop=stop)
        assert list(sampler) == epochs[start:stop] and len(sampler) == stop - start


def test_workers_deliver_the_same_batches(image_folder: Path) -> None:
    train, _ = load_folder(image_folder, resolution=16)
    train.carry_noise((2, 2, 2))
    batches = []
    for num_workers in (0, 2):
        sampler = data.TrainingSampler(len(train), seed=0, start=len(train), stop=2 * len(train))
        loader = DataLoader(train, 8, sampler=sampler, num_workers=num_workers, collate_fn=data.keep_batch)
        batches.append(list(loader))
    assert [len(batch["index"]) for batch in batches[0]] == [8, 8, 8, 3]
    for one, two in zip(*batches, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in ("images", "class_labels", "index", "noise"))
        assert two["images"].is_contiguous(memory_format=torch.channels_last)


def test_batch_has_the_promised_types_and_range(tmp_path: Path) -> None:
    for name, color in (("black", 0), ("white", 255)):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("L", (20, 24), color).save(tmp_path / name / f"{i}.png")
    train, _ = load_folder(tmp_path, resolution=16)
    batch = train.__getitems__([(0, 0), (0, 1)])
    assert batch["images"].shape == (2, 3, 16, 16) and batch["images"].dtype == torch.float32
    assert batch["images"][0].unique().tolist() == [-1.0] and batch["images"][1].unique().tolist() == [1.0]
    assert batch["class_labels"].tolist() == batch["index"].tolist() == train.labels.tolist() == [0, 1]
    assert batch["class_labels"].dtype == batch["index"].dtype == train.labels.dtype == torch.int64


# --- the data set ----------------------------------------------------------------------------------------------------


def test_fingerprint_follows_the_data_and_not_the_place(image_folder: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path = image_folder, **options) -> str:
        return load_folder(folder, **{"resolution": 16, **options})[0].fingerprint

    original = fingerprint()
    shutil.copytree(image_folder, tmp_path / "copy")
    assert fingerprint() == fingerprint(tmp_path / "copy") == fingerprint(seed=3) == original
    changed = [
        original,
        load_folder(image_folder, resolution=16)[1].fingerprint,
        fingerprint(resolution=24),
        fingerprint(classes=["daisy", "rose"]),
        fingerprint(classes=["rose", "daisy"]),
    ]
    (image_folder / "rose").rename(image_folder / "crocus")
    changed.append(fingerprint())
    (image_folder / "crocus").rename(image_folder / "rose")
    assert fingerprint() == original
    for i in range(10):
        with Image.open(image_folder / "rose" / f"{i}.jpg") as image:
            pixels = np.array(image)
        pixels[10, 10] ^= 128
        Image.fromarray(pixels).save(image_folder / "rose" / f"{i}.jpg", quality=95)
    changed.append(fingerprint())
    assert len(set(changed)) == len(changed)


def test_fingerprint_covers_labels_class_names_and_resolution() -> None:
    def fingerprint(labels: tuple[int, ...] = (0, 1), names: str = "ab", resolution: int = 8) -> str:
        records = [data.Record(str(i), label, partial(Image.new, "L", (8, 8), 0)) for i, label in enumerate(labels)]
        options = {"resolution": resolution, "name": "test", "splits": ("train",), "show_progress": False}
        return data.ImageDataset(records, list(names), **options).fingerprint

    variants = [fingerprint(), fingerprint(labels=(1, 0)), fingerprint(names="ac"), fingerprint(resolution=9)]
    assert len(set(variants)) == 4 and fingerprint() == variants[0]


def test_what_does_not_fit_in_memory_is_decoded_on_access(image_folder: Path) -> None:
    kept, _ = load_folder(image_folder, resolution=16)
    decoded, _ = load_folder(image_folder, resolution=16, max_memory_gib=0)
    assert decoded.fingerprint == kept.fingerprint
    keys = [(1, i) for i in range(len(kept))]
    assert torch.equal(decoded.__getitems__(keys)["images"], kept.__getitems__(keys)["images"])
    shutil.rmtree(image_folder)
    assert kept[0]["images"].shape == (3, 16, 16)
    with pytest.raises(InputError, match=r"daisy/\d.jpg can no longer be read"):
        decoded[0]


def test_what_there_is_no_memory_for_is_decoded_on_access(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A buffer for the largest that the images can be is more than `ulimit -v`, or a small machine, may give."""
    kept, _ = load_folder(image_folder, resolution=16)
    empty = torch.empty

    def refuse(*size, **options):
        if options == {"dtype": torch.uint8} and len(size) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    decoded, _ = load_folder(image_folder, resolution=16, show_progress=True)
    assert "imagefolder: no 0.0 GiB for the pixels: images are decoded on every access" in capsys.readouterr().err
    assert decoded.fingerprint == kept.fingerprint and decoded._pixels is None
    assert torch.equal(decoded[3]["images"], kept[3]["images"])


# --- image folders and splits ----------------------------------------------------------------------------------------


def test_a_tenth_of_each_class_is_held_out_by_name(tmp_path: Path) -> None:
    counts = {"four": 4, "one": 1, "thirty": 30, "two": 2}
    for name, count in counts.items():
        (tmp_path / "a" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), 8 * i).save(tmp_path / "a" / name / f"{i}.png")
    (tmp_path / "a" / "four" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / ".cache").mkdir()
    train, val = load_folder(tmp_path / "a", resolution=8)
    assert train.class_names == val.class_names == ["four", "one", "thirty", "two"]
    assert torch.bincount(train.labels, minlength=4).tolist() == [3, 1, 27, 1]
    assert torch.bincount(val.labels, minlength=4).tolist() == [1, 0, 3, 1]
    assert (train.name, train.splits, val.splits) == ("imagefolder", ("train",), ("held-out 10 %",))

    def shades(dataset: data.ImageDataset) -> set[float]:
        return set(all_images(dataset)["images"][dataset.labels == 2, 0, 0, 0].tolist())

    assert len(shades(train) | shades(val)) == 30  # none of them in both
    by_hash = sorted(range(30), key=lambda i: hashlib.sha256(f"thirty/{i}.png".encode()).digest())
    assert {round((shade + 1) * 127.5 / 8) for shade in shades(val)} == set(by_hash[:3])
    subset = load_folder(tmp_path / "a", resolution=8, classes=["thirty"])
    assert set(all_images(subset[1])["images"][:, 0, 0, 0].tolist()) == shades(val)
    Image.new("L", (8, 8), 255).save(tmp_path / "a" / "thirty" / "new.png")
    assert len(shades(load_folder(tmp_path / "a", resolution=8)[1]) & shades(val)) >= 2


def test_folders_with_splits(tmp_path: Path) -> None:
    for folder, count in {"train/ash": 3, "train/elm": 2, "test/elm": 1, "more/ash": 1}.items():
        (tmp_path / folder).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), i).save(tmp_path / folder / f"{i}.png")
    train, val = load_folder(tmp_path, resolution=8)
    assert (train.splits, val.splits) == (("train",), ("test",))
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 0, 0, 1, 1], [1])
    train, val = load_folder(tmp_path, resolution=8, train_splits=["train", "test"], val_splits=["more"])
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 0, 0, 1, 1, 1], [0])
    with pytest.raises(InputError, match="--val_splits: there is no split 'dev', only more, test, train"):
        load_folder(tmp_path, resolution=8, val_splits=["dev"])
    with pytest.raises(InputError, match="share 'test'"):
        load_folder(tmp_path, resolution=8, train_splits=["train", "test"], val_splits=["test"])
    (tmp_path / "test" / "oak").mkdir()
    with pytest.raises(InputError, match="test/oak: no class of this name in --train_splits train"):
        load_folder(tmp_path, resolution=8)


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    for name in ("train", "tram"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("L", (8, 8), i).save(tmp_path / name / f"{i}.png")
    assert load_folder(tmp_path, resolution=8)[0].class_names == ["train", "tram"]


def gray_images(root: Path, *folders: str, count: int = 2, name: str = "{}.png") -> Path:
    """A few tiny images in each of these folders."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), 10 * i).save(root / folder / name.format(i))
    return root


@pytest.mark.parametrize(
    ("folders", "advice"),
    [
        (["Train/ash", "Train/elm", "Test/ash"], "Train and Test hold folders and no images: add --train_splits Train"
         " --val_splits Test"),
        (["training/ash", "validation/ash"], "add --train_splits training --val_splits validation"),
        (["TRAIN/ash"], "TRAIN hold folders and no images: add --train_splits TRAIN"),
        (["photos/ash", "photos/elm"], "no images in photos, only folders: name the folder that holds the"
         " class folders, such as --data_dir {root}/photos"),
        (["flowers-102/jpg"], "it holds flowers-102/: pass --dataset flowers102"),
        (["train/ash", "Test/ash"], "'Test' may be the held-out split: add --val_splits Test, or --val_splits none"),
    ],
    ids=str,
)  # fmt: skip
def test_splits_that_would_be_taken_for_classes(tmp_path: Path, folders: list[str], advice: str) -> None:
    gray_images(tmp_path, *folders)
    with pytest.raises(InputError) as caught:
        load_folder(tmp_path, resolution=8)
    assert advice.format(root=tmp_path) in str(caught.value)
    if "--train_splits" in advice or "--val_splits" in advice:  # it helps
        flags = re.findall(r"--(\w+_splits) (\w+)", advice.partition(", or")[0])
        train, _ = load_folder(tmp_path, resolution=8, **{flag: [split] for flag, split in flags})
        assert "ash" in train.class_names


def test_no_val_split_holds_out_a_tenth(tmp_path: Path) -> None:
    gray_images(tmp_path, "train/ash", "val/ash", "none/ash", count=10)
    train, val = load_folder(tmp_path, resolution=8)
    assert (len(train), val.splits) == (10, ("val",))
    shutil.move(tmp_path / "none", tmp_path / "more")
    train, val = load_folder(tmp_path, resolution=8, val_splits=["none"])
    assert (len(train), len(val), val.splits) == (9, 1, ("held-out 10 %",))
    shutil.move(tmp_path / "more", tmp_path / "none")
    assert load_folder(tmp_path, resolution=8, val_splits=["none"])[1].splits == ("none",)  # it's the name of one
    synthetic = load_images("synthetic", resolution=16, images_per_class=10, classes=[0], val_splits=["none"])
    assert [len(part) for part in synthetic] == [9, 1]


def test_what_systems_leave_in_folders_is_no_class(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    gray_images(tmp_path, "rose", "tulip", "@eaDir/photo.png", "rose/@eaDir", ".thumbnails")
    for name in ("lost+found", "__MACOSX", "System Volume Information"):
        (tmp_path / name).mkdir()
    (tmp_path / "__MACOSX" / "._0.png").write_bytes(b"")
    (tmp_path / "tulip" / "Thumbs.db").write_bytes(b"")
    train, val = load_folder(tmp_path, resolution=8, show_progress=True)
    assert train.class_names == ["rose", "tulip"] and len(train) + len(val) == 4
    assert "left out" not in capsys.readouterr().err


def test_what_is_no_image_of_a_class_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    gray_images(tmp_path, "rose", "tulip", "tulip/older")
    for name in ("rose/a.heic", "rose/b.HEIC", "tulip/notes", "loose.png"):
        (tmp_path / name).write_bytes(b"")
    load_folder(tmp_path, resolution=8, show_progress=True)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert line == (
        f"{tmp_path}: left out 5 that are no images of a class (.heic 2, .png 1, no suffix 1, folders 1), such as "
        "'loose.png'"
    )
    load_folder(tmp_path, resolution=8)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("folder", [".", "rose", "train/rose"])
def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    gray_images(tmp_path, "rose", "tulip") if "train" not in folder else gray_images(tmp_path, "train/rose")
    scandir = os.scandir

    def forbid(path):  # root, who runs some tests, may read all
        if Path(path) == tmp_path / folder:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    with pytest.raises(InputError) as caught:
        load_folder(tmp_path, resolution=8)
    assert str(caught.value) == f"{tmp_path / folder} can't be read: Permission denied"


def test_many_folders_are_each_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: type) -> None:
    """And no list is searched for each: 100,000 empty ones are refused in seconds."""
    names = [counted(f"class {index:04}") for index in range(1000)]
    for name in names:
        (tmp_path / name).mkdir()
    scandir, scanned = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(path) or scandir(path))
    monkeypatch.setattr(data, "plain_name", counted)
    with pytest.raises(
        InputError, match=r"'class 0000' has no training image in .* \(and 999 other classes have none"
    ):
        load_folder(tmp_path, resolution=8)
    assert len(scanned) == 1001
    assert counted.compared < 20_000


def test_missing_and_empty_folders(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(InputError, match="needs --data_dir"):
        load_folder(resolution=8)
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        load_folder(tmp_path / "nowhere", resolution=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no class folder in it"):
        load_folder(tmp_path / "empty", resolution=8)
    (image_folder / "lily").mkdir()
    with pytest.raises(InputError, match="class 'lily' has no training image in .*flowers"):
        load_folder(image_folder, resolution=8)
    assert load_folder(image_folder, resolution=8, classes=["rose", "tulip"])[0].class_names == ["rose", "tulip"]


def test_a_single_image_cannot_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "rose").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "rose" / "0.png")
    with pytest.raises(InputError, match="no image to hold out"):
        load_folder(tmp_path, resolution=8)


def test_unreadable_images_are_named_or_left_out(image_folder: Path, capsys: pytest.CaptureFixture) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(image_folder / "rose" / "torn.jpg")
    whole = (image_folder / "rose" / "torn.jpg").read_bytes()
    (image_folder / "rose" / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"rose/torn.jpg cannot be read: .*truncated.*--skip_bad_images") as caught:
        load_folder(image_folder, resolution=16)
    assert "\n" not in str(caught.value)
    (image_folder / "tulip" / "page.png").write_text("<html>404</html>")

    train, val = load_folder(image_folder, resolution=16, skip_bad_images=True, show_progress=True)
    assert train.num_bad_images + val.num_bad_images == 2
    assert len(train) + len(val) == 30
    printed = capsys.readouterr().err
    assert all(
        f"left out: {image_folder}/{name} cannot be read" in printed for name in ("rose/torn.jpg", "tulip/page.png")
    )
    assert f"left out {train.num_bad_images} of {len(train) + train.num_bad_images} images" in printed

    for path in (image_folder / "rose").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="class 'rose' of .* has no readable image"):
        load_folder(image_folder, resolution=16, skip_bad_images=True)


def test_files_that_are_no_images_or_too_large_are_named_or_left_out(image_folder: Path) -> None:
    (image_folder / "rose" / "pipe.jpg").symlink_to("/dev/null")  # as a FIFO or any device
    with pytest.raises(InputError, match=r"rose/pipe.jpg cannot be read: it is not a regular file \(repair or remove"):
        load_folder(image_folder, resolution=16)
    (image_folder / "rose" / "pipe.jpg").unlink()
    Image.new("RGB", (16, 16)).save(image_folder / "rose" / "runs.png", "EPS")  # Ghostscript would run it
    with pytest.raises(InputError, match="rose/runs.png cannot be read: it is no image of the formats JPEG, PNG, "):
        load_folder(image_folder, resolution=16)
    (image_folder / "rose" / "runs.png").unlink()
    Image.new("RGB", (50, 50)).save(image_folder / "rose" / "large.png")
    large = "rose/large.png cannot be read: it has more than 2,499 pixels .*--max_image_pixels"
    with pytest.raises(InputError, match=large):
        load_folder(image_folder, resolution=16, max_image_pixels=2499)
    options = {"resolution": 16, "skip_bad_images": True}
    assert sum(dataset.num_bad_images for dataset in load_folder(image_folder, max_image_pixels=2499, **options)) == 1
    assert sum(dataset.num_bad_images for dataset in load_folder(image_folder, max_image_pixels=2500, **options)) == 0


def test_file_names_that_are_no_utf8_train_and_print_escaped(
    image_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    before, _ = load_folder(image_folder, resolution=16)
    try:
        for path in (image_folder / "rose").iterdir():
            path.rename(path.with_name(os.fsdecode(b"foto-\xe9" + path.name.encode())))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    train, val = load_folder(image_folder, resolution=16)
    assert (len(train), len(val)) == (27, 3) and train.class_names == before.class_names
    (image_folder / "rose" / os.fsdecode(b"torn\xff\x1b[31m\n.png")).write_bytes(b"")
    load_folder(image_folder, resolution=16, skip_bad_images=True, show_progress=True)
    assert "rose/torn\\udcff\\x1b[31m\\n.png cannot be read" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"rose/torn\\udcff\\x1b\[31m\\n.png cannot be read") as caught:
        load_folder(image_folder, resolution=16)
    assert "\n" not in str(caught.value) and str(caught.value).encode()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"resolution": 4}, "--resolution must be at least 8"), ({"resolution": 8, "seed": -1}, "--seed must not")],
)
def test_bad_numbers(options: dict, message: str, image_folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_folder(image_folder, **options)


# --- classes ---------------------------------------------------------------------------------------------------------


def test_subset_is_relabeled_in_the_order_given(image_folder: Path) -> None:
    full, _ = load_folder(image_folder, resolution=16)
    assert full.class_names == ["daisy", "rose", "tulip"] and full.num_classes == 3
    subset, val = load_folder(image_folder, resolution=16, classes=["tulip", "0"])
    assert subset.class_names == val.class_names == ["tulip", "daisy"]
    for new, old in ((0, 2), (1, 0)):
        images, of_full = all_images(subset)["images"], all_images(full)["images"]
        assert torch.equal(images[subset.labels == new], of_full[full.labels == old])
    assert sorted(val.labels.tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["sunflowr"], "--classes: unknown label 'sunflowr': the nearest names are 'sunflower'"),
        (["zzz"], "--classes: unknown label 'zzz': names are such as 'pink primrose'"),
        ([102], "--classes: label 102 is out of range: the labels are 0 to 101"),
        (["-1"], "--classes: label '-1' is out of range"),
        (["sunflower", 53], "'sunflower' is given twice"),
        ([], "names no class"),
    ],
)
def test_bad_classes(classes: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.select_classes(data.FLOWERS102_CLASSES, classes)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("bishop of llandaff", "bishop_of_llandaff"),
        ("hippeastrum ", "hippeastrum"),
        ("globe-flower", "globe-flower"),
        ("colt's foot", "colt_s_foot"),
        ("pink-yellow dahlia?", "pink-yellow_dahlia"),
        ("../up", "up"),
        ("???", "class"),
        ("edelweiß", "edelweiß"),
        ("薔薇" * 50, ("薔薇" * 13)),  # 6 bytes a time
    ],
)
def test_file_safe_name(name: str, safe: str) -> None:
    assert files.file_safe_name(name) == safe
    assert len(safe.encode()) <= 80


def test_the_flowers_of_oxford_have_file_safe_names_of_their_own() -> None:
    safe = {files.file_safe_name(name).lower() for name in data.FLOWERS102_CLASSES}
    assert len(safe) == 102


def test_select_classes_by_index_and_name() -> None:
    assert data.select_classes(data.FLOWERS102_CLASSES, [3, "17", " Sunflower"]) == [3, 17, 53]
    assert data.select_classes(["rose", "Rose"], ["Rose"]) == [1]
    assert data.select_classes(["a", "b"], None) == [0, 1]


def test_a_class_is_called_by_its_plain_name(tmp_path: Path) -> None:
    """Whichever way a system spells it: macOS's archives have their letters in two parts."""
    gray_images(tmp_path, "train/rose ", "train/cafe\u0301", "val/rose", "val/caf\u00e9")
    train, val = load_folder(tmp_path, resolution=8)
    assert train.class_names == val.class_names == ["caf\u00e9", "rose"]
    for name in ("rose ", "rose", " ROSE", "1"):
        assert load_folder(tmp_path, resolution=8, classes=[name])[0].class_names == ["rose"]
    assert load_folder(tmp_path, resolution=8, classes=["Cafe\u0301"])[0].class_names == ["caf\u00e9"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_class_folder_that_is_not_called_in_utf8(tmp_path: Path) -> None:
    """As an archive made on another system leaves it; its class is called by what can be written anywhere."""
    name = os.fsdecode(b"ros\xe9")
    gray_images(tmp_path, name, "tulip")
    train, _ = load_folder(tmp_path, resolution=8, classes=[name, "tulip"])
    assert train.class_names == ["ros\\udce9", "tulip"] and len(train) == 2


@pytest.mark.parametrize("twins", [("rose", "rose "), ("sword lily", "sword  lily"), ("caf\u00e9", "cafe\u0301")])
def test_twins_are_refused_where_they_are_listed(tmp_path: Path, hub_cache: None, twins: tuple[str, str]) -> None:
    gray_images(tmp_path / "folder", *twins)
    with pytest.raises(InputError) as caught:
        load_folder(tmp_path / "folder", resolution=8)
    assert all(ascii(name) in str(caught.value) for name in twins) and "rename one" in str(caught.value)
    for number, feature in enumerate((datasets.ClassLabel(names=[*twins, "oak"]), datasets.Value("string"))):
        labels = [0, 1, 2] if number == 0 else [*twins, "oak"]
        repository = write_parquet(tmp_path / f"trees {number}", "train", labels, feature)
        with pytest.raises(InputError, match="'species' of .* differ only in blanks"):
            load_hub(repository, resolution=8)


def test_a_class_without_a_name_is_refused(tmp_path: Path, hub_cache: None) -> None:
    gray_images(tmp_path / "folder", " ", "rose")
    with pytest.raises(InputError, match="a class is called ' ': give it a name"):
        load_folder(tmp_path / "folder", resolution=8)
    repository = write_parquet(tmp_path / "trees", "train", ["oak", ""], datasets.Value("string"))
    with pytest.raises(InputError, match="'species' of .*: a class is called ''"):
        load_hub(repository, resolution=8)


def test_twins_by_case_are_two_classes(tmp_path: Path) -> None:
    gray_images(tmp_path, "rose", "Rose")
    assert load_folder(tmp_path, resolution=8)[0].class_names == ["Rose", "rose"]
    assert load_folder(tmp_path, resolution=8, classes=["rose"])[0].class_names == ["rose"]
    with pytest.raises(InputError, match="--classes: label 'ROSE' may be any of 'Rose', 'rose'"):
        load_folder(tmp_path, resolution=8, classes=["ROSE"])


def test_select_classes_that_are_called_by_numbers() -> None:
    folders = ["1", "10", "2"]  # in the order of a folder's listing
    assert data.select_classes(folders, ["2", "1"]) == [2, 0]
    assert data.select_classes(folders, ["0"]) == [0]
    assert data.select_classes(folders, [2, 1]) == [2, 1]


# --- Hub data sets ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_parquet(folder: Path, split: str, labels: list, label_feature, **columns) -> str:
    """A repository as the Hub holds it, of images whose gray value is ten times their row."""
    folder.mkdir(exist_ok=True)
    images = [Image.new("L", (20, 16), 10 * row) for row in range(len(labels))]
    features = datasets.Features({"photo": datasets.Image(), "species": label_feature})
    rows = datasets.Dataset.from_dict({"photo": images, "species": labels}, features=features)
    rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


load_hub = partial(load_images, image_column="photo", label_column="species")


def test_hub_dataset_with_class_labels(tmp_path: Path, hub_cache: None) -> None:
    names = datasets.ClassLabel(names=["oak", "ash "])
    write_parquet(tmp_path / "trees", "train", [1, 0, 1], names)
    repository = write_parquet(tmp_path / "trees", "validation", [0], names)
    train, val = load_hub(repository, resolution=8)
    assert train.class_names == ["oak", "ash"] and train.splits == ("train",) and val.splits == ("validation",)
    assert (train.labels.tolist(), val.labels.tolist()) == ([1, 0, 1], [0])
    shades = ((all_images(train)["images"][:, 0, 0, 0] + 1) * 127.5).round().tolist()
    assert shades == [0, 10, 20]
    on_access, _ = load_hub(repository, resolution=8, max_memory_gib=0)
    assert torch.equal(all_images(on_access)["images"], all_images(train)["images"])
    with pytest.raises(InputError, match="--image_column 'image' is not in split 'train' .* it has photo, species"):
        load_hub(repository, resolution=8, image_column="image")
    with pytest.raises(InputError, match="--image_column 'species' .* does not hold images"):
        load_hub(repository, resolution=8, image_column="species")
    with pytest.raises(InputError, match="--label_column 'photo' .* must hold class labels"):
        load_hub(repository, resolution=8, label_column="photo")


def test_hub_dataset_without_held_out_split_and_with_text_labels(tmp_path: Path, hub_cache: None) -> None:
    repository = write_parquet(tmp_path / "trees", "train", ["oak"] * 20 + ["ash"] * 3, datasets.Value("string"))
    train, val = load_hub(repository, resolution=8, classes=["oak", "ash"])
    assert train.class_names == ["oak", "ash"]
    assert torch.bincount(train.labels).tolist() == [18, 2] and torch.bincount(val.labels).tolist() == [2, 1]
    again = load_hub(repository, resolution=8, classes=["oak", "ash"])
    assert (again[0].fingerprint, again[1].fingerprint) == (train.fingerprint, val.fingerprint)


def test_hub_dataset_with_unlabeled_rows(tmp_path: Path, hub_cache: None) -> None:
    write_parquet(tmp_path / "trees", "train", [12, 7, 101], datasets.Value("int64"))
    repository = write_parquet(tmp_path / "trees", "test", [7, -1], datasets.Value("int64"))
    with pytest.raises(InputError, match="'species': 1 rows of split 'test' .* such as -1; .* --val_splits none"):
        load_hub(repository, resolution=8)
    write_parquet(tmp_path / "trees", "train", [7, 7, 101, 101], datasets.Value("int64"))
    train, val = load_hub(repository, resolution=8, val_splits=["none"])
    assert (len(train), len(val), val.splits) == (2, 2, ("held-out 10 %",))


def test_hub_dataset_of_a_csv_with_file_names(image_folder: Path, tmp_path: Path, hub_cache: None) -> None:
    lines = [f"{path},{path.parent.name}" for path in sorted(image_folder.glob("*/*.jpg"))]
    (image_folder / "train.csv").write_text("\n".join(["photo,species", *lines]))
    train, val = load_hub(str(image_folder), resolution=16)
    assert train.class_names == ["daisy", "rose", "tulip"] and len(train) == 27 and len(val) == 3


def write_rows(folder: Path, rows: list[dict | None]) -> str:
    """A repository whose images are rows as a stranger may write them, one of each for two species."""
    feature = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"photo": feature, "species": datasets.Value("string")})
    folder.mkdir(exist_ok=True)
    columns = {"photo": [*rows, *rows], "species": ["oak"] * len(rows) + ["ash"] * len(rows)}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return str(folder)


def test_hub_rows_open_no_file_but_those_of_the_data_set(
    tmp_path: Path, hub_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trees").mkdir()
    buffer = io.BytesIO()
    Image.new("L", (20, 16), 70).save(buffer, "PNG")
    (tmp_path / "cache" / "downloads").mkdir(parents=True)
    for file in ("private.png", "trees/own.png", "cache/downloads/brought.png"):
        (tmp_path / file).write_bytes(buffer.getvalue())
    (tmp_path / "trees" / "link.png").symlink_to(tmp_path / "private.png")
    own = [{"bytes": None, "path": str(tmp_path / name)} for name in ("trees/own.png", "cache/downloads/brought.png")]
    own.append({"bytes": buffer.getvalue(), "path": "x"})
    train, val = load_hub(write_rows(tmp_path / "trees", own), resolution=8)
    assert len(train) + len(val) == 6
    monkeypatch.chdir(tmp_path)
    names = ["private.png", "trees/../private.png", "trees/link.png", str(tmp_path / "private.png")]
    for name in names:
        repository = write_rows(tmp_path / "trees", [{"bytes": None, "path": name}] * 2)
        with pytest.raises(InputError, match="train/0 cannot be read: the row names '.*outside of the data set's own"):
            load_hub(repository, resolution=8)
    for row in (None, {"bytes": None, "path": None}, {"bytes": None, "path": ""}):
        with pytest.raises(InputError, match="train/0 cannot be read: the row has no image"):
            load_hub(write_rows(tmp_path / "trees", [row] * 2), resolution=8)


def test_hub_dataset_with_image_files(image_folder: Path, hub_cache: None) -> None:
    """`datasets` lists the files of a folder itself."""
    train, val = load_images(str(image_folder), resolution=16)
    assert train.class_names == ["daisy", "rose", "tulip"] and len(train) == 27 and len(val) == 3


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", "float32"])
@pytest.mark.parametrize("shape", [(16, 20), (16, 20, 3)], ids=str)
@pytest.mark.parametrize("declared", [True, False])
def test_hub_dataset_of_arrays(
    dtype: str, shape: tuple[int, ...], declared: bool, tmp_path: Path, hub_cache: None
) -> None:
    """Cast to images by `datasets`, 2-D ones are of 32 bits, in which 8 bits are nearly black."""
    array = np.full(shape, 200 * (257 if dtype == "uint16" else 1), dtype=dtype)
    feature = datasets.Value(dtype)
    for _ in shape:
        feature = datasets.List(feature)
    if declared:
        feature = {2: datasets.Array2D, 3: datasets.Array3D}[len(shape)](shape, dtype)
    features = datasets.Features({"photo": feature, "species": datasets.Value("string")})
    (tmp_path / "trees").mkdir()
    rows = datasets.Dataset.from_dict({"photo": [array] * 4, "species": ["oak", "oak", "ash", "ash"]}, features)
    rows.to_parquet(tmp_path / "trees" / "train-00000-of-00001.parquet")
    if dtype == "uint8" or (dtype, len(shape)) == ("uint16", 2):
        train, _ = load_hub(str(tmp_path / "trees"), resolution=8)
        assert ((all_images(train)["images"] + 1) * 127.5).round().unique().tolist() == [200]
        return
    message = "cannot be read" if dtype == "uint16" else f"'photo' of .* holds arrays of {dtype}: store image files"
    with pytest.raises(InputError, match=message):
        load_hub(str(tmp_path / "trees"), resolution=8)


def test_unknown_dataset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither flowers102, synthetic or imagefolder nor a data set") as caught:
        load_hub(str(tmp_path / "nothing"), resolution=8)
    assert "\n" not in str(caught.value)


# --- synthetic flowers -----------------------------------------------------------------------------------------------


def test_synthetic_flowers() -> None:
    load = partial(load_images, "synthetic", resolution=16)
    train, val = load(classes=[2, 5], images_per_class=9)
    assert train.class_names == [CLASS_NAMES[2], CLASS_NAMES[5]]
    assert train.labels.tolist() == [0] * 9 + [1] * 9 and val.labels.tolist() == [0] * 8 + [1] * 8
    more, same_val = load(classes=[2, 5], images_per_class=12, seed=7)  # the training seed changes no flower
    assert same_val.fingerprint == val.fingerprint
    assert torch.equal(all_images(more)["images"][:9], all_images(train)["images"][:9])
    images = torch.cat([all_images(train)["images"], all_images(val)["images"]])
    assert len(images.flatten(1).unique(dim=0)) == 34
    with pytest.raises(InputError, match="images_per_class"):
        load(images_per_class=0)
    with pytest.raises(InputError, match="resolution") as caught:
        load(resolution=8)
    assert "--skip_bad_images" not in str(caught.value)  # the option is wrong, not an image


# --- what flags say about the data -----------------------------------------------------------------------------------


def of_run(saved: dict, *words: str, **options) -> data.DataOptions:
    """What a command takes that looks at a run with these flags."""
    parser = FlagParser()
    data.DataOptions.add_flags_of_run(parser)
    return data.DataOptions.from_run(saved, parser.parse_args(words), **options)


def test_flags_of_a_training_run_have_the_defaults_of_the_options() -> None:
    parser = FlagParser()
    data.DataOptions.add_flags(parser, resolution=48)
    assert parser.flags.keys() == {field.name for field in dataclasses.fields(data.DataOptions)}
    assert data.DataOptions.from_args(parser.parse_args([])) == data.DataOptions(resolution=48)
    words = ["--dataset", "imagefolder", "--classes", "rose", "7", "--no-skip_bad_images"]
    expected = data.DataOptions("imagefolder", classes=["rose", "7"], resolution=48)
    assert data.DataOptions.from_args(parser.parse_args(words)) == expected


def test_flags_win_over_those_of_the_run_and_another_data_set_forgets_them() -> None:
    saved = {"dataset": "imagefolder", "data_dir": "here", "classes": ["a", "b"], "resolution": 32, "seed": 7,
             "val_splits": None, "skip_bad_images": True}  # fmt: skip
    run = data.DataOptions("imagefolder", "here", classes=["a", "b"], resolution=32, skip_bad_images=True)
    assert of_run(saved) == run
    there = of_run(saved, "--data_dir", "there", "--no-skip_bad_images")
    assert there == dataclasses.replace(run, data_dir="there", skip_bad_images=False)
    assert of_run(saved, "--dataset", "imagefolder") == run  # the same one
    assert of_run(saved, "--dataset", "flowers102") == data.DataOptions("flowers102")


def test_where_neither_a_flag_nor_the_run_names_a_data_set() -> None:
    assert of_run({}) == data.DataOptions("flowers102")
    assert of_run({}, "--classes", "3", unnamed="none") == data.DataOptions("none", classes=["3"])
    assert of_run({"dataset": "synthetic"}, unnamed="none").dataset == "synthetic"


def test_a_folder_is_the_same_data_set_from_wherever_it_is_named(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "folder" / "of flowers"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    saved = {"dataset": str(folder), "image_column": "picture"}  # as the scripts write it
    assert of_run(saved, "--dataset", "folder/of flowers") == data.DataOptions(str(folder), image_column="picture")


def test_the_size_is_that_of_the_model() -> None:
    options = data.DataOptions("synthetic")
    assert options.at_resolution(32, "--pipeline x") == dataclasses.replace(options, resolution=32)
    assert options.at_resolution(32, "x").at_resolution(32, "x").resolution == 32
    with pytest.raises(InputError, match="--resolution 64: --pipeline x draws 32 pixels"):
        dataclasses.replace(options, resolution=64).at_resolution(32, "--pipeline x")


@pytest.mark.parametrize(
    ("name", "public"),
    [("flowers102", "flowers102"), ("someone/flowers", "someone/flowers"), ("/srv/photos", "imagefolder"),
     ("here/photos", "imagefolder"), ("photos", "imagefolder"), (None, "imagefolder")],
)  # fmt: skip
def test_public_name_of_a_data_set(name, public, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert data.public_dataset(name) == public


# --- Oxford 102 Flowers ----------------------------------------------------------------------------------------------


def test_flowers102_names_are_those_of_torchvision() -> None:
    from torchvision.datasets import Flowers102

    assert len(data.FLOWERS102_CLASSES) == len(set(data.FLOWERS102_CLASSES)) == 102
    assert data.FLOWERS102_CLASSES[53] == "sunflower"
    if hasattr(Flowers102, "classes"):  # older ones have none
        assert list(data.FLOWERS102_CLASSES) == Flowers102.classes


def test_flowers102_that_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import Flowers102

    with pytest.raises(
        InputError, match="no complete flowers-102/ in it; pass a --data_dir .* or --dataset synthetic"
    ):
        data.DataOptions("flowers102", tmp_path, resolution=8).load(download=False)
    monkeypatch.setattr(Flowers102, "_download_url_prefix", "http://127.0.0.1:9/")  # nobody listens there
    with pytest.raises(InputError, match="cannot be downloaded .* or --dataset synthetic") as caught:
        data.DataOptions("flowers102", tmp_path / "new", resolution=8).load()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # what is on disk is as it was
    gray_images(tmp_path / "photos", "rose")
    monkeypatch.setattr(Flowers102, "download", lambda self: pytest.fail("downloads into a folder of other things"))
    with pytest.raises(InputError, match="such as 'rose': pass --dataset imagefolder") as caught:
        data.DataOptions("flowers102", tmp_path / "photos", resolution=8).load()
    (tmp_path / "flowers-102" / "jpg").mkdir(parents=True)
    with pytest.raises(InputError, match="give the folder that holds flowers-102/"):
        data.DataOptions("flowers102", tmp_path / "flowers-102", resolution=8).load()


@pytest.mark.skipif("FLOWERS102_ROOT" not in os.environ, reason="FLOWERS102_ROOT names no folder with flowers-102/")
def test_real_flowers102() -> None:
    root = os.environ["FLOWERS102_ROOT"]
    train, val = load_images("flowers102", root, resolution=16)
    assert (len(train), len(val)) == (7169, 1020)
    assert (train.splits, val.splits) == (("train", "test"), ("val",))
    assert train.class_names == list(data.FLOWERS102_CLASSES)
    assert torch.bincount(val.labels).tolist() == [10] * 102
    counts = torch.bincount(train.labels) + 10
    assert (counts.min(), counts.max()) == (40, 258)

    subset, val_subset = load_images("flowers102", root, resolution=16, classes=["sunflower", 3])
    assert subset.class_names == ["sunflower", "sweet pea"]
    assert len(val_subset) == 20
    assert torch.equal(
        all_images(subset)["images"][subset.labels == 0], all_images(train)["images"][train.labels == 53]
    )
    small, _ = load_images("flowers102", root, resolution=16, train_splits=["train"], classes=[3])
    assert len(small) == 10
