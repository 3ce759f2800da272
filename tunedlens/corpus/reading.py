"""Where text comes from: the embedded text, local files, the Hugging Face hub.

All of it comes out as a dataset with one column, `text`, a document a row.
"""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunedlens import embedded
from tunedlens.config import CorpusConfig
from tunedlens.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

EMBEDDED = "embedded"
"""As `--dataset`: the text that the embedded model was trained on."""

_TEXT_SUFFIXES = {".txt", ".md", ".py"}
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SUFFIXES = " ".join(sorted([*_TEXT_SUFFIXES, *_BUILDERS]))


def embedded_documents(split: Literal["train", "validation"]) -> "Dataset":
    """The standard library of the running Python, a file a document.

    Raises:
        InputError: this Python has no source files of it.
    """
    try:
        files = embedded.standard_library(split)
    except FileNotFoundError as error:
        raise InputError(f"{error}; pass --dataset with a text of yours") from error
    return _in_memory([file.text for file in files])


def read_documents(config: CorpusConfig, split: str) -> "Dataset | IterableDataset":
    """The documents of `config.dataset`: local if there is such a path, else on the hub.

    Raises:
        InputError: there is no such text, it cannot be read, or it has no such column.
    """
    name = str(config.dataset)
    files = _local_files(name)
    return _read_hub(config, split) if files is None else _read_local(config, files)


def _local_files(name: str) -> list[Path] | None:
    """Files of a path, folder or glob, in a fixed order; None for a name on the hub."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in _TEXT_SUFFIXES | _BUILDERS.keys():
            raise InputError(f"{name}: expected a file of a kind that can be read ({_SUFFIXES})")
        return [path]
    looks_local = name.startswith((".", "/", "~")) or path.suffix.lower() in (
        _TEXT_SUFFIXES | _BUILDERS.keys()
    )
    if path.is_dir():
        found = sorted(path.rglob("*"))
    elif glob.has_magic(name):
        found = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
    elif looks_local:
        raise InputError(f"{name}: there is no such file or folder")
    else:
        return None
    files = [
        f for f in found if f.is_file() and f.suffix.lower() in _TEXT_SUFFIXES | _BUILDERS.keys()
    ]
    if not files:
        raise InputError(f"{name}: found no file of a kind that can be read ({_SUFFIXES})")
    return files


def _read_local(config: CorpusConfig, files: list[Path]) -> "Dataset | IterableDataset":
    import datasets

    texts = [file for file in files if file.suffix.lower() in _TEXT_SUFFIXES]
    parts: list[Any] = []
    if texts and config.streaming:
        parts.append(datasets.IterableDataset.from_generator(_rows, gen_kwargs={"files": texts}))
    elif texts:
        parts.append(_in_memory([_read_text(file) for file in texts]))
    for file in files:
        if file not in texts:
            parts.append(_load(config, "train", _BUILDERS[file.suffix.lower()], str(file)))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _read_hub(config: CorpusConfig, split: str) -> "Dataset | IterableDataset":
    return _load(config, split, str(config.dataset))


def _load(
    config: CorpusConfig, split: str, path: str, file: str | None = None
) -> "Dataset | IterableDataset":
    """A dataset through `datasets`, with its text column and no other."""
    import datasets

    options: dict[str, Any] = {"split": split, "streaming": config.streaming}
    if file is None:
        options |= {"name": config.dataset_config, "revision": config.dataset_revision}
    else:
        options["data_files"] = file
    if path == "csv":
        # "NA" and "null" are words of a text, not missing values.
        options["keep_default_na"] = False
    where = file or path
    try:
        rows = datasets.load_dataset(path, **options)
        features = rows.features or rows._resolve_features().features
    except Exception as error:  # datasets raises whatever its many readers meet
        cause = error.__cause__ or error
        first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        hint = "" if file else " (a dataset on the hub needs a network)"
        raise InputError(f"cannot read the dataset {where}: {first_line}{hint}") from error
    column = _text_column(dict(features or {}), config.text_column, where)
    return (
        rows.select_columns([column]).rename_column(column, "text")
        if column != "text"
        else (rows.select_columns(["text"]))
    )


def _text_column(features: dict[str, Any], wanted: str | None, where: str) -> str:
    strings = [
        name
        for name, feature in features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if wanted is not None and wanted not in features:
        raise InputError(f"{where} has no column {wanted!r}; it has {', '.join(features)}")
    if wanted is not None and wanted not in strings:
        raise InputError(
            f"the column {wanted!r} of {where} holds no text; it has {features[wanted]}"
        )
    if wanted is not None:
        return wanted
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise InputError(
        f"{where} has no single column of text: choose one with --text-column; "
        f"it has {', '.join(features) or 'none'}"
    )


def _in_memory(texts: list[str]) -> "Dataset":
    import datasets

    features = datasets.Features({"text": datasets.Value("large_string")})
    return datasets.Dataset.from_dict({"text": texts}, features=features)


def _rows(files: list[Path]) -> Iterator[dict[str, str]]:
    for file in files:
        yield {"text": _read_text(file)}


def _read_text(file: Path) -> str:
    """A file as it is: no newline is translated, no byte left out."""
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); "
            "convert it first"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
