"""Runs on disk: the state of an interrupted one, as one safetensors file, and the config of any."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.checkpoint.manifest import read_manifest
from tunedlens.config import TrainConfig
from tunedlens.errors import InputError
from tunedlens.files import JsonObject, newest_folder, now, write

STATE = Path("state") / "state.safetensors"


class State(NamedTuple):
    """The state of an interrupted run."""

    tensors: dict[str, Float[Tensor, "..."]]
    metadata: JsonObject
    """JSON-able: the config, the model, the progress."""


def save_state(folder: Path, state: State) -> None:
    """Write what a run needs to be resumed, as one file.

    Raises:
        InputError: the folder cannot be written.
    """
    metadata = {"about": json.dumps(state.metadata | {"created": now()})}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.tensors.items()}
    write(folder / STATE, safetensors.torch.save(tensors, metadata))


def load_state(folder: Path, *, with_tensors: bool = True) -> State:
    """Read what `save_state` wrote, or only its metadata.

    Raises:
        InputError: there is no interrupted run, or its state is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        raise InputError(f"{folder} holds no interrupted run: expected {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys() if with_tensors else ()
            tensors = {name: file.get_tensor(name) for name in names}
            return State(tensors, json.loads(file.metadata()["about"]))
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def saved_config(folder: Path) -> TrainConfig:
    """The config of the interrupted or finished run in a folder.

    Raises:
        InputError: there is no run, or its files are damaged.
    """
    if (folder / STATE).is_file():
        metadata = load_state(folder, with_tensors=False).metadata
    else:
        metadata = read_manifest(folder)
    if "config" not in metadata:
        raise InputError(f"the lens in {folder} was not saved by a training run")
    return TrainConfig.from_json(metadata["config"], f"the config saved in {folder}")


def newest_state(root: Path) -> Path:
    """The folder under `root` with the run that was saved last.

    Raises:
        InputError: there is none.
    """
    folders = [path.parent.parent for path in root.glob(f"*/{STATE}")]
    found = newest_folder(
        folders, lambda folder: load_state(folder, with_tensors=False).metadata["created"]
    )
    if found is None:
        raise InputError(f"there is no interrupted run under {root}; give --resume its folder")
    return found


def remove_state(folder: Path) -> None:
    """Remove the state of a run that has finished."""
    shutil.rmtree((folder / STATE).parent, ignore_errors=True)
