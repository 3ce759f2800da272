"""A PEFT adapter that is merged into the model."""

import dataclasses
import json
import sys

import pytest
import torch
from conftest import make_gpt2, short_run

from tunedlens import (
    EvaluateConfig,
    InputError,
    ModelConfig,
    evaluate,
    load_model,
)
from tunedlens.training import train


def make_adapter(folder, **sizes):
    """A LoRA adapter with random weights, and the weights that it adds, by its definition."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    model = peft.get_peft_model(make_gpt2(**sizes), config)
    torch.manual_seed(1)
    added = []
    for block in model.base_model.model.transformer.h:
        layer = block.attn.c_attn
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            down.normal_()
            up.normal_()
            added.append((6 / 2 * up @ down).T.clone())  # GPT-2 stores its weights transposed
    model.save_pretrained(folder)
    return added


def test_adapter_adds_its_product_to_the_weights(tiny_folder, tmp_path):
    added = make_adapter(tmp_path / "adapter")
    base = load_model(tiny_folder, device="cpu")
    model = load_model(tiny_folder, device="cpu", adapter=tmp_path / "adapter")
    for before, after, change in zip(base.blocks, model.blocks, added, strict=True):
        expected = before.attn.c_attn.weight + change
        assert change.abs().max() > 0.1
        torch.testing.assert_close(after.attn.c_attn.weight, expected)
    assert model.identity.fingerprint == base.identity.fingerprint
    assert model.name == f"{tiny_folder} + {tmp_path / 'adapter'}"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert type(model.model) is type(base.model)


def test_lens_of_an_adapted_model_says_so_and_is_scored_on_it(tiny_folder, text_file, tmp_path):
    make_adapter(tmp_path / "adapter")
    adapted = ModelConfig(model=str(tiny_folder), device="cpu", adapter=str(tmp_path / "adapter"))
    config = short_run(tiny_folder, text_file, fit="closed-form", init_tokens=128)
    config = dataclasses.replace(config, model=adapted)
    train(config, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "config.json").read_text())
    name = f"{tiny_folder} + {tmp_path / 'adapter'}"
    assert manifest["model"]["name"] == name
    assert manifest["config"]["model"] == dataclasses.asdict(config.model)
    provenance = evaluate(EvaluateConfig(lenses=(str(tmp_path / "run"),), tokens=60)).provenance
    assert provenance["model"] == name
    recorded = provenance["config"]["model"]
    assert recorded["model"] == str(tiny_folder)
    assert recorded["adapter"] == str(tmp_path / "adapter")
    base = EvaluateConfig(
        lenses=(str(tmp_path / "run"),), tokens=60, model=ModelConfig(model=str(tiny_folder))
    )
    with pytest.warns(UserWarning, match="has other outputs"):
        evaluate(base)


def test_missing_peft_is_one_clear_error(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="--adapter needs peft; install it with: pip install"):
        load_model(tiny_folder, device="cpu", adapter=tmp_path)


def test_a_folder_without_an_adapter_is_refused(tiny_folder):
    pytest.importorskip("peft")
    with pytest.raises(InputError, match=r"not a PEFT adapter: expected adapter_config.json and"):
        load_model(tiny_folder, device="cpu", adapter=tiny_folder)


@pytest.mark.parametrize("sizes", [{"n_embd": 32}, {"n_layer": 2}, {"n_layer": 4}])
def test_an_adapter_of_another_model_is_refused(tiny_folder, tmp_path, sizes):
    make_adapter(tmp_path / "adapter", **sizes)
    with pytest.raises(InputError, match="cannot load the adapter"):
        load_model(tiny_folder, device="cpu", adapter=tmp_path / "adapter")
