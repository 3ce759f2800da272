"""One pass over a corpus: the model once, every lens and layer beside it."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tunedlens.engine import distributions
from tunedlens.engine.objective import chunk_tokens
from tunedlens.errors import InputError
from tunedlens.evaluation.accumulators import OF_TRANSFER, Tally, per_token
from tunedlens.evaluation.estimates import GROUPS, GroupSums
from tunedlens.evaluation.results import Evaluation
from tunedlens.lenses import AffineLens, ConstantLens, Lens, ResidualLens, require_made_for
from tunedlens.model import FrozenModel

_CACHED_LOGITS = 2**20
"""As many as a few arrays of them fit into the cache of a CPU."""


def score_lenses(
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
    accelerator: Accelerator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score lenses on text: every position whose next token is in the same block.

    Args:
        model: what the lenses are compared with.
        lenses: by name.
        blocks: the text, all of one length; each process scores its share of them.
        token_bytes: bytes of text that each token stands for.
        tokens: positions to score in all; fewer if the text has fewer, all by default.
        batch_size: blocks in one forward pass.
        extended: all metrics that there are, not only the standard ones.
        by_position: also the figures of a position, and bits per byte, by position in the block.
        transfer: also every translator at every layer, for lenses that have any.
        accelerator: adds up the shares of several processes.
        progress: told how many positions were just scored.

    Raises:
        InputError: there is nothing to score, blocks differ in length, a lens belongs to
            another model, or a figure is not finite.
    """
    require_made_for(model, lenses)
    blocks = iter(blocks)
    first = list(islice(blocks, 1))
    names = per_token(extended)
    scorer = _Scorer(model, lenses, names, transfer=transfer)
    tally = Tally(
        list(lenses),
        scorer.rows,
        names,
        scorer.distributions,
        transferred=scorer.transferred,
        positions=len(first[0]) - 1 if by_position and first else None,
    )
    digest = hashlib.sha256()
    share = _share(chain(first, blocks), tokens, accelerator, digest.update)
    while batch := list(islice(share, batch_size)):
        input_ids = torch.stack([block.ids for block in batch])
        counts = torch.tensor([block.scored for block in batch])
        scored = torch.arange(input_ids.shape[1] - 1) < counts[:, None]
        groups = torch.tensor([block.number % GROUPS for block in batch])
        figures, transferred = scorer.score(input_ids.to(model.device), scored, groups)
        tally.add(figures, transferred, scored, token_bytes[input_ids[:, 1:]], groups)
        if progress is not None:
            progress(int(counts.sum()))
    if accelerator is not None:
        tally.reduce(accelerator)
    constant = [name for name, lens in lenses.items() if isinstance(lens, ConstantLens)]
    return tally.evaluation(constant, digest.hexdigest())


class _Block(NamedTuple):
    ids: Int[Tensor, " seq"]
    scored: int
    """How many of its positions, the first ones, are scored."""
    number: int
    """Its place among the blocks of all processes."""


def _share(
    blocks: Iterable[Int[Tensor, " seq"]],
    tokens: int | None,
    accelerator: Accelerator | None,
    digest: Callable[[bytes], object],
) -> Iterator[_Block]:
    """This process's blocks; the digest is told of all that are scored.

    Raises:
        InputError: blocks differ in length.
    """
    index, processes = (
        (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    )
    left, length = math.inf if tokens is None else tokens, None
    for number, block in enumerate(blocks):
        if left <= 0:
            return
        length = length or len(block)
        if len(block) != length:
            raise InputError(
                f"blocks must have one length: block {number} has {len(block)} tokens, the first "
                f"one {length}"
            )
        count = int(min(len(block) - 1, left))
        left -= count
        digest(block[: count + 1].int().cpu().numpy().tobytes())
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
        names: of the figures of a position.
        transfer: also use every translator at every layer.
    """

    def __init__(
        self,
        model: FrozenModel,
        lenses: Mapping[str, Lens],
        names: tuple[str, ...],
        *,
        transfer: bool,
    ) -> None:
        self._model, self._names = model, names
        self._unembedding = unembedding = model.unembedding.centred()
        self._parts = (unembedding.norm, unembedding.weight, unembedding.bias)
        self._memory = unembedding.weight.new_empty(0, len(unembedding.weight))
        n_layers = model.identity.n_layers
        self._decodings: list[tuple[Lens, int]] = []
        self.rows: list[list[int]] = []
        """For every lens and last the model: the row of each layer."""
        for lens in lenses.values():
            own = 1 if isinstance(lens, ConstantLens) else n_layers
            first = len(self._decodings)
            self.rows.append([first + min(layer, own - 1) for layer in range(n_layers)])
            self._decodings += [(lens, layer) for layer in range(own)]
        self.rows.append([len(self._decodings)] * n_layers)
        self.transferred = [
            name for name, lens in lenses.items() if transfer and isinstance(lens, AffineLens)
        ]
        self._transferred = [lenses[name] for name in self.transferred]
        # Apple's GPUs have no float64.
        where = "cpu" if model.device.type == "mps" else model.device
        shape = (len(self._decodings) + 1, model.identity.vocab_size)
        self.distributions = GroupSums(*shape, device=where)
        """Of the probabilities of every row, over what was scored so far."""

    @torch.no_grad()
    def score(
        self,
        input_ids: Int[Tensor, "batch seq"],
        scored: Bool[Tensor, "batch positions"],
        groups: Int[Tensor, " batch"],
    ) -> tuple[
        Float[Tensor, "metrics rows batch positions"],
        Float[Tensor, "2 translators layers lenses batch"],
    ]:
        """Figures at every position, and for transfer their sums, on the CPU."""
        scored = scored.to(input_ids.device)
        *states, final = (state[:, :-1][scored] for state in self._model.residual_stream(input_ids))
        next_ids, n_layers = input_ids[:, 1:][scored], len(states)
        shape = (len(self._names), len(self._decodings) + 1, len(next_ids))
        figures = final.new_empty(shape, dtype=torch.float32)
        transfer = torch.zeros(
            (len(OF_TRANSFER), n_layers, n_layers, len(self._transferred), len(scored)),
            dtype=torch.float64,
        )
        block_of = torch.arange(len(scored), device=scored.device)[:, None].expand_as(scored)
        in_block = F.one_hot(block_of[scored], len(scored)).cpu().double().T
        used, group_of = groups.to(scored.device).unique(return_inverse=True)
        in_group = F.one_hot(group_of[block_of[scored]], len(used)).float().T
        chunk = chunk_tokens(self._model.identity.vocab_size, final.device)
        for start in range(0, len(next_ids), chunk):
            part = slice(start, start + chunk)
            model = _Model.of(self._unembedding(final[part]), next_ids[part])
            for row, decoding in enumerate([*self._decodings, None]):
                logits = self._buffer(len(model.probs))
                if decoding is None:
                    logits.copy_(model.log_probs)
                else:
                    self._decode(*decoding, states[decoding[1]][part], logits)
                figures[:, row, part] = self._figures(logits, model, self._names)
                # By now they are probabilities.
                sums = in_group[:, part].to(logits) @ logits
                self.distributions.sums[:, row].index_add_(
                    0, used.to(self.distributions.sums.device), sums.to(self.distributions.sums)
                )
            for column, lens in enumerate(self._transferred):
                for translator in range(n_layers):
                    for layer, hidden in enumerate(states):
                        logits = self._buffer(len(model.probs))
                        self._decode(lens, translator, hidden[part], logits)
                        found = self._figures(logits, model, OF_TRANSFER)
                        sums = found.cpu().double() @ in_block[:, part].mT
                        transfer[:, translator, layer, column] += sums
        everywhere = figures.new_zeros(*shape[:2], *scored.shape)
        everywhere[:, :, scored] = figures
        return everywhere.cpu(), transfer

    def _decode(
        self, lens: Lens, layer: int, hidden: Tensor, logits: Float[Tensor, "tokens vocab"]
    ) -> None:
        """Writes the logits, up to one constant per position."""
        norm, weight, bias = self._parts
        if not isinstance(lens, ResidualLens):
            logits.copy_(lens(hidden, layer))
            return
        normed = norm(lens.transform_hidden(hidden, layer).to(weight.dtype))
        torch.mm(normed, weight.T, out=logits)
        if bias is not None:
            logits.add_(bias)

    def _buffer(self, tokens: int) -> Float[Tensor, "tokens vocab"]:
        """The same memory every time: on a CPU, new memory costs as much as the softmax."""
        if len(self._memory) < tokens:
            self._memory = self._parts[1].new_empty(tokens, len(self._parts[1]))
        return self._memory[:tokens]

    def _figures(
        self, logits: Float[Tensor, "tokens vocab"], model: "_Model", names: tuple[str, ...]
    ) -> Float[Tensor, "metrics tokens"]:
        """The figures of these names at every position; turns logits into probabilities.

        On a CPU, a few rows at a time, which stay in its cache from one pass to the next.
        """
        rows = len(logits)
        if logits.device.type == "cpu":
            rows = max(1, _CACHED_LOGITS // logits.shape[1])
        parts = [
            _figures(part, _Model(*(value[start : start + rows] for value in model)), names)
            for start, part in zip(range(0, len(logits), rows), logits.split(rows), strict=True)
        ]
        return torch.cat(parts, 1)


class _Model(NamedTuple):
    """What figures need of the model's distribution and of the text, at some positions."""

    probs: Float[Tensor, "tokens vocab"]
    log_probs: Float[Tensor, "tokens vocab"]
    negative_entropy: Float[Tensor, " tokens"]
    top1: Int[Tensor, " tokens"]
    next_ids: Int[Tensor, " tokens"]

    @classmethod
    def of(cls, logits: Float[Tensor, "tokens vocab"], next_ids: Int[Tensor, " tokens"]) -> Self:
        log_probs = distributions.log_probs(logits)
        probs = log_probs.exp()
        negative_entropy = torch.linalg.vecdot(probs, log_probs)
        return cls(probs, log_probs, negative_entropy, log_probs.argmax(-1), next_ids)


def _figures(
    logits: Float[Tensor, "tokens vocab"], model: _Model, names: tuple[str, ...]
) -> Float[Tensor, "metrics tokens"]:
    """The figures of these names at every position; turns logits into probabilities.

    Every figure takes whole rows in as few passes as possible: with the largest logit at 0, log Z
    is minus the logarithm of its probability, and KL, entropy and cross-entropy are log Z and one
    inner product or less.
    """
    logits.sub_(logits.amax(-1, keepdim=True))
    probs = logits.softmax(-1)
    log_normaliser = -probs.amax(-1).log()
    next_logits = logits.gather(-1, model.next_ids[:, None])[:, 0]
    expected = torch.linalg.vecdot(model.probs, logits)
    found = {
        "kl_nats": model.negative_entropy - expected + log_normaliser,
        "cross_entropy_nats": log_normaliser - next_logits,
    }
    if "entropy_nats" in names:
        model_rank = distributions.rank(logits, model.top1)
        is_models = model.next_ids == model.top1
        is_correct = is_models & (model_rank == 1)
        # Few other tokens are the lens's best, so their rank is taken only where it may be 1.
        others = ~is_models & (next_logits == 0)
        if others.any():
            is_correct[others] = distributions.rank(logits[others], model.next_ids[others]) == 1
        found |= {
            "entropy_nats": log_normaliser - torch.linalg.vecdot(probs, logits),
            "top1_agreement": (model_rank == 1).float(),
            "top10_agreement": (model_rank <= 10).float(),
            "accuracy": is_correct.float(),
        }
    if "js_nats" in names:
        log_probs = logits - log_normaliser[:, None]
        found |= {
            "reverse_kl_nats": distributions.kl_from_log_probs(probs, log_probs, model.log_probs),
            "js_nats": distributions.js_divergence(log_probs, model.log_probs),
            "reciprocal_rank": 1 / distributions.rank(logits, model.next_ids).float(),
            "model_top1_rank": model_rank.float(),
            "confidence": probs.amax(-1),
        }
    logits.copy_(probs)
    return torch.stack([found[name] for name in names])
