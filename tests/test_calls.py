"""The calls of one line that people type: settings by name, lenses and texts by path."""

import dataclasses
import inspect
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import random_lens, short_run
from huggingface_hub import is_offline_mode

from tunedlens import (
    CorpusConfig,
    EvaluateConfig,
    InputError,
    LogitLens,
    ModelConfig,
    TrainConfig,
    Trajectory,
    evaluate,
    load_model,
    train,
    trajectory,
)
from tunedlens.config import EvaluateSettings, TrainSettings
from tunedlens.errors import did_you_mean
from tunedlens.hub import hub_or_cache

SETTINGS = [(TrainConfig, TrainSettings, train), (EvaluateConfig, EvaluateSettings, evaluate)]


@pytest.fixture
def saved(tiny, tmp_path):
    lens = random_lens(tiny)
    lens.save(tmp_path / "lens")
    return lens, str(tmp_path / "lens")


@pytest.mark.parametrize(("config", "settings", "_"), SETTINGS)
def test_settings_of_a_call_are_the_fields_of_its_config(config, settings, _):
    fields = {}
    for part in (config, ModelConfig, CorpusConfig):
        hints = get_type_hints(part)
        fields |= {f.name: hints[f.name] for f in dataclasses.fields(part) if "help" in f.metadata}
    own = {"model", "beside"}  # arguments, which may be loaded models
    types = get_type_hints(settings)
    assert types.keys() == fields.keys() - own
    for name, kind in types.items():
        assert set(get_args(kind)) - {Path} == set(get_args(fields[name])), name


@pytest.mark.parametrize(("config", "settings", "call"), SETTINGS)
def test_signature_lists_every_setting_with_its_default(config, settings, call):
    parameters = inspect.signature(call).parameters
    assert get_type_hints(settings).keys() <= parameters.keys()
    assert parameters["seq_len"].default is None
    assert parameters["batch_size"].default == config().batch_size


@pytest.mark.parametrize("call", [train, evaluate])
def test_unknown_setting_names_the_nearest_one(call):
    with pytest.raises(InputError, match="no setting 'datasett'; did you mean dataset"):
        call(datasett="x")


def test_word_that_is_like_no_other_gets_no_hint():
    assert did_you_mean("colour", ["--tokens", "--model"]) == ""


def test_config_takes_paths_names_and_round_numbers():
    config = TrainConfig(model="gpt2", corpus=Path("texts"), tokens=1e6, ridge=1, init=Path("x"))
    assert config == TrainConfig(
        ModelConfig("gpt2"), CorpusConfig("texts"), tokens=1_000_000, ridge=1.0, init="x"
    )
    assert type(config.tokens) is int


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": "many"}, "--tokens must be a whole number, got 'many'"),
        ({"tokens": 1.5}, "--tokens must be a whole number, got 1.5"),
        ({"tokens": True}, "--tokens must be a whole number, got True"),
        ({"lr": "big"}, "--lr must be a number, got 'big'"),
        ({"bias_only": 1}, "--bias-only must be true or false, got 1"),
        ({"sites": 3}, "--sites must be text, got 3"),
        ({"model": 3}, "--model must be a ModelConfig, got 3"),
    ],
)
def test_value_of_another_type_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**settings)


def test_train_by_name_gives_the_lens_of_the_config(tiny_folder, text_file, tmp_path):
    config = short_run(tiny_folder, text_file, tokens=400)
    train(config, str(tmp_path / "config"))
    named = {
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)},
        **vars(config.corpus) | {"dataset": text_file},
    }
    named = {name: value for name, value in named.items() if name not in ("model", "corpus")}
    train(load_model(tiny_folder), str(tmp_path / "names"), **named)
    one, other = (tmp_path / name / "lens.safetensors" for name in ("config", "names"))
    assert one.read_bytes() == other.read_bytes()


def test_evaluate_by_path_scores_as_the_config_does(tiny, tiny_folder, saved, text_file):
    config = EvaluateConfig(lenses=saved[1], model=str(tiny_folder), corpus=text_file, tokens=100)
    expected = evaluate(config).results
    assert evaluate(tiny, saved[1], text_file, tokens=100).results == expected
    assert evaluate(str(tiny_folder), saved[1], dataset=text_file, tokens=100).results == expected
    by_name = evaluate(model=tiny, lenses={"tuned": saved[1]}, text=str(text_file), tokens=100)
    assert by_name.results == expected


def test_evaluate_of_a_text_is_the_kl_by_hand(tiny):
    text, lens = "import os\n" * 12, random_lens(tiny)  # longer than the context of 32
    found = evaluate(tiny, [lens, LogitLens.from_model(tiny)], text)
    ids = tiny.encode(text, is_any_length=True)[0]
    count = -(-len(ids) // 32)
    blocks = ids[: len(ids) // count * count].view(count, -1)
    final = tiny.model(blocks).logits[:, :-1].log_softmax(-1)
    own = lens(tiny.residual_stream(blocks)[1], 1)[:, :-1].log_softmax(-1)
    kl = (final.exp() * (final - own)).sum(-1).mean()
    assert count > 1
    assert found.by_layer("tuned", "kl_nats")[1].value == pytest.approx(kl.item(), rel=1e-4)
    assert found.lenses == ["logit", "tuned"]


def test_text_of_one_block_is_shown_without_standard_errors(tiny):
    found = evaluate(tiny, random_lens(tiny), "import os")._repr_html_()
    assert ", 1 block</p>" in found
    assert "standard error" not in found


def test_name_of_a_missing_text_is_not_scored_as_a_text(tiny):
    with pytest.raises(InputError, match="there is no such file or folder"):
        evaluate(tiny, "logit", "missing.txt")


def test_trajectory_reads_lenses_by_their_paths(tiny, saved, tmp_path):
    lens, path = saved
    random_lens(tiny, seed=1).save(tmp_path / "other")
    found = trajectory(tiny, [path, tmp_path / "other", "logit"], "import os")
    assert list(found.predictions) == ["lens", "other", "logit"]
    for name, one in {"lens": lens, "logit": LogitLens.from_model(tiny)}.items():
        same = trajectory(tiny, {"a": one}, "import os")
        assert torch.equal(found.values("kl", name), same.values("kl", "a"))


def test_save_without_a_path_names_the_file_after_the_text(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = trajectory(tiny, None, "import os.path as p\n")
    path = read.save()
    assert path.name.startswith("trajectory-import-os-path-as-p-")
    assert torch.equal(Trajectory.load(path).values("kl"), read.values("kl"))
    assert trajectory(tiny, None, "import os.path as p!").save() != path


def test_unreachable_hub_is_one_line_without_waiting(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"slept {seconds} s"))
    message = r"http://127\.0\.0\.1:9 cannot be reached \(.*\), and the cache has no usable copy$"
    with pytest.raises(InputError, match=f"cannot load the model nobody/x: {message}"):
        load_model("nobody/x")
    with pytest.raises(InputError, match=f"cannot read the dataset nobody/x: {message}"):
        train(dataset="nobody/x", output="unused")
    with pytest.raises(InputError, match=r"nobody/x, and the hub cannot be read: http.* reached"):
        evaluate(None, "nobody/x")


def test_copy_in_the_cache_is_read_without_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_or_cache():
        assert is_offline_mode()
    assert not is_offline_mode()
