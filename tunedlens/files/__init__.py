"""Reads and writes files safely; all files that come from a user are read here."""

from tunedlens.files.reading import (
    MAX_DEPTH,
    MAX_JSON_BYTES,
    MAX_YAML_BYTES,
    TensorFile,
    TensorHeader,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_tensor_header,
    read_tensors,
    read_text,
    require_finite,
)
from tunedlens.files.schema import JsonObject, as_type
from tunedlens.files.writing import (
    newest_folder,
    now,
    replacing,
    require_lens_name,
    require_writable,
    write,
    write_json,
)

__all__ = [
    "MAX_DEPTH",
    "MAX_JSON_BYTES",
    "MAX_YAML_BYTES",
    "JsonObject",
    "TensorFile",
    "TensorHeader",
    "as_type",
    "newest_folder",
    "now",
    "parse_json",
    "parse_yaml",
    "read_bytes",
    "read_json",
    "read_tensor_header",
    "read_tensors",
    "read_text",
    "replacing",
    "require_finite",
    "require_lens_name",
    "require_writable",
    "write",
    "write_json",
]
