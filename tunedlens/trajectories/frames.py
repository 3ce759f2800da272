"""Trajectories as pandas tables."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tunedlens.trajectories.comparison import Comparison
from tunedlens.trajectories.result import Tokens, Trajectory

if TYPE_CHECKING:
    from pandas import DataFrame, MultiIndex


def to_dataframe(trajectory: Trajectory) -> "DataFrame":
    """A tidy table with one row per lens, site, layer and position."""
    import pandas as pd

    vocabulary = trajectory.vocabulary
    following = [None if i < 0 else vocabulary[i].text for i in trajectory.next_ids.tolist()]
    frames = []
    for lens, one in trajectory.predictions.items():
        for index, row in enumerate(trajectory.rows):
            best = one.top_ids[index, :, 0].tolist()
            ranks = [rank or None for rank in one.next_ranks[index].tolist()]
            columns = {
                "lens": lens,
                "site": row.site,
                "layer": row.layer,
                "position": trajectory.positions,
                "token": trajectory.tokens,
                "next_token": following,
                "top1": [vocabulary[i].text for i in best],
                "top1_id": best,
                "top1_prob": one.top_log_probs[index, :, 0].exp().tolist(),
                "top1_logit": one.top_logits[index, :, 0].tolist(),
                "entropy_nats": one.entropy_nats[index].tolist(),
                "kl_nats": one.kl_nats[index].tolist(),
                "cross_entropy_nats": one.cross_entropy_nats[index].tolist(),
                "next_rank": pd.array(ranks, dtype="Int64"),
            }
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def words(trajectory: Trajectory, lens: str | None = None) -> "DataFrame":
    """A wide table of the best tokens: rows are sites and layers, columns are positions.

    White space is shown as visible characters. `to_dataframe` has the tokens as text, and their
    ids.
    """
    best = trajectory.predictions[trajectory.lens_name(lens)].top_ids[..., 0].tolist()
    return _wide(trajectory, [[trajectory.vocabulary[i].shown for i in line] for line in best])


def scores(
    data: Trajectory | Comparison,
    metric: str = "probability",
    lens: str | None = None,
    *,
    token: str | int | None = None,
) -> "DataFrame":
    """A wide table of one metric: rows are sites and layers, columns are positions.

    The arguments are those of `Trajectory.values` and `Comparison.values`.
    """
    trajectory = data.trajectory if isinstance(data, Comparison) else data
    table = _wide(trajectory, data.values(metric, lens, token=token).tolist())
    return table.astype("Int64") if metric == "rank" else table


def probabilities(
    trajectory: Trajectory,
    tokens: Tokens,
    lens: str | None = None,
    position: int | None = None,
) -> "DataFrame":
    """The probabilities of tracked tokens, with one row per site, layer and position.

    A value is NaN where the token was not tracked. `.corr()` of the table correlates the tokens.

    Args:
        tokens: tracked tokens as text or ids.
        lens: the name of a lens; by default the first.
        position: restricts the table to one position; its rows are then sites and layers.

    Raises:
        InputError: a token was not tracked, or there is no such lens or position.
    """
    import pandas as pd

    ids = trajectory.token_ids(tokens)
    values = torch.stack([trajectory.values("probability", lens, token=i) for i in ids], -1)
    names = [trajectory.vocabulary[i].text for i in ids]
    if position is not None:
        index = trajectory.position_index(position)
        return pd.DataFrame(values[:, index], _rows_index(trajectory), names)
    keys = [(*row, position) for row in trajectory.rows for position in trajectory.positions]
    index = pd.MultiIndex.from_tuples(keys, names=["site", "layer", "position"])
    return pd.DataFrame(values.flatten(0, 1), index, names)


def _wide(trajectory: Trajectory, cells: Sequence[Sequence[object]]) -> "DataFrame":
    import pandas as pd

    inputs = [trajectory.vocabulary[i].shown for i in trajectory.input_ids.tolist()]
    columns = pd.MultiIndex.from_arrays([trajectory.positions, inputs], names=["position", "token"])
    return pd.DataFrame(cells, _rows_index(trajectory), columns)


def _rows_index(trajectory: Trajectory) -> "MultiIndex":
    import pandas as pd

    return pd.MultiIndex.from_tuples(trajectory.rows, names=["site", "layer"])
