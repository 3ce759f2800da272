import collections
import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import in_two_processes, make_gpt2, random_lens

from tunedlens import (
    ConstantLens,
    CorpusConfig,
    EvaluateConfig,
    FrozenModel,
    InputError,
    LogitLens,
    ScoringConfig,
    evaluate,
    load_model,
    read_evaluation,
    report,
    score_lenses,
    write_report,
)
from tunedlens.corpus import Packer, load_splits, resolve_corpus
from tunedlens.distributed import join_processes
from tunedlens.engine import LensStatistics
from tunedlens.evaluation import Evaluation
from tunedlens.metrics import METRICS, per_token_metrics
from tunedlens.report.plots import DRAWINGS
from tunedlens.tokenizer import TokenBytes


@pytest.fixture
def blocks(tokenizer):
    """Nine blocks of non-ASCII text."""
    text = "".join(f"naïve {i} 日本 🎉 def f(x):\n" for i in range(60))
    (stream,) = Packer(tokenizer, 32).encode([text])
    return stream[: 9 * 24].view(9, 24).long()


def lenses_of(model):
    uniform = torch.full((model.identity.vocab_size,), -math.log(model.identity.vocab_size))
    return {
        "logit": LogitLens.from_model(model),
        "tuned": random_lens(model),
        "uniform": ConstantLens(uniform, model.identity),
    }


def run(model, blocks, accelerator=None, **settings):
    config = ScoringConfig(**settings)
    return score_lenses(model, lenses_of(model), blocks, config, accelerator=accelerator)


@torch.no_grad()
def distributions(model, lens, blocks, layer):
    """The model's and the lens's in float64, and the true next tokens, position by position."""
    p, q = [], []
    for block in blocks:
        states = model.residual_stream(block[None])
        p.append(model.unembedding(states[-1][0, :-1]).double().softmax(-1))
        q.append(lens(states[layer][0, :-1], layer).double().softmax(-1))
    return torch.stack(p).numpy(), torch.stack(q).numpy(), blocks[:, 1:].numpy()


def brute_force(model, lens, blocks, layer):
    """Every per-token metric in float64 with numpy, one position after the other."""
    p, q, following = distributions(model, lens, blocks, layer)
    found = collections.defaultdict(list)
    for model_probs, probs, true in zip(
        p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1]), following.flatten(), strict=True
    ):
        order = np.argsort(-probs.astype(np.float32), kind="stable")
        best = int(model_probs.argmax())
        mixture = (model_probs + probs) / 2
        found["kl_nats"].append((model_probs * np.log(model_probs / probs)).sum())
        found["reverse_kl_nats"].append((probs * np.log(probs / model_probs)).sum())
        found["js_nats"].append(
            sum((x * np.log(x / mixture)).sum() / 2 for x in (model_probs, probs))
        )
        found["cross_entropy_nats"].append(-np.log(probs[true]))
        found["entropy_nats"].append(-(probs * np.log(probs)).sum())
        found["top1_agreement"].append(float(order[0] == best))
        found["top10_agreement"].append(float(best in order[:10]))
        found["accuracy"].append(float(order[0] == true))
        found["reciprocal_rank"].append(1 / (1 + list(order).index(true)))
        found["model_top1_rank"].append(1 + list(order).index(best))
        found["confidence"].append(probs.max())
    return {metric: np.array(values) for metric, values in found.items()}


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["logit", "tuned", "uniform"])
def test_metrics_equal_brute_force(tiny, blocks, layer, name):
    blocks = blocks[:4]
    evaluation = run(tiny, blocks, metrics="all")
    expected = brute_force(tiny, lenses_of(tiny)[name], blocks, layer)
    assert expected.keys() == set(per_token_metrics("all"))
    for metric, values in expected.items():
        actual = evaluation.by_layer(name, metric)[layer].value
        assert actual == pytest.approx(values.mean(), rel=1e-4), metric


def test_model_has_metrics_without_a_lens(tiny, blocks):
    last = tiny.identity.n_layers
    expected = brute_force(tiny, LogitLens.from_model(tiny), blocks[:4], last)
    evaluation = run(tiny, blocks[:4], metrics="all")
    for metric in ("cross_entropy_nats", "entropy_nats", "accuracy", "reciprocal_rank"):
        actual = evaluation.of_model(metric).value
        assert actual == pytest.approx(expected[metric].mean(), rel=1e-4)


def test_uniform_lens_has_known_metrics(tiny, blocks):
    evaluation, vocab_size = run(tiny, blocks), tiny.identity.vocab_size
    assert evaluation.constant == ["uniform"]
    assert evaluation.by_layer("uniform", "perplexity")[1].value == pytest.approx(vocab_size)
    entropy = evaluation.by_layer("uniform", "entropy_nats")[1].value
    assert entropy == pytest.approx(math.log(vocab_size))
    own = evaluation.of_model("entropy_nats").value
    kl = evaluation.by_layer("uniform", "kl_nats")[1].value
    assert kl == pytest.approx(math.log(vocab_size) - own, rel=1e-4)


@pytest.mark.parametrize("name", ["logit", "tuned", "uniform"])
def test_bias_is_the_divergence_of_the_mean_distributions(tiny, blocks, name):
    p, q, _ = distributions(tiny, lenses_of(tiny)[name], blocks, 1)
    p, q = p.mean((0, 1)), q.mean((0, 1))
    expected = (p * np.log(p / q)).sum()
    actual = run(tiny, blocks).by_layer(name, "bias_nats")[1].value
    assert actual == pytest.approx(expected, rel=1e-4)


def test_prediction_depth_is_the_layer_from_which_the_top_token_stays(tiny, blocks):
    lens, n_layers = lenses_of(tiny)["tuned"], tiny.identity.n_layers
    best = np.stack(
        [distributions(tiny, lens, blocks, i)[1].argmax(-1) for i in range(n_layers + 1)]
    )
    depths = []
    for tokens in best.reshape(n_layers + 1, -1).T:
        depth = n_layers
        while depth and tokens[depth - 1] == tokens[-1]:
            depth -= 1
        depths.append(depth)
    evaluation = run(tiny, blocks)
    shares = [e.value for e in evaluation.by_layer("tuned", "prediction_depth")]
    assert shares == pytest.approx([depths.count(i) / len(depths) for i in range(n_layers + 1)])
    mean = evaluation.of_lens("tuned", "mean_prediction_depth").value
    assert mean == pytest.approx(np.mean(depths))


def test_calibration_error_equals_a_count_by_bins(tiny, blocks):
    _, q, following = distributions(tiny, lenses_of(tiny)["tuned"], blocks, 1)
    confidence, correct = q.max(-1).flatten(), (q.argmax(-1) == following).flatten()
    bins = np.minimum((confidence.astype(np.float32) * 15).astype(int), 14)
    gaps = [abs((confidence[bins == b] - correct[bins == b]).sum()) for b in range(15)]
    evaluation = run(tiny, blocks, metrics="all")
    actual = evaluation.by_layer("tuned", "calibration_error")[1].value
    assert actual == pytest.approx(sum(gaps) / len(bins), rel=1e-4)


def test_standard_errors_agree_with_a_bootstrap_over_blocks(tiny, tokenizer):
    text = "".join(f"naïve {i * i} 日本 def f(x):\n" + "a b " * (i % 7) for i in range(400))
    (stream,) = Packer(tokenizer, 32).encode([text])
    blocks = stream[: 160 * 16].view(160, 16).long()
    evaluation = run(tiny, blocks)
    p, q, _ = distributions(tiny, lenses_of(tiny)["tuned"], blocks, 1)
    picks = np.random.default_rng(0).integers(0, 160, (400, 160))
    kl = (p * np.log(p / q)).sum(-1).mean(-1)
    error = evaluation.by_layer("tuned", "kl_nats")[1].standard_error
    assert error == pytest.approx(kl[picks].mean(1).std(), rel=0.15)

    marginals = np.stack([p.mean(1), q.mean(1)])
    bias = [(a * np.log(a / b)).sum() for a, b in (marginals[:, pick].mean(1) for pick in picks)]
    error = evaluation.by_layer("tuned", "bias_nats")[1].standard_error
    assert error == pytest.approx(np.std(bias), rel=0.4)  # 15 degrees of freedom


def test_differences_are_paired(tiny, blocks):
    evaluation = run(tiny, blocks, metrics="all")
    for metric in (*per_token_metrics("all"), "bits_per_byte", "bias_nats", "calibration_error"):
        for layer, (value, error) in enumerate(evaluation.difference("tuned", "logit", metric)):
            tuned, logit = (evaluation.by_layer(lens, metric)[layer] for lens in ("tuned", "logit"))
            assert value == pytest.approx(tuned.value - logit.value, abs=1e-9)
            assert error <= (tuned.standard_error + logit.standard_error) * (1 + 1e-9)
    back = evaluation.difference("logit", "tuned", "kl_nats")[0]
    assert back.value == -evaluation.difference("tuned", "logit", "kl_nats")[0].value


def test_by_position_equals_brute_force(tiny, blocks):
    expected = brute_force(tiny, lenses_of(tiny)["tuned"], blocks, 2)
    evaluation = run(tiny, blocks, by_position=True)
    for metric in per_token_metrics("standard"):
        row = evaluation.by_position["tuned"][metric].values[2]
        assert row == pytest.approx(expected[metric].reshape(9, 23).mean(0), rel=1e-4)


def test_position_that_is_in_no_scored_block_has_no_value(tiny, blocks):
    row = run(tiny, blocks[:1], tokens=5, by_position=True).by_position["logit"]["kl_nats"]
    assert None not in row.values[0][:5]
    assert row.values[0][5:] == [None] * 18
    assert row.standard_errors[0] == [None] * 23


def test_transfer_uses_every_translator_at_every_layer(tiny, blocks):
    lens = lenses_of(tiny)["tuned"]
    evaluation = run(tiny, blocks[:3], transfer=True)
    assert list(evaluation.transfer) == ["tuned"]
    grid = evaluation.transfer["tuned"]["kl_nats"].values
    for translator, layer in itertools.product(range(3), repeat=2):
        kl = []
        for block in blocks[:3]:
            states = tiny.residual_stream(block[None])
            q = lens(states[layer][0, :-1], translator).double()
            p = tiny.unembedding(states[-1][0, :-1]).double()
            kl.append(torch.nn.functional.kl_div(
                q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none"
            ).sum(-1))  # fmt: skip
        assert grid[translator][layer] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    own = [evaluation.by_layer("tuned", "kl_nats")[i].value for i in range(3)]
    assert [grid[i][i] for i in range(3)] == pytest.approx(own, rel=1e-6)


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


def assert_alike(one, other):
    """Compare all values of two evaluations to 1e-5, and their errors to 1e-4."""
    for part in ("results", "differences"):
        for a, b in zip(getattr(one, part), getattr(other, part), strict=True):
            assert a.value == pytest.approx(b.value, rel=1e-5, abs=1e-6), a
            assert a.standard_error == pytest.approx(b.standard_error, rel=1e-4, abs=1e-6), a
    for part in ("by_position", "transfer"):
        for lens, grids in getattr(one, part).items():
            for metric, grid in grids.items():
                values = np.array(grid.values, float)
                expected = np.array(getattr(other, part)[lens][metric].values, float)
                assert values == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_results_do_not_depend_on_batch_or_chunk(tiny, blocks, monkeypatch):
    settings = {"metrics": "all", "by_position": True, "transfer": True}
    one = run(tiny, blocks, batch_size=1, **settings)
    monkeypatch.setattr("tunedlens.evaluation.scoring.chunk_tokens", lambda *_: 7)
    other = run(tiny, blocks, batch_size=9, **settings)
    assert_alike(one, other)
    assert one.tokens_sha256 == other.tokens_sha256


def test_first_position_is_also_reported_apart(tiny, blocks):
    values = brute_force(tiny, LogitLens.from_model(tiny), blocks, 1)["kl_nats"][::23]
    actual = run(tiny, blocks).by_layer("logit", "kl_nats_position_0")[1].value
    assert actual == pytest.approx(sum(values) / 9, rel=1e-4)


def test_evaluation_reads_back_from_json(tiny, blocks):
    evaluation = run(tiny, blocks, by_position=True, transfer=True)
    data = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert Evaluation.from_json(data) == evaluation


@pytest.mark.parametrize("data", [[], {}, {"schema": 1}, {"schema": 2}])
def test_what_is_no_evaluation_is_refused(data):
    with pytest.raises(InputError, match=r"expected an evaluation|is damaged"):
        Evaluation.from_json(data)


def _evaluate_a_share(folder, blocks):
    return run(
        load_model(folder, device="cpu"),
        blocks,
        accelerator=join_processes("cpu"),
        tokens=190,
        metrics="all",
        by_position=True,
        transfer=True,
    )


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tiny, tiny_folder, blocks):
    settings = {"metrics": "all", "by_position": True, "transfer": True}
    expected = run(tiny, blocks, tokens=190, **settings)
    for share in in_two_processes(_evaluate_a_share, tiny_folder, blocks):
        assert share.tokens == 190
        assert share.tokens_sha256 == expected.tokens_sha256
        assert_alike(share, expected)


def test_nothing_to_score_is_refused(tiny, blocks):
    with pytest.raises(InputError, match="nothing to score"):
        run(tiny, blocks[:0])


@pytest.mark.parametrize("metrics", ["standard", "all"])
def test_lens_with_values_that_are_not_finite_is_refused(tiny, blocks, metrics):
    lens = random_lens(tiny)
    with torch.no_grad():
        lens.translator(1).bias[0] = math.nan
    with pytest.raises(InputError, match="of broken at layer 1 is nan"):
        score_lenses(tiny, {"broken": lens}, blocks, ScoringConfig(metrics=metrics))


def test_lens_of_another_model_is_refused(tiny, tokenizer, blocks):
    other = FrozenModel(make_gpt2(seed=1), tokenizer, name="other")
    lenses = {"foreign": LogitLens.from_model(other)}
    with pytest.raises(InputError, match="the lens foreign was made for other and does not fit"):
        score_lenses(tiny, lenses, blocks)


def test_blocks_of_different_length_are_refused(tiny, blocks):
    with pytest.raises(InputError, match="block 1 has 20 tokens, the first one 24"):
        run(tiny, [blocks[0], blocks[1, :20]])


def test_single_block_gives_values_without_errors(tiny, blocks):
    evaluation = run(tiny, blocks[:1], tokens=1, metrics="all", by_position=True)
    assert evaluation.tokens == 1
    assert all(result.standard_error is None for result in evaluation.results)


def test_mean_over_layers_has_an_error_of_its_own(tiny, blocks):
    evaluation = run(tiny, blocks)
    column = evaluation.by_layer("tuned", "kl_nats")
    value, error = evaluation.of_lens("tuned", "kl_nats")
    assert value == pytest.approx(np.mean([e.value for e in column]), rel=1e-6)
    per_block = (
        np.stack(
            [brute_force(tiny, lenses_of(tiny)["tuned"], blocks, i)["kl_nats"] for i in range(3)]
        )
        .reshape(3, 9, 23)
        .mean((0, 2))
    )
    assert error == pytest.approx(per_block.std(ddof=1) / 3, rel=1e-3)


def test_tokens_beyond_the_tokenizer_count_no_bytes(tiny):
    known = TokenBytes.of(tiny.tokenizer, len(tiny.tokenizer))
    padded = TokenBytes.of(tiny.tokenizer, len(tiny.tokenizer) + 3)
    assert padded.counts.tolist() == [*known.counts.tolist(), 0, 0, 0]


def test_bits_per_byte_are_left_out_where_bytes_are_unknown(tiny, blocks, monkeypatch):
    expected = run(tiny, blocks, by_position=True)
    monkeypatch.setattr(TokenBytes, "of", lambda *_: None)
    evaluation = run(tiny, blocks, by_position=True)
    assert evaluation.text_bytes == 0
    assert set(expected.metrics) - set(evaluation.metrics) == {"bits_per_byte"}
    assert evaluation.by_layer("tuned", "kl_nats") == expected.by_layer("tuned", "kl_nats")
    assert "bits per byte are left out" in report.terminal_table(evaluation)
    assert "bits_per_byte_by_layer.png" not in {
        f"{name}.png" for name, one in DRAWINGS.items() if one.has_data(evaluation)
    }
    assert "bytes" not in report.scored_text(evaluation)


def test_every_per_token_metric_is_a_property_of_the_statistics():
    for metric in per_token_metrics("all"):
        assert isinstance(getattr(LensStatistics, metric), (property, functools.cached_property))


@pytest.mark.parametrize("metric", [name for name, m in METRICS.items() if m.for_model])
def test_metric_of_the_model_is_reported(tiny, blocks, metric):
    assert math.isfinite(run(tiny, blocks[:2], metrics="all").of_model(metric).value)


@pytest.fixture
def corpus(text_file):
    return CorpusConfig(dataset=str(text_file), seq_len=16)


def test_evaluate_scores_saved_and_given_lenses_on_held_out_text(tiny, corpus, tmp_path):
    random_lens(tiny, seed=1).save(tmp_path / "lens")
    config = EvaluateConfig(lenses=(tmp_path / "lens",), corpus=corpus, split="validation")
    evaluation = evaluate(config, model=tiny, lenses={"mine": random_lens(tiny)})
    splits = load_splits(
        resolve_corpus(corpus, tiny.name, tiny.context, tiny.bos_id is not None), tiny.tokenizer
    )
    lenses = {
        "logit": LogitLens.from_model(tiny),
        "tuned": random_lens(tiny, seed=1),
        "mine": random_lens(tiny),
    }
    expected = score_lenses(tiny, lenses, splits.validation.shuffled())
    assert evaluation.results == expected.results
    assert evaluation.tokens_sha256 == expected.tokens_sha256


def test_evaluate_scores_both_sides_for_a_lens_that_does_not_say_its_text(model, tmp_path):
    random_lens(model).save(tmp_path / "lens")
    evaluation = evaluate(EvaluateConfig(lenses=(str(tmp_path / "lens"),), tokens=64), model=model)
    assert evaluation.provenance["config"]["split"] == "all"
    assert evaluation.tokens == 64


def test_evaluate_takes_the_held_out_side_by_default_for_a_lens_in_memory(tiny, corpus):
    evaluation = evaluate(
        EvaluateConfig(corpus=corpus), model=tiny, lenses={"mine": random_lens(tiny)}
    )
    assert evaluation.lenses == ["logit", "mine"]
    assert evaluation.provenance["config"]["split"] == "validation"
    assert evaluation.provenance["config"]["tokens"] == evaluation.tokens


def test_evaluate_reports_progress_up_to_all_positions(tiny, corpus):
    heard = []
    config = EvaluateConfig(corpus=corpus, tokens=100, batch_size=2)
    lenses = {"mine": random_lens(tiny)}
    evaluate(config, model=tiny, lenses=lenses, progress=lambda *seen: heard.append(seen))
    assert sum(scored for scored, _ in heard) == 100
    assert {total for _, total in heard} == {100}


def test_evaluation_from_python_is_written_and_read_back(tiny, corpus, tmp_path):
    evaluation = evaluate(
        EvaluateConfig(corpus=corpus, tokens=50), model=tiny, lenses={"mine": random_lens(tiny)}
    )
    write_report(evaluation, str(tmp_path / "report"))
    again = read_evaluation(tmp_path / "report")
    assert again.results == evaluation.results
    assert again.provenance["lenses"] == {"mine": {"kind": "in memory"}}


@pytest.mark.parametrize("name", ["logit", "model", "a/b"])
def test_lens_in_memory_needs_a_free_name(tiny, corpus, name):
    with pytest.raises(InputError, match=name):
        evaluate(EvaluateConfig(corpus=corpus), model=tiny, lenses={name: random_lens(tiny)})


def test_one_lens_of_a_config_needs_no_tuple():
    assert EvaluateConfig(lenses="checkpoints/embedded").lenses == ("checkpoints/embedded",)
