"""Stores states on disk, so that several runs on one text share the model's forward pass."""

import dataclasses
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.files import JsonObject, read_json, write, write_json
from tunedlens.model import FrozenModel, require_same_model
from tunedlens.progress import say
from tunedlens.training.plan import TrainPlan
from tunedlens.training.states import StateReader

_MANIFEST = "states.json"
_GB = 10**9
_CHECKED_TOKENS = 16


class CacheSettings(NamedTuple):
    """The folder for stored states, and its size limit."""

    folder: str | Path
    max_gb: float = 50.0
    """The largest size of the folder, in gigabytes of 10^9 bytes."""


class CachedStateReader(StateReader):
    """Reads states that an earlier run has written, and writes those that it has to compute.

    There is one safetensors file per block, named by the hash of the block's tokens. It holds the
    states at every position, as the model computes them, and a checksum of each. A damaged file
    counts as missing and is written again. A manifest records what else the states depend on (the
    model, its dtype, the precision, the device), which is the same for all files. Runs with another
    fit, seed or batch size can therefore use the same files.

    If one block of a micro-batch is missing, the model runs on the whole micro-batch. A run that
    reads every block once, in the order of the run that wrote them, therefore gets exactly the
    states that the model computes.

    Raises:
        InputError: the folder cannot be written or holds states of another model, or the fit
            differentiates the model.
    """

    def __init__(
        self, model: FrozenModel, plan: TrainPlan, accelerator: Accelerator, settings: CacheSettings
    ) -> None:
        super().__init__(model, plan, accelerator)
        if plan.fit == "jacobian":
            raise InputError(
                "--fit jacobian differentiates the model and cannot use stored states; leave out "
                "--cache-states"
            )
        if model.is_sharded:
            raise InputError(
                "--cache-states does not work with --fsdp, where every process has to run the "
                "model equally often; leave one of them out"
            )
        if settings.max_gb <= 0:
            raise InputError(f"--cache-gb must be above 0, got {settings.max_gb:g}")
        self._max_gb, self._folder = settings.max_gb, Path(settings.folder)
        self._names = [f"{site}.{layer}" for site, layer in self.with_final]
        self._from_disk = self._from_model = 0
        self._require_same_states()
        used = sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))
        self._bytes_left = (settings.max_gb * _GB - used) / accelerator.num_processes

    def states_of(
        self, rows: Int[Tensor, "batch seq"]
    ) -> Sequence[Float[Tensor, "batch seq d_model"]]:
        found = [self._load(block) for block in rows]
        stored = [states for states in found if states is not None]
        if len(stored) == len(found):
            self._from_disk += len(rows)
            by_point = zip(*stored, strict=True)
            return [torch.stack(blocks).to(self.model.device) for blocks in by_point]
        self._from_model += len(rows)
        states = super().states_of(rows)
        for index, block in enumerate(rows):
            if found[index] is None:
                self._save(block, [state[index] for state in states])
        return states

    def summary(self) -> str:
        return (
            f"states    {self._from_disk:,} blocks read from {self._folder}, "
            f"{self._from_model:,} from the model"
        )

    def _path(self, block: Int[Tensor, " seq"]) -> Path:
        digest = hashlib.sha256(block.cpu().numpy().tobytes()).hexdigest()
        return self._folder / f"{digest}.safetensors"

    def _load(self, block: Int[Tensor, " seq"]) -> list[Float[Tensor, "seq d_model"]] | None:
        """The states of a block, or None if its file is missing or damaged."""
        try:
            with safetensors.safe_open(self._path(block), "pt") as file:
                states = [file.get_tensor(name) for name in self._names]
                checksums = file.metadata() or {}
        except (OSError, safetensors.SafetensorError):
            return None
        shape = (len(block), self.model.identity.d_model)
        is_whole = all(
            state.shape == shape and checksums.get(name) == _checksum(state)
            for name, state in zip(self._names, states, strict=True)
        )
        return states if is_whole else None

    def _save(self, block: Int[Tensor, " seq"], states: Sequence[Tensor]) -> None:
        size = sum(state.nbytes for state in states)
        if self._bytes_left <= 0 or not states[-1].isfinite().all():
            return
        if size > self._bytes_left:
            limit = f"has reached its limit of {self._max_gb:g} GB (--cache-gb)"
            return self._stop(f"the cache {self._folder} {limit}")
        values = {
            name: state.detach().cpu().clone()
            for name, state in zip(self._names, states, strict=True)
        }
        checksums = {name: _checksum(value) for name, value in values.items()}
        content = safetensors.torch.save(values, checksums)
        try:
            write(self._path(block), content)
        except InputError as error:
            return self._stop(str(error))
        self._bytes_left -= size

    def _stop(self, reason: str) -> None:
        self._bytes_left = 0
        if self.accelerator.is_main_process:
            say(f"{reason}; the states of other blocks are computed again in every run")

    def _require_same_states(self) -> None:
        """Compare the folder's manifest with this run, or write it if there is none."""
        ours, path = self._manifest(), self._folder / _MANIFEST
        if not path.exists():
            write_json(path, ours)
        saved = read_json(path, f"{path} is missing")
        elsewhere = "; choose another folder for --cache-states"
        try:
            require_same_model(saved["model"], ours["model"], f"the cache {self._folder}")
            missing = [name for name in self._names if name not in saved["states"]]
            differing = [name for name in ("dtype", "precision") if saved[name] != ours[name]]
            is_same = saved["check_sha256"] == ours["check_sha256"]
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged: {error!r}{elsewhere}") from error
        for name in differing:
            raise InputError(
                f"the cache {self._folder} has states in {name} {saved[name]}, not "
                f"{ours[name]}{elsewhere}, or give --{name} {saved[name]}"
            )
        if missing:
            raise InputError(f"the cache {self._folder} has no states at {missing[0]}{elsewhere}")
        if not is_same:
            raise InputError(
                f"{ours['model']['name']} does not compute the states of the cache {self._folder}: "
                "the weights, the device, the number of threads or a version differs" + elsewhere
            )

    def _manifest(self) -> JsonObject:
        """Everything that the states depend on except the tokens."""
        vocab_size, context = self.model.identity.vocab_size, self.model.context
        ids = torch.arange(min(_CHECKED_TOKENS, context or _CHECKED_TOKENS)) * 7919 % vocab_size
        digest = hashlib.sha256()
        with self.autocast():
            stream = self.model.residual_stream(ids[None].to(self.model.device))
        for state in stream:
            digest.update(state.float().cpu().numpy().tobytes())
        return {
            "model": dataclasses.asdict(self.model.identity),
            "dtype": str(self.model.model.dtype).removeprefix("torch."),
            "precision": self.plan.precision,
            "states": self._names,
            "check_sha256": digest.hexdigest(),
        }


def _checksum(state: Float[Tensor, "seq d_model"]) -> str:
    return f"{zlib.crc32(state.view(torch.uint8).numpy().data):08x}"
