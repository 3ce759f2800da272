"""The same lenses on two models, in one evaluation."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, random_lens, short_run
from matplotlib.text import Text
from test_adapter import make_adapter

from tunedlens import (
    ConstantLens,
    CorpusConfig,
    EvaluateConfig,
    Evaluation,
    FrozenModel,
    InputError,
    TunedLens,
    evaluate,
    load_lens,
    load_model,
)
from tunedlens.cli.evaluate import _default_output
from tunedlens.report.files import _grid_rows
from tunedlens.report.plots import DRAWINGS
from tunedlens.report.tables import summary, terminal_table
from tunedlens.training import train


@pytest.fixture
def config(text_file):
    return EvaluateConfig(corpus=CorpusConfig(dataset=str(text_file), seq_len=16), tokens=30)


@pytest.fixture
def other(tokenizer):
    """A model of the same shape with other weights everywhere."""
    return FrozenModel(make_gpt2(seed=1), tokenizer, name="models/chat")


def same_lens_on(model, lens):
    made = TunedLens.from_model(model)
    made.load_state_dict(lens.state_dict())
    return made


def values(evaluation, lens, suffix=""):
    return {
        (metric, layer): estimate
        for metric in evaluation.metrics
        for layer, estimate in enumerate(evaluation.by_layer(lens + suffix, metric))
    }


def test_every_lens_is_scored_as_on_each_model_alone(tiny, other, config):
    lens = random_lens(tiny)
    before = copy.deepcopy(lens.state_dict())
    both = evaluate(config, model=tiny, beside=other, lenses={"tuned": lens})
    assert both.lenses == ["logit", "tuned", "logit on chat", "tuned on chat"]
    first = evaluate(config, model=tiny, lenses={"tuned": lens})
    second = evaluate(config, model=other, lenses={"tuned": same_lens_on(other, lens)})
    assert first.tokens_sha256 == second.tokens_sha256 == both.tokens_sha256
    for name in ("logit", "tuned"):
        assert values(both, name) == values(first, name)
        assert values(both, name, " on chat") == values(second, name)
    assert values(both, "tuned") != values(both, "tuned", " on chat")
    assert both.of_model("perplexity") == first.of_model("perplexity")
    assert both.of_model("perplexity", "model on chat") == second.of_model("perplexity")
    difference = both.difference("tuned on chat", "logit on chat", "kl_nats")
    assert difference == second.difference("tuned", "logit", "kl_nats")
    assert lens.identity == tiny.identity
    assert all(torch.equal(value, before[name]) for name, value in lens.state_dict().items())


def test_baselines_are_made_for_each_model(tiny, other, config):
    both = evaluate(
        EvaluateConfig(**vars(config) | {"lenses": ("mean",)}),
        model=tiny,
        beside=other,
    )
    alone = evaluate(EvaluateConfig(**vars(config) | {"lenses": ("mean",)}), model=other)
    assert values(both, "mean", " on chat") == values(alone, "mean")
    assert both.constant == ["mean", "mean on chat"]


def test_tables_and_plots_name_both_models_and_say_what_was_transferred(tiny, other, config):
    settings = vars(config) | {"by_position": True, "transfer": True}
    lens = TunedLens.from_model(tiny, ["resid_pre", "resid_mid"])
    both = evaluate(EvaluateConfig(**settings), model=tiny, beside=other, lenses={"tuned": lens})
    saved = Evaluation.from_json(json.loads(json.dumps(both.to_json())))
    assert (saved.results, saved.beside) == (both.results, both.beside)
    assert both.lenses_on("chat")[2:] == ["tuned on chat", "tuned on chat resid_mid"]
    assert list(both.transfer) == ["tuned", "tuned on chat"]
    first, *sentences = summary(saved)
    assert first.startswith("chat is models/chat. On it, the translators of the lenses for tiny")
    assert "which have other values" in first
    assert any(one.startswith("chat itself has a perplexity of") for one in sentences)
    lines = [" ".join(line.split()) for line in terminal_table(saved).splitlines()]
    for start in ("0 tuned on chat ", "0 tuned on chat resid_mid ", "3 model ", "3 model on chat "):
        assert any(line.startswith(start) for line in lines), start
    rows = list(_grid_rows(saved.by_position, saved))
    assert {layer for lens, layer, *_ in rows if lens == "model on chat"} == {3}
    drawn = DRAWINGS["perplexity_by_layer"].draw(saved)
    words = {text.get_text() for text in drawn.findobj(Text)}
    assert {"tuned", "tuned on chat resid_mid", "model", "model on chat"} <= words


def test_saved_lens_is_scored_on_a_fine_tuned_body(tiny_folder, text_file, tmp_path, tokenizer):
    train(short_run(tiny_folder, text_file, fit="closed-form", init_tokens=128), tmp_path / "run")
    gpt2 = make_gpt2()
    with torch.no_grad():
        gpt2.transformer.h[1].mlp.c_proj.weight.mul_(0.5)
    gpt2.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    counts = []
    run = str(tmp_path / "run")
    both = evaluate(
        EvaluateConfig(lenses=(run,), beside=f"chat={tmp_path / 'body'}", tokens=30),
        progress=lambda scored, total: counts.append((scored, total)),
    )
    assert "which have the same values" in summary(both)[0]
    assert {total for _, total in counts} == {sum(scored for scored, _ in counts)} == {60}
    body = load_model(tmp_path / "body", device="cpu")
    with pytest.warns(UserWarning, match="has other outputs"):
        lens = load_lens(run, body)
    alone = evaluate(
        EvaluateConfig(tokens=30, corpus=CorpusConfig(dataset=str(text_file), seq_len=16)),
        model=body,
        lenses={"closed-form": lens},
    )
    assert alone.tokens_sha256 == both.tokens_sha256
    assert values(both, "closed-form", " on chat") == values(alone, "closed-form")


@pytest.mark.parametrize("beside", ["chat=x/y", "x/chat"])
def test_results_go_to_a_folder_of_their_own(beside):
    config = EvaluateConfig(beside=beside)
    folder = _default_output([], config, is_other_text=False)
    assert folder == Path("evaluation-beside-chat")


def test_adapter_stands_for_the_first_model_with_it(tiny_folder, config, tmp_path):
    make_adapter(tmp_path / "adapter")
    both = evaluate(
        EvaluateConfig(**vars(config) | {"beside": str(tmp_path / "adapter")}),
        model=load_model(tiny_folder, device="cpu"),
        lenses={"tuned": TunedLens.from_model(load_model(tiny_folder, device="cpu"))},
    )
    adapted = load_model(tiny_folder, device="cpu", adapter=tmp_path / "adapter")
    alone = evaluate(config, model=adapted, lenses={"tuned": TunedLens.from_model(adapted)})
    assert both.of_model("perplexity", "model on adapter") == alone.of_model("perplexity")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_gpt2(n_layer=2), r"different shape than tiny \(n_layers 2, not 3\)"),
        (lambda: make_gpt2(n_embd=8), r"different shape than tiny \(d_model 8, not 16\)"),
        (lambda: make_gpt2(n_positions=8), "--seq-len must be at most 8, the context of other"),
    ],
)
def test_another_shape_is_refused(tiny, tokenizer, config, make, words):
    other = FrozenModel(make(), tokenizer, name="other")
    with pytest.raises(InputError, match=words):
        evaluate(config, model=tiny, beside=other, lenses={"tuned": random_lens(tiny)})


def test_other_tokens_are_refused(tiny, config, sentence_piece):
    other = FrozenModel(make_gpt2(), sentence_piece, name="other")
    with pytest.raises(InputError, match="other has a different vocabulary than tiny"):
        evaluate(config, model=tiny, beside=other, lenses={"tuned": random_lens(tiny)})


def test_constant_lens_in_memory_is_refused(tiny, other, config):
    uniform = ConstantLens(torch.zeros(tiny.identity.vocab_size), tiny.identity)
    with pytest.raises(InputError, match="the lens uniform does not read the states"):
        evaluate(config, model=tiny, beside=other, lenses={"uniform": uniform})


def test_names_that_would_collide_are_refused(tiny, other, config):
    lenses = {"tuned": random_lens(tiny), "tuned on chat": random_lens(tiny)}
    with pytest.raises(InputError, match="two lenses are called tuned on chat"):
        evaluate(config, model=tiny, beside=other, lenses=lenses)
