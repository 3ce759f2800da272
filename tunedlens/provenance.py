"""Records of what produced a result: versions, commit, device, model, command."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import torch

from tunedlens.files import now
from tunedlens.model import FrozenModel

DISTRIBUTION = "residual-lens"
"""The name of this package on the package index."""

_VERSIONED = ("torch", "transformers", "tokenizers", "accelerate")


class Provenance(TypedDict, total=False):
    """What produced a result, as `config.json` and `metrics.json` record it."""

    created: str
    command: str
    model: str
    revision: str | None
    fingerprint: str
    """Of the model's final norm and unembedding."""
    dtype: str
    device: str
    threads: int
    versions: dict[str, str]
    commit: str | None
    """The commit of this package's checkout, with `-dirty` if files have changed."""


def describe_run(model: FrozenModel, command: Sequence[str] | None = None) -> Provenance:
    """Describe this process.

    Args:
        model: the model that was used.
        command: the command that was run; by default this process's own.
    """
    program = Path(sys.argv[0]).name
    command = command or [*(["python"] if program.endswith(".py") else []), program, *sys.argv[1:]]
    identity = model.identity
    versions = {name: _version(name) for name in _VERSIONED}
    versions["tunedlens"] = own_version()
    return {
        "created": now(),
        "command": shlex.join(command),
        "model": identity.name,
        "revision": identity.revision,
        "fingerprint": identity.fingerprint,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
    }


def own_version() -> str:
    """The version of this package."""
    return _version(DISTRIBUTION)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        return "not installed"


def _commit() -> str | None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
