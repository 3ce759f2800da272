import math

import numpy as np
import pytest
import torch

from tunedlens import metrics
from tunedlens.metrics import Estimate, RatioSums


def distributions(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "random":
        return torch.randn(2, 7, 11, generator=generator, dtype=torch.float64) * 2
    if kind == "peaked":
        return torch.randn(2, 7, 11, generator=generator, dtype=torch.float64) * 40
    return torch.randn(2, 7, 11, generator=generator, dtype=torch.float64) - 70  # GPT-2's size


@pytest.mark.parametrize("kind", ["random", "peaked", "shifted"])
def test_kl_divergence_equals_torch_distributions_in_float64(kind):
    p, q = distributions(kind)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    assert torch.allclose(metrics.kl_divergence(p, q), expected, rtol=1e-10, atol=1e-12)


def test_kl_divergence_of_a_distribution_with_itself_is_exactly_zero():
    p, _ = distributions("peaked")
    assert torch.equal(metrics.kl_divergence(p.float(), p.float()), torch.zeros(7))


def test_kl_divergence_ignores_tokens_that_the_model_rules_out():
    p = torch.tensor([0.0, 0.0, -math.inf])
    q = torch.tensor([0.0, 0.0, 0.0])
    assert metrics.kl_divergence(p, q).item() == pytest.approx(math.log(3 / 2))


def test_kl_divergence_is_infinite_where_the_lens_rules_out_what_the_model_says():
    p, q = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -math.inf])
    assert metrics.kl_divergence(p, q).item() == math.inf


def test_kl_divergence_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(5,\)"):
        metrics.kl_divergence(torch.zeros(2, 5), torch.zeros(5))


def test_kl_divergence_of_half_precision_is_computed_in_float32():
    p, q = (logits.to(torch.bfloat16) for logits in distributions("random"))
    expected = metrics.kl_divergence(p.double(), q.double())
    assert metrics.kl_divergence(p, q).dtype == torch.float32
    assert torch.allclose(metrics.kl_divergence(p, q).double(), expected, rtol=1e-5)


def test_cross_entropy_equals_the_sum_by_hand():
    logits, _ = distributions("random")
    next_ids = torch.arange(7)
    by_hand = [
        -math.log(math.exp(row[i]) / sum(math.exp(x) for x in row))
        for i, row in enumerate(logits.tolist())
    ]
    actual = metrics.cross_entropy(metrics.log_probs(logits), next_ids)
    assert actual.tolist() == pytest.approx(by_hand, rel=1e-12)


def test_perplexity_of_the_uniform_lens_is_the_size_of_the_vocabulary():
    uniform = metrics.log_probs(torch.zeros(1, 4096))
    nats = metrics.cross_entropy(uniform, torch.tensor([17])).item()
    assert metrics.perplexity(Estimate(nats, 0.0)).value == pytest.approx(4096, rel=1e-5)


def test_perplexity_carries_the_error_of_the_exponential():
    perplexity = metrics.perplexity(Estimate(2.0, 0.01))
    spread = (math.exp(2.01) - math.exp(1.99)) / 2
    assert perplexity.standard_error == pytest.approx(spread, rel=1e-4)


def test_ratio_sums_give_the_ratio_of_totals_not_the_mean_of_ratios():
    sums = RatioSums()
    sums.add(torch.tensor([10.0, 1.0]), torch.tensor([10.0, 2.0]))
    assert sums.estimate().value == pytest.approx(11 / 12)


def test_ratio_sums_error_agrees_with_a_bootstrap_over_blocks():
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 150, 400)
    levels = rng.gamma(4.0, 0.5, 400)  # blocks differ far more than their tokens do
    nats = lengths * levels
    sums = RatioSums()
    sums.add(torch.tensor(nats), torch.tensor(lengths))
    picks = rng.integers(0, 400, (4000, 400))
    bootstrap = (nats[picks].sum(1) / lengths[picks].sum(1)).std()
    assert sums.estimate().standard_error == pytest.approx(bootstrap, rel=0.05)


def test_ratio_sums_of_parts_add_up_to_the_whole():
    numerators, denominators = torch.rand(3, 20), torch.rand(20) + 1
    whole, one, other = RatioSums(3), RatioSums(3), RatioSums(3)
    whole.add(numerators, denominators)
    one.add(numerators[:, :7], denominators[:7])
    other.add(numerators[:, 7:], denominators[7:])
    one.moments += other.moments
    assert one.estimate(1) == pytest.approx(whole.estimate(1), rel=1e-12)


def test_ratio_sums_know_no_error_when_there_is_one_block():
    sums = RatioSums()
    sums.add(torch.tensor([3.0]), torch.tensor([2.0]))
    assert sums.estimate() == Estimate(1.5, None)


def test_ratio_sums_refuse_to_report_on_nothing():
    with pytest.raises(ValueError, match="nothing was scored"):
        RatioSums().estimate()
