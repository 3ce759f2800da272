"""Weights that are divided among processes give the numbers of a whole model."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from architectures import ARCHITECTURES, make_model
from conftest import in_two_processes, make_llama, short_run, write_text
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from tunedlens import (
    CacheSettings,
    EvaluateConfig,
    Evaluation,
    InputError,
    ModelConfig,
    builtin,
    evaluate,
    load_model,
    report,
    train,
)
from tunedlens.checkpoint import read_manifest, saved_config
from tunedlens.cli import evaluate_command, train_command
from tunedlens.model import fsdp
from tunedlens.sampling import sample_documents

ROOT = Path(__file__).parents[1]
IDS = torch.arange(24).view(2, 12) * 167 % 4096
RUNS = {
    "steps": {"micro_batch_size": 1},
    "a sample of the vocabulary": {"vocab_sample": 400},
    "closed form": {"fit": "closed-form", "tokens": None},
    "sgd at two sites": {"fit": "sgd", "sites": "resid_mid"},
    "no block for one": {"batch_size": 1, "micro_batch_size": None},
    "layers divided": {"shard_layers": True, "micro_batch_size": 1},
    "layers divided, no block for one": {"shard_layers": True, "batch_size": 1},
}


def _save(folder, **settings):
    make_llama(3, **settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(builtin.FOLDER).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return _save(tmp_path_factory.mktemp("llama"))


def _seen(folder, is_divided):
    """What a model gives."""
    model = load_model(folder, device="cpu", fsdp=is_divided)
    parts = [
        part.to_local() if isinstance(part, DTensor) else part for part in model.blocks.parameters()
    ]
    states = model.residual_stream(IDS)
    return {
        "identity": dataclasses.asdict(model.identity),
        "numbers in blocks": sum(part.numel() for part in parts),
        "states": torch.stack(states).tolist(),
        "logits": model.unembedding(states[-1]).tolist(),
        "neurons": [part.tolist() for part in model.mlp_neurons(IDS, 1)],
        "sampled": sample_documents(model, 100, 8),
    }


def _both_seen(folders, is_divided):
    return [_seen(folder, is_divided) for folder in folders]


def test_divided_models_are_the_models(llama, tmp_path):
    folders = [llama, _save(tmp_path, tie_word_embeddings=True)]
    alone = _both_seen(folders, False)
    whole = [seen.pop("numbers in blocks") for seen in alone]
    for seen in in_two_processes(_both_seen, folders, True):
        assert [one.pop("numbers in blocks") for one in seen] == [count / 2 for count in whole]
        assert seen == alone


def _states(folders, is_divided):
    """The states of models, or why they are refused."""
    found = []
    for folder in folders:
        try:
            model = load_model(folder, device="cpu", fsdp=is_divided)
        except InputError as error:
            found.append(str(error))
        else:
            found.append(torch.stack(model.residual_stream(IDS)).tolist())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(ARCHITECTURES), 10))
def test_architecture_is_divided_or_refused(first, tokenizer, tmp_path):
    some = ARCHITECTURES[first : first + 10]
    folders = [tmp_path / architecture.name for architecture in some]
    for architecture, folder in zip(some, folders, strict=True):
        make_model(architecture).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    alone, two = _states(folders, False), in_two_processes(_states, folders, True)
    assert any(not isinstance(states, str) for states in two[0])
    for found in two:
        for folder, states, expected in zip(folders, found, alone, strict=True):
            if folder.name == "falcon_h1":
                assert "leaves model.layers.0.mamba.mup_vector without values" in states
            elif isinstance(states, str):
                assert "transformers has no plan for the blocks of" in states
            else:
                assert states == expected


def _kl(evaluation):
    return {(r.lens, r.layer): r.value for r in evaluation.results if r.metric == "kl_nats"}


def _error(compute):
    with pytest.raises(InputError) as caught:
        compute()
    return str(caught.value)


def _train_and_evaluate(folder, text, output, is_divided, lens):
    """The held-out KL of all runs, and an evaluation whose last batch is that of one process."""
    model, found = ModelConfig(str(folder), device="cpu", fsdp=is_divided), {}
    common = {"model": model, "tokens": 640, "init_tokens": 128, "batch_size": 5}
    for name, settings in RUNS.items():
        config = dataclasses.replace(short_run(folder, text), **common | settings)
        found[name] = _kl(train(config, output / name))
    lenses = (str(lens), "mean")
    scored = evaluate(EvaluateConfig(165, batch_size=5, lenses=lenses, model=model))
    found["evaluation"] = [(r.lens, r.layer, r.metric, r.value) for r in scored.results]
    return found


def _refused(folder, text, output):
    model = ModelConfig(str(folder), device="cpu", fsdp=True)
    config = dataclasses.replace(short_run(folder, text), model=model)
    loaded = load_model(folder, device="cpu", fsdp=True)
    return [
        _error(lambda: train(dataclasses.replace(config, fit="jacobian"), output / "jacobian")),
        _error(lambda: train(config, output / "cached", cache=CacheSettings(output / "states"))),
        _error(lambda: loaded.residual_stream(IDS, differentiable=True)),
    ]


@pytest.fixture(scope="module")
def outputs(llama, tmp_path_factory):
    """What one process finds and what each of two finds, with the folders of their runs."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    alone = _train_and_evaluate(llama, text, one, False, one / "steps")
    shared = in_two_processes(_train_and_evaluate, llama, text, two, True, one / "steps")
    return alone, shared, one, two


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_lens_of_a_divided_model_is_that_of_the_model(name, outputs):
    alone, shared, one, two = outputs
    for found in shared:
        assert found[name] == pytest.approx(alone[name], rel=1e-5)
    expected, actual = (load_file(folder / name / "lens.safetensors") for folder in (one, two))
    for key, value in expected.items():
        assert (actual[key] - value).norm() <= 1e-5 * value.norm()


@pytest.mark.slow
def test_evaluation_of_a_divided_model_is_that_of_the_model(outputs):
    alone, shared, _, _ = outputs
    assert len(alone["evaluation"]) > 50
    for found in shared:
        for (*place, value), (*expected_place, expected) in zip(
            found["evaluation"], alone["evaluation"], strict=True
        ):
            assert place == expected_place
            assert value == pytest.approx(expected, rel=1e-8, abs=1e-8)


@pytest.mark.slow
def test_run_of_a_divided_model_goes_on_in_one_process(outputs, tmp_path):
    *_, one, two = outputs
    extended = []
    for folder in (one, two):
        run = shutil.copytree(folder / "steps", tmp_path / folder.name)
        saved = saved_config(run)
        whole = dataclasses.replace(saved.model, fsdp=False)
        config = dataclasses.replace(saved, model=whole, tokens=1280)
        extended.append(_kl(train(config, run, resume=True)))
    assert extended[0] == pytest.approx(extended[1], rel=1e-5)


@pytest.mark.slow
def test_what_a_divided_model_cannot_do_is_refused(llama, text_file, tmp_path):
    for found in in_two_processes(_refused, llama, text_file, tmp_path):
        for error in found:
            assert "--fsdp" in error


def test_one_process_has_nothing_to_divide_a_model_among(llama):
    with pytest.raises(InputError, match=r"there is one \(torchrun starts several\)"):
        load_model(llama, device="cpu", fsdp=True)


def test_model_that_cannot_be_divided_is_refused(llama, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fsdp, "join_processes", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(InputError, match="no plan for the blocks of GPT2LMHeadModel; --device-map"):
        load_model(tiny_folder, device="cpu", fsdp=True)
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="are quantised"):
        load_model(tmp_path, device="cpu", fsdp=True)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"device_map": "auto"}, "--device-map"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"adapter": "adapter"}, "--adapter"),
        ({"device": "meta"}, "--device meta"),
    ],
)
def test_setting_that_excludes_division_is_refused(llama, settings, flag):
    with pytest.raises(InputError, match=f"--fsdp does not work with {flag}; leave"):
        load_model(llama, fsdp=True, **settings)


@pytest.mark.slow
def test_commands_of_three_processes_agree_with_those_of_one(llama, text_file, tmp_path):
    run = ["--model", str(llama), "--dataset", str(text_file), "--device", "cpu"]
    run += ["--seq-len", "16", "--tokens", "640", "--init-tokens", "128", "--batch-size", "5"]
    run += ["--micro-batch-size", "1", "--precision", "fp32", "--kernel", "products"]
    lens = ["--device", "cpu", "--lens", str(tmp_path / "run"), "--output"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    for command in (
        ["train.py", *run, "--output", str(tmp_path / "run"), "--fsdp", "--shard-layers"],
        ["evaluate.py", *lens, str(tmp_path / "three"), "--tokens", "200", "--fsdp"],
    ):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*launch, *command], check=True, cwd=ROOT, env=environment)
    train_command([*run, "--output", str(tmp_path / "alone")])
    evaluate_command([*lens, str(tmp_path / "one"), "--tokens", "200"])
    tables = [read_manifest(tmp_path / name)["held_out"] for name in ("run", "alone")]
    trained = [_kl(Evaluation.from_json(table)) for table in tables]
    assert trained[0] == pytest.approx(trained[1], rel=1e-5)
    scored = [report.read_evaluation(tmp_path / name).results for name in ("three", "one")]
    for three, one in zip(*scored, strict=True):
        assert three.value == pytest.approx(one.value, rel=1e-8, abs=1e-8)
