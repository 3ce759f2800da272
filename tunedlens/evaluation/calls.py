"""The function `evaluate`, which takes a config, settings by name, or a text in memory."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack, overload

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from tunedlens import checkpoint
from tunedlens.config import (
    EvaluateConfig,
    EvaluateSettings,
    ScoringConfig,
    lists_settings,
    with_settings,
)
from tunedlens.corpus import LONGEST_DEFAULT_BLOCK
from tunedlens.corpus.sources import is_readable
from tunedlens.errors import InputError
from tunedlens.evaluation import pipeline
from tunedlens.evaluation.lens_specs import lens_specs, saved_lenses
from tunedlens.evaluation.results import Evaluation
from tunedlens.lenses import Lens, LogitLens
from tunedlens.model import FrozenModel, load_model
from tunedlens.progress import ProgressBar, progress_bar
from tunedlens.provenance import describe_run

OneLens = Lens | str | Path
"""A lens, or the path or the name on the hub of a saved one."""
Lenses = OneLens | Sequence[OneLens] | Mapping[str, OneLens] | None
Model = FrozenModel | str | Path
"""A loaded model, or its name on the hub or its folder."""
Progress = Callable[[int, int], None]


@overload
def evaluate(
    config: EvaluateConfig | None = None,
    lenses: Lenses = None,
    text: str | Path | None = None,
    *,
    model: Model | None = None,
    beside: Model | None = None,
    accelerator: Accelerator | None = None,
    progress: Progress | None = None,
    sampled: Progress | None = None,
    command: Sequence[str] | None = None,
    **settings: Unpack[EvaluateSettings],
) -> Evaluation: ...
@overload
def evaluate(
    model: Model | None = None,
    /,
    lenses: Lenses = None,
    text: str | Path | None = None,
    *,
    beside: Model | None = None,
    accelerator: Accelerator | None = None,
    progress: Progress | None = None,
    sampled: Progress | None = None,
    command: Sequence[str] | None = None,
    **settings: Unpack[EvaluateSettings],
) -> Evaluation: ...
@lists_settings(EvaluateConfig())
def evaluate(
    config: EvaluateConfig | Model | None = None,
    lenses: Lenses = None,
    text: str | Path | None = None,
    *,
    model: Model | None = None,
    beside: Model | None = None,
    accelerator: Accelerator | None = None,
    progress: Progress | None = None,
    sampled: Progress | None = None,
    command: Sequence[str] | None = None,
    **settings: Unpack[EvaluateSettings],
) -> Evaluation:
    """Evaluate lenses as `evaluate.py` does; `tunedlens.write_report` writes the results.

    `evaluate(model, lenses, text)` scores a text in memory, or the text at a path.
    `evaluate(model, lenses, tokens=10_000)` is short for an `EvaluateConfig` with this setting.

    If a lens was trained on the dataset, only the held-out part is scored, unless `split` is given.
    With several processes, each process scores a part, and all return the whole result.

    Args:
        config: an `EvaluateConfig`, or the model: a loaded model, its hub name or its folder.
        lenses: one lens, a list, or a dict by name, in addition to those of the config. Lenses
            are objects, paths, names on the hub, `logit`, `unigram` or `mean`. The logit lens is
            always added. If no lens is given, the newest saved lens is evaluated.
        text: a text, all of which is scored in blocks of equal length, or the path of a dataset.
        model: the model, if the first argument is a config.
        beside: a second model of the same shape, on which the same lenses are scored too.
        accelerator: the processes and the device.
        progress: called with the positions just scored and their total, instead of a progress bar.
        sampled: called in the same way while tokens are sampled, for the text `self`.
        command: the command to record; by default that of this process.
        settings: fields of `EvaluateConfig` and of its parts, which replace those of `config`.

    Raises:
        InputError: a setting is unknown; a lens, the model or the text is missing, damaged or does
            not fit the others; or there is too little text.
    """
    if not isinstance(config, EvaluateConfig):
        model = config if model is None else model
        config = EvaluateConfig()
    named: dict[str, object] = dict(settings)
    if isinstance(text, Path) or (text is not None and _is_path(text)):
        named["dataset"], text = text, None
    saved, in_memory = _sorted_out(lenses)
    if text is not None:
        return _score_text(model, saved or config.lenses, in_memory, text, named)
    if isinstance(model, str | Path):
        named["model"], model = model, None
    if isinstance(beside, str | Path):
        named["beside"], beside = beside, None
    config = with_settings(config, named)
    config = replace(config, lenses=(*config.lenses, *saved))
    score = partial(pipeline.evaluate, config, model=model, beside=beside, lenses=in_memory)
    score = partial(score, accelerator=accelerator, command=command)
    is_main = accelerator is None or accelerator.is_main_process
    with progress_bar(0, "evaluating", show=is_main and progress is None) as bar:
        shown = partial(_advance, bar, accelerator)
        return score(progress=progress or shown, sampled=sampled or partial(_advance, bar, None))


def _advance(bar: ProgressBar, accelerator: Accelerator | None, count: int, total: int) -> None:
    """Show more of a total on a progress bar, which begins anew with another total.

    Args:
        accelerator: its processes have each done as much as this one.
    """
    if bar.total != total:
        bar.reset(total)
    bar.update(count * (accelerator.num_processes if accelerator else 1))


def _is_path(text: str) -> bool:
    """Whether it is the path of a text: there is such a path, or it is the name of a file."""
    return os.path.exists(text) or (len(text.split()) == 1 and is_readable(Path(text)))


def _sorted_out(lenses: Lenses) -> tuple[list[str], dict[str, Lens]]:
    """The saved lenses, as `EvaluateConfig.lenses` has them, and the other lenses by name."""
    if lenses is None:
        return [], {}
    if isinstance(lenses, Lens | str | Path):
        lenses = [lenses]
    pairs = list(lenses.items()) if isinstance(lenses, Mapping) else [("", one) for one in lenses]
    saved = [
        f"{name}={lens}" if name else str(lens)
        for name, lens in pairs
        if isinstance(lens, str | Path)
    ]
    in_memory: dict[str, Lens] = {}
    for name, lens in pairs:
        if isinstance(lens, str | Path):
            continue
        if not isinstance(lens, Lens):
            raise InputError(f"expected a lens or the path of one, got a {type(lens).__name__}")
        name = name or lens.kind_name
        if name in in_memory:
            raise InputError(f"there are several lenses called {name}; give a dict that names them")
        if not (name == "logit" and isinstance(lens, LogitLens)):  # which is always scored
            in_memory[name] = lens
    return saved, in_memory


def _score_text(
    model: Model | None,
    saved: Sequence[str],
    in_memory: Mapping[str, Lens],
    text: str,
    settings: Mapping[str, object],
) -> Evaluation:
    """Every lens on a text in memory."""
    scoring = with_settings(ScoringConfig(), settings)
    if not saved and not in_memory:
        saved = [str(checkpoint.newest_lens(checkpoint.ROOT))]
    specs = lens_specs(saved, in_memory)
    loaded = model if isinstance(model, FrozenModel) else load_model(model)
    lenses = {"logit": LogitLens.from_model(loaded), **in_memory}
    for spec in saved_lenses(specs):
        lenses[spec.name] = checkpoint.load_lens(spec.folder, loaded)
    if missing := [spec.name for spec in specs if spec.name not in lenses]:
        raise InputError(
            f"the lens {missing[0]} is computed from a dataset; give a dataset instead of a text"
        )
    in_order = {spec.name: lenses[spec.name] for spec in specs}
    evaluation = pipeline.score_lenses(loaded, in_order, _blocks(loaded, text), scoring)
    return replace(evaluation, provenance={**describe_run(loaded)})


def _blocks(model: FrozenModel, text: str) -> list[Int[Tensor, " seq"]]:
    """The tokens of a text in as few blocks of equal length as the context allows.

    Each begins with BOS if the model's texts do. A few tokens at the end, fewer than the number of
    blocks, are left out.
    """
    ids = model.encode(text, is_any_length=True)[0].cpu()
    bos = ids[: int(model.bos_id is not None)]
    words = ids[len(bos) :]
    longest = min(model.context or LONGEST_DEFAULT_BLOCK, LONGEST_DEFAULT_BLOCK) - len(bos)
    count = -(-len(words) // longest)
    size = len(words) // max(1, count)
    return [torch.cat([bos, words[i * size : (i + 1) * size]]) for i in range(count)]
