"""What a run needs, beside a calculation by hand."""

import dataclasses

import pytest
from transformers import LlamaConfig

from tunedlens import CorpusConfig, InputError, ModelConfig, TrainConfig
from tunedlens.cli import plan_command
from tunedlens.training.sizing import size_run, ways_to_fit


@pytest.fixture
def llama(tmp_path):
    """A folder with a configuration and no weights."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    return tmp_path


def config_of(folder, dtype="float32", **settings):
    model = ModelConfig(model=str(folder), dtype=dtype)
    return TrainConfig(model=model, corpus=CorpusConfig(dataset="text"), **settings)


def test_weights_are_counted_without_loading_them(llama):
    shape = size_run(config_of(llama)).shape
    block = 4 * 64**2 + 3 * 64 * 256 + 2 * 64
    assert shape.block_weights == 4 * block
    assert shape.weights == 4 * block + 2 * 32_000 * 64 + 64
    assert (shape.n_layers, shape.d_model, shape.vocab_size) == (4, 64, 32_000)


def test_parts_of_a_step_agree_with_a_calculation_by_hand(llama):
    size = size_run(config_of(llama, "bfloat16", batch_size=8), gpus=2)
    step, elements = size.memory.device["a step"], 4 * 64 * 65
    assert step["model in bfloat16"] == 2 * size.shape.weights
    assert step["unembedding in float32"] == 4 * 32_000 * 64
    assert step["unembedding of the objective"] == 2 * 32_000 * 72
    assert step["translators and optimizer"] == 7 * 4 * elements
    # A step's sample is drawn when the states of all its tokens are known: 4 of 8 blocks a process.
    captured = 4 * 128 * 5 * 64 * (4 + 2)
    assert step["states"] in (captured, 4 * 4 * 128 * 5 * 64 + 4 * 4 * 128 * 64)


def test_default_tokens_are_those_of_the_fit(llama):
    plan = size_run(config_of(llama)).plan
    assert (plan.init_tokens, plan.budget, plan.vocab_sample) == (128 * 64, 2048 * 64, 6144)


def test_layers_divide_what_translators_take(llama):
    whole, half = (size_run(config_of(llama, layers=layers)) for layers in (None, "0,2"))
    part = "translators and optimizer"
    assert half.memory.device["table"][part] == whole.memory.device["table"][part] / 2


def test_divided_layers_agree_with_a_calculation_by_hand(llama):
    config = config_of(llama, "bfloat16", batch_size=9, shard_layers=True)
    size, layer = size_run(config, gpus=3), 64 * 65
    table, step = size.memory.device["table"], size.memory.device["a step"]
    assert table["translators and optimizer"] == 7 * 4 * 2 * layer  # 2, 1 and 1 of 4 layers
    assert table["lens of all layers"] == 4 * 4 * layer
    assert step["gradients"] == 4 * 2 * layer
    # States of 3 blocks at 5 points, their mean rows, and 9 blocks at the 3 points that it needs.
    assert step["states"] == 4 * 128 * 64 * (3 * 5 + 3 + 9 * 3)


def test_fsdp_agrees_with_a_calculation_by_hand(llama):
    config = config_of(llama, "bfloat16")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, fsdp=True))
    size = size_run(config, gpus=4)
    step, head = size.memory.device["a step"], 32_000 * 64
    assert step["model in bfloat16"] == 2 * size.shape.weights / 4
    # The head stays, and the embedding, beside which the norm is counted, is larger than a block.
    assert step["weights gathered"] == 2 * (head + 2 * (head + 64))
    with pytest.raises(InputError, match=r"--fsdp divides .* among processes, but there is one"):
        size_run(config, gpus=1)
    with pytest.raises(InputError, match="but transformers has no plan for that"):
        size_run(TrainConfig(ModelConfig(fsdp=True)), gpus=2)


def test_layers_are_divided_if_memory_asks_for_it(llama):
    translators = 4 * 8 * 4 * 64**2
    sizes = {
        share: size_run(config_of(llama), gpus=4, memory_gb=translators / share / 1e9)
        for share in (0.4, 0.6)
    }
    assert [size.plan.shard_layers for size in sizes.values()] == [False, True]
    one = size_run(config_of(llama), memory_gb=1e-6)
    assert not one.plan.shard_layers
    with pytest.raises(InputError, match="cannot divide 4 layers among 5 processes; start fewer"):
        size_run(config_of(llama, shard_layers=True), gpus=5)
    with pytest.raises(InputError, match="--shard-layers works with --fit preconditioned"):
        size_run(config_of(llama, shard_layers=True, fit="sgd"), gpus=2)


def test_flags_that_make_a_run_fit_do_so(llama):
    config = config_of(llama)
    peak = size_run(config).memory.peak
    size = size_run(config, memory_gb=peak / 1e9)
    assert not size.fits
    ways = ways_to_fit(config, size)
    assert ways
    assert all(new.memory.peak < peak for _, new in ways)


def test_command_says_whether_a_run_fits(llama, capsys):
    assert plan_command(["--model", str(llama), "--gpus", "0", "--memory", "16"]) == 0
    assert "memory    enough" in capsys.readouterr().out
    assert plan_command(["--model", str(llama), "--memory", "0.01"]) == 1
    assert "not enough" in capsys.readouterr().out


def test_command_plans_a_short_run_for_one_gpu(llama, capsys):
    assert plan_command(["--model", str(llama), "--tokens", "1000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("run ")).endswith("; 1 process, one GPU")
    assert next(line for line in lines if line.startswith("time ")).split()[1:3] == ["1", "second"]


def test_impossible_machine_is_an_error(llama):
    with pytest.raises(InputError, match="--gpus must be 0 or more, got -1"):
        size_run(config_of(llama), gpus=-1)
