"""What a config leaves open, settled for a model and a machine."""

import dataclasses

import torch
from accelerate import Accelerator

from tunedlens.config import ONE_PASS, Precision, TrainConfig
from tunedlens.corpus import with_defaults
from tunedlens.errors import InputError
from tunedlens.fit import RECIPES
from tunedlens.frozen import FrozenModel
from tunedlens.fused import is_worth_compiling

_TOKENS_OF_RECIPES = 512_000
_STEP_OF_RECIPES = 2048
_TOKENS_OF_JACOBIAN = 8192
"""Each takes d_model backward passes."""


def settled(config: TrainConfig, model: FrozenModel, accelerator: Accelerator) -> TrainConfig:
    """The same with nothing left open but `tokens`, `ridge` and `micro_batch_size`.

    Raises:
        InputError: something that was asked for cannot be had.
    """
    d_model, processes = model.identity.d_model, accelerator.num_processes
    config = dataclasses.replace(config, corpus=with_defaults(config.corpus, model))
    positions = trained_positions(config)
    ours = config.fit in ("preconditioned", *ONE_PASS)
    step = 8 * d_model if ours else _STEP_OF_RECIPES
    first_pass = {"closed-form": 1024 * d_model, "jacobian": _TOKENS_OF_JACOBIAN}
    recipe = RECIPES["preconditioned" if ours else config.fit]
    tokens = config.tokens if ours else config.tokens or _TOKENS_OF_RECIPES
    most_tokens = config.most_tokens or 8192 * d_model
    logits = (tokens or most_tokens) * model.identity.vocab_size * model.identity.n_layers

    def own(given: float | None, default: float) -> float:
        return default if given is None else given

    config = dataclasses.replace(
        config,
        tokens=tokens,
        most_tokens=most_tokens,
        start_tokens=config.start_tokens or first_pass.get(config.fit, 128 * d_model),
        batch_size=config.batch_size or max(processes, round(step / positions), 1),
        precision=config.precision or fast_precision(model.device),
        compile=(
            config.fit not in ONE_PASS and is_worth_compiling(logits, model.device)
            if config.compile is None
            else config.compile
        ),
        lr=own(config.lr, recipe.learning_rate),
        momentum=own(config.momentum, recipe.momentum),
        weight_decay=own(config.weight_decay, recipe.weight_decay),
    )
    if (config.batch_size or 0) < processes:
        raise InputError(
            f"--batch-size must be at least the number of processes ({processes}), got "
            f"{config.batch_size}"
        )
    if processes > 1 and config.model.device is not None:
        raise InputError(
            f"--device is each process's own where there are {processes}; leave it out"
        )
    return config


def trained_positions(config: TrainConfig) -> int:
    """Positions of one block that are trained on.

    Raises:
        InputError: there are none.
    """
    seq_len = config.corpus.seq_len
    assert seq_len is not None  # with_defaults has set it
    if config.skip_first >= seq_len:
        raise InputError(
            f"--skip-first must be less than --seq-len ({seq_len}), got {config.skip_first}"
        )
    return seq_len - config.skip_first


def fast_precision(device: torch.device) -> Precision:
    """bf16 where the hardware multiplies it, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if capabilities.get("amx_bf16") else "fp32"
    return "fp32"
