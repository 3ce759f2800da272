"""One pass over a corpus: the model once, every lens and layer beside it."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tunedlens import metrics
from tunedlens.checkpoint import require_made_for
from tunedlens.errors import InputError
from tunedlens.evaluation.results import Evaluation
from tunedlens.evaluation.tally import OF_TRANSFER, Tally, per_token
from tunedlens.frozen import FrozenModel
from tunedlens.fused import Fused
from tunedlens.lens import AffineLens, ConstantLens, Lens, ResidualLens
from tunedlens.metrics import GROUPS, GroupSums
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
        blocks: the text, all of one length; each process scores its share of them.
        token_bytes: bytes of text that each token stands for.
        tokens: positions to score in all; fewer if the text has fewer, all by default.
        batch_size: blocks in one forward pass.
        extended: all metrics that there are, not only the standard ones.
        by_position: also the figures of a position, and bits per byte, by position in the block.
        transfer: also every translator at every layer, for lenses that have any.
        compiled: fuse what comes after the logits with `torch.compile`.
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
    scorer = _Scorer(model, lenses, names, transfer=transfer, compiled=compiled)
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
        compiled: fuse what comes after the logits.
    """

    def __init__(
        self,
        model: FrozenModel,
        lenses: Mapping[str, Lens],
        names: tuple[str, ...],
        *,
        transfer: bool,
        compiled: bool,
    ) -> None:
        self._model, self._names = model, names
        self._unembedding = unembedding = model.unembedding.centred()
        self._parts = (unembedding.norm, unembedding.weight, unembedding.bias)
        self._memory = unembedding.weight.new_empty(0, len(unembedding.weight))
        self._figures = Fused(_figures, compiled)
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
        *states, final = (
            state[:, :-1].flatten(0, 1) for state in self._model.residual_stream(input_ids)
        )
        next_ids, n_layers = input_ids[:, 1:].flatten(), len(states)
        shape = (len(self._names), len(self._decodings) + 1, len(next_ids))
        figures = final.new_empty(shape, dtype=torch.float32)
        transfer = torch.zeros(
            (len(OF_TRANSFER), n_layers, n_layers, len(self._transferred), len(scored)),
            dtype=torch.float64,
        )
        # Which scored tokens are in which block, and in which group.
        in_block = torch.block_diag(*scored.double().unbind())
        in_group = torch.zeros(GROUPS, len(next_ids)).index_add_(0, groups, in_block.float())
        in_group = in_group.to(final.device)
        chunk = chunk_tokens(self._model.identity.vocab_size, final.device)
        for start in range(0, len(next_ids), chunk):
            part = slice(start, start + chunk)
            log_probs = metrics.log_probs(self._unembedding(final[part]))
            model = (log_probs.exp(), log_probs, log_probs.argmax(-1), next_ids[part])
            for row, decoding in enumerate([*self._decodings, None]):
                if decoding is None:
                    logits = self._buffer(len(log_probs)).copy_(log_probs)
                else:
                    logits = self._logits(*decoding, states[decoding[1]][part])
                figures[:, row, part], total = self._figures(logits, *model, self._names)
                sums = (in_group[:, part].to(total) / total) @ logits  # by now weights
                self.distributions.sums[:, row] += sums.to(self.distributions.sums)
            for column, lens in enumerate(self._transferred):
                for translator in range(n_layers):
                    for layer, hidden in enumerate(states):
                        logits = self._logits(lens, translator, hidden[part])
                        found, _ = self._figures(logits, *model, OF_TRANSFER)
                        sums = found.double().cpu() @ in_block[:, part].mT
                        transfer[:, translator, layer, column] += sums
        return figures.cpu().unflatten(-1, scored.shape), transfer

    def _logits(self, lens: Lens, layer: int, hidden: Tensor) -> Float[Tensor, "tokens vocab"]:
        """Up to one constant per position; in the buffer."""
        logits, (norm, weight, bias) = self._buffer(len(hidden)), self._parts
        if not isinstance(lens, ResidualLens):
            return logits.copy_(lens(hidden, layer))
        normed = norm(lens.transform_hidden(hidden, layer).to(weight.dtype))
        torch.mm(normed, weight.T, out=logits)
        return logits if bias is None else logits.add_(bias)

    def _buffer(self, tokens: int) -> Float[Tensor, "tokens vocab"]:
        """The same memory every time: on a CPU, new memory costs as much as the softmax."""
        if len(self._memory) < tokens:
            self._memory = self._parts[1].new_empty(tokens, len(self._parts[1]))
        return self._memory[:tokens]


def _figures(
    logits: Float[Tensor, "tokens vocab"],
    model_probs: Float[Tensor, "tokens vocab"],
    model_log_probs: Float[Tensor, "tokens vocab"],
    model_top1: Int[Tensor, " tokens"],
    next_ids: Int[Tensor, " tokens"],
    names: tuple[str, ...],
) -> tuple[Float[Tensor, "metrics tokens"], Float[Tensor, " tokens"]]:
    """The figures of these names at every position; turns logits into weights.

    Probabilities are weights over their total, which is returned as well. The standard
    figures take one exponential for each logit: log q is the logit, less the largest, less the
    logarithm of the total, which is one number for all of a position.
    """
    shifted = logits - logits.amax(-1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(-1)
    log_total = total.log()
    found = {
        "kl_nats": (model_probs * (model_log_probs - shifted)).sum(-1) + log_total,
        "cross_entropy_nats": log_total - shifted.gather(-1, next_ids[:, None])[:, 0],
    }
    if "entropy_nats" in names:
        model_rank = metrics.rank(shifted, model_top1)
        next_rank = metrics.rank(shifted, next_ids)
        found |= {
            "entropy_nats": log_total - (weights * shifted).sum(-1) / total,
            "top1_agreement": (model_rank == 1).float(),
            "top10_agreement": (model_rank <= 10).float(),
            "accuracy": (next_rank == 1).float(),
        }
    if "js_nats" in names:
        log_probs = shifted - log_total[:, None]
        found |= {
            "reverse_kl_nats": metrics.kl_from_log_probs(
                log_probs.exp(), log_probs, model_log_probs
            ),
            "js_nats": metrics.js_divergence(log_probs, model_log_probs),
            "reciprocal_rank": 1 / next_rank.float(),
            "model_top1_rank": model_rank.float(),
            "confidence": 1 / total,
        }
    logits.copy_(weights)
    return torch.stack([found[name] for name in names]), total
