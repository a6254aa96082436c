"""Labeled images in, batches in [-1, 1] out: flowers102, synthetic, an image folder or any Hub data set.

Every image is decoded once, at the start, and kept as small uint8 pixels. Training only crops, flips and scales these
pixels. Its random numbers depend on nothing but (seed, epoch, image index).
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from .errors import InputError, one_line, printable
from .files import hub_id, path_or_hub_id, path_text
from .flags import POSITIVE, FlagParser, as_it_is
from .images import IMAGE_SUFFIXES, MAX_IMAGE_PIXELS, open_image, small_pixels
from .pipelines.pipeline_flower_ldm import FlowerLDMPipeline, find_classes, plain_name
from .progress_bars import progress_bar, write_line
from .synthetic import CLASS_NAMES, synthetic_flower

# Titles of the built-in data sets. Any other data set is loaded from the Hub.
DATASET_TITLES = {"flowers102": "Oxford 102 Flowers", "synthetic": "synthetic flowers",
                  "imagefolder": "an image folder"}  # fmt: skip
VAL_SPLIT_NAMES = ("val", "validation", "valid", "dev", "test")  # the first of these that exists is held out
HELD_OUT = "held-out 10 %"  # our name for the held-out images of a data set that has no such split
DEFAULT_DATA_DIR = "data"  # where Oxford 102 Flowers is downloaded to
NO_SPLIT = "none"  # --val_splits none: hold out 10 %, even if the data set has other splits
# Names that operating systems create in folders of photos: Linux, macOS archives, Synology, QNAP, Windows.
SYSTEM_NAMES = {"lost+found", "__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN",
                "System Volume Information", "Thumbs.db", "desktop.ini"}  # fmt: skip
SYNTHETIC_VAL_START = 1_000_000  # so held-out flowers don't change with the number of training flowers

# The class names that the data set's authors gave, by label. torchvision has them too, since 2024.
_FLOWERS102_NAMES = """
    pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid,
    bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris,
    globe-flower, purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily,
    pincushion flower, fritillary, red ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian,
    artichoke, sweet william, carnation, garden phlox, love in the mist, mexican aster, alpine sea holly,
    ruby-lipped cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil, sword lily,
    poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common dandelion, petunia, wild pansy,
    primula, sunflower, pelargonium, bishop of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia?,
    cautleya spicata, japanese anemone, black-eyed susan, silverbush, californian poppy, osteospermum, spring crocus,
    bearded iris, windflower, tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory,
    passion flower, lotus, toad lily, anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree mallow,
    magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia,
    mallow, mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily
"""
FLOWERS102_CLASSES = tuple(re.split(r",\s+", _FLOWERS102_NAMES.strip()))


# ---------------------------------------------------------------------------------------------------------------------
# Randomness: everything random about a training sample comes from (seed, epoch, image index), never from a rank, a
# worker or a running generator. So a resumed run, and a run in several processes, draws exactly the same.


def image_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random generator of one image in one epoch. `index` counts within the data set, below 2**32."""
    return np.random.Generator(np.random.Philox(key=[seed, (epoch << 32) | index]))


class TrainingSampler(Sampler):
    """Yields the training keys `(epoch, index)` of a whole run, or of the rest of a resumed one.

    Every epoch has every index once, in an order that depends on (seed, epoch) alone. A batch may span two epochs. A
    resumed run starts after the images that it has seen already, and goes on as if it had never stopped.

    Args:
        num_images: length of the data set.
        seed: decides the order, together with the epoch.
        start, stop: the number of images seen before the first key and after the last, since the run began.
    """

    def __init__(self, num_images: int, seed: int, start: int, stop: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self.start
        while position < self.stop:
            epoch, first = divmod(position, self.num_images)
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
            for index in order[first : first + self.stop - position].tolist():
                yield epoch, index
            position += self.num_images - first


def keep_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`collate_fn` for data sets whose `__getitems__` already returns a whole batch."""
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# The data set: small uint8 images of any aspect ratio, in one flat buffer that forked and spawned workers share.


@dataclass(frozen=True)
class Record:
    """One image that has not been decoded yet: its path within the data set, its label, and how to open it."""

    name: str
    label: int
    open: Callable[[], Image.Image]


def _decode(record: Record, resolution: int) -> np.ndarray | str:
    """Return the record's small pixels or, if it can't be decoded, the reason in one line."""
    try:
        with record.open() as image:
            return small_pixels(image, resolution)
    except InputError:  # an option is wrong, not the file
        raise
    except Exception as error:  # Pillow's readers raise OSError, ValueError, SyntaxError, struct.error and more
        return one_line(error)


class ImageDataset(Dataset):
    """Labeled images, decoded once.

    A key is an `int` (evaluation: center crop, no flip, no noise) or `(epoch, index)` (training: a random crop along
    the long side, a horizontal flip with probability 1/2 and, after `carry_noise`, standard normal noise).

    Attributes:
        class_names: one name for each label. `num_classes` is their number.
        labels: `(N,)` int64.
        splits: the splits of the source that the images come from.
        fingerprint: sha256 (hex) of all small pixels, labels, class names and the resolution.
        num_bad_images: the number of unreadable images that were left out.
    """

    def __init__(
        self,
        records: Sequence[Record],
        class_names: Sequence[str],
        *,
        resolution: int,
        name: str,
        splits: Sequence[str],
        location: str = "",
        seed: int = 0,
        skip_bad_images: bool = False,
        max_memory_gib: float = 8.0,
        show_progress: bool = True,
    ) -> None:
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.resolution = resolution
        self.name = name
        self.splits = tuple(splits)
        self.seed = seed
        self._noise_shape: tuple[int, ...] | None = None
        self._location = location
        self._records = self._decode_all(records, skip_bad_images, max_memory_gib, show_progress)

        self.num_bad_images = len(records) - len(self._records)
        self.labels = torch.tensor([record.label for record in self._records], dtype=torch.int64)
        if self._pixels is not None:
            self._records = None  # else every worker gets a copy of up to a million small objects

    def _decode_all(
        self, records: Sequence[Record], skip_bad_images: bool, max_memory_gib: float, show_progress: bool
    ) -> list[Record]:
        """Decode every image, fill the buffer, compute the fingerprint, and return the records that could be read."""
        # Upper bound: every image at the largest aspect ratio, 2:1. Pages that are never written to cost no memory.
        capacity = min(len(records) * 6 * self.resolution**2, int(max_memory_gib * 2**30))
        try:
            self._pixels = torch.empty(capacity, dtype=torch.uint8)
        except RuntimeError:  # not enough memory: decode on access instead
            self._pixels = None
            if show_progress:
                print(f"{self.name}: no {capacity / 2**30:.1f} GiB for the pixels: images are decoded on every access",
                      file=sys.stderr)  # fmt: skip
        layout, kept, filled = [], [], 0  # layout: (height, width, offset in the buffer) of each image
        fingerprint = hashlib.sha256(json.dumps([self.resolution, self.class_names]).encode())
        title = f"{self.name} {'+'.join(self.splits)}, {self.resolution} px"
        with (
            ThreadPool() as pool,  # Pillow decodes and resizes without Python's global lock
            progress_bar(desc=title, total=len(records), unit=" images", disable=not show_progress) as progress,
        ):
            decoded = pool.imap(partial(_decode, resolution=self.resolution), records, chunksize=8)
            for record, pixels in zip(records, decoded, strict=True):
                progress.update()
                if isinstance(pixels, str):
                    problem = f"{self._path(record)} cannot be read: {pixels}"
                    if not skip_bad_images:
                        raise InputError(f"{problem} (repair or remove it, or pass --skip_bad_images)")
                    if show_progress:
                        write_line(f"left out: {problem}")
                    continue
                fingerprint.update(json.dumps([record.label, pixels.shape]).encode())
                fingerprint.update(pixels)
                if self._pixels is not None and filled + pixels.size > capacity:
                    self._pixels = None  # above max_memory_gib: decode on access instead
                if self._pixels is not None:
                    self._pixels.numpy()[filled : filled + pixels.size] = pixels.reshape(-1)
                layout.append((pixels.shape[0], pixels.shape[1], filled))
                filled += pixels.size
                kept.append(record)
        self._layout = np.array(layout, dtype=np.int64)
        self.fingerprint = fingerprint.hexdigest()
        if show_progress and len(kept) < len(records):
            print(f"{title}: left out {len(records) - len(kept)} of {len(records)} images", file=sys.stderr)
        return kept

    def _path(self, record: Record) -> str:
        return printable(f"{self._location}/{record.name}")

    def _small_pixels(self, index: int) -> torch.Tensor:
        """The whole image `index` before cropping: `(height, width, 3)` uint8."""
        if self._pixels is not None:
            height, width, offset = self._layout[index].tolist()
            return self._pixels[offset : offset + height * width * 3].view(height, width, 3)
        pixels = _decode(self._records[index], self.resolution)
        if isinstance(pixels, str):
            raise InputError(f"{self._path(self._records[index])} can no longer be read: {pixels}")
        return torch.from_numpy(pixels)

    def __len__(self) -> int:
        return len(self.labels)

    def carry_noise(self, shape: tuple[int, ...]) -> None:
        """From now on, return standard normal noise of this shape with every training image."""
        self._noise_shape = shape

    def __getstate__(self) -> dict:
        """The state that is sent to spawned workers. The unused end of the pixel buffer is cut off first."""
        if self._pixels is not None:
            height, width, offset = self._layout[-1].tolist()
            filled = offset + 3 * height * width
            if filled < len(self._pixels):
                self._pixels = self._pixels[:filled].clone()
        return self.__dict__

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        """One sample: the batch of `__getitems__` without its first dimension."""
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def center_crops(self, indices: Sequence[int]) -> torch.Tensor:
        """Center crops of some images, not flipped: `(B, resolution, resolution, 3)` uint8."""
        size = self.resolution
        crops = torch.empty(len(indices), size, size, 3, dtype=torch.uint8)
        for row, index in enumerate(indices):
            pixels = self._small_pixels(int(index))
            top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2  # one of them is 0
            crops[row] = pixels[top : top + size, left : left + size]
        return crops

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Return a whole batch. torch's `DataLoader` calls this method; all keys must be of one kind.

        Returns:
            `images` `(B, 3, resolution, resolution)` float32 in [-1, 1], channels last in memory; `class_labels` and
            `index` `(B,)` int64. Training keys also get `noise` `(B, *shape)` float32 after `carry_noise`.
        """
        training = isinstance(keys[0], tuple)
        indices = [key[1] if training else int(key) for key in keys]
        crops, noise = self._random_crops(keys) if training else (self.center_crops(indices), None)
        index = torch.tensor(indices, dtype=torch.int64)
        batch = {
            "images": crops.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0),
            "class_labels": self.labels[index],
            "index": index,
        }
        return batch if noise is None else batch | {"noise": noise}

    def _random_crops(self, keys: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Random crops and flips for training keys, shaped as in `center_crops`; and noise, after `carry_noise`."""
        size = self.resolution
        crops = torch.empty(len(keys), size, size, 3, dtype=torch.uint8)
        noise = np.empty((len(keys), *(self._noise_shape or ())), dtype=np.float32)
        for row, key in enumerate(keys):
            pixels = self._small_pixels(key[1])
            slack_y, slack_x = pixels.shape[0] - size, pixels.shape[1] - size  # one of them is 0
            rng = image_rng(self.seed, *key)  # the order of the draws is fixed: crop, flip, noise
            along, flip = rng.random(2)
            top, left = int(along * (slack_y + 1)), int(along * (slack_x + 1))
            crop = pixels[top : top + size, left : left + size]
            crops[row] = crop.flip(1) if flip < 0.5 else crop
            if self._noise_shape is not None:
                noise[row] = rng.standard_normal(self._noise_shape, dtype=np.float32)
        return crops, None if self._noise_shape is None else torch.from_numpy(noise)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """`(B, 3, H, W)` in [-1, 1] -> `(B, H, W, 3)` uint8, rounded and clipped."""
    scaled = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def uint8_images(images: ImageDataset | np.ndarray, keys: Sequence[int], mirrored: bool = False) -> np.ndarray:
    """Some images of a data set (center crops) or of an array, mirrored if asked, as `(B, H, W, 3)` uint8."""
    chosen = images[np.asarray(keys)] if isinstance(images, np.ndarray) else images.center_crops(keys).numpy()
    return np.ascontiguousarray(chosen[:, :, ::-1]) if mirrored else chosen


# ---------------------------------------------------------------------------------------------------------------------
# Sources: each lists its class names and the records of every split that is used.


@dataclass(frozen=True)
class Listing:
    """The classes, splits and images of a source. If `val_splits` is empty, 10 % of the rest is held out later."""

    location: str
    class_names: Sequence[str]
    train_splits: tuple[str, ...]
    val_splits: tuple[str, ...]
    records: dict[str, list[Record]]


def _resolve_splits(
    available: Sequence[str],
    train_splits: Sequence[str] | None,
    val_splits: Sequence[str] | None,
    default_train: tuple[str, ...] = ("train",),
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    train = tuple(train_splits or default_train)
    if val_splits is None:
        val = tuple([split for split in VAL_SPLIT_NAMES if split in available and split not in train][:1])
        alike = [split for split in available if split not in train and _is_like(split, VAL_SPLIT_NAMES)]
        if not val and alike:
            raise InputError(
                f"{alike[0]!r} may be the held-out split: add --val_splits {alike[0]}, or --val_splits {NO_SPLIT}, "
                "which holds out 10 % of the training images"
            )
    else:
        val = () if list(val_splits) == [NO_SPLIT] and NO_SPLIT not in available else tuple(val_splits)
    for flag, splits in (("--train_splits", train), ("--val_splits", val)):
        for split in splits:
            if split not in available:
                raise InputError(f"{flag}: there is no split {split!r}, only {', '.join(available)}")
            if splits.count(split) > 1:
                raise InputError(f"{flag}: {split!r} is given twice")
    if shared := set(train) & set(val):
        raise InputError(f"--train_splits and --val_splits share {min(shared)!r}: held-out images are not trained on")
    return train, val


def _is_like(name: str, names: Sequence[str]) -> bool:
    """Whether a folder name probably means one of these names, as `Test` and `testing` mean `test`."""
    return name.casefold().startswith(tuple(names))


def _plain_names(names: Sequence[str], where: str) -> list[str]:
    """Class names in the form in which they are stored and compared.

    Raises:
        InputError: a name is empty, or two names look the same.
    """
    spelled: dict[str, str] = {}
    for name in names:
        plain = plain_name(name)
        if not plain:
            raise InputError(f"{where}: a class is called {name!r}: give it a name")
        if plain in spelled:
            raise InputError(
                f"{where}: the classes {spelled[plain]!a} and {name!a} differ only in blanks, or in how Unicode "
                "spells them: rename one, or put their images together"
            )
        spelled[plain] = name
    return list(spelled)


def _list_flowers102(
    data_dir: Path,
    train_splits: Sequence[str] | None,
    val_splits: Sequence[str] | None,
    download: bool,
    open_file: Callable[[Path], Image.Image],
) -> Listing:
    """Oxford 102 Flowers (Nilsback and Zisserman, 2008) through torchvision, downloaded if it isn't there."""
    from torchvision.datasets import Flowers102  # takes a second, and the other sources don't need it

    train, val = _resolve_splits(("train", "val", "test"), train_splits, val_splits, default_train=("train", "test"))
    if data_dir.name == "flowers-102" and (data_dir / "jpg").is_dir():
        raise InputError(f"--data_dir {data_dir}: give the folder that holds flowers-102/, here {data_dir.parent}")
    advice = "pass a --data_dir that holds flowers-102/, or --dataset synthetic"
    created = [folder for folder in (data_dir / "flowers-102", data_dir) if not folder.exists()]
    try:
        Flowers102(str(data_dir), download=False)
    except RuntimeError:  # torchvision found no images, or not the two .mat files it knows
        if not download:
            raise InputError(f"--data_dir {data_dir}: no complete flowers-102/ in it; {advice}") from None
        folders, files = _scan(data_dir) if data_dir.is_dir() else ([], [])
        if others := [name for name in (*folders, *files) if name != "flowers-102"]:
            raise InputError(
                f"--data_dir {data_dir} has no complete flowers-102/, and we don't download it beside other files, "
                f"such as {others[0]!a}: pass --dataset imagefolder to train on its folders, or another --data_dir"
            ) from None
        try:
            Flowers102(str(data_dir), download=True)
        except (OSError, RuntimeError) as error:
            for folder in created:
                with suppress(OSError):  # absent, or no longer empty
                    folder.rmdir()
            reason = f"cannot be downloaded to --data_dir {data_dir} ({one_line(error)})"
            raise InputError(f"flowers102 {reason}; {advice}") from None

    records = {}
    for split in train + val:
        source = Flowers102(str(data_dir), split=split, download=False)
        records[split] = [
            Record(path.relative_to(data_dir).as_posix(), int(label), partial(open_file, path))
            for path, label in zip(source._image_files, source._labels, strict=True)  # no public access
        ]
    return Listing(str(data_dir), FLOWERS102_CLASSES, train, val, records)


def _open_synthetic(class_index: int, index: int, resolution: int) -> Image.Image:
    return Image.fromarray(synthetic_flower(class_index, index, resolution=resolution))


def _list_synthetic(
    train_splits: Sequence[str] | None, val_splits: Sequence[str] | None, images_per_class: int, resolution: int
) -> Listing:
    """The procedural flowers of `synthetic`. They don't depend on the training seed."""
    if images_per_class < 1:
        raise InputError(f"images_per_class must be at least 1, not {images_per_class}")
    train, val = _resolve_splits(("train", "val"), train_splits, val_splits)
    indices = {
        "train": range(images_per_class),
        "val": range(SYNTHETIC_VAL_START, SYNTHETIC_VAL_START + max(8, images_per_class // 10)),
    }
    records = {
        split: [
            Record(f"{split}/{name}/{i}", label, partial(_open_synthetic, label, i, resolution))
            for label, name in enumerate(CLASS_NAMES)
            for i in indices[split]
        ]
        for split in train + val
    }
    return Listing("synthetic", CLASS_NAMES, train, val, records)


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in a folder, sorted, without hidden names and `SYSTEM_NAMES`.

    Raises:
        InputError: the folder can't be read.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name not in SYSTEM_NAMES:
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise InputError(f"{folder} can't be read: {error.strerror}") from error
    return sorted(folders), sorted(files)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _list_imagefolder(
    data_dir: Path,
    train_splits: Sequence[str] | None,
    val_splits: Sequence[str] | None,
    open_file: Callable[[Path], Image.Image],
    show_progress: bool,
) -> Listing:
    """`DIR/<split>/<class>/*` if DIR/train, or a split of --train_splits, holds folders; else `DIR/<class>/*`."""
    if not os.path.isdir(data_dir):
        raise InputError(f"--data_dir {data_dir}: there is no such folder")
    top, loose = _scan(data_dir)
    if not top:
        raise InputError(f"--data_dir {data_dir}: no class folder in it; expected {data_dir}/<class>/*.jpg")
    scan = partial(progress_bar, desc=f"listing {data_dir}", unit=" folders", delay=2, disable=not show_progress)
    tree = {name: _scan(data_dir / name) for name in scan(top)}
    available = [name for name, (folders, _) in tree.items() if folders]
    if set(available) & set(train_splits or ("train",)):
        train, val = _resolve_splits(available, train_splits, val_splits)
        folders_of = {split: [f"{split}/{name}" for name in tree[split][0]] for split in train + val}
        tree = {name: _scan(data_dir / name) for name in scan([*itertools.chain(*folders_of.values())])}
    elif available and not any(map(_is_image, itertools.chain(*(files for _, files in tree.values())))):
        raise InputError(f"--data_dir {data_dir}: {_advice_on_folders(data_dir, available)}")
    else:
        train, val = _resolve_splits(("train",), train_splits, val_splits)
        folders_of = {"train": top}

    names_of = {}
    for split, folders in folders_of.items():
        names = _plain_names([folder.rpartition("/")[2] for folder in folders], str(data_dir))
        names_of[split] = dict(zip(folders, names, strict=True))
    class_names = sorted({name for split in train for name in names_of[split].values()})
    label_of = {name: label for label, name in enumerate(class_names)}
    records: dict[str, list[Record]] = {split: [] for split in train + val}
    left_out = [name for name in loose if _is_image(name)]
    for split, names in names_of.items():
        for folder, name in names.items():
            if name not in label_of:
                raise InputError(f"{data_dir / folder}: no class of this name in --train_splits {' '.join(train)}")
            folders, files = tree[folder]
            for file in files:
                path = f"{folder}/{file}"
                if _is_image(file):
                    records[split].append(Record(path, label_of[name], partial(open_file, data_dir / path)))
                else:
                    left_out.append(path)
            left_out += [f"{folder}/{inner}/" for inner in folders]
    if left_out and show_progress:
        print(f"{data_dir}: {_account_of(left_out)}", file=sys.stderr)
    return Listing(str(data_dir), class_names, train, val, records)


def _advice_on_folders(data_dir: Path, folders: Sequence[str]) -> str:
    """Advice for a `--data_dir` whose folders hold only folders, and no images."""
    if "flowers-102" in folders:
        return "it holds flowers-102/: pass --dataset flowers102"
    train = [name for name in folders if _is_like(name, ("train",))]
    val = [name for name in folders if name not in train and _is_like(name, VAL_SPLIT_NAMES)]
    if train:
        flags = f"--train_splits {train[0]}" + (f" --val_splits {val[0]}" if val else "")
        return f"{' and '.join(train[:1] + val[:1])} hold folders and no images: add {flags}"
    examples = ", ".join(folders[:3])
    return (
        f"no images in {examples}, only folders: name the folder that holds the class folders, such as --data_dir "
        f"{data_dir / folders[0]}, or name the splits with --train_splits"
    )


def _account_of(left_out: Sequence[str]) -> str:
    """One line about files that are not named as images, or don't lie in a class folder."""
    kinds = Counter("folders" if name.endswith("/") else Path(name).suffix.lower() or "no suffix" for name in left_out)
    counts = ", ".join(f"{ascii(kind)[1:-1]} {count:,}" for kind, count in kinds.most_common(5))
    return f"left out {len(left_out):,} that are no images of a class ({counts}), such as {left_out[0]!a}"


def _open_hub_image(
    rows, column: str, row: int, folders: Sequence[Path], open_file: Callable[[Path | io.BytesIO], Image.Image]
) -> Image.Image:
    """Open a row's image: its bytes, its array, or a file in one of `folders`.

    No file outside of `folders` is opened, since a stranger may have written the row.
    """
    stored = rows[row][column]
    if isinstance(stored, list):
        return Image.fromarray(np.array(stored, _array_dtype(rows.features[column])))
    if stored is None or not (stored["bytes"] or stored["path"]):
        raise ValueError("the row has no image")
    if stored["bytes"] is not None:
        return open_file(io.BytesIO(stored["bytes"]))
    file = Path(stored["path"]).resolve()
    if not any(file.is_relative_to(folder) for folder in folders):
        raise ValueError(f"the row names {stored['path']!r}, which is outside of the data set's own folder")
    return open_file(file)


def _image_rows(split, column: str, dataset: str):
    """The rows of a split, with images in their stored form: bytes, paths, or arrays of 8 or 16 bits.

    Raises:
        InputError: the column holds something else.
    """
    import datasets

    rows = split.select_columns([column])
    array_dtype = _array_dtype(rows.features[column])
    if array_dtype in ("uint8", "uint16"):
        return rows
    if array_dtype is not None:  # `datasets` would cast them to 32-bit images, whose value of white is unknown
        raise InputError(
            f"--image_column {column!r} of {dataset} holds arrays of {array_dtype}: store image files, or uint8"
        )
    try:
        return rows.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's errors are of these kinds
        raise InputError(f"--image_column {column!r} of {dataset} does not hold images ({one_line(error)})") from None


def _array_dtype(feature) -> str | None:
    """The number type of a column of arrays; None for any other column."""
    if hasattr(feature, "shape"):
        return feature.dtype
    if not hasattr(feature, "feature"):
        return None
    while hasattr(feature, "feature"):
        feature = feature.feature
    return getattr(feature, "dtype", None)


def _folders_of_datasets(dataset: str) -> list[Path]:
    """The folders where `datasets` keeps downloaded files and, if it is a local folder, the data set itself."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    config = datasets.config
    downloads = (
        config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH, HF_HUB_CACHE
    )  # fmt: skip
    local = [dataset] if Path(dataset).exists() else []
    return [Path(folder).resolve() for folder in (*downloads, *local)]


def _list_hub(
    dataset: str,
    train_splits: Sequence[str] | None,
    val_splits: Sequence[str] | None,
    image_column: str,
    label_column: str,
    open_file: Callable[[Path | io.BytesIO], Image.Image],
) -> Listing:
    """Any data set of the Hugging Face Hub, or a local folder of Parquet files and the like, through `datasets`."""
    import datasets  # imported here: it takes seconds, and the other sources don't need it

    try:
        loaded = datasets.load_dataset(dataset)
    except Exception as error:  # network, name, format: `datasets` raises a dozen kinds
        known = "neither flowers102, synthetic or imagefolder nor a data set that can be loaded"
        raise InputError(f"--dataset {dataset!r} is {known} ({one_line(error)})") from None
    train, val = _resolve_splits(tuple(loaded), train_splits, val_splits)
    for split in train + val:
        for flag, column in (("--image_column", image_column), ("--label_column", label_column)):
            if column not in loaded[split].column_names:
                columns = ", ".join(loaded[split].column_names)
                raise InputError(f"{flag} {column!r} is not in split {split!r} of {dataset}; it has {columns}")

    labels = {split: list(loaded[split][label_column]) for split in train + val}
    feature = loaded[train[0]].features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        values, class_names = range(feature.num_classes), feature.names
    elif isinstance(feature, datasets.Value) and not feature.dtype.startswith("float"):
        values = sorted({label for split in train for label in labels[split] if label is not None})
        class_names = [str(value) for value in values]
    else:
        raise InputError(f"--label_column {label_column!r} of {dataset} must hold class labels, text or integers")
    label_of = {value: label for label, value in enumerate(values)}
    opening = (_folders_of_datasets(dataset), open_file)

    records = {}
    for split in train + val:
        rows = _image_rows(loaded[split], image_column, dataset)
        unknown = [value for value in labels[split] if value not in label_of]
        if unknown:
            raise InputError(
                f"--label_column {label_column!r}: {len(unknown)} rows of split {split!r} have a label that is not in"
                f" the training splits, such as {unknown[0]!r}; choose other --train_splits or --val_splits, or add"
                f" --val_splits {NO_SPLIT}, which holds out 10 % of the training images"
            )
        records[split] = [
            Record(f"{split}/{row}", label_of[value], partial(_open_hub_image, rows, image_column, row, *opening))
            for row, value in enumerate(labels[split])
        ]
    return Listing(dataset, _plain_names(class_names, f"{label_column!r} of {dataset}"), train, val, records)


# ---------------------------------------------------------------------------------------------------------------------
# From a source to two data sets: training images and held-out images.


def select_classes(class_names: Sequence[str], classes: Sequence[int | str] | None) -> list[int]:
    """Return the labels that `--classes` selects, in the order given; all labels for None.

    `classes` holds names or 0-based indices. The pipeline's rule applies (`find_classes`): text is read as a name
    first, then as an index. So if class folders are called "1", "2", ..., "2" means the folder.

    Raises:
        InputError: a name is unknown (the message offers similar ones), an index is out of range, or a class is given
            twice.
    """
    if classes is None:
        return list(range(len(class_names)))
    if not classes:
        raise InputError("--classes names no class")
    try:
        chosen = find_classes(classes, class_names)
    except ValueError as error:
        raise InputError(f"--classes: {error}") from None
    if twice := [label for label, count in Counter(chosen).items() if count > 1]:
        raise InputError(f"--classes: {class_names[twice[0]]!r} is given twice")
    return chosen


def _hold_out(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Hold out 10 % of each class, and at least one image if it has two: those whose names have the smallest hashes.

    The choice depends on names alone, so it is the same on every machine. A new image moves at most one other image.
    """
    by_class: dict[int, list[Record]] = {}
    for record in records:
        by_class.setdefault(record.label, []).append(record)
    held_out = set()
    for members in by_class.values():
        members.sort(key=lambda record: hashlib.sha256(record.name.encode("utf-8", "surrogatepass")).digest())
        count = max(1, round(len(members) / 10)) if len(members) >= 2 else 0
        held_out.update(record.name for record in members[:count])
    return (
        [record for record in records if record.name not in held_out],
        [record for record in records if record.name in held_out],
    )


@dataclass(frozen=True)
class Selection:
    """The selected classes of a listing, relabeled 0..k-1, with their training and their held-out records."""

    class_names: list[str]
    train_records: list[Record]
    val_records: list[Record]
    val_splits: tuple[str, ...]


def _select(listing: Listing, classes: Sequence[int | str] | None) -> Selection:
    """Select the classes. If the source has no held-out split, hold out part of the training images.

    Raises:
        InputError: a class is unknown or has no training image, or no image can be held out.
    """
    chosen = select_classes(listing.class_names, classes)
    class_names = [listing.class_names[label] for label in chosen]
    new_label = {label: new for new, label in enumerate(chosen)}

    def records_of(splits: tuple[str, ...]) -> list[Record]:
        records = [record for split in splits for record in listing.records[split] if record.label in new_label]
        return [replace(record, label=new_label[record.label]) for record in records]

    val_splits = listing.val_splits
    train_records, val_records = records_of(listing.train_splits), records_of(val_splits)
    if not val_splits:
        train_records, val_records = _hold_out(train_records)
        val_splits = (HELD_OUT,)
    if missing := set(range(len(class_names))) - {record.label for record in train_records}:
        others = f" (and {len(missing) - 1:,} other classes have none)" if len(missing) > 1 else ""
        raise InputError(
            f"class {class_names[min(missing)]!r} has no training image in {listing.location}{others}: add some, or "
            "leave it out with --classes"
        )
    if not val_records:
        raise InputError(f"{listing.location} has no image to hold out: add some, or choose other --val_splits")
    return Selection(class_names, train_records, val_records, val_splits)


# ---------------------------------------------------------------------------------------------------------------------
# The flags that describe the data.


def public_dataset(name: object) -> str:
    """The public name of a data set. A folder on this machine becomes "imagefolder"."""
    return str(name) if name in DATASET_TITLES or hub_id(name) else "imagefolder"


@dataclass(frozen=True)
class DataOptions:
    """The flags that describe the images, of a training run or of a command that reads a finished run.

    Attributes:
        dataset: "flowers102", "synthetic", "imagefolder", or what `datasets.load_dataset` takes: a Hub id or a folder.
        data_dir: the folder that holds `flowers-102/` (default `data`), or the class folders.
        max_image_pixels: images with more pixels, width x height, count as unreadable.
        train_splits: default "train"; for flowers102 "train" and "test" (7,169 images).
        val_splits: default the first of "val", "validation", "valid", "dev", "test" that exists and is not trained on.
            If there is none, and for "none", 10 % of each class are held out.
        classes: a subset by index or name, relabeled 0..k-1 in the order given.
        images_per_class: training images of each class, for synthetic only. A tenth of it, at least 8, is held out.
        resolution: side of the images in pixels, at least 8. `None` means the model decides (`at_resolution`).
    """

    dataset: str = "flowers102"
    data_dir: str | Path | None = None
    image_column: str = "image"
    label_column: str = "label"
    skip_bad_images: bool = False
    max_image_pixels: int = MAX_IMAGE_PIXELS
    train_splits: Sequence[str] | None = None
    val_splits: Sequence[str] | None = None
    classes: Sequence[int | str] | None = None
    images_per_class: int = 100
    resolution: int | None = None

    @classmethod
    def add_flags(cls, parser: FlagParser, resolution: int) -> None:
        """Declare the flags of a training run, with their defaults."""
        cls._declare_flags(parser)
        parser.set_defaults(**vars(cls(resolution=resolution)))

    @classmethod
    def add_flags_of_run(cls, parser: FlagParser, more: str = "") -> None:
        """Declare the same flags for a command that reads a finished run. A flag that is not given is the run's.

        `more` adds to the help of `--dataset` what else this command accepts there.
        """
        cls._declare_flags(parser, f"{more}; unset: the run's, as for every flag of the data")

    @staticmethod
    def _declare_flags(parser: FlagParser, more: str = "") -> None:
        """Declare the flags without defaults. `more` is added to the help of `--dataset`."""
        flag, switch = parser.flag, argparse.BooleanOptionalAction
        flag("--dataset", type=path_or_hub_id, may_change=True, public=public_dataset, is_read=True,
             help=f"flowers102, synthetic, imagefolder, or a Hub data set id{more}")  # fmt: skip
        flag("--data_dir", type=path_text, may_change=True, is_read=True,
             help="the folder that holds flowers-102/, or the class folders")  # fmt: skip
        flag("--image_column", public=as_it_is, help="column of a Hub data set that holds the images")
        flag("--label_column", public=as_it_is, marks_run=True, help="column of a Hub data set that holds the labels")
        flag("--skip_bad_images", action=switch, may_change=True, public=as_it_is, marks_run=True,
             help="leave out unreadable images instead of stopping")  # fmt: skip
        flag("--max_image_pixels", type=int, bounds=POSITIVE, may_change=True, public=as_it_is,
             help="images with more pixels, width x height, count as unreadable")  # fmt: skip
        flag("--train_splits", nargs="+", public=as_it_is, help="splits to train on")
        flag("--val_splits", nargs="+", may_change=True, public=as_it_is,
             help="splits to hold out; none: 10 %% of the training images")  # fmt: skip
        flag("--classes", nargs="+", public=as_it_is,
             help="names or 0-based indices of the classes to use; relabeled 0..k-1 in this order")  # fmt: skip
        flag("--images_per_class", type=int, bounds=POSITIVE, public=as_it_is, marks_run=True,
             help="training images of each synthetic class")  # fmt: skip
        flag("--resolution", type=int, bounds=POSITIVE, public=as_it_is, help="side of the images in pixels")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "DataOptions":
        """The options from the flags of a training run (`add_flags`)."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    @classmethod
    def from_run(cls, saved: Mapping, given: argparse.Namespace, unnamed: str | None = None) -> "DataOptions":
        """The options from the flags of a command (`add_flags_of_run`), else from the run, else the defaults.

        If `--dataset` is given and is not the run's, all options of the run are ignored.

        Args:
            saved: the run's flags, from `runs.read_flags`.
            unnamed: the data set to take if neither names one; `None` for the default.
        """
        if given.dataset not in (None, saved.get("dataset")):
            saved = {}
        options = {} if unnamed is None else {"dataset": unnamed}
        for field in fields(cls):
            flag, of_run = getattr(given, field.name), saved.get(field.name)
            if flag is not None or of_run is not None:
                options[field.name] = of_run if flag is None else flag
        return cls(**options)

    @property
    def folder(self) -> str | Path | None:
        """The folder of `--data_dir`. If it is unset, flowers102 has a default; others have none."""
        return self.data_dir or (DEFAULT_DATA_DIR if self.dataset == "flowers102" else None)

    def at_resolution(self, size: int, model: str) -> "DataOptions":
        """The same options at the resolution of a model's images.

        Raises:
            InputError: `--resolution`, given or the run's, is another.
        """
        if self.resolution not in (None, size):
            raise InputError(f"--resolution {self.resolution}: {model} draws {size} pixels")
        return replace(self, resolution=size)

    def load(
        self,
        *,
        seed: int = 0,
        download: bool = True,
        max_memory_gib: float = 8.0,
        show_progress: bool | None = None,
    ) -> tuple[ImageDataset, ImageDataset]:
        """Load the training images and the held-out images, decoded and relabeled.

        Args:
            seed: for crops, flips and noise. It changes neither the synthetic images nor the splits.
            download: fetch flowers102 if it isn't there. With several processes, let the first one do it alone.
            max_memory_gib: if a data set's pixels need more, images are decoded on every access instead of kept.
            show_progress: None shows it in the first process of each machine.

        Raises:
            InputError: anything that the user can correct, in one line.
        """
        if self.resolution is None or self.resolution < 8:
            raise InputError(f"--resolution must be at least 8, not {self.resolution}")
        if seed < 0:
            raise InputError(f"--seed must not be negative, but is {seed}")
        shown = os.environ.get("LOCAL_RANK", "0") == "0" if show_progress is None else show_progress
        listing = self._list(download, shown)
        selection = _select(listing, self.classes)
        build = partial(
            ImageDataset,
            class_names=selection.class_names,
            resolution=self.resolution,
            name=self.dataset,
            location=listing.location,
            seed=seed,
            skip_bad_images=self.skip_bad_images,
            max_memory_gib=max_memory_gib,
            show_progress=shown,
        )
        train = build(selection.train_records, splits=listing.train_splits)
        val = build(selection.val_records, splits=selection.val_splits)
        if missing := set(range(train.num_classes)) - set(train.labels.tolist()):
            raise InputError(f"class {train.class_names[min(missing)]!r} of {listing.location} has no readable image")
        if len(val) == 0:
            raise InputError(f"{listing.location} has no readable image in split {'+'.join(val.splits)}")
        return train, val

    def _list(self, download: bool, show_progress: bool) -> Listing:
        """List the classes and images of the data set, for the splits that are used."""
        splits = self.train_splits, self.val_splits
        open_file = partial(open_image, max_pixels=self.max_image_pixels)
        folder = None if self.folder is None else Path(os.path.expanduser(self.folder))
        if self.dataset == "flowers102":
            return _list_flowers102(folder, *splits, download, open_file)
        if self.dataset == "synthetic":
            return _list_synthetic(*splits, self.images_per_class, self.resolution)
        if self.dataset == "imagefolder":
            if folder is None:
                raise InputError("--dataset imagefolder needs --data_dir, the folder that holds the class folders")
            return _list_imagefolder(folder, *splits, open_file, show_progress)
        return _list_hub(self.dataset, *splits, self.image_column, self.label_column, open_file)

    def load_for(self, pipe: FlowerLDMPipeline, name: str) -> tuple[ImageDataset, ImageDataset]:
        """Load training and held-out images in a pipeline's size, and check that its classes are theirs.

        Args:
            name: the value of `--pipeline`, for messages.

        Raises:
            InputError: the size or the classes differ from the pipeline's; also as in `load`.
        """
        height, width = pipe.image_size
        if height != width:
            raise InputError(
                f"--pipeline {name} draws {width} x {height} pixels: only a pipeline of square images can be used here"
            )
        train, held_out = self.at_resolution(width, f"--pipeline {name}").load()
        advice = "give the --dataset and --classes that it was trained on"
        if train.num_classes != pipe.num_classes:
            raise InputError(
                f"--pipeline {name} has {pipe.num_classes} classes, {self.dataset} has {train.num_classes}: {advice}"
            )
        if pipe.config.id2label is not None:
            for label, (of_pipe, of_data) in enumerate(zip(pipe.class_names, train.class_names, strict=True)):
                if plain_name(of_pipe) != plain_name(of_data):
                    raise InputError(
                        f"class {label} is {of_pipe!r} in --pipeline {name}, but {of_data!r} in {self.dataset}: "
                        f"{advice}"
                    )
        return train, held_out
