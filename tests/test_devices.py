"""What can be held of accelerators without one."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_gpt2
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunedlens import FrozenModel, TunedLens
from tunedlens.corpus import ResolvedCorpus
from tunedlens.devices import float32_products
from tunedlens.engine.capped import make_objective
from tunedlens.training import loop
from tunedlens.training.plan import TrainPlan
from tunedlens.training.run import Progress, TrainState, make_optimizer
from tunedlens.training.sharding import LayerShards
from tunedlens.training.states import StateReader

PLAN = TrainPlan(
    corpus=ResolvedCorpus(dataset="text", seq_len=16, bos=False),
    max_tokens=10**6,
    init_tokens=64,
    batch_size=4,
    precision="fp32",
    kernel="products",
    vocab_sample=0,
    lr=0.035,
    momentum=0.8,
    weight_decay=0.0,
    validation_tokens=16,
)


class Devices(TorchDispatchMode):
    """Records operations whose tensors are not all on the meta device."""

    def __init__(self):
        super().__init__()
        self.on_cpu, self.between = [], []

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        leaves = tree_leaves((args, kwargs, result))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        if devices == {"cpu"}:
            self.on_cpu.append(operation.name())
        elif len(devices) > 1:
            self.between.append(operation.name())
        return result


def step_on_meta(tokenizer, monkeypatch, plan, active=(True, True, True)):
    """The devices that one step touches, for a model on the meta device.

    A tensor there has no values: whatever reads one on the host, such as `.item()` or `.cpu()`,
    raises. The model's own forward pass is left out: transformers looks once whether the text is
    packed.
    """
    monkeypatch.setattr(
        FrozenModel,
        "residual_stream",
        lambda _, ids, mask=None: [torch.zeros(*ids.shape, 16, device=ids.device)] * 4,  # noqa: ARG005
    )
    monkeypatch.setattr(StateReader, "autocast", lambda _: contextlib.nullcontext())
    model = FrozenModel(
        make_gpt2(vocab_size=5003).to("meta"), tokenizer, fingerprint="none", check=False
    )
    reader = StateReader(model, plan, Accelerator(cpu=True))
    objective = make_objective(model.unembedding.centred(), dtype=reader.dtype)
    accelerator, d_model = reader.accelerator, model.identity.d_model
    run = SimpleNamespace(
        plan=plan,
        model=model,
        reader=reader,
        shards=LayerShards(reader.points, d_model, accelerator, is_divided=False),
        objective=objective,
        accelerator=accelerator,
    )
    state = TrainState(
        make_optimizer(TunedLens.from_model(model, plan.all_sites), plan), Progress()
    )
    ids = torch.zeros(plan.batch_size, plan.corpus.seq_len, dtype=torch.long)
    with Devices() as devices:
        kl = loop._accumulate(run, state, ids, list(active))
        state.optimizer.step(list(active), 0.1)
    assert kl.device.type == "meta"
    return devices


@pytest.mark.parametrize("fit", ["preconditioned", "sgd", "muon"])
def test_a_step_copies_nothing_but_its_token_ids(tokenizer, monkeypatch, fit):
    devices = step_on_meta(tokenizer, monkeypatch, dataclasses.replace(PLAN, fit=fit))
    assert devices.between == ["aten::_to_copy"]


def test_a_sampled_step_copies_the_random_numbers_too(tokenizer, monkeypatch):
    plan = dataclasses.replace(PLAN, vocab_sample=700)
    devices = step_on_meta(tokenizer, monkeypatch, plan)
    assert devices.between == ["aten::_to_copy"] * 2


def test_a_step_of_some_layers_copies_their_indices_too(tokenizer, monkeypatch):
    devices = step_on_meta(tokenizer, monkeypatch, PLAN, active=(True, False, True))
    assert devices.between == ["aten::_to_copy"] * 2


def test_float32_products_are_not_tf32_whatever_the_user_allows():
    matmul = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("high")
    try:
        with float32_products():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
