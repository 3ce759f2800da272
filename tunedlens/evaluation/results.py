"""What an evaluation says, in memory and in `metrics.json`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from tunedlens.errors import InputError
from tunedlens.evaluation.estimates import Estimate
from tunedlens.metrics import METRICS

SCHEMA = 2
MODEL = "model"
"""In results, the name of the model itself beside the names of the lenses."""


@dataclass(frozen=True)
class Result:
    """One figure."""

    lens: str
    """Name of the lens, or `model`."""
    layer: int | None
    """None for the mean over layers, or what belongs to a lens as a whole."""
    metric: str
    """One of `metrics.METRICS`."""
    value: float
    standard_error: float | None
    """Clustered by block; None where there is a single block."""


@dataclass(frozen=True)
class Difference:
    """One figure of a lens less that of another, on the same tokens."""

    lens: str
    other: str
    layer: int | None
    """None for the mean over layers."""
    metric: str
    value: float
    standard_error: float | None
    """Of the difference: what both lenses find hard or easy has no part in it."""


@dataclass(frozen=True)
class Grid:
    """Figures by layer and position, or by translator and layer."""

    values: list[list[float | None]]
    """None where nothing was scored."""
    standard_errors: list[list[float | None]]


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
    tokens_sha256: str = ""
    """Of the token ids (int32) that were scored, block by block."""
    constant: list[str] = field(default_factory=list)
    """Names of the lenses that say the same at every layer, whatever the state."""
    differences: list[Difference] = field(default_factory=list)
    """Every lens against every one before it."""
    by_position: dict[str, dict[str, Grid]] = field(default_factory=dict)
    """By lens and metric: rows are layers, columns positions in the block."""
    transfer: dict[str, dict[str, Grid]] = field(default_factory=dict)
    """By lens and metric: rows are translators, columns the layers they are used at."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the figures come from: model, corpus, versions, command."""

    @property
    def lenses(self) -> list[str]:
        """Names of the lenses, in the order in which they were given."""
        return list(dict.fromkeys(r.lens for r in self.results if r.lens != MODEL))

    @property
    def metrics(self) -> list[str]:
        """Names of the figures that there are for every lens and layer."""
        return list(
            dict.fromkeys(r.metric for r in self.results if r.lens != MODEL and r.layer == 0)
        )

    def by_layer(self, lens: str, metric: str) -> list[Estimate]:
        """One figure for every layer, from 0 to n - 1 (n for prediction depth)."""
        found = {
            r.layer: Estimate(r.value, r.standard_error)
            for r in self.results
            if (r.lens, r.metric) == (lens, metric) and r.layer is not None
        }
        if not found:
            raise InputError(f"there is no {metric} of {lens} in these results")
        return [found[layer] for layer in sorted(found)]

    def of_model(self, metric: str) -> Estimate:
        """The model's own figure."""
        return self._single(MODEL, metric, self.n_layers)

    def of_lens(self, lens: str, metric: str) -> Estimate:
        """The mean of a figure over layers, or one that belongs to a lens as a whole."""
        return self._single(lens, metric, None)

    def difference(self, lens: str, other: str, metric: str) -> list[Estimate]:
        """One lens less another, for every layer."""
        return self._difference(lens, other, metric, lambda layer: layer is not None)

    def mean_difference(self, lens: str, other: str, metric: str) -> Estimate:
        """One lens less another, in the mean over layers."""
        return self._difference(lens, other, metric, lambda layer: layer is None)[0]

    def _difference(
        self, lens: str, other: str, metric: str, wanted: Callable[[int | None], bool]
    ) -> list[Estimate]:
        for sign, pair in ((1.0, (lens, other)), (-1.0, (other, lens))):
            found = [
                Estimate(sign * d.value, d.standard_error)
                for d in self.differences
                if (d.lens, d.other, d.metric) == (*pair, metric) and wanted(d.layer)
            ]
            if found:
                return found
        raise InputError(f"there is no difference of {lens} and {other} in {metric}")

    def _single(self, lens: str, metric: str, layer: int | None) -> Estimate:
        for r in self.results:
            if (r.lens, r.metric, r.layer) == (lens, metric, layer):
                return Estimate(r.value, r.standard_error)
        raise InputError(f"there is no {metric} of {lens} in these results")

    def to_json(self) -> dict[str, Any]:
        """As `metrics.json` holds it."""
        return {"schema": SCHEMA} | asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            InputError: it is no evaluation, or one of another schema.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else None
            raise InputError(
                f"expected an evaluation of schema {SCHEMA}, got {found}; run evaluate.py again"
            )
        try:
            fields = {name: value for name, value in data.items() if name != "schema"}
            grids = {
                part: {
                    lens: {metric: Grid(**grid) for metric, grid in figures.items()}
                    for lens, figures in data[part].items()
                }
                for part in ("by_position", "transfer")
            }
            results = [Result(**result) for result in data["results"]]
            differences = [Difference(**difference) for difference in data["differences"]]
            found = cls(**fields | grids | {"results": results, "differences": differences})
            found._require_whole()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the evaluation is damaged: {error}") from error
        return found

    def _require_whole(self) -> None:
        if not self.lenses:
            raise ValueError("it has no lens")
        for metric in self.metrics:
            if metric not in METRICS:
                raise ValueError(f"nothing is known of {metric}")
            for lens in self.lenses:
                count = len(self.by_layer(lens, metric))
                if count != self.n_layers + (metric == "prediction_depth"):
                    raise ValueError(f"{metric} of {lens} has {count} layers")
