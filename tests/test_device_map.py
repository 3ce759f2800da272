"""Models whose modules are on several devices, or offloaded."""

import pytest
import torch
from accelerate import dispatch_model
from conftest import make_gpt2, random_lens, short_run

from tunedlens import (
    FrozenModel,
    InputError,
    ModelConfig,
    TunedLens,
    load_model,
    score_lenses,
    trajectory,
)
from tunedlens.fit import MeanJacobian
from tunedlens.model import load_configured
from tunedlens.training import loop, train

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

IDS = torch.tensor([[5, 7, 11, 13], [17, 19, 23, 29]])


def offloaded(folder):
    """The model with a block, the norm and the embeddings kept on disk until they are used."""
    parts = dict.fromkeys(("transformer.wpe", "transformer.h.0", "transformer.h.2"), "cpu")
    on_disk = ("transformer.wte", "transformer.h.1", "transformer.ln_f", "lm_head")
    return load_model(folder, device_map=parts | dict.fromkeys(on_disk, "disk"))


def measured(model, lens):
    """What is computed with a model, on the CPU."""
    ids = IDS.to(model.device)
    sites = {
        f"{site} {layer}": state
        for site, states in model.sites(ids).items()
        for layer, state in enumerate(states)
    }
    assert {state.device for state in sites.values()} == {model.device}
    jacobian = MeanJacobian(range(model.identity.n_layers), model.identity.d_model, skipped=1)
    jacobian.add(model, ids)
    evaluation = score_lenses(model, {"tuned": lens}, IDS)
    coefficients, vectors = model.mlp_neurons(ids, 1)
    found = sites | {
        "jacobian": jacobian.mean.float(),
        "kl": torch.tensor([e.value for e in evaluation.by_layer("tuned", "kl_nats")]),
        "trajectory": trajectory(model, lens, "naïve café").values("entropy_nats"),
        "coefficients": coefficients,
        "vectors": vectors,
    }
    return {name: value.cpu() for name, value in found.items()}


def assert_same_model(split, whole):
    assert split.identity == whole.identity
    lens, other = random_lens(split), TunedLens.from_model(whole)
    other.load_state_dict(lens.state_dict())
    torch.testing.assert_close(measured(split, lens), measured(whole, other), rtol=1e-3, atol=1e-4)


def assert_same_training(split, whole, text_file, folder, monkeypatch):
    """Runs with the two models end at the same held-out KL."""
    found = []
    for model in (split, whole):
        monkeypatch.setattr(loop, "load_configured", lambda *_, model=model: model)
        config = short_run("tiny", text_file, tokens=320, init_tokens=128, sites="resid_mid")
        evaluation = train(config, folder / str(len(found)))
        found.append([e.value for e in evaluation.by_layer("tuned resid_mid", "kl_nats")])
    assert found[0] == pytest.approx(found[1], rel=1e-2)


def test_offloaded_model_is_the_model(tiny_folder):
    split, whole = offloaded(tiny_folder), load_model(tiny_folder, device="cpu")
    assert split.blocks[1].mlp.c_fc.weight.is_meta
    assert_same_model(split, whole)
    assert not hasattr(split.unembedding.norm, "_hf_hook")
    texts = [
        random_lens(model).generate(model, "a", 1, max_new_tokens=5) for model in (split, whole)
    ]
    assert texts[0] == texts[1]


def test_device_map_of_the_config_takes_the_place_of_the_device(tiny_folder):
    model = load_configured(ModelConfig(str(tiny_folder), device_map="auto"), torch.device("meta"))
    assert model.device.type != "meta"
    assert model.identity == load_model(tiny_folder, device="cpu").identity


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_map": "auto", "device": "cpu"}, "--device-map does not work with --device;"),
        ({"device_map": "auto", "dtype": "float16"}, "does not work with --dtype float16"),
        ({"device_map": "everywhere"}, r"cannot load the model .*device_map"),
    ],
)
def test_impossible_device_map_is_refused(tiny_folder, settings, message):
    with pytest.raises(InputError, match=message):
        load_model(tiny_folder, **settings)


@pytest.mark.gpu
@needs_cuda
def test_model_offloaded_from_a_gpu_is_the_model(tiny_folder, text_file, tmp_path, monkeypatch):
    on_cpu = dict.fromkeys(("transformer.h.1", "transformer.ln_f", "lm_head"), "cpu")
    on_gpu = ("transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.2")
    split = load_model(tiny_folder, device_map=on_cpu | dict.fromkeys(on_gpu, 0))
    whole = load_model(tiny_folder, device="cuda")
    assert split.blocks[1].mlp.c_fc.weight.is_meta
    assert_same_model(split, whole)
    assert_same_training(split, whole, text_file, tmp_path, monkeypatch)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("head", ["cpu", 0])
def test_model_on_two_devices_is_the_model(head, tokenizer, text_file, tmp_path, monkeypatch):
    # With the CPU as the main device, its modules run there instead of being offloaded.
    devices = {"transformer.wte": head, "transformer.wpe": "cpu", "lm_head": head}
    devices |= {"transformer.h.0": "cpu", "transformer.h.1": 0, "transformer.h.2": "cpu"}
    devices |= {"transformer.ln_f": 0}
    dispatched = dispatch_model(make_gpt2(), devices, main_device="cpu")
    split = FrozenModel(dispatched, tokenizer, name="tiny")
    assert split.device.type == ("cpu" if head == "cpu" else "cuda")
    states = split.residual_stream(IDS, differentiable=True)
    assert {state.device.type for state in states} == {"cpu", "cuda"}
    whole = FrozenModel(make_gpt2(), tokenizer, name="tiny")
    assert_same_model(split, whole)
    assert_same_training(split, whole, text_file, tmp_path, monkeypatch)
