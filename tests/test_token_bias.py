import pytest
import torch
from conftest import random_lens

from tunedlens import InputError, LogitLens, ScoringConfig, score_lenses, token_bias


@pytest.fixture
def lenses(tiny):
    return {"tuned": random_lens(tiny), "logit": LogitLens.from_model(tiny)}


def test_means_and_order_equal_a_loop(tiny, lenses):
    blocks = list(torch.randint(0, 4096, (3, 10)))
    found = token_bias(tiny, lenses, blocks, ScoringConfig(batch_size=2), k=4)
    states = [torch.cat(one) for one in zip(*(
        [state[0, :-1] for state in tiny.residual_stream(block[None])] for block in blocks
    ), strict=True)]  # fmt: skip
    logits = tiny.unembedding(states[-1])
    model_mean = logits.double().softmax(-1).mean(0)
    assert found.tokens == 27
    for name, lens in lenses.items():
        for one in found.lenses[name]:
            mean = lens(states[one.layer], one.layer).detach().double().softmax(-1).mean(0)
            difference = mean - model_mean
            assert [t.token_id for t in one.over] == difference.topk(4).indices.tolist()
            assert [t.token_id for t in one.under] == (-difference).topk(4).indices.tolist()
            for token in (*one.over, *one.under):
                assert token.lens == pytest.approx(float(mean[token.token_id]), rel=1e-4)
                assert token.model == pytest.approx(float(model_mean[token.token_id]), rel=1e-4)
            assert one.excess == pytest.approx(float(difference.abs().sum() / 2), rel=1e-4)
            kl = float((model_mean * (model_mean / mean).log()).sum())
            assert one.bias_nats.value == pytest.approx(kl, rel=1e-4)


def test_bias_is_that_of_an_evaluation(tiny, lenses):
    blocks = list(torch.randint(0, 4096, (5, 8)))
    found, evaluation = token_bias(tiny, lenses, blocks), score_lenses(tiny, lenses, blocks)
    for name in lenses:
        for one, expected in zip(
            found.lenses[name], evaluation.by_layer(name, "bias_nats"), strict=True
        ):
            assert one.bias_nats == pytest.approx(expected, rel=1e-9)


def test_table_shows_percent(tiny, lenses):
    found = token_bias(tiny, lenses, list(torch.randint(0, 4096, (2, 8))), k=1)
    one, line = found.lenses["logit"][0], found.table("logit").splitlines()[1]
    token = one.over[0]
    assert line.split()[0] == "0"
    assert line.endswith(f"{token.token.shown} {100 * token.lens:.2g} {100 * token.model:.2g}")


def test_what_has_no_bias_is_refused(tiny, lenses):
    blocks = list(torch.randint(0, 4096, (2, 8)))
    with pytest.raises(InputError, match="k must be between 1 and 4096, got 0"):
        token_bias(tiny, lenses, blocks, k=0)
    with pytest.raises(InputError, match="nothing to score"):
        token_bias(tiny, lenses, [])
    with pytest.raises(InputError, match="lens must be one of tuned, logit; got 'mine'"):
        token_bias(tiny, lenses, blocks, k=1).table("mine")
