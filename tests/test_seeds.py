"""What people do by hand in notebooks, in a call or two: the same numbers, and GPT-2's own."""

import json
import os
import re

import numpy as np
import pandas as pd
import pytest
import torch

from tunedlens import LogitLens, load_model, neurons, trajectory
from tunedlens.tokenizer import shown

CAPITAL = "What is the capital of the US"
BIRTHDAY = "Happy birthday to You, happy"
TOWER = "The Eiffel Tower is in the city of"
DOG = "Hello, my dog is cute"
POLAND = "Q: What is the capital of France?\nA: Paris\nQ: What is the capital of Poland?\nA:"


@torch.no_grad()
def block_outputs(model, text):
    """What every block leaves, by forward hooks, as the notebooks have it."""
    kept = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, output: kept.append(output[0]))
        for block in model.model.transformer.h
    ]
    model.model(model.encode(text))
    for hook in hooks:
        hook.remove()
    return torch.stack(kept)  # a block returns a tensor: its first entry is the only text


@torch.no_grad()
def decoded(model, hidden):
    return model.model.lm_head(model.model.transformer.ln_f(hidden))


def test_words_and_scores_by_layer(model):
    read = trajectory(model, None, CAPITAL)
    logits = decoded(model, block_outputs(model, CAPITAL)[:-1])
    best = logits.max(-1)
    words = [[shown(model.tokenizer, i) for i in line] for line in best.indices.tolist()]
    assert read.words()[1:-1].to_numpy().tolist() == words
    scores = read.scores("logit")[1:-1].to_numpy()
    assert np.allclose(scores, best.values, atol=1e-3)
    image = read.heatmap("logit").axes[0].images[0].get_array()
    assert np.allclose(image[1:-1], best.values, atol=1e-3)


def test_probabilities_ranks_and_kl_of_every_layer(model):
    read = trajectory(model, None, BIRTHDAY)
    log_probs = decoded(model, block_outputs(model, BIRTHDAY)).log_softmax(-1)
    final = log_probs[-1]
    best = final.argmax(-1)
    own = log_probs.gather(-1, best.expand(len(log_probs), -1)[..., None])
    expected = {
        "probability": log_probs.max(-1).values.exp(),
        "rank": 1 + (log_probs > own).sum(-1),
        "kl_nats": (final.exp() * (final - log_probs)).sum(-1),
    }
    for metric, values in expected.items():
        token = "final" if metric == "rank" else "top1"
        image = read.heatmap(metric, token=token).axes[0].images[0].get_array()
        assert np.allclose(image[1:], values, atol=1e-3), metric


def test_interactive_heatmap_of_the_best_probability(model):
    best = decoded(model, block_outputs(model, TOWER)).softmax(-1).max(-1)
    page = trajectory(model, None, TOWER).to_html()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    probs = np.array(data["texts"][0]["lenses"]["logit"]["top_probs"])[1:, :, 0]
    assert np.allclose(probs, best.values, atol=1e-3)


def seed_table(read, lens=None):
    """Tokens of the text down, its positions across, and which token is which; the last layer."""
    ids = read.input_ids.tolist()
    table = read.probabilities(ids, lens).loc[read.rows[-1]].T.reset_index(drop=True)
    return pd.concat([table, pd.DataFrame(np.eye(len(ids))).add_prefix("pos_")], axis=1)


def test_probabilities_of_the_texts_own_tokens_and_their_correlation(model):
    ids = model.encode(DOG)[0]
    read = trajectory(model, None, DOG, track=ids.tolist())
    probs = model.model(ids[None]).logits[0].softmax(-1)[:, ids].T
    table = seed_table(read)
    assert np.allclose(table[table.columns[: len(ids)]], probs.detach(), atol=1e-5)
    here, token = probs[:, 1].detach().numpy(), np.eye(len(ids))[2]
    assert table.corr().loc[1, "pos_2"] == pytest.approx(np.corrcoef(here, token)[0, 1], abs=1e-4)


def test_best_tokens_after_attention_and_after_the_mlp(model):
    sites = ["resid_mid", "resid_post"]
    table = trajectory(model, None, POLAND, sites=sites).top_k(position=-1, k=5).to_dataframe()
    kept = {}
    block = model.model.transformer.h[3]
    hooks = [
        block.ln_2.register_forward_pre_hook(lambda _m, args: kept.update(resid_mid=args[0])),
        block.register_forward_hook(lambda _m, _a, output: kept.update(resid_post=output)),
        block.mlp.c_proj.register_forward_pre_hook(lambda _m, args: kept.update(m_coef=args[0])),
    ]
    model.model(model.encode(POLAND))
    for hook in hooks:
        hook.remove()
    for site in sites:
        best = decoded(model, kept[site][0, -1]).softmax(-1).topk(5)
        line = table.loc[site, 3]
        for place in range(5):
            assert line[place + 1, "token"] == model.tokenizer.decode([best.indices[place]])
            expected = best.values[place].item()
            assert line[place + 1, "probability"] == pytest.approx(expected, abs=1e-5)
    coefficients = kept["m_coef"][0, -1].detach()
    found = neurons(model, POLAND, 3, k=3)
    assert found.index.tolist() == coefficients.abs().topk(3).indices.tolist()


# GPT-2 itself, from the hub or from a local folder.


@pytest.fixture(scope="module")
def gpt2():
    return load_model(os.environ.get("TUNEDLENS_GPT2", "gpt2"), device="cpu")


@pytest.fixture(scope="module")
def gpt2_medium():
    return load_model(os.environ.get("TUNEDLENS_GPT2_MEDIUM", "gpt2-medium"), device="cpu")


@pytest.mark.network
def test_words_of_gpt2_are_those_of_the_notebook(gpt2):
    read = trajectory(gpt2, None, CAPITAL)
    assert [token.strip() for token in read.tokens] == CAPITAL.split()
    expected = """
        the still same capital the same US
        the still same capital the same Army
        the really same capital the same Army
        the really difference capital the same National
        the really difference capital the world National
        the really difference capital the world National
        the really difference difference the world Embassy
        the happening best ization the world Dollar
        the the difference ization the world ?
        the the difference ization the country ?
        the the difference ization the world ?
    """
    words = [[word.strip("␣") for word in line] for line in read.words()[1:-1].to_numpy()]
    assert words == [line.split() for line in expected.split("\n")[1:-1]]


@pytest.mark.network
def test_what_the_notebook_calls_logits_are_entries_of_the_normalised_state(gpt2):
    states = gpt2.residual_stream(CAPITAL)[1:-1]
    largest = torch.stack([gpt2.final_norm(state[0]).max(-1).values for state in states])
    assert largest[0].tolist() == pytest.approx(
        [7.787462, 20.594513, 9.138568, 24.357695, 9.559299, 6.387348, 9.397331], abs=1e-3
    )
    assert largest[10].tolist() == pytest.approx(
        [9.615498, 135.350769, 141.646652, 103.498466, 94.174065, 104.911774, 96.959976], abs=1e-2
    )


@pytest.mark.network
def test_probabilities_of_gpt2_are_those_of_the_notebook(gpt2):
    ids = gpt2.encode(DOG)[0].tolist()
    table = seed_table(trajectory(gpt2, None, DOG, track=ids))
    assert table[0][1] == pytest.approx(0.096024, abs=1e-3)
    assert table[3][4] == pytest.approx(0.1778956, abs=1e-3)
    assert table[5][1] == pytest.approx(0.133517, abs=1e-3)
    correlation = table.corr()["pos_1"]
    assert correlation[5] == pytest.approx(0.999999, abs=1e-3)
    assert correlation[0] == pytest.approx(0.996248, abs=1e-3)
    assert correlation[3] == pytest.approx(0.273205, abs=1e-3)


@pytest.mark.network
def test_best_tokens_of_gpt2_medium_are_those_of_the_notebook(gpt2_medium):
    table = trajectory(gpt2_medium, None, POLAND).top_k(k=5).to_dataframe()
    expected = [
        [(" unden", 0.9470), (" nodd", 0.0220), (" enthusi", 0.0115), (":", 0.0051)],
        [(" (", 0.0232), (" [", 0.0184), (" The", 0.0128), (":", 0.0092), (",", 0.0089)],
        [(" A", 0.0196), (" The", 0.0166), (" (", 0.0140), (" [", 0.0101), (" Is", 0.0076)],
        [(" A", 0.0269), (" [", 0.0186), (" (", 0.0174), (" The", 0.0138), (" At", 0.0116)],
        [(" A", 0.0393), (" [", 0.0229), (" (", 0.0203), (" Act", 0.0182), (" At", 0.0178)],
    ]
    for layer, line in enumerate(expected):
        found = table.loc["resid_pre", layer]
        for place, (token, probability) in enumerate(line, 1):
            assert found[place, "token"] == token
            assert found[place, "probability"] == pytest.approx(probability, abs=1e-3)


@pytest.mark.network
def test_gpt2_medium_knows_the_capital(gpt2_medium):
    lens = LogitLens.from_model(gpt2_medium)
    assert lens.generate(gpt2_medium, POLAND, max_new_tokens=2).strip() == "Warsaw"
