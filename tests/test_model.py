import copy

import pytest
import torch
from conftest import SMALL, make_gpt2, make_llama, make_sentence_piece
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPTNeoXConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from tunedlens import FrozenModel, InputError, builtin, load_model


def test_residual_stream_equals_a_walk_through_the_blocks_by_hand(tiny):
    input_ids = torch.arange(20).view(2, 10)
    body = tiny.model.transformer
    hidden = body.wte(input_ids) + body.wpe(torch.arange(10))
    for state, block in zip(tiny.residual_stream(input_ids), [*body.h, None], strict=True):
        assert torch.allclose(state, hidden, atol=1e-5)
        hidden = None if block is None else block(hidden)


def test_residual_stream_agrees_with_hidden_states_except_that_the_last_is_not_normalised(tiny):
    input_ids = torch.arange(12)[None]
    states = tiny.residual_stream(input_ids)
    theirs = tiny.model(input_ids, output_hidden_states=True).hidden_states
    for ours, other in zip(states[:-1], theirs[:-1], strict=True):
        assert torch.equal(ours, other)
    assert not torch.allclose(states[-1], theirs[-1], atol=0.1)
    assert torch.allclose(tiny.final_norm(states[-1]), theirs[-1], atol=1e-5)


def test_residual_stream_computes_no_logits(tiny, monkeypatch):
    def fail(*_):
        raise AssertionError("logits were computed")

    monkeypatch.setattr(tiny.model.lm_head, "forward", fail)
    assert len(tiny.residual_stream(torch.arange(4)[None])) == 4


def test_residual_stream_leaves_no_hook_behind(tiny):
    tiny.residual_stream(torch.arange(4)[None])
    assert not any(module._forward_pre_hooks for module in tiny.modules())


def test_residual_stream_respects_the_attention_mask(tiny):
    padded = torch.tensor([[5, 6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    short = tiny.residual_stream(padded[:, :3])
    for one, other in zip(tiny.residual_stream(padded, mask), short, strict=True):
        assert torch.allclose(one[:, :3], other, atol=1e-5)


def test_residual_stream_of_a_text_is_that_of_its_tokens(tiny):
    input_ids = torch.tensor(tiny.tokenizer("import os")["input_ids"])[None]
    for one, other in zip(
        tiny.residual_stream("import os"), tiny.residual_stream(input_ids), strict=True
    ):
        assert torch.equal(one, other)


def test_text_that_is_empty_or_too_long_is_refused(tiny):
    with pytest.raises(InputError, match="no tokens"):
        tiny.residual_stream("")
    with pytest.raises(InputError, match=r"has \d+ tokens, but tiny reads at most 32"):
        tiny.residual_stream("word " * 100)


def test_rms_norm_models_are_found_by_structure(tokenizer):
    llama = FrozenModel(make_llama(), tokenizer)
    input_ids = torch.arange(6)[None]
    logits = llama.unembedding(llama.residual_stream(input_ids)[-1])
    assert len(llama.blocks) == 2
    assert torch.allclose(logits, llama.model(input_ids).logits, atol=1e-5)


class Scaled(torch.nn.Linear):
    def forward(self, hidden):
        return 0.25 * super().forward(hidden)


def test_self_check_names_a_logit_scale(tokenizer):
    gpt2 = make_gpt2()
    gpt2.lm_head.__class__ = Scaled
    with pytest.raises(InputError, match=r"multiplies its logits by 0\.25"):
        FrozenModel(gpt2, tokenizer)


def test_self_check_names_a_norm_that_the_model_does_not_apply(tokenizer):
    gpt2 = make_gpt2()
    gpt2.transformer.ln_f.forward = lambda hidden: hidden
    norm = copy.deepcopy(make_gpt2().transformer.ln_f)
    with pytest.raises(InputError, match="applies no norm"):
        _with_norm(gpt2, tokenizer, norm)


def test_self_check_names_a_norm_that_the_model_applies_twice(tokenizer):
    gpt2 = make_gpt2()
    norm = copy.deepcopy(gpt2.transformer.ln_f)
    gpt2.transformer.ln_f.forward = lambda hidden: norm(norm(hidden))
    with pytest.raises(InputError, match="final norm twice"):
        _with_norm(gpt2, tokenizer, norm)


def _with_norm(gpt2, tokenizer, norm):
    """Wrap a model whose final norm does not do what its own weights say."""
    deepcopy = copy.deepcopy
    try:
        copy.deepcopy = lambda *_: norm
        return FrozenModel(gpt2, tokenizer)
    finally:
        copy.deepcopy = deepcopy


def test_fingerprint_is_the_same_in_every_dtype(tiny_folder):
    prints = {
        load_model(tiny_folder, dtype=dtype, device="cpu").identity.fingerprint
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert len(prints) == 1


def test_fingerprint_of_a_model_wrapped_in_bfloat16_is_that_in_float32(tokenizer):
    one = FrozenModel(make_gpt2(), tokenizer)
    other = FrozenModel(make_gpt2().bfloat16(), tokenizer)
    assert one.identity.fingerprint == other.identity.fingerprint


@pytest.mark.parametrize("part", ["lm_head.weight", "transformer.ln_f.weight"])
def test_fingerprint_depends_on_every_value(tokenizer, part):
    gpt2 = make_gpt2()
    before = FrozenModel(gpt2, tokenizer).identity.fingerprint
    with torch.no_grad():
        gpt2.get_parameter(part).view(-1)[-1] *= 1.02
    assert FrozenModel(gpt2, tokenizer).identity.fingerprint != before


def test_load_model_is_float32_unless_asked(tiny_folder):
    AutoModelForCausalLM.from_pretrained(tiny_folder).half().save_pretrained(tiny_folder)
    assert load_model(tiny_folder, device="cpu").model.dtype == torch.float32
    assert load_model(tiny_folder, dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16


def test_load_model_without_a_name_is_the_embedded_gpt2(model):
    assert (model.identity.name, model.identity.n_layers) == ("embedded", 8)
    files = list(builtin.FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) <= 12_000_000


def test_embedded_gpt2_completes_python(model):
    def next_words(prompt, count):
        logits = model.unembedding(model.residual_stream(prompt)[-1][0, -1])
        return [model.tokenizer.decode(i) for i in logits.topk(count).indices]

    assert next_words("def __init__(self", 1)[0] in (",", "):", ")")
    assert "\n" in next_words("import os", 3)


def test_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is not a model: expected .*config\.json"):
        load_model(tmp_path)


def test_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a folder with a model"):
        load_model(tmp_path / "nothing")


def test_damaged_weights_are_refused(tiny_folder):
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot load the model"):
        load_model(tiny_folder)


def test_weights_that_are_missing_are_not_made_up(tiny_folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_folder / "model.safetensors")
    del weights["transformer.h.1.ln_1.weight"]
    save_file(weights, tiny_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"h\.1\.ln_1\.weight are missing"):
        load_model(tiny_folder)


BERT = {**SMALL, "max_position_embeddings": 32, "initializer_range": 0.3}
T5 = {"vocab_size": 4096, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}


class WithoutBlocks(PreTrainedModel):
    """An embedding and a head, with nothing between them."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding, self.head = torch.nn.Embedding(4096, 16), torch.nn.Linear(16, 4096)

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BertForMaskedLM(BertConfig(**BERT)), "is not causal: a token changes the states"),
        (lambda: T5ForConditionalGeneration(T5Config(**T5)), "has an encoder and a decoder"),
        (lambda: T5EncoderModel(T5Config(**T5)), "has an encoder and a decoder|no unembedding"),
        (lambda: make_gpt2().transformer, "GPT2Model has no unembedding; expected a causal"),
        (lambda: WithoutBlocks(PreTrainedConfig()), "found no list of blocks.* --blocks"),
        (lambda: WithoutBlocks(PreTrainedConfig(num_hidden_layers=2)), "found no list of 2 blocks"),
    ],
    ids=["encoder", "encoder and decoder", "T5 encoder", "no head", "no stack", "no blocks"],
)
def test_model_that_is_no_causal_stack_of_blocks_is_refused(tokenizer, make, words):
    torch.manual_seed(0)
    with pytest.raises(InputError, match=words):
        FrozenModel(make(), tokenizer)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BertForMaskedLM(BertConfig(**BERT)), "is not causal"),
        (lambda: BertModel(BertConfig(**BERT)), "the weights cls.* are missing"),
        (
            lambda: T5ForConditionalGeneration(T5Config(**T5)),
            "no causal language model with a T5Config$",
        ),
    ],
    ids=["BERT", "BERT without its head", "T5"],
)
def test_folder_of_an_encoder_is_refused(tokenizer, tmp_path, make, words):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=words):
        load_model(tmp_path, device="cpu")


def test_dtype_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"dtype must be one of float32.*; got 'float8'"):
        load_model(dtype="float8")


def test_tokenizer_with_more_tokens_than_the_model_is_refused(tokenizer):
    with pytest.raises(InputError, match="vocabulary of 4,000, but its tokenizer has 4,096"):
        FrozenModel(make_gpt2(vocab_size=4000), tokenizer)


@pytest.mark.parametrize("name", ["x" * 300, "~nosuchuser/model"])
def test_name_that_no_path_can_have_is_refused(name):
    with pytest.raises(InputError):
        load_model(name)


@pytest.mark.network
def test_gpt2_from_the_hub_passes_the_self_check():
    assert load_model("gpt2").identity.n_layers == 12


def test_sites_equal_hooks_written_by_hand(tiny):
    ids = torch.tensor([[5, 7, 11, 13]])
    sites, blocks, kept = tiny.sites(ids), tiny.model.transformer.h, {}

    def keep(name):
        def hook(_module, args, output):
            kept[name] = (args[0], output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [
        module.register_forward_hook(keep((name, layer)))
        for layer, block in enumerate(blocks)
        for name, module in (
            ("block", block),
            ("attn", block.attn),
            ("ln_2", block.ln_2),
            ("mlp", block.mlp),
        )
    ]
    tiny.model(ids)
    for handle in handles:
        handle.remove()
    for layer in range(3):
        for site, name, end in (
            ("resid_pre", "block", 0),
            ("resid_mid", "ln_2", 0),
            ("resid_post", "block", 1),
            ("attn_out", "attn", 1),
            ("mlp_out", "mlp", 1),
        ):
            assert torch.allclose(sites[site][layer], kept[name, layer][end], atol=1e-5), site
    assert torch.equal(sites["resid_pre"][3], sites["resid_post"][2])


def test_sites_of_a_block_that_does_not_add_its_terms_are_refused(tiny):
    tiny.blocks[1].register_forward_hook(lambda _m, _a, output: output * 1.5)
    with pytest.raises(
        InputError, match="block 1 of tiny is not its input plus attention plus MLP"
    ):
        tiny.sites(torch.tensor([[5, 7]]))


def test_name_of_a_site_with_a_typo_is_refused(tiny):
    with pytest.raises(InputError, match=r"sites must be some of resid_pre, .*; got resid_midd"):
        tiny.sites(torch.tensor([[5, 7]]), wanted=("resid_pre", "resid_midd"))


@pytest.mark.parametrize("config", [GPTNeoXConfig, PhiConfig], ids=lambda one: one.model_type)
def test_parallel_blocks_have_terms_but_nothing_between(config, tokenizer):
    torch.manual_seed(0)
    parallel = AutoModelForCausalLM.from_config(config(**SMALL))
    model = FrozenModel(parallel, tokenizer, name="parallel")
    ids = torch.tensor([[5, 7, 11]])
    found = model.sites(ids, wanted=("resid_pre", "attn_out", "mlp_out"))
    for layer in range(2):
        total = found["attn_out"][layer] + found["mlp_out"][layer]
        step = found["resid_pre"][layer + 1] - found["resid_pre"][layer]
        assert torch.allclose(total, step, atol=1e-5)
    with pytest.raises(InputError, match="block 0 of parallel runs attention and MLP side by side"):
        model.sites(ids)


def test_pythia_without_parallel_blocks_has_a_stream_between(tokenizer):
    torch.manual_seed(0)
    config = GPTNeoXConfig(use_parallel_residual=False, **SMALL)
    model = FrozenModel(AutoModelForCausalLM.from_config(config), tokenizer)
    ids, kept = torch.tensor([[5, 7, 11]]), []
    norm = model.blocks[1].post_attention_layernorm
    handle = norm.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    sites = model.sites(ids)
    handle.remove()
    assert torch.allclose(sites["resid_mid"][1], kept[0])


def test_text_begins_with_bos_if_the_tokenizer_adds_it_or_the_user_asks(tokenizer):
    llama = FrozenModel(make_llama(), make_sentence_piece())
    assert llama.encode("the")[0, 0] == 1
    llama.set_bos(False)
    assert 1 not in llama.encode("the")
    gpt2 = FrozenModel(make_gpt2(), tokenizer)
    plain = gpt2.encode("x")
    gpt2.set_bos(True)
    assert gpt2.encode("x").tolist() == [[tokenizer.bos_token_id, *plain[0].tolist()]]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="has no BOS token"):
        FrozenModel(make_gpt2(), tokenizer).set_bos(True)
