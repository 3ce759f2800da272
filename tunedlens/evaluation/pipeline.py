"""An evaluation from its config to its results."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from accelerate import Accelerator

from tunedlens import checkpoint
from tunedlens.config import EvaluateConfig
from tunedlens.corpus import CorpusSplits
from tunedlens.evaluation.lens_specs import (
    BASELINE_TOKENS,
    LensSpec,
    lens_specs,
    model_as_trained,
)
from tunedlens.evaluation.results import Evaluation, LensSource
from tunedlens.evaluation.scoring import score_lenses
from tunedlens.evaluation.text import load_text
from tunedlens.fit import mean_lens, unigram_lens
from tunedlens.lenses import Lens, LogitLens
from tunedlens.model import FrozenModel, load_configured
from tunedlens.provenance import describe_run


def evaluate(
    config: EvaluateConfig,
    *,
    model: FrozenModel | None = None,
    lenses: Mapping[str, Lens] | None = None,
    accelerator: Accelerator | None = None,
    progress: Callable[[int, int], None] | None = None,
    command: Sequence[str] | None = None,
) -> Evaluation:
    """Evaluate lenses as `evaluate.py` does; `tunedlens.write_report` writes the results.

    A text that a lens was trained on is scored where it was held out, unless `config.split` says
    otherwise. In several processes, each one scores its part and all return the whole.

    Args:
        config: the lenses, the model, the text and the metrics.
        model: a loaded model, instead of `config.model`.
        lenses: lenses in memory by name, besides those of the config. If there are any, the newest
            saved lens is not the default.
        accelerator: the processes and the device.
        progress: called with the positions that were just scored and the positions to score.
        command: recorded as the command that was run; by default this process's own.

    Raises:
        InputError: a lens, the model or the text is missing, damaged or does not fit the others,
            or there is too little text.
    """
    accelerator = accelerator or Accelerator()
    if not config.lenses and not lenses:
        newest = checkpoint.newest_lens(checkpoint.ROOT)
        config = dataclasses.replace(config, lenses=(str(newest),))
    specs = lens_specs(config.lenses, list(lenses or {}))
    saved = [spec for spec in specs if spec.folder is not None]
    if model is None:
        config = dataclasses.replace(config, model=model_as_trained(config.model, saved))
        model = load_configured(config.model, accelerator.device)
    ready = {spec.name: checkpoint.load_lens(spec.folder, model) for spec in saved if spec.folder}
    text = load_text(config, specs, model)
    model_config = dataclasses.replace(config.model, model=model.name)
    config = dataclasses.replace(text.config, model=model_config)
    evaluation = score_lenses(
        model,
        _in_order(specs, {**ready, **(lenses or {})}, model, text.training),
        text.blocks,
        config,
        accelerator=accelerator,
        progress=None if progress is None else lambda count: progress(count, text.tokens),
    )
    return dataclasses.replace(
        evaluation,
        provenance={
            **describe_run(model, command),
            "lenses": {spec.name: _source(spec, text.training) for spec in specs[1:]},
            "corpus": text.description,
            "config": dataclasses.asdict(config),
            "processes": accelerator.num_processes,
        },
    )


def _in_order(
    specs: Sequence[LensSpec],
    ready: Mapping[str, Lens],
    model: FrozenModel,
    training: CorpusSplits,
) -> dict[str, Lens]:
    """The lenses by name, with the logit lens and the baselines made."""
    lenses: dict[str, Lens] = {}
    for spec in specs:
        if spec.kind == "logit":
            lenses[spec.name] = LogitLens.from_model(model)
        elif spec.kind in BASELINE_TOKENS:
            make = {"unigram": unigram_lens, "mean": mean_lens}[spec.kind]
            tokens = BASELINE_TOKENS[spec.kind]
            lenses[spec.name] = make(model, training.train.shuffled(), tokens)
        else:
            lenses[spec.name] = ready[spec.name]
    return lenses


def _source(spec: LensSpec, training: CorpusSplits) -> LensSource:
    """The origin of a lens."""
    if spec.folder is not None:
        return {"folder": str(spec.folder), "sha256": spec.manifest["lens_sha256"]}
    if spec.kind not in BASELINE_TOKENS:
        return {"kind": spec.kind}
    tokens = BASELINE_TOKENS[spec.kind]
    return {"kind": spec.kind, "text": training.train.about, "tokens_at_most": tokens}
