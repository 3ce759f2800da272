"""Generates text from the predictions of one layer, or with early exits."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from tunedlens.early_exit import SIGNALS, ExitRule, first_exit, signal_of
from tunedlens.engine import ModelDistribution, measure
from tunedlens.errors import InputError
from tunedlens.lenses import ResidualLens, require_made_for
from tunedlens.model import FrozenModel
from tunedlens.sampling import only_settings


class ExitedText(NamedTuple):
    """A text that was generated with early exits."""

    text: str
    layers: list[int]
    """The layer from which each token was predicted; n is the model itself."""
    n_layers: int

    @property
    def layers_saved(self) -> float:
        """The mean number of blocks after the exit; 0 if the text is empty."""
        return sum(self.n_layers - layer for layer in self.layers) / max(1, len(self.layers))


def generate(
    lens: ResidualLens,
    model: FrozenModel,
    prompt: str | list[str],
    layer: int = -1,
    *,
    early_exit: ExitRule | None = None,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | list[int] | None = None,
    seed: int = 0,
) -> str | list[str] | ExitedText | list[ExitedText]:
    """Continue a text with tokens from the lens's distribution at one layer.

    At the last layer, the model itself generates, in its own dtype. The model's generation config
    is used only for the tokens that end a text.

    Args:
        prompt: a text, or several texts that are continued together.
        layer: the layer that the lens reads; by default the last.
        early_exit: a rule that chooses the layer for each token, instead of `layer`. All layers
            still run, because later tokens attend to their states.
        do_sample: whether to sample; otherwise the most probable token is taken.
        temperature: divides the logits before sampling.
        top_k: sample from this number of most probable tokens; 0 means all.
        top_p: sample from the most probable tokens that together have this probability.
        eos_token_id: tokens that end a text; by default the model's own.
        seed: the seed for sampling.

    Returns:
        The text after the prompt, without the token that ended it. With `early_exit`, an
        `ExitedText`. For several prompts, a list.

    Raises:
        InputError: the lens was made for another model, there is no such layer, a setting is out
            of range, a prompt is empty or leaves no room in the context, or both a layer and
            `early_exit` are given.
    """
    require_made_for(model, {type(lens).__name__: lens})
    if early_exit is not None and layer != -1:
        raise InputError(f"give either a layer or early_exit; got layer {layer} and {early_exit}")
    layer = lens.resolve(layer)
    exits = None if early_exit is None else _Exits(lens, early_exit)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    samples = _sampling(do_sample, temperature, top_k, top_p)
    config = _config(max_new_tokens, _ends(model, eos_token_id), samples)
    written = _continue(lens, model, prompts, exits or layer, config, seed)
    texts = [str(model.tokenizer.decode(line)) for line in written]
    if exits is None:
        return texts[0] if isinstance(prompt, str) else texts
    exited = [
        ExitedText(text, layers[: len(line)], lens.n_layers)
        for text, line, layers in zip(texts, written, exits.by_text(), strict=True)
    ]
    return exited[0] if isinstance(prompt, str) else exited


def _continue(
    lens: ResidualLens,
    model: FrozenModel,
    prompts: Sequence[str],
    source: "int | _Exits",
    config: GenerationConfig,
    seed: int,
) -> list[list[int]]:
    """The tokens after the prompts, without those that end them; see `generate`."""
    if not prompts:
        raise InputError("the list of prompts is empty; give at least one prompt")
    ids = [model.encode(prompt)[0] for prompt in prompts]
    longest = max(map(len, ids))
    if model.context is not None and longest + config.max_new_tokens > model.context:
        raise InputError(
            f"a prompt of {longest} tokens and {config.max_new_tokens} new ones are more than the "
            f"{model.context} that {model.name} reads; shorten it or lower max_new_tokens"
        )
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad(ids, batch_first=True, padding_side="left")
    mask = pad([torch.ones_like(i) for i in ids], batch_first=True, padding_side="left")
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _writer(lens, model, source, config) as writer:
        torch.manual_seed(seed)
        written = writer.generate(input_ids, attention_mask=mask)  # type: ignore[operator]
    ends = config.eos_token_id or []
    return [
        list(itertools.takewhile(lambda token: token not in ends, line))
        for line in written[:, longest:].tolist()
    ]


class _Exits:
    """Decodes each token at the first layer that a rule accepts, and remembers the layers."""

    def __init__(self, lens: ResidualLens, rule: ExitRule) -> None:
        self._lens, self._rule = lens, rule
        later = range(rule.first_layer, lens.n_layers)
        read = [layer for layer in later if lens.reads("resid_pre", layer)]
        if not read:
            raise InputError(
                f"the lens reads no layer from {rule.first_layer} to {lens.n_layers - 1}; give an "
                "earlier first_layer"
            )
        self.layers = [*read, lens.n_layers]
        self._steps: list[list[int]] = []

    def __call__(
        self, *states: Float[Tensor, "texts positions d_model"]
    ) -> Float[Tensor, "texts positions vocab"]:
        """The logits at the last position, repeated for other positions if there are any."""
        logits = torch.stack([
            self._lens(state[:, -1], layer)
            for state, layer in zip(states, self.layers, strict=True)
        ])  # fmt: skip
        model, signal = ModelDistribution.from_logits(logits[-1]), self._rule.signal
        statistic = torch.cat([
            measure([SIGNALS[signal]], one.clone(), model, model.top1_ids) for one in logits[:-1]
        ])  # fmt: skip
        exits = first_exit(self._rule, signal_of(signal, statistic))
        self._steps.append([self.layers[index] for index in exits.tolist()])
        chosen = logits[exits, torch.arange(len(exits), device=exits.device)]
        return chosen[:, None].expand(-1, states[0].shape[1], -1)

    def by_text(self) -> list[list[int]]:
        """The layer of every token that was written, also after the end of a text."""
        return [list(layers) for layers in zip(*self._steps, strict=True)]


@contextmanager
def _writer(
    lens: ResidualLens, model: FrozenModel, source: int | _Exits, config: GenerationConfig
) -> Iterator[PreTrainedModel]:
    """The model with the logits of a layer or of exits, and with `config` as its only settings."""
    with only_settings(model, config):
        if source == lens.n_layers:  # the model itself, in its own dtype
            yield model.model
        elif isinstance(source, _Exits):
            with model.decoded_by(source, source.layers) as writer:
                yield writer
        else:
            with model.decoded_by(lambda hidden: lens(hidden, source), [source]) as writer:
                yield writer


def _config(
    max_new_tokens: int, ends: list[int], samples: dict[str, bool | int | float]
) -> GenerationConfig:
    try:
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            **samples,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _sampling(
    do_sample: bool, temperature: float, top_k: int, top_p: float
) -> dict[str, bool | int | float]:
    """The settings of sampling, which transformers warns about if `do_sample` is off."""
    if not do_sample:
        if (temperature, top_k, top_p) != (1.0, 0, 1.0):
            raise InputError("temperature, top_k and top_p need do_sample=True")
        return {"do_sample": False}
    if not temperature > 0:
        raise InputError(
            f"temperature must be more than 0, got {temperature}; leave do_sample out for the "
            "best token"
        )
    if top_k < 0:
        raise InputError(f"top_k must be 1 or more, or 0 for all tokens; got {top_k}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be between 0 and 1, got {top_p}")
    settings = {"temperature": float(temperature), "top_k": top_k, "top_p": float(top_p)}
    return {"do_sample": True} | settings


def _ends(model: FrozenModel, asked: int | list[int] | None) -> list[int]:
    """The tokens that end a text: `asked`, or by default those of the model's generation config."""
    vocab_size = model.identity.vocab_size
    ends = model.model.generation_config.eos_token_id if asked is None else asked
    ends = [ends] if isinstance(ends, int) else ends or []
    wrong = [end for end in ends if not 0 <= end < vocab_size]
    if asked is None:
        return [end for end in ends if end not in wrong]
    if not ends:
        raise InputError("eos_token_id is empty; leave it out for the model's own")
    if wrong:
        raise InputError(f"eos_token_id must be between 0 and {vocab_size - 1}, got {wrong[0]}")
    return ends
