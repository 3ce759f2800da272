"""A frozen causal language model: its residual stream and its unembedding."""

import copy
import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from tunedlens import builtin
from tunedlens.config import ModelConfig
from tunedlens.errors import InputError, first_line
from tunedlens.model.identity import ModelIdentity
from tunedlens.model.sites import SITES, BlockSites, find_attention_and_mlp


class Unembedding(nn.Module):
    """Final norm and unembedding matrix, in float32: final residual to raw logits.

    Everything in it is a buffer that no `state_dict` lists, so a lens that holds one has
    only its translators as parameters. Of a float32 model it shares the memory.
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
        """Raw logits, in float32 (float64 where the unembedding is)."""
        return F.linear(self.norm(hidden.to(self.weight.dtype)), self.weight, self.bias)

    def shared(self) -> "Unembedding":
        """Another module on the same memory: moving or converting it leaves this one alone."""
        return Unembedding(self.norm, self.weight, self.bias)

    def centred(self) -> "Unembedding":
        """The same up to one constant per position, which a softmax does not see.

        GPT-2's raw logits sit around -30 to -100, where half precision has steps of a
        tenth and more. With the mean row subtracted they sit around 0.
        """
        bias = None if self.bias is None else self.bias - self.bias.mean()
        return Unembedding(self.norm, self.weight - self.weight.mean(0), bias)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every value of the norm and the unembedding, rounded to bfloat16.

        The rounding makes it the same for a model in float32 and in bfloat16. Rounding to
        float16 first would not commute with it, which is why `load_model` fingerprints
        before it converts to float16.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.named_buffers()):
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(
                value.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()


class FrozenModel(nn.Module):
    """A causal language model that is read and never trained.

    Args:
        model: a `transformers` model with a language-modelling head.
        tokenizer: its tokenizer.
        name: what to call it in files and messages.
        fingerprint: if already known; else it is computed from the values.

    Raises:
        InputError: its blocks or its final norm cannot be found, or decoding the last
            state of its residual stream does not give its own logits.
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
        self.blocks, self.final_norm = _find_blocks_and_final_norm(model)
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
        """The longest sequence that the model has positions for, in tokens."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def encode(self, text: str, *, is_any_length: bool = False) -> Int[Tensor, "1 seq"]:
        """Token ids of one text, on the model's device, with nothing added.

        Args:
            text: the text.
            is_any_length: whether it may be longer than the context.

        Raises:
            InputError: the text is empty, or longer than the context unless it may be.
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
        """The n + 1 states: what enters each block, and last what the final norm sees.

        Indices are those of `hidden_states` in transformers, except that the last entry
        there has been through the final norm and this one has not. The model's logits are
        never computed.

        Args:
            input_ids: tokens, or one text.
            attention_mask: 0 where there is padding.
            differentiable: whether the later states can be differentiated in the earlier ones.
        """
        if isinstance(input_ids, str):
            input_ids = self.encode(input_ids)
        states: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if differentiable and not states:
                hidden = hidden.detach().requires_grad_()
                args, kwargs = (
                    ((hidden, *args[1:]), kwargs)
                    if args
                    else (args, kwargs | {"hidden_states": hidden})
                )
            states.append(hidden)
            return args, kwargs

        with ExitStack() as hooks, torch.set_grad_enabled(differentiable):
            for module in (*self.blocks, self.final_norm):
                hooks.enter_context(module.register_forward_pre_hook(keep, with_kwargs=True))
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
        """The residual stream and its terms in every block, by the names of `SITES`.

        `resid_pre` has one more: what the final norm sees.

        Args:
            input_ids: tokens, or one text.
            attention_mask: 0 where there is padding.
            wanted: the sites to keep.

        Raises:
            InputError: a block is not its input plus attention plus MLP, or nothing in it
                reads the `resid_mid` that is wanted.
        """
        watched = [
            BlockSites(block, f"block {layer} of {self.name}", wanted)
            for layer, block in enumerate(self.blocks)
        ]
        with ExitStack() as hooks:
            for block in watched:
                block.watch(hooks)
            states = self.residual_stream(input_ids, attention_mask)
        found = {site: [block.found[site] for block in watched] for site in wanted}
        if "resid_pre" in found:
            found["resid_pre"].append(states[-1])
        return found

    @torch.no_grad()
    def mlp_neurons(
        self, input_ids: Int[Tensor, "batch seq"], layer: int
    ) -> tuple[Float[Tensor, "batch seq d_mlp"], Float[Tensor, "d_mlp d_model"]]:
        """Coefficients and output vectors of the neurons of a block's MLP.

        Their products, with the bias, are what the MLP adds to the stream; in a gated MLP a
        coefficient is the product of gate and value.

        Raises:
            InputError: the MLP is not such a sum.
        """
        _, mlp = find_attention_and_mlp(self.blocks[layer])
        d_model = self.identity.d_model
        outputs = [
            module
            for module in mlp.modules()
            if isinstance(module, (nn.Linear, Conv1D)) and _width_out(module) == d_model
        ]
        kept: dict[str, Tensor] = {}

        def keep_inputs(_module: nn.Module, args: tuple[Any, ...]) -> None:
            kept["inputs"] = args[0]

        def keep_total(_module: nn.Module, _args: Any, output: Any) -> None:
            kept["total"] = output

        with ExitStack() as hooks:
            for module in outputs[-1:]:
                hooks.enter_context(module.register_forward_pre_hook(keep_inputs))
            hooks.enter_context(mlp.register_forward_hook(keep_total))
            self.model.base_model(input_ids=input_ids, use_cache=False)
        if outputs and isinstance(kept.get("total"), Tensor):
            weight, bias = outputs[-1].weight, outputs[-1].bias
            vectors = weight if isinstance(outputs[-1], Conv1D) else weight.mT
            total = kept["inputs"] @ vectors + (0 if bias is None else bias)
            tolerance = 16 * torch.finfo(total.dtype).eps * total.abs().max()
            if (total - kept["total"]).abs().max() <= tolerance:
                return kept["inputs"], vectors
        raise InputError(
            f"the MLP of block {layer} of {self.name} is no sum of output vectors of neurons; "
            "this architecture has no neurons to look at"
        )

    @contextmanager
    def decoded_by(
        self,
        decode: Callable[[Float[Tensor, "batch seq d_model"]], Float[Tensor, "batch seq vocab"]],
        layer: int,
    ) -> Iterator[PreTrainedModel]:
        """The model, with what an earlier state decodes to in place of its own logits.

        For whatever transformers makes of logits; its cache works as ever.

        Args:
            decode: from the states to logits.
            layer: of the state, from 0 to n.
        """
        kept: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[:] = [args[0] if args else kwargs["hidden_states"]]

        def replace(_module: nn.Module, _args: Any, logits: Tensor) -> Tensor:
            # The head may be asked for the last few positions only.
            return decode(kept[0][:, -logits.shape[1] :])

        place = [*self.blocks, self.final_norm][layer]
        with (
            place.register_forward_pre_hook(keep, with_kwargs=True),
            self.model.get_output_embeddings().register_forward_hook(replace),
        ):
            yield self.model

    @torch.no_grad()
    def _check_unembedding(self) -> None:
        """Decode the last state and compare it with the model's own logits."""
        generator = torch.Generator().manual_seed(0)
        length = min(16, self.context or 16)
        input_ids = torch.randint(
            self.unembedding.weight.shape[0], (2, length), generator=generator
        )
        input_ids = input_ids.to(self.device)
        expected = self.model(input_ids, use_cache=False).logits.float()
        states = self.residual_stream(input_ids)
        if len(states) != len(self.blocks) + 1:
            raise InputError(
                f"{self.name}: expected {len(self.blocks) + 1} states of the residual stream, "
                f"captured {len(states)}; this architecture is not supported"
            )
        tolerance = max(1e-4, 8 * torch.finfo(self.model.dtype).eps) * expected.abs().max()

        def agrees(logits: Tensor) -> bool:
            return bool((logits - expected).abs().max() <= tolerance)

        decoded = self.unembedding(states[-1])
        if agrees(decoded):
            return
        scale = float((decoded * expected).sum() / decoded.square().sum())
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        weight, bias = self.unembedding.weight, self.unembedding.bias
        if agrees(F.linear(states[-1].float(), weight, bias)):
            reason = "the model applies no norm before its unembedding"
        elif agrees(self.unembedding(self.unembedding.norm(states[-1].float()))):
            reason = "the model applies its final norm twice"
        elif agrees(scale * decoded):
            reason = f"the model multiplies its logits by {scale:.4g}"
        elif cap and agrees(cap * torch.tanh(decoded / cap)):
            reason = f"the model caps its logits at {cap}"
        else:
            reason = f"the logits differ by up to {float((decoded - expected).abs().max()):.3g}"
        raise InputError(
            f"{self.name}: final norm and unembedding do not give the model's own logits "
            f"({reason}); a lens on it would be wrong, so this architecture is not supported"
        )


def load_model(
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
) -> FrozenModel:
    """Load a causal language model to look into.

    Args:
        model: hub name or folder; without it (or as `embedded`), the GPT-2 that ships with
            this package.
        revision: branch, tag or commit on the hub.
        dtype: of the weights, whatever the file holds: float32, bfloat16 or float16.
        device: without it, the best one found.

    Raises:
        InputError: there is no such model, it is damaged or not supported, the hub cannot
            be reached, or there is no such device.
    """
    name = builtin.NAME if model is None else str(model)
    source = _model_source(name)
    try:
        target = _best_device() if device is None else torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"cannot use the device {device}: {first_line(error)}") from error
    # Only float32 and bfloat16 keep the fingerprint, so float16 is reached by way of float32.
    load_dtype = torch.float32 if dtype == "float16" else getattr(torch, dtype)
    try:
        result: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=load_dtype, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
        loaded, info = result
        if info["missing_keys"]:
            raise ValueError(
                f"the weights {', '.join(sorted(info['missing_keys'])[:3])} are missing"
            )
    except Exception as error:  # transformers raises whatever its many loaders meet
        raise InputError(f"cannot load the model {name}: {first_line(error)}") from error
    fingerprint = None
    if dtype == "float16":
        fingerprint = FrozenModel(loaded, tokenizer).identity.fingerprint
        loaded = loaded.half()
    return FrozenModel(loaded.to(target), tokenizer, name, fingerprint)


def load_configured(config: ModelConfig, device: torch.device | None) -> FrozenModel:
    """`load_model` as a config says, on `device` (or the best one) unless it says otherwise."""
    return load_model(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device or device,
    )


def _model_source(name: str) -> str:
    """What transformers is to load: a folder that looks like a model, or a hub's name.

    Raises:
        InputError: it is a path with no model at its end.
    """
    if name == builtin.NAME:
        return str(builtin.FOLDER)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            if (path / "config.json").is_file():
                return str(path)
            raise InputError(
                f"{name} is no model: expected a Hugging Face folder with config.json, "
                "model.safetensors and tokenizer files"
            )
        if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError(f"{name}: expected a folder with a model or a name on the hub")
    except (OSError, RuntimeError) as error:
        raise InputError(f"{name}: cannot look for a model: {first_line(error)}") from error
    return name


def _best_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def _find_blocks_and_final_norm(model: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module]:
    """By structure: the list of n blocks, and beside it the last module that is a norm."""
    n_layers = getattr(model.config, "num_hidden_layers", None)
    for parent in model.base_model.modules():
        for blocks in parent.children():
            if isinstance(blocks, nn.ModuleList) and len(blocks) == n_layers:
                norms = [m for m in parent.children() if _is_norm(m, model.config.hidden_size)]
                if norms and model.get_output_embeddings() is not None:
                    return blocks, norms[-1]
    raise InputError(
        f"{type(model).__name__}: found no list of {n_layers} blocks with a final norm beside "
        "it and an unembedding; this architecture is not supported"
    )


def _width_out(module: nn.Linear | Conv1D) -> int:
    return int(module.weight.shape[1 if isinstance(module, Conv1D) else 0])


def _is_norm(module: nn.Module, d_model: int) -> bool:
    shapes = {tuple(parameter.shape) for parameter in module.parameters()}
    return shapes == {(d_model,)}
