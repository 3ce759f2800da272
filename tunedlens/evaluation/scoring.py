"""One pass over a corpus: the model once, every lens and layer beside it."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tunedlens import metrics
from tunedlens.evaluation.results import Evaluation
from tunedlens.evaluation.tally import PER_TOKEN, Tally
from tunedlens.frozen import FrozenModel
from tunedlens.fused import Fused
from tunedlens.lens import AffineLens, ConstantLens, Lens, ResidualLens
from tunedlens.metrics.sums import GROUPS
from tunedlens.objective import chunk_tokens


def evaluate(
    model: FrozenModel,
    lenses: Mapping[str, Lens],
    blocks: Iterable[Int[Tensor, " seq"]],
    token_bytes: Int[Tensor, " vocab"],
    *,
    tokens: int | None = None,
    batch_size: int = 8,
    extended: bool = False,
    by_position: bool = False,
    transfer: bool = False,
    compiled: bool = False,
    accelerator: Accelerator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score lenses on text: every position whose next token is in the same block.

    Args:
        model: what the lenses are compared with.
        lenses: by name.
        blocks: the text; each process scores its share of them.
        token_bytes: bytes of text that each token stands for.
        tokens: positions to score in all; fewer if the text has fewer, all by default.
        batch_size: blocks in one forward pass.
        extended: all metrics that there are, not only the standard ones.
        by_position: also every figure by position in the block.
        transfer: also every translator at every layer, for lenses that have any.
        compiled: fuse what comes after the logits with `torch.compile`.
        accelerator: adds up the shares of several processes.
        progress: told how many positions were just scored.

    Raises:
        InputError: there is nothing to score, or a figure is not finite.
    """
    scorer = _Scorer(model, lenses, extended=extended, transfer=transfer, compiled=compiled)
    tally = Tally(
        list(lenses),
        scorer.rows,
        model.identity,
        extended=extended,
        transferred=scorer.transferred,
        device=model.device,
    )
    digest = hashlib.sha256()
    share = _share(blocks, tokens, accelerator)
    while batch := list(islice(share, batch_size)):
        input_ids = torch.stack([block.ids for block in batch])
        counts = torch.tensor([block.scored for block in batch])
        scored = torch.arange(input_ids.shape[1] - 1) < counts[:, None]
        groups = torch.tensor([block.number % GROUPS for block in batch])
        for block in batch:
            digest.update(block.ids[: block.scored + 1].int().numpy().tobytes())
        if by_position:
            tally.watch_positions(scored.shape[1])
        figures = scorer.score(input_ids.to(model.device), scored, groups, tally)
        tally.add(figures, scored, token_bytes[input_ids[:, 1:]], groups)
        if progress is not None:
            progress(int(counts.sum()))
    alone = accelerator is None or accelerator.num_processes == 1
    if accelerator is not None and not alone:
        tally.reduce(accelerator)
    return tally.evaluation(digest.hexdigest() if alone else None)


class _Block(NamedTuple):
    ids: Int[Tensor, " seq"]
    scored: int
    """How many of its positions, the first ones, are scored."""
    number: int
    """Its place among the blocks of all processes."""


def _share(
    blocks: Iterable[Int[Tensor, " seq"]], tokens: int | None, accelerator: Accelerator | None
) -> Iterator[_Block]:
    """This process's blocks."""
    index, processes = (
        (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    )
    left = math.inf if tokens is None else tokens
    for number, block in enumerate(blocks):
        if left <= 0:
            return
        count = int(min(len(block) - 1, left))
        left -= count
        if number % processes == index:
            yield _Block(block, count, number)


class _Scorer:
    """Blocks in, figures at every position out; a chunk of tokens at a time.

    A row is one distribution at every position: a lens at a layer, a constant lens, or, the
    last one, the model itself. The model's softmax is made once for all of them. Decoded in
    float32.

    Args:
        model: the frozen model.
        lenses: by name.
        extended: all figures of a position that there are.
        transfer: also use every translator at every layer.
        compiled: fuse what comes after the logits.
    """

    def __init__(
        self,
        model: FrozenModel,
        lenses: Mapping[str, Lens],
        *,
        extended: bool,
        transfer: bool,
        compiled: bool,
    ) -> None:
        self._model, self._lenses, self._extended = model, list(lenses.values()), extended
        self._unembedding = model.unembedding.centred()
        self._figures = Fused(_figures, compiled)
        self._pair = Fused(_kl_and_cross_entropy, compiled)
        n_layers = model.identity.n_layers
        self._decodings: list[tuple[Lens, int]] = []
        self.rows: list[list[int]] = []
        """For every lens and last the model: the row of each layer."""
        for lens in self._lenses:
            own = 1 if isinstance(lens, ConstantLens) else n_layers
            first = len(self._decodings)
            self.rows.append([first + min(layer, own - 1) for layer in range(n_layers)])
            self._decodings += [(lens, layer) for layer in range(own)]
        self.rows.append([len(self._decodings)] * n_layers)
        self.transferred = [
            name for name, lens in lenses.items() if transfer and isinstance(lens, AffineLens)
        ]
        self._transferred = [lenses[name] for name in self.transferred]

    @torch.no_grad()
    def score(
        self,
        input_ids: Int[Tensor, "batch seq"],
        scored: Bool[Tensor, "batch positions"],
        groups: Int[Tensor, " batch"],
        tally: Tally,
    ) -> Float[Tensor, "metrics rows batch positions"]:
        """Figures at every position, on the CPU; sums over them of whole distributions."""
        *states, final = (
            state[:, :-1].flatten(0, 1) for state in self._model.residual_stream(input_ids)
        )
        next_ids = input_ids[:, 1:].flatten()
        membership = torch.zeros(GROUPS, len(next_ids), device=final.device)
        group_of_token = groups[:, None].expand_as(scored).flatten().to(final.device)
        membership[group_of_token, torch.arange(len(next_ids))] = scored.flatten().float().to(final)

        names = PER_TOKEN[self._extended]
        figures = final.new_empty(
            (len(names), len(self._decodings) + 1, len(next_ids)), dtype=torch.float32
        )
        transfer = final.new_empty(
            (2, len(states), len(states), len(self._transferred), len(next_ids)),
            dtype=torch.float32,
        )
        chunk = chunk_tokens(self._model.identity.vocab_size, final.device)
        for part in _slices(len(next_ids), chunk):
            model_logits = self._unembedding(final[part])
            model_log_probs = metrics.log_probs(model_logits)
            model_probs = model_log_probs.exp()
            model_side = (
                model_probs,
                model_log_probs,
                model_log_probs.argmax(-1),
                next_ids[part],
            )
            for row, decoding in enumerate([*self._decodings, None]):
                logits = (
                    model_logits
                    if decoding is None
                    else self._logits(*decoding, states[decoding[1]][part])
                )
                figures[:, row, part], probs = self._figures(logits, *model_side, self._extended)
                tally.distributions.sums[:, row] += (membership[:, part] @ probs).to(
                    tally.distributions.sums
                )
            for column, lens in enumerate(self._transferred):
                for translator in range(len(states)):
                    for layer, hidden in enumerate(states):
                        logits = self._logits(lens, translator, hidden[part])
                        transfer[:, translator, layer, column, part] = self._pair(
                            logits, *model_side
                        )
        by_block = scored.shape
        if self._transferred:
            tally.add_transfer(transfer.cpu().unflatten(-1, by_block), scored)
        return figures.cpu().unflatten(-1, by_block)

    def _logits(self, lens: Lens, layer: int, hidden: Tensor) -> Float[Tensor, "tokens vocab"]:
        """Up to one constant per position."""
        if isinstance(lens, ResidualLens):
            return self._unembedding(lens.transform_hidden(hidden, layer))
        return lens(hidden, layer)


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _figures(
    logits: Float[Tensor, "tokens vocab"],
    model_probs: Float[Tensor, "tokens vocab"],
    model_log_probs: Float[Tensor, "tokens vocab"],
    model_top1: Int[Tensor, " tokens"],
    next_ids: Int[Tensor, " tokens"],
    extended: bool,
) -> tuple[Float[Tensor, "metrics tokens"], Float[Tensor, "tokens vocab"]]:
    """What `PER_TOKEN` lists, and the probabilities."""
    log_probs = metrics.log_probs(logits)
    probs = log_probs.exp()
    model_rank = metrics.rank(log_probs, model_top1)
    next_rank = metrics.rank(log_probs, next_ids)
    found = [
        metrics.kl_from_log_probs(model_probs, model_log_probs, log_probs),
        metrics.cross_entropy(log_probs, next_ids),
        metrics.entropy(log_probs),
        (model_rank == 1).float(),
        (model_rank <= 10).float(),
        (next_rank == 1).float(),
    ]
    if extended:
        found += [
            metrics.kl_from_log_probs(probs, log_probs, model_log_probs),
            metrics.js_divergence(log_probs, model_log_probs),
            1 / next_rank.float(),
            model_rank.float(),
            probs.amax(-1),
        ]
    return torch.stack(found), probs


def _kl_and_cross_entropy(
    logits: Float[Tensor, "tokens vocab"],
    model_probs: Float[Tensor, "tokens vocab"],
    model_log_probs: Float[Tensor, "tokens vocab"],
    model_top1: Int[Tensor, " tokens"],  # noqa: ARG001 - as `_figures`
    next_ids: Int[Tensor, " tokens"],
) -> Float[Tensor, "2 tokens"]:
    log_probs = metrics.log_probs(logits)
    kl = metrics.kl_from_log_probs(model_probs, model_log_probs, log_probs)
    return torch.stack([kl, metrics.cross_entropy(log_probs, next_ids)])
