"""Comparisons of two lenses, texts or models, as plain data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tunedlens.errors import InputError
from tunedlens.metrics import DIVERGENCES, TRAJECTORY_METRICS, full_name
from tunedlens.trajectories.result import PartKey, Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Comparison:
    """A trajectory and a baseline with the same rows and aligned positions.

    A lens is compared with the lens of the same name in the baseline, or with the baseline's
    first lens. `comparison[layers, positions]` selects a part, as for a `Trajectory`.
    """

    # Bound in `tunedlens/__init__.py`, from `frames`, `storage` and `tunedlens.report`.
    scores: ClassVar[Callable[..., "DataFrame"]]
    save: ClassVar[Callable[..., Path]]
    load: ClassVar[Callable[..., "Comparison"]]
    heatmap: ClassVar[Callable[..., "Figure"]]

    trajectory: Trajectory
    baseline: Trajectory
    divergences: dict[str, dict[str, Float[Tensor, "rows positions"]]]
    """By lens and by the names of `metrics.DIVERGENCES`; empty for a `difference`."""

    def __repr__(self) -> str:
        return f"Comparison({self.trajectory!r}, baseline={self.baseline!r})"

    def __getitem__(self, key: PartKey) -> "Comparison":
        rows, indices = self.trajectory.part_indices(key)
        return Comparison(
            self.trajectory[key],
            self.baseline[key],
            {
                lens: {name: values[rows][:, indices] for name, values in by_name.items()}
                for lens, by_name in self.divergences.items()
            },
        )

    def baseline_lens(self, lens: str | None = None) -> str:
        """The lens of the baseline that a lens is compared with."""
        lens = self.trajectory.lens_name(lens)
        return lens if lens in self.baseline.predictions else self.baseline.lens_name()

    def values(
        self,
        metric: str = "probability",
        lens: str | None = None,
        *,
        token: str | int | None = None,
    ) -> Float[Tensor, "rows positions"]:
        """A difference (first side minus baseline) or a divergence at every row and position.

        Args:
            metric: one of `metrics.TRAJECTORY_METRICS` or `metrics.DIVERGENCES`.
            lens: the name of a lens; by default the first.
            token: as for `Trajectory.values`. `top1` and `next` are each side's own token;
                any other token is the same on both sides. The default is `final`, the best
                token of the first side's model.

        Raises:
            InputError: there is no such metric, lens or tracked token.
        """
        lens, token = self.trajectory.lens_name(lens), "final" if token is None else token
        metric, known = full_name(metric), self.divergences.get(lens, {})
        if not isinstance(metric, str) or metric not in {*TRAJECTORY_METRICS, *known}:
            names = ", ".join([*TRAJECTORY_METRICS, *known])
            hint = "" if known or metric not in DIVERGENCES else "; `compare` computes divergences"
            raise InputError(f"metric must be one of {names}; got {metric!r}{hint}")
        if metric in known:
            return known[metric]
        values, baseline = self.trajectory.values(metric, lens, token=token), self.baseline
        baseline_lens = self.baseline_lens(lens)
        if token in ("top1", "next") or not TRAJECTORY_METRICS[metric].has_token:
            return values - baseline.values(metric, baseline_lens, token=token)
        return values - baseline.values_of_ids(metric, baseline_lens, self.trajectory.ids_at(token))

    @property
    def has_one_text(self) -> bool:
        """Whether both sides have the same text and model."""
        ours, theirs = self.trajectory, self.baseline
        return ours.model == theirs.model and torch.equal(ours.input_ids, theirs.input_ids)


def difference(trajectory: Trajectory, lens: str, baseline_lens: str) -> Comparison:
    """Compare two lenses of one trajectory, without divergences.

    Divergences need the model: see `compare`.

    Raises:
        InputError: there is no such lens.
    """
    ours, theirs = (
        replace(trajectory, predictions={name: trajectory.predictions[trajectory.lens_name(name)]})
        for name in (lens, baseline_lens)
    )
    return Comparison(ours, theirs, divergences={})
