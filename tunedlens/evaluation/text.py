"""Which text an evaluation scores: never what a lens was trained on, unless asked to."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from tunedlens import builtin
from tunedlens.config import CorpusConfig, EvaluateConfig
from tunedlens.corpus import CorpusSplits
from tunedlens.errors import InputError
from tunedlens.evaluation.lens_specs import LensSpec

DEFAULT_TOKENS = 65_536


class ScoredText(NamedTuple):
    """The text that is scored."""

    blocks: Iterator[Int[Tensor, " seq"]]
    description: Mapping[str, object]
    """The description of its corpus, or of each side of the split if both are scored."""
    tokens: int
    """Positions to score."""


def corpus_as_trained(
    config: CorpusConfig, saved: Sequence[LensSpec], same_text: Sequence[LensSpec]
) -> CorpusConfig:
    """A config whose default settings are replaced by those of the lenses' training.

    Args:
        config: the corpus asked for.
        saved: all saved lenses.
        same_text: those that were trained on this corpus.

    Raises:
        InputError: a text that a lens was trained on would be cut or split in another way, so
            that blocks from training would be scored.
    """
    if not same_text:
        seq_len = saved[0].trained.corpus.seq_len if saved else None
        return dataclasses.replace(config, seq_len=config.seq_len or seq_len)
    trained = same_text[0].trained.corpus
    if trained.dataset is None:
        return config
    for field in dataclasses.fields(CorpusConfig):
        value, expected = getattr(config, field.name), getattr(trained, field.name)
        if field.name != "dataset" and value not in (field.default, expected):
            raise InputError(
                f"--{field.name.replace('_', '-')} must be {expected} for {trained.dataset}, as in "
                f"training, so that the same blocks are held out; got {value}"
            )
    return trained


def scored_text(
    config: EvaluateConfig, splits: CorpusSplits, same_text: Sequence[LensSpec]
) -> ScoredText:
    """The blocks to score.

    Args:
        config: with its corpus and split chosen.
        splits: the corpus.
        same_text: the lenses that were trained on this corpus.

    Raises:
        InputError: what is held out may have been trained on, or there are fewer positions than
            `config.tokens`, as far as that is known beforehand.
    """
    validation, train = splits.validation, splits.train
    if config.split == "validation":
        _require_held_out(config.corpus, validation.about, same_text)
    if config.split == "all":
        # The smaller side is a fair sample of the documents, but slow to find in a stream.
        order = (train, validation) if train.about.get("streamed") else (validation, train)
        blocks = itertools.chain.from_iterable(side.shuffled() for side in order)
        sides = {"validation": validation.about, "train": train.about}
        return ScoredText(blocks, sides, _tokens(config, list(sides.values())))
    side = validation if config.split == "validation" else train
    return ScoredText(side.shuffled(), side.about, _tokens(config, [side.about]))


def _tokens(config: EvaluateConfig, sides: Sequence[Mapping[str, int]]) -> int:
    """The number of positions to score."""
    if not all("blocks" in side for side in sides):
        return config.tokens or DEFAULT_TOKENS
    available = sum(side["blocks"] for side in sides) * ((config.corpus.seq_len or 2) - 1)
    if config.tokens is not None and config.tokens > available:
        raise InputError(
            f"--tokens asks for {config.tokens:,} positions, but {config.corpus.dataset} "
            f"(--split {config.split}) has {available:,}; ask for fewer or give more text"
        )
    return config.tokens or min(DEFAULT_TOKENS, available)


def _require_held_out(
    corpus: CorpusConfig, description: Mapping[str, object], same_text: Sequence[LensSpec]
) -> None:
    """Check that the held-out blocks are those that each lens's training held out.

    Raises:
        InputError: the text was cut in another way, or has changed since.
    """
    for spec in same_text:
        if _without_name(spec.trained.corpus) != _without_name(corpus):
            raise InputError(
                f"{spec.folder} was trained on other blocks than {same_text[0].folder}, and these "
                "may include blocks that are held out here; give another --dataset, or --split all"
            )
        # The embedded text differs between Pythons, but a file never changes sides.
        if spec.trained.corpus.dataset == builtin.NAME:
            continue
        then = spec.manifest.get("corpus", {}).get("validation", description)
        if then.get("tokens_sha256") != description.get("tokens_sha256"):
            raise InputError(
                f"{corpus.dataset} has changed since {spec.folder} was trained on it, so the "
                "blocks held out now may have been trained on; give another --dataset, or "
                "--split all"
            )


def _without_name(corpus: CorpusConfig) -> dict[str, object]:
    """All settings; a file's name may be spelled in several ways."""
    return dataclasses.asdict(corpus) | {"dataset": None}
