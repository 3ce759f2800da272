"""On SmolLM2-135M, which the package index carries: `pytest -m real`."""

import sys
from pathlib import Path

import pytest
import torch

from tunedlens import CorpusConfig, ModelConfig, TrainConfig, load_model, train
from tunedlens.engine.objective import LensKL
from tunedlens.engine.vocab_sample import draw_sample
from tunedlens.fit import LeastSquares

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
TEXT = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def folder():
    from real_model import real_model

    return real_model()


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, device="cpu")


def test_tokenizer_gives_back_every_text(model):
    for text in ("naïve café, 日本語 and 🎉", "  def f(x):\n\treturn x\r\n"):
        assert model.tokenizer.decode(model.encode(text)[0]) == text


def test_it_is_a_language_model_worth_looking_into(model):
    ids = model.encode("The capital of France is")
    final = model.residual_stream(ids)[-1]
    assert model.tokenizer.decode(model.unembedding(final)[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize("layer", [2, 15, 26, 29])
def test_sampled_gradient_is_near_the_exact_one_from_early_to_late_layers(model, layer):
    text = "\n".join(path.read_text() for path in TEXT)
    ids = model.encode(text, is_any_length=True)[:, :2048].view(4, 512)
    states = [state.flatten(0, 1) for state in model.residual_stream(ids)]
    sums = LeastSquares(1, 576)
    sums.add([states[layer]], states[-1])
    solution = sums.solve(1e-3)[0].float()
    translated = states[layer] + states[layer] @ solution[:, :-1].T + solution[:, -1]
    kl = LensKL(model.unembedding.centred())
    usage = torch.zeros(49_152)
    side = kl.model_side(states[-1], usage)
    exact = kl.gradient(translated, side)[1]
    sampled = kl.gradient(translated, side, kl.keys(draw_sample(usage, 6144, seed=0, step=0)))[1]
    # In the translator, where tokens are averaged, the noise of the sample is small.
    one, other = exact.T @ states[layer], sampled.T @ states[layer]
    assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.97


def test_closed_form_is_far_below_the_logit_lens_at_every_layer(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(path.read_text() for path in TEXT))
    config = TrainConfig(
        model=ModelConfig(model=str(folder), device="cpu"),
        corpus=CorpusConfig(dataset=str(text), seq_len=256),
        fit="closed-form",
        init_tokens=8192,
        evaluate_tokens=255,
    )
    evaluation = train(config, tmp_path / "run")
    logit, tuned = (evaluation.by_layer(lens, "kl_nats") for lens in ("logit", "tuned"))
    assert all(ours.value < theirs.value / 2 for ours, theirs in zip(tuned, logit, strict=True))
