import pytest
import torch
from conftest import make_gpt2
from torch import nn

from tunedlens import FrozenModel, metrics
from tunedlens.frozen import Unembedding
from tunedlens.objective import lens_kl


def problem(layers=3, tokens=37, d_model=12, vocab=50, dtype=torch.float64, bias=False):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    norm = nn.LayerNorm(d_model)
    with torch.no_grad():
        norm.weight.copy_(random(d_model))
        norm.bias.copy_(random(d_model))
    unembedding = Unembedding(norm, random(vocab, d_model), random(vocab) if bias else None)
    return random(layers, tokens, d_model).requires_grad_(), random(tokens, d_model), unembedding


def plain(translated, final, unembedding):
    """The definition, through autograd and with all logits in memory."""

    def logits(hidden):
        bias = unembedding.bias
        product = unembedding.norm(hidden) @ unembedding.weight.T
        return product if bias is None else product + bias

    model_logits = logits(final)
    return torch.stack(
        [metrics.kl_divergence(model_logits, logits(layer)).mean() for layer in translated]
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 10, 37, 100])
def test_lens_kl_and_gradient_equal_autograd_in_float64(chunk, bias):
    translated, final, unembedding = problem(bias=bias)
    weights = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    expected = plain(translated, final, unembedding)
    (expected_gradient,) = torch.autograd.grad(expected @ weights, translated)
    actual = lens_kl(translated, final, unembedding, dtype=torch.float64, chunk=chunk)
    (gradient,) = torch.autograd.grad(actual @ weights, translated)
    assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_lens_kl_of_the_final_state_itself_is_zero_with_no_gradient():
    _, final, unembedding = problem()
    translated = final[None].clone().requires_grad_()
    kl = lens_kl(translated, final, unembedding, dtype=torch.float64)
    kl.sum().backward()
    assert kl.item() == pytest.approx(0.0, abs=1e-12)
    assert translated.grad.abs().max() < 1e-12


def test_centred_unembedding_changes_no_divergence(tokenizer):
    model = FrozenModel(make_gpt2(), tokenizer)
    hidden = torch.randn(5, 16)
    raw, centred = model.unembedding(hidden), model.unembedding.centred()(hidden)
    assert metrics.kl_divergence(raw, centred).abs().max() < 1e-6
    assert centred.mean(-1).abs().max() < 1e-4 < raw.mean(-1).abs().max()


def test_bfloat16_products_stay_near_the_float64_truth():
    translated, final, unembedding = problem(tokens=200, vocab=400)
    truth = plain(translated, final, unembedding)
    low = unembedding.float().centred()
    actual = lens_kl(translated.float(), final.float(), low, dtype=torch.bfloat16)
    assert torch.allclose(actual.double(), truth, rtol=0.01)
