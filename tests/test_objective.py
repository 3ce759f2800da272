import pytest
import torch
from conftest import make_gpt2
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tunedlens import FrozenModel, metrics, objective
from tunedlens.frozen import Unembedding
from tunedlens.fused import can_compile
from tunedlens.objective import LensKL, reference_kl

NORMS = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm, "Llama's RMSNorm": LlamaRMSNorm}


def problem(norm="LayerNorm", layers=3, tokens=37, d_model=12, vocab=50, bias=False):
    """Translated states, the final one, and an unembedding, all random and in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    module = NORMS[norm](d_model).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(random(d_model))
    unembedding = Unembedding(module, random(vocab, d_model), random(vocab) if bias else None)
    return random(layers, tokens, d_model).requires_grad_(), random(tokens, d_model), unembedding


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("chunk", [1, 10, 37, 100])
def test_kl_and_gradient_equal_autograd_in_float64(chunk, norm, bias):
    translated, final, unembedding = problem(norm, bias=bias)
    weights = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    expected = reference_kl(translated, final, unembedding)
    (expected_gradient,) = torch.autograd.grad(expected @ weights, translated)
    actual = LensKL(unembedding, dtype=torch.float64, chunk=chunk)(translated, final)
    (gradient,) = torch.autograd.grad(actual @ weights, translated)
    # Llama's norm goes through float32 whatever it is given.
    tolerance = 1e-5 if norm.startswith("Llama") else 1e-10
    assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)
    assert torch.allclose(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


def test_reference_kl_is_the_divergence_of_torch_distributions():
    translated, final, unembedding = problem()
    model = torch.distributions.Categorical(logits=unembedding(final))
    lens = torch.distributions.Categorical(logits=unembedding(translated))
    expected = torch.distributions.kl_divergence(model, lens).mean(1)
    assert torch.allclose(reference_kl(translated, final, unembedding), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kl_of_the_final_state_itself_is_exactly_zero(dtype):
    _, final, unembedding = problem()
    if dtype != torch.float64:
        final, unembedding = final.float(), unembedding.float()
    translated = final[None].clone().requires_grad_()
    kl = LensKL(unembedding, dtype=dtype)(translated, final)
    kl.sum().backward()
    assert kl.item() == 0.0
    assert not translated.grad.any()


def test_without_a_gradient_the_figures_are_the_same():
    translated, final, unembedding = problem()
    kl = LensKL(unembedding, dtype=torch.float64)
    with torch.no_grad():
        quick = kl(translated, final)
    assert torch.equal(quick, kl(translated, final).detach())


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")
def test_compiled_it_gives_the_same():
    translated, final, unembedding = problem(bias=True)
    expected = LensKL(unembedding, dtype=torch.float64, chunk=10)(translated, final)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), translated)
    compiled = LensKL(unembedding, dtype=torch.float64, chunk=10, compiled=True)
    actual = compiled(translated, final)
    (gradient,) = torch.autograd.grad(actual.sum(), translated)
    assert torch.allclose(actual, expected, rtol=1e-10)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_where_compiling_fails_it_goes_on_without(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    translated, final, unembedding = problem()
    with pytest.warns(UserWarning, match="going on without: no compiler here"):
        actual = LensKL(unembedding, dtype=torch.float64, compiled=True)(translated, final)
    assert torch.allclose(actual, reference_kl(translated, final, unembedding), rtol=1e-10)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_halves_the_chunk_and_loses_nothing(monkeypatch, error):
    original, refused = objective._lens_side, []

    def short_of_memory(logits, *args):
        if len(logits) > 5:
            refused.append(len(logits))
            raise error("DefaultCPUAllocator: can't allocate memory")
        return original(logits, *args)

    monkeypatch.setattr(objective, "_lens_side", short_of_memory)
    translated, final, unembedding = problem()
    kl = LensKL(unembedding, dtype=torch.float64, chunk=16)
    with pytest.warns(UserWarning, match="out of memory: going on with 4 tokens at a time"):
        actual = kl(translated, final)
    (gradient,) = torch.autograd.grad(actual.sum(), translated)
    expected = reference_kl(translated, final, unembedding)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), translated)
    assert refused == [16, 8]
    assert kl.chunk == 4
    assert torch.allclose(actual, expected, rtol=1e-10)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    monkeypatch.setattr(objective, "_lens_side", lambda *_: 1 / 0)
    translated, final, unembedding = problem()
    with pytest.raises(ZeroDivisionError):
        LensKL(unembedding)(translated, final)


def test_centred_unembedding_changes_no_divergence(tokenizer):
    model = FrozenModel(make_gpt2(), tokenizer)
    hidden = torch.randn(5, 16)
    raw, centred = model.unembedding(hidden), model.unembedding.centred()(hidden)
    assert metrics.kl_divergence(raw, centred).abs().max() < 1e-6
    assert centred.mean(-1).abs().max() < 1e-4 < raw.mean(-1).abs().max()


def naive_bfloat16(translated, final, unembedding):
    """What anyone would write: bfloat16 products, autograd through all logits."""

    def logits(hidden):
        normed = unembedding.norm(hidden).bfloat16()
        return (normed @ unembedding.weight.bfloat16().T).float()

    return torch.stack(
        [metrics.kl_divergence(logits(final), logits(layer)).mean() for layer in translated]
    )


def test_bfloat16_is_nearer_to_the_truth_than_plain_autograd_on_logits_like_gpt2s():
    translated, final, unembedding = problem(tokens=400, d_model=64, vocab=1000)
    with torch.no_grad():
        # A direction that the norm always puts in, and that every token reads: mean -60.
        unembedding.norm.bias.zero_()
        unembedding.norm.bias[0] = 8.0
        unembedding.weight.div_(4)
        unembedding.weight[:, 0] -= 60 / 8
    assert unembedding(final).mean() == pytest.approx(-60, abs=2)
    truth = reference_kl(translated, final, unembedding)
    (true_gradient,) = torch.autograd.grad(truth.sum(), translated)
    low = [translated.detach().float().requires_grad_(), final.float()]
    naive = naive_bfloat16(*low, unembedding.float())
    (naive_gradient,) = torch.autograd.grad(naive.sum(), low[0])
    ours = LensKL(unembedding.float().centred(), dtype=torch.bfloat16)(*low)
    (our_gradient,) = torch.autograd.grad(ours.sum(), low[0])
    assert (ours - truth).abs().max() < (naive - truth).abs().max()
    assert (our_gradient - true_gradient).norm() < (naive_gradient - true_gradient).norm() / 2
    assert torch.allclose(ours.double(), truth, rtol=1e-3)
