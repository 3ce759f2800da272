import pytest
import torch
from torch import nn

from tunedlens.engine import backend
from tunedlens.engine.backend import Backend, fastest_backend
from tunedlens.model import Unembedding


@pytest.fixture
def unembedding():
    return Unembedding(nn.LayerNorm(8), torch.randn(100, 8), torch.randn(100))


def times(monkeypatch, **seconds):
    monkeypatch.setattr(
        backend,
        "_seconds",
        lambda candidates, *_: [seconds["_".join(one)] / 1000 for one in candidates],
    )


def test_the_fastest_candidate_is_chosen(unembedding, monkeypatch):
    times(monkeypatch, fp32_products=9, fp32_attention=5, bf16_products=2, bf16_attention=6)
    assert fastest_backend(unembedding) == Backend("bf16", "products")
    assert fastest_backend(unembedding, precision="fp32") == Backend("fp32", "attention")
    assert fastest_backend(unembedding, kernel="attention") == Backend("fp32", "attention")


def test_what_is_hardly_faster_is_not_worth_a_change(unembedding, monkeypatch):
    times(monkeypatch, fp32_products=9, fp32_attention=8.5, bf16_products=8, bf16_attention=8)
    assert fastest_backend(unembedding) == Backend("fp32", "products")


def test_what_is_given_is_not_measured(unembedding, monkeypatch):
    monkeypatch.setattr(backend, "_seconds", lambda *_: 1 / 0)
    assert fastest_backend(unembedding, "bf16", "products") == Backend("bf16", "products")


def test_every_candidate_runs_on_this_machine(unembedding):
    assert fastest_backend(unembedding) in [
        Backend(precision, kernel)
        for precision in ("fp32", "bf16")
        for kernel in ("products", "attention")
    ]
