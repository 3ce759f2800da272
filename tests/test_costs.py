import pytest

from tunedlens.corpus import ResolvedCorpus
from tunedlens.model import ModelShape
from tunedlens.training.plan import Costs, TrainPlan, count_validations, next_validation_step


def costs(vocab_size=49_152, sample=6144, n_layers=30, d_model=576, init_tokens=22_000):
    """The costs of a run on a model of SmolLM2-135M's shape: 12 d_model^2 parameters in a block."""
    block_weights = n_layers * 12 * d_model**2
    shape = ModelShape(
        name="random",
        n_layers=n_layers,
        d_model=d_model,
        vocab_size=vocab_size,
        weights=block_weights + d_model * vocab_size,
        block_weights=block_weights,
        widest=4 * d_model,
        context=1024,
        has_bias=False,
        is_scaled=False,
        has_fsdp_plan=False,
        is_capped=False,
    )
    plan = TrainPlan(
        corpus=ResolvedCorpus(dataset="text", seq_len=1024, bos=False),
        max_tokens=10**9,
        init_tokens=init_tokens,
        batch_size=2,
        precision="bf16",
        kernel="products",
        vocab_sample=sample,
        lr=0.035,
        momentum=0.8,
        weight_decay=0.0,
        validation_tokens=1024,
    )
    return Costs(plan, shape)


def test_step_of_validation_doubles_with_every_second_one():
    steps = [0]
    for _ in range(7):
        steps.append(next_validation_step(steps))
    assert steps == [0, 16, 23, 32, 46, 64, 92, 128]
    assert count_validations(128) == 8
    assert count_validations(100) == 8  # the last one is at the end
    assert count_validations(10) == 2


@pytest.mark.parametrize("tokens", [300_000, 1_000_000, 5_000_000])
@pytest.mark.parametrize("vocab_size", [32_000, 49_152])
def test_validation_takes_a_tenth_and_the_table_a_fifth_at_most(tokens, vocab_size):
    per_token = costs(vocab_size)
    run = 22_000 * per_token.first_pass + tokens * per_token.step
    validations = count_validations(-(-tokens // 2048))
    held_out = per_token.validation_tokens(tokens) * validations
    assert held_out * per_token.validation <= 0.1 * run
    assert per_token.table_tokens(tokens) * per_token.table <= 0.2 * run


def test_a_short_run_is_validated_on_one_block_and_has_a_table_of_two():
    assert costs().validation_tokens(4096) == 1024
    assert costs().table_tokens(4096) == 2 * 1023


def test_held_out_tokens_of_a_long_run_are_limited():
    assert costs(vocab_size=4096, sample=0).validation_tokens(10**8) == 8192
    assert costs(vocab_size=4096, sample=0).table_tokens(10**8) == 16 * 1023


def test_the_step_counts_the_products_of_the_sample():
    whole, part = costs(sample=0), costs(sample=6144)
    saved = 30 * 4 * 576 * (49_152 - 6144)
    assert whole.step - part.step == pytest.approx(saved)
