"""Where figures come from."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tunedlens.files import now
from tunedlens.model import FrozenModel

_VERSIONED = ("tunedlens", "torch", "transformers", "tokenizers", "accelerate")


def provenance(model: FrozenModel, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Where figures come from: versions, commit, device, dtype, model, time, command.

    Args:
        model: what was looked into.
        command: that was run; by default this process's own.
    """
    command = command or ["python", Path(sys.argv[0]).name, *sys.argv[1:]]
    identity = model.identity
    return {
        "created": now(),
        "command": shlex.join(command),
        "model": identity.name,
        "revision": identity.revision,
        "fingerprint": identity.fingerprint,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in _VERSIONED},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, if it is one; `-dirty` if changed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
