"""What an evaluation says, in memory and in `metrics.json`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self, TypedDict

from tunedlens.errors import InputError
from tunedlens.evaluation.estimates import Estimate
from tunedlens.metrics import METRICS
from tunedlens.provenance import Provenance

SCHEMA = 2
MODEL = "model"
"""In results, the name of the model itself beside the names of the lenses."""


@dataclass(frozen=True)
class Result:
    """The value of one metric."""

    lens: str
    """Name of the lens, or `model`."""
    layer: int | None
    """None for the mean over layers, or for a metric of the lens as a whole."""
    metric: str
    """One of `metrics.METRICS`."""
    value: float
    standard_error: float | None
    """Clustered by block; None if there is a single block."""


@dataclass(frozen=True)
class Difference:
    """The value of one metric for `lens`, minus that for `other`, on the same tokens."""

    lens: str
    other: str
    layer: int | None
    """None for the mean over layers."""
    metric: str
    value: float
    standard_error: float | None
    """Of the paired difference: variation that both lenses share cancels."""


@dataclass(frozen=True)
class Grid:
    """One metric by layer and position, or by translator and layer."""

    values: list[list[float | None]]
    """None where nothing was scored."""
    standard_errors: list[list[float | None]]


Grids = dict[str, dict[str, Grid]]
"""Grids by lens and metric."""


class LensSource(TypedDict, total=False):
    """What a lens was made from: a saved file, or a text for a baseline."""

    folder: str
    sha256: str
    kind: str
    text: Mapping[str, object]
    tokens_at_most: int


class EvaluationProvenance(Provenance, total=False):
    """What produced an evaluation."""

    lenses: dict[str, LensSource]
    corpus: Mapping[str, object]
    """The description of the scored text, or of each side of the split if both are scored."""
    config: Mapping[str, Any]
    """The `EvaluateConfig` with all defaults filled in."""
    processes: int


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model and its lenses on a corpus."""

    results: list[Result]
    n_layers: int
    tokens: int
    """Scored positions, the same for every metric."""
    text_bytes: int
    """Bytes of text that the predicted tokens stand for."""
    blocks: int
    tokens_sha256: str = ""
    """Hash of the token ids (int32) of the scored blocks."""
    constant: list[str] = field(default_factory=list)
    """Names of the lenses that have the same distribution at every layer and position."""
    differences: list[Difference] = field(default_factory=list)
    """Every lens minus each one before it."""
    by_position: Grids = field(default_factory=dict)
    """Rows are layers, columns are positions in the block."""
    transfer: Grids = field(default_factory=dict)
    """Rows are translators, columns are the layers at which they are applied."""
    provenance: EvaluationProvenance = field(default_factory=EvaluationProvenance)

    @property
    def lenses(self) -> list[str]:
        """Names of the lenses, in the order in which they were given."""
        return list(dict.fromkeys(r.lens for r in self.results if r.lens != MODEL))

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that every lens has at every layer."""
        return list(
            dict.fromkeys(r.metric for r in self.results if r.lens != MODEL and r.layer == 0)
        )

    def by_layer(self, lens: str, metric: str) -> list[Estimate]:
        """A metric at every layer from 0 to n - 1 (to n for prediction depth)."""
        found = {r.layer: r for r in self._results(lens, metric) if r.layer is not None}
        if not found:
            raise InputError(f"these results have no {metric} of {lens}")
        return [_estimate(found[layer]) for layer in sorted(found)]

    def of_model(self, metric: str) -> Estimate:
        """A metric of the model itself."""
        return self._single(MODEL, metric, self.n_layers)

    def of_lens(self, lens: str, metric: str) -> Estimate:
        """The mean of a metric over layers, or a metric of the lens as a whole."""
        return self._single(lens, metric, None)

    def difference(self, lens: str, other: str, metric: str) -> list[Estimate]:
        """A metric of one lens minus that of another, at every layer."""
        found = self._differences(lens, other, metric)
        return [found[layer] for layer in found if layer is not None]

    def mean_difference(self, lens: str, other: str, metric: str) -> Estimate:
        """The mean over layers of a metric of one lens minus that of another."""
        return self._differences(lens, other, metric)[None]

    def _differences(self, lens: str, other: str, metric: str) -> dict[int | None, Estimate]:
        for sign, pair in ((1.0, (lens, other)), (-1.0, (other, lens))):
            found = {
                d.layer: Estimate(sign * d.value, d.standard_error)
                for d in self.differences
                if (d.lens, d.other, d.metric) == (*pair, metric)
            }
            if found:
                return found
        raise InputError(f"these results have no difference of {lens} and {other} in {metric}")

    def _results(self, lens: str, metric: str) -> list[Result]:
        return [r for r in self.results if (r.lens, r.metric) == (lens, metric)]

    def _single(self, lens: str, metric: str, layer: int | None) -> Estimate:
        for result in self._results(lens, metric):
            if result.layer == layer:
                return _estimate(result)
        raise InputError(f"these results have no {metric} of {lens}")

    def to_json(self) -> dict[str, object]:
        """The content of `metrics.json`."""
        return {"schema": SCHEMA} | asdict(self)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """The inverse of `to_json`.

        Raises:
            InputError: it is no evaluation, or one of another schema.
        """
        schema = data.get("schema") if isinstance(data, dict) else None
        if not isinstance(data, dict) or schema != SCHEMA:
            raise InputError(
                f"expected an evaluation of schema {SCHEMA}, got {schema}; run evaluate.py again"
            )
        try:
            fields = {name: value for name, value in data.items() if name != "schema"}
            fields["results"] = [Result(**result) for result in data["results"]]
            fields["differences"] = [Difference(**one) for one in data["differences"]]
            for part in ("by_position", "transfer"):
                fields[part] = {
                    lens: {metric: Grid(**grid) for metric, grid in grids.items()}
                    for lens, grids in data[part].items()
                }
            evaluation = cls(**fields)
            evaluation._require_complete()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the evaluation is damaged: {error}") from error
        return evaluation

    def _require_complete(self) -> None:
        if not self.lenses:
            raise ValueError("it has no lens")
        for metric in self.metrics:
            if metric not in METRICS:
                raise ValueError(f"the metric {metric} is unknown")
            for lens in self.lenses:
                count = len(self.by_layer(lens, metric))
                if count != self.n_layers + (metric == "prediction_depth"):
                    raise ValueError(f"{metric} of {lens} has {count} layers")


def _estimate(result: Result) -> Estimate:
    return Estimate(result.value, result.standard_error)
