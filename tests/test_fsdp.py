"""Weights that are divided among processes give the numbers of a whole model."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import in_two_processes, make_llama, short_run, write_text
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from tunedlens import (
    CacheSettings,
    EvaluateConfig,
    InputError,
    ModelConfig,
    builtin,
    evaluate,
    load_model,
    train,
)
from tunedlens.model import fsdp
from tunedlens.sampling import sample_documents

IDS = torch.arange(24).view(2, 12) * 167 % 4096
RUNS = {
    "steps": {},
    "a sample of the vocabulary": {"vocab_sample": 400},
    "closed form": {"fit": "closed-form", "tokens": None},
    "sgd at two sites": {"fit": "sgd", "sites": "resid_mid"},
    "no block for one": {"batch_size": 1, "micro_batch_size": None},
    "layers divided": {"shard_layers": True},
    "layers divided, no block for one": {"shard_layers": True, "batch_size": 1},
}


def _model(folder, is_divided):
    return ModelConfig(str(folder), device="cpu", fsdp=is_divided)


def _save(folder, **settings):
    make_llama(3, **settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(builtin.FOLDER).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return _save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return _save(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


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


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_divided_model_is_the_model(name, request):
    folder = request.getfixturevalue(name)
    alone = _seen(folder, False)
    whole = alone.pop("numbers in blocks")
    for seen in in_two_processes(_seen, folder, True):
        assert seen.pop("numbers in blocks") == whole / 2
        assert seen == alone


def _error(compute):
    with pytest.raises(InputError) as caught:
        compute()
    return str(caught.value)


def _train_and_evaluate(folder, text, output, is_divided):
    """The held-out KL of all runs, an evaluation with more batches in one process, and errors."""
    model, found = ModelConfig(str(folder), device="cpu", fsdp=is_divided), {}
    common = {"model": model, "tokens": 640, "init_tokens": 128, "batch_size": 5}
    for name, settings in RUNS.items():
        config = dataclasses.replace(short_run(folder, text), **common | settings)
        table = train(config, output / name)
        found[name] = {(r.lens, r.layer): r.value for r in table.results if r.metric == "kl_nats"}
    lenses = (str(output / "steps"), "mean")
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
