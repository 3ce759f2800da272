"""Tiny random models of many architectures, and what tunedlens must do with each of them.

`python tests/architectures.py` runs every check on every architecture and prints the table;
`--output docs/architectures.md` writes the page.
"""

import argparse
import io
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tunedlens import (
    CorpusConfig,
    EvaluateConfig,
    FrozenModel,
    InputError,
    LogitLens,
    ModelConfig,
    TrainConfig,
    TunedLens,
    builtin,
    evaluate,
    load_lens,
    load_model,
    train,
    trajectory,
)

MIN_LOGIT = 20.0
"""The largest logit of every model is at least this, before a cap. A cap, a scale or a norm that
is left out then changes the logits by far more than rounding does."""
SEQ_LEN = 32
STEP_TOKENS = 128
STEPS = 20

SIZES: dict[str, object] = {
    "vocab_size": 4096,  # that of the built-in tokenizer
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Architecture:
    """One line of the table."""

    name: str
    peculiar: str
    """What sets it apart from a plain block with a norm before attention and before the MLP."""
    terms: tuple[str, str] | None
    """The modules in a block whose outputs are what attention and MLP add, as a reader of the
    architecture's source would name them. `a|b` means whichever of both the block has. `+` means
    that the module adds the stream itself, which is its second argument. None if the block is not
    a sum of two terms."""
    model_type: str
    is_parallel: bool = False
    """Whether attention and MLP both read the stream that enters the block."""
    factor: float = 1.0
    """What the block multiplies both terms by."""
    first_state: int = 0
    """The layer of the first of the `hidden_states` that transformers returns. It is 1 where these
    are the outputs of the blocks."""
    is_quick: bool = False
    """Whether the default run of the tests includes it."""
    config: dict[str, object] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name


def _row(
    name: str,
    peculiar: str,
    terms: tuple[str, str] | None = ("self_attn", "mlp"),
    *,
    of: str | None = None,
    parallel: bool = False,
    factor: float = 1.0,
    first_state: int = 0,
    quick: bool = False,
    **config: object,
) -> Architecture:
    settings = (parallel, factor, first_state, quick, config)
    return Architecture(name, peculiar, terms, of or name, *settings)


_ATTN = ("attn", "mlp")
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_GPT_SIZES = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_ROTARY_GPT = {**_GPT_SIZES, "rotary_dim": 8}
_MOE = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_WINDOW = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}

# fmt: off
# ruff: disable[E501]
ARCHITECTURES = [
    _row("gpt2", "learned positions; weights stored transposed", _ATTN, quick=True, n_inner=64),
    _row("gpt_neo", "every second block attends locally", _ATTN, num_hidden_layers=None, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]]),
    _row("gpt_bigcode", "one head of keys and values", _ATTN, **_GPT_SIZES),
    _row("gptj", "attention and MLP side by side after one norm; the head has a bias", _ATTN, parallel=True, **_ROTARY_GPT),
    _row("codegen", "attention and MLP side by side after one norm; the head has a bias", _ATTN, parallel=True, **_ROTARY_GPT),
    _row("gpt_neox", "attention and MLP side by side, each after its norm (Pythia)", ("attention", "mlp"), parallel=True),
    _row("gpt_neox, in sequence", "the same, with attention before the MLP", ("attention", "mlp"), of="gpt_neox", use_parallel_residual=False),
    _row("gpt_neox_japanese", "the last block adds a bias of its own, besides attention and MLP", None),
    _row("openai-gpt", "norms after each sum; no final norm", None, **_GPT_SIZES),
    _row("ctrl", "fixed positions; the head has a bias", ("multi_head_attention", "ffn"), **_GPT_SIZES, dff=64),
    _row("opt", "the MLP is not a module of its own", ("self_attn", "fc2"), quick=True, ffn_dim=64, word_embed_proj_dim=32),
    _row("opt, as OPT-350m", "norms after each sum; no final norm; a projection before the head", None, of="opt", quick=True, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False),
    _row("xglm", "fixed positions; the MLP is not a module of its own", ("self_attn", "fc2"), d_model=32, num_hidden_layers=None, num_layers=3, attention_heads=4, ffn_dim=64),
    _row("biogpt", "embeddings times a constant; the MLP is not a module of its own", ("self_attn", "fc2")),
    _row("bloom", "attention and MLP return their sum with the stream; ALiBi", ("self_attention+", "mlp+"), quick=True, n_layer=3, n_head=4),
    _row("mpt", "the MLP returns its sum with the stream; ALiBi; no biases", ("attn", "ffn+"), quick=True, d_model=32, n_layers=3, n_heads=4, max_seq_len=64, expansion_ratio=2),
    _row("falcon", "attention and MLP side by side after one norm", ("self_attention", "mlp"), parallel=True, quick=True, head_dim=None),
    _row("falcon, new decoder", "attention and MLP side by side, each after its norm", ("self_attention", "mlp"), of="falcon", parallel=True, head_dim=None, new_decoder_architecture=True, num_kv_heads=2),
    _row("falcon, in sequence", "ALiBi; attention before the MLP", ("self_attention", "mlp"), of="falcon", head_dim=None, parallel_attn=False, alibi=True, multi_query=False),
    _row("llama", "RMS norms; gated MLP"),
    _row("mistral", "attends in a window", sliding_window=8),
    _row("ministral", "attends in a window in some blocks", **_WINDOW),
    _row("mixtral", "mixture of experts", quick=True, num_local_experts=4),
    _row("qwen2", "biases in attention only"),
    _row("qwen2_moe", "mixture of experts with a shared expert", **_MOE, shared_expert_intermediate_size=32),
    _row("qwen3", "norms of queries and keys"),
    _row("qwen3_moe", "mixture of experts; norms of queries and keys", **_MOE),
    _row("qwen3_next", "linear attention in some blocks; mixture of experts", ("linear_attn|self_attn", "mlp"), **_MOE, shared_expert_intermediate_size=16, **_LINEAR_ATTENTION),
    _row("phi", "attention and MLP side by side after one norm; the head has a bias", parallel=True),
    _row("phi3", "queries, keys and values in one matrix"),
    _row("phimoe", "mixture of experts; the head has a bias", num_local_experts=4, lm_head_bias=True),
    _row("gemma", "embeddings times a constant; norms with 1 + weight"),
    _row("gemma2", "logits capped at 5; norms before and after attention and MLP", _POST_NORMS, quick=True, **_WINDOW, query_pre_attn_scalar=8, final_logit_softcapping=5.0),
    _row("gemma3_text", "norms before and after attention and MLP", _POST_NORMS, **_WINDOW, query_pre_attn_scalar=8),
    _row("gemma3_text, capped", "the same, with logits capped at 30", _POST_NORMS, of="gemma3_text", **_WINDOW, query_pre_attn_scalar=8, final_logit_softcapping=30.0),
    _row("vaultgemma", "logits capped at 5", **_WINDOW, query_pre_attn_scalar=8, final_logit_softcapping=5.0),
    _row("recurrent_gemma", "logits capped at 10; recurrent blocks", ("temporal_block", "mlp_block"), lru_width=32, attention_window_size=16, logits_soft_cap=10.0),
    _row("nanochat", "logits capped at 10; the final norm, without weights, also norms the embeddings", quick=True, final_logit_softcapping=10.0),
    _row("olmo", "norms without weights", quick=True),
    _row("olmo2", "norms only after attention and MLP", _POST_NORMS, quick=True),
    _row("olmo3", "norms only after attention and MLP; attends in a window in some blocks", _POST_NORMS, **_WINDOW),
    _row("olmoe", "mixture of experts; norms of queries and keys", num_experts=4, num_experts_per_tok=2),
    _row("exaone4", "norms only after attention and MLP", _POST_NORMS, **_WINDOW),
    _row("glm", "part of each head is rotated"),
    _row("glm4", "norms before and after attention and MLP", ("post_self_attn_layernorm", "post_mlp_layernorm")),
    _row("cohere", "logits times 0.25; attention and MLP side by side after one norm", parallel=True, quick=True, logit_scale=0.25),
    _row("cohere2", "the same, attending in a window in some blocks", parallel=True, **_WINDOW, logit_scale=0.25),
    _row("granite", "logits divided by 4; what blocks add times 0.5", factor=0.5, quick=True, logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=3.0),
    _row("granitemoe", "the same, with a mixture of experts", ("self_attn", "block_sparse_moe"), factor=0.5, num_local_experts=4, logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=3.0),
    _row("minicpm3", "logits times 2; what blocks add times 0.577; latent attention", factor=3**-0.5, scale_depth=1.0, dim_model_base=64, **_LATENT),
    _row("stablelm", "layer norms; part of each head is rotated"),
    _row("starcoder2", "layer norms; biases everywhere"),
    _row("smollm3", "no positions in some blocks", no_rope_layers=[1, 0, 1]),
    _row("gpt_oss", "mixture of experts; attention sinks", **_WINDOW, num_local_experts=4, num_experts_per_tok=2),
    _row("deepseek_v2", "latent attention; mixture of experts after the first block", **_DEEPSEEK, **_LATENT),
    _row("deepseek_v3", "latent attention; mixture of experts after the first block", **_DEEPSEEK, **_LATENT),
    _row("dots1", "mixture of experts with a shared expert after the first block", **_DEEPSEEK, n_shared_experts=1),
    _row("ernie4_5", "RMS norms; gated MLP"),
    _row("hunyuan_v1_dense", "norms of queries and keys"),
    _row("seed_oss", "biases in attention"),
    _row("helium", "RMS norms; gated MLP"),
    _row("diffllama", "the difference of two attentions"),
    _row("nemotron", "layer norms with 1 + weight; squared ReLU"),
    _row("persimmon", "layer norms; squared ReLU"),
    _row("apertus", "an MLP with a learned activation and without a gate"),
    _row("arcee", "squared ReLU without a gate"),
    _row("bitnet", "norms inside attention and MLP"),
    _row("lfm2", "short convolutions in some blocks", ("conv|self_attn", "feed_forward"), layer_types=["conv", "full_attention", "conv"]),
    _row("mamba", "one mixer per block and no attention", None, first_state=1, quick=True, state_size=8),
    _row("mamba2", "one mixer per block and no attention", None, first_state=1, num_heads=8, n_groups=1, state_size=8),
    _row("falcon_mamba", "one mixer per block and no attention", None, first_state=1, state_size=8),
    _row("rwkv", "recurrent; the first block norms the embeddings itself", None, first_state=1, attention_hidden_size=32, context_length=64),
    _row("jamba", "Mamba in some blocks; mixture of experts in some", ("mamba|self_attn", "feed_forward"), num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
    _row("bamba", "Mamba 2 in some blocks", ("mamba|self_attn", "feed_forward"), mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, attn_layer_indices=[1]),
    _row("falcon_h1", "logits times 0.5; attention and Mamba 2 side by side, before the MLP", None, lm_head_multiplier=0.5, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8),
    _row("minimax", "linear attention in some blocks; the stream itself is normed and scaled", None, num_local_experts=4, layer_types=["linear_attention", "full_attention", "linear_attention"]),
]
# ruff: enable[E501]
# fmt: on


def make_model(architecture: Architecture) -> PreTrainedModel:
    """A random model whose norms and biases are random too and whose logits are large."""
    torch.manual_seed(0)
    settings = SIZES | architecture.config
    settings = {name: value for name, value in settings.items() if value is not None}
    config = CONFIG_MAPPING[architecture.model_type](**settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("norm" in name or "ln" in name or name.endswith("bias")):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        head = model.get_output_embeddings()
        while _largest_logit(model, head) < MIN_LOGIT:
            head.weight *= 1.5
    return model


def _largest_logit(model: PreTrainedModel, head: nn.Module) -> float:
    """The largest logit, before a cap but after a scale."""
    raw: list[Tensor] = []
    with head.register_forward_hook(lambda _head, _args, output: raw.append(output)):
        logits = model(torch.arange(16)[None], use_cache=False).logits
    is_capped = not torch.allclose(logits * raw[0].std(), raw[0] * logits.std(), rtol=1e-3)
    return float((raw[0] if is_capped else logits).abs().max())


def write_text(path: Path) -> Path:
    """A text of about 9,000 tokens that is the same everywhere."""
    draw = random.Random(0)
    words = [
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(1, 8)))
        for _ in range(600)
    ]
    lines = (" ".join(draw.choices(words, k=9)) + " = naïve(🎉)\n" for _ in range(200))
    path.write_text("".join(lines), encoding="utf-8")
    return path


class Subject:
    """A tiny model of an architecture, saved and loaded, with a lens that is fitted once."""

    def __init__(
        self, architecture: Architecture, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> None:
        self.architecture, self._folder = architecture, folder
        self.source = make_model(architecture)
        self.source.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")

    @cached_property
    def model(self) -> FrozenModel:
        return load_model(self._folder / "model", device="cpu")

    @cached_property
    def lens_folder(self) -> Path:
        """The default fit, for `STEPS` steps."""
        config = TrainConfig(
            model=ModelConfig(model=str(self._folder / "model"), device="cpu"),
            corpus=CorpusConfig(
                dataset=str(write_text(self._folder / "text.txt")), seq_len=SEQ_LEN
            ),
            tokens=STEPS * STEP_TOKENS,
            batch_size=STEP_TOKENS // SEQ_LEN,
            evaluate_tokens=2 * (SEQ_LEN - 1),
            precision="fp32",
            kernel="products",
        )
        train(config, self._folder / "lens")
        return self._folder / "lens"

    @cached_property
    def ids(self) -> Tensor:
        return self.model.encode(SENTENCE)

    @contextmanager
    def head_input_times(self, factor: float) -> Iterator[None]:
        """The model, with the input of its unembedding multiplied."""
        head = self.model.model.get_output_embeddings()
        with head.register_forward_pre_hook(lambda _head, args: (args[0] * factor,)):
            yield


SENTENCE = "def path(self, name):\n    return os.path.join(self.root, name)"


def found_by_structure(subject: Subject) -> bool:
    """`load_model` finds the parts of the model without being told where they are."""
    expected = subject.source.config.get_text_config().num_hidden_layers
    assert len(subject.model.blocks) == expected
    return True


def logits_are_the_models(subject: Subject) -> bool:
    """The decoded last state equals the model's logits, near 0 and far beyond any cap."""
    unembedding = subject.model.unembedding
    hidden = unembedding.norm(subject.model.residual_stream(subject.ids)[-1])
    for factor in (0.01, 1.0, 30.0):
        with subject.head_input_times(factor), torch.no_grad():
            expected = subject.model.model(subject.ids, use_cache=False).logits
        raw = F.linear(hidden * factor, unembedding.weight, unembedding.bias)
        require_close(unembedding.capped(raw), expected, f"logits of {factor:g} times the state")
    assert raw.abs().max() > 20 * MIN_LOGIT
    return True


def states_are_hidden_states(subject: Subject) -> bool:
    """The states equal the `hidden_states` of transformers, up to those that are normed."""
    with torch.no_grad():
        output = subject.model.model(subject.ids, use_cache=False, output_hidden_states=True)
    states = subject.model.residual_stream(subject.ids)
    n_layers, first = len(subject.model.blocks), subject.architecture.first_state
    assert len(states) == n_layers + 1
    for index, expected in enumerate(output.hidden_states[:n_layers]):
        require_close(states[index + first], expected, f"state {index + first}")
    assert len(output.hidden_states) >= n_layers
    return True


def terms_are_those_of_hooks(subject: Subject) -> bool | None:
    """`sites` returns what hooks on the modules named by hand return; None without such modules."""
    architecture, model = subject.architecture, subject.model
    wanted = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    if architecture.terms is None:
        require_refused(
            lambda: model.sites(subject.ids, wanted=wanted),
            "is not its input plus|not supported for this architecture",
        )
        return None
    kept: dict[tuple[int, str], Tensor] = {}
    with torch.no_grad():
        handles = [
            handle
            for layer, block in enumerate(model.blocks)
            for site, name in zip(("attn_out", "mlp_out"), architecture.terms, strict=True)
            for handle in [_hook_by_hand(block, name, kept, (layer, site))]
        ]
        model.model(subject.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    if not architecture.is_parallel:
        wanted = (*wanted, "resid_mid")
    sites = model.sites(subject.ids, wanted=wanted)
    for layer in range(len(model.blocks)):
        before, after = sites["resid_pre"][layer], sites["resid_post"][layer]
        attn_out, mlp_out = (
            architecture.factor * kept[layer, site] for site in ("attn_out", "mlp_out")
        )
        require_close(sites["attn_out"][layer], attn_out, f"attn_out of block {layer}")
        require_close(sites["mlp_out"][layer], mlp_out, f"mlp_out of block {layer}")
        require_close(after, before + attn_out + mlp_out, f"the sum of block {layer}")
        require_close(sites["resid_pre"][layer + 1], after, f"the output of block {layer}")
        if not architecture.is_parallel:
            require_close(
                sites["resid_mid"][layer], before + attn_out, f"resid_mid of block {layer}"
            )
    if architecture.is_parallel:
        require_refused(lambda: model.sites(subject.ids), "side by side")
    return True


def _hook_by_hand(
    block: nn.Module, name: str, kept: dict[tuple[int, str], Tensor], key: tuple[int, str]
) -> torch.utils.hooks.RemovableHandle:
    """Keep the output of a module of a block, without the stream if the module adds it."""
    adds_stream = name.endswith("+")
    (module,) = (getattr(block, one) for one in name.rstrip("+").split("|") if hasattr(block, one))

    def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple) -> None:
        output = output[0] if isinstance(output, tuple) else output
        output = output.detach().view(1, -1, output.shape[-1])  # some modules read flat tokens
        kept[key] = output - args[1] if adds_stream else output.clone()

    return module.register_forward_hook(keep)


def tuned_is_below_logit(subject: Subject) -> bool:
    """After `STEPS` steps, the tuned lens has the lower held-out KL at every layer."""
    config = EvaluateConfig(
        lenses=(f"tuned={subject.lens_folder}",),
        model=ModelConfig(device="cpu"),
        tokens=8 * (SEQ_LEN - 1),
    )
    evaluation = evaluate(config, model=subject.model)
    logit, tuned = (evaluation.by_layer(lens, "kl_nats") for lens in ("logit", "tuned"))
    assert len(logit) == len(tuned) == len(subject.model.blocks)
    for layer, (before, after) in enumerate(zip(logit, tuned, strict=True)):
        assert after.value < before.value, (
            f"layer {layer}: the KL is {after.value:.3f} with the tuned lens and "
            f"{before.value:.3f} with the logit lens"
        )
    return True


def saved_lens_is_the_same(subject: Subject) -> bool:
    """A fitted lens that is loaded, saved and loaded again gives equal logits."""
    lens = TunedLens.load(subject.lens_folder, subject.model)
    lens.save(subject.lens_folder.with_name("copy"))
    again = load_lens(subject.lens_folder.with_name("copy"), subject.model)
    untrained = LogitLens.from_model(subject.model)
    for layer, state in enumerate(subject.model.residual_stream(subject.ids)[:-1]):
        assert torch.equal(lens(state, layer), again(state, layer)), f"layer {layer}"
        assert not torch.allclose(lens(state, layer), untrained(state, layer), atol=1e-2)
    return True


def trajectory_ends_with_the_model(subject: Subject) -> bool:
    """The last row of a trajectory has the log-probabilities of the model."""
    lens = TunedLens.load(subject.lens_folder, subject.model)
    read = trajectory(subject.model, lens, SENTENCE)
    predictions = read.predictions[read.lens_name()]
    assert len(read.rows) == len(subject.model.blocks) + 1
    with torch.no_grad():
        logits = subject.model.model(subject.ids, use_cache=False).logits[0]
    expected = logits.float().log_softmax(-1).gather(-1, predictions.top_ids[-1])
    require_close(predictions.top_log_probs[-1], expected, "the last row")
    return True


def generates_like_the_model(subject: Subject) -> bool:
    """At the last layer, the lens continues a text as `generate` of transformers does."""
    lens = TunedLens.load(subject.lens_folder, subject.model)
    prompt, model = "import os", subject.model
    ids = model.encode(prompt)
    written = model.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    expected = model.tokenizer.decode(
        [token for token in written[0, ids.shape[1] :].tolist() if token != 2]
    )
    found = lens.generate(model, prompt, max_new_tokens=8)
    assert expected
    assert found == expected, f"{found!r} is not {expected!r}"
    return True


CHECKS: dict[str, Callable[[Subject], bool | None]] = {
    "found": found_by_structure,
    "logits": logits_are_the_models,
    "states": states_are_hidden_states,
    "terms": terms_are_those_of_hooks,
    "tuned": tuned_is_below_logit,
    "saved": saved_lens_is_the_same,
    "trajectory": trajectory_ends_with_the_model,
    "generate": generates_like_the_model,
}


def require_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Check that two tensors agree to the precision of float32 after several layers."""
    assert found.shape == expected.shape, f"{what}: {found.shape} is not {expected.shape}"
    difference = float((found - expected).abs().max())
    assert difference <= 1e-4 * float(expected.abs().max()), f"{what}: differ by {difference:.3g}"


def require_refused(call: Callable[[], object], message: str) -> None:
    """Check that a call is refused with a message, given as a pattern."""
    try:
        call()
    except InputError as error:
        said = str(error)
    else:
        said = "nothing"
    assert re.search(message, said), f"expected to be refused with {message!r}, but it said {said}"


def run_checks(
    architecture: Architecture, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, bool | Exception | None]:
    """The result of every check: True, None where it does not apply, or why it failed."""
    subject = Subject(architecture, tokenizer, folder)
    results: dict[str, bool | Exception | None] = {}
    for name, check in CHECKS.items():
        try:
            results[name] = check(subject)
        except Exception as error:
            results[name] = error
    return results


def table(results: dict[Architecture, dict[str, bool | Exception | None]]) -> str:
    """The results in Markdown."""
    head = ["architecture", "what is peculiar", *CHECKS]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + ":-:|" * len(CHECKS)]
    for architecture, by_check in results.items():
        marks = [{True: "✓", None: "—"}.get(result, "✗") for result in by_check.values()]
        lines.append("| " + " | ".join([architecture.name, architecture.peculiar, *marks]) + " |")
    return "\n".join(lines)


# ruff: disable[E501] - a row of a Markdown table is one line
PAGE = """# Architectures

tunedlens has no list of supported models: it finds the blocks, the final norm and the unembedding of a model by
their structure. The table below shows the results of checks on {count} tiny random models, each of a different
architecture in transformers {version}, or of a variant of one. To generate this page again, run
`python tests/architectures.py --output docs/architectures.md`. The tests run the same checks: a quarter of the
architectures by default, and the others with `pytest -m slow`.

| column | a tick means |
|---|---|
| found | The parts of the model are found without being named. |
| logits | The decoded last state equals the model's own logits, for logits near 0 and far beyond any cap. |
| states | The states of the residual stream equal the `hidden_states` that transformers returns. |
| terms | The terms that attention and MLP add to the residual stream equal the outputs of modules that the test names. A dash means that some block is not its input plus one attention plus one MLP. `model.sites` then raises an `InputError` for these terms; the states between blocks are available. |
| tuned | After {steps} steps of {step_tokens} tokens, the held-out KL of the tuned lens is below that of the logit lens at every layer. |
| saved | A lens that was saved and loaded gives equal logits. |
| trajectory | The last row of a `trajectory` contains the log-probabilities of the model. |
| generate | At the last layer, the lens continues a text as the model does. |

{table}

The largest logit of every model is at least {min_logit:g} before a cap, so the checks would detect a cap, a
scale or a norm that was missed. The checks show that an architecture is read correctly. They do not show how well
a lens predicts a trained model of this architecture.

## If a model is not found

When a model is loaded, its decoded last state is compared with its own logits, and the model is refused if they
differ. If the error message says that the blocks or the final norm are not found, name them:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from tunedlens import FrozenModel

loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = FrozenModel(loaded, tokenizer, blocks="model.layers", final_norm="model.norm")
```

`blocks` is the path of the list of blocks. `final_norm` is the path of the norm after the last block, or `none`
for a model without a final norm. `print(loaded)` shows both paths. If the error message says that the model
applies a function to its logits that its config does not declare, tunedlens cannot decode this model.
"""
# ruff: enable[E501]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the page to this file")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(builtin.FOLDER)
    results, failures = {}, []
    for architecture in ARCHITECTURES:
        print(f"{architecture.name} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            results[architecture] = run_checks(architecture, tokenizer, Path(folder))
        for name, result in results[architecture].items():
            if isinstance(result, Exception):
                failures.append(f"{architecture.name}, {name}: {result}")
    print(table(results))
    if options.output is not None:
        page = PAGE.format(
            count=len(results),
            version=transformers.__version__,
            min_logit=MIN_LOGIT,
            steps=STEPS,
            step_tokens=STEP_TOKENS,
            table=table(results),
        )
        options.output.write_text(page, encoding="utf-8")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
