import math

import numpy as np
import pytest
import torch

from tunedlens.engine import LensStatistics, ModelDistribution, distributions
from tunedlens.evaluation.estimates import (
    Estimate,
    GroupSums,
    RatioSums,
    perplexity,
)


def random_logits(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "random":
        return torch.randn(2, 7, 11, generator=generator, dtype=torch.float64) * 2
    if kind == "peaked":
        return torch.randn(2, 7, 11, generator=generator, dtype=torch.float64) * 40
    return torch.randn(2, 7, 11, generator=generator, dtype=torch.float64) - 70  # GPT-2's size


def kl_divergence(model_logits, lens_logits):
    log_probs = [distributions.log_probs(logits) for logits in (model_logits, lens_logits)]
    return distributions.kl_divergence(*log_probs)


def statistics(logits, model_logits=None, next_ids=None):
    """Statistics of a lens, whose logits are left as they are."""
    model = ModelDistribution.from_logits(logits if model_logits is None else model_logits)
    ids = torch.zeros(len(logits), dtype=torch.long) if next_ids is None else next_ids
    return LensStatistics(logits.clone(), model, ids)


@pytest.mark.parametrize("kind", ["random", "peaked", "shifted"])
def test_kl_divergence_equals_torch_distributions_in_float64(kind):
    p, q = random_logits(kind)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    assert torch.allclose(kl_divergence(p, q), expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(statistics(q, p).kl_nats, expected, rtol=1e-10, atol=1e-12)


def test_kl_divergence_of_a_distribution_with_itself_is_exactly_zero():
    p, _ = random_logits("peaked")
    assert torch.equal(kl_divergence(p.float(), p.float()), torch.zeros(7))


def test_kl_divergence_ignores_tokens_that_the_model_rules_out():
    p = torch.tensor([0.0, 0.0, -math.inf])
    q = torch.tensor([0.0, 0.0, 0.0])
    assert kl_divergence(p, q).item() == pytest.approx(math.log(3 / 2))


def test_kl_divergence_is_infinite_where_the_lens_rules_out_what_the_model_says():
    p, q = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -math.inf])
    assert kl_divergence(p, q).item() == math.inf


def test_kl_divergence_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(5,\)"):
        distributions.kl_divergence(torch.zeros(2, 5), torch.zeros(5))


def test_kl_divergence_of_half_precision_is_computed_in_float32():
    p, q = (logits.to(torch.bfloat16) for logits in random_logits("random"))
    expected = kl_divergence(p.double(), q.double())
    assert kl_divergence(p, q).dtype == torch.float32
    assert torch.allclose(kl_divergence(p, q).double(), expected, rtol=1e-5)


def test_cross_entropy_equals_the_sum_by_hand():
    logits, _ = random_logits("random")
    next_ids = torch.arange(7)
    by_hand = [
        -math.log(math.exp(row[i]) / sum(math.exp(x) for x in row))
        for i, row in enumerate(logits.tolist())
    ]
    actual = statistics(logits, next_ids=next_ids).cross_entropy_nats
    assert actual.tolist() == pytest.approx(by_hand, rel=1e-12)


def test_perplexity_of_the_uniform_lens_is_the_size_of_the_vocabulary():
    nats = statistics(torch.zeros(1, 4096), next_ids=torch.tensor([17])).cross_entropy_nats.item()
    assert perplexity(Estimate(nats, 0.0)).value == pytest.approx(4096, rel=1e-5)


def test_perplexity_carries_the_error_of_the_exponential():
    found = perplexity(Estimate(2.0, 0.01))
    spread = (math.exp(2.01) - math.exp(1.99)) / 2
    assert found.standard_error == pytest.approx(spread, rel=1e-4)


def as_numpy(logits):
    """Probabilities in float64, made without torch's softmax."""
    weights = np.exp(logits.numpy() - logits.numpy().max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("kind", ["random", "peaked", "shifted"])
def test_entropy_equals_numpy(kind):
    logits, _ = random_logits(kind)
    probs = as_numpy(logits)
    expected = -np.where(probs > 0, probs * np.log(np.where(probs > 0, probs, 1)), 0).sum(-1)
    actual = statistics(logits).entropy_nats
    assert actual.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_entropy_of_the_uniform_distribution_is_the_logarithm_of_the_vocabulary():
    assert statistics(torch.zeros(1, 50)).entropy_nats.item() == pytest.approx(math.log(50))


def test_entropy_of_a_certain_distribution_is_zero():
    assert statistics(torch.tensor([[0.0, -200.0, -200.0]])).entropy_nats.item() == 0


@pytest.mark.parametrize("kind", ["random", "peaked", "shifted"])
def test_js_divergence_equals_numpy(kind):
    p, q = random_logits(kind)
    a, b = as_numpy(p), as_numpy(q)
    mixture = (a + b) / 2
    tiny = np.finfo(float).tiny
    expected = sum((x * np.log(np.maximum(x, tiny) / mixture)).sum(-1) / 2 for x in (a, b))
    actual = distributions.js_divergence(distributions.log_probs(p), distributions.log_probs(q))
    assert actual.numpy() == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_js_divergence_of_disjoint_distributions_is_ln_2():
    p, q = torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0])
    assert distributions.js_divergence(p, q).item() == pytest.approx(math.log(2))


def test_js_divergence_of_a_distribution_with_itself_is_zero():
    p = distributions.log_probs(random_logits("random")[0])
    assert distributions.js_divergence(p, p).abs().max() < 1e-15


def test_rank_is_the_index_in_a_stable_sort():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    for row in logits:
        order = sorted(range(5), key=lambda i: (-row[i].item(), i))
        ranks = [distributions.rank(row[None], torch.tensor([i])).item() for i in range(5)]
        assert ranks == [order.index(i) + 1 for i in range(5)]


def test_ranks_of_several_tokens_are_those_of_each():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    ids = torch.arange(5).expand(2, -1)
    expected = torch.tensor([[4, 1, 2, 5, 3], [1, 2, 3, 4, 5]])
    assert distributions.ranks(logits, ids).equal(expected)
    # On an accelerator, all tokens of a position are compared at once.
    assert distributions.rank(logits[:, None].expand(2, 5, 5), ids).equal(expected)


def only(sums, *contrast):
    """Estimates of sums without a shape, by column or for a contrast of columns."""
    contrasts = torch.tensor([contrast], dtype=torch.float64) if contrast else None
    return sums.estimates(contrasts).to_list()


def test_ratio_sums_give_the_ratio_of_totals_not_the_mean_of_ratios():
    sums = RatioSums()
    sums.add(torch.tensor([[10.0, 1.0]]), torch.tensor([10.0, 2.0]))
    assert only(sums)[0].value == pytest.approx(11 / 12)


@pytest.fixture
def hard_and_easy_blocks():
    """Nats of two lenses on 400 blocks that differ far more than their tokens do."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 150, 400)
    levels = rng.gamma(4.0, 0.5, 400)
    nats = np.stack([lengths * levels, lengths * (0.8 * levels + rng.normal(0, 0.05, 400))])
    picks = rng.integers(0, 400, (4000, 400))
    return nats, lengths, picks


def test_ratio_sums_error_agrees_with_a_bootstrap_over_blocks(hard_and_easy_blocks):
    nats, lengths, picks = hard_and_easy_blocks
    sums = RatioSums(columns=2)
    sums.add(torch.tensor(nats), torch.tensor(lengths))
    for column in range(2):
        bootstrap = (nats[column, picks].sum(1) / lengths[picks].sum(1)).std()
        assert only(sums)[column].standard_error == pytest.approx(bootstrap, rel=0.05)


def test_error_of_a_difference_agrees_with_a_bootstrap_that_keeps_blocks_paired(
    hard_and_easy_blocks,
):
    nats, lengths, picks = hard_and_easy_blocks
    sums = RatioSums(columns=2)
    sums.add(torch.tensor(nats), torch.tensor(lengths))
    ((value, error),) = only(sums, -1, 1)
    assert value == pytest.approx((nats[1] - nats[0]).sum() / lengths.sum())
    bootstrap = ((nats[1] - nats[0])[picks].sum(1) / lengths[picks].sum(1)).std()
    assert error == pytest.approx(bootstrap, rel=0.05)
    assert error < only(sums)[1].standard_error  # what is hard for both is not noise


def test_ratio_sums_of_parts_add_up_to_the_whole():
    numerators, denominators = torch.rand(3, 2, 20), torch.rand(20) + 1
    whole, one, other = (RatioSums(3, columns=2) for _ in range(3))
    whole.add(numerators, denominators)
    one.add(numerators[..., :7], denominators[:7])
    other.add(numerators[..., 7:], denominators[7:])
    one.moments += other.moments
    for merged, expected in zip(one.estimates(), whole.estimates(), strict=True):
        assert torch.allclose(merged, expected, rtol=1e-12)


def test_block_with_no_denominator_is_left_out():
    sums, fewer = RatioSums(), RatioSums()
    sums.add(torch.tensor([[3.0, 1.0, 5.0]]), torch.tensor([2.0, 0.0, 2.0]))
    fewer.add(torch.tensor([[3.0, 5.0]]), torch.tensor([2.0, 2.0]))
    assert only(sums) == only(fewer)
    assert sums.blocks == 2


def test_ratio_sums_know_no_error_when_there_is_one_block():
    sums = RatioSums()
    sums.add(torch.tensor([[3.0]]), torch.tensor([2.0]))
    assert only(sums) == [Estimate(1.5, None)]


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = GroupSums(2)
    sums.sums.copy_(torch.stack([values, torch.ones_like(values)], -1))
    value, error = sums.jackknife(lambda total: total[0] / total[1])
    assert value.item() == pytest.approx(values.mean().item())
    assert error.item() == pytest.approx(values.std().item() / 4)


def test_jackknife_survives_what_is_all_in_one_group():
    sums = GroupSums(2)
    sums.sums[:] = torch.tensor([1e-18, 1.0])
    sums.sums[3, 0] = 1.2
    statistic = lambda total: (total[0] / total[1]).log()  # noqa: E731
    _, error = sums.jackknife(statistic)
    assert error.isfinite()


def test_jackknife_of_a_single_group_knows_no_error():
    sums = GroupSums()
    sums.sums[5] = 2.0
    value, error = sums.jackknife(lambda total: total)
    assert value == 2
    assert error.isnan()


def test_jackknife_error_of_a_divergence_agrees_with_a_bootstrap():
    rng = np.random.default_rng(0)
    size = 20
    means = rng.dirichlet(np.ones(size), 2)
    # Blocks that lean this way or that, as texts do.
    blocks = np.stack([rng.dirichlet(30 * mean, 320) for mean in means], 1)

    def divergence(total):
        p, q = (total / total.sum(-1, keepdims=True)) if total.ndim == 2 else total
        return (p * np.log(p / q)).sum(-1)

    sums = GroupSums(2, size)
    sums.sums.index_add_(0, torch.arange(320) % 16, torch.tensor(blocks))
    statistic = lambda total: torch.tensor(divergence(total.numpy()))  # noqa: E731
    error = sums.jackknife(statistic)[1].item()
    picks = rng.integers(0, 320, (2000, 320))
    bootstrap = np.std([divergence(blocks[pick].sum(0)) for pick in picks])
    assert error == pytest.approx(bootstrap, rel=0.35)  # 15 degrees of freedom
