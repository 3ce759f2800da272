"""What a config leaves open, settled for a model and a machine."""

import dataclasses

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from tunedlens.config import ONE_PASS, TrainConfig
from tunedlens.corpus import resolve_corpus
from tunedlens.engine.backend import Backend, fastest_backend
from tunedlens.errors import InputError
from tunedlens.fit import DEFAULT_HYPERPARAMETERS
from tunedlens.model import FrozenModel
from tunedlens.training.costs import Costs, trained_positions

_TOKENS_OF_RECIPES = 512_000
_STEP_OF_RECIPES = 2048
_TOKENS_OF_JACOBIAN = 8192
"""Each takes d_model backward passes."""
_VOCAB_SAMPLE = 6144
_SMALL_VOCABULARY = 4
"""In samples: a vocabulary up to so many of them is taken whole."""
_MICRO_BATCH_TOKENS_OF_CPU = 2048
"""More in one forward pass is not faster there."""


def settled(config: TrainConfig, model: FrozenModel, accelerator: Accelerator) -> TrainConfig:
    """The same with nothing left open but `tokens`, `ridge` and `evaluate_tokens`.

    On a GPU `micro_batch_size` may stay open too: a whole step is then one micro-batch. The main
    process measures the precision and the kernel for all.

    Raises:
        InputError: something that was asked for cannot be had.
    """
    d_model, processes = model.identity.d_model, accelerator.num_processes
    if config.kernel == "attention" and model.device.type != "cpu":
        raise InputError("--kernel attention is for CPUs; leave it out, or choose products")
    config = dataclasses.replace(
        config, corpus=resolve_corpus(config.corpus, model.name, model.context)
    )
    positions = trained_positions(config)
    ours = config.fit in ("preconditioned", *ONE_PASS)
    step = 4 * d_model if ours else _STEP_OF_RECIPES
    first_pass = {"closed-form": 1024 * d_model, "jacobian": _TOKENS_OF_JACOBIAN}
    recipe = DEFAULT_HYPERPARAMETERS["preconditioned" if ours else config.fit]
    tokens = config.tokens if ours else config.tokens or _TOKENS_OF_RECIPES
    init_tokens = first_pass.get(config.fit, 128 * d_model)
    if tokens is not None:
        init_tokens = min(init_tokens, max(1, tokens // 4))
    is_large = model.identity.vocab_size > _SMALL_VOCABULARY * _VOCAB_SAMPLE
    sample = config.vocab_sample
    if sample is None:
        sample = _VOCAB_SAMPLE if is_large and config.fit == "preconditioned" else 0
    elif sample >= model.identity.vocab_size:
        sample = 0
    micro_batch_size = config.micro_batch_size
    if micro_batch_size is None and model.device.type == "cpu":
        micro_batch_size = max(1, _MICRO_BATCH_TOKENS_OF_CPU // positions)
    backend = Backend(config.precision or "fp32", config.kernel or "products")
    if config.precision is None or config.kernel is None:
        if accelerator.is_main_process:
            backend = fastest_backend(model.unembedding, config.precision, config.kernel)
        if processes > 1:
            (backend,) = broadcast_object_list([backend])

    def own(given: float | None, default: float) -> float:
        return default if given is None else given

    config = dataclasses.replace(
        config,
        tokens=tokens,
        max_tokens=config.max_tokens or 2048 * d_model,
        init_tokens=config.init_tokens or init_tokens,
        batch_size=config.batch_size or max(processes, round(step / positions), 1),
        micro_batch_size=micro_batch_size,
        precision=backend.precision,
        kernel=backend.kernel,
        vocab_sample=sample,
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
    if config.validation_tokens is None:
        costs = Costs.of(config, model)
        # A run without a budget may end long before its cap.
        expected = budget(config) if config.tokens is not None else budget(config) // 4
        validation_tokens = costs.validation_tokens(expected)
        if config.evaluate_tokens is not None:
            validation_tokens = min(validation_tokens, config.evaluate_tokens)
        config = dataclasses.replace(config, validation_tokens=validation_tokens)
    return config


def budget(config: TrainConfig) -> int:
    """The most tokens that the steps of a settled config may take."""
    return 0 if config.fit in ONE_PASS else config.tokens or config.max_tokens or 0
