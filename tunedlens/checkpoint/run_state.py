"""Reads and writes the states of interrupted runs, and reads the config of any run."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.checkpoint.manifest import read_manifest
from tunedlens.config import TrainConfig
from tunedlens.errors import InputError
from tunedlens.files import (
    JsonObject,
    as_type,
    newest_folder,
    now,
    parse_json,
    read_tensor_header,
    read_tensors,
    write,
)

_FOLDER, _SUFFIX = "state", ".safetensors"
_KEPT_STATES = 2
"""The newest state, and the one before it in case the newest is damaged."""
_DTYPES = (torch.float32, torch.float64)


class State(NamedTuple):
    """The state of an interrupted run."""

    tensors: dict[str, Float[Tensor, "..."]]
    metadata: JsonObject
    """The config, the model and the progress. It can be written as JSON."""


def has_state(folder: Path) -> bool:
    """Whether a folder holds an interrupted run."""
    return bool(_newest_first(folder))


def save_state(folder: Path, state: State) -> None:
    """Write what a run needs to be resumed, as one file with a checksum.

    The previous state is kept too.

    Raises:
        InputError: a value is not finite, or the folder cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.tensors.items()}
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise InputError(f"the state of {folder} is not finite ({bad[0]}), so it is not written")
    about = json.dumps(state.metadata | {"created": now()}, allow_nan=False)
    header = {"about": about, "sha256": _digest(about, tensors)}
    older = _newest_first(folder)
    number = int(older[0].stem) + 1 if older else 1
    write(folder / _FOLDER / f"{number}{_SUFFIX}", safetensors.torch.save(tensors, header))
    for path in older[_KEPT_STATES - 1 :]:
        with suppress(OSError):
            path.unlink()


def load_state(folder: Path, *, with_tensors: bool = True) -> State:
    """Read the newest state that is whole, or only its metadata.

    Raises:
        InputError: there is no interrupted run, or all its states are damaged.
    """
    paths = _newest_first(folder)
    if not paths:
        raise InputError(f"{folder} holds no interrupted run: expected {folder / _FOLDER}")
    problems = []
    for path in paths:
        try:
            state = _read(path, with_tensors)
        except (ValueError, KeyError) as error:
            problem = str(error)  # if the file cannot be read, it already names the file
            problems.append(problem if str(path) in problem else f"{path} is damaged: {problem}")
            continue
        if problems:
            warnings.warn(f"{problems[0]}; using the earlier state {path}", stacklevel=2)
        return state
    raise InputError("; ".join(problems))


def _newest_first(folder: Path) -> list[Path]:
    paths = [path for path in (folder / _FOLDER).glob(f"*{_SUFFIX}") if path.stem.isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem), reverse=True)


def _read(path: Path, with_tensors: bool) -> State:
    tensors: dict[str, Tensor] = {}
    if with_tensors:
        tensors, header, _ = read_tensors(path, dtypes=_DTYPES)
    else:
        header = read_tensor_header(path).metadata
    if with_tensors and header["sha256"] != _digest(header["about"], tensors):
        raise ValueError("its checksum does not match its content")
    return State(tensors, as_type(JsonObject, parse_json(header["about"], "it"), "it"))


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that is read from a state."""
    digest = hashlib.sha256(about.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def saved_config(folder: Path) -> TrainConfig:
    """The config of the interrupted or finished run in a folder.

    Raises:
        InputError: there is no run, or its files are damaged.
    """
    if has_state(folder):
        metadata = load_state(folder, with_tensors=False).metadata
    else:
        metadata = read_manifest(folder)
    if "config" not in metadata:
        raise InputError(
            f"the lens in {folder} was not saved by a training run, so its config is not known"
        )
    return TrainConfig.from_json(metadata["config"], f"the config saved in {folder}")


def newest_state(root: Path) -> Path:
    """The folder under `root` with the most recently saved run.

    Raises:
        InputError: there is none.
    """
    folders = [path.parent for path in root.glob(f"*/{_FOLDER}") if has_state(path.parent)]
    found = newest_folder(
        folders, lambda folder: load_state(folder, with_tensors=False).metadata["created"]
    )
    if found is None:
        raise InputError(f"there is no interrupted run under {root}; give --resume its folder")
    return found


def remove_state(folder: Path) -> None:
    """Remove the states of a run that has finished."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)
