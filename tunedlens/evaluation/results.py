"""The results of an evaluation, in memory and in `metrics.json`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Self, TypedDict

from tunedlens.errors import InputError
from tunedlens.evaluation.estimates import Estimate
from tunedlens.files import JsonObject, as_type, require_lens_name
from tunedlens.metrics import METRICS
from tunedlens.model.sites import SITES
from tunedlens.provenance import Provenance

SCHEMA = 2
MODEL = "model"
"""The name of the model itself in results."""


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
    """The error of the paired difference, in which variation that both lenses share cancels."""


@dataclass(frozen=True)
class Grid:
    """One metric by layer and position, or by translator and layer."""

    values: list[list[float | None]]
    """None where nothing was scored."""
    standard_errors: list[list[float | None]]

    @property
    def shapes(self) -> list[list[int]]:
        """The lengths of the rows, of the values and of the errors."""
        return [[len(row) for row in part] for part in (self.values, self.standard_errors)]


def name_on(lens: str, title: str) -> str:
    """The name in results of a lens, or of the model itself, on a second model."""
    return f"{lens} on {title}"


Grids = dict[str, dict[str, Grid]]
"""Grids by lens and metric."""


class _ScoredText(TypedDict, total=False):
    dataset: str | None


class _Settings(TypedDict, total=False):
    """The settings that tables show."""

    model: JsonObject
    corpus: _ScoredText
    split: str | None


class _Text(TypedDict, total=False):
    """What a report says of a text."""

    dataset: str
    documents: int
    bytes: int
    tokens: int
    blocks: int
    dropped_tokens: int


class _Source(TypedDict, total=False):
    """What a report says of a lens."""

    folder: str
    hub: str
    sha256: str
    text: _Text
    tokens_at_most: int


class _Second(TypedDict):
    title: str
    name: str
    fingerprint: str


class EvaluationProvenance(Provenance, total=False):
    """The record of how an evaluation was made."""

    lenses: dict[str, JsonObject]
    """The origin of each lens: a saved file, or a text for a baseline."""
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
    """The number of bytes of text that the predicted tokens represent."""
    blocks: int
    tokens_sha256: str = ""
    """Hash of the token ids (int32) of the scored blocks."""
    constant: list[str] = field(default_factory=list)
    """Names of the lenses that have the same distribution at every layer and position."""
    sites: dict[str, str] = field(default_factory=dict)
    """By lens: the site that it reads, if that is not the stream between blocks."""
    beside: dict[str, str] = field(default_factory=dict)
    """By lens: the title of the second model, for lenses that were scored on it."""
    differences: list[Difference] = field(default_factory=list)
    """Each lens minus every earlier lens on the same model."""
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
        """The names of the lenses, in the order in which they were given."""
        models = self.models
        return list(dict.fromkeys(r.lens for r in self.results if r.lens not in models))

    @property
    def models(self) -> dict[str, str | None]:
        """By the name of each model in the results: its title, None for the first model."""
        seconds = dict.fromkeys(self.beside.values())
        return {MODEL: None} | {name_on(MODEL, title): title for title in seconds}

    def lenses_on(self, title: str | None = None) -> list[str]:
        """The names of the lenses on the first model, or on the model with this title."""
        return [lens for lens in self.lenses if self.beside.get(lens) == title]

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics that every lens has at each of its layers."""
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
        """A metric at each of `layers_of(lens)`; prediction depth also has layer n, at the end."""
        return self._results(lens, metric, range(self.n_layers + 1))

    def of_model(self, metric: str, name: str = MODEL) -> Estimate:
        """A metric of the model itself, or of another model in `models`."""
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
        """The mean of `difference` over the layers that both lenses have."""
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
                f"expected an evaluation of schema {SCHEMA}, got {schema}; evaluate again"
            )
        fields = {name: value for name, value in data.items() if name != "schema"}
        evaluation = as_type(cls, fields, "the evaluation")
        try:
            evaluation._require_complete()
        except InputError as error:
            raise InputError(f"the evaluation is damaged: {error}") from error
        return evaluation

    def _require_complete(self) -> None:
        """Check that the data for tables and plots is present and valid.

        Raises:
            InputError: something is missing or invalid.
        """
        run = self.provenance
        as_type(_Settings, run.get("config", {}), "its config")
        as_type(dict[str, _Source], run.get("lenses", {}), "its lenses")
        corpus = run.get("corpus", {})
        sides = {"": corpus} if "dataset" in corpus else corpus
        as_type(dict[str, _Text], sides, "its corpus")
        if "beside" in run:
            as_type(_Second, run["beside"], "its second model")
            _require("model" in run and "fingerprint" in run, "it does not name the first model")
        _require(0 < self.n_layers <= len(self.results), f"it cannot have {self.n_layers} layers")
        _require(min(self.tokens, self.text_bytes, self.blocks) >= 0, "a count is below 0")
        errors = [one.standard_error for one in self.results]
        errors += [one.standard_error for one in self.differences]
        _require(min(error or 0.0 for error in errors) >= 0, "a standard error is below 0")
        _require("kl_nats" in self.metrics, "it has no lens with a KL")
        for metric in self.metrics:
            _require(metric in METRICS, f"the metric {metric} is unknown")
        for metric in ("perplexity", "bits_per_byte") if self.text_bytes else ("perplexity",):
            for name in self.models:
                self.of_model(metric, name)
        for lens in self.lenses:
            self._require_complete_lens(lens)
        for pair in dict.fromkeys((d.lens, d.other) for d in self.differences):
            self.mean_difference(*pair, "kl_nats")
            count = len(self.difference(*pair, "kl_nats"))
            is_right = count == len(self.shared_layers(*pair))
            _require(is_right, f"{' − '.join(pair)} has {count} layers")
        _require(self.beside.keys() <= set(self.lenses), "a lens on the second model is missing")
        for lens, site in self.sites.items():
            _require(lens in self.lenses and site in SITES, f"the site of {lens} is wrong")
        for grids in (self.by_position, self.transfer):
            for lens, measured in grids.items():
                is_model = lens in self.models
                rows = 1 if is_model else self.n_layers
                _require(is_model or lens in self.lenses, f"it has grids of {lens} only")
                _require(is_model or "kl_nats" in measured, f"{lens} has no grid of its KL")
                for metric, grid in measured.items():
                    columns = rows if grids is self.transfer else len(next(iter(grid.values), []))
                    is_right = columns > 0 and grid.shapes == 2 * [[columns] * rows]
                    _require(is_right, f"{metric} of {lens} is not by {self.n_layers} layers")

    def _require_complete_lens(self, lens: str) -> None:
        require_lens_name(lens)
        self.of_lens(lens, "kl_nats")
        if lens not in self.constant:
            self.of_lens(lens, "mean_prediction_depth")
        for metric in self.metrics:
            count = len(self.by_layer(lens, metric))
            is_right = count == len(self.layers_of(lens)) + (metric == "prediction_depth")
            _require(is_right, f"{metric} of {lens} has {count} layers")


def _require(is_true: bool, reason: str) -> None:
    if not is_true:
        raise InputError(reason)


def _at(
    layers: Iterable[int | None], found: Mapping[int | None, Estimate], what: str
) -> list[Estimate]:
    """The estimates at these layers, as far as they exist."""
    selected = [found[layer] for layer in layers if layer in found]
    if not selected:
        raise InputError(f"these results have no {what}")
    return selected
