"""A corpus in, figures for every lens and layer out."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Self

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens import metrics
from tunedlens.errors import InputError
from tunedlens.frozen import FrozenModel, Unembedding
from tunedlens.lens import Lens
from tunedlens.metrics import Estimate, RatioSums
from tunedlens.objective import chunk_tokens

PER_TOKEN = ("kl_nats", "cross_entropy_nats", "top1_agreement")
MODEL = "model"
"""In results, the name of the model itself beside the names of the lenses."""


@dataclass(frozen=True)
class Result:
    """One figure."""

    lens: str
    """Name of the lens, or `model`."""
    layer: int
    metric: str
    """One of kl_nats, cross_entropy_nats, perplexity, bits_per_byte, top1_agreement, and
    kl_nats_position_0, the KL at the first position of a block alone."""
    value: float
    standard_error: float | None
    """Clustered by block; None where there is a single block."""


@dataclass(frozen=True)
class Evaluation:
    """What a corpus says of a model and its lenses."""

    results: list[Result]
    n_layers: int
    tokens: int
    """Positions that were scored, the same for every figure."""
    text_bytes: int
    """Bytes of text that the predicted tokens stand for."""
    blocks: int
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the figures come from: model, corpus, versions, command."""

    @property
    def lenses(self) -> list[str]:
        """Names of the lenses, in the order in which they were given."""
        return list(dict.fromkeys(r.lens for r in self.results if r.lens != MODEL))

    def by_layer(self, lens: str, metric: str) -> list[Estimate]:
        """One figure for every layer from 0 to n - 1."""
        found = {r.layer: r for r in self.results if (r.lens, r.metric) == (lens, metric)}
        return [
            Estimate(found[layer].value, found[layer].standard_error)
            for layer in range(self.n_layers)
        ]

    def of_model(self, metric: str) -> Estimate:
        """The model's own figure."""
        (found,) = [r for r in self.results if (r.lens, r.metric) == (MODEL, metric)]
        return Estimate(found.value, found.standard_error)

    def to_json(self) -> dict[str, Any]:
        """As `metrics.json` holds it."""
        return {"schema": 1} | asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        fields = {name: value for name, value in data.items() if name != "schema"}
        return cls(**fields | {"results": [Result(**result) for result in data["results"]]})


def evaluate(
    model: FrozenModel,
    lenses: Mapping[str, Lens],
    blocks: Iterable[Int[Tensor, " seq"]],
    token_bytes: Int[Tensor, " vocab"],
    *,
    tokens: int | None = None,
    batch_size: int = 8,
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
        accelerator: adds up the shares of several processes.
        progress: told how many positions were just scored.

    Raises:
        InputError: there is nothing to score, or a figure is not finite.
    """
    names = list(lenses)
    shape = (len(names), model.identity.n_layers)
    sums = {name: RatioSums(*shape) for name in (*PER_TOKEN, "kl_nats_position_0", "bits_per_byte")}
    own = {name: RatioSums() for name in ("cross_entropy_nats", "bits_per_byte")}
    unembedding = model.unembedding.centred()
    share = _share(blocks, tokens, accelerator)
    while batch := list(islice(share, batch_size)):
        input_ids = torch.stack([block for block, _ in batch]).to(model.device)
        counts = torch.tensor([count for _, count in batch])
        scored = (torch.arange(input_ids.shape[1] - 1) < counts[:, None]).double()
        text_bytes = (token_bytes[input_ids[:, 1:].cpu()] * scored).sum(-1)
        figures, model_nats = _score(model, list(lenses.values()), unembedding, input_ids)
        for name in PER_TOKEN:
            sums[name].add((figures[name] * scored).sum(-1), counts)
        sums["kl_nats_position_0"].add(figures["kl_nats"][..., 0], scored[:, 0])
        bits = (figures["cross_entropy_nats"] * scored).sum(-1) / math.log(2)
        sums["bits_per_byte"].add(bits, text_bytes)
        nats = (model_nats * scored).sum(-1)
        own["cross_entropy_nats"].add(nats, counts)
        own["bits_per_byte"].add(nats / math.log(2), text_bytes)
        if progress is not None:
            progress(int(counts.sum()))
    if accelerator is not None and accelerator.num_processes > 1:
        for part in (*sums.values(), *own.values()):
            moments = part.moments.to(accelerator.device)
            part.moments = accelerator.reduce(moments, "sum").cpu()
    _, scored_tokens, *_, scored_blocks = own["cross_entropy_nats"].moments.tolist()
    scored_bytes = round(float(own["bits_per_byte"].moments[1]))
    if not scored_tokens or not scored_bytes:
        raise InputError(
            f"there is nothing to score: {scored_tokens:.0f} tokens for {scored_bytes} bytes of "
            "text; give more text or --tokens, or a smaller --seq-len"
        )
    return Evaluation(
        results=_results(names, model.identity.n_layers, sums, own),
        n_layers=model.identity.n_layers,
        tokens=round(scored_tokens),
        text_bytes=scored_bytes,
        blocks=round(scored_blocks),
    )


def _share(
    blocks: Iterable[Int[Tensor, " seq"]], tokens: int | None, accelerator: Accelerator | None
) -> Iterator[tuple[Int[Tensor, " seq"], int]]:
    """This process's blocks, each with the number of its positions to score."""
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
            yield block, count


@torch.no_grad()
def _score(
    model: FrozenModel, lenses: list[Lens], unembedding: Unembedding, input_ids: Tensor
) -> tuple[
    dict[str, Float[Tensor, "lenses layers batch positions"]], Float[Tensor, "batch positions"]
]:
    """Figures of the lenses, and the model's cross-entropy, at every position.

    Decoded in float32, a chunk of tokens at a time; returned in float64 on the CPU.
    """
    *states, final = (state[:, :-1].flatten(0, 1) for state in model.residual_stream(input_ids))
    next_ids = input_ids[:, 1:].flatten()
    shape = (len(lenses), len(states), len(next_ids))
    figures = {name: torch.empty(shape, device=model.device) for name in PER_TOKEN}
    own = torch.empty(len(next_ids), device=model.device)
    chunk = chunk_tokens(model.identity.vocab_size, model.device)
    for start in range(0, len(next_ids), chunk):
        part = slice(start, start + chunk)
        model_log_probs = metrics.log_probs(unembedding(final[part]))
        model_probs = model_log_probs.exp()
        model_top1 = model_log_probs.argmax(-1)
        own[part] = metrics.cross_entropy(model_log_probs, next_ids[part])
        for row, lens in enumerate(lenses):
            for layer, hidden in enumerate(states):
                translated = lens.transform_hidden(hidden[part], layer)
                lens_log_probs = metrics.log_probs(unembedding(translated))
                at = (row, layer, part)
                figures["kl_nats"][at] = metrics.kl_from_log_probs(
                    model_probs, model_log_probs, lens_log_probs
                )
                figures["cross_entropy_nats"][at] = metrics.cross_entropy(
                    lens_log_probs, next_ids[part]
                )
                figures["top1_agreement"][at] = (lens_log_probs.argmax(-1) == model_top1).float()
    by_block = (len(input_ids), -1)
    return (
        {name: value.cpu().double().unflatten(-1, by_block) for name, value in figures.items()},
        own.cpu().double().view(by_block),
    )


def _results(
    names: list[str], n_layers: int, sums: dict[str, RatioSums], own: dict[str, RatioSums]
) -> list[Result]:
    results = []
    for row, lens in enumerate(names):
        for layer in range(n_layers):
            for metric, part in sums.items():
                estimate = part.estimate(row, layer)
                results.append(Result(lens, layer, metric, *estimate))
                if metric == "cross_entropy_nats":
                    perplexity = metrics.perplexity(estimate)
                    results.append(Result(lens, layer, "perplexity", *perplexity))
    for metric, part in own.items():
        results.append(Result(MODEL, n_layers, metric, *part.estimate()))
    perplexity = metrics.perplexity(own["cross_entropy_nats"].estimate())
    results.append(Result(MODEL, n_layers, "perplexity", *perplexity))
    for result in results:
        if not math.isfinite(result.value):
            raise InputError(
                f"{result.metric} of {result.lens} at layer {result.layer} is {result.value}; "
                "where it is being trained, a smaller --lr may help"
            )
    return results
