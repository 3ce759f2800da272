"""Small things that tests share: tiny models, the embedded model, texts."""

import json
import multiprocessing
import os
import socket
from functools import cache
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tunedlens import (
    CorpusConfig,
    Evaluation,
    FrozenModel,
    ModelConfig,
    TrainConfig,
    TunedLens,
    builtin,
    load_model,
    report,
)
from tunedlens.engine.distributions import kl_divergence, log_probs
from tunedlens.evaluation import MODEL, Difference, Grid, Result
from tunedlens.report import plots

os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(1)  # more would wait for each other longer than small products take

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(builtin.FOLDER)


@pytest.fixture(scope="session")
def model():
    """The embedded GPT-2."""
    return load_model(device="cpu")


@cache
def blank_files():
    figure = Figure(figsize=(0.1, 0.1))
    return {kind: plots.rendered(figure, kind) for kind in plots.FORMATS}


@pytest.fixture(autouse=True)
def blank_plots(request, monkeypatch):
    """Plots have their content but no layout, and blank files: both take seconds of every run.

    A test with the mark `renders` has the real ones.
    """
    if request.node.get_closest_marker("renders") is None:
        leave_plots_blank(monkeypatch.setattr)


def leave_plots_blank(set_attribute):
    files = blank_files()
    for module in (plots, plots.style):
        set_attribute(module, "in_all_formats", lambda _: files)
        set_attribute(module, "in_svg", lambda _: files["svg"])
    set_attribute(Figure, "draw_without_rendering", lambda _: None)


@pytest.fixture(scope="session")
def device():
    """The device of tests marked `gpu`: the accelerator, or what TUNEDLENS_TEST_DEVICE names."""
    named = os.environ.get("TUNEDLENS_TEST_DEVICE")
    found = torch.device(named) if named else torch.accelerator.current_accelerator(True)
    if found is None:
        pytest.skip("there is no accelerator; TUNEDLENS_TEST_DEVICE=cpu runs the test on the CPU")
    return found


SMALL = {
    "vocab_size": 4096,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
"""The sizes of tiny models, by the names that most configurations have."""


def make_gpt2(seed=0, n_layer=3, n_embd=16, vocab_size=4096, n_positions=32):
    """A random GPT-2 whose logits are far from uniform."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    gpt2 = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        gpt2.transformer.ln_f.weight.normal_(1.0, 0.3)
        gpt2.transformer.ln_f.bias.normal_(0.0, 0.3)
    return gpt2


def make_llama(n_layers=2, **settings):
    """A random model with RMS norms, rotary positions and gated MLPs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=n_layers,
        num_attention_heads=2,
        initializer_range=0.3,
        **settings,
    )
    return LlamaForCausalLM(config)


def make_sentence_piece(prefix="Prepend"):
    """A SentencePiece tokenizer with byte fallback and BOS, as Llama 2 and Gemma have them.

    Args:
        prefix: how a space comes before a text: `Prepend`, `Metaspace`, or None for none.
    """
    texts = ["the quick brown fox naïve café 日本語 jumps over line after line"] * 20
    model = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix is not None:
        steps.append(decoders.Strip(" ", 1, 0))
    if prefix == "Metaspace":
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepend = [normalizers.Prepend("▁")] if prefix == "Prepend" else []
        model.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>"]
    model.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    content = json.loads(model.to_str())
    for byte in range(256):
        content["model"]["vocab"].setdefault(f"<0x{byte:02X}>", len(content["model"]["vocab"]))
    model = Tokenizer.from_str(json.dumps(content))
    model.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def sentence_piece():
    return make_sentence_piece()


@pytest.fixture
def tiny(tokenizer):
    """A random GPT-2 of 3 layers with the embedded tokenizer."""
    return FrozenModel(make_gpt2(), tokenizer, name="tiny")


@pytest.fixture
def tiny_folder(tmp_path, tokenizer):
    """The same on disk, as a user would have it."""
    folder = tmp_path / "tiny"
    make_gpt2().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def short_run(model, dataset, **settings):
    """The config of a run on a CPU that takes a moment."""
    shared = {
        "model": ModelConfig(model=str(model), device="cpu"),
        "corpus": CorpusConfig(dataset=str(dataset), seq_len=16),
        "batch_size": 4,
        "evaluate_tokens": 60,
        "precision": "fp32",
        "kernel": "products",
    }
    return TrainConfig(**shared | settings)


def write_text(path):
    """About 3,000 tokens of text, with bytes of every length."""
    lines = [f"line {i}: naïve café, 日本語 and 🎉, {i * i}\r\n" for i in range(150)]
    path.write_bytes("".join(lines).encode())
    return path


@pytest.fixture
def text_file(tmp_path):
    return write_text(tmp_path / "text.txt")


def random_lens(model, scale=0.1, seed=0):
    """A tuned lens whose translators are not zero."""
    torch.manual_seed(seed)
    lens = TunedLens.from_model(model)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.normal_(0.0, scale)
    return lens


def reference_kl(translated, final, unembedding):
    """Mean KL(model ‖ lens) of every layer, in nats, by its definition and autograd.

    Holds all logits of all layers at once.
    """
    model = log_probs(unembedding(final))
    return torch.stack(
        [kl_divergence(model, log_probs(unembedding(layer))).mean() for layer in translated]
    )


def make_evaluation(changed=None, grids=True):
    """Results of two lenses on eight layers, without a model.

    Args:
        changed: other values, by lens, layer and metric.
        grids: whether there are figures by position and by translator.
    """
    results, differences = [], []
    for lens, factor in (("logit", 2.0), ("tuned", 1.0)):
        for layer in range(8):
            kl = factor * (8 - layer)
            figures = {
                "kl_nats": (kl, 0.1),
                "cross_entropy_nats": (2 + kl, 0.2),
                "perplexity": (10.0 * 2**kl, 2.0),
                "bits_per_byte": (1 + kl / 4, 0.05),
                "top1_agreement": (1 / (1 + kl), 0.01),
                "top10_agreement": (1 / (1 + kl / 2), 0.01),
                "bias_nats": (kl / 10, 0.01),
                "prediction_depth": (0.1 + 0.01 * layer * factor, 0.005),
            }
            results += [Result(lens, layer, metric, *figure) for metric, figure in figures.items()]
            if lens == "tuned":
                differences.append(Difference(lens, "logit", layer, "kl_nats", -kl, 0.05))
        results.append(Result(lens, 8, "prediction_depth", 0.2, 0.01))
        results.append(Result(lens, None, "mean_prediction_depth", 3 + factor, 0.1))
        results.append(Result(lens, None, "kl_nats", 4.5 * factor, 0.05))
    differences.append(Difference("tuned", "logit", None, "kl_nats", -4.5, 0.02))
    results.append(Result(MODEL, 8, "perplexity", 9.5, 0.5))
    results.append(Result(MODEL, 8, "bits_per_byte", 0.9, 0.1))
    for index, r in enumerate(results):
        value = (changed or {}).get((r.lens, r.layer, r.metric), r.value)
        results[index] = Result(r.lens, r.layer, r.metric, value, r.standard_error)
    matrix = [[1.0 + abs(i - j) for j in range(8)] for i in range(8)]
    rows = [[8.0 - layer] + [1.0 + layer] * 20 for layer in range(8)]
    curve = {"kl_nats": Grid(rows, [[0.1] * 21] * 8)}
    return Evaluation(
        results,
        n_layers=8,
        tokens=100,
        text_bytes=300,
        blocks=4,
        differences=differences,
        by_position={"logit": curve, "tuned": curve} if grids else {},
        transfer={"tuned": {"kl_nats": Grid(matrix, matrix)}} if grids else {},
    )


@pytest.fixture(scope="session")
def written_report(tmp_path_factory):
    """The report of these results; to be read, not changed."""
    folder = tmp_path_factory.mktemp("report")
    report.write_report(make_evaluation(), folder)
    return folder


def _process(rank, port, function, arguments, results):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    leave_plots_blank(setattr)
    results.put(function(*arguments))
    torch.distributed.destroy_process_group()


def in_two_processes(function, *arguments):
    """What a function returns in each of two processes that share their work (gloo)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tunedlens"])  # imported once for all tests
    results = context.Queue()
    processes = [
        context.Process(target=_process, args=(rank, port, function, arguments, results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return found
