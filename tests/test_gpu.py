"""Every path that has a device, compared with the CPU.

`pytest -m gpu` runs these tests on the accelerator; TUNEDLENS_TEST_DEVICE=cpu runs them without
one.
"""

import dataclasses
import os
import signal

import pytest
import safetensors.torch
import torch
from accelerate import PartialState
from conftest import in_two_processes, make_gpt2, random_lens, reference_kl, short_run, write_text
from torch import nn

from tunedlens import (
    CorpusConfig,
    FrozenModel,
    LogitLens,
    ScoringConfig,
    TunedLens,
    compare,
    doctor,
    load_model,
    neurons,
    score_lenses,
    train,
    trajectory,
)
from tunedlens.checkpoint import saved_config
from tunedlens.engine import CappedLensKL, LensKL, accumulate_gradient
from tunedlens.engine.backend import Backend, fastest_backend
from tunedlens.engine.vocab_sample import draw_sample
from tunedlens.fit import PreconditionedMuon, TorchOptimizer, mean_lens, unigram_lens
from tunedlens.metrics import TRAJECTORY_METRICS
from tunedlens.model import SITES, Unembedding
from tunedlens.sampling import sample_documents
from tunedlens.training import Interrupted, loop

pytestmark = pytest.mark.gpu

TEXTS = ["def naïve(x):\n    return x + 1\n", "x", "import os"]
VOCAB, D_MODEL = 5003, 24
"""Neither is a multiple of 16, which tensor cores like."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A random GPT-2 of 3 layers, and a text."""
    folder = tmp_path_factory.mktemp("gpu") / "tiny"
    make_gpt2().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder.parent / "text.txt")
    return folder


@pytest.fixture
def here(folder):
    """The model on the CPU."""
    return load_model(folder, device="cpu")


@pytest.fixture
def there(folder, device):
    """The same model on the device."""
    return load_model(folder, device=device)


@pytest.fixture
def config(folder):
    return short_run(folder, folder.parent / "text.txt", tokens=640, init_tokens=128)


def on(device, config, **settings):
    """The config on a device."""
    model = dataclasses.replace(config.model, device=None if device is None else str(device))
    return dataclasses.replace(config, model=model, **settings)


def weights(folder):
    return safetensors.torch.load_file(folder / "lens.safetensors")


def held_out(evaluation):
    """The KL of the trained lens at every layer."""
    (lens,) = {result.lens for result in evaluation.results} & {"tuned", "jacobian", "bias-only"}
    return [estimate.value for estimate in evaluation.by_layer(lens, "kl_nats")]


def random_ids(model, blocks=6, seq_len=20):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.identity.vocab_size, (blocks, seq_len), generator=generator)


def close(one, other, **tolerances):
    torch.testing.assert_close(one.cpu(), other.cpu(), check_dtype=False, **tolerances)


# The model and its states


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1), ("float16", 0.02)]
)
def test_a_model_of_any_dtype_loads_and_decodes_its_last_state(
    folder, here, device, dtype, tolerance
):
    model = load_model(folder, dtype=dtype, device=device)  # checks itself
    assert model.device.type == device.type
    ids = model.encode(TEXTS[0])
    logits = model.unembedding(model.residual_stream(ids)[-1])
    expected = here.model(here.encode(TEXTS[0])).logits
    close(logits, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_doctor_finds_nothing_wrong(there):
    assert doctor(there).passed, str(doctor(there))


def test_states_at_every_site_are_those_of_the_cpu(here, there):
    ids = random_ids(here)
    one, other = there.sites(ids.to(there.device)), here.sites(ids)
    for site in SITES:
        for a, b in zip(one[site], other[site], strict=True):
            assert a.device.type == there.device.type
            close(a, b, rtol=1e-4, atol=1e-4)


def test_neurons_are_those_of_the_cpu(here, there):
    one, other = (neurons(model, TEXTS[0], 1, k=3, promoted=2) for model in (there, here))
    assert one.index.tolist() == other.index.tolist()


# The objective


def objective_inputs(layers=2, tokens=37):
    """An unembedding and states in float64 whose distributions are neither flat nor sharp."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    unembedding = Unembedding(
        nn.LayerNorm(D_MODEL).double(), 0.5 * random(VOCAB, D_MODEL), random(VOCAB)
    )
    return unembedding, random(layers, tokens, D_MODEL), random(tokens, D_MODEL)


def gradients(objective, translated, final, keys=None):
    """KL and gradient of every layer, on the CPU in float64."""
    model = objective.model_side(final)
    pairs = [objective.gradient(states, model, keys) for states in translated]
    return [torch.stack(parts).cpu().double() for parts in zip(*pairs, strict=True)]


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk", [None, 5])
def test_exact_objective_agrees_with_float64(device, chunk):
    unembedding, translated, final = objective_inputs()
    translated.requires_grad_()
    expected = reference_kl(translated, final, unembedding)
    (grad,) = torch.autograd.grad(expected.sum() * len(final), translated)
    single = unembedding.shared().to(device).float().centred()
    inputs = [states.detach().float().to(device) for states in (translated, final)]
    kl, gradient = gradients(LensKL(single, chunk=chunk), *inputs)
    close(kl.mean(1), expected, rtol=1e-5, atol=1e-6)
    assert relative_error(gradient, grad) < 1e-5
    side = LensKL(single, chunk=chunk)
    model = side.model_side(inputs[1])
    for states, wanted in zip(inputs[0], expected, strict=True):
        assert side.kl(states, model).mean().item() == pytest.approx(wanted.item(), rel=1e-5)


def test_bfloat16_objective_is_as_accurate_as_on_the_cpu(device):
    unembedding, translated, final = objective_inputs()
    exact = gradients(LensKL(unembedding.centred(), dtype=torch.float64), translated, final)
    errors = []
    for place in ("cpu", device):
        single = unembedding.shared().to(place).float().centred()
        inputs = [states.float().to(place) for states in (translated, final)]
        found = gradients(LensKL(single, dtype=torch.bfloat16), *inputs)
        errors.append([relative_error(*pair) for pair in zip(found, exact, strict=True)])
    for ours, theirs in zip(errors[1], errors[0], strict=True):
        assert ours < 1.5 * theirs + 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_sampled_objective_agrees_with_float64(device, dtype, tolerance):
    unembedding, translated, final = objective_inputs()
    centred = unembedding.centred()
    usage = torch.zeros(VOCAB, dtype=torch.float64)
    exact = LensKL(centred, dtype=torch.float64)
    exact.model_side(final, usage)
    sample = draw_sample(usage, 700, seed=1, step=2)
    expected = gradients(exact, translated, final, exact.keys(sample))

    objective = LensKL(centred.shared().to(device).float(), dtype=dtype)
    inputs = [states.float().to(device) for states in (translated, final)]
    own_usage = torch.zeros(VOCAB, device=device)
    objective.model_side(inputs[1], own_usage)
    assert relative_error(own_usage.cpu().double(), usage) < tolerance
    own = draw_sample(usage.float().to(device), 700, seed=1, step=2)
    assert set(own.ids.tolist()) >= set(sample.ids.tolist())
    found = gradients(objective, *inputs, objective.keys(own))
    for value, wanted in zip(found, expected, strict=True):
        assert relative_error(value, wanted) < tolerance


def test_capped_objective_agrees_with_float64(device):
    unembedding, translated, final = objective_inputs()
    capped = Unembedding(unembedding.norm, unembedding.weight, unembedding.bias, cap=2.0)
    translated.requires_grad_()
    expected = reference_kl(translated, final, capped)
    (grad,) = torch.autograd.grad(expected.sum() * len(final), translated)
    objective = CappedLensKL(capped.shared().to(device).float())
    inputs = [states.detach().float().to(device) for states in (translated, final)]
    kl, gradient = gradients(objective, *inputs)
    close(kl.mean(1), expected, rtol=1e-4, atol=1e-6)
    assert relative_error(gradient, grad) < 1e-4


def test_backend_is_measured_on_the_device(device):
    width = 768 if device.type == "cuda" else 16
    unembedding = Unembedding(nn.LayerNorm(width), torch.randn(50_257, width), None).to(device)
    found = fastest_backend(unembedding)
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8:
        assert found == Backend("bf16", "products")


@pytest.fixture
def cuda(device):
    if device.type != "cuda":
        pytest.skip("this is about the memory and the streams of CUDA")
    return device


def test_memory_of_a_gradient_does_not_grow_with_the_layers(cuda, tokenizer):
    peaks = []
    for layers in (2, 8):
        model = FrozenModel(make_gpt2(n_layer=layers, n_embd=64), tokenizer, check=False).to(cuda)
        lens = TunedLens.from_model(model)
        objective = LensKL(model.unembedding.centred(), dtype=torch.bfloat16)
        states = torch.randn(layers + 1, 16_384, 64, device=cuda)  # two layers at a time
        for parameter in lens.parameters():
            parameter.grad = torch.zeros_like(parameter)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        accumulate_gradient(lens, states, objective)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 1.1 * peaks[0]


def test_objective_that_runs_out_of_memory_continues_with_smaller_chunks(cuda):
    vocab, tokens = 100_000, 16_384  # 6.6 GB of logits
    unembedding = Unembedding(nn.LayerNorm(64), torch.randn(vocab, 64), None).to(cuda)
    states = torch.randn(tokens, 64, device=cuda)
    expected = LensKL(unembedding, dtype=torch.float32).model_side(states)
    whole = LensKL(unembedding, dtype=torch.float32, chunk=tokens)
    whole.chunk = tokens
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 2**30
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with pytest.warns(UserWarning, match="out of memory: continuing with chunks of"):
            found = whole.model_side(states)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    close(found.offset, expected.offset, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fit", ["preconditioned", "sgd", "muon"])
def test_a_step_never_waits_for_the_device(cuda, config, tmp_path, monkeypatch, fit):
    def calling(function, mode):
        def call(*args):
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return call

    # In the model's forward pass, transformers looks once whether the text is packed.
    forward = calling(FrozenModel.residual_stream, "default")
    monkeypatch.setattr(FrozenModel, "residual_stream", forward)
    optimizer = PreconditionedMuon if fit == "preconditioned" else TorchOptimizer
    monkeypatch.setattr(loop, "_accumulate", calling(loop._accumulate, "error"))
    monkeypatch.setattr(optimizer, "step", calling(optimizer.step, "error"))
    sample = 400 if fit == "preconditioned" else 0
    train(on(cuda, config, fit=fit, vocab_sample=sample), tmp_path / "run")


# Training


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"fit": "closed-form", "tokens": None}, 1e-3),
        ({"fit": "closed-form", "tokens": None, "bias_only": True}, 1e-3),
        ({"fit": "jacobian", "tokens": None}, 1e-3),
        ({"fit": "jacobian", "tokens": None, "jacobian_targets": "same"}, 1e-3),
        ({"fit": "sgd"}, 1e-3),
        ({"fit": "muon"}, 0.01),
        ({"fit": "preconditioned"}, 0.02),
        ({"fit": "preconditioned", "bias_only": True}, 0.01),
        ({"fit": "preconditioned", "vocab_sample": 400}, 0.02),
        ({"fit": "preconditioned", "sites": "attn_out,resid_mid,mlp_out"}, 0.02),
        ({"fit": "preconditioned", "micro_batch_size": 1}, 0.02),
        ({"fit": "preconditioned", "precision": "bf16"}, 0.05),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_training_agrees_with_the_cpu(config, device, tmp_path, settings, tolerance):
    one = train(on(device, config, **settings), tmp_path / "device")
    other = train(on("cpu", config, **settings), tmp_path / "cpu")
    for a, b in zip(held_out(one), held_out(other), strict=True):
        assert a == pytest.approx(b, rel=tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_lens_for_a_model_in_half_precision_agrees_with_the_cpu(config, device, tmp_path, dtype):
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    one = train(on(device, half), tmp_path / "device")
    other = train(on("cpu", half), tmp_path / "cpu")
    for a, b in zip(held_out(one), held_out(other), strict=True):
        assert a == pytest.approx(b, rel=0.05)


def test_a_run_chooses_the_device_and_the_backend_by_itself(config, device, tmp_path):
    train(on(None, config, precision=None, kernel=None), tmp_path / "run")
    saved = saved_config(tmp_path / "run")
    assert saved.model.device is None
    if device.type != "cpu":
        assert saved.kernel == "products"
        assert saved.micro_batch_size is None


@pytest.mark.parametrize("vocab_sample", [0, 400])
def test_a_resumed_run_ends_bit_equal(config, device, tmp_path, monkeypatch, vocab_sample):
    config = on(device, config, vocab_sample=vocab_sample)
    train(config, tmp_path / "unbroken")
    original, taken = PreconditionedMuon.step, []

    def take(self, *args):
        taken.append(len(taken))
        if len(taken) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PreconditionedMuon, "step", take)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "broken")
    train(saved_config(tmp_path / "broken"), tmp_path / "broken", resume=True)
    one, other = weights(tmp_path / "unbroken"), weights(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)


def _train_beside_another(config, output):
    """One of two processes on the same device; NCCL refuses to share one, gloo does not."""
    if torch.cuda.is_available():
        del os.environ["ACCELERATE_USE_CPU"]
        PartialState(backend="gloo")
    return train(config, output)


def test_two_processes_share_one_device(config, device, tmp_path):
    config = on(None, config, fit="sgd", vocab_sample=0)
    one = train(on(device, config), tmp_path / "one")
    for other in in_two_processes(_train_beside_another, config, tmp_path / "two"):
        for a, b in zip(held_out(one), held_out(other), strict=True):
            assert a == pytest.approx(b, rel=1e-4)


# Text that the model writes


def test_sampled_text_is_repeatable_and_leaves_the_seed_alone(there):
    torch.manual_seed(3)
    expected = torch.rand(1, device=there.device)
    torch.manual_seed(3)
    one = sample_documents(there, 300, 20)
    assert torch.equal(torch.rand(1, device=there.device), expected)
    assert one == sample_documents(there, 300, 20)


def test_a_lens_is_trained_on_text_of_the_model(config, device, tmp_path):
    corpus = CorpusConfig(dataset="self", seq_len=16, self_tokens=4000)
    evaluation = train(on(device, config, corpus=corpus), tmp_path / "run")
    logit = [estimate.value for estimate in evaluation.by_layer("logit", "kl_nats")]
    assert sum(held_out(evaluation)) < sum(logit)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_layer_writes_what_it_writes_on_the_cpu(here, there, layer):
    one, other = (
        random_lens(here).to(model.device).generate(model, TEXTS, layer, max_new_tokens=8)
        for model in (there, here)
    )
    assert one == other


def test_samples_of_a_layer_are_repeatable(there):
    lens = random_lens(there)
    one, other = (
        lens.generate(there, TEXTS, 1, do_sample=True, seed=7, max_new_tokens=8) for _ in range(2)
    )
    assert one == other


# Lenses


def test_a_lens_goes_from_device_to_cpu_and_back(here, there, tmp_path):
    random_lens(there).save(tmp_path / "there")
    loaded = TunedLens.load(tmp_path / "there", here)
    loaded.save(tmp_path / "here")
    back = TunedLens.load(tmp_path / "here", there)
    hidden = torch.randn(5, 16)
    for layer in range(4):
        assert back(hidden.to(there.device), layer).device.type == there.device.type
        close(back(hidden.to(there.device), layer), loaded(hidden, layer), rtol=1e-4, atol=1e-4)


def test_a_lens_moves_without_its_model(here, device):
    lens, hidden = random_lens(here), torch.randn(5, 16)
    expected = lens(hidden, 1)
    moved = lens.to(device)
    close(moved(hidden.to(device), 1), expected, rtol=1e-4, atol=1e-4)
    assert here.unembedding.weight.device.type == "cpu"


def test_function_for_transformer_lens_translates_on_the_device(there):
    lens = random_lens(there)
    translate = lens.as_transformer_lens()
    entry = torch.randn(2, 5, 16, device=there.device)
    for layer in range(4):
        assert torch.equal(translate(entry, layer), lens.transform_hidden(entry, layer))


# Results


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_evaluation_agrees_with_the_cpu_also_where_the_user_allows_tf32(here, there, precision):
    config = ScoringConfig(metrics="all", by_position=True, transfer=True, batch_size=4)
    blocks, results = list(random_ids(here)), []
    for model in (here, there):
        lens = random_lens(here).to(model.device)
        lenses = {"logit": LogitLens.from_model(model), "tuned": lens}
        torch.set_float32_matmul_precision(precision)
        try:
            results.append(score_lenses(model, lenses, blocks, config))
        finally:
            torch.set_float32_matmul_precision("highest")
    for a, b in zip(results[1].results, results[0].results, strict=True):
        assert (a.lens, a.layer, a.metric) == (b.lens, b.layer, b.metric)
        assert a.value == pytest.approx(b.value, rel=1e-4, abs=1e-5)
    for name, grid in results[0].transfer["tuned"].items():
        one, other = (torch.tensor(g.values) for g in (results[1].transfer["tuned"][name], grid))
        close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [mean_lens, unigram_lens])
def test_baselines_are_those_of_the_cpu(here, there, make):
    one, other = (make(model, list(random_ids(here)), 100) for model in (there, here))
    assert one.log_probs.device.type == there.device.type
    close(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sites", ["resid_pre", SITES])
def test_trajectories_of_a_padded_batch_agree_with_the_cpu(here, there, sites):
    read = [
        trajectory(model, {"logit": LogitLens.from_model(model)}, TEXTS, sites=sites)
        for model in (there, here)
    ]
    for one, other in zip(*read, strict=True):
        for metric in TRAJECTORY_METRICS:
            pair = [found.values(metric, token="final") for found in (one, other)]
            close(*map(torch.as_tensor, pair), rtol=1e-4, atol=1e-3, equal_nan=True)


def test_a_long_text_is_read_in_windows(here, there):
    text = "x = [1, 2, 3]\n" * 12
    one, other = (
        trajectory(model, random_lens(here).to(model.device), text, stride=16)
        for model in (there, here)
    )
    pair = [found.values("kl_nats") for found in (one, other)]
    close(*map(torch.as_tensor, pair), rtol=1e-4, atol=1e-3)


def test_a_comparison_of_texts_agrees_with_the_cpu(here, there):
    one, other = (
        compare(
            model,
            random_lens(here).to(model.device),
            "x = 1",
            baseline_text="y = 2",
            positions=slice(0, 2),
        )
        for model in (there, here)
    )
    for lens, values in other.divergences.items():
        for name, wanted in values.items():
            close(one.divergences[lens][name], wanted, rtol=1e-4, atol=1e-4)
