"""States on disk, in place of the model's forward pass."""

import dataclasses

import pytest
import torch
from conftest import make_gpt2, short_run

from tunedlens import CacheSettings, InputError, TunedLens, load_model
from tunedlens.cli.train import train_command
from tunedlens.training import train


@pytest.fixture
def config(tiny_folder, text_file):
    return short_run(tiny_folder, text_file, tokens=320, init_tokens=128)


@pytest.fixture
def cache(tmp_path):
    return CacheSettings(tmp_path / "states")


def assert_same_lens(one, other, config):
    model = load_model(config.model.model, device="cpu")
    one, other = (TunedLens.load(folder, model).state_dict() for folder in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def blocks_from(output):
    """Blocks that came from disk and from the model, as the run says."""
    (line,) = (line for line in output.splitlines() if line.startswith("states "))
    return int(line.split()[1]), int(line.split()[-4])


def test_runs_with_other_settings_equal_runs_without_a_cache(config, cache, tmp_path, capsys):
    wide = dataclasses.replace(config, sites="resid_mid", skip_first=3)
    train(wide, tmp_path / "first", cache=cache)
    from_disk, from_model = blocks_from(capsys.readouterr().out)
    assert from_model > 0
    assert from_disk < from_model  # those that are validated more than once
    others = (
        dataclasses.replace(config, lr=0.1, vocab_sample=400),
        dataclasses.replace(wide, fit="sgd", momentum=0.5),
    )
    for number, other in enumerate(others):
        train(other, tmp_path / f"plain {number}")
        capsys.readouterr()
        train(other, tmp_path / f"cached {number}", cache=cache)
        from_disk, from_model = blocks_from(capsys.readouterr().out)
        assert from_disk > 0
        assert from_model == 0
        assert_same_lens(tmp_path / f"plain {number}", tmp_path / f"cached {number}", config)


def test_model_runs_for_blocks_that_are_missing_or_damaged(config, cache, tmp_path, capsys):
    train(config, tmp_path / "first", cache=cache)
    capsys.readouterr()
    files = sorted(cache.folder.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-1])
    flipped = bytearray(files[1].read_bytes())
    flipped[-40] ^= 1  # the last bit of a number
    files[1].write_bytes(flipped)
    for file in files[2 : len(files) // 2]:
        file.unlink()
    train(config, tmp_path / "second", cache=cache)
    assert all(blocks_from(capsys.readouterr().out))
    assert_same_lens(tmp_path / "first", tmp_path / "second", config)
    assert sorted(cache.folder.glob("*.safetensors")) == files
    train(config, tmp_path / "third", cache=cache)
    assert blocks_from(capsys.readouterr().out)[1] == 0


def test_run_says_when_the_limit_is_reached_and_goes_on(config, tmp_path, capsys):
    train(config, tmp_path / "plain")
    capsys.readouterr()
    folder = tmp_path / "states"
    arguments = ["--model", config.model.model, "--dataset", config.corpus.dataset]
    arguments += ["--device", "cpu", "--seq-len", "16", "--batch-size", "4", "--tokens", "320"]
    arguments += ["--init-tokens", "128", "--precision", "fp32", "--kernel", "products"]
    arguments += ["--evaluate-tokens", "60", "--cache-states", str(folder), "--cache-gb", "2e-5"]
    assert train_command([*arguments, "--output", str(tmp_path / "cached")]) == 0
    output = capsys.readouterr().out
    assert (
        output.count("has reached its limit of 2e-05 GB (--cache-gb); the states of other blocks")
        == 1
    )
    assert 0 < sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 2.2e4
    assert_same_lens(tmp_path / "plain", tmp_path / "cached", config)


def test_full_disk_does_not_end_a_run(config, cache, tmp_path, capsys, monkeypatch):
    def fail(path, _content):
        raise InputError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("tunedlens.training.state_cache.write", fail)
    train(config, tmp_path / "run", cache=cache)
    assert capsys.readouterr().out.count("No space left on device; the states of") == 1


def test_states_of_another_model_or_precision_are_refused(config, cache, tiny_folder, tmp_path):
    train(config, tmp_path / "run", cache=cache)
    with pytest.raises(InputError, match=r"in precision fp32, not bf16.* or give --precision fp32"):
        train(dataclasses.replace(config, precision="bf16"), tmp_path / "other", cache=cache)
    with pytest.raises(InputError, match=r"has no states at attn_out\.0; choose another"):
        train(dataclasses.replace(config, sites="attn_out"), tmp_path / "other", cache=cache)
    body = make_gpt2()
    with torch.no_grad():
        body.transformer.h[1].mlp.c_fc.bias[0] += 1e-3
    body.save_pretrained(tiny_folder)
    with pytest.raises(InputError, match="does not compute the states of the cache"):
        train(config, tmp_path / "other", cache=cache)
    make_gpt2(n_layer=2).save_pretrained(tiny_folder)
    with pytest.raises(InputError, match=r"does not fit .* it has n_layers 3, not 2"):
        train(config, tmp_path / "other", cache=cache)


def test_cache_that_cannot_be_used_says_why(config, cache, tmp_path):
    jacobian = dataclasses.replace(config, fit="jacobian", tokens=None)
    with pytest.raises(InputError, match="--fit jacobian differentiates the model"):
        train(jacobian, tmp_path / "run", cache=cache)
    with pytest.raises(InputError, match="--cache-gb must be above 0, got 0"):
        train(config, tmp_path / "run", cache=cache._replace(max_gb=0))
    cache.folder.mkdir()
    (cache.folder / "states.json").write_text("{}")
    with pytest.raises(InputError, match=r"states\.json is damaged"):
        train(config, tmp_path / "run", cache=cache)


def test_limit_without_a_folder_is_refused(capsys):
    assert train_command(["--cache-gb", "1", "--dataset", "missing.txt"]) == 2
    assert "--cache-gb works only with --cache-states" in capsys.readouterr().err
