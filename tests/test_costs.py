from types import SimpleNamespace

import pytest
from torch import nn

from tunedlens import CorpusConfig, TrainConfig
from tunedlens.training.costs import Costs, count_looks, next_look


def costs(vocab_size=49_152, sample=6144, n_layers=30, d_model=576, init_tokens=22_000):
    """Of a model of SmolLM2-135M's shape: 12 d_model^2 parameters in a block."""
    blocks = nn.ModuleList(
        nn.Linear(12 * d_model, d_model, bias=False, device="meta") for _ in range(n_layers)
    )
    identity = SimpleNamespace(n_layers=n_layers, d_model=d_model, vocab_size=vocab_size)
    config = TrainConfig(
        corpus=CorpusConfig(seq_len=1024),
        batch_size=2,
        precision="bf16",
        vocab_sample=sample,
        init_tokens=init_tokens,
    )
    return Costs.of(config, SimpleNamespace(blocks=blocks, identity=identity))


def test_looks_come_at_ever_greater_distances():
    looks = [0]
    for _ in range(7):
        looks.append(next_look(looks))
    assert looks == [0, 16, 23, 32, 46, 64, 92, 128]
    assert count_looks(128) == 8
    assert count_looks(100) == 8  # the last one is at the end
    assert count_looks(10) == 2


@pytest.mark.parametrize("tokens", [300_000, 1_000_000, 5_000_000])
@pytest.mark.parametrize("vocab_size", [32_000, 49_152])
def test_validation_takes_a_tenth_and_the_table_a_fifth_at_most(tokens, vocab_size):
    found = costs(vocab_size)
    run = found.init_tokens * found.first_pass + tokens * found.step
    looks = count_looks(-(-tokens // found.step_tokens))
    assert found.validation_tokens(tokens) * looks * found.look <= 0.1 * run
    assert found.table_tokens(tokens) * found.table <= 0.2 * run


def test_a_short_run_is_validated_on_one_block_and_has_a_table_of_two():
    assert costs().validation_tokens(4096) == 1024
    assert costs().table_tokens(4096) == 2 * 1023


def test_a_long_run_is_validated_on_so_many_tokens_and_no_more():
    assert costs(vocab_size=4096, sample=0).validation_tokens(10**8) == 8192
    assert costs(vocab_size=4096, sample=0).table_tokens(10**8) == 16 * 1023


def test_the_step_counts_the_products_of_the_sample():
    whole, part = costs(sample=0), costs(sample=6144)
    saved = 30 * 4 * 576 * (49_152 - 6144)
    assert whole.step - part.step == pytest.approx(saved)
