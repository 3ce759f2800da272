"""The doctor passes healthy models and names every fault that is planted here."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import (
    SMALL,
    make_gpt2,
    make_llama,
    make_sentence_piece,
    random_lens,
    short_run,
)
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from tunedlens import (
    CorpusConfig,
    EvaluateConfig,
    FrozenModel,
    InputError,
    TunedLens,
    evaluate,
    load_lens,
)
from tunedlens.doctor import doctor, warn_of_faults
from tunedlens.model import frozen, probe_kl, take_probe
from tunedlens.model.state_hooks import on_state
from tunedlens.training import loop, train

SIZES = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}


def make_gemma2(cap=5.0):
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=cap)).eval()


def make_cohere():
    torch.manual_seed(0)
    config = {name: value for name, value in SIZES.items() if name != "head_dim"}
    return CohereForCausalLM(CohereConfig(**config, logit_scale=0.25)).eval()


def cap_logits(_model, _args, output):
    output.logits = 30 * torch.tanh(output.logits / 30)


def failures(diagnosis):
    return {check.name: check.detail for check in diagnosis.checks if check.passed is False}


def only_failure(diagnosis):
    (detail,) = failures(diagnosis).values()
    return detail


def save(lens, folder, model, **metadata):
    lens.save(folder, {"probe": take_probe(model), **metadata})
    return folder


@pytest.mark.parametrize("make", [make_gpt2, make_llama, make_gemma2, make_cohere])
def test_healthy_model_passes(make, tokenizer):
    diagnosis = doctor(FrozenModel(make(), tokenizer, name="healthy"))
    assert diagnosis.passed, str(diagnosis)
    assert "pass  the last state decodes" in str(diagnosis)
    assert "FAIL" not in str(diagnosis)


def test_facts_name_what_was_found(tokenizer):
    facts = doctor(FrozenModel(make_gemma2(), tokenizer)).facts
    assert facts["blocks"] == "2 × Gemma2DecoderLayer at model.layers"
    assert facts["final norm"] == "Gemma2RMSNorm at model.norm"
    assert facts["logit cap"] == "5"
    assert "tied to the embedding" in facts["unembedding"]


def test_norms_are_those_of_the_states(tiny):
    ids = tiny.encode("x" * 200, is_any_length=True)[:, :32]
    diagnosis = doctor(tiny, text="x" * 200)
    for (first, later), state in zip(diagnosis.norms, tiny.residual_stream(ids), strict=True):
        assert first == pytest.approx(float(state[0, 0].norm()))
        assert later == pytest.approx(float(state[0, 1:].norm(dim=-1).median()))


def test_norm_that_is_missed_is_named(tokenizer):
    model = FrozenModel(make_gpt2(), tokenizer)
    model.unembedding.norm = nn.Identity()
    assert "logits differ by up to" in only_failure(doctor(model))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [(lambda norm, x: norm(norm(x)), "norm twice"), (lambda _norm, x: x, "applies no norm")],
)
def test_norm_that_the_model_doubles_or_misses_is_named(tokenizer, forward, reason):
    gpt2 = make_gpt2()
    model = FrozenModel(gpt2, tokenizer, check=False)
    norm = copy.deepcopy(gpt2.transformer.ln_f)
    gpt2.transformer.ln_f.forward = lambda x: forward(norm, x)
    assert reason in " ".join(failures(doctor(model)).values())


def test_cap_that_is_forgotten_is_named(tokenizer):
    model = FrozenModel(make_gemma2(cap=30.0), tokenizer)
    model.unembedding.cap = None
    assert "caps its logits at 30" in only_failure(doctor(model))


def test_cap_that_the_config_does_not_declare_is_refused_even_if_the_logits_are_small(tokenizer):
    gemma = make_gemma2(cap=1000.0)
    with torch.no_grad():
        gemma.model.norm.weight.fill_(-0.99)  # the logits are far below any cap
    FrozenModel(gemma, tokenizer)
    gpt2 = make_gpt2()
    with torch.no_grad():
        gpt2.transformer.ln_f.weight.mul_(1e-3)
        gpt2.transformer.ln_f.bias.mul_(1e-3)
    gpt2.register_forward_hook(cap_logits)
    with pytest.raises(InputError, match="caps its logits at 30"):
        FrozenModel(gpt2, tokenizer)


def test_scale_that_is_forgotten_is_named(tokenizer):
    model = FrozenModel(make_cohere(), tokenizer)
    model.unembedding.weight = model.unembedding.weight * 4
    assert "multiplies its logits by 0.25" in only_failure(doctor(model))


def read_states(monkeypatch, shift):
    """Make the hooks of every model read the state of a later or an earlier layer."""

    def shifted(parts, layer, see):
        last = len(parts.blocks)
        return on_state(parts, min(max(layer + shift, 0), last - 1) if layer < last else last, see)

    monkeypatch.setattr(frozen, "on_state", shifted)


def test_states_that_are_shifted_are_named(tokenizer, monkeypatch):
    model = FrozenModel(make_gpt2(), tokenizer)
    read_states(monkeypatch, 1)
    found = failures(doctor(model))
    assert (
        "state l is that of layer l +1"
        in found["the states equal the hidden states of transformers"]
    )


def test_states_of_the_block_before_are_named(tokenizer, monkeypatch):
    model = FrozenModel(make_llama(), tokenizer)
    read_states(monkeypatch, -1)
    assert "state l is that of layer l -1, one block earlier" in only_failure(doctor(model))


def test_hidden_states_that_transformers_lists_after_each_block_are_no_fault(tokenizer):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=4096, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = FrozenModel(MambaForCausalLM(config), tokenizer, name="mamba")
    ids = torch.arange(5)[None]
    listed = model.model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.residual_stream(ids)[1], listed[0])
    check = next(one for one in doctor(model).checks if "hidden states" in one.name)
    assert (check.passed, check.detail) == (True, "transformers returns the state after each block")


def test_cache_that_changes_what_is_written_is_named(tokenizer):
    gpt2 = make_gpt2()

    def forget(_model, _args, kwargs, output):
        if kwargs.get("input_ids", torch.zeros(1, 2)).shape[1] == 1:  # a step with the cache
            output.logits = output.logits.flip(-1)

    gpt2.register_forward_hook(forget, with_kwargs=True)
    model = FrozenModel(gpt2, tokenizer)
    assert "the logits during generation differ" in only_failure(doctor(model))
    with pytest.warns(UserWarning, match="the key-value cache does not change the logits"):
        warn_of_faults(model, is_sampled=True)


def test_lens_of_another_model_is_named(tokenizer, tmp_path):
    other = FrozenModel(make_gpt2(seed=1), tokenizer, name="other")
    model = FrozenModel(make_gpt2(), tokenizer, name="tiny")
    folder = save(random_lens(other), tmp_path / "lens", other)
    found = failures(doctor(model, folder))
    assert "a final norm or an unembedding with other values" in " ".join(found.values())
    assert "folded" not in " ".join(found.values())


def test_lens_of_another_body_is_named(tokenizer, tmp_path):
    model = FrozenModel(make_gpt2(), tokenizer, name="tiny")
    folder = save(TunedLens.from_model(model), tmp_path / "lens", model)
    assert failures(doctor(model, folder)) == {}
    gpt2 = make_gpt2()
    with torch.no_grad():
        gpt2.transformer.h[1].mlp.c_proj.weight.mul_(2)
    tuned = FrozenModel(gpt2, tokenizer, name="fine-tuned")
    assert "they have changed (KL" in only_failure(doctor(tuned, folder))
    with pytest.warns(UserWarning, match="has other outputs"):
        load_lens(folder, tuned)
    load_lens(folder, tuned, check=False)


def test_folded_weights_are_named(tokenizer, tmp_path):
    model = FrozenModel(make_llama(), tokenizer, name="llama")
    folder = save(TunedLens.from_model(model), tmp_path / "lens", model)
    llama = make_llama()
    with torch.no_grad():
        llama.model.norm.weight.fill_(2.0)
        llama.lm_head.weight.div_(2.0)
    assert "folded, centred or rescaled" in only_failure(
        doctor(FrozenModel(llama, tokenizer, name="folded"), folder)
    )


def test_lens_whose_layers_are_shifted_is_named(model, tmp_path):
    shipped = TunedLens.load(Path(__file__).parents[1] / "checkpoints" / "embedded", model)
    shifted = TunedLens.from_model(model)
    with torch.no_grad():
        for layer in range(model.identity.n_layers):
            source = shipped.translator(min(layer + 1, model.identity.n_layers - 1))
            shifted.translator(layer).load_state_dict(source.state_dict())
    folder = save(shifted, tmp_path / "lens", model)
    assert "shifted by one layer" in only_failure(doctor(model, folder, text=_CODE))


_CODE = '''def read(path):
    """Read a file, line by line, and return the lines without line breaks."""
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\\n") for line in file]


class Reader:
    def __init__(self, path, mode="r"):
        self.path = path
        self.mode = mode
'''


def test_bos_that_is_missing_is_named(tmp_path):
    tokenizer = make_sentence_piece()
    llama = make_llama()
    model = FrozenModel(llama, tokenizer, name="llama")
    config = {"config": {"corpus": {"bos": True}}}
    folder = save(TunedLens.from_model(model), tmp_path / "lens", model, **config)
    assert failures(doctor(model, folder)) == {}
    model.set_bos(False)
    with pytest.warns(UserWarning, match=r"on texts with BOS.*call model.set_bos\(True\)"):
        load_lens(folder, model)
    found = failures(doctor(model, folder))
    assert found == {
        "texts begin as in the lens's training": "the lens was trained on text that starts with BOS"
    }


def test_probe_is_zero_for_the_same_model_and_counts_the_rest(tiny, tokenizer):
    probe = json.loads(json.dumps(take_probe(tiny)))
    assert probe_kl(probe, tiny) == pytest.approx(0, abs=1e-6)
    half = FrozenModel(make_gpt2().bfloat16(), tokenizer)
    assert probe_kl(probe, half) < 0.02
    other = FrozenModel(make_gpt2(seed=1), tokenizer)
    ids = torch.tensor([probe["ids"]])
    expected = tiny.model(ids).logits[0, -8:].log_softmax(-1)
    actual = other.model(ids).logits[0, -8:].log_softmax(-1)
    full = (expected.exp() * (expected - actual)).sum(-1).mean()
    assert 0.1 < probe_kl(probe, other) <= full


@pytest.mark.parametrize(
    "damage",
    [
        {"ids": []},
        {"ids": ["x"]},
        {"ids": [10**6]},
        {"top_ids": [[1]]},
        {"top_log_probs": None},
    ],
)
def test_damaged_probe_is_refused(tiny, damage):
    with pytest.raises(InputError, match="probe saved with the lens is damaged"):
        probe_kl(take_probe(tiny) | damage, tiny)


def needs_bos(tokenizer):
    """A model that knows every next token, but only in a text that begins with BOS."""
    gpt2 = make_gpt2()

    def answer(_model, _args, kwargs, output):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else _args[0]
        known = nn.functional.one_hot(ids.roll(-1, 1), output.logits.shape[-1]) * 20.0
        output.logits = known * (ids[:, :1, None] == tokenizer.bos_token_id)

    gpt2.register_forward_hook(answer, with_kwargs=True)
    return FrozenModel(gpt2, tokenizer, name="needs-bos", check=False)


@pytest.mark.parametrize("make", [make_gpt2, make_llama, make_gemma2, make_cohere])
def test_healthy_model_has_no_warning(make, tokenizer, recwarn):
    warn_of_faults(FrozenModel(make(), tokenizer), is_bos_default=True, is_sampled=True)
    assert not recwarn.list


def test_evaluate_warns_of_states_that_are_shifted(tokenizer, text_file, monkeypatch):
    corpus = CorpusConfig(dataset=str(text_file), seq_len=16)
    model = FrozenModel(make_gpt2(), tokenizer, name="shifted")
    read_states(monkeypatch, 1)
    with pytest.warns(UserWarning, match="shifted fails a check.*one block later"):
        evaluate(
            EvaluateConfig(corpus=corpus, tokens=15),
            model=model,
            lenses={"tuned": TunedLens.from_model(model)},
        )


@pytest.mark.parametrize("bos", [None, False])
def test_train_warns_once_of_a_bos_that_is_missing_unless_it_was_left_out_on_purpose(
    tokenizer, text_file, tmp_path, monkeypatch, recwarn, bos
):
    monkeypatch.setattr(loop, "load_configured", lambda *_: needs_bos(tokenizer))
    corpus = CorpusConfig(dataset=str(text_file), seq_len=16, bos=bos)
    config = short_run("unused", text_file, corpus=corpus, fit="closed-form", init_tokens=64)
    train(config, tmp_path / "run")
    messages = [str(one.message) for one in recwarn if "fails a check" in str(one.message)]
    assert len(messages) == (bos is None)
    assert all("the tokenizer adds none; give --bos" in message for message in messages)
