"""Reads and writes trajectories and comparisons: one safetensors file with JSON metadata."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from jaxtyping import jaxtyped
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.files import JsonObject, parse_json, read_tensors, require_lens_name, write
from tunedlens.metrics import DIVERGENCES
from tunedlens.model.sites import SITES
from tunedlens.tokenizer import TokenText
from tunedlens.trajectories.comparison import Comparison
from tunedlens.trajectories.result import LensPredictions, Row, Trajectory

FORMAT = 1
_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""The exceptions that a damaged file can raise while it is read and checked."""
_ID_NAMES = ("input_ids", "next_ids", "tracked_ids")
_NAMES = tuple(field.name for field in fields(LensPredictions))
_TYPES = Trajectory.__annotations__ | LensPredictions.__annotations__
"""The dtype and the axes of every tensor."""

Item = TypeVar("Item")
Tensors = dict[str, Tensor]


def save(data: Trajectory | Comparison, path: str | Path | None = None) -> Path:
    """Write a trajectory or comparison to one file, which `load` reads without the model.

    Args:
        path: by default, a file in the working directory with a name made of the first words of
            the text and a hash of the content.

    Returns:
        The path of the file.

    Raises:
        InputError: the file cannot be written, or the name of a lens cannot be part of one.
    """
    if isinstance(data, Trajectory):
        kind, records, tensors = "trajectory", [_record(data)], _tensors(data, "")
    else:
        kind, records = "comparison", [_record(data.trajectory), _record(data.baseline)]
        tensors = _tensors(data.trajectory, "") | _tensors(data.baseline, "baseline.")
        for index, lens in enumerate(data.trajectory.predictions):
            for name, values in data.divergences.get(lens, {}).items():
                tensors[f"divergence.{index}.{name}"] = values
    metadata = {"tunedlens": json.dumps({"kind": kind, "format": FORMAT, "records": records})}
    # Copies, because safetensors refuses tensors that share memory.
    copies = {name: value.clone().contiguous() for name, value in tensors.items()}
    content = safetensors.torch.save(copies, metadata)
    if path is None:
        words = re.sub(r"[^a-z0-9]+", "-", records[0]["text"].lower()).strip("-")[:24].strip("-")
        digest = hashlib.sha256(content).hexdigest()[:6]
        path = "-".join(filter(None, (kind, words, digest))) + ".safetensors"
    write(Path(path), content)
    return Path(path)


def load_trajectory(path: str | Path) -> Trajectory:
    """Read a saved trajectory.

    Raises:
        InputError: there is no such file, or it is not a saved trajectory, or it is damaged.
    """
    with _opened(Path(path), "trajectory") as (tensors, records):
        return _trajectory(tensors, records[0], "")


def load_comparison(path: str | Path) -> Comparison:
    """Read a saved comparison.

    Raises:
        InputError: there is no such file, or it is not a saved comparison, or it is damaged.
    """
    with _opened(Path(path), "comparison") as (tensors, records):
        ours = _trajectory(tensors, records[0], "")
        theirs = _trajectory(tensors, records[1], "baseline.")
        shape = (len(ours.rows), len(ours.positions))
        _require(ours.rows == theirs.rows, "the rows of both sides differ")
        _require(shape[1] == len(theirs.positions), "the sides differ in length")
        divergences: dict[str, dict[str, Tensor]] = {}
        for index, lens in enumerate(ours.predictions):
            for name in DIVERGENCES:
                key = f"divergence.{index}.{name}"
                if key in tensors:
                    values = divergences.setdefault(lens, {})[name] = tensors[key]
                    is_right = values.shape == shape and values.is_floating_point()
                    _require(is_right, f"{key} is {values.dtype} of shape {tuple(values.shape)}")
        return Comparison(ours, theirs, divergences)


def _tensors(trajectory: Trajectory, prefix: str) -> Tensors:
    tensors = {prefix + name: getattr(trajectory, name) for name in _ID_NAMES}
    for index, one in enumerate(trajectory.predictions.values()):
        tensors |= {f"{prefix}{index}.{name}": value for name, value in vars(one).items()}
    return tensors


def _record(trajectory: Trajectory) -> JsonObject:
    """The metadata of one trajectory; the lenses are in the order of the tensors."""
    for lens in trajectory.predictions:
        require_lens_name(lens)
    return {
        "model": trajectory.model,
        "text": trajectory.text,
        "n_layers": trajectory.n_layers,
        "positions": trajectory.positions,
        "rows": trajectory.rows,
        "lenses": list(trajectory.predictions),
        "track": trajectory.track,
        "vocabulary": trajectory.vocabulary,
    }


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[tuple[Tensors, list[JsonObject]]]:
    """The tensors and records of a file; every fault in them raises an `InputError`."""
    file = read_tensors(path, dtypes=(torch.float32, torch.int64))
    try:
        metadata, tensors = parse_json(file.metadata.get("tunedlens", "{}"), "it"), file.tensors
        found, version, records = (metadata.get(key) for key in ("kind", "format", "records"))
        _require(found == kind, f"it holds {f'a {found}' if found else 'something else'}")
        _require(version == FORMAT, f"it has format {version}; this version reads format {FORMAT}")
        count = {"trajectory": 1, "comparison": 2}[kind]
        _require(
            isinstance(records, list) and len(records) == count,
            "it has no description of its content",
        )
        yield tensors, records
    except _DAMAGE as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} is damaged or is not a saved {kind}: {reason}") from error


def _require(is_true: bool, reason: str) -> None:
    if not is_true:
        raise ValueError(reason)


def _trajectory(tensors: Tensors, record: JsonObject, prefix: str) -> Trajectory:
    """Check one record and its tensors; raises ValueError, TypeError, KeyError and the like."""
    lenses, positions = _list_of(str, record["lenses"]), _list_of(int, record["positions"])
    rows = [Row(str(site), int(layer)) for site, layer in record["rows"]]
    layers = range(int(record["n_layers"]) + 1)
    _require(bool(lenses) and len(set(lenses)) == len(lenses), "lens names are missing or repeated")
    for lens in lenses:
        require_lens_name(lens)
    _require(bool(positions) and min(positions) >= 0, "positions are missing or negative")
    is_known = all(row.site in SITES and row.layer in layers for row in rows)
    _require(bool(rows) and is_known, "rows are missing or unknown")
    result = Trajectory(
        model=str(record["model"]),
        text=str(record["text"]),
        **{name: tensors[prefix + name] for name in _ID_NAMES},
        positions=positions,
        rows=rows,
        n_layers=layers[-1],
        predictions={
            lens: LensPredictions(**{name: tensors[f"{prefix}{index}.{name}"] for name in _NAMES})
            for index, lens in enumerate(lenses)
        },
        track={str(name): int(i) for name, i in record["track"].items()},
        vocabulary={int(i): TokenText(*_list_of(str, o)) for i, o in record["vocabulary"].items()},
    )
    with jaxtyped("context"):  # An axis has one length in all annotations.
        grid = torch.empty(len(rows), len(positions))
        assert isinstance(grid, _TYPES["kl_nats"])
        for name, value in _tensors(result, prefix).items():
            is_right = isinstance(value, _TYPES[name.rpartition(".")[2]])
            _require(is_right, f"{name} is {value.dtype} of shape {tuple(value.shape)}")
    _require(result.predictions[lenses[0]].top_ids.shape[-1] > 0, "there are no tokens")
    missing = result.all_ids() - result.vocabulary.keys()
    _require(not missing, f"token {min(missing, default=0)} has no text")
    return result


def _list_of(kind: type[Item], values: object) -> list[Item]:
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise TypeError(f"expected a list of {kind.__name__} values, got {values!r:.40}")
    return values
