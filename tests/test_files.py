import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import pytest
import safetensors.torch
import torch

from tunedlens import InputError, files


@dataclass(frozen=True)
class Point:
    x: float
    label: str | None = None


@dataclass(frozen=True)
class Shape:
    kind: Literal["open", "closed"]
    points: list[Point]
    sizes: tuple[int, ...] = ()
    by_name: dict[str, Point] = field(default_factory=dict)


class About(TypedDict, total=False):
    name: str


GOOD = {"kind": "open", "points": [{"x": 1, "label": None}], "sizes": [3]}


def test_schema_builds_what_the_annotations_say():
    expected = Shape("open", [Point(1.0)], (3,))
    assert files.as_type(Shape, GOOD, "it") == expected
    assert files.as_type(About, {"name": "a", "other": 1}, "it") == {"name": "a", "other": 1}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "round"}, "kind must be one of open, closed, got 'round'"),
        ({"points": None}, "points must be a list, got None"),
        ({"points": [{"x": "1"}]}, r"points\[0\].x must be a number, got '1'"),
        ({"points": [{"x": True}]}, r"points\[0\].x must be a number, got True"),
        ({"points": [{}]}, r"x is missing from points\[0\]"),
        ({"points": [{"x": 1, "y": 2}]}, r"'y' in points\[0\] is unknown"),
        ({"points": [[1]]}, r"points\[0\] must be an object"),
        ({"points": [{"x": 1, "label": 2}]}, r"label must be text, got 2"),
        ({"sizes": [1.5]}, r"sizes\[0\] must be a whole number"),
        ({"by_name": []}, "by_name must be an object"),
        ({"by_name": {"a": 1}}, "by_name.a must be an object, got 1"),
    ],
)
def test_schema_refuses_other_values_and_says_where(changed, message):
    with pytest.raises(InputError, match=f"it is damaged: .*{message}"):
        files.as_type(Shape, GOOD | changed, "it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 65 + "1" + "]" * 65, "nested more than 64 deep"),
        ("[1" + "0" * 400 + "]", "too large"),
        ("[1e999]", "too large"),
        ("[NaN]", "expected finite numbers, got NaN"),
        ("[1" + "0" * 30 + "]", "too large"),
        ("1" * 5000, "is damaged"),
        (r'{"\ud800": 1}', "is damaged"),
        ("{", "is damaged"),
    ],
    ids=range(9),
)
def test_json_that_is_not_plain_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        files.parse_json(text, "it")


def test_json_that_we_write_reads_back(tmp_path):
    data = {"a": [1, -2.5, None, True, "naïve 日本 🎉"], "b": 2**53}
    files.write_json(tmp_path / "a.json", data)
    assert files.read_json(tmp_path / "a.json") == data


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "got an alias"),
        ("[" * 5000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [true]", "is damaged"),
        ("a: !!bool x", "is damaged"),
        ("a: 2001-99-99", "is damaged"),
        ("a: .nan", "is damaged"),
        ("a: " + "1" * 5000, "is damaged"),
        ("a: x\n" * 20_000, "larger than 65,536 bytes"),
    ],
    ids=range(8),
)
def test_yaml_that_is_not_plain_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        files.parse_yaml(text, "it")


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match="not a regular file"):
        files.read_bytes(tmp_path / "fifo")
    with pytest.raises(InputError, match="directory"):
        files.read_bytes(tmp_path)
    with pytest.raises(InputError, match="name too long"):
        files.read_bytes(tmp_path / ("x" * 5000))
    with pytest.raises(InputError, match="cannot read"):
        files.read_bytes(tmp_path / "a\0b")
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(InputError, match="larger than 10 bytes"):
        files.read_bytes(tmp_path / "large", max_bytes=10)
    assert files.read_bytes(tmp_path / "large", max_bytes=11) == b"x" * 11


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"not UTF-8 \(byte 3 is 0xe9"):
        files.read_text(tmp_path / "a")


def test_tensors_of_other_dtypes_or_not_finite_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for dtype in (torch.int64, torch.float16, torch.float64, torch.float8_e4m3fn, torch.complex64):
        path.write_bytes(safetensors.torch.save({"a": torch.ones(2, dtype=dtype)}))
        with pytest.raises(InputError, match="expected float32, got"):
            files.read_tensors(path)
    tensors = {"a": torch.tensor([1.0, torch.nan])}
    path.write_bytes(safetensors.torch.save(tensors, {"k": "v"}))
    read = files.read_tensors(path)
    assert read.metadata == {"k": "v"}
    with pytest.raises(InputError, match=r"not finite \(a\)"):
        files.require_finite(read.tensors, path)


def test_metadata_that_is_null_is_no_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    content = b'{"__metadata__":null}'
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    assert files.read_tensors(path).metadata == {}


def test_killed_writer_leaves_the_old_file_and_the_next_writer_cleans_up(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    code = (
        "import os, pathlib, signal; from tunedlens import files\n"
        f"with files.replacing(pathlib.Path({str(path)!r})) as partial:\n"
        "    partial.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert path.read_text() == "old"
    (abandoned,) = set(tmp_path.iterdir()) - {path}
    own = tmp_path / f".another-host-1.{path.name}"
    own.touch()
    files.write(path, "new")
    assert not abandoned.exists()
    assert set(tmp_path.iterdir()) == {path, own}


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")))
    replace = type(tmp_path).replace
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda *both: (events.append("rename"), replace(*both))
    )
    files.write(tmp_path / "a", "text")
    assert events[0].endswith(".a")
    assert events[1:] == ["rename", str(tmp_path)]


def test_text_that_utf8_cannot_hold_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        files.write(tmp_path / "a", "\ud800")
    with suppress(KeyboardInterrupt), files.replacing(tmp_path / "b") as partial:
        partial.touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_numbers_keep_all_their_digits(tmp_path):
    files.write_json(tmp_path / "a.json", [0.1 + 0.2])
    assert json.loads((tmp_path / "a.json").read_text()) == [0.1 + 0.2]
