import dataclasses
import inspect
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import make_gpt2, make_llama, make_sentence_piece, random_lens
from transformers import BloomConfig, BloomForCausalLM

from tunedlens import (
    ConstantLens,
    FrozenModel,
    InputError,
    LogitLens,
    Trajectory,
    compare,
    difference,
    trajectory,
)
from tunedlens.metrics import TRAJECTORY_METRICS
from tunedlens.model import SITES
from tunedlens.report import plots
from tunedlens.trajectories import reading as reading_module
from tunedlens.trajectories import states as states_module

TEXT = "def naïve(x):\n    return x + 1\n"


@torch.no_grad()
def by_hand(model, lens, ids, site, layer):
    """Logits at every position, from hooks of the model's own blocks."""
    kept = {}

    def keep(name):
        def hook(_module, args, output):
            kept[name] = (args[0], output[0] if isinstance(output, tuple) else output)

        return hook

    blocks = model.model.transformer.h
    handles = [model.model.transformer.ln_f.register_forward_hook(keep("end"))]
    for index, block in enumerate(blocks):
        for name, module in (("in", block), ("attn", block.attn), ("mid", block.ln_2)):
            handles.append(module.register_forward_hook(keep((name, index))))
        handles.append(block.mlp.register_forward_hook(keep(("mlp", index))))
    model.model(ids[None])
    for handle in handles:
        handle.remove()
    if layer == len(blocks):
        return model.unembedding(kept["end"][0][0])
    hidden = {
        "resid_pre": kept["in", layer][0],
        "resid_mid": kept["mid", layer][0],
        "resid_post": kept["in", layer][1],
        "attn_out": kept["attn", layer][1],
        "mlp_out": kept["mlp", layer][1],
    }[site][0]
    if isinstance(lens, LogitLens):
        return model.unembedding(hidden)
    return lens(hidden, layer + (site == "resid_post"))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("name", "sites"), [("logit", SITES), ("tuned", ["resid_pre", "resid_post"])]
)
def test_every_number_equals_a_recomputation_from_hooks(tiny, monkeypatch, name, sites, chunked):
    if chunked:
        monkeypatch.setattr(reading_module, "LOGITS_AT_A_TIME", 4096 * 3 * 20)
    lens = LogitLens.from_model(tiny) if name == "logit" else random_lens(tiny)
    # Texts of several lengths, and so with padding, in two forward passes.
    monkeypatch.setattr(states_module, "_TOKENS_AT_A_TIME", 40)
    for found in trajectory(tiny, {name: lens}, [TEXT, "x", TEXT[:-9]], sites=sites, k=4):
        assert_equals_by_hand(tiny, lens, found, found.predictions[name])


def assert_equals_by_hand(tiny, lens, found, reading):
    ids = found.input_ids
    model = tiny.model(ids[None]).logits[0].double().log_softmax(-1)
    assert found.rows[-1] in (("resid_pre", 3), ("resid_post", 2))
    for index, (site, layer) in enumerate(found.rows):
        logits = by_hand(tiny, lens, ids, site, layer)
        log_probs = logits.double().log_softmax(-1)
        best = log_probs.topk(4)
        assert torch.equal(reading.top_ids[index], best.indices)
        assert torch.allclose(reading.top_log_probs[index].double(), best.values, atol=1e-4)
        own_logits = logits.gather(-1, best.indices)
        assert torch.allclose(reading.top_logits[index], own_logits, atol=1e-4)
        entropy = torch.distributions.Categorical(logits=log_probs).entropy()
        assert torch.allclose(reading.entropy_nats[index].double(), entropy, atol=1e-4)
        kl = (model.exp() * (model - log_probs)).sum(-1)
        assert torch.allclose(reading.kl_nats[index].double(), kl, atol=1e-4)
        following = log_probs[:-1].gather(-1, ids[1:, None])[:, 0]
        assert torch.allclose(reading.next_log_probs[index, :-1].double(), following, atol=1e-4)
        ranks = 1 + (log_probs[:-1] > following[:, None]).sum(-1)
        assert torch.equal(reading.next_ranks[index, :-1], ranks)
        for position, tracked in enumerate(found.tracked_ids.tolist()):
            for place, token in enumerate(tracked):
                value = reading.tracked_log_probs[index, position, place].item()
                if token < 0:
                    assert math.isnan(value)
                else:
                    assert value == pytest.approx(log_probs[position, token].item(), abs=1e-4)


def test_last_position_has_no_next_token(tiny):
    reading = trajectory(tiny, None, TEXT).predictions["logit"]
    assert reading.next_log_probs[:, -1].isnan().all()
    assert not reading.next_ranks[:, -1].any()


def test_tracked_by_default_is_what_some_row_likes_best(tiny):
    found = trajectory(
        tiny, {"logit": LogitLens.from_model(tiny), "tuned": random_lens(tiny)}, TEXT
    )
    for position, tracked in enumerate(found.tracked_ids.tolist()):
        best = {int(i) for r in found.predictions.values() for i in r.top_ids[:, position, 0]}
        assert {token for token in tracked if token >= 0} == best


def test_probabilities_are_those_of_the_chosen_tokens(tiny):
    tokens = [" return", "x", 17]
    found = trajectory(tiny, None, TEXT, track=tokens)
    table = found.probabilities(tokens)
    assert list(table.columns) == [" return", "x", tiny.tokenizer.decode([17])]
    lens = LogitLens.from_model(tiny)
    for layer, hidden in enumerate(tiny.residual_stream(found.input_ids[None])):
        probs = lens(hidden[0], layer).softmax(-1)
        rows = table.loc["resid_pre", layer]
        x = tiny.tokenizer.encode("x")[0]
        assert rows["x"].to_numpy() == pytest.approx(probs[:, x].numpy(), rel=1e-4)
    assert np.isfinite(table.corr().to_numpy()).all()


def test_top_k_is_a_table_of_words_and_probabilities(tiny):
    found = trajectory(tiny, None, TEXT, sites=["resid_mid", "resid_post"])
    table = found.top_k(position=-2, k=3).to_dataframe()
    assert list(table.index[:3]) == [("resid_mid", 0), ("resid_post", 0), ("resid_mid", 1)]
    probs = tiny.model(found.input_ids[None]).logits[0, -2].softmax(-1)
    best = probs.topk(3)
    last = table.loc[("resid_post", 2)]
    assert [last[place, "token"] for place in (1, 2, 3)] == [
        tiny.tokenizer.decode([i]) for i in best.indices.tolist()
    ]
    assert [last[place, "probability"] for place in (1, 2, 3)] == pytest.approx(
        best.values.tolist(), rel=1e-4
    )


def test_top_k_says_the_same_in_markdown_plain_and_coloured(tiny):
    found = trajectory(tiny, None, TEXT).top_k(k=2)
    table = dataclasses.replace(found, probs=[[0.3 + row / 10, 0.04] for row in range(4)])
    plain = [line.split() for line in str(table).splitlines()]
    markdown = [
        line.replace("`", "").strip("| ").split(" | ") for line in table.to_markdown().splitlines()
    ]
    del markdown[1]
    assert [" ".join(cells).split() for cells in markdown] == plain
    coloured = table.to_text()
    assert coloured.count("\x1b[0m") == 4  # the others are improbable
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == str(table)
    assert plain[-1][0] == "model"
    assert plain[-1][2] == "0.600"


def test_wide_tables_have_the_words_and_figures_of_every_cell(tiny):
    found = trajectory(tiny, None, TEXT)
    reading = found.predictions["logit"]
    word = found.vocabulary[int(reading.top_ids[1, 4, 0])].shown
    column = (4, found.vocabulary[int(found.input_ids[4])].shown)
    assert found.words().loc[("resid_pre", 1), column] == word
    for metric, expected in (
        ("kl_nats", reading.kl_nats),
        ("logit", reading.top_logits[..., 0]),
        ("entropy_nats", reading.entropy_nats),
        ("cross_entropy_nats", -reading.next_log_probs),
    ):
        scores = found.scores(metric).to_numpy()
        assert np.allclose(scores, expected.numpy(), equal_nan=True)


def test_rank_of_the_models_best_token(tiny):
    lens = random_lens(tiny)
    found = trajectory(tiny, lens, TEXT, track=["x"])
    stream = tiny.residual_stream(found.input_ids[None])
    best = tiny.model(found.input_ids[None]).logits[0].argmax(-1, keepdim=True)
    for layer, hidden in enumerate(stream):
        logits = lens(hidden[0], layer)
        expected = 1 + (logits > logits.gather(-1, best)).sum(-1)
        assert found.values("rank", token="final")[layer].tolist() == expected.tolist()


def test_a_part_has_the_rows_and_positions_that_are_asked_for_and_the_model(tiny):
    found = trajectory(tiny, None, TEXT)
    part = found[1:2, 3:8]
    assert part.rows == [("resid_pre", 1), ("resid_pre", 3)]
    assert part.tokens == found.tokens[3:8]
    assert part.positions == [3, 4, 5, 6, 7]
    assert torch.equal(part.next_ids, found.input_ids[4:9])
    for metric in ("kl_nats", "probability", "rank"):
        pair = [read.values(metric, token="final") for read in (part, found)]
        assert torch.equal(pair[0], pair[1][[1, 3], 3:8])
    assert found[::2].rows == [("resid_pre", layer) for layer in (0, 2, 3)]
    assert found[-1].row_names == ["model"]
    assert part[:, -1].tokens == found.tokens[7:8]
    assert found[:, -1].next_ids.tolist() == [-1]


@pytest.mark.parametrize(
    ("name", "tuned"), [("kl_to_baseline_nats", 0), ("js_nats", 0), ("total_variation", 1)]
)
def test_divergences_are_as_they_are_defined(tiny, monkeypatch, name, tuned):
    monkeypatch.setattr(reading_module, "LOGITS_AT_A_TIME", 4096 * 4 * 6)
    lenses = {"logit": LogitLens.from_model(tiny), "tuned": random_lens(tiny)}
    both = compare(tiny, lenses, "x = 1 + 2 + 3", baseline_text="y = 1 - 2 + 4")
    one, two = both.trajectory, both.baseline
    lens = ("logit", "tuned")[tuned]
    found = both[1:, 2:].values(name, lens)
    for row, layer in enumerate((1, 2, 3)):
        p, q = (
            lenses[lens](tiny.residual_stream(read.input_ids[None])[layer][0, 2:], layer)
            .double()
            .softmax(-1)
            for read in (one, two)
        )
        middle = (p + q) / 2
        expected = {
            "kl_to_baseline_nats": (p * (p / q).log()).sum(-1),
            "js_nats": ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2,
            "total_variation": (p - q).clamp(min=0).sum(-1),
        }[name]
        assert torch.allclose(found[row].double(), expected, atol=1e-5)


def test_figures_against_another_lens_are_differences(tiny):
    lenses = {"logit": LogitLens.from_model(tiny), "tuned": random_lens(tiny)}
    found = trajectory(tiny, lenses, TEXT)
    expected = found.predictions["tuned"].kl_nats - found.predictions["logit"].kl_nats
    assert torch.equal(difference(found, "tuned", "logit").values("kl_nats"), expected)
    both = compare(tiny, lenses["logit"], TEXT, baseline_lenses=lenses["tuned"])
    between = both.values("js_nats")
    assert between[-1].max() < 1e-6 < between[:-1].min()  # in the end both are the model


@pytest.mark.parametrize("metric", ["probability", "log_prob", "logit", "rank"])
@pytest.mark.parametrize("token", ["final", " return"])
def test_difference_of_two_texts_is_of_one_token(tiny, monkeypatch, metric, token):
    monkeypatch.setattr(reading_module, "LOGITS_AT_A_TIME", 4096 * 4 * 4)
    texts = {"text": " return x + 1", "baseline_text": " return y - 2"}
    both = compare(tiny, None, **texts, track=" return")
    one, two = both.trajectory, both.baseline
    found = both[:, 1:].values(metric, token=token)
    wanted = tiny.encode(" return")[0].expand(len(one.positions))
    if token == "final":
        wanted = tiny.model(one.input_ids[None]).logits[0].argmax(-1)
    lens = LogitLens.from_model(tiny)
    for row in range(4):
        values = []
        for read in (one, two):
            logits = lens(tiny.residual_stream(read.input_ids[None])[row][0], row)
            own = logits.gather(-1, wanted[:, None])
            log_probs = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
            values.append(
                {
                    "probability": log_probs.exp(),
                    "log_prob": log_probs,
                    "logit": own[:, 0],
                    "rank": 1.0 + (logits > own).sum(-1),
                }[metric]
            )
        assert torch.allclose(found[row], (values[0] - values[1])[1:], atol=1e-4)


def test_lenses_in_a_list_are_named_by_their_kind(tiny):
    found = trajectory(tiny, [random_lens(tiny), LogitLens.from_model(tiny)], TEXT)
    assert list(found.predictions) == ["tuned", "logit"]
    with pytest.raises(InputError, match=r"several lenses of one kind \(logit, logit\)"):
        trajectory(tiny, [LogitLens.from_model(tiny)] * 2, TEXT)


def test_every_window_begins_with_bos_if_the_text_does():
    model = FrozenModel(make_gpt2(), make_sentence_piece(), name="tiny")
    found = trajectory(model, None, "the quick brown fox jumps " * 15, stride=10)
    ids, bos = found.input_ids, model.bos_id
    assert ids[0] == bos
    assert len(ids) > 2 * 32
    for position in range(32, len(ids)):
        start = next(start for start in range(10, len(ids), 10) if position < start + 32)
        seen = torch.tensor([[bos, *ids[start + 1 : position + 1]]])
        logits = model.model(seen).logits[0, -1]
        assert found.predictions["logit"].top_ids[-1, position, 0] == logits.argmax()


def test_windows_give_every_position_the_text_before_it(tiny):
    text = "a = b + c\n" * 12  # 72 tokens, the context is 32
    found = trajectory(tiny, None, text, stride=10, sites=["resid_mid", "resid_post"])
    ids = found.input_ids
    assert len(ids) > 2 * 32
    starts = [0, *(start for start in range(10, len(ids), 10))]
    for position in range(len(ids)):
        start = next(start for start in starts if position < start + 32)
        logits = tiny.model(ids[None, start : position + 1]).logits[0, -1]
        assert found.predictions["logit"].top_ids[-1, position, 0] == logits.argmax()
        log_probs = logits.log_softmax(-1)
        if position + 1 < len(ids):
            value = found.predictions["logit"].next_log_probs[-1, position]
            assert value == pytest.approx(log_probs[ids[position + 1]].item(), abs=1e-4)
    both = compare(
        tiny, None, text, baseline_text=text.replace("b", "d"), stride=10, sites=["resid_post"]
    )
    other, between = both.baseline, both.values("kl_to_baseline_nats")[-1]
    for position in (0, 40, 50):
        start = next(start for start in starts if position < start + 32)
        p, q = (
            tiny.model(read.input_ids[None, start : position + 1]).logits[0, -1].log_softmax(-1)
            for read in (found, other)
        )
        assert between[position].item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-4)


def test_dataframe_is_tidy(tiny):
    found = trajectory(tiny, None, TEXT)
    table = found.to_dataframe()
    assert len(table) == 4 * len(found.tokens)
    row = table[(table.layer == 2) & (table.position == 3)].iloc[0]
    reading = found.predictions["logit"]
    assert row.kl_nats == pytest.approx(reading.kl_nats[2, 3].item())
    assert row.next_token == found.tokens[4]
    assert "".join(found.tokens[:3]) == "def na"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"text": ""}, "no tokens"),
        ({"text": "a b " * 40}, "reads at most 32"),
        ({"sites": ["resid"]}, "sites must be some of resid_pre"),
        ({"sites": []}, "got none"),
        ({"k": 0}, "k must be between 1 and 4096"),
        ({"track": ["two words"]}, "tokens"),
        ({"track": [9999]}, "between 0 and 4095, got 9999"),
        ({"lenses": {}}, "the list of lenses is empty"),
        ({"lenses": 7}, "the lens int is a int"),
        ({"text": []}, "the list of texts is empty"),
        ({"text": None}, "expected a text, its token ids, or a list of texts; got NoneType"),
        ({"text": b"bytes"}, "got bytes"),
        ({"track": 1.5}, "expected a token as text or id, got 1.5"),
        ({"text": ["fine", ""]}, "no tokens"),
        ({"text": ["fine", "a b " * 40]}, "text 2 has .* reads at most 32"),
        ({"text": torch.tensor([1, 4096])}, "between 0 and 4095, got 1 to 4096"),
        ({"text": torch.zeros(2, 3, dtype=torch.long)}, r"in one row, got torch.int64 of .*2, 3"),
        ({"text": "a b " * 40, "stride": 0}, "stride must be between 1 and 32"),
        ({"text": "a b " * 40, "stride": 33}, "stride must be between 1 and 32"),
    ],
)
def test_bad_input_is_one_clear_error(tiny, arguments, words):
    settings = {"lenses": None, "text": TEXT} | arguments
    with pytest.raises(InputError, match=words):
        trajectory(tiny, settings.pop("lenses"), settings.pop("text"), **settings)


def test_translators_are_not_used_within_blocks(tiny):
    with pytest.raises(InputError, match="the lens tuned has no translators for resid_mid"):
        trajectory(tiny, random_lens(tiny), TEXT, sites=["resid_mid"])


def test_questions_that_have_no_answer_are_refused(tiny):
    found = trajectory(tiny, None, TEXT, k=3)
    with pytest.raises(InputError, match="position must be between"):
        found.top_k(position=99)
    with pytest.raises(InputError, match="k must be between 1 and 3"):
        found.top_k(k=4)
    with pytest.raises(InputError, match="lens must be one of logit"):
        found.top_k(lens="tuned")
    with pytest.raises(InputError, match="␣import was not tracked"):
        found.probabilities([" import"])
    with pytest.raises(InputError, match="metric must be one of probability"):
        found.values("js_nats")
    with pytest.raises(InputError, match=r"got 'js_nats'; `compare` computes divergences"):
        difference(found, "logit", "logit").values("js_nats")
    with pytest.raises(InputError, match="rank of top1 is 1 everywhere"):
        found.values("rank", token="top1")
    with pytest.raises(InputError, match=r"expected a token as text or id, got 1\.5"):
        found.values(token=1.5)
    with pytest.raises(InputError, match="the list of tokens is empty"):
        found.probabilities([])
    with pytest.raises(InputError, match="metric must be one of"):
        found.heatmap(["logit"])
    with pytest.raises(InputError, match="layer must be between -4 and 3, or a slice; got 4"):
        found[4]
    with pytest.raises(InputError, match="no position in slice"):
        found[:, 50:]
    with pytest.raises(InputError, match="same number of positions; got 3 and 1"):
        compare(tiny, None, TEXT, positions=slice(3), baseline_positions=0)
    with pytest.raises(InputError, match="there is no baseline"):
        compare(tiny, None, TEXT)


def test_stream_between_blocks_is_read_of_any_architecture(tokenizer):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=4096, hidden_size=16, n_layer=2, n_head=2)
    model = FrozenModel(BloomForCausalLM(config), tokenizer)
    found = trajectory(model, None, TEXT, sites=["resid_pre", "resid_post"])
    assert found.rows[1:3] == [("resid_post", 0), ("resid_pre", 1)]
    figures = found.values("entropy_nats")
    assert torch.equal(figures[1], figures[2])


@torch.no_grad()
def test_another_architecture_in_half_precision_is_read_where_its_norms_read(tokenizer):
    model = FrozenModel(make_llama().bfloat16(), tokenizer)
    texts = [TEXT, "x = 1"]
    for read in trajectory(model, None, texts, sites=["resid_mid", "resid_post"]):
        kept = []
        handle = model.blocks[1].post_attention_layernorm.register_forward_pre_hook(
            lambda _module, args, kept=kept: kept.append(args[0][0])
        )
        final = model.model.model(read.input_ids[None]).last_hidden_state[0]
        handle.remove()
        middle = model.unembedding(kept[0]).log_softmax(-1)
        best = read.predictions["logit"].top_log_probs[2, :, 0]
        assert torch.allclose(best, middle.max(-1).values, atol=0.02)
        logits = final.float() @ model.unembedding.weight.T
        best = read.predictions["logit"].top_log_probs[-1, :, 0]
        assert torch.allclose(best, logits.log_softmax(-1).max(-1).values, atol=0.02)


def test_lens_that_is_not_finite_is_refused(tiny):
    lens = random_lens(tiny)
    lens.translator(1).bias.data[0] = math.nan
    with pytest.raises(
        InputError, match="predictions of the lens broken on the text are not finite"
    ):
        trajectory(tiny, {"broken": lens}, TEXT)


def test_token_may_be_called_as_a_figure_is_of(tiny):
    read = trajectory(tiny, None, TEXT, track="final")
    word = tiny.encode("final")[0].item()
    log_probs = tiny.model(read.input_ids[None]).logits[0].log_softmax(-1)[:, word]
    found = read.probabilities("final").loc["resid_pre", 3]["final"]
    assert np.allclose(found, log_probs.exp().detach(), atol=1e-6)


@pytest.mark.parametrize("several", [list, tuple])
def test_texts_may_be_ids_in_any_form(tiny, several):
    ids = tiny.encode(TEXT)[0]
    expected = trajectory(tiny, None, TEXT)
    for read in (
        trajectory(tiny, None, ids),
        trajectory(tiny, None, ids.tolist()),
        *trajectory(tiny, None, several([ids, TEXT])),
        *trajectory(tiny, None, several([ids.tolist()] * 2)),
    ):
        assert torch.allclose(read.values("kl_nats"), expected.values("kl_nats"), atol=1e-5)


def test_lens_of_another_model_is_refused(tiny, model):
    with pytest.raises(InputError, match="the lens tuned was made for tiny and does not fit"):
        trajectory(model, random_lens(tiny), TEXT)


def test_constant_lens_reads_no_text(tiny):
    lens = ConstantLens(torch.zeros(4096), tiny.identity)
    with pytest.raises(InputError, match="is a ConstantLens, which does not read the states"):
        trajectory(tiny, {"unigram": lens}, TEXT)


def test_compare_tracks_the_best_tokens_of_both_sides_at_aligned_positions(tiny):
    lenses = {"tuned": random_lens(tiny), "logit": LogitLens.from_model(tiny)}
    both = compare(
        tiny,
        lenses,
        "x = 1 + 2",
        baseline_text="def y(x):",
        positions=slice(1, 4),
        baseline_positions=slice(0, 3),
    )
    assert torch.equal(both.trajectory.tracked_ids, both.baseline.tracked_ids)
    for position, ids in enumerate(both.trajectory.tracked_ids.tolist()):
        best = {
            int(i)
            for side in (both.trajectory, both.baseline)
            for one in side.predictions.values()
            for i in one.top_ids[:, position, 0]
        }
        assert {i for i in ids if i >= 0} == best
    assert both.trajectory.positions == [1, 2, 3]
    assert not both.values("probability", token="final").isnan().any()


def test_two_models_with_one_vocabulary_are_compared(tiny, tokenizer):
    other = FrozenModel(make_gpt2(seed=1), tokenizer, name="other")
    both = compare(tiny, None, TEXT, baseline_model=other)
    ids = both.trajectory.input_ids[None]
    p, q = (model.model(ids).logits[0].double().log_softmax(-1) for model in (tiny, other))
    expected = (p.exp() * (p - q)).sum(-1)
    found = both.values("kl_to_baseline_nats")[-1].double()
    assert torch.allclose(found, expected, atol=1e-5)
    label = both.heatmap("js_nats").axes[-1].get_ylabel().replace("\n", " ")
    assert label.endswith("tiny and other")
    smaller = FrozenModel(make_gpt2(n_layer=2), tokenizer, name="smaller")
    with pytest.raises(InputError, match="same number of layers; got 3 and 2"):
        compare(tiny, None, TEXT, baseline_model=smaller)


def test_the_engine_decodes_as_the_lens_itself_does(tiny):
    lens = random_lens(tiny)
    read = trajectory(tiny, lens, TEXT).predictions["tuned"]
    for layer, hidden in enumerate(tiny.residual_stream(TEXT)):
        best = lens(hidden[0], layer).log_softmax(-1).topk(10)
        assert torch.equal(read.top_ids[layer], best.indices)
        assert torch.allclose(read.top_log_probs[layer], best.values, atol=1e-5)


def views(read, both):
    """Everything that can be drawn or printed of a trajectory and a comparison, as bytes."""
    texts = {
        "page": read.to_html(),
        "top_k": str(read.top_k()),
        "table": read.to_dataframe().to_csv(),
        "words": read[1:, 2:].words().to_csv(),
        "probabilities": read.probabilities([" return", 17]).to_csv(),
        "scores": both.scores("js_nats").to_csv(),
    }
    figures = {
        "heatmap": read.heatmap("kl_nats", ["tuned", "logit"]),
        "curves": read.curves(" return", metric="rank"),
        "difference": both.heatmap("logit", token=" return"),
    }
    drawn = {name: plots.rendered(figure, "svg") for name, figure in figures.items()}
    return {name: text.encode() for name, text in texts.items()} | drawn


WITHOUT_MODEL = """
import sys
from pathlib import Path
import transformers
from tunedlens import Comparison, Trajectory
from tunedlens.report import plots

def refuse(*_):
    raise AssertionError("no model is needed")

transformers.AutoModelForCausalLM.from_pretrained = refuse
transformers.AutoTokenizer.from_pretrained = refuse
"""
WRITE = """
folder = Path(sys.argv[1])
read = Trajectory.load(folder / "read.safetensors")
both = Comparison.load(str(folder / "both.safetensors"))
for name, content in views(read, both).items():
    (folder / f"{name}.new").write_bytes(content)
"""


@pytest.mark.slow
@pytest.mark.renders
def test_saved_data_give_the_same_views_in_a_process_without_the_model(tiny, tmp_path):
    lenses = {"tuned": random_lens(tiny), "logit": LogitLens.from_model(tiny)}
    read = trajectory(tiny, lenses, TEXT, track=[" return", 17])
    both = compare(tiny, lenses, TEXT, baseline_text=TEXT.replace("x", "y"), track=" return")
    read.save(tmp_path / "read.safetensors")
    both.save(str(tmp_path / "both.safetensors"))
    script = WITHOUT_MODEL + inspect.getsource(views) + WRITE
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    for name, expected in views(read, both).items():
        assert (tmp_path / f"{name}.new").read_bytes() == expected, name


def resaved(path, change):
    """The file again, with its record and tensors changed."""
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["tunedlens"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about, tensors)
    safetensors.torch.save_file(tensors, path, {"tunedlens": json.dumps(about)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda about, _: about.update(kind="comparison"), "trajectory: it holds a comparison"),
        (lambda about, _: about.update(format=9), "format 9; this version reads format 1"),
        (lambda about, _: about.update(records=[]), "no description of its content"),
        (lambda about, _: about.update(records=[1]), "damaged"),
        (lambda about, _: about["records"][0].pop("rows"), "damaged.*: rows is missing"),
        (
            lambda about, _: about["records"][0].update(rows=[["attic", 0]]),
            "rows are missing or unknown",
        ),
        (lambda about, _: about["records"][0].update(rows=3), "damaged"),
        (lambda about, _: about["records"][0].update(positions="all"), "a list of int values"),
        (lambda about, _: about["records"][0].update(vocabulary={}), "has no text"),
        (lambda about, _: about["records"][0].update(vocabulary={"x": ["a", "b"]}), "damaged"),
        (
            lambda about, _: about["records"][0].update(lenses=["a", "a"]),
            "lens names are missing or repeated",
        ),
        (lambda _, tensors: tensors.pop("input_ids"), "input_ids is missing"),
        (lambda _, tensors: tensors.update({"0.kl_nats": torch.zeros(2)}), r"shape \(2,\)"),
        (lambda _, tensors: tensors.update(next_ids=torch.zeros(14)), "next_ids is torch.float32"),
    ],
)
def test_damaged_file_is_one_clear_error(tiny, tmp_path, change, words):
    path = tmp_path / "read.safetensors"
    trajectory(tiny, None, TEXT).save(path)
    resaved(path, change)
    with pytest.raises(InputError, match=words):
        Trajectory.load(path)


def test_foreign_file_is_one_clear_error(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(InputError, match="there is no file"):
        Trajectory.load(path)
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        Trajectory.load(tmp_path)
    for content in (
        b"",
        b"PK\x03\x04",
        b"\xff" * 100,
        safetensors.torch.save({"a": torch.ones(1)}),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is damaged"):
            Trajectory.load(path)


def test_every_metric_of_the_catalogue_that_needs_no_token_is_in_a_trajectory(tiny):
    read = trajectory(tiny, None, "import os")
    for name, metric in TRAJECTORY_METRICS.items():
        if not metric.has_token:
            assert read.values(name, "logit").shape == (len(read.rows), len(read.positions)), name
