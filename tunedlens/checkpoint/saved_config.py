"""The config of a saved run, from its state or from the manifest of its lens."""

from pathlib import Path

from tunedlens.checkpoint.lens_files import read_manifest
from tunedlens.checkpoint.run_state import STATE, load_metadata
from tunedlens.config import TrainConfig
from tunedlens.errors import InputError


def saved_config(folder: Path) -> TrainConfig:
    """The config of the interrupted or finished run in a folder.

    Raises:
        InputError: there is no run, or its files are damaged.
    """
    interrupted = (folder / STATE).is_file()
    manifest = load_metadata(folder) if interrupted else read_manifest(folder)
    if "config" not in manifest:
        raise InputError(f"the lens in {folder} was not saved by a training run")
    try:
        return TrainConfig.from_json(manifest["config"])
    except (KeyError, TypeError) as error:
        raise InputError(f"the config saved in {folder} is damaged: {error}") from error
