"""Detects texts with unusual trajectories. A detector is fitted on trajectories of normal texts.

The features of a text are the values of a metric at every row of its trajectory, from the first
layer to the last. `features` reduces the positions of a text to one number per row.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.files import as_type, read_json, write_json
from tunedlens.metrics import full_name
from tunedlens.trajectories import Trajectory

Method = Literal["mahalanobis", "isolation-forest", "local-outlier-factor"]
Positions = Literal["mean", "last"]
METRICS = ("kl_nats", "entropy_nats", "cross_entropy_nats", "rank")
"""The metrics that can be features. `rank` is the rank of the model's most probable token."""
_ZERO_FOR_MODEL = ("kl_nats", "rank")
"""The metrics that are the same at the model's row of every text."""
FORMAT = 1

Scorer = Callable[[Float[Tensor, "texts rows"]], list[float]]
"""Features to scores."""


class AUROC(NamedTuple):
    """The area under the ROC curve with a bootstrap interval."""

    value: float
    low: float
    high: float


def features(
    trajectory: Trajectory,
    metric: str = "kl",
    *,
    lens: str | None = None,
    positions: Positions = "mean",
) -> Float[Tensor, " rows"]:
    """One number per row of a trajectory.

    For entropy and cross-entropy, the model's own row is included; for other metrics it is the
    same in all texts. Ranks are replaced by their logarithms, because they span several orders of
    magnitude.

    Args:
        metric: one of `METRICS`, or its short name.
        lens: the name of a lens; by default the first.
        positions: `mean` averages over the positions of the text. The mean depends little on the
            length of the text, but an anomaly at a few positions changes it little. `last` takes
            the last position, whose state depends on the whole text but is noisier. The
            cross-entropy has no value at the last position, so `last` takes the one before it.

    Raises:
        InputError: there is no such metric or lens, `positions` is neither, or no position has a
            value.
    """
    metric = full_name(metric)
    if metric not in METRICS:
        raise InputError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    if positions not in get_args(Positions):
        raise InputError(f"positions must be mean or last, got {positions!r}")
    values = trajectory.values(metric, lens).double()
    values = values.log() if metric == "rank" else values
    values = values[:-1] if metric in _ZERO_FOR_MODEL else values
    values = values[:, ~values.isnan().any(0)]
    if not values.shape[1]:
        raise InputError(f"{trajectory!r} has no position with a {metric}; give a longer text")
    return values.mean(1) if positions == "mean" else values[:, -1]


@dataclass(frozen=True)
class Detector:
    """Scores how much the trajectory of a text differs from those of normal texts.

    `fit` makes a detector. It is plain data: the features of the normal texts.
    """

    model: str
    """The name of the model that read the texts."""
    lens: str
    rows: list[str]
    """The rows of the trajectories, such as `3.resid_pre`."""
    metric: str
    positions: Positions
    method: Method
    normal: list[list[float]]
    """The features of the normal texts."""
    seed: int = 0
    """The seed of the isolation forest."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise InputError(
                f"method must be one of {', '.join(get_args(Method))}; got {self.method!r}"
            )
        if len(self.normal) < 3:
            raise InputError(
                f"a detector needs at least three normal texts, and should have a few for each of "
                f"its {len(self.rows)} rows; got {len(self.normal)}"
            )
        if len({len(one) for one in self.normal}) > 1 or not self.normal[0]:
            raise InputError("the normal texts must all have the same number of features")
        if not all(math.isfinite(value) for one in self.normal for value in one):
            raise InputError("a feature of a normal text is not finite")

    def __repr__(self) -> str:
        return (
            f"Detector({self.method} on the {self.metric} of {self.lens} at {len(self.normal[0])} "
            f"rows of {self.model}, {len(self.normal)} normal texts)"
        )

    def score(self, trajectory: Trajectory) -> float:
        """The score of one text. A higher score means a larger difference from normal texts.

        Raises:
            InputError: the model or the layers are not those of the normal texts, or the lens is
                missing.
        """
        return self.scores([trajectory])[0]

    def scores(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """The score of every text."""
        for one in trajectories:
            _require_alike(one, self.model, self.rows)
        found = [
            features(one, self.metric, lens=self.lens, positions=self.positions)
            for one in trajectories
        ]
        return self._scorer(torch.stack(found)) if found else []

    @cached_property
    def _scorer(self) -> Scorer:
        normal = torch.tensor(self.normal, dtype=torch.float64)
        if self.method == "mahalanobis":
            return _mahalanobis(normal)
        return _of_scikit_learn(normal, self.method, self.seed)

    def save(self, path: str | Path) -> None:
        """Write the detector to a JSON file.

        Raises:
            InputError: the file cannot be written.
        """
        write_json(Path(path), {"format": FORMAT} | asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a saved detector. It is fitted again from the features in the file.

        Raises:
            InputError: there is no such file, or it is damaged or not a detector.
        """
        data = read_json(Path(path))
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise InputError(f"{path} is not a saved detector of format {FORMAT}")
        return as_type(cls, data, str(path))


def fit(
    trajectories: Sequence[Trajectory],
    metric: str = "kl",
    *,
    lens: str | None = None,
    positions: Positions = "mean",
    method: Method = "mahalanobis",
    seed: int = 0,
) -> Detector:
    """Fit a detector on the trajectories of normal texts.

    Args:
        trajectories: trajectories of one model at the same layers.
        metric: see `features`.
        lens: see `features`.
        positions: see `features`.
        method: `mahalanobis` is the distance to the mean of the standardised features, with a
            covariance that is shrunk by the method of Ledoit and Wolf, so there may be fewer texts
            than rows. `isolation-forest` and `local-outlier-factor` need scikit-learn
            (`pip install "residual-lens[anomaly]"`).
        seed: the seed of the isolation forest.

    Raises:
        InputError: there are fewer than three trajectories, they are of different models or layers,
            a setting is unknown, or scikit-learn is missing.

    Source:
        Belrose et al. 2023, arXiv:2303.08112, section 5.2, which detects prompt injection with an
        isolation forest and the local outlier factor on trajectories.
    """
    if not trajectories:
        raise InputError("a detector needs at least three trajectories of normal texts; got none")
    first = trajectories[0]
    rows, lens = _row_names(first), first.lens_name(lens)
    for one in trajectories:
        _require_alike(one, first.model, rows)
    normal = [
        features(one, metric, lens=lens, positions=positions).tolist() for one in trajectories
    ]
    detector = Detector(first.model, lens, rows, full_name(metric), positions, method, normal, seed)
    _ = detector._scorer  # raises an error now if a package is missing
    return detector


def auroc(
    scores: Sequence[float],
    is_anomaly: Sequence[bool],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> AUROC:
    """The probability that an anomaly has a higher score than a normal text; ties count as half.

    The interval is from a percentile bootstrap that draws anomalies and normal texts separately.

    Raises:
        InputError: there are not as many scores as labels, no anomalies or no normal texts, a
            score is NaN, or a setting is out of range.

    Source:
        Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve".
    """
    values = torch.as_tensor(scores, dtype=torch.float64)
    labels = torch.as_tensor(is_anomaly, dtype=torch.bool)
    if values.ndim != 1 or values.shape != labels.shape:
        raise InputError(f"expected a label per score; got {len(values)} and {len(labels)}")
    count = int(labels.sum())
    if not 0 < count < len(labels):
        raise InputError(
            f"the AUROC needs anomalies and normal texts; got {count} anomalies among {len(labels)}"
        )
    if values.isnan().any():
        raise InputError("expected scores that are numbers, got NaN")
    if not 0 < confidence < 1 or resamples < 1:
        raise InputError(
            "confidence must be between 0 and 1 and resamples 1 or more; got "
            f"{confidence} and {resamples}"
        )
    normal, anomalous = values[~labels].sort().values, values[labels]
    ends = [torch.searchsorted(normal, anomalous, side=side) for side in ("left", "right")]
    value = _area(ends, torch.ones(1, len(normal)), torch.ones(1, count))
    generator = torch.Generator().manual_seed(seed)
    drawn = [_drawn(resamples, size, generator) for size in (len(normal), count)]
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = _area(ends, *drawn).quantile(tails).tolist()
    return AUROC(float(value), low, high)


def _area(
    ends: Sequence[Int[Tensor, " anomalies"]],
    normal_weights: Float[Tensor, "samples normal"],
    weights: Float[Tensor, "samples anomalies"],
) -> Float[Tensor, " samples"]:
    """The AUROC of samples of weighted texts.

    Args:
        ends: the number of sorted normal scores below each anomaly's score, and at or below it.
        normal_weights: the weights in the order of the sorted scores.
    """
    below = torch.nn.functional.pad(normal_weights.double().cumsum(1), (1, 0))
    wins = (below[:, ends[0]] + below[:, ends[1]]) / 2
    return (wins * weights).sum(1) / (below[:, -1] * weights.sum(1))


def _drawn(samples: int, count: int, generator: torch.Generator) -> Float[Tensor, "samples texts"]:
    """How often each text is drawn, with replacement."""
    texts = torch.randint(count, (samples, count), generator=generator)
    return torch.zeros(samples, count).scatter_add_(1, texts, torch.ones(samples, count))


def _row_names(trajectory: Trajectory) -> list[str]:
    return [f"{row.layer}.{row.site}" for row in trajectory.rows]


def _require_alike(trajectory: Trajectory, model: str, rows: list[str]) -> None:
    if trajectory.model != model:
        raise InputError(
            f"all trajectories must be of one model: expected {model}, got {trajectory.model}"
        )
    if _row_names(trajectory) != rows:
        raise InputError(
            f"all trajectories must have the same rows: expected {', '.join(rows)}; got "
            f"{', '.join(_row_names(trajectory))}"
        )


def _mahalanobis(normal: Float[Tensor, "texts rows"]) -> Scorer:
    """The distance to the mean, in standard deviations."""
    mean, deviation = normal.mean(0), normal.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    precision = torch.linalg.inv(shrunk_covariance((normal - mean) / deviation))

    def score(features: Float[Tensor, "texts rows"]) -> list[float]:
        standard = (features - mean) / deviation
        return ((standard @ precision) * standard).sum(-1).sqrt().tolist()

    return score


def shrunk_covariance(centred: Float[Tensor, "texts rows"]) -> Float[Tensor, "rows rows"]:
    """The covariance, shrunk towards a multiple of the identity by the estimated best amount.

    Args:
        centred: features with mean 0.

    Source:
        Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance
        matrices".
    """
    texts, rows = centred.shape
    covariance = centred.mT @ centred / texts
    scale = covariance.trace() / rows
    identity = torch.eye(rows, dtype=centred.dtype)
    distance = (covariance - scale * identity).square().sum()
    spread = centred.square().sum(-1).square().sum() / texts - covariance.square().sum()
    # The smallest amount keeps the matrix invertible if rows are copies of each other.
    amount = 1.0 if distance == 0 else float((spread / texts / distance).clamp(1e-6, 1))
    return (1 - amount) * covariance + amount * scale * identity


def _of_scikit_learn(normal: Float[Tensor, "texts rows"], method: Method, seed: int) -> Scorer:
    try:
        from sklearn.ensemble import IsolationForest
        from sklearn.neighbors import LocalOutlierFactor
    except ImportError:
        raise InputError(
            f"{method} needs scikit-learn; install it with: pip install "
            '"residual-lens[anomaly]", or use mahalanobis'
        ) from None
    if method == "isolation-forest":
        detector = IsolationForest(random_state=seed)
    else:
        detector = LocalOutlierFactor(n_neighbors=min(20, len(normal) - 1), novelty=True)
    detector.fit(normal.numpy())
    return lambda features: (-detector.score_samples(features.numpy())).tolist()
