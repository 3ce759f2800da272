"""The same lenses on two models, in one evaluation."""

import copy

import pytest
import torch
from conftest import make_gpt2, random_lens, short_run
from test_adapter import make_adapter

from tunedlens import (
    ConstantLens,
    CorpusConfig,
    EvaluateConfig,
    FrozenModel,
    InputError,
    TunedLens,
    evaluate,
    load_model,
    read_evaluation,
    report,
    write_report,
)
from tunedlens.cli import evaluate_command
from tunedlens.training import train


@pytest.fixture
def config(text_file):
    return EvaluateConfig(corpus=CorpusConfig(dataset=str(text_file), seq_len=16), tokens=90)


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


def test_report_names_both_models_and_says_what_was_transferred(tiny, other, config, tmp_path):
    settings = vars(config) | {"by_position": True, "transfer": True}
    both = evaluate(
        EvaluateConfig(**settings), model=tiny, beside=other, lenses={"tuned": random_lens(tiny)}
    )
    write_report(both, tmp_path / "report")
    saved = read_evaluation(tmp_path / "report")
    assert (saved.results, saved.beside) == (both.results, both.beside)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "chat is models/chat. On it, the translators of the lenses for tiny are" in text
    assert "which have other values" in text
    assert "chat itself has a perplexity of" in text
    table = report.terminal_table(both)
    for row in ("0  tuned on chat", "3          model", "3  model on chat"):
        assert row in table
    rows = (tmp_path / "report" / "by_position.csv").read_text().splitlines()
    assert {row.split(",")[1] for row in rows if row.startswith("model on chat,")} == {"3"}
    svg = (tmp_path / "report" / "kl_by_layer.svg").read_text()
    assert "tuned on chat" in svg


def test_command_scores_a_saved_lens_on_a_fine_tuned_body(
    tiny_folder, text_file, tmp_path, tokenizer, capsys
):
    run = short_run(tiny_folder, text_file, fit="closed-form", init_tokens=128)
    train(run, tmp_path / "run")
    tuned = make_gpt2()
    with torch.no_grad():
        tuned.transformer.h[1].mlp.c_proj.weight.mul_(0.5)
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    flags = ["--lens", str(tmp_path / "run"), "--beside", f"chat={tmp_path / 'tuned'}"]
    assert evaluate_command([*flags, "--tokens", "30", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "which have the same values" in printed
    assert "closed-form on chat" in printed
    saved = read_evaluation(tmp_path / "run" / "evaluation")
    alone = evaluate(
        EvaluateConfig(tokens=30, corpus=run.corpus, split="validation"),
        model=load_model(tmp_path / "tuned", device="cpu"),
        lenses={"logit2": TunedLens.from_model(load_model(tmp_path / "tuned", device="cpu"))},
    )
    found = [one.value for one in saved.by_layer("logit on chat", "kl_nats")]
    assert found == pytest.approx([one.value for one in alone.by_layer("logit2", "kl_nats")])


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
        (lambda: make_gpt2(n_layer=2), r"another shape than tiny \(n_layers 2, not 3\)"),
        (lambda: make_gpt2(n_embd=8), r"another shape than tiny \(d_model 8, not 16\)"),
        (lambda: make_gpt2(n_positions=8), "--seq-len must be at most 8, the context of other"),
    ],
)
def test_another_shape_is_refused(tiny, tokenizer, config, make, words):
    other = FrozenModel(make(), tokenizer, name="other")
    with pytest.raises(InputError, match=words):
        evaluate(config, model=tiny, beside=other, lenses={"tuned": random_lens(tiny)})


def test_other_tokens_are_refused(tiny, config, sentence_piece):
    other = FrozenModel(make_gpt2(), sentence_piece, name="other")
    with pytest.raises(InputError, match="other has other tokens than tiny"):
        evaluate(config, model=tiny, beside=other, lenses={"tuned": random_lens(tiny)})


def test_constant_lens_in_memory_is_refused(tiny, other, config):
    uniform = ConstantLens(torch.zeros(tiny.identity.vocab_size), tiny.identity)
    with pytest.raises(InputError, match="the lens uniform does not read the states"):
        evaluate(config, model=tiny, beside=other, lenses={"uniform": uniform})


def test_names_that_would_collide_are_refused(tiny, other, config):
    lenses = {"tuned": random_lens(tiny), "tuned on chat": random_lens(tiny)}
    with pytest.raises(InputError, match="two lenses are called tuned on chat"):
        evaluate(config, model=tiny, beside=other, lenses=lenses)
