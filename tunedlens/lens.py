"""Lenses: a hidden state of any layer, translated and decoded into logits."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GenerationConfig

from tunedlens.errors import InputError
from tunedlens.frozen import FrozenModel, ModelIdentity, Unembedding


class Lens(nn.Module, ABC):
    """What a model of `n_layers` blocks believes at each of its `n_layers + 1` states.

    State `layer` is the residual stream entering block `layer`; the last one, also -1, is
    what the final norm sees. A lens works in float32, whatever the model's dtype, until it
    is itself moved to another.
    """

    def __init__(self, identity: ModelIdentity) -> None:
        super().__init__()
        self.identity = identity

    @property
    def n_layers(self) -> int:
        """Number of blocks, and of states that a lens can translate."""
        return self.identity.n_layers

    def resolve(self, layer: int) -> int:
        """The layer counted from 0; negative ones count from the end.

        Raises:
            InputError: there is no such layer.
        """
        if not -self.n_layers - 1 <= layer <= self.n_layers:
            raise InputError(
                f"layer must be between 0 and {self.n_layers} (or {-self.n_layers - 1} and -1, "
                f"from the end) for {self.identity.name}, got {layer}"
            )
        return layer % (self.n_layers + 1)

    @abstractmethod
    def forward(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int
    ) -> Float[Tensor, "*positions vocab"]:
        """Raw logits of the state of `layer`.

        Raises:
            InputError: there is no such layer, or the width is another model's.
        """


class ResidualLens(Lens):
    """Carries a state over to what the final norm reads, and lets the model decode that.

    At the last state every such lens is the model.
    """

    def __init__(self, unembedding: Unembedding, identity: ModelIdentity) -> None:
        super().__init__(identity)
        self.unembedding = unembedding.shared()

    @classmethod
    def from_model(cls, model: FrozenModel) -> Self:
        """The lens of this model as it is before any training."""
        return cls(model.unembedding, model.identity)

    @abstractmethod
    def transform_hidden(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int
    ) -> Float[Tensor, "*positions d_model"]:
        """The state of `layer` as the final norm is to read it, in the lens's dtype.

        Raises:
            InputError: there is no such layer, or the width is another model's.
        """

    def forward(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int
    ) -> Float[Tensor, "*positions vocab"]:
        return self.unembedding(self.transform_hidden(hidden, layer))

    def generate(
        self,
        model: FrozenModel,
        prompt: str | list[str],
        layer: int = -1,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | list[int] | None = None,
        seed: int = 0,
    ) -> str | list[str]:
        """Text as a layer would write it: every new token is what the lens says there.

        At the last layer it is what the model itself generates, in its own dtype.
        transformers does the rest, with its cache; of the model's own generation config only
        the ends count.

        Args:
            model: the model that the lens belongs to.
            prompt: text, or several texts that are continued together.
            layer: whose state is decoded.
            max_new_tokens: at most so many for each.
            do_sample: draw from the distribution; else the best token is taken.
            temperature: of the distribution drawn from.
            top_k: draw from so many of the best tokens; 0 is all.
            top_p: draw from the best tokens that have so much of the probability.
            eos_token_id: tokens that end a text; by default the model's own.
            seed: of the draws.

        Returns:
            What follows the prompt, without the token that ended it; of several, a list.

        Raises:
            InputError: the lens is another model's, there is no such layer, a setting has no
                meaning, or a prompt is empty or has no room for so many tokens.
        """
        from tunedlens.generation import generate, sampling

        samples = sampling(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p)
        try:
            config = GenerationConfig(
                max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, **samples
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        prompts = [prompt] if isinstance(prompt, str) else prompt
        texts = generate(self, model, prompts, layer, config, seed)
        return texts[0] if isinstance(prompt, str) else texts

    def _checked(self, hidden: Tensor) -> Tensor:
        """The hidden states in the lens's dtype.

        Raises:
            InputError: the width is another model's.
        """
        if hidden.shape[-1] != self.identity.d_model:
            raise InputError(
                f"hidden states of {self.identity.name} have {self.identity.d_model} "
                f"dimensions, got {tuple(hidden.shape)}"
            )
        return hidden.to(self.unembedding.weight.dtype)


class LogitLens(ResidualLens):
    """Decodes every state with the model's own final norm and unembedding.

    Source:
        nostalgebraist 2020, "interpreting GPT: the logit lens".
    """

    def transform_hidden(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int
    ) -> Float[Tensor, "*positions d_model"]:
        self.resolve(layer)
        return self._checked(hidden)


class Translator(nn.Module):
    """`h + A h + b`: the identity when new, so a new tuned lens is the logit lens."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model, d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(
        self, hidden: Float[Tensor, "*positions d_model"]
    ) -> Float[Tensor, "*positions d_model"]:
        return hidden + F.linear(hidden, self.weight, self.bias)


class AffineLens(ResidualLens):
    """One affine translator per layer, then the model's final norm and unembedding.

    Its parameters are those of the translators and nothing else.
    """

    def __init__(self, unembedding: Unembedding, identity: ModelIdentity) -> None:
        super().__init__(unembedding, identity)
        self.translators = nn.ModuleList(
            Translator(identity.d_model).to(unembedding.weight.device)
            for _ in range(identity.n_layers)
        )

    def transform_hidden(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int
    ) -> Float[Tensor, "*positions d_model"]:
        layer = self.resolve(layer)
        hidden = self._checked(hidden)
        return hidden if layer == self.n_layers else self.translators[layer](hidden)

    def save(self, folder: str | Path) -> None:
        """Write `lens.safetensors` and `config.json` into a folder, made if need be.

        Raises:
            InputError: the folder cannot be written.
        """
        from tunedlens.checkpoint import save_lens

        save_lens(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, model: FrozenModel) -> Self:
        """Read a lens of this kind that was saved for this model.

        Raises:
            InputError: there is no lens, it is damaged or of another kind, or it belongs to
                another model (other width, depth, vocabulary, norm or unembedding).
        """
        from tunedlens.checkpoint import fill_lens

        lens = cls.from_model(model)
        fill_lens(lens, Path(folder))
        return lens


class TunedLens(AffineLens):
    """Translators fitted to what the model says in the end.

    Source:
        Belrose et al. 2023, arXiv:2303.08112, section 3.
    """


class JacobianLens(AffineLens):
    """Translators that are the mean Jacobian of the final state in the layer's: J h.

    Source:
        Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in
        Language Models", transformer-circuits.pub/2026/workspace.
    """

    @classmethod
    def from_jacobians(
        cls, model: FrozenModel, jacobians: Float[Tensor, "layers d_model d_model"]
    ) -> Self:
        """The lens with these Jacobians, d final / d state of every layer."""
        lens = cls.from_model(model)
        identity = torch.eye(jacobians.shape[-1], device=jacobians.device)
        with torch.no_grad():
            weights = [p for p in lens.parameters() if p.ndim == 2]
            for weight, jacobian in zip(weights, jacobians, strict=True):
                weight.copy_(jacobian - identity)
        return lens


class ConstantLens(Lens):
    """The same distribution whatever the state: what a KL is to be measured against.

    Args:
        log_probs: of every token, in nats.
        identity: the model's.
    """

    log_probs: Float[Tensor, " vocab"]

    def __init__(self, log_probs: Float[Tensor, " vocab"], identity: ModelIdentity) -> None:
        super().__init__(identity)
        self.register_buffer("log_probs", log_probs.float(), persistent=False)

    def forward(
        self, hidden: Float[Tensor, "*positions d_model"], layer: int
    ) -> Float[Tensor, "*positions vocab"]:
        self.resolve(layer)
        return self.log_probs.expand(*hidden.shape[:-1], -1)
