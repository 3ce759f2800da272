import pytest
import torch
from conftest import make_gpt2, make_llama, random_lens
from transformers import GenerationConfig

from tunedlens import FrozenModel, InputError, LogitLens

PROMPTS = ["def f(x):\n    return", "import", "x = 1 +"]


@pytest.fixture
def lens(tiny):
    return random_lens(tiny)


def by_hand(model, lens, prompt, layer, count, ends=()):
    """Greedy, without a cache, one prompt at a time."""
    ids = model.encode(prompt)
    start = ids.shape[1]
    for _ in range(count):
        hidden = model.residual_stream(ids)[layer][:, -1]
        token = lens(hidden, layer).argmax(-1, keepdim=True)
        if int(token) in ends:
            break
        ids = torch.cat([ids, token], 1)
    return ids[0, start:].tolist()


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_layer_writes_what_it_says_without_a_cache(tiny, lens, layer, caplog):
    found = lens.generate(tiny, PROMPTS, layer, max_new_tokens=12)
    for prompt, text in zip(PROMPTS, found, strict=True):
        expected = by_hand(tiny, lens, prompt, layer, 12)
        assert text == tiny.tokenizer.decode(expected)
        assert lens.generate(tiny, prompt, layer, max_new_tokens=12) == text
    assert not caplog.records


def test_each_text_ends_at_the_first_of_several_ends(tiny, lens):
    ends = []
    for prompt, place in zip(PROMPTS, (2, 5, 7), strict=True):
        ends.append(by_hand(tiny, lens, prompt, 1, 12)[place])
    found = lens.generate(tiny, PROMPTS, 1, max_new_tokens=12, eos_token_id=ends)
    expected = [by_hand(tiny, lens, prompt, 1, 12, ends) for prompt in PROMPTS]
    assert found == [tiny.tokenizer.decode(line) for line in expected]
    assert len({len(line) for line in expected}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("layer", [-1, 3])
def test_last_layer_writes_what_the_model_generates(tokenizer, layer, do_sample, dtype):
    model = FrozenModel(make_gpt2().to(dtype), tokenizer)
    inputs = model.encode(PROMPTS[0])
    torch.manual_seed(5)
    options = {"temperature": 0.7, "top_k": 50, "top_p": 0.9} if do_sample else {}
    config = GenerationConfig(
        max_new_tokens=12, do_sample=do_sample, pad_token_id=0, eos_token_id=0, **options
    )
    expected = model.model.generate(
        inputs, attention_mask=torch.ones_like(inputs), generation_config=config
    )
    found = random_lens(model).generate(
        model, PROMPTS[0], layer, max_new_tokens=12, do_sample=do_sample, seed=5, **options
    )
    assert found == model.tokenizer.decode(expected[0, inputs.shape[1] :])


def test_settings_of_the_model_do_not_come_into_it(tiny, lens):
    expected = lens.generate(tiny, PROMPTS, 1)
    tiny.model.generation_config.repetition_penalty = 5.0
    tiny.model.generation_config.num_beams = 3
    assert lens.generate(tiny, PROMPTS, 1) == expected
    assert tiny.model.generation_config.num_beams == 3


@pytest.mark.parametrize("layer", [0, 1])
def test_a_gated_model_with_rotary_positions_writes_the_same_in_a_batch(tokenizer, layer):
    model = FrozenModel(make_llama(), tokenizer)
    lens = random_lens(model)
    found = lens.generate(model, PROMPTS, layer, max_new_tokens=8, eos_token_id=4095)
    for prompt, text in zip(PROMPTS, found, strict=True):
        assert text == tokenizer.decode(by_hand(model, lens, prompt, layer, 8))


def test_samples_are_from_the_distribution_of_the_layer(tiny):
    lens = LogitLens.from_model(tiny)
    hidden = tiny.residual_stream("x")[1][:, -1]
    probs = (lens(hidden, 1)[0] / 0.5).softmax(-1)
    texts = lens.generate(
        tiny, ["x"] * 2000, 1, max_new_tokens=1, do_sample=True, temperature=0.5, eos_token_id=4095
    )
    best = probs.topk(3)
    for token, probability in zip(best.indices, best.values, strict=True):
        share = texts.count(tiny.tokenizer.decode([int(token)])) / 2000
        deviation = (probability * (1 - probability) / 2000).sqrt()
        assert share == pytest.approx(probability.item(), abs=5 * deviation.item())


def test_generation_leaves_the_model_and_the_seed_as_they_were(tiny, lens):
    before = tiny.model(tiny.encode("x = 1")).logits
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    lens.generate(tiny, "x = 1", 1, do_sample=True)
    assert torch.rand(1) == expected
    assert torch.equal(tiny.model(tiny.encode("x = 1")).logits, before)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", {}, "no tokens"),
        ([], {}, "list of prompts is empty"),
        ("x", {"layer": 4}, "layer must be between 0 and 3"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens` must be greater than 0, but is 0"),
        ("x", {"max_new_tokens": 40}, "1 tokens and 40 new ones are more than the 32"),
        ("x", {"eos_token_id": []}, "eos_token_id is empty"),
        ("x", {"eos_token_id": 5000}, "eos_token_id must be between 0 and 4095"),
        ("x", {"do_sample": True, "temperature": 0.0}, "temperature must be more than 0"),
        ("x", {"do_sample": True, "top_k": -1}, "top_k must be 1 or more"),
        ("x", {"temperature": 2}, "need do_sample=True"),
        ("x", {"do_sample": True, "top_p": 1.5}, "top_p must be between 0 and 1"),
    ],
)
def test_what_cannot_be_written_is_refused(tiny, lens, prompt, options, words):
    with pytest.raises(InputError, match=words):
        lens.generate(tiny, prompt, **options)


def test_lens_of_another_model_is_refused(tiny, model):
    with pytest.raises(InputError, match="embedded"):
        LogitLens.from_model(model).generate(tiny, "x")
