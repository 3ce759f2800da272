"""The effect of an ablation on a lens and on the model, and how well the two agree."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tunedlens.causal.ablation import Mode
from tunedlens.causal.interventions import interventions, mean_over_positions
from tunedlens.causal.targets import Directions, Target
from tunedlens.engine import make_objective
from tunedlens.errors import InputError
from tunedlens.evaluation import Estimate
from tunedlens.lenses import ResidualLens, require_made_for
from tunedlens.model import FrozenModel, HookPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_NORMAL_QUANTILE = 1.959964


class Correlation(NamedTuple):
    """Spearman's rank correlation, with a 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CausalEffects:
    """The effect of each ablation on a lens and on the model.

    An effect is the mean KL from the output without the ablation to the output with it.
    """

    targets: list[str]
    lens_nats: list[Estimate]
    """KL(lens ‖ lens under ablation), at the first state that the ablation changes."""
    model_nats: list[Estimate]
    """KL(model ‖ model under ablation)."""

    scatter: ClassVar[Callable[..., "Figure"]]
    """See `tunedlens.report.plots.effects_scatter`."""

    def spearman(self) -> Correlation:
        """The rank correlation of both effects over the targets.

        Raises:
            InputError: there are fewer than four targets.
        """
        lens, model = ([e.value for e in part] for part in (self.lens_nats, self.model_nats))
        return spearman(lens, model)

    def to_dataframe(self) -> "DataFrame":
        """A table with one row per target."""
        import pandas as pd

        columns: dict[str, Sequence[object]] = {"target": self.targets}
        for name, part in (("lens", self.lens_nats), ("model", self.model_nats)):
            columns[f"{name}_nats"] = [estimate.value for estimate in part]
            columns[f"{name}_standard_error"] = [estimate.standard_error for estimate in part]
        return pd.DataFrame(columns)


def spearman(one: Sequence[float], other: Sequence[float]) -> Correlation:
    """Spearman's rank correlation; tied values have the mean of their ranks.

    Raises:
        InputError: there are fewer than four pairs.

    Source:
        Bonett and Wright 2000, "Sample size requirements for estimating Pearson, Kendall and
        Spearman correlations", for the interval.
    """
    import pandas as pd

    if len(one) < 4:
        raise InputError(f"an interval for a rank correlation needs four pairs, got {len(one)}")
    value = float(pd.Series(one).rank().corr(pd.Series(other).rank()))
    if not abs(value) < 1:
        return Correlation(value, value, value)
    reach = _NORMAL_QUANTILE * math.sqrt((1 + value**2 / 2) / (len(one) - 3))
    centre = math.atanh(value)
    return Correlation(value, math.tanh(centre - reach), math.tanh(centre + reach))


@torch.no_grad()
def causal_effects(
    model: FrozenModel,
    lens: ResidualLens,
    input_ids: Int[Tensor, "batch seq"],
    targets: Directions | Sequence[Target],
    mode: Mode = "mean",
    *,
    seed: int = 0,
    skip_first: int = 0,
) -> CausalEffects:
    """Ablate targets one at a time in the model's run, and measure the effects.

    The lens reads the state whose directions are ablated. For a block, head or neuron, it reads
    the stream after the block. Standard errors are clustered by sequence.

    Args:
        input_ids: token ids; all sequences run together.
        targets: a list of targets, or one `Directions`, whose rows are ablated one by one.
        mode, seed, skip_first: as in `ablated`.

    Raises:
        InputError: the lens was made for another model or does not read such a state, or as
            `ablated`.

    Source:
        Belrose et al. 2023, arXiv:2303.08112, section 4.1.
    """
    require_made_for(model, {type(lens).__name__: lens})
    objective = make_objective(lens.unembedding.centred(), dtype=lens.unembedding.weight.dtype)
    last = HookPoint("resid_pre", lens.n_layers)
    sides, names = {}, []
    effects: dict[str, list[Estimate]] = {"lens": [], "model": []}
    runs = interventions(model, input_ids, targets, mode, seed=seed, skip_first=skip_first)
    for number, run in enumerate(runs):
        for who, point, before, after in (
            ("lens", run.point, run.before, run.after),
            ("model", last, run.final_before, run.final_after),
        ):
            shape, place = before.shape[:2], (point.layer, point.site)
            if point not in sides:
                clean = lens.transform_hidden(before.flatten(0, 1), *place)
                sides[point] = objective.model_side(clean)
            kl = objective.kl(lens.transform_hidden(after.flatten(0, 1), *place), sides[point])
            effects[who].append(mean_over_positions(kl.view(shape)))
        names.append(
            f"direction {number}" if isinstance(run.target, Directions) else f"{run.target}"
        )
    return CausalEffects(names, effects["lens"], effects["model"])
