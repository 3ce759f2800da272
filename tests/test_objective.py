from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, reference_kl
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tunedlens import FrozenModel, TunedLens
from tunedlens.engine import CappedLensKL, LensKL, distributions
from tunedlens.engine.vocab_sample import VocabSample, draw_sample, inclusion_probabilities
from tunedlens.model import Unembedding

LENS = Path(__file__).parents[1] / "checkpoints" / "embedded"
LENS_TEXT = Path(__file__).read_text()[:1200]
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


@pytest.mark.parametrize("kernel", ["products", "attention"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("chunk", [1, 10, 37, 100])
def test_kl_and_gradient_equal_autograd_in_float64(chunk, norm, bias, kernel):
    translated, final, unembedding = problem(norm, bias=bias)
    weights = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    expected = reference_kl(translated, final, unembedding)
    (expected_gradient,) = torch.autograd.grad(expected @ weights, translated)
    kl = LensKL(unembedding, dtype=torch.float64, kernel=kernel, chunk=chunk)
    actual = kl(translated, final)
    (gradient,) = torch.autograd.grad(actual @ weights, translated)
    # Llama's norm goes through float32 whatever it is given.
    tolerance = 1e-5 if norm.startswith("Llama") else 1e-10
    assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)
    assert torch.allclose(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("chunk", [1, 10, 100])
def test_kl_with_a_cap_and_its_gradient_equal_autograd_in_float64(chunk, norm, bias):
    translated, final, unembedding = problem(norm, bias=bias)
    unembedding = Unembedding(unembedding.norm, unembedding.weight, unembedding.bias, cap=2.0)
    expected = reference_kl(translated, final, unembedding)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), translated)
    kl = CappedLensKL(unembedding.centred(), chunk=chunk)
    actual = kl(translated, final)
    (gradient,) = torch.autograd.grad(actual.sum(), translated)
    assert torch.allclose(actual, expected, rtol=1e-10)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    exact = kl.kl(translated[0].detach(), kl.model_side(final)).mean()
    assert torch.allclose(exact, expected[0], rtol=1e-10)
    uncapped = Unembedding(unembedding.norm, unembedding.weight, unembedding.bias)
    assert not torch.allclose(expected, reference_kl(translated, final, uncapped), rtol=0.01)


def test_reference_kl_is_the_divergence_of_torch_distributions():
    translated, final, unembedding = problem()
    model = torch.distributions.Categorical(logits=unembedding(final))
    lens = torch.distributions.Categorical(logits=unembedding(translated))
    expected = torch.distributions.kl_divergence(model, lens).mean(1)
    assert torch.allclose(reference_kl(translated, final, unembedding), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kl_of_the_final_state_itself_is_zero_and_so_is_its_gradient(dtype):
    _, final, unembedding = problem()
    if dtype != torch.float64:
        final, unembedding = final.float(), unembedding.float()
    translated = final[None].clone().requires_grad_()
    kl = LensKL(unembedding, dtype=dtype)(translated, final)
    kl.sum().backward()
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-3}[dtype]
    assert abs(kl.item()) < tolerance
    assert translated.grad.abs().max() < tolerance


def test_without_a_gradient_the_figures_are_the_same():
    translated, final, unembedding = problem()
    kl = LensKL(unembedding, dtype=torch.float64)
    with torch.no_grad():
        without = kl(translated, final)
        quick = [kl.kl(layer, kl.model_side(final)).mean() for layer in translated]
    assert torch.equal(without, kl(translated, final).detach())
    assert torch.equal(torch.stack(quick), without)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_halves_the_chunk_and_loses_nothing(monkeypatch, error):
    original, refused = torch.softmax, []

    def short_of_memory(logits, *args, **options):
        if len(logits) > 5:
            refused.append(len(logits))
            raise error("DefaultCPUAllocator: can't allocate memory")
        return original(logits, *args, **options)

    monkeypatch.setattr(torch, "softmax", short_of_memory)
    translated, final, unembedding = problem()
    kl = LensKL(unembedding, dtype=torch.float64, chunk=16)
    with pytest.warns(UserWarning, match="out of memory: continuing with chunks of 4 tokens"):
        actual = kl(translated, final)
    (gradient,) = torch.autograd.grad(actual.sum(), translated)
    expected = reference_kl(translated, final, unembedding)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), translated)
    assert refused == [16, 8]
    assert kl.chunk == 4
    assert torch.allclose(actual, expected, rtol=1e-10)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    monkeypatch.setattr(torch, "softmax", lambda *_, **__: 1 / 0)
    translated, final, unembedding = problem()
    with pytest.raises(ZeroDivisionError):
        LensKL(unembedding)(translated, final)


def test_centred_unembedding_changes_no_divergence(tokenizer):
    model = FrozenModel(make_gpt2(), tokenizer)
    hidden = torch.randn(5, 16)
    raw, centred = model.unembedding(hidden), model.unembedding.centred()(hidden)
    log_probs = [distributions.log_probs(logits) for logits in (raw, centred)]
    assert distributions.kl_divergence(*log_probs).abs().max() < 1e-6
    assert centred.mean(-1).abs().max() < 1e-4 < raw.mean(-1).abs().max()


def naive_bfloat16(translated, final, unembedding):
    """What anyone would write: bfloat16 products, autograd through all logits."""

    def log_probs(hidden):
        normed = unembedding.norm(hidden).bfloat16()
        return distributions.log_probs(normed @ unembedding.weight.bfloat16().T)

    kl = [distributions.kl_divergence(log_probs(final), log_probs(one)) for one in translated]
    return torch.stack(kl).mean(1)


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


def q_minus_p_in_bfloat16(translated, final, unembedding):
    """The gradient by the older form: q - p in bfloat16, times the unembedding."""
    weight = unembedding.weight.bfloat16()

    def log_probs(normed):
        return (normed.bfloat16() @ weight.T).float().log_softmax(-1)

    normed = unembedding.norm(translated.detach()).requires_grad_()
    probs = log_probs(unembedding.norm(final)).exp()
    return ((log_probs(normed).exp() - probs).bfloat16() @ weight).float().detach()


def test_bfloat16_gradient_is_no_further_from_the_truth_than_q_minus_p_where_lens_is_near_model():
    for distance in (1.0, 0.3, 0.1, 0.03):
        _, final, unembedding = problem("RMSNorm", tokens=300, d_model=64, vocab=2000)
        with torch.no_grad():
            unembedding.weight.div_(4)
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(final.shape, generator=generator, dtype=torch.float64)
        # The norm is left out, so that gradients are compared where the two forms differ.
        unembedding.norm = nn.Identity()
        translated = (final + distance * noise)[None].requires_grad_()
        truth = reference_kl(translated, final, unembedding)
        (true_gradient,) = torch.autograd.grad(truth.sum() * len(final), translated)
        low = unembedding.float()
        kl = LensKL(low, dtype=torch.bfloat16)
        _, ours = kl.gradient(translated[0].detach().float(), kl.model_side(final.float()))
        older = q_minus_p_in_bfloat16(translated[0].float(), final.float(), low)
        assert (ours - true_gradient[0]).norm() < (older - true_gradient[0]).norm()


def test_inclusion_probabilities_add_up_and_are_capped():
    usage = torch.tensor([100.0, 4.0, 1.0, 1.0, 0.25, 0.0, 0.0, 0.0])
    probabilities = inclusion_probabilities(usage, 4)
    assert probabilities.sum() == pytest.approx(4)
    assert probabilities[0] == 1
    assert 0 < probabilities[5] < probabilities[4] < probabilities[2] == probabilities[3] < 1
    # Below the cap they are as the roots of the usage, but for the uniform share.
    large = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    probabilities = inclusion_probabilities(large, 50)
    expected = 50 * (0.98 * large.double().sqrt() / large.double().sqrt().sum() + 0.02 / 1000)
    assert torch.allclose(probabilities, expected)


@pytest.mark.parametrize("size", [50, 60, 1000])
def test_a_sample_as_large_as_the_vocabulary_is_all_of_it(size):
    usage = torch.rand(50, generator=torch.Generator().manual_seed(0))
    sample = draw_sample(usage, size, seed=0, step=0)
    assert sample.ids.tolist() == list(range(50))
    assert not sample.log_inclusion.any()


def test_a_sample_depends_on_seed_and_step_alone():
    usage = torch.rand(500, generator=torch.Generator().manual_seed(0))
    one = draw_sample(usage, 50, seed=3, step=7)
    torch.rand(10)
    assert torch.equal(one.ids, draw_sample(usage, 50, seed=3, step=7).ids)
    # Rounding of the usage, as another number of processes makes, leaves it as it is.
    assert torch.equal(one.ids, draw_sample(usage * (1 + 1e-7), 50, seed=3, step=7).ids)
    assert not torch.equal(one.ids, draw_sample(usage, 50, seed=3, step=8).ids)
    assert not torch.equal(one.ids, draw_sample(usage, 50, seed=4, step=7).ids)


def sampled_problem(vocab=400):
    """Normed states, the model's squared probabilities, an unembedding with a bias."""
    translated, final, unembedding = problem(tokens=5, d_model=6, vocab=vocab, bias=True)
    translated, final = 0.4 * translated, 0.4 * final
    unembedding.norm = nn.Identity()
    kl = LensKL(unembedding, dtype=torch.float64)
    usage = torch.zeros(vocab, dtype=torch.float64)
    model = kl.model_side(final, usage)
    return translated[0].detach(), unembedding, kl, model, usage


def test_unnormalised_sums_over_samples_average_to_the_exact_ones():
    hidden, unembedding, _, _, usage = sampled_problem()
    weights = unembedding(hidden).exp()
    exact = torch.cat([weights.sum(-1, keepdim=True), weights @ unembedding.weight], -1)
    found = []
    for step in range(1000):
        ids, log_inclusion = draw_sample(usage, 80, seed=0, step=step)
        part = weights[:, ids] / log_inclusion.exp()
        found.append(torch.cat([part.sum(-1, keepdim=True), part @ unembedding.weight[ids]], -1))
    draws = torch.stack(found)
    z = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < 4.5  # of 35 figures; without the correction they are above 100


def test_bias_of_the_sampled_gradient_falls_as_one_over_the_size():
    hidden, _, kl, model, usage = sampled_problem(vocab=2000)
    exact_kl, exact_gradient = kl.gradient(hidden, model)
    bias_of_kl, bias_of_gradient = [], []
    for size in (50, 100, 200):
        draws = [
            kl.gradient(hidden, model, kl.keys(draw_sample(usage, size, seed=size, step=step)))
            for step in range(2000)
        ]
        bias_of_kl.append((torch.stack([d[0] for d in draws]).mean(0) - exact_kl).mean().item())
        mean = torch.stack([d[1] for d in draws]).mean(0)
        # Noise is as likely to point along the gradient as against it.
        along = exact_gradient / exact_gradient.norm()
        bias_of_gradient.append(((mean - exact_gradient) * along).sum().item())
    for bias in (bias_of_kl, bias_of_gradient):
        assert bias[0] / bias[1] == pytest.approx(2, abs=0.7)
        assert bias[1] / bias[2] == pytest.approx(2, abs=0.7)


def test_a_sample_of_everything_gives_the_exact_gradient():
    hidden, _, kl, model, _ = sampled_problem()
    everything = VocabSample(torch.arange(400), torch.zeros(400, dtype=torch.float64))
    exact, sampled = kl.gradient(hidden, model), kl.gradient(hidden, model, kl.keys(everything))
    for one, other in zip(exact, sampled, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_model_side_adds_up_squared_probabilities():
    _, final, unembedding = problem(bias=True)
    usage = torch.zeros(50, dtype=torch.float64)
    LensKL(unembedding, dtype=torch.float64, chunk=10).model_side(final, usage)
    expected = unembedding(final).softmax(-1).square().sum(0)
    assert torch.allclose(usage, expected, rtol=1e-12)


def test_bfloat16_gradient_is_nearer_to_the_truth_than_q_minus_p_at_every_layer_of_a_lens(model):
    lens = TunedLens.load(LENS, model)
    states = [state[0] for state in model.residual_stream(LENS_TEXT)]
    unembedding = model.unembedding.centred()
    kl = LensKL(unembedding, dtype=torch.bfloat16)
    side = kl.model_side(states[-1])
    # Without the norm's own gradient, as the two forms differ before it.
    exact = unembedding.weight.double()
    probs = (unembedding.norm(states[-1]).double() @ exact.T).softmax(-1)
    for layer in range(lens.n_layers):
        with torch.no_grad():
            normed = unembedding.norm(lens.transform_hidden(states[layer], layer))
            truth = ((normed.double() @ exact.T).softmax(-1) - probs) @ exact
            bare = Unembedding(nn.Identity(), unembedding.weight, None)
            ours = LensKL(bare, dtype=torch.bfloat16).gradient(normed, side)[1]
            older = q_minus_p_in_bfloat16(normed, unembedding.norm(states[-1]), bare)
        assert (ours - truth).norm() < (older - truth).norm()
