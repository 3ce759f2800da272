import json

import pytest
import torch
from conftest import make_gpt2, random_lens

from tunedlens import FrozenModel, InputError, TunedLens, checkpoint, files


@pytest.fixture
def saved(tiny, tmp_path):
    lens = random_lens(tiny)
    lens.save(tmp_path / "lens")
    return lens, tmp_path / "lens"


def test_lens_reads_back_bit_equal(tiny, saved):
    lens, folder = saved
    loaded = TunedLens.load(folder, tiny)
    for name, value in lens.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_file_names_every_translator_by_its_site(saved):
    from safetensors.torch import load_file

    tensors = load_file(saved[1] / "lens.safetensors")
    expected = {f"resid_pre.{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    assert tensors.keys() == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_lens_is_loaded_for_the_same_model_in_another_dtype(saved, tokenizer):
    model = FrozenModel(make_gpt2().bfloat16(), tokenizer)
    assert TunedLens.load(saved[1], model).n_layers == 3


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"n_embd": 8}, "d_model 16, not 8"),
        ({"n_layer": 4}, "n_layers 3, not 4"),
        ({"vocab_size": 5000}, "vocab_size 4096, not 5000"),
        ({"seed": 1}, "unembedding with other values"),
    ],
)
def test_lens_for_another_model_is_refused_with_what_differs(saved, tokenizer, other, difference):
    model = FrozenModel(make_gpt2(**other), tokenizer, name="other")
    with pytest.raises(InputError, match=f"made for tiny and does not fit other.*{difference}"):
        TunedLens.load(saved[1], model)


def test_damaged_lens_is_refused(tiny, saved):
    path = saved[1] / "lens.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    with pytest.raises(InputError, match="is damaged"):
        TunedLens.load(saved[1], tiny)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="is not the file that"):
        TunedLens.load(saved[1], tiny)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"lens": "other"}', '{"lens": "tuned", "format": 1}']
)
def test_damaged_manifest_is_refused(tiny, saved, text):
    (saved[1] / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json (is|has)"):
        TunedLens.load(saved[1], tiny)


def test_lens_of_a_later_format_is_refused(tiny, saved):
    manifest = json.loads((saved[1] / "config.json").read_text())
    (saved[1] / "config.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(InputError, match="format 99; this version reads format 1"):
        TunedLens.load(saved[1], tiny)


def test_folder_without_a_lens_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="holds no lens"):
        TunedLens.load(tmp_path, tiny)


def test_newest_lens_is_the_one_whose_manifest_says_so(tiny, tmp_path):
    for name in ("b", "a"):
        TunedLens.from_model(tiny).save(tmp_path / name)
    (tmp_path / "b" / "config.json").touch()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    assert checkpoint.newest_lens(tmp_path) == tmp_path / "a"


def test_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old")
    whole = type(path).write_bytes

    def write_half(partial, content):
        whole(partial, content[: len(content) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "write_bytes", write_half)
    with pytest.raises(InputError, match="disk full"):
        files.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_state_reads_back_bit_equal(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(7.0)}
    checkpoint.save_state(tmp_path / "run", checkpoint.State(tensors, {"step": 3}))
    state = checkpoint.load_state(checkpoint.newest_state(tmp_path))
    assert state.metadata["step"] == 3
    assert all(torch.equal(state.tensors[name], value) for name, value in tensors.items())


def test_damaged_state_is_refused_by_name_and_passed_over_otherwise(tmp_path):
    for name in ("whole", "torn"):
        checkpoint.save_state(tmp_path / name, checkpoint.State({"a": torch.ones(2)}, {}))
    path = tmp_path / "torn" / "state" / "1.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="is damaged"):
        checkpoint.load_state(tmp_path / "torn")
    assert checkpoint.newest_state(tmp_path) == tmp_path / "whole"


def test_unwritable_folder_is_found_out_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another --output"):
        files.require_writable(tmp_path / "file" / "run")
