"""Quantised models: every weight is read through its module."""

import pytest
import torch
from conftest import SMALL, random_lens, short_run
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tunedlens import FrozenModel, InputError, load_model, score_lenses
from tunedlens.model import count_weights, is_quantised
from tunedlens.training import loop, train

IDS = torch.tensor([[5, 7, 11, 13], [17, 19, 23, 29]])


class Packed(nn.Module):
    """A linear map whose weights are 8-bit integers, two to an element, with a scale per row."""

    def __init__(self, linear, input_bits=None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.input_bits = input_bits
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        values = (linear.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter(values.view(torch.int16), requires_grad=False)

    def forward(self, hidden):
        if self.input_bits is not None:
            step = hidden.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 2**self.input_bits
            hidden = (hidden / step).round() * step
        return hidden @ (self.weight.view(torch.int8) * self.scale).T


def make_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(initializer_range=0.3, **SMALL | {"hidden_size": 64}))


@pytest.fixture
def packed():
    """A model whose MLPs and head are packed."""
    llama = make_llama()
    for block in llama.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(block.mlp, name, Packed(getattr(block.mlp, name)))
    llama.lm_head = Packed(llama.lm_head)
    return llama


def test_unembedding_of_a_quantised_head_is_dequantised(packed, tokenizer):
    model = FrozenModel(packed, tokenizer)
    expected = packed.lm_head.weight.view(torch.int8) * packed.lm_head.scale
    torch.testing.assert_close(model.unembedding.weight, expected)
    logits = model.unembedding(model.residual_stream(IDS)[-1])
    torch.testing.assert_close(logits, packed(IDS).logits, rtol=1e-4, atol=1e-3)


def test_head_that_rounds_its_inputs_is_refused(packed, tokenizer):
    packed.lm_head.input_bits = 7
    with pytest.raises(InputError, match="a quantised Packed, rounds its inputs as well"):
        FrozenModel(packed, tokenizer)


def test_weights_are_counted_as_before_they_were_packed(packed):
    expected = sum(parameter.numel() for parameter in make_llama().model.layers.parameters())
    assert count_weights(packed.model.layers) == expected
    assert count_weights(make_llama().model.layers) == expected
    assert is_quantised(packed.model.layers)
    assert not is_quantised(make_llama())


def test_neurons_of_a_quantised_mlp_are_refused(packed, tokenizer):
    with pytest.raises(InputError, match=r"the MLP of block 0 of .* is not a sum"):
        FrozenModel(packed, tokenizer, name="packed").mlp_neurons(IDS, 0)


def test_adapter_and_half_precision_of_a_quantised_model_are_refused(
    packed, tiny_folder, monkeypatch
):
    found = (packed, {"missing_keys": set()})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: found)
    for settings, flag in (({"adapter": "x"}, "--adapter"), ({"dtype": "float16"}, "--dtype")):
        with pytest.raises(InputError, match=f"is quantised, and {flag}.* changes weights"):
            load_model(tiny_folder, device="cpu", **settings)


def int8_of_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    model = make_llama()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def int8_of_quanto():
    quanto = pytest.importorskip("optimum.quanto")
    model = make_llama()
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def nf4_of_bitsandbytes():
    layers = pytest.importorskip("bitsandbytes").nn
    model = make_llama()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                packed = layers.LinearNF4(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.float32
                )
                packed.load_state_dict(child.state_dict())
                setattr(parent, name, packed.to("cpu"))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [int8_of_torchao, int8_of_quanto, nf4_of_bitsandbytes])
def test_lens_of_a_quantised_model_is_trained(make, tokenizer, text_file, tmp_path, monkeypatch):
    model = FrozenModel(make(), tokenizer, name="tiny")
    assert is_quantised(model.blocks)
    assert count_weights(model.blocks) == count_weights(make_llama().model.layers)
    logits = model.unembedding(model.residual_stream(IDS)[-1])
    torch.testing.assert_close(logits, model.model(IDS).logits, rtol=1e-3, atol=1e-2)
    assert score_lenses(model, {"tuned": random_lens(model)}, IDS).tokens == 6
    monkeypatch.setattr(loop, "load_configured", lambda *_: model)
    config = short_run("tiny", text_file, tokens=640, init_tokens=128, precision="bf16")
    evaluation = train(config, tmp_path / "run")
    logit, tuned = (evaluation.of_lens(lens, "kl_nats").value for lens in ("logit", "tuned"))
    assert tuned < logit
