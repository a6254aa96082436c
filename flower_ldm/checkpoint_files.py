"""The files of a checkpoint: states that can't run code, and the manifest that makes the checkpoint valid.

A state is one safetensors file. It holds the tensors, and everything else as JSON in its header. Nothing is ever
unpickled, whoever wrote the folder. The manifest lists the files and is written last. It proves that the checkpoint is
complete, not who wrote it.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .files import is_regular, sync
from .optimizers import state_layout

MANIFEST = "manifest.json"
VERSION = 1


# --- states ----------------------------------------------------------------------------------------------------------


def save_state(state: object, path: Path) -> None:
    """Write nested dictionaries, lists, tuples, tensors and plain values.

    Raises:
        TypeError: the state holds anything else.
    """
    tensors = {}
    tree = take_apart(state, tensors)
    save_file(tensors, path, metadata={"state": json.dumps(tree)})


def load_state(path: Path) -> object:
    """What `save_state` has written, on the CPU, in memory of its own.

    Raises:
        Exception: of many types where the file is damaged or holds something else. No code in it can run.
    """
    if not is_regular(path):
        raise FileNotFoundError(f"{path.name} is missing")
    with safe_open(path, framework="pt") as file:
        tree = (file.metadata() or {}).get("state")
        if tree is None:
            raise ValueError(f"{path.name} is no state of a run")
        return put_together(json.loads(tree), file, set(file.keys()))


def checked_state(saved: object, owner: object, name: str) -> object:
    """The part of a saved state that its owner can load. Types and shapes must be those of the owner's own state.

    Not every owner checks that. torch's fused AdamW writes beyond the end of a moment that is too short. An EMA and a
    schedule accept anything, and break at the next update.

    Args:
        owner: a module, an optimizer or anything else with a `state_dict`.

    Raises:
        Exception: of many types where the state doesn't fit, or holds numbers that are not finite.
    """
    own = owner.state_dict()
    if not isinstance(owner, torch.optim.Optimizer):
        return checked(saved, own, name)
    # The options are this run's. A parameter that had no gradient has no entry.
    moments = {index: entry for index, entry in enumerate(state_layout(owner)) if index in saved["state"]}
    return own | {"state": checked(saved["state"], moments, name)}


def checked(saved: object, own: object, name: str) -> object:
    """The entries of a saved state that an owner's own state has too, each checked against it.

    Plain values may be in only one of the two, since versions of torch differ in what a schedule keeps.

    Raises:
        ValueError: an entry has another type, shape or dtype, or is not finite.
    """
    if isinstance(own, torch.Tensor):
        fits = isinstance(saved, torch.Tensor) and (saved.shape, saved.dtype) == (own.shape, own.dtype)
        fits = fits and bool(saved.isfinite().all())
    elif isinstance(own, dict):
        fits = isinstance(saved, dict) and all(is_plain((own | saved)[key]) for key in own.keys() ^ saved.keys())
    elif isinstance(own, (list, tuple)):
        fits = type(saved) is type(own) and len(saved) == len(own)
    else:
        fits = type(saved) is type(own) and saved == saved and not (isinstance(saved, int) and abs(saved) >= 2**63)
    if not fits:
        raise ValueError(f"its {name} is not what this run could have written")
    if isinstance(own, dict):
        return {key: checked(saved.get(key, value), value, f"{name}/{key}") for key, value in own.items()}
    if isinstance(own, (list, tuple)):
        return type(own)(checked(*pair, f"{name}/{i}") for i, pair in enumerate(zip(saved, own, strict=True)))
    return saved


def is_plain(state: object) -> bool:
    """Whether JSON holds this value as it is."""
    return state is None or isinstance(state, (bool, int, float, str))


def take_apart(state: object, tensors: dict[str, torch.Tensor], name: str = "") -> object:
    """A state as a tree that JSON can hold. Its tensors go to `tensors`, by their path in the state."""
    if isinstance(state, torch.Tensor):
        if name in tensors:
            raise TypeError(f"two tensors of a state are called {name}")
        tensors[name] = state.detach().contiguous()
        return {"tensor": name, "stride": state.stride()}  # fused optimizers need the stride of the parameter
    if isinstance(state, dict):
        items = [[key, take_apart(value, tensors, f"{name}/{key}".lstrip("/"))] for key, value in state.items()]
        return {"dict": items}
    if isinstance(state, (list, tuple)):
        values = [take_apart(value, tensors, f"{name}/{i}".lstrip("/")) for i, value in enumerate(state)]
        return values if isinstance(state, list) else {"tuple": values}
    if is_plain(state):
        return state
    raise TypeError(f"a checkpoint can't keep {name}, a {type(state).__name__}")


def put_together(tree: object, file: safe_open, unread: set[str]) -> object:
    """The inverse of `take_apart`, with the tensors of a file.

    Args:
        unread: names of the tensors still to read. Each is read once, so that a small file can't fill the memory.
    """
    if isinstance(tree, list):
        return [put_together(value, file, unread) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "tuple" in tree:
        return tuple(put_together(value, file, unread) for value in tree["tuple"])
    if "dict" in tree:
        return {key: put_together(value, file, unread) for key, value in tree["dict"]}
    unread.remove(tree["tensor"])
    tensor, stride = file.get_tensor(tree["tensor"]), tree["stride"]
    if tensor.numel() and 1 + sum((n - 1) * s for n, s in zip(tensor.shape, stride, strict=True)) != tensor.numel():
        raise ValueError(f"{tree['tensor']} has strides that don't fit its size: {stride}")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


# --- the manifest ----------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, step: int) -> None:
    """Make a folder a valid checkpoint: flush its files to the disk, then list them with their sizes and hashes."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"version": VERSION, "step": step, "files": files}, indent=1) + "\n")
    sync(manifest)
    sync(folder)


def why_invalid(folder: Path, step: int | None = None, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, as half a sentence; `None` where it is complete and unchanged.

    Args:
        step: the step that it must hold, where its name says one.
        hashes: `False` compares only the sizes of the files, without reading them.
    """
    if not is_regular(folder / MANIFEST):
        if (folder / "random_states_0.pkl").exists():
            return "an earlier version made it, with files that can run code when they are read"
        return f"it has no {MANIFEST}, which is written last"
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["version"] != VERSION:
            return f"its {MANIFEST} has version {manifest['version']!r:.20}, not {VERSION}"
        if step is not None and manifest["step"] != step:
            return f"it holds step {manifest['step']!r:.20}"
        for name, written in manifest["files"].items():
            path = folder / name
            if path.parent != folder or not is_regular(path):
                return f"its {name!r:.80} is missing"
            if path.stat().st_size != written["size"] or (hashes and sha256(path) != written["sha256"]):
                return f"its {name!r:.80} has changed since it was written"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST} can't be read"
    return None


def sha256(path: Path) -> str:
    """The hash of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
