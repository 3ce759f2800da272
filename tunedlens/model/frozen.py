"""A frozen causal language model: its residual stream and its unembedding."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from tunedlens.devices import float32_products
from tunedlens.errors import InputError
from tunedlens.model.fsdp import is_sharded, whole_parts
from tunedlens.model.identity import ModelIdentity
from tunedlens.model.mlp import neuron_activations
from tunedlens.model.self_check import (
    check_ids,
    far_factor,
    require_causal_states,
    require_same_logits,
)
from tunedlens.model.sites import SITES, Args, BlockSites, HookPoint
from tunedlens.model.state_hooks import on_state
from tunedlens.model.structure import find_attention_and_mlp, find_parts
from tunedlens.model.unembedding import read_unembedding
from tunedlens.tokenizer import beginning_of_sequence, required_bos


class FrozenModel(nn.Module):
    """A causal language model whose weights are frozen.

    Args:
        model: a `transformers` model with a language-modelling head.
        name: the name of the model in files and messages.
        fingerprint: the fingerprint, if it is known; otherwise it is computed.
        blocks: the path of the list of blocks in the model, such as `model.layers`, if it is not
            found automatically.
        final_norm: the path of the final norm in the model, if it is not found automatically;
            `none` for a model without a final norm.
        check: whether to check that decoding the last state gives the model's own logits.

    Raises:
        InputError: the blocks or the final norm cannot be found, the model is not causal, or
            decoding the last state of the residual stream does not give the model's own logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        fingerprint: str | None = None,
        *,
        blocks: str | None = None,
        final_norm: str | None = None,
        check: bool = True,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name or model.name_or_path or type(model).__name__
        self.parts = find_parts(model, blocks, final_norm)
        self.blocks, self.final_norm = self.parts.blocks, self.parts.final_norm
        self.is_sharded = is_sharded(model)
        """Whether the weights are divided among processes. Then all run the model equally often."""
        parts = self.parts
        if self.is_sharded:
            parts = whole_parts(model, parts, blocks, final_norm)
        self.unembedding = read_unembedding(parts)
        vocab_size = len(self.unembedding.weight)
        if len(tokenizer) > vocab_size:
            raise InputError(
                f"{self.name} has a vocabulary of {vocab_size:,}, but its tokenizer has "
                f"{len(tokenizer):,} tokens; expected the tokenizer that it was trained with"
            )
        self.bos_id = beginning_of_sequence(tokenizer)
        """The token at the start of every text; None if there is none. See `set_bos`."""
        self._fingerprint = fingerprint
        if check:
            self.check_parts()

    _repr_html_: ClassVar[Callable[..., str]]
    """See `tunedlens.report.notebook`."""

    def __repr__(self) -> str:
        return (
            f"FrozenModel({self.name}, {type(self.model).__name__}, {self.identity.n_layers} "
            f"layers of width {self.identity.d_model}, {self.device})"
        )

    @cached_property
    def identity(self) -> ModelIdentity:
        return ModelIdentity(
            name=self.name,
            revision=getattr(self.model.config, "_commit_hash", None),
            n_layers=len(self.blocks),
            d_model=self.model.config.get_text_config().hidden_size,
            vocab_size=len(self.unembedding.weight),
            fingerprint=self._fingerprint or self.unembedding.fingerprint,
        )

    def set_bos(self, has_bos: bool) -> None:
        """Set whether every text begins with the tokenizer's BOS token.

        Raises:
            InputError: the tokenizer has no BOS token.
        """
        self.bos_id = required_bos(self.tokenizer) if has_bos else None

    @property
    def device(self) -> torch.device:
        """The device of the unembedding. States of a model on several devices are moved there."""
        return self.unembedding.weight.device

    def _run(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Run the model up to its last state, without its logits."""
        # accelerate moves what goes through the whole model, which the base model is not.
        hook = getattr(self.model, "_hf_hook", None)
        first = self.device if hook is None else hook.execution_device
        mask = None if attention_mask is None else attention_mask.to(first)
        ids = input_ids.to(first)
        if not self.is_sharded:
            self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            return
        # Weights are gathered by hooks of the whole model. Its head reads one position only.
        with self.parts.head.register_forward_pre_hook(lambda _head, args: (args[0][:, -1:],)):
            self.model(input_ids=ids, attention_mask=mask, use_cache=False)

    @torch.no_grad()
    def lend_weights(self) -> None:
        """Take part in a forward pass of the other processes, if the weights are divided.

        Each process has a part of every weight, so one that has no tokens left runs the model too.
        """
        if self.is_sharded:
            self._run(torch.zeros(1, 1, dtype=torch.long))

    @property
    def context(self) -> int | None:
        """The longest sequence that the model reads, in tokens."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def encode(self, text: str, *, is_any_length: bool = False) -> Int[Tensor, "1 seq"]:
        """Token ids of one text, on the model's device, after a BOS token if the model uses one.

        If the text already begins with the BOS token, as with chat templates, no second one is
        added.

        Args:
            is_any_length: whether the text may be longer than the context.

        Raises:
            InputError: the text is empty, or longer than the context if that is not allowed.
        """
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise InputError("the text has no tokens; give at least one character")
        if self.bos_id is not None and ids[0] != self.bos_id:
            ids = [self.bos_id, *ids]
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

        The indices are those of `hidden_states` in transformers, except that the last entry of
        `hidden_states` is the output of the final norm. The model's logits are not computed.

        Args:
            input_ids: token ids, or one text.
            attention_mask: 0 at padding tokens, 1 elsewhere.
            differentiable: whether later states can be differentiated with respect to earlier
                ones by autograd. Each state then stays on the device that computes it.

        Raises:
            InputError: the states cannot be differentiated, because the weights are divided among
                processes.
        """
        if differentiable and self.is_sharded:
            raise InputError(
                f"the weights of {self.name} are divided among processes, so it cannot be "
                "differentiated; load it without --fsdp"
            )
        if isinstance(input_ids, str):
            input_ids = self.encode(input_ids)
        states: list[Tensor] = []

        def capture(hidden: Tensor) -> Tensor | None:
            if not differentiable:
                states.append(hidden.to(self.device))
                return None
            is_first = not states
            states.append(hidden.detach().requires_grad_() if is_first else hidden)
            return states[0] if is_first else None

        with ExitStack() as hooks, torch.set_grad_enabled(differentiable):
            for layer in range(len(self.blocks) + 1):
                hooks.enter_context(on_state(self.parts, layer, capture))
            self._run(input_ids, attention_mask)
        return states

    def states_at(
        self,
        points: Sequence[HookPoint],
        input_ids: Int[Tensor, "batch seq"] | str,
        attention_mask: Int[Tensor, "batch seq"] | None = None,
    ) -> list[Float[Tensor, "batch seq d_model"]]:
        """The states at any points of the model, in one forward pass.

        Args:
            points: sites and layers. The layer of `resid_pre` may be n, the last state.
            input_ids: token ids, or one text.
            attention_mask: 0 at padding tokens, 1 elsewhere.

        Raises:
            InputError: a block has no such site; see `sites`.
        """
        wanted = {point.site for point in points}
        if wanted <= {"resid_pre", "resid_post"}:
            stream = self.residual_stream(input_ids, attention_mask)
            found = {"resid_pre": stream, "resid_post": stream[1:]}
        else:
            found = self.sites(input_ids, attention_mask, wanted)
        return [found[point.site][point.layer] for point in points]

    def sites(
        self,
        input_ids: Int[Tensor, "batch seq"] | str,
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        wanted: Collection[str] = SITES,
    ) -> dict[str, list[Float[Tensor, "batch seq d_model"]]]:
        """The states at every site of every block, by the names in `SITES`.

        `resid_pre` has one more entry, the input of the final norm.

        Args:
            input_ids: token ids, or one text.
            attention_mask: 0 at padding tokens, 1 elsewhere.
            wanted: the names from `SITES` to return.

        Raises:
            InputError: there is no such site, a block is not its input plus attention plus MLP,
                or `resid_mid` is wanted and attention and MLP run side by side.
        """
        if unknown := [site for site in wanted if site not in SITES]:
            raise InputError(f"sites must be some of {', '.join(SITES)}; got {', '.join(unknown)}")
        blocks = [
            BlockSites(block, f"block {layer} of {self.name}", wanted)
            for layer, block in enumerate(self.blocks)
        ]
        with ExitStack() as hooks:
            for block in blocks:
                block.register(hooks)
            states = self.residual_stream(input_ids, attention_mask)
        captured = {
            site: [block.captured[site].to(self.device) for block in blocks] for site in wanted
        }
        if "resid_pre" in captured:
            captured["resid_pre"].append(states[-1])
        return captured

    @torch.no_grad()
    def mlp_neurons(
        self, input_ids: Int[Tensor, "batch seq"], layer: int
    ) -> tuple[Float[Tensor, "batch seq d_mlp"], Float[Tensor, "d_mlp d_model"]]:
        """Coefficients and output vectors of the neurons of a block's MLP.

        The MLP adds the sum of coefficient times output vector over the neurons, and its bias, to
        the residual stream. In a gated MLP, a coefficient is the product of gate and value.

        Raises:
            InputError: the MLP is not such a sum.
        """
        _, mlp = find_attention_and_mlp(self.blocks[layer])
        found = neuron_activations(mlp, self.identity.d_model, lambda: self._run(input_ids))
        if found is None:
            raise InputError(
                f"the MLP of block {layer} of {self.name} is not a sum of output vectors of "
                "neurons; neurons are not supported for this architecture"
            )
        return found

    @contextmanager
    def decoded_by(
        self,
        decode: Callable[..., Float[Tensor, "batch seq vocab"]],
        layers: Sequence[int],
    ) -> Iterator[PreTrainedModel]:
        """The model with its logits replaced by logits decoded from earlier states.

        It works with methods of transformers that use logits and the cache, such as `generate`.

        Args:
            decode: maps the states of the layers, one argument each, to logits.
            layers: from 0 to n.
        """
        states: dict[int, Tensor] = {}

        def capture(layer: int, hidden: Tensor) -> None:
            states[layer] = hidden.to(self.device)

        def replace(_model: nn.Module, _args: Args, output: CausalLMOutputWithPast) -> None:
            assert output.logits is not None
            count = output.logits.shape[1]  # the model may be asked for the last few only
            output.logits = decode(*(states[layer][:, -count:] for layer in layers))

        with ExitStack() as hooks, self.model.register_forward_hook(replace):
            for layer in layers:
                hooks.enter_context(on_state(self.parts, layer, partial(capture, layer)))
            yield self.model

    @float32_products()
    @torch.no_grad()
    def check_parts(self) -> None:
        """Check that decoding the last state gives the model's logits, also for a larger state.

        Raises:
            InputError: they do not; the message says what differs.
        """
        ids = check_ids(len(self.unembedding.weight), self.context).to(self.device)
        states = self.residual_stream(ids)
        require_causal_states(states, len(self.blocks), self.name)
        logits = self.model(ids, use_cache=False).logits
        require_same_logits(self.unembedding, states[-1], logits, name=self.name)
        factor = far_factor(self.unembedding, states[-1])
        with self.parts.head.register_forward_pre_hook(lambda _head, args: (args[0] * factor,)):
            logits = self.model(ids, use_cache=False).logits
        require_same_logits(self.unembedding, states[-1], logits, name=self.name, factor=factor)
