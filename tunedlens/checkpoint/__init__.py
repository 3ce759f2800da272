"""Reads and writes lenses, in our format and in others, and the states of interrupted runs."""

from tunedlens.checkpoint.formats import (
    describe_lens,
    export_lens,
    find_lens,
    load_lens,
    load_lens_of_kind,
)
from tunedlens.checkpoint.hub import hub_name
from tunedlens.checkpoint.lens_files import (
    KINDS,
    ROOT,
    fill_lens,
    kind_of,
    newest_lens,
    save_lens,
    saved_points,
)
from tunedlens.checkpoint.manifest import (
    MANIFEST,
    WEIGHTS,
    read_manifest,
    trained_tokens,
    validations,
)
from tunedlens.checkpoint.run_state import (
    State,
    has_state,
    load_state,
    newest_state,
    remove_state,
    save_state,
    saved_config,
)

__all__ = [
    "KINDS",
    "MANIFEST",
    "ROOT",
    "WEIGHTS",
    "State",
    "describe_lens",
    "export_lens",
    "fill_lens",
    "find_lens",
    "has_state",
    "hub_name",
    "kind_of",
    "load_lens",
    "load_lens_of_kind",
    "load_state",
    "newest_lens",
    "newest_state",
    "read_manifest",
    "remove_state",
    "save_lens",
    "save_state",
    "saved_config",
    "saved_points",
    "trained_tokens",
    "validations",
]
