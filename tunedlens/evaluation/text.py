"""Chooses the text of an evaluation. Training text of a lens is scored only on request."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from tunedlens import builtin
from tunedlens.config import CorpusConfig, EvaluateConfig, Split
from tunedlens.corpus import SELF, CorpusSplits, ResolvedCorpus, resolve_corpus
from tunedlens.errors import InputError
from tunedlens.evaluation.lens_specs import (
    BASELINES,
    LensSpec,
    SavedLens,
    saved_lenses,
    trained_on,
)
from tunedlens.files import JsonObject
from tunedlens.model import FrozenModel
from tunedlens.sampling import load_or_sample

DEFAULT_TOKENS = 65_536


class ScoredText(NamedTuple):
    """The text that is scored."""

    config: EvaluateConfig
    """The config with its corpus, split and number of tokens chosen."""
    tokens: int
    """Positions to score, as in the config."""
    blocks: Iterator[Int[Tensor, " seq"]]
    description: JsonObject
    """The description of the split, or of each one if both are scored."""
    training: CorpusSplits
    """The text that baselines are made from."""


def load_text(
    config: EvaluateConfig,
    specs: Sequence[LensSpec],
    model: FrozenModel,
    sampled: Callable[[int, int], object] | None = None,
) -> ScoredText:
    """Load the text that a config names, or else that of the lenses' training.

    Args:
        sampled: for the text `self`, called with the tokens that were just sampled and the tokens
            to sample.

    Raises:
        InputError: there is no such text, held-out text may have been used for training, or there
            are fewer positions than `config.tokens`, if their number is known in advance.
    """

    def resolved(corpus: CorpusConfig) -> ResolvedCorpus:
        found = resolve_corpus(corpus, model.name, model.context, model.bos_id is not None)
        if found.dataset != SELF or found.self_tokens is not None:
            return found
        # Each side of the split may leave out nearly a block.
        blocks = -(-(config.tokens or DEFAULT_TOKENS) // (found.seq_len - 1)) + 2
        return dataclasses.replace(found, self_tokens=blocks * found.seq_len)

    def load(corpus: ResolvedCorpus) -> CorpusSplits:
        def progress(count: int) -> None:
            if sampled is not None:
                sampled(count, corpus.self_tokens or 0)

        return load_or_sample(corpus, model, progress)

    saved = saved_lenses(specs)
    same_text = trained_on(saved, config.corpus.dataset)
    corpus = resolved(_corpus_as_trained(config.corpus, saved, same_text))
    splits = load(corpus)
    # Without a saved lens, baselines and lenses in memory come from the corpus's training side.
    has_training_side = same_text or (not saved and len(specs) > 1)
    split = config.split or ("validation" if has_training_side else "all")
    if split == "validation":
        _require_held_out(corpus, splits.validation.about, same_text)
    sides = {"validation": splits.validation, "train": splits.train}
    if split != "all":
        sides = {split: sides[split]}
    elif splits.train.about.get("streamed"):
        # The smaller side is a fair sample of the documents, but slow to find in a stream.
        sides = dict(reversed(sides.items()))
    about = {name: side.about for name, side in sides.items()}
    tokens = _tokens(config.tokens, corpus, split, list(about.values()))
    training = splits
    if saved and not same_text and any(spec.kind in BASELINES for spec in specs):
        training = load(resolved(saved[0].trained.corpus))
    return ScoredText(
        dataclasses.replace(config, corpus=corpus, split=split, tokens=tokens),
        tokens,
        chain.from_iterable(side.shuffled() for side in sides.values()),
        about if split == "all" else about[split],
        training,
    )


def _corpus_as_trained(
    config: CorpusConfig, saved: Sequence[SavedLens], same_text: Sequence[SavedLens]
) -> CorpusConfig:
    """The settings of the training of `same_text`, if the config's own agree with them.

    If no lens was trained on the text, only the length of a block is taken from the first one.
    """
    if not same_text:
        seq_len = saved[0].trained.corpus.seq_len if saved else None
        return dataclasses.replace(config, seq_len=config.seq_len or seq_len)
    trained = same_text[0].trained.corpus
    if trained.dataset is None:
        return config
    defaults, given = vars(CorpusConfig()), vars(config)
    require_as_trained(
        {name: given[name] for name in given if given[name] != defaults[name]}, trained
    )
    return trained


def require_as_trained(settings: Mapping[str, object], trained: CorpusConfig) -> None:
    """Check that explicit settings divide a text as it was divided for training.

    Args:
        settings: fields of a `CorpusConfig` by name; other names are ignored.

    Raises:
        InputError: a setting differs, so that blocks from training would be scored.
    """
    for name, expected in vars(trained).items():
        value = settings.get(name, expected)
        if name != "dataset" and value != expected and trained.dataset is not None:
            raise InputError(
                f"--{name.replace('_', '-')} must be {expected} for {trained.dataset}, as in "
                f"training, so that the same blocks are held out; got {value}"
            )


def _tokens(
    asked: int | None, corpus: ResolvedCorpus, split: Split, sides: Sequence[JsonObject]
) -> int:
    """The number of positions to score."""
    if not all("blocks" in side for side in sides):
        return asked or DEFAULT_TOKENS
    available = sum(side["blocks"] for side in sides) * (corpus.seq_len - 1)
    if asked is not None and asked > available:
        raise InputError(
            f"--tokens asks for {asked:,} positions, but {corpus.dataset} "
            f"(--split {split}) has {available:,}; ask for fewer or give more text"
        )
    return asked or min(DEFAULT_TOKENS, available)


def _require_held_out(
    corpus: CorpusConfig, about: JsonObject, same_text: Sequence[SavedLens]
) -> None:
    """Check that the held-out blocks are those that each lens's training held out."""
    for spec in same_text:
        trained = spec.trained.corpus
        # A file's name may be spelled in several ways.
        if vars(trained) | {"dataset": None} != vars(corpus) | {"dataset": None}:
            raise InputError(
                f"{spec.source} was trained on other blocks than {same_text[0].source}, and these "
                "may include blocks that are held out here; give another --dataset, or --split all"
            )
        # The embedded text differs between Pythons, but a file never changes sides.
        if trained.dataset == builtin.NAME:
            continue
        then = spec.manifest.get("corpus", {}).get("validation", about)
        if then.get("tokens_sha256") == about.get("tokens_sha256"):
            continue
        if trained.dataset == SELF:
            raise InputError(
                f"the text that {spec.source} was trained on cannot be sampled again: the model, "
                "the device, the number of threads or a version differs; give another --dataset, "
                "or --split all"
            )
        raise InputError(
            f"{corpus.dataset} has changed since {spec.source} was trained on it, so the "
            "blocks held out now may have been trained on; give another --dataset, or "
            "--split all"
        )
