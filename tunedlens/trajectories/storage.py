"""Trajectories and comparisons on disk: one safetensors file with JSON metadata."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TypedDict

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.files import write
from tunedlens.metrics import DIVERGENCES
from tunedlens.model.sites import SITES
from tunedlens.tokenizer import TokenText
from tunedlens.trajectories.comparison import Comparison
from tunedlens.trajectories.predictions import LensPredictions, Row
from tunedlens.trajectories.result import Trajectory

FORMAT = 1
_FIELDS = tuple(field.name for field in fields(LensPredictions))
_LAST_AXES = {"top": "k", "tracked": "tracked"}
_INTEGERS = {"top_ids", "next_ranks", "tracked_ranks"}


class _Record(TypedDict):
    """What the metadata say about one trajectory; the lenses are in the order of the tensors."""

    model: str
    text: str
    n_layers: int
    positions: list[int]
    rows: list[tuple[str, int]]
    lenses: list[str]
    track: dict[str, int]
    vocabulary: dict[str, tuple[str, str]]


def save_trajectory(trajectory: Trajectory, path: str | Path) -> None:
    """Write a trajectory to one file; `Trajectory.load` reads it without the model.

    Raises:
        InputError: the file cannot be written.
    """
    _write(Path(path), "trajectory", _tensors(trajectory, ""), [_record(trajectory)])


def load_trajectory(path: str | Path) -> Trajectory:
    """Read a saved trajectory.

    Raises:
        InputError: there is no such file, or it is not a saved trajectory, or it is damaged.
    """
    tensors, records = _read(Path(path), "trajectory", 1)
    with _damage(path):
        return _trajectory(tensors, records[0], "")


def save_comparison(comparison: Comparison, path: str | Path) -> None:
    """Write a comparison to one file; `Comparison.load` reads it without the model.

    Raises:
        InputError: the file cannot be written.
    """
    sides = (comparison.trajectory, comparison.baseline)
    tensors = _tensors(sides[0], "") | _tensors(sides[1], "baseline.")
    for index, lens in enumerate(sides[0].predictions):
        for name, values in comparison.divergences.get(lens, {}).items():
            tensors[f"divergence.{index}.{name}"] = values.contiguous()
    _write(Path(path), "comparison", tensors, [_record(side) for side in sides])


def load_comparison(path: str | Path) -> Comparison:
    """Read a saved comparison.

    Raises:
        InputError: there is no such file, or it is not a saved comparison, or it is damaged.
    """
    tensors, records = _read(Path(path), "comparison", 2)
    with _damage(path):
        ours = _trajectory(tensors, records[0], "")
        theirs = _trajectory(tensors, records[1], "baseline.")
        shape = (len(ours.rows), len(ours.positions))
        _require(ours.rows == theirs.rows, "the rows of both sides differ")
        _require(shape[1] == len(theirs.positions), "the sides differ in length")
        divergences: dict[str, dict[str, Tensor]] = {}
        for index, lens in enumerate(ours.predictions):
            for name in DIVERGENCES:
                if f"divergence.{index}.{name}" in tensors:
                    values = _tensor(tensors, f"divergence.{index}.{name}", shape, is_integer=False)
                    divergences.setdefault(lens, {})[name] = values
        return Comparison(ours, theirs, divergences)


def _tensors(trajectory: Trajectory, prefix: str) -> dict[str, Tensor]:
    tensors = {
        f"{prefix}{name}": getattr(trajectory, name)
        for name in ("input_ids", "next_ids", "tracked_ids")
    }
    for index, one in enumerate(trajectory.predictions.values()):
        tensors |= {f"{prefix}{index}.{name}": getattr(one, name) for name in _FIELDS}
    # Copies, because safetensors refuses tensors that share memory.
    return {name: value.clone().contiguous() for name, value in tensors.items()}


def _record(trajectory: Trajectory) -> _Record:
    return {
        "model": trajectory.model,
        "text": trajectory.text,
        "n_layers": trajectory.n_layers,
        "positions": trajectory.positions,
        "rows": [(row.site, row.layer) for row in trajectory.rows],
        "lenses": list(trajectory.predictions),
        "track": trajectory.track,
        "vocabulary": {str(i): (one.text, one.shown) for i, one in trajectory.vocabulary.items()},
    }


def _write(path: Path, kind: str, tensors: dict[str, Tensor], records: list[_Record]) -> None:
    about = {"kind": kind, "format": FORMAT, "records": records}
    write(path, safetensors.torch.save(tensors, {"tunedlens": json.dumps(about)}))


def _read(path: Path, kind: str, count: int) -> tuple[dict[str, Tensor], list[object]]:
    """The tensors of a file, and its records as yet unchecked."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("tunedlens", "null"))
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is no saved {kind}, or is damaged: {error}") from error
    if not isinstance(about, dict) or about.get("kind") != kind:
        found = about.get("kind") if isinstance(about, dict) else None
        raise InputError(f"{path} holds {f'a {found}' if found else 'something else'}, no {kind}")
    if about.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {about.get('format')}; this version reads format {FORMAT}"
        )
    records = about.get("records")
    if not isinstance(records, list) or len(records) != count:
        raise InputError(f"{path} is damaged: it has no description of its content")
    return tensors, records


@contextmanager
def _damage(path: str | Path) -> Iterator[None]:
    """Turns whatever a damaged file raises into one clear error."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} is damaged: {reason}") from error


def _require(is_true: bool, reason: str) -> None:
    if not is_true:
        raise ValueError(reason)


def _trajectory(tensors: dict[str, Tensor], record: object, prefix: str) -> Trajectory:
    """Check one record and its tensors; raises ValueError, TypeError or KeyError."""
    if not isinstance(record, dict):
        raise TypeError("a record is no object")
    positions, lenses = _integers(record["positions"]), _strings(record["lenses"])
    rows = [Row(str(site), int(layer)) for site, layer in record["rows"]]
    n_layers, model, text = int(record["n_layers"]), record["model"], record["text"]
    track = {str(name): int(i) for name, i in record["track"].items()}
    vocabulary = {int(i): TokenText(*_strings(one)) for i, one in record["vocabulary"].items()}
    _require(isinstance(model, str) and isinstance(text, str), "model and text must be strings")
    _require(bool(positions) and min(positions) >= 0, "the positions are wrong")
    _require(bool(lenses) and len(set(lenses)) == len(lenses), "the lenses are wrong")
    _require(
        bool(rows) and all(row.site in SITES and 0 <= row.layer <= n_layers for row in rows),
        "the rows are wrong",
    )
    count = len(positions)
    tracked_ids = _tensor(tensors, f"{prefix}tracked_ids", (count, None), is_integer=True)
    sizes = {
        "tracked": tracked_ids.shape[1],
        "k": _tensor(
            tensors, f"{prefix}0.top_ids", (len(rows), count, None), is_integer=True
        ).shape[-1],
    }
    _require(sizes["k"] > 0, "there are no tokens")
    predictions = {}
    for index, lens in enumerate(lenses):
        found = {}
        for name in _FIELDS:
            axis = _LAST_AXES.get(name.split("_")[0])
            shape = (len(rows), count, *([sizes[axis]] if axis else []))
            found[name] = _tensor(
                tensors, f"{prefix}{index}.{name}", shape, is_integer=name in _INTEGERS
            )
        predictions[lens] = LensPredictions(**found)
    result = Trajectory(
        model=model,
        text=text,
        input_ids=_tensor(tensors, f"{prefix}input_ids", (count,), is_integer=True),
        next_ids=_tensor(tensors, f"{prefix}next_ids", (count,), is_integer=True),
        positions=positions,
        rows=rows,
        n_layers=n_layers,
        predictions=predictions,
        tracked_ids=tracked_ids,
        track=track,
        vocabulary=vocabulary,
    )
    _require_vocabulary(result)
    return result


def _require_vocabulary(trajectory: Trajectory) -> None:
    """Make sure that every token has a text; -1 means no token in the ids that may be padded."""
    top = [one.top_ids.flatten() for one in trajectory.predictions.values()]
    ids = set(torch.cat([trajectory.input_ids, *top]).tolist())
    ids |= set(torch.cat([trajectory.next_ids, trajectory.tracked_ids.flatten()]).tolist()) - {-1}
    missing = ids - trajectory.vocabulary.keys()
    _require(not missing, f"token {min(missing, default=0)} has no text")


def _tensor(
    tensors: dict[str, Tensor], name: str, shape: tuple[int | None, ...], *, is_integer: bool
) -> Tensor:
    value = tensors[name]
    is_shape = len(value.shape) == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, value.shape, strict=True)
    )
    is_kind = value.dtype == torch.int64 if is_integer else value.is_floating_point()
    _require(is_shape and is_kind, f"{name} is {value.dtype} of shape {tuple(value.shape)}")
    return value


def _integers(values: object) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError(f"expected a list of integers, got {values!r:.40}")
    return values


def _strings(values: object) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"expected a list of strings, got {values!r:.40}")
    return values
