"""Reads text from the embedded text, local files or the Hugging Face hub.

The result is a dataset with one column, `text`, and one document per row.
"""

import glob
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedTokenizerBase

from tunedlens import builtin
from tunedlens.config import CorpusConfig
from tunedlens.corpus.soundness import require_sound
from tunedlens.corpus.standard_library import standard_library
from tunedlens.errors import InputError, first_line
from tunedlens.files import read_text
from tunedlens.hub import hub_or_cache
from tunedlens.tokenizer import chat_text

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

SELF = "self"
"""The name of the text that is sampled from the model."""

_TEXT_SUFFIXES = {".txt", ".md", ".py"}
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SUFFIXES = " ".join(sorted([*_TEXT_SUFFIXES, *_BUILDERS]))


def embedded_documents(split: Literal["train", "validation"]) -> "Dataset":
    """The standard library of the running Python, with one document per file.

    Raises:
        InputError: this Python has no source files of its standard library.
    """
    try:
        files = standard_library(split)
    except FileNotFoundError as error:
        raise InputError(f"{error}; pass --dataset with a text of your own") from error
    return _in_memory([file.text for file in files])


def read_documents(
    config: CorpusConfig, split: str, tokenizer: PreTrainedTokenizerBase
) -> "Dataset | IterableDataset":
    """The documents of `config.dataset`: local if there is such a path, else on the hub.

    Args:
        tokenizer: renders conversations, with `config.chat`.

    Raises:
        InputError: there is no such text, it cannot be read, or it has no such column.
    """
    name = str(config.dataset)
    files = _local_files(name)

    def load(path: str, file: str | None = None) -> "Dataset | IterableDataset":
        rows = _load(config, split if file is None else "train", path, file)
        return _rendered(rows, tokenizer) if config.chat else rows

    return load(name) if files is None else _read_local(config, files, load)


def is_on_hub(name: str) -> bool:
    """Whether a name is that of a dataset on the hub and not a path or glob.

    Raises:
        InputError: it is a path without a file that can be read.
    """
    return name not in (builtin.NAME, SELF) and _local_files(name) is None


def is_stream(documents: "Dataset | IterableDataset") -> bool:
    """Whether the documents are read only when they are needed."""
    import datasets

    return isinstance(documents, datasets.IterableDataset)


def _local_files(name: str) -> list[Path] | None:
    """Files of a path, folder or glob, in a fixed order; None for a name on the hub."""
    if not name:
        raise InputError("--dataset is empty: expected a file, folder, glob or name on the hub")
    try:
        path = Path(name).expanduser()
        looks_local = name.startswith((".", "/", "~")) or is_readable(path)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if file.is_file()]
        elif glob.has_magic(name):
            matches = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
            found = [file for file in matches if file.is_file()]
        elif looks_local:
            raise InputError(f"{name}: there is no such file or folder")
        else:
            return None
    except (OSError, RuntimeError) as error:
        raise InputError(f"{name}: cannot look for files: {first_line(error)}") from error
    files = [file for file in found if is_readable(file)]
    if not files:
        raise InputError(f"{name}: expected a file of a kind that can be read ({_SUFFIXES})")
    return files


def is_readable(path: Path) -> bool:
    """Whether files with this extension can be read."""
    return path.suffix.lower() in _TEXT_SUFFIXES | _BUILDERS.keys()


def _read_local(
    config: CorpusConfig, files: list[Path], load: Callable[[str, str], Any]
) -> "Dataset | IterableDataset":
    """Read files. Text files are always read whole; rows are streamed if the config asks for it."""
    import datasets

    texts = [file for file in files if file.suffix.lower() in _TEXT_SUFFIXES]
    if texts and config.chat:
        raise InputError(f"--chat needs rows of conversations; {texts[0]} has none")
    tables = [file for file in files if file not in texts]
    parts: list[Any] = [load(_BUILDERS[file.suffix.lower()], str(file)) for file in tables]
    if texts:
        whole = _in_memory([read_text(file) for file in texts])
        if config.streaming and tables:
            # Streamed rows are ordinary strings, so the texts must be too.
            whole = whole.cast(_features("string")).to_iterable_dataset()
        parts.insert(0, whole)
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _load(
    config: CorpusConfig, split: str, path: str, file: str | None = None
) -> "Dataset | IterableDataset":
    """A dataset through `datasets`, with its text column and no other."""
    import datasets

    options: dict[str, Any] = {"split": split, "streaming": config.streaming}
    if file is None:
        options |= {"name": config.dataset_config, "revision": config.dataset_revision}
    else:
        if path != "parquet":
            require_sound(Path(file))
        options["data_files"] = glob.escape(file)  # [ and * in a name are not a pattern
    if path == "csv":
        # "NA" and "null" are words of a text, not missing values.
        options["keep_default_na"] = False
    where = file or path
    try:
        with nullcontext() if file else hub_or_cache():
            rows = datasets.load_dataset(path, **options)
            features = rows.features or rows._resolve_features().features
    except Exception as error:  # datasets raises many kinds of exception
        cause = str(error)
        if not isinstance(error, InputError):
            hint = "" if file else " (a dataset on the hub needs a network)"
            cause = first_line(error.__cause__ or error) + hint
        raise InputError(f"cannot read the dataset {where}: {cause}") from error
    choose = _chat_column if config.chat else _text_column
    column = choose(dict(features or {}), config.text_column, where)
    rows = rows.select_columns([column])
    if column != "text":
        rows = rows.rename_column(column, "text")
    if config.streaming:
        return rows
    try:
        rows.data.validate(full=True)
    except ValueError as error:  # of pyarrow
        raise InputError(f"{where} is damaged: {first_line(error)}") from error
    return rows if config.chat else rows.cast(_features())


def _rendered(
    rows: "Dataset | IterableDataset", tokenizer: PreTrainedTokenizerBase
) -> "Dataset | IterableDataset":
    """Conversations as text."""

    def render(messages: list[dict[str, object]] | None) -> str:
        return chat_text(tokenizer, messages) if messages else ""

    if not is_stream(rows):
        return _in_memory([render(row["text"]) for row in rows])
    return rows.map(lambda row: {"text": render(row["text"])}, features=_features("string"))


def _chat_column(features: dict[str, Any], wanted: str | None, where: str) -> str:
    column = wanted or "messages"
    if column not in features:
        raise InputError(
            f"{where} has no column {column!r} of conversations; choose one with --text-column; "
            f"it has {', '.join(features) or 'none'}"
        )
    turn = getattr(features[column], "feature", None)
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise InputError(
            f"the column {column!r} of {where} holds no conversations (lists of role and content); "
            f"it has {features[column]}"
        )
    return column


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
    import pyarrow

    rows = pyarrow.table({"text": pyarrow.array(texts, pyarrow.large_string())})
    # Without a fingerprint, `datasets` would copy all texts several times to compute one.
    return datasets.Dataset(rows, datasets.DatasetInfo(features=_features()), fingerprint="texts")


def _features(kind: str = "large_string") -> "Features":
    """One type for all parts, so that they can be joined. Large strings can exceed 2 GiB."""
    import datasets

    return datasets.Features({"text": datasets.Value(kind)})
