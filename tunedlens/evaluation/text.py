"""Which text an evaluation scores: never what a lens was trained on, unless asked to."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from tunedlens import builtin
from tunedlens.config import CorpusConfig, EvaluateConfig
from tunedlens.corpus import CorpusSplits, ResolvedCorpus, load_splits, resolve_corpus
from tunedlens.errors import InputError
from tunedlens.evaluation.lens_specs import BASELINE_TOKENS, LensSpec, trained_on
from tunedlens.model import FrozenModel

DEFAULT_TOKENS = 65_536


class ScoredText(NamedTuple):
    """The text that is scored."""

    config: EvaluateConfig
    """The config with its corpus, split and number of tokens chosen."""
    tokens: int
    """Positions to score, as in the config."""
    blocks: Iterator[Int[Tensor, " seq"]]
    description: Mapping[str, object]
    """The description of the split, or of each one if both are scored."""
    training: CorpusSplits
    """The text that baselines are made from."""


def load_text(config: EvaluateConfig, specs: Sequence[LensSpec], model: FrozenModel) -> ScoredText:
    """Load the text that a config names, or else that of the lenses' training.

    Raises:
        InputError: there is no such text, what is held out may have been trained on, or there are
            fewer positions than `config.tokens`, as far as that is known beforehand.
    """
    saved = [spec for spec in specs if spec.folder is not None]
    same_text = trained_on(saved, config.corpus.dataset)
    corpus = resolve_corpus(
        _corpus_as_trained(config.corpus, saved, same_text),
        model.name,
        model.context,
        model.bos_id is not None,
    )
    splits = load_splits(corpus, model.tokenizer)
    # Without a saved lens, baselines and lenses in memory come from the corpus's training side.
    has_training_side = same_text or (not saved and len(specs) > 1)
    split = config.split or ("validation" if has_training_side else "all")
    validation, train = splits.validation, splits.train
    if split == "validation":
        _require_held_out(corpus, validation.about, same_text)
    sides = {"validation": validation, "train": train}
    if split != "all":
        sides = {split: sides[split]}
    elif train.about.get("streamed"):
        # The smaller side is a fair sample of the documents, but slow to find in a stream.
        sides = {"train": train, "validation": validation}
    descriptions = {name: side.about for name, side in sides.items()}
    config = dataclasses.replace(config, corpus=corpus, split=split)
    tokens = _tokens(config, corpus, list(descriptions.values()))
    training = splits
    if saved and not same_text and any(spec.kind in BASELINE_TOKENS for spec in specs):
        other = resolve_corpus(
            saved[0].trained.corpus, model.name, model.context, model.bos_id is not None
        )
        training = load_splits(other, model.tokenizer)
    return ScoredText(
        dataclasses.replace(config, tokens=tokens),
        tokens,
        itertools.chain.from_iterable(side.shuffled() for side in sides.values()),
        descriptions if split == "all" else descriptions[split],
        training,
    )


def _corpus_as_trained(
    config: CorpusConfig, saved: Sequence[LensSpec], same_text: Sequence[LensSpec]
) -> CorpusConfig:
    """A config whose default settings are replaced by those of the lenses' training.

    Args:
        config: the corpus asked for.
        saved: all saved lenses.
        same_text: those that were trained on this corpus.

    Raises:
        InputError: a text that a lens was trained on would be divided in another way, so
            that blocks from training would be scored.
    """
    if not same_text:
        seq_len = saved[0].trained.corpus.seq_len if saved else None
        return dataclasses.replace(config, seq_len=config.seq_len or seq_len)
    trained = same_text[0].trained.corpus
    if trained.dataset is None:
        return config
    fields = {field.name: field.default for field in dataclasses.fields(CorpusConfig)}
    given = {name: getattr(config, name) for name in fields}
    require_as_trained(
        {name: value for name, value in given.items() if value != fields[name]}, trained
    )
    return trained


def require_as_trained(settings: Mapping[str, object], trained: CorpusConfig) -> None:
    """Check that explicit settings divide a text as it was divided for training.

    Args:
        settings: fields of a `CorpusConfig` by name; other names are ignored.
        trained: the corpus of the training.

    Raises:
        InputError: a setting differs, so that other blocks would be held out.
    """
    for field in dataclasses.fields(CorpusConfig):
        expected = getattr(trained, field.name)
        value = settings.get(field.name, expected)
        if field.name != "dataset" and value != expected and trained.dataset is not None:
            raise InputError(
                f"--{field.name.replace('_', '-')} must be {expected} for {trained.dataset}, as in "
                f"training, so that the same blocks are held out; got {value}"
            )


def _tokens(
    config: EvaluateConfig, corpus: ResolvedCorpus, sides: Sequence[Mapping[str, int]]
) -> int:
    """The number of positions to score."""
    if not all("blocks" in side for side in sides):
        return config.tokens or DEFAULT_TOKENS
    available = sum(side["blocks"] for side in sides) * (corpus.seq_len - 1)
    if config.tokens is not None and config.tokens > available:
        raise InputError(
            f"--tokens asks for {config.tokens:,} positions, but {corpus.dataset} "
            f"(--split {config.split}) has {available:,}; ask for fewer or give more text"
        )
    return config.tokens or min(DEFAULT_TOKENS, available)


def _require_held_out(
    corpus: CorpusConfig, description: Mapping[str, object], same_text: Sequence[LensSpec]
) -> None:
    """Check that the held-out blocks are those that each lens's training held out.

    Raises:
        InputError: the text was divided in another way, or has changed since.
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
