"""Metrics of every lens at every layer, at the positions of one batch."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tunedlens.engine import Decoder, ModelDistribution, chunk_tokens, measure
from tunedlens.errors import InputError
from tunedlens.evaluation.estimates import GROUPS
from tunedlens.lenses import AffineLens, ConstantLens, Lens, ResidualLens
from tunedlens.model import TRANSLATED_SITES, FrozenModel, HookPoint
from tunedlens.tokenizer import TokenBytes

TRANSFER_METRICS = ("kl_nats", "cross_entropy_nats")
"""Metrics of a translator that is applied at another layer."""


class Layout(NamedTuple):
    """The distributions that are computed at every token.

    A column is a lens, in the order given, or last the model. A row is one distribution: a lens at
    a layer, a constant lens (once for all layers), or last the model.
    """

    columns: Mapping[str, tuple[Lens, str]]
    """Lens and site of every column but the last, by name."""
    decodings: list[tuple[Lens | None, HookPoint]]
    """Lens and point of every row; None is the model, at the layer after the last block."""
    rows: Int[Tensor, "layers columns"]
    """The row of every column at every layer; the model's where a lens has no translator."""
    layers: list[list[int]]
    """The layers of every column but the last."""
    transfer_lenses: list[str]
    """Names of the lenses whose translators are applied at every layer."""
    vocab_size: int
    sums_device: torch.device
    """Where sums of distributions are kept."""

    @classmethod
    def of(cls, model: FrozenModel, lenses: Mapping[str, Lens], *, transfer: bool) -> Self:
        """The layout for lenses of a model.

        Raises:
            InputError: the name of a lens is that of another one at one of its sites.
        """
        n_layers, vocab_size = model.identity.n_layers, model.identity.vocab_size
        decodings: list[tuple[Lens | None, HookPoint]] = []
        columns: dict[str, tuple[Lens, str]] = {}
        rows_by_column, layers_by_column = [], []
        for name, lens in lenses.items():
            sites, layers = _points_of(lens, n_layers, lenses.values())
            for site in sites:
                title = name if site == "resid_pre" else f"{name} {site}"
                if title in columns:
                    raise InputError(f"two lenses are called {title}; choose other names")
                columns[title] = lens, site
                read = layers[:1] if isinstance(lens, ConstantLens) else layers
                first, last = len(decodings), len(decodings) + len(read) - 1
                rows = {layer: min(first + i, last) for i, layer in enumerate(layers)}
                rows_by_column.append([rows.get(layer, -1) for layer in range(n_layers)])
                layers_by_column.append(layers)
                decodings += [(lens, HookPoint(site, layer)) for layer in read]
        rows_by_column.append([-1] * n_layers)
        decodings.append((None, HookPoint("resid_pre", n_layers)))
        affine = [
            name
            for name, lens in lenses.items()
            if isinstance(lens, AffineLens) and "resid_pre" in lens.sites
        ]
        # Apple's GPUs have no float64.
        device = torch.device("cpu") if model.device.type == "mps" else model.device
        return cls(
            columns,
            decodings,
            torch.tensor(rows_by_column).T % len(decodings),  # -1 is the model's
            layers_by_column,
            affine if transfer else [],
            vocab_size,
            device,
        )


def _points_of(
    lens: Lens, n_layers: int, lenses: Iterable[Lens]
) -> tuple[Sequence[str], list[int]]:
    """The sites and the layers at which a lens is scored.

    They are those of its translators. A lens without translators is scored where any of the others
    has some, so that the two are compared at the same states.
    """
    if isinstance(lens, AffineLens):
        return lens.sites, list(lens.layers)
    points = {point for other in lenses if isinstance(other, AffineLens) for point in other.points}
    sites = {site for site, _ in points} if isinstance(lens, ResidualLens) else set()
    layers = sorted({layer for _, layer in points}) or list(range(n_layers))
    return [site for site in TRANSLATED_SITES if site in {"resid_pre"} | sites], layers


class Block(NamedTuple):
    """A block of text."""

    ids: Int[Tensor, " seq"]
    scored: int
    """The number of scored positions, from the first on."""
    number: int
    """Counts the blocks of all processes from 0."""


class ScoredBatch(NamedTuple):
    """Measurements of a batch of blocks. All but `probability_sums` are on the CPU."""

    values: dict[str, Float[Tensor, "layers columns batch positions"]]
    """Per-token metrics by name; 0 at positions that are not scored."""
    is_scored: Bool[Tensor, "batch positions"]
    text_bytes: Int[Tensor, "batch positions"]
    """Bytes that each predicted token stands for; 0 at positions that are not scored."""
    groups: Int[Tensor, " batch"]
    """The jackknife's group of every block."""
    probability_sums: Float[Tensor, "groups rows vocab"]
    """Sums over scored positions, for every group of the batch in ascending order."""
    transfer: dict[str, Float[Tensor, "translators layers lenses batch"]]
    """Sums of `TRANSFER_METRICS` over scored positions, by name."""


class Scorer:
    """Measures every distribution of a layout at every position of a batch, in float32."""

    def __init__(self, model: FrozenModel, layout: Layout, metrics: tuple[str, ...]) -> None:
        self._model, self._layout, self._metrics = model, layout, metrics
        self._decoder = Decoder(model.unembedding.centred())
        self._token_bytes = TokenBytes.of(model.tokenizer, layout.vocab_size)

    @torch.no_grad()
    def score(self, blocks: Sequence[Block]) -> ScoredBatch:
        """Run the model on the blocks and measure every lens."""
        layout, device = self._layout, self._model.device
        ids = torch.stack([block.ids for block in blocks])
        counts = torch.tensor([block.scored for block in blocks])
        groups = torch.tensor([block.number % GROUPS for block in blocks])
        is_scored = torch.arange(ids.shape[1] - 1) < counts[:, None]
        mask = is_scored.to(device)
        points = list(dict.fromkeys([point for _, point in layout.decodings]))
        found = self._model.states_at(points, ids.to(device))
        states = {point: state[:, :-1][mask] for point, state in zip(points, found, strict=True)}
        next_ids = ids[:, 1:][is_scored].to(device)
        block_of = is_scored.nonzero()[:, 0]
        in_block = (torch.arange(len(ids))[:, None] == block_of).double()
        in_group = (groups.unique()[:, None] == groups[block_of]).float().to(device)

        n_rows, n_layers = len(layout.decodings), len(layout.rows)
        values = torch.empty(len(self._metrics), n_rows, len(next_ids), device=device)
        probability_sums = torch.zeros(
            *(len(in_group), n_rows, layout.vocab_size),
            dtype=torch.float64,
            device=layout.sums_device,
        )
        transfer = torch.zeros(
            *(len(TRANSFER_METRICS), n_layers, n_layers, len(layout.transfer_lenses), len(ids)),
            dtype=torch.float64,
        )
        size = chunk_tokens(layout.vocab_size, device)
        for part in (slice(start, start + size) for start in range(0, len(next_ids), size)):
            logits = self._decoder.model_logits(states[layout.decodings[-1][1]][part])
            model = ModelDistribution.from_logits(logits)
            for row, (lens, point) in enumerate(layout.decodings):
                logits = self._logits(lens, states[point][part], point.layer, point.site)
                values[:, row, part] = measure(self._metrics, logits, model, next_ids[part])
                probs = logits  # `measure` overwrites the logits
                probability_sums[:, row] += (in_group[:, part] @ probs).to(probability_sums)
            for column, name in enumerate(layout.transfer_lenses):
                lens, _ = layout.columns[name]
                assert isinstance(lens, AffineLens)
                for translator, layer in product(lens.layers, repeat=2):
                    state = states[HookPoint("resid_pre", layer)]
                    logits = self._logits(lens, state[part], translator)
                    measured = measure(TRANSFER_METRICS, logits, model, next_ids[part])
                    sums = measured.cpu().double() @ in_block[:, part].mT
                    transfer[:, translator, layer, column] += sums

        everywhere = torch.zeros(*values.shape[:2], *is_scored.shape, dtype=torch.float64)
        everywhere[:, :, is_scored] = values.cpu().double()
        by_layer = everywhere[:, layout.rows]
        return ScoredBatch(
            dict(zip(self._metrics, by_layer, strict=True)),
            is_scored,
            self._next_bytes(ids) * is_scored,
            groups,
            probability_sums,
            dict(zip(TRANSFER_METRICS, transfer, strict=True)),
        )

    def _next_bytes(self, ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch positions"]:
        """The bytes of text of each next token; 0 where they cannot be known."""
        if self._token_bytes is None:
            return torch.zeros_like(ids[:, 1:])
        return self._token_bytes.next_bytes(ids)

    def _logits(
        self,
        lens: Lens | None,
        hidden: Float[Tensor, "tokens d_model"],
        layer: int,
        site: str = "resid_pre",
    ) -> Float[Tensor, "tokens vocab"]:
        if lens is None:
            return self._decoder.model_logits(hidden)
        return self._decoder.lens_logits(lens, hidden, layer, site)
