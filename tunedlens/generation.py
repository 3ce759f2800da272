"""Generates text from the predictions of one layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel

from tunedlens.errors import InputError
from tunedlens.lenses import ResidualLens, require_made_for
from tunedlens.model import FrozenModel
from tunedlens.sampling import only_settings


def generate(
    lens: ResidualLens,
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
    """Continue a text; every new token comes from the lens's distribution at one layer.

    At the last layer the model itself generates, in its own dtype. The model's generation config
    only decides which tokens end a text.

    Args:
        prompt: text, or several texts that are continued together.
        do_sample: whether to sample; otherwise the best token is taken.
        temperature: divides the logits of the distribution sampled from.
        top_k: sample from this number of best tokens; 0 means all.
        top_p: sample from the best tokens that together have this probability.
        eos_token_id: tokens that end a text; by default the model's own.
        seed: the seed of the samples.

    Returns:
        The text after the prompt, without the token that ended it; for several prompts, a list.

    Raises:
        InputError: the lens was made for another model, there is no such layer, a setting is
            out of range, or a prompt is empty or leaves no room for the new tokens.
    """
    require_made_for(model, {type(lens).__name__: lens})
    layer = lens.resolve(layer)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    samples = _sampling(do_sample, temperature, top_k, top_p)
    ends = _ends(model, eos_token_id)
    try:
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            **samples,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    texts = _continue(lens, model, prompts, layer, config, seed)
    return texts[0] if isinstance(prompt, str) else texts


def _continue(
    lens: ResidualLens,
    model: FrozenModel,
    prompts: Sequence[str],
    layer: int,
    config: GenerationConfig,
    seed: int,
) -> list[str]:
    """The texts after the prompts; see `generate`."""
    if not prompts:
        raise InputError("there is no prompt; give at least one")
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
    with torch.random.fork_rng(devices), _writer(lens, model, layer, config) as writer:
        torch.manual_seed(seed)
        written = writer.generate(input_ids, attention_mask=mask)  # type: ignore[operator]
    ends, texts = config.eos_token_id or [], []
    for line in written[:, longest:].tolist():
        end = next((index for index, token in enumerate(line) if token in ends), None)
        texts.append(str(model.tokenizer.decode(line[:end])))
    return texts


@contextmanager
def _writer(
    lens: ResidualLens, model: FrozenModel, layer: int, config: GenerationConfig
) -> Iterator[PreTrainedModel]:
    """The model with the logits of the layer and with `config` as its only settings."""
    with only_settings(model, config):
        if layer == lens.n_layers:  # the model itself, in its own dtype
            yield model.model
        else:
            with model.decoded_by(lambda hidden: lens(hidden, layer), layer) as writer:
                yield writer


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
