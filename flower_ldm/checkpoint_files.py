"""What a checkpoint's folder holds: states that can't run anything, and the manifest that makes it valid.

A state is one safetensors file: its tensors, and in the header, as JSON, all else. Nothing is ever unpickled, whoever
wrote the folder. The manifest says what was written, and is written last; it proves no more than that all is there.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .files import is_regular, sync

MANIFEST = "manifest.json"
VERSION = 1


# --- states ----------------------------------------------------------------------------------------------------------


def save_state(state: object, path: Path) -> None:
    """Write a nest of dictionaries, lists, tuples, tensors and plain values.

    Raises:
        TypeError: for anything else in it.
    """
    tensors = {}
    plain = take_apart(state, tensors)
    save_file(tensors, path, metadata={"state": json.dumps(plain)})


def load_state(path: Path) -> object:
    """What `save_state` has written, on the CPU, in memory of its own.

    Raises:
        Exception: of many kinds where the file is damaged or holds something else; nothing in it can run.
    """
    if not is_regular(path):
        raise FileNotFoundError(f"{path.name} is missing")
    with safe_open(path, framework="pt") as file:
        plain = (file.metadata() or {}).get("state")
        if plain is None:
            raise ValueError(f"{path.name} is no state of a run")
        return put_together(json.loads(plain), file, set(file.keys()))


def fitting(saved: object, part: object, name: str) -> object:
    """What a part can load of a saved state: it must be of the same kinds and shapes as the part's own.

    Not every part looks. torch's fused AdamW writes beyond the end of a moment that is too short, and an EMA or a
    schedule takes whatever it is given until it breaks at the next update.

    Raises:
        Exception: of many kinds where it doesn't fit, or holds what is not finite.
    """
    own = part.state_dict()
    if not isinstance(part, torch.optim.Optimizer):
        return fit(saved, own, name)
    # The options are this run's. What AdamW keeps of a parameter begins with its first gradient.
    parameters = [parameter for group in part.param_groups for parameter in group["params"]]
    moments = {
        index: {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        for index, parameter in enumerate(parameters)
        if index in saved["state"]
    }
    return own | {"state": fit(saved["state"], moments, name)}


def fit(saved: object, own: object, name: str) -> object:
    """The entries of a saved state that are in a part's own, each checked against it.

    A plain one may be in one of them only, since versions of torch differ in what a schedule keeps.
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
        return {key: fit(saved.get(key, part), part, f"{name}/{key}") for key, part in own.items()}
    if isinstance(own, (list, tuple)):
        return type(own)(fit(*both, f"{name}/{i}") for i, both in enumerate(zip(saved, own, strict=True)))
    return saved


def is_plain(state: object) -> bool:
    return state is None or isinstance(state, (bool, int, float, str))


def take_apart(state: object, tensors: dict[str, torch.Tensor], name: str = "") -> object:
    """What JSON can hold of a state; its tensors go to `tensors`, by their path."""
    if isinstance(state, torch.Tensor):
        if name in tensors:
            raise TypeError(f"two tensors of a state are called {name}")
        tensors[name] = state.detach().contiguous()
        return {"tensor": name, "stride": state.stride()}  # fused optimizers want it to be the parameter's
    if isinstance(state, dict):
        return {"dict": [[key, take_apart(part, tensors, f"{name}/{key}".lstrip("/"))] for key, part in state.items()]}
    if isinstance(state, (list, tuple)):
        parts = [take_apart(part, tensors, f"{name}/{i}".lstrip("/")) for i, part in enumerate(state)]
        return parts if isinstance(state, list) else {"tuple": parts}
    if is_plain(state):
        return state
    raise TypeError(f"a checkpoint can't keep {name}, a {type(state).__name__}")


def put_together(plain: object, file: safe_open, unread: set[str]) -> object:
    """A state from what `take_apart` gave, with the tensors of a file.

    Args:
        unread: the names of those that are to come; each comes once, so that a small file can't fill the memory.
    """
    if isinstance(plain, list):
        return [put_together(part, file, unread) for part in plain]
    if not isinstance(plain, dict):
        return plain
    if "tuple" in plain:
        return tuple(put_together(part, file, unread) for part in plain["tuple"])
    if "dict" in plain:
        return {key: put_together(part, file, unread) for key, part in plain["dict"]}
    unread.remove(plain["tensor"])
    tensor, stride = file.get_tensor(plain["tensor"]), plain["stride"]
    if tensor.numel() and 1 + sum((n - 1) * s for n, s in zip(tensor.shape, stride, strict=True)) != tensor.numel():
        raise ValueError(f"{plain['tensor']} can't lie in memory by strides of {stride}")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


# --- the manifest ----------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, step: int) -> None:
    """Make a folder's files a valid checkpoint: all of them on the disk, then a list of them with size and hash."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"version": VERSION, "step": step, "files": files}, indent=1) + "\n")
    sync(manifest)
    sync(folder)


def why_invalid(folder: Path, step: int | None = None, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, as half a sentence; `None` where all of it is there as it was written.

    Args:
        step: the one that it must be of, where its name says so.
        hashes: `False` compares sizes only, which costs no reading.
    """
    if not is_regular(folder / MANIFEST):
        if (folder / "random_states_0.pkl").exists():
            return "an earlier version made it, of files that can run code when they are read"
        return f"it has no {MANIFEST}, which is written last"
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["version"] != VERSION:
            return f"its {MANIFEST} is of version {manifest['version']!r:.20}, not {VERSION}"
        if step is not None and manifest["step"] != step:
            return f"it holds step {manifest['step']!r:.20}"
        for name, written in manifest["files"].items():
            path = folder / name
            if path.parent != folder or not is_regular(path):
                return f"its {name!r:.80} is missing"
            if path.stat().st_size != written["size"] or (hashes and sha256(path) != written["sha256"]):
                return f"its {name!r:.80} is not as it was written"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST} can't be read"
    return None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
