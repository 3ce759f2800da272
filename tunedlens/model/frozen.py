"""A frozen causal language model: its residual stream and its unembedding."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunedlens.errors import InputError
from tunedlens.model.identity import ModelIdentity
from tunedlens.model.mlp import neuron_activations
from tunedlens.model.self_check import require_same_logits
from tunedlens.model.sites import (
    SITES,
    Args,
    BlockSites,
    Kwargs,
    input_state,
    replace_input_state,
)
from tunedlens.model.structure import find_attention_and_mlp, find_blocks_and_final_norm
from tunedlens.model.unembedding import Unembedding


class FrozenModel(nn.Module):
    """A causal language model that is never trained.

    Args:
        model: a `transformers` model with a language-modelling head.
        name: what files and messages call the model.
        fingerprint: the fingerprint if it is known already; otherwise it is computed.

    Raises:
        InputError: the blocks or the final norm cannot be found, or decoding the last
            state of the residual stream does not give the model's own logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name or model.name_or_path or type(model).__name__
        self.blocks, self.final_norm = find_blocks_and_final_norm(model)
        head = model.get_output_embeddings()
        if len(tokenizer) > head.weight.shape[0]:
            raise InputError(
                f"{self.name} has a vocabulary of {head.weight.shape[0]:,}, but its tokenizer has "
                f"{len(tokenizer):,} tokens; expected the tokenizer that it was trained with"
            )
        self.unembedding = Unembedding(self.final_norm, head.weight, getattr(head, "bias", None))
        self._fingerprint = fingerprint
        self._check_unembedding()

    @cached_property
    def identity(self) -> ModelIdentity:
        vocab_size, d_model = self.unembedding.weight.shape
        return ModelIdentity(
            name=self.name,
            revision=getattr(self.model.config, "_commit_hash", None),
            n_layers=len(self.blocks),
            d_model=d_model,
            vocab_size=vocab_size,
            fingerprint=self._fingerprint or self.unembedding.fingerprint,
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context(self) -> int | None:
        """The longest sequence that the model reads, in tokens."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def encode(self, text: str, *, is_any_length: bool = False) -> Int[Tensor, "1 seq"]:
        """Token ids of one text, on the model's device, without special tokens.

        Args:
            is_any_length: whether the text may be longer than the context.

        Raises:
            InputError: the text is empty, or longer than the context if that is not allowed.
        """
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise InputError("the text has no tokens; give at least one character")
        if self.context is not None and len(ids) > self.context and not is_any_length:
            raise InputError(
                f"the text has {len(ids)} tokens, but {self.name} reads at most "
                f"{self.context}; shorten it"
            )
        return torch.tensor([ids], device=self.device)

    def residual_stream(
        self,
        input_ids: Int[Tensor, "batch seq"] | str,
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        *,
        differentiable: bool = False,
    ) -> list[Float[Tensor, "batch seq d_model"]]:
        """The n + 1 states: the input of each block, then the input of the final norm.

        The indices are those of `hidden_states` in transformers, whose last entry, however,
        is the output of the final norm. The model's logits are not computed.

        Args:
            input_ids: token ids, or one text.
            attention_mask: 0 where there is padding.
            differentiable: whether autograd can differentiate later states in earlier ones.
        """
        if isinstance(input_ids, str):
            input_ids = self.encode(input_ids)
        states: list[Tensor] = []

        def capture(_module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
            hidden = input_state(args, kwargs)
            if differentiable and not states:
                hidden = hidden.detach().requires_grad_()
                args, kwargs = replace_input_state(args, kwargs, hidden)
            states.append(hidden)
            return args, kwargs

        with ExitStack() as hooks, torch.set_grad_enabled(differentiable):
            for module in (*self.blocks, self.final_norm):
                hooks.enter_context(module.register_forward_pre_hook(capture, with_kwargs=True))
            self.model.base_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            )
        return states

    def sites(
        self,
        input_ids: Int[Tensor, "batch seq"] | str,
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        wanted: Collection[str] = SITES,
    ) -> dict[str, list[Float[Tensor, "batch seq d_model"]]]:
        """The residual stream and its terms in every block, by the names in `SITES`.

        `resid_pre` has one more entry, the input of the final norm.

        Args:
            input_ids: token ids, or one text.
            attention_mask: 0 where there is padding.
            wanted: the names from `SITES` to keep.

        Raises:
            InputError: a block is not its input plus attention plus MLP, or `resid_mid` is
                wanted and attention and MLP run side by side.
        """
        blocks = [
            BlockSites(block, f"block {layer} of {self.name}", wanted)
            for layer, block in enumerate(self.blocks)
        ]
        with ExitStack() as hooks:
            for block in blocks:
                block.register(hooks)
            states = self.residual_stream(input_ids, attention_mask)
        captured = {site: [block.captured[site] for block in blocks] for site in wanted}
        if "resid_pre" in captured:
            captured["resid_pre"].append(states[-1])
        return captured

    @torch.no_grad()
    def mlp_neurons(
        self, input_ids: Int[Tensor, "batch seq"], layer: int
    ) -> tuple[Float[Tensor, "batch seq d_mlp"], Float[Tensor, "d_mlp d_model"]]:
        """Coefficients and output vectors of the neurons of a block's MLP.

        The MLP adds the sum of their products, and its bias, to the residual stream. In a
        gated MLP a coefficient is the product of gate and value.

        Raises:
            InputError: the MLP is not such a sum.
        """
        _, mlp = find_attention_and_mlp(self.blocks[layer])
        found = neuron_activations(
            mlp,
            self.identity.d_model,
            lambda: self.model.base_model(input_ids=input_ids, use_cache=False),
        )
        if found is None:
            raise InputError(
                f"the MLP of block {layer} of {self.name} is not a sum of output vectors of "
                "neurons; neurons are not supported for this architecture"
            )
        return found

    @contextmanager
    def decoded_by(
        self,
        decode: Callable[[Float[Tensor, "batch seq d_model"]], Float[Tensor, "batch seq vocab"]],
        layer: int,
    ) -> Iterator[PreTrainedModel]:
        """The model, with the logits decoded from an earlier state in place of its own.

        It serves what transformers does with logits, such as `generate`, with its cache.

        Args:
            decode: maps states to logits.
            layer: the layer of the states, from 0 to n.
        """
        state: list[Tensor] = []

        def capture(_module: nn.Module, args: Args, kwargs: Kwargs) -> None:
            state[:] = [input_state(args, kwargs)]

        def replace(_module: nn.Module, _args: Args, logits: Tensor) -> Tensor:
            # The head may be asked for the last few positions only.
            return decode(state[0][:, -logits.shape[1] :])

        module = [*self.blocks, self.final_norm][layer]
        with (
            module.register_forward_pre_hook(capture, with_kwargs=True),
            self.model.get_output_embeddings().register_forward_hook(replace),
        ):
            yield self.model

    @torch.no_grad()
    def _check_unembedding(self) -> None:
        """Check that the unembedding gives the model's own logits, on random tokens."""
        generator = torch.Generator().manual_seed(0)
        length = min(16, self.context or 16)
        input_ids = torch.randint(
            self.unembedding.weight.shape[0], (2, length), generator=generator
        )
        input_ids = input_ids.to(self.device)
        states = self.residual_stream(input_ids)
        if len(states) != len(self.blocks) + 1:
            raise InputError(
                f"{self.name}: expected {len(self.blocks) + 1} states of the residual stream, "
                f"captured {len(states)}; this architecture is not supported"
            )
        require_same_logits(
            self.unembedding,
            states[-1],
            self.model(input_ids, use_cache=False).logits,
            name=self.name,
            dtype=self.model.dtype,
            cap=getattr(self.model.config, "final_logit_softcapping", None),
        )
