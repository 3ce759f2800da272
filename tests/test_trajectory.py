import math
import sys

import numpy as np
import pytest
import torch
from conftest import random_lens

from tunedlens import InputError, LogitLens, trajectory
from tunedlens.frozen import SITES

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
        module = sys.modules["tunedlens.trajectory"]  # the package's own name is the function
        monkeypatch.setattr(module, "_LOGITS_AT_A_TIME", 4096 * 3 * 20)
    lens = LogitLens.from_model(tiny) if name == "logit" else random_lens(tiny)
    found = trajectory(tiny, {name: lens}, TEXT, sites=sites, k=4)
    ids, reading = found.input_ids, found.readings[name]
    model = tiny.model(ids[None]).logits[0].double().log_softmax(-1)
    assert reading.rows[-1] in (("resid_pre", 3), ("resid_post", 2))
    for index, (site, layer) in enumerate(reading.rows):
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
        assert torch.allclose(reading.next_log_prob[index, :-1].double(), following, atol=1e-4)
        ranks = 1 + (log_probs[:-1] > following[:, None]).sum(-1)
        assert torch.equal(reading.next_rank[index, :-1], ranks)
        for position, tracked in enumerate(found.tracked_ids.tolist()):
            for place, token in enumerate(tracked):
                value = reading.tracked_log_probs[index, position, place].item()
                if token < 0:
                    assert math.isnan(value)
                else:
                    assert value == pytest.approx(log_probs[position, token].item(), abs=1e-4)


def test_last_position_has_no_next_token(tiny):
    reading = trajectory(tiny, None, TEXT).readings["logit"]
    assert reading.next_log_prob[:, -1].isnan().all()
    assert not reading.next_rank[:, -1].any()


def test_tracked_by_default_is_what_some_row_likes_best(tiny):
    found = trajectory(
        tiny, {"logit": LogitLens.from_model(tiny), "tuned": random_lens(tiny)}, TEXT
    )
    for position, tracked in enumerate(found.tracked_ids.tolist()):
        best = {int(i) for r in found.readings.values() for i in r.top_ids[:, position, 0]}
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
    table = found.top_k(position=-2, k=3)
    assert list(table.index[:3]) == [("resid_mid", 0), ("resid_post", 0), ("resid_mid", 1)]
    word, probability = table.loc[("resid_post", 2), 1]
    probs = tiny.model(found.input_ids[None]).logits[0, -2].softmax(-1)
    assert word == tiny.tokenizer.decode([int(probs.argmax())])
    assert probability == pytest.approx(probs.max().item(), rel=1e-4)


def test_dataframe_is_tidy(tiny):
    found = trajectory(tiny, None, TEXT)
    table = found.to_dataframe()
    assert len(table) == 4 * len(found.tokens)
    row = table[(table.layer == 2) & (table.position == 3)].iloc[0]
    reading = found.readings["logit"]
    assert row.kl_nats == pytest.approx(reading.kl_nats[2, 3].item())
    assert row.next_token == found.tokens[4]
    assert "".join(found.tokens[:3]) == "def na"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"text": ""}, "no tokens"),
        ({"text": "a b " * 40}, "reads at most 32"),
        ({"sites": ["resid"]}, "sites must be of resid_pre"),
        ({"sites": []}, "got none"),
        ({"k": 0}, "k must be between 1 and 4096"),
        ({"track": ["two words"]}, "tokens"),
        ({"track": [9999]}, "between 0 and 4095, got 9999"),
        ({"lenses": {}}, "no lens to read with"),
    ],
)
def test_bad_input_is_one_clear_error(tiny, arguments, words):
    settings = {"lenses": None, "text": TEXT} | arguments
    with pytest.raises(InputError, match=words):
        trajectory(tiny, settings.pop("lenses"), settings.pop("text"), **settings)


def test_translators_are_not_used_within_blocks(tiny):
    with pytest.raises(InputError, match="the lens tuned has translators for the stream between"):
        trajectory(tiny, random_lens(tiny), TEXT, sites=["resid_mid"])


def test_questions_that_have_no_answer_are_refused(tiny):
    found = trajectory(tiny, None, TEXT, k=3)
    with pytest.raises(InputError, match="position must be between"):
        found.top_k(position=99)
    with pytest.raises(InputError, match="k must be between 1 and 3"):
        found.top_k(k=4)
    with pytest.raises(InputError, match="lens must be one of logit"):
        found.top_k(lens="tuned")
    with pytest.raises(InputError, match="was not tracked at every position"):
        found.probabilities([" return"])
