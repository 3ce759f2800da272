"""Runs an evaluation: loads the model, the lenses and the text, and scores the text."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice, tee

from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from tunedlens import checkpoint
from tunedlens.config import EvaluateConfig, ScoringConfig
from tunedlens.corpus import CorpusSplits
from tunedlens.devices import float32_products
from tunedlens.distributed import join_processes
from tunedlens.doctor import warn_of_faults
from tunedlens.errors import InputError
from tunedlens.evaluation.beside import (
    SecondModel,
    onto,
    require_comparable,
    second_model,
    side_by_side,
)
from tunedlens.evaluation.lens_specs import (
    BASELINES,
    LensSpec,
    SavedLens,
    lens_specs,
    model_as_trained,
    saved_lenses,
)
from tunedlens.evaluation.results import Evaluation, EvaluationProvenance, name_on
from tunedlens.evaluation.scoring import Block, Layout, Scorer
from tunedlens.evaluation.tally import Tally
from tunedlens.evaluation.text import ScoredText, load_text
from tunedlens.files import JsonObject
from tunedlens.lenses import Lens, LogitLens, require_made_for
from tunedlens.metrics import per_token_metrics
from tunedlens.model import FrozenModel, load_configured
from tunedlens.provenance import describe_run


def evaluate(
    config: EvaluateConfig,
    *,
    model: FrozenModel | None = None,
    beside: FrozenModel | None = None,
    lenses: Mapping[str, Lens] | None = None,
    accelerator: Accelerator | None = None,
    progress: Callable[[int, int], None] | None = None,
    sampled: Callable[[int, int], None] | None = None,
    command: Sequence[str] | None = None,
) -> Evaluation:
    """See `calls.evaluate`. `lenses` are objects by name; loaded models replace the config's."""
    accelerator = accelerator or join_processes(config.model.device)
    if not config.lenses and not lenses:
        newest = checkpoint.newest_lens(checkpoint.ROOT)
        config = dataclasses.replace(config, lenses=(str(newest),))
    specs = lens_specs(config.lenses, lenses or {})
    saved = saved_lenses(specs)
    if model is None:
        config = dataclasses.replace(config, model=model_as_trained(config.model, saved))
        model = load_configured(config.model, accelerator.device)
    else:
        named = dataclasses.replace(config.model, model=model.name)
        config = dataclasses.replace(config, model=named)
    second = second_model(beside or config.beside, config.model, accelerator.device)
    for one in [model, second.model] if second else [model]:
        warn_of_faults(one, is_bos_default=config.corpus.bos is None and not saved)
    loaded = {spec.name: checkpoint.load_lens(spec.folder, model) for spec in saved}
    ready = {**loaded, **(lenses or {})}
    text = load_text(config, specs, model, sampled)
    evaluation = _score(specs, ready, model, second, text, accelerator, progress)
    about: EvaluationProvenance = {
        **describe_run(model, command),
        "lenses": {spec.name: _source(spec, text.training) for spec in specs[1:]},
        "corpus": text.description,
        "config": dataclasses.asdict(text.config),
        "processes": accelerator.num_processes,
    }
    if second:
        about["beside"] = {"title": second.title} | dataclasses.asdict(second.model.identity)
    return dataclasses.replace(evaluation, provenance=about)


def _score(
    specs: Sequence[LensSpec],
    ready: Mapping[str, Lens],
    model: FrozenModel,
    second: SecondModel | None,
    text: ScoredText,
    accelerator: Accelerator,
    progress: Callable[[int, int], None] | None,
) -> Evaluation:
    """The lenses on the model and, on the same blocks, on the second one."""
    if second:
        require_comparable(model, second.model, text.config.corpus.seq_len)
    total, (blocks, blocks_again) = text.tokens * (2 if second else 1), tee(text.blocks)
    score = partial(
        score_lenses,
        config=text.config,
        accelerator=accelerator,
        progress=None if progress is None else lambda count: progress(count, total),
    )
    evaluation = score(model, _in_order(specs, ready, model, text.training), blocks)
    if second is None:
        return evaluation
    moved = {name: onto(lens, second.model, name) for name, lens in ready.items()}
    found = _in_order(specs, moved, second.model, text.training)
    named = {name_on(name, second.title): lens for name, lens in found.items()}
    on_second = score(second.model, named, blocks_again)
    return side_by_side(evaluation, on_second, second.title)


def _in_order(
    specs: Sequence[LensSpec],
    ready: Mapping[str, Lens],
    model: FrozenModel,
    training: CorpusSplits,
) -> dict[str, Lens]:
    """The lenses by name, including the logit lens and the baselines."""
    found = {"logit": LogitLens.from_model(model), **ready}
    for spec in specs:
        if spec.kind in BASELINES:
            make, tokens = BASELINES[spec.kind]
            found[spec.name] = make(model, training.train.shuffled(), tokens)
    return {spec.name: found[spec.name] for spec in specs}


def _source(spec: LensSpec, training: CorpusSplits) -> JsonObject:
    """The origin of a lens."""
    if isinstance(spec, SavedLens):
        where = "hub" if checkpoint.hub_name(spec.source) else "folder"
        return {where: spec.source, "sha256": spec.manifest["lens_sha256"]}
    if spec.kind not in BASELINES:
        return {"kind": spec.kind}
    _, tokens = BASELINES[spec.kind]
    return {"kind": spec.kind, "text": training.train.about, "tokens_at_most": tokens}


@float32_products()
def score_lenses(
    model: FrozenModel,
    lenses: Mapping[str, Lens],
    blocks: Iterable[Int[Tensor, " seq"]],
    config: ScoringConfig | None = None,
    *,
    accelerator: Accelerator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score lenses on blocks of text, at every position whose next token is in the same block.

    Args:
        model: the model that the lenses belong to.
        lenses: the lenses by name.
        blocks: token ids, in blocks of equal length. Each process scores a part of them.
        config: the number of positions to score (by default all) and the metrics.
        accelerator: the processes, whose sums are added up.
        progress: called with the number of positions that were just scored.

    Raises:
        InputError: there is nothing to score, blocks differ in length, a lens belongs to
            another model, or a value is not finite.
    """
    require_made_for(model, lenses)
    config = config or ScoringConfig()
    blocks = iter(blocks)
    first = list(islice(blocks, 1))
    layout = Layout.of(model, lenses, transfer=config.transfer)
    scorer = Scorer(model, layout, per_token_metrics(config.metrics))
    tally = Tally(layout, config, positions=len(first[0]) - 1 if first else 0)
    digest = hashlib.sha256()
    process, processes = 0, 1
    if accelerator is not None:
        process, processes = accelerator.process_index, accelerator.num_processes
    numbered = numbered_blocks(chain(first, blocks), config.tokens, digest.update)
    while of_all := list(islice(numbered, config.batch_size * processes)):
        batch = of_all[process::processes]
        if not batch:
            model.lend_weights()
            continue
        scored = scorer.score(batch)
        tally.add(scored)
        if progress is not None:
            progress(int(scored.is_scored.sum()))
    if accelerator is not None:
        tally.reduce(accelerator)
    return tally.evaluation(digest.hexdigest())


def numbered_blocks(
    blocks: Iterable[Int[Tensor, " seq"]], tokens: int | None, digest: Callable[[bytes], object]
) -> Iterator[Block]:
    """The blocks with so many positions; the digest is given their scored tokens.

    Raises:
        InputError: blocks differ in length.
    """
    left, length = math.inf if tokens is None else tokens, None
    for number, ids in enumerate(blocks):
        if left <= 0:
            return
        length = length or len(ids)
        if len(ids) != length:
            raise InputError(
                f"all blocks must have the same length: block {number} has {len(ids)} tokens, "
                f"the first one {length}"
            )
        scored = int(min(len(ids) - 1, left))
        left -= scored
        digest(ids[: scored + 1].int().cpu().numpy().tobytes())
        yield Block(ids, scored, number)
