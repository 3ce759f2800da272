"""The final norm and the unembedding of a model."""

import copy
import hashlib

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Unembedding(nn.Module):
    """Final norm and unembedding matrix, in float32: final residual to raw logits.

    All its tensors are non-persistent buffers, so the only parameters of a lens that holds one
    are its translators. It shares the memory of a float32 model.
    """

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None

    def __init__(self, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.norm = copy.deepcopy(norm).to(dtype)
        for name, parameter in list(self.norm.named_parameters(recurse=False)):
            delattr(self.norm, name)
            self.norm.register_buffer(name, parameter.detach(), persistent=False)
        self.register_buffer("weight", weight.detach().to(dtype), persistent=False)
        bias = None if bias is None else bias.detach().to(dtype)
        self.register_buffer("bias", bias, persistent=False)

    def forward(
        self, hidden: Float[Tensor, "*positions d_model"]
    ) -> Float[Tensor, "*positions vocab"]:
        """Raw logits, in float32 (float64 if the unembedding is in float64)."""
        return F.linear(self.norm(hidden.to(self.weight.dtype)), self.weight, self.bias)

    def shared(self) -> "Unembedding":
        """Another module on the same memory: moving or converting it leaves this one alone."""
        return Unembedding(self.norm, self.weight, self.bias)

    def centred(self) -> "Unembedding":
        """The unembedding less its mean row, which leaves the softmax unchanged.

        GPT-2's raw logits sit around -30 to -100, where half precision has steps of a
        tenth and more. Centred logits sit around 0.
        """
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
        return digest.hexdigest()
