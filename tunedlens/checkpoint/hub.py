"""Names on the Hugging Face hub, and local copies of files from there."""

import glob
import os
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from tunedlens.errors import InputError, first_line
from tunedlens.hub import hub_or_cache

_NAME = re.compile(r"(?:(space|dataset):)?(\w[\w.-]*/\w[\w.-]*)(?:@([^:]+))?(?::([^:]+))?")


class HubName(NamedTuple):
    """The parts of `[space:]user/name[@revision][:subfolder]`."""

    kind: str | None
    """`space` or `dataset`; None for a repository of models."""
    repo_id: str
    revision: str | None
    subfolder: str | None

    @property
    def title(self) -> str:
        """The last part of the name."""
        return (self.subfolder or self.repo_id).strip("/").rpartition("/")[-1]


def hub_name(source: str | Path) -> HubName | None:
    """The parts of a name on the hub; None for a `Path`, an existing path or any other text."""
    if isinstance(source, Path) or os.path.exists(source):
        return None
    found = _NAME.fullmatch(source)
    # `os.path.exists` is false where `Path.exists` raises: for a name that is too long.
    return HubName(*found.groups()) if found else None


def local_path(
    source: str | Path,
    formats: Sequence[Sequence[str]],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
) -> Path:
    """A folder or file by its path, or the local copy of one on the hub.

    Args:
        source: a path, or a name as in `HubName`.
        formats: the files of each format that a folder can have; nothing else is downloaded.
        subfolder: the folder, or the `.pt` file, within `source`.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: the hub has no such repository, revision or file, or cannot be reached.
    """
    name = hub_name(source)
    if name is None:
        if revision is not None:
            raise InputError(
                f"revision is only for names on the hub, and {source} is a path; got {revision}"
            )
        return Path(source, subfolder or "")
    inner, revision = subfolder or name.subfolder or "", revision or name.revision
    is_file = inner.endswith(".pt")
    wanted = [inner] if is_file else [str(Path(inner, file)) for file in chain(*formats)]
    try:
        with hub_or_cache():
            copy = snapshot_download(
                name.repo_id,
                repo_type=name.kind,
                revision=revision,
                allow_patterns=[glob.escape(file) for file in wanted],
            )
    except RevisionNotFoundError as error:
        raise InputError(f"{name.repo_id} on the hub has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no folder {source}, and no repository {name.repo_id} on the hub (a private "
            "or gated one needs `hf auth login`)"
        ) from error
    except Exception as error:  # huggingface_hub raises many kinds of exception
        cause = error if isinstance(error, InputError) else first_line(error.__cause__ or error)
        raise InputError(
            f"there is no folder {source}, and the hub cannot be read: {cause}"
        ) from error
    path = Path(copy, inner)
    if is_file and not path.is_file():
        raise InputError(f"{name.repo_id} on the hub has no {inner}")
    missing = [[file for file in files if not (path / file).is_file()] for files in formats]
    if not is_file and all(missing):
        where = f"{name.repo_id} on the hub" + (f", in {inner}," if inner else "")
        expected = ", or ".join(" and ".join(files) for files in formats)
        raise InputError(
            f"{where} holds no lens: expected {expected}, and there is no {missing[0][0]}"
        )
    return path
