"""One pass over a corpus: the model runs once, and every lens is decoded at every layer."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tunedlens.config import ScoringConfig
from tunedlens.engine import Decoder, ModelDistribution, chunk_tokens, measure
from tunedlens.errors import InputError
from tunedlens.evaluation.batches import TRANSFER_METRICS, Layout, ScoredBatch
from tunedlens.evaluation.estimates import GROUPS
from tunedlens.evaluation.results import Evaluation
from tunedlens.evaluation.tally import Tally
from tunedlens.lenses import Lens, require_made_for
from tunedlens.metrics import per_token_metrics
from tunedlens.model import FrozenModel
from tunedlens.tokenizer import TokenBytes


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
        blocks: token ids, in blocks of one length. Each process scores its part of them.
        config: how many positions are scored (by default all) and which metrics.
        accelerator: adds up the sums of several processes.
        progress: called with the number of positions that were just scored.

    Raises:
        InputError: there is nothing to score, blocks differ in length, a lens belongs to
            another model, or a value is not finite.
    """
    require_made_for(model, lenses)
    config = config or ScoringConfig()
    blocks = iter(blocks)
    first = list(islice(blocks, 1))
    layout = Layout.of(lenses, model.identity.n_layers, transfer=config.transfer)
    scorer = _Scorer(model, layout, per_token_metrics(config.metrics))
    tally = Tally(
        layout,
        config,
        vocab_size=model.identity.vocab_size,
        positions=len(first[0]) - 1 if first else 0,
        device=scorer.sums_device,
    )
    digest = hashlib.sha256()
    own = _blocks_of_this_process(chain(first, blocks), config.tokens, accelerator, digest.update)
    while batch := list(islice(own, config.batch_size)):
        scored = scorer.score(batch)
        tally.add(scored)
        if progress is not None:
            progress(int(scored.is_scored.sum()))
    if accelerator is not None:
        tally.reduce(accelerator)
    return tally.evaluation(digest.hexdigest())


class _Block(NamedTuple):
    ids: Int[Tensor, " seq"]
    scored: int
    """The number of scored positions, from the first on."""
    number: int
    """Counts the blocks of all processes from 0."""


def _blocks_of_this_process(
    blocks: Iterable[Int[Tensor, " seq"]],
    tokens: int | None,
    accelerator: Accelerator | None,
    digest: Callable[[bytes], object],
) -> Iterator[_Block]:
    """Every n-th block for n processes; the digest is given the scored tokens of all blocks.

    Raises:
        InputError: blocks differ in length.
    """
    process, processes = (
        (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    )
    left, length = math.inf if tokens is None else tokens, None
    for number, ids in enumerate(blocks):
        if left <= 0:
            return
        length = length or len(ids)
        if len(ids) != length:
            raise InputError(
                f"blocks must have one length: block {number} has {len(ids)} tokens, the first "
                f"one {length}"
            )
        scored = int(min(len(ids) - 1, left))
        left -= scored
        digest(ids[: scored + 1].int().cpu().numpy().tobytes())
        if number % processes == process:
            yield _Block(ids, scored, number)


class _Scorer:
    """Measures every distribution of a layout at every position of a batch, in float32."""

    def __init__(self, model: FrozenModel, layout: Layout, metrics: tuple[str, ...]) -> None:
        self._model, self._layout, self._metrics = model, layout, metrics
        self._decoder = Decoder(model.unembedding.centred())
        self._token_bytes = TokenBytes.of(model.tokenizer, model.identity.vocab_size)
        # Apple's GPUs have no float64.
        self.sums_device = torch.device("cpu") if model.device.type == "mps" else model.device

    @torch.no_grad()
    def score(self, blocks: list[_Block]) -> ScoredBatch:
        """Run the model on the blocks and measure every lens."""
        ids = torch.stack([block.ids for block in blocks])
        counts = torch.tensor([block.scored for block in blocks])
        groups = torch.tensor([block.number % GROUPS for block in blocks])
        is_scored = torch.arange(ids.shape[1] - 1) < counts[:, None]
        tokens = self._tokens(ids.to(self._model.device), is_scored.to(self._model.device), groups)
        values, probability_sums = self._measure(tokens)
        everywhere = torch.zeros(*values.shape[:2], *is_scored.shape, dtype=torch.float64)
        everywhere[:, :, is_scored] = values.cpu().double()
        by_layer = everywhere[:, self._layout.rows]
        return ScoredBatch(
            dict(zip(self._metrics, by_layer, strict=True)),
            is_scored,
            self._next_bytes(ids) * is_scored,
            groups,
            probability_sums,
            self._measure_transfer(tokens),
        )

    def _next_bytes(self, ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch positions"]:
        """The bytes of text of each next token; 0 where they cannot be known."""
        if self._token_bytes is None:
            return torch.zeros_like(ids[:, 1:])
        return self._token_bytes.next_bytes(ids)

    def _tokens(
        self,
        ids: Int[Tensor, "batch seq"],
        is_scored: Bool[Tensor, "batch positions"],
        groups: Int[Tensor, " batch"],
    ) -> "_Tokens":
        *states, final = (state[:, :-1][is_scored] for state in self._model.residual_stream(ids))
        block_of = torch.arange(len(ids), device=ids.device)[:, None].expand_as(is_scored)
        group_of = groups.to(ids.device).unique(return_inverse=True)[1]
        return _Tokens(
            states,
            final,
            ids[:, 1:][is_scored],
            F.one_hot(block_of[is_scored], len(ids)).T.float(),
            F.one_hot(group_of[block_of[is_scored]], int(group_of.max()) + 1).T.float(),
        )

    def _chunks(self, tokens: "_Tokens") -> Iterator[tuple[slice, ModelDistribution]]:
        """Slices of tokens whose logits fit into memory, with the model's distribution there."""
        size = chunk_tokens(self._model.identity.vocab_size, tokens.final.device)
        for start in range(0, len(tokens.final), size):
            part = slice(start, start + size)
            logits = self._decoder.model_logits(tokens.final[part])
            yield part, ModelDistribution.from_logits(logits)

    def _measure(
        self, tokens: "_Tokens"
    ) -> tuple[Float[Tensor, "metrics rows tokens"], Float[Tensor, "groups rows vocab"]]:
        """Metrics of every row at every token, and sums of its probabilities."""
        n_rows, vocab_size = self._layout.n_rows, self._model.identity.vocab_size
        values = tokens.final.new_empty(
            len(self._metrics), n_rows, len(tokens.final), dtype=torch.float32
        )
        sums = torch.zeros(
            *(len(tokens.in_group), n_rows, vocab_size),
            dtype=torch.float64,
            device=self.sums_device,
        )
        for part, model in self._chunks(tokens):
            for row in range(n_rows):
                if row < len(self._layout.decodings):
                    lens, layer = self._layout.decodings[row]
                    logits = self._decoder.lens_logits(lens, tokens.states[layer][part], layer)
                else:
                    logits = self._decoder.model_logits(tokens.final[part])
                values[:, row, part] = measure(self._metrics, logits, model, tokens.next_ids[part])
                probs = logits  # `measure` overwrites the logits
                sums[:, row] += (tokens.in_group[:, part] @ probs).to(sums)
        return values, sums

    def _measure_transfer(
        self, tokens: "_Tokens"
    ) -> Float[Tensor, "metrics translators layers lenses batch"]:
        """Sums of every translator's metrics at every layer."""
        names, n_layers = self._layout.transfer_lenses, len(tokens.states)
        shape = (len(TRANSFER_METRICS), n_layers, n_layers, len(names), len(tokens.in_block))
        sums = torch.zeros(shape, dtype=torch.float64)
        if not names:
            return sums
        in_block = tokens.in_block.cpu().double()
        for part, model in self._chunks(tokens):
            for column, name in enumerate(names):
                for translator in range(n_layers):
                    for layer, hidden in enumerate(tokens.states):
                        lens = self._layout.lenses[name]
                        logits = self._decoder.lens_logits(lens, hidden[part], translator)
                        values = measure(TRANSFER_METRICS, logits, model, tokens.next_ids[part])
                        by_block = values.cpu().double() @ in_block[:, part].mT
                        sums[:, translator, layer, column] += by_block
        return sums


class _Tokens(NamedTuple):
    """The scored positions of a batch, on the model's device."""

    states: list[Float[Tensor, "tokens d_model"]]
    """States of layers 0 to n - 1."""
    final: Float[Tensor, "tokens d_model"]
    """States before the final norm."""
    next_ids: Int[Tensor, " tokens"]
    in_block: Float[Tensor, "batch tokens"]
    """1 where a token belongs to a block."""
    in_group: Float[Tensor, "groups tokens"]
    """1 where a token belongs to a group of the jackknife."""
