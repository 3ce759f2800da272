"""The results of an evaluation, in memory and in `metrics.json`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Self

from tunedlens.errors import InputError
from tunedlens.evaluation.estimates import Estimate
from tunedlens.files import JsonObject
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
    """None for the mean over the lens's layers, or for a metric of the lens as a whole."""
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
    """None for the mean over the layers that both lenses have."""
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


def name_on(lens: str, title: str) -> str:
    """What results call a lens, or the model itself, on a second model."""
    return f"{lens} on {title}"


Grids = dict[str, dict[str, Grid]]
"""Grids by lens and metric."""


class EvaluationProvenance(Provenance, total=False):
    """What produced an evaluation."""

    lenses: dict[str, JsonObject]
    """What each lens was made from: a saved file, or a text for a baseline."""
    corpus: Mapping[str, object]
    """The description of the scored text, or of each side of the split if both are scored."""
    beside: JsonObject
    """The second model: its `title` in results, `model`, `revision`, `fingerprint`."""
    config: JsonObject
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
    sites: dict[str, str] = field(default_factory=dict)
    """The site of every lens that reads another one than the stream between blocks, by name."""
    beside: dict[str, str] = field(default_factory=dict)
    """The title of the second model by the name of every lens that was scored on it."""
    differences: list[Difference] = field(default_factory=list)
    """Every lens minus each one before it on the same model."""
    by_position: Grids = field(default_factory=dict)
    """Rows are layers, columns are positions in the block."""
    transfer: Grids = field(default_factory=dict)
    """Rows are translators, columns are the layers at which they are applied."""
    provenance: EvaluationProvenance = field(default_factory=EvaluationProvenance)

    _repr_html_: ClassVar[Callable[..., str]]
    """See `tunedlens.report.notebook`."""

    def __repr__(self) -> str:
        return (
            f"Evaluation(lenses: {', '.join(self.lenses)}; {self.n_layers} layers, "
            f"{self.tokens:,} positions)"
        )

    @property
    def lenses(self) -> list[str]:
        """Names of the lenses, in the order in which they were given."""
        models = self.models
        return list(dict.fromkeys(r.lens for r in self.results if r.lens not in models))

    @property
    def models(self) -> dict[str, str | None]:
        """The title of every model, None for the first, by what results call the model itself."""
        seconds = dict.fromkeys(self.beside.values())
        return {MODEL: None} | {name_on(MODEL, title): title for title in seconds}

    def lenses_on(self, title: str | None = None) -> list[str]:
        """Names of the lenses on the first model, or on the one with this title."""
        return [lens for lens in self.lenses if self.beside.get(lens) == title]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that every lens has at each of its layers."""
        models = self.models
        of_layers = (r for r in self.results if r.lens not in models and r.layer is not None)
        return list(dict.fromkeys(r.metric for r in of_layers))

    @property
    def layers(self) -> list[int]:
        """The layers at which any lens was scored."""
        return sorted({layer for lens in self.lenses for layer in self.layers_of(lens)})

    def layers_of(self, lens: str) -> list[int]:
        """The layers at which a lens was scored: those of its translators."""
        kl = {r.layer for r in self.results if (r.lens, r.metric) == (lens, "kl_nats")}
        return [layer for layer in range(self.n_layers) if layer in kl]

    def by_layer(self, lens: str, metric: str) -> list[Estimate]:
        """A metric at each of `layers_of(lens)` (and last at n, for prediction depth)."""
        return self._results(lens, metric, range(self.n_layers + 1))

    def of_model(self, metric: str, name: str = MODEL) -> Estimate:
        """A metric of the model itself, or of another one of `models`."""
        return self._results(name, metric, [self.n_layers])[0]

    def of_lens(self, lens: str, metric: str) -> Estimate:
        """The mean of a metric over the lens's layers, or a metric of the lens as a whole."""
        return self._results(lens, metric, [None])[0]

    def shared_layers(self, lens: str, other: str) -> list[int]:
        """The layers at which both lenses were scored."""
        others = self.layers_of(other)
        return [layer for layer in self.layers_of(lens) if layer in others]

    def difference(self, lens: str, other: str, metric: str) -> list[Estimate]:
        """A metric of one lens minus that of another, at every layer that both have."""
        return self._differences(lens, other, metric, range(self.n_layers))

    def mean_difference(self, lens: str, other: str, metric: str) -> Estimate:
        """The mean of that difference over the layers that both lenses have."""
        return self._differences(lens, other, metric, [None])[0]

    def _results(self, lens: str, metric: str, layers: Iterable[int | None]) -> list[Estimate]:
        found = {
            r.layer: Estimate(r.value, r.standard_error)
            for r in self.results
            if (r.lens, r.metric) == (lens, metric)
        }
        return _at(layers, found, f"{metric} of {lens}")

    def _differences(
        self, lens: str, other: str, metric: str, layers: Iterable[int | None]
    ) -> list[Estimate]:
        found = {
            d.layer: Estimate(d.value if d.lens == lens else -d.value, d.standard_error)
            for d in self.differences
            if d.metric == metric and (d.lens, d.other) in ((lens, other), (other, lens))
        }
        return _at(layers, found, f"difference of {lens} and {other} in {metric}")

    def to_json(self) -> dict[str, object]:
        """The content of `metrics.json`."""
        return {"schema": SCHEMA} | asdict(self)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """The inverse of `to_json`.

        Raises:
            InputError: the data is not an evaluation of this schema.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            schema = data.get("schema") if isinstance(data, dict) else None
            raise InputError(
                f"expected an evaluation of schema {SCHEMA}, got {schema}; run evaluate.py again"
            )
        try:
            fields = {name: value for name, value in data.items() if name != "schema"}
            fields["results"] = [Result(**one) for one in data["results"]]
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
                if count != len(self.layers_of(lens)) + (metric == "prediction_depth"):
                    raise ValueError(f"{metric} of {lens} has {count} layers")


def _at(
    layers: Iterable[int | None], found: Mapping[int | None, Estimate], what: str
) -> list[Estimate]:
    """The estimates at these layers, as far as they exist."""
    selected = [found[layer] for layer in layers if layer in found]
    if not selected:
        raise InputError(f"these results have no {what}")
    return selected
