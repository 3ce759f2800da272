"""Text as a layer would write it."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from tunedlens.checkpoint import require_made_for
from tunedlens.errors import InputError
from tunedlens.frozen import FrozenModel
from tunedlens.lens import ResidualLens


def generate(
    lens: ResidualLens,
    model: FrozenModel,
    prompts: Sequence[str],
    layer: int,
    *,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    eos_token_id: int | Sequence[int] | None,
    seed: int,
) -> list[str]:
    """What follows each prompt; see `ResidualLens.generate`."""
    require_made_for(model, {type(lens).__name__: lens})
    layer = lens.resolve(layer)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if not prompts:
        raise InputError("there is no prompt; give at least one")
    ids = [model.encode(prompt)[0] for prompt in prompts]
    longest = max(map(len, ids))
    if model.context is not None and longest + max_new_tokens > model.context:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the "
            f"{model.context} that {model.name} reads; shorten it or lower max_new_tokens"
        )
    ends = _ends(model, eos_token_id)
    if do_sample and not temperature > 0:
        raise InputError(
            f"temperature must be more than 0, got {temperature}; 0 is do_sample=False"
        )
    if do_sample and not 0 < top_p <= 1:
        raise InputError(f"top_p must be between 0 and 1, got {top_p}")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if do_sample else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        use_cache=True,
        do_sample=do_sample,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **sampling,
    )
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad(ids, batch_first=True, padding_side="left")
    mask = pad([torch.ones_like(i) for i in ids], batch_first=True, padding_side="left")
    devices = [] if model.device.type == "cpu" else [model.device]
    with (
        torch.random.fork_rng(devices, device_type=model.device.type),
        model.decoded_by(lambda hidden: lens(hidden, layer), layer) as writer,
    ):
        torch.manual_seed(seed)
        written: Any = writer.generate(  # type: ignore[operator]
            input_ids, attention_mask=mask, generation_config=config
        )
    texts = []
    for line in written[:, longest:].tolist():
        end = next((place for place, token in enumerate(line) if token in ends), None)
        texts.append(str(model.tokenizer.decode(line[:end])))
    return texts


def _ends(model: FrozenModel, asked: int | Sequence[int] | None) -> list[int]:
    """Tokens that end a text: those asked for, or the model's own."""
    if asked == []:
        raise InputError("eos_token_id is empty; leave it out for the model's own")
    ends = model.model.generation_config.eos_token_id if asked is None else asked
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    vocab_size = model.identity.vocab_size
    for end in ends:
        if not 0 <= end < vocab_size:
            raise InputError(f"eos_token_id must be between 0 and {vocab_size - 1}, got {end}")
    return ends
