"""Text that the model writes itself."""

import dataclasses
import json

import pytest
import torch
from conftest import in_two_processes, make_gpt2, short_run
from transformers import AutoTokenizer

from tunedlens import (
    CorpusConfig,
    EvaluateConfig,
    FrozenModel,
    InputError,
    builtin,
    evaluate,
    load_model,
    sampling,
)
from tunedlens.distributed import join_processes
from tunedlens.sampling import sample_documents
from tunedlens.training import train


@pytest.fixture
def config(tiny_folder):
    return short_run(tiny_folder, "self", fit="closed-form", init_tokens=1280)


def model_with_end(tokenizer, bonus):
    """A random model that ends a text with a probability that the bonus raises."""
    gpt2 = make_gpt2()
    gpt2.lm_head.weight = torch.nn.Parameter(gpt2.lm_head.weight.clone())
    model = FrozenModel(gpt2, tokenizer, check=False)

    def add(_module, _args, output):
        output.logits[..., tokenizer.eos_token_id] += bonus

    gpt2.register_forward_hook(add)
    return model


def by_hand(model, seed, longest):
    """One batch without a cache and without `generate`: the whole text is read for every token."""
    eos = model.tokenizer.eos_token_id
    ids = torch.full((32, 1), eos)
    torch.manual_seed(seed)
    for _ in range(longest - 1):
        probs = model.model(ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], 1)
    lines = [line[1:] for line in ids.tolist()]
    return [line[: line.index(eos)] if eos in line else line for line in lines]


def test_documents_are_samples_until_eos_or_the_limit(tokenizer):
    model = model_with_end(tokenizer, 7.0)
    with torch.no_grad():
        expected = [document for document in by_hand(model, 0, 12) if document]
    assert {len(document) for document in expected} > {2, 11}
    state = torch.get_rng_state()
    found = sample_documents(model, 1, 12)
    assert found == expected[:1]
    total = sum(len(document) + 1 for document in expected)
    assert sample_documents(model, total, 12) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_documents_continue_with_further_batches(tiny):
    one = sample_documents(tiny, 32 * 9, 9)
    assert len(one) == 32
    more = sample_documents(tiny, 32 * 9 * 2, 9)
    assert more[:32] == one
    assert more[32:] != one


@pytest.mark.parametrize(
    ("memory", "cache", "documents"),
    [(80, 10, 4), (79, 10, 2), (1, 10, 1), (-5, 10, 1), (10**9, 10, 512)],
)
def test_batch_on_a_gpu_fills_at_most_half_of_its_memory(memory, cache, documents):
    assert sampling._that_fit(memory, cache) == documents


def test_progress_counts_the_tokens(tokenizer):
    model, counts = model_with_end(tokenizer, 7.0), []
    found = sample_documents(model, 10**2, 12, counts.append)
    with torch.no_grad():
        batch = by_hand(model, 0, 12)
    assert sum(counts) == sum(map(len, batch))
    assert len(found) < len(batch)


def test_a_model_that_writes_nothing_is_refused(tokenizer):
    with pytest.raises(InputError, match="generates only empty documents"):
        sample_documents(model_with_end(tokenizer, 1e4), 100, 12)


def sampled(folder):
    join_processes("cpu")
    model = load_model(folder, device="cpu")
    return sample_documents(model, 32 * 9 * 3, 9)


def test_text_does_not_depend_on_the_number_of_processes(tiny_folder):
    expected = sampled(tiny_folder)
    assert in_two_processes(sampled, tiny_folder) == [expected, expected]


def test_bos_starts_a_document_and_is_not_part_of_it(sentence_piece):
    model = FrozenModel(make_gpt2(), sentence_piece)
    seen = []
    model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    documents = sample_documents(model, 10, 9)
    assert seen[0].tolist() == [[sentence_piece.bos_token_id]] * 32
    assert len(documents[0]) == 8


def test_lens_trains_on_sampled_text_and_is_scored_where_it_was_held_out(config, tmp_path):
    train(config, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "config.json").read_text())
    about, corpus = manifest["corpus"], manifest["config"]["corpus"]
    needed = 1280 + manifest["config"]["validation_tokens"] + 60
    assert needed <= corpus["self_tokens"] < needed + 16
    tokens = about["train"]["tokens"] + about["validation"]["tokens"]
    assert corpus["self_tokens"] <= tokens < corpus["self_tokens"] + 32
    assert about["train"]["sampled"]["model"] == config.model.model
    counts = []
    evaluation = evaluate(
        EvaluateConfig(lenses=(str(tmp_path / "run"),), tokens=60),
        sampled=lambda count, total: counts.append((count, total)),
    )
    scored = evaluation.provenance["corpus"]
    assert scored["tokens_sha256"] == about["validation"]["tokens_sha256"]
    assert {total for _, total in counts} == {corpus["self_tokens"]}
    logit, fitted = (evaluation.by_layer(lens, "kl_nats") for lens in ("logit", "closed-form"))
    assert all(after.value < before.value for after, before in zip(fitted, logit, strict=True))


def test_text_that_cannot_be_sampled_again_is_refused(config, tmp_path, monkeypatch):
    train(config, tmp_path / "run")
    original = sampling.sample_documents
    monkeypatch.setattr(
        sampling, "sample_documents", lambda *args: [one[::-1] for one in original(*args)]
    )
    with pytest.raises(InputError, match=r"cannot be sampled again.*another --dataset"):
        evaluate(EvaluateConfig(lenses=(str(tmp_path / "run"),), tokens=60))


def test_a_lens_of_other_text_is_scored_on_sampled_text(config, text_file, tmp_path):
    corpus = CorpusConfig(dataset=str(text_file), seq_len=16)
    train(dataclasses.replace(config, corpus=corpus), tmp_path / "run")
    evaluation = evaluate(
        EvaluateConfig(
            lenses=(str(tmp_path / "run"), "unigram"),
            corpus=CorpusConfig(dataset="self"),
            tokens=777,
        )
    )
    assert evaluation.tokens == 777
    assert evaluation.provenance["corpus"]["validation"]["dataset"] == "self"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"streaming": True}, "--streaming does not work with --dataset self"),
        ({"text_column": "a"}, "--text-column does not work with --dataset self"),
        ({"dataset_config": "a"}, "--dataset-config a works only with datasets on the hub"),
        ({"self_tokens": 0}, "--self-tokens must be at least 1"),
        (
            {"dataset": builtin.NAME, "self_tokens": 9},
            "--self-tokens works only with --dataset self",
        ),
        ({"self_tokens": 9, "seq_len": 32}, "two blocks|less than one block|at least two"),
    ],
)
def test_settings_that_do_not_apply_are_refused(config, tmp_path, settings, words):
    def run():
        corpus = dataclasses.replace(config.corpus, **settings)
        train(dataclasses.replace(config, corpus=corpus), tmp_path / "run")

    with pytest.raises(InputError, match=words):
        run()


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(builtin.FOLDER)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        sample_documents(FrozenModel(make_gpt2(), tokenizer), 10, 9)
