import math

import pytest
import torch
from accelerate import Accelerator
from conftest import in_two_processes, random_lens

from tunedlens import InputError, LogitLens, evaluate, load_model
from tunedlens.corpus import Packer, token_bytes
from tunedlens.evaluation import Evaluation


@pytest.fixture
def blocks(tokenizer):
    """Nine blocks of non-ASCII text."""
    text = "".join(f"naïve {i} 日本 🎉 def f(x):\n" for i in range(60))
    (stream,) = Packer(tokenizer).encode([text])
    return stream[: 9 * 24].view(9, 24).long()


def run(model, blocks, **settings):
    lenses = {"logit": LogitLens.from_model(model), "tuned": random_lens(model)}
    return evaluate(model, lenses, blocks, token_bytes(model.tokenizer), **settings)


def brute_force(model, lens, blocks, layer):
    """Every figure in float64, one position at a time, through torch.distributions."""
    kl, nats, agree = [], [], []
    for block in blocks:
        states = model.residual_stream(block[None])
        for position in range(len(block) - 1):
            p, q = (
                torch.distributions.Categorical(logits=lens(states[i][0, position], i).double())
                for i in (model.identity.n_layers, layer)
            )
            kl.append(torch.distributions.kl_divergence(p, q).item())
            nats.append(-q.log_prob(block[position + 1]).item())
            agree.append(float(p.logits.argmax() == q.logits.argmax()))
    return {"kl_nats": kl, "cross_entropy_nats": nats, "top1_agreement": agree}


@pytest.mark.parametrize("layer", [0, 2])
def test_figures_equal_brute_force(tiny, blocks, layer):
    evaluation = run(tiny, blocks)
    for name, lens in {"logit": LogitLens.from_model(tiny), "tuned": random_lens(tiny)}.items():
        for metric, values in brute_force(tiny, lens, blocks[:9], layer).items():
            actual = evaluation.by_layer(name, metric)[layer].value
            assert actual == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_perplexity_of_the_model_is_that_of_its_own_loss(tiny, blocks):
    loss = tiny.model(blocks, labels=blocks).loss.item()
    perplexity = run(tiny, blocks).of_model("perplexity").value
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_bits_per_byte_equal_a_count_by_hand(tiny, blocks):
    evaluation = run(tiny, blocks)
    nats = evaluation.of_model("cross_entropy_nats").value * evaluation.tokens
    tokens = [tiny.tokenizer.convert_ids_to_tokens(int(i)) for i in blocks[:, 1:].flatten()]
    text_bytes = sum(map(len, tokens))  # a byte-level BPE writes one character a byte
    assert evaluation.text_bytes == text_bytes
    bits = nats / math.log(2) / text_bytes
    assert evaluation.of_model("bits_per_byte").value == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 23, 24, 100])
def test_exactly_the_tokens_asked_for_are_scored(tiny, blocks, tokens):
    evaluation = run(tiny, blocks, tokens=tokens)
    values = brute_force(tiny, LogitLens.from_model(tiny), blocks, 1)["kl_nats"][:tokens]
    assert evaluation.tokens == tokens
    assert evaluation.by_layer("logit", "kl_nats")[1].value == pytest.approx(
        sum(values) / tokens, rel=1e-4
    )


def test_text_that_has_fewer_tokens_is_scored_whole(tiny, blocks):
    assert run(tiny, blocks, tokens=10**6).tokens == 9 * 23


def test_figures_do_not_depend_on_batch_or_chunk(tiny, blocks, monkeypatch):
    one = run(tiny, blocks, batch_size=1)
    monkeypatch.setattr("tunedlens.evaluation.chunk_tokens", lambda *_: 7)
    other = run(tiny, blocks, batch_size=9)
    for a, b in zip(one.results, other.results, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-5, abs=1e-9)
        assert a.standard_error == pytest.approx(b.standard_error, rel=1e-4, abs=1e-9)


def test_first_position_is_also_reported_apart(tiny, blocks):
    values = brute_force(tiny, LogitLens.from_model(tiny), blocks, 1)["kl_nats"][::23]
    actual = run(tiny, blocks).by_layer("logit", "kl_nats_position_0")[1].value
    assert actual == pytest.approx(sum(values) / 9, rel=1e-4)


def test_evaluation_reads_back_from_json(tiny, blocks):
    evaluation = run(tiny, blocks)
    assert Evaluation.from_json(evaluation.to_json()) == evaluation


def _evaluate_a_share(folder, blocks):
    evaluation = run(
        load_model(folder, device="cpu"), blocks, accelerator=Accelerator(), tokens=190
    )
    return [(result.value, result.standard_error) for result in evaluation.results]


def test_two_processes_give_the_figures_of_one(tiny, tiny_folder, blocks):
    expected = run(tiny, blocks, tokens=190)
    for share in in_two_processes(_evaluate_a_share, tiny_folder, blocks):
        for (value, error), result in zip(share, expected.results, strict=True):
            assert value == pytest.approx(result.value, rel=1e-5)
            assert error == pytest.approx(result.standard_error, rel=1e-4, abs=1e-9)


def test_nothing_to_score_is_refused(tiny, blocks):
    with pytest.raises(InputError, match="nothing to score: 0 tokens"):
        run(tiny, blocks[:0])


def test_lens_that_gives_no_number_is_refused(tiny, blocks):
    lens = random_lens(tiny)
    with torch.no_grad():
        lens.translators[1].bias[0] = math.nan
    with pytest.raises(InputError, match="of broken at layer 1 is nan"):
        evaluate(tiny, {"broken": lens}, blocks, token_bytes(tiny.tokenizer))
