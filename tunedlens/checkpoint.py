"""Lenses and interrupted runs on disk: safetensors and JSON, written then renamed."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.frozen import FrozenModel
from tunedlens.lens import AffineLens, JacobianLens, Lens, TunedLens

FORMAT = 1
ROOT = Path("checkpoints")
"""Where runs go that are not told otherwise."""
MANIFEST = "config.json"
WEIGHTS = "lens.safetensors"
STATE = Path("state") / "state.safetensors"
KINDS: dict[str, type[AffineLens]] = {"tuned": TunedLens, "jacobian": JacobianLens}
"""What a manifest calls each kind of lens."""


def write(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then rename it: whole or not at all.

    Its folder is made if need be.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise InputError(f"cannot write {path}: {error}") from error


def require_writable(folder: Path) -> None:
    """Find out before the work whether results can be written, leaving nothing behind.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    try:
        existing = folder.absolute()
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        probe = existing / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error}; choose another --output") from error


def write_json(path: Path, data: Any) -> None:
    """`write` for JSON; numbers keep all their digits."""
    write(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def now() -> str:
    """The time in UTC, so that names and manifests sort."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def save_lens(lens: AffineLens, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write a lens: first its translators, last the manifest that vouches for them.

    Args:
        lens: the lens.
        folder: made if need be; a lens that is there is replaced.
        about: what else the manifest is to say (config, corpus, results).

    Raises:
        InputError: the folder cannot be written.
    """
    tensors = {}
    for layer, translator in enumerate(lens.translators):
        for name, value in translator.state_dict().items():
            tensors[f"resid_pre.{layer}.{name}"] = value.cpu().contiguous()
    weights = safetensors.torch.save(tensors)
    write(folder / WEIGHTS, weights)
    manifest = {
        "format": FORMAT,
        "lens": kind_of(lens),
        "created": now(),
        "model": dataclasses.asdict(lens.identity),
        "lens_sha256": hashlib.sha256(weights).hexdigest(),
        **(about or {}),
    }
    write_json(folder / MANIFEST, manifest)


def read_json(path: Path, if_missing: str) -> Any:
    """What a JSON file says.

    Raises:
        InputError: it is not there (with the message given), or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(if_missing) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `config.json` of a saved lens says.

    Raises:
        InputError: there is no lens in the folder, or its manifest is damaged.
    """
    path = folder / MANIFEST
    manifest = read_json(
        path, f"{folder} holds no lens: expected {MANIFEST} and {WEIGHTS}, as train.py writes them"
    )
    if not isinstance(manifest, dict) or manifest.get("lens") not in KINDS:
        raise InputError(f"{path} is not the manifest of a lens ({' or '.join(KINDS)})")
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {manifest.get('format')}; this version reads format {FORMAT}"
        )
    missing = {"model", "created", "lens_sha256"} - manifest.keys()
    if missing or not isinstance(manifest["model"], dict):
        raise InputError(f"{path} is damaged: it says nothing of {', '.join(missing) or 'a model'}")
    return manifest


def kind_of(lens: AffineLens) -> str:
    """What a manifest calls its kind."""
    return next(name for name, kind in KINDS.items() if type(lens) is kind)


def load_lens(folder: str | Path, model: FrozenModel) -> AffineLens:
    """Read a lens of whatever kind that was saved for this model.

    Raises:
        InputError: there is no lens, it is damaged, or it belongs to another model.
    """
    return KINDS[read_manifest(Path(folder))["lens"]].load(folder, model)


def fill_lens(lens: AffineLens, folder: Path) -> None:
    """Fill a lens with saved translators.

    Raises:
        InputError: there is no lens, it is damaged or of another kind, holds what is not a
            number, or belongs to another model.
    """
    manifest = read_manifest(folder)
    if manifest["lens"] != kind_of(lens):
        raise InputError(f"{folder} holds a {manifest['lens']} lens, not a {kind_of(lens)} lens")
    require_same_model(
        manifest["model"], dataclasses.asdict(lens.identity), f"the lens in {folder}"
    )
    path = folder / WEIGHTS
    try:
        weights = path.read_bytes()
        tensors = safetensors.torch.load(weights)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged: {error}") from error
    if hashlib.sha256(weights).hexdigest() != manifest["lens_sha256"]:
        raise InputError(f"{path} is damaged: it is not the file that {MANIFEST} describes")
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise InputError(f"{path} holds values that are no number ({name}); train it again")
    lens.translators.load_state_dict(
        {name.removeprefix("resid_pre."): value for name, value in tensors.items()}
    )


def require_same_model(saved: dict[str, Any], model: dict[str, Any], what: str) -> None:
    """Compare two identities, as `dataclasses.asdict` gives them.

    Raises:
        InputError: a lens made for the one does not fit the other; says what differs.
    """
    differences = [
        f"{name} {saved.get(name)}, not {model[name]}"
        for name in ("n_layers", "d_model", "vocab_size")
        if saved.get(name) != model[name]
    ]
    if not differences and saved.get("fingerprint") != model["fingerprint"]:
        differences = ["a final norm or an unembedding with other values"]
    if differences:
        raise InputError(
            f"{what} was made for {saved.get('name')} and does not fit "
            f"{model['name']}: it has {'; '.join(differences)}"
        )


def require_made_for(model: FrozenModel, lenses: Mapping[str, Lens]) -> None:
    """Make sure that every lens, by its name, fits the model.

    Raises:
        InputError: one was made for another; says what differs.
    """
    identity = dataclasses.asdict(model.identity)
    for name, lens in lenses.items():
        require_same_model(dataclasses.asdict(lens.identity), identity, f"the lens {name}")


def newest_lens(root: Path) -> Path:
    """The folder under `root` whose manifest has the latest time.

    Raises:
        InputError: there is none.
    """
    folders = [path.parent for path in root.glob(f"*/{MANIFEST}")]
    found = _newest(folders, lambda folder: read_manifest(folder)["created"])
    if found is None:
        raise InputError(f"there is no lens under {root}; train one (train.py) or give --lens")
    return found


def _newest(folders: list[Path], created: Callable[[Path], str]) -> Path | None:
    """What is damaged, or not ours, is passed over; asked for by name, it says so."""
    found = []
    for folder in folders:
        with suppress(InputError, KeyError):
            found.append((created(folder), folder))
    return max(found)[1] if found else None


class State(NamedTuple):
    """Where an interrupted run stands."""

    tensors: dict[str, Float[Tensor, "..."]]
    about: dict[str, Any]


def save_state(folder: Path, state: State) -> None:
    """Write what a run needs to go on, as one file.

    Raises:
        InputError: the folder cannot be written.
    """
    metadata = {"about": json.dumps(state.about | {"created": now()})}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.tensors.items()}
    write(folder / STATE, safetensors.torch.save(tensors, metadata))


def load_state(folder: Path) -> State:
    """Read what `save_state` wrote.

    Raises:
        InputError: there is no interrupted run, or its state is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        raise InputError(f"{folder} holds no interrupted run: expected {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            return State({name: file.get_tensor(name) for name in file.keys()}, about)  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def newest_state(root: Path) -> Path:
    """The folder under `root` with the run that was interrupted last.

    Raises:
        InputError: there is none.
    """
    folders = [path.parent.parent for path in root.glob(f"*/{STATE}")]
    found = _newest(folders, lambda folder: load_state(folder).about["created"])
    if found is None:
        raise InputError(f"there is no interrupted run under {root}; give --resume its folder")
    return found


def remove_state(folder: Path) -> None:
    """Forget how to resume: the run ended well."""
    shutil.rmtree((folder / STATE).parent, ignore_errors=True)
