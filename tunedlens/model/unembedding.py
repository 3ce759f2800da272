"""The final norm and the unembedding of a model."""

import copy
import hashlib
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, remove_hook_from_module
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn

from tunedlens.model.quantised import read_linear
from tunedlens.model.structure import ModelParts


class Unembedding(nn.Module):
    """Final norm and unembedding matrix, in float32: final residual to raw logits.

    A constant that the model multiplies its logits by is part of the weight and the bias here.
    All its tensors are non-persistent buffers, so the only parameters of a lens that holds one
    are its translators. It shares the memory of a float32 model.

    Args:
        norm: the module before the unembedding, usually a norm.
        cap: the logits are `cap * tanh(logits / cap)`, as in Gemma 2.
    """

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None

    def __init__(
        self, norm: nn.Module, weight: Tensor, bias: Tensor | None, cap: float | None = None
    ) -> None:
        super().__init__()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.norm = _copied(norm).to(weight.device, dtype)
        self.cap = cap
        for module in self.norm.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)
        self.register_buffer("weight", weight.detach().to(dtype), persistent=False)
        bias = None if bias is None else bias.detach().to(dtype)
        self.register_buffer("bias", bias, persistent=False)

    def forward(
        self, hidden: Float[Tensor, "*positions d_model"]
    ) -> Float[Tensor, "*positions vocab"]:
        """Raw logits, in float32 (float64 if the unembedding is in float64)."""
        normed = self.norm(hidden.to(self.weight.dtype))
        return self.capped(F.linear(normed, self.weight, self.bias))

    def capped(
        self, logits: Float[Tensor, "*positions vocab"]
    ) -> Float[Tensor, "*positions vocab"]:
        """Apply the model's cap, if it has one."""
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def shared(self) -> "Unembedding":
        """Another module that shares memory; moving or converting it does not change this one."""
        return Unembedding(self.norm, self.weight, self.bias, self.cap)

    def centred(self) -> "Unembedding":
        """The unembedding minus its mean row, which has the same softmax.

        With a cap, the softmax would change, so such an unembedding is returned without change.

        GPT-2's raw logits sit around -30 to -100, where half precision has steps of a
        tenth and more. Centred logits sit around 0.
        """
        if self.cap is not None:
            return self.shared()
        bias = None if self.bias is None else self.bias - self.bias.mean()
        return Unembedding(self.norm, self.weight - self.weight.mean(0), bias)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every value of the norm and the unembedding, rounded to bfloat16.

        The rounding makes it the same for a model in float32 and in bfloat16. A model in
        float16 has been rounded differently, so `load_model` computes the fingerprint before
        it converts to float16.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.named_buffers()):
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(
                value.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes()
            )
        if self.cap is not None:
            digest.update(f"cap {self.cap:g}".encode())
        return digest.hexdigest()


def read_unembedding(parts: ModelParts) -> Unembedding:
    """Final norm and unembedding of a model, with its scale and cap.

    Raises:
        InputError: the head is quantised in a way that cannot be undone.
    """
    with align_module_device(parts.head):
        weight, bias = read_linear(parts.head)
    if parts.logit_scale != 1:
        weight = weight.float() * parts.logit_scale
        bias = None if bias is None else bias.float() * parts.logit_scale
    return Unembedding(parts.final_norm, weight, bias, parts.logit_cap)


def _copied(norm: nn.Module) -> nn.Module:
    """A copy that holds its values in memory and has no hooks of accelerate."""
    without: dict[int, object] = {}
    with ExitStack() as loaded:
        for module in norm.modules():
            loaded.enter_context(align_module_device(module))
            if hasattr(module, "_hf_hook"):
                without[id(module._hf_hook)] = ModelHook()  # the hook may hold all weights
        copied = copy.deepcopy(norm, without)
    return remove_hook_from_module(copied, recurse=True)
