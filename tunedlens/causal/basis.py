"""Causal basis extraction: the directions of a state that a lens's output depends on most."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tunedlens.causal.ablation import Mode, replacements, require_mode
from tunedlens.causal.interventions import mean_over_positions, require_some_count
from tunedlens.causal.targets import Directions
from tunedlens.engine import chunk_tokens, make_objective
from tunedlens.errors import InputError
from tunedlens.files import JsonObject, parse_json, read_tensors, write
from tunedlens.lenses import ResidualLens, require_made_for
from tunedlens.model import FrozenModel, HookPoint

FORMAT = 1
_STARTS = 4
"""The candidates whose exact influence is computed before each search."""
_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""The exceptions that a damaged file can raise while it is checked."""
Form = Float[Tensor, "d_model d_model"]


@dataclass(frozen=True, eq=False)
class CausalBasis:
    """Orthonormal directions of a state, in descending order of their influence on a lens."""

    vectors: Float[Tensor, "directions d_model"]
    influence_nats: Float[Tensor, " directions"]
    """Mean KL(lens(h) ‖ lens(h with the direction ablated))."""
    standard_errors: Float[Tensor, " directions"]
    """Clustered by sequence; NaN for a single one."""
    steps: Int[Tensor, " directions"]
    """Steps of L-BFGS."""
    layer: int
    site: str
    mode: Mode
    model: str
    tokens: int
    """The number of positions that the influence is a mean over."""

    def __repr__(self) -> str:
        return (
            f"CausalBasis({len(self.vectors)} directions of {self.site}, layer {self.layer}, of "
            f"{self.model})"
        )

    def directions(self, count: int | None = None) -> Directions:
        """The first `count` directions (by default all) as a target of `ablated`."""
        return Directions(self.vectors[:count], self.layer, self.site)

    def save(self, path: str | Path) -> None:
        """Write the basis to one safetensors file.

        Raises:
            InputError: the file cannot be written.
        """
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        record = {name: getattr(self, name) for name in _FIELDS}
        metadata = {"tunedlens": json.dumps({"kind": "causal basis", "format": FORMAT} | record)}
        write(Path(path), safetensors.torch.save(tensors, metadata))

    @staticmethod
    def load(path: str | Path) -> "CausalBasis":
        """Read a saved basis.

        Raises:
            InputError: there is no such file, or it is not a saved basis, or it is damaged.
        """
        file = read_tensors(Path(path), dtypes=(torch.float32, torch.int64))
        try:
            record = parse_json(file.metadata.get("tunedlens", "{}"), "it")
            if (record.pop("kind", None), record.pop("format", None)) != ("causal basis", FORMAT):
                raise ValueError(f"expected a basis of format {FORMAT}")
            fields: JsonObject = {name: file.tensors[name] for name in _TENSORS}
            fields |= {name: kind(record.pop(name)) for name, kind in _FIELDS.items()}
            basis = CausalBasis(**fields)
            require_mode(basis.mode)
            count = len(basis.directions().rows())
            shapes = {tuple(getattr(basis, name).shape) for name in _TENSORS[1:]}
            if basis.vectors.ndim != 2 or shapes != {(count,)}:
                raise ValueError("its tensors do not have one row per direction")
        except _DAMAGE as error:
            raise InputError(f"{path} is damaged or is not a saved basis: {error}") from error
        return basis


_TENSORS = ("vectors", "influence_nats", "standard_errors", "steps")
_FIELDS: dict[str, Callable] = {
    "layer": int, "site": str, "mode": str, "model": str, "tokens": int,
}  # fmt: skip


def causal_basis(
    model: FrozenModel,
    lens: ResidualLens,
    input_ids: Int[Tensor, "batch seq"],
    layer: int,
    k: int = 10,
    *,
    site: str = "resid_pre",
    mode: Mode = "mean",
    seed: int = 0,
    skip_first: int = 0,
    max_steps: int = 50,
) -> CausalBasis:
    """Find the directions of a state whose ablation changes the lens's output most.

    The directions are found one after another, each orthogonal to those before it, by L-BFGS on
    the unit sphere with the exact gradient. The influence of a direction is not a concave
    function, so each direction is a local maximum. The search starts from the best of several
    eigenvectors of the state's covariance and of the lens's Fisher information.

    Args:
        input_ids: token ids; the influence is a mean over their positions.
        layer: the layer of the state, from 0 to n. A negative layer counts from the end.
        k: the number of directions.
        site: one of `model.SITES`.
        mode: the ablation, as in `ablated`.
        seed: the seed for the draws of `resample` and the estimate of the Fisher information.
        skip_first: the number of positions at the start of every sequence that are left out.
        max_steps: the largest number of L-BFGS steps for one direction.

    Raises:
        InputError: the lens was made for another model, there is no such layer or site, `k` is
            larger than the width, or there are too few positions.

    Source:
        Belrose et al. 2023, arXiv:2303.08112, section 4.1.
    """
    require_made_for(model, {type(lens).__name__: lens})
    require_mode(mode)
    require_some_count(input_ids, skip_first)
    width = model.identity.d_model
    if not 1 <= k <= width:
        raise InputError(f"k must be between 1 and {width}, the width of {model.name}; got {k}")
    point = Directions(torch.eye(1, width), layer, site).read_at(model)
    states = model.states_at([point], input_ids)[0][:, skip_first:]
    influence = Influence(lens, point, states.flatten(0, 1), mode, seed)
    found, steps = _search(influence, k, seed, max_steps)
    influences, errors = _means(influence, found, states.shape[:2])
    order = influences.argsort(descending=True)
    return CausalBasis(
        found.float().cpu()[order],
        influences[order],
        errors[order],
        steps[order],
        layer=point.layer,
        site=point.site,
        mode=mode,
        model=model.name,
        tokens=states.shape[:2].numel(),
    )


class Influence:
    """KL(lens(h) ‖ lens(h with one direction ablated)) at every state h, and its gradient.

    Args:
        states: the states h, whose coordinates `mode` replaces.
        seed: the seed for the values that `resample` draws.
    """

    def __init__(
        self,
        lens: ResidualLens,
        point: HookPoint,
        states: Float[Tensor, "tokens d_model"],
        mode: Mode,
        seed: int,
    ) -> None:
        self._lens, self._place = lens, (point.layer, point.site)
        self.dtype = lens.unembedding.weight.dtype
        self._states = states.to(self.dtype)
        drawn = torch.Generator().manual_seed(seed)
        self._change = replacements(self._states, None, mode, drawn) - self._states
        self._objective = make_objective(lens.unembedding.centred(), dtype=self.dtype)
        with torch.no_grad():
            clean = lens.transform_hidden(self._states, *self._place)
        self._clean = self._objective.model_side(clean)

    @torch.no_grad()
    def kl(self, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " tokens"]:
        """The KL at every state, in nats, for a direction of length 1."""
        ablated = self._states + (self._change @ vector)[:, None] * vector
        return self._objective.kl(self._lens.transform_hidden(ablated, *self._place), self._clean)

    def mean_and_gradient(
        self, vector: Float[Tensor, " d_model"]
    ) -> tuple[float, Float[Tensor, " d_model"]]:
        """The mean KL, in nats, and its gradient in the direction."""
        coordinates = self._change @ vector
        ablated = (self._states + coordinates[:, None] * vector).requires_grad_()
        translated = self._lens.transform_hidden(ablated, *self._place)
        kl, gradient = self._objective.gradient(translated.detach(), self._clean)
        (in_state,) = torch.autograd.grad(translated, ablated, gradient / len(kl))
        # The derivative of (change · v) v, transposed.
        return float(kl.mean()), (in_state @ vector) @ self._change + coordinates @ in_state

    def forms(self, seed: int) -> tuple[Form, Form]:
        """Second moment of the change, and the Fisher information of the states.

        To second order, the influence is half the mean over states of (change · v)² (v · F v),
        where F is the Fisher information of the state. It is estimated from one token per state,
        drawn from the lens's distribution.
        """
        generator = torch.Generator(self._states.device).manual_seed(seed)
        scores = []
        size = chunk_tokens(len(self._lens.unembedding.weight), self._states.device)
        for part in self._states.split(size):
            hidden = part.detach().requires_grad_()
            log_probs = self._lens(hidden, *self._place).log_softmax(-1)
            drawn = log_probs.detach().exp().multinomial(1, generator=generator)
            (score,) = torch.autograd.grad(log_probs.gather(1, drawn).sum(), hidden)
            scores.append(score)
        score = torch.cat(scores)
        return self._change.T @ self._change / len(score), score.T @ score / len(score)


def _search(
    influence: Influence, k: int, seed: int, max_steps: int
) -> tuple[Float[Tensor, "k d_model"], Int[Tensor, " k"]]:
    """Orthonormal directions, in the order in which they are found, and the steps of each."""
    forms, steps = influence.forms(seed), []
    found = forms[0].new_zeros(0, len(forms[0]))
    for _ in range(k):
        starts = _candidates(*forms, found)
        start = max(starts, key=lambda vector: float(influence.kl(vector).mean()))
        vector, taken = _climb(influence, start, found, max_steps)
        found = torch.cat([found, vector[None]])
        steps.append(taken)
    return found, torch.tensor(steps)


def _means(
    influence: Influence, vectors: Float[Tensor, "k d_model"], shape: torch.Size
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """The mean KL of every direction over positions, in nats, and its standard error."""
    estimates = [mean_over_positions(influence.kl(vector).view(shape)) for vector in vectors]
    means, errors = zip(*estimates, strict=True)
    return torch.tensor(means), torch.tensor([math.nan if e is None else e for e in errors])


def _candidates(
    covariance: Form, fisher: Form, before: Float[Tensor, "found d_model"]
) -> list[Float[Tensor, " d_model"]]:
    """Directions to start from, orthogonal to those before.

    They are the eigenvectors of both forms, and of their sum when each has a trace of 1, for
    which the product of both forms is largest.
    """
    projection = torch.eye(len(fisher)).to(fisher) - before.mT @ before
    forms = [projection @ form @ projection for form in (covariance, fisher)]
    forms = [form / form.trace().clamp(min=torch.finfo(form.dtype).tiny) for form in forms]
    count = min(32, len(fisher) - len(before))
    vectors = torch.cat(
        [torch.linalg.eigh(form).eigenvectors[:, -count:] for form in (*forms, sum(forms))], 1
    )
    vectors = torch.nn.functional.normalize(projection @ vectors, dim=0)
    one, other = ((vectors * (form @ vectors)).sum(0) for form in forms)
    return list(vectors[:, (one * other).topk(min(_STARTS, vectors.shape[1])).indices].T)


def _climb(
    influence: Influence,
    start: Float[Tensor, " d_model"],
    before: Float[Tensor, "found d_model"],
    max_steps: int,
) -> tuple[Float[Tensor, " d_model"], int]:
    """A local maximum among the directions orthogonal to those before, and the steps taken."""

    def projected(vector: Tensor) -> Tensor:
        return vector - (before @ vector) @ before

    def direction() -> Tensor:
        orthogonal = projected(projected(free.detach()))  # once more, because of rounding
        return orthogonal / orthogonal.norm()

    free, unit = start.clone(), float(influence.kl(start).mean())
    search = torch.optim.LBFGS(
        [free], max_iter=max_steps, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def negative() -> Tensor:
        vector, length = direction(), projected(free).norm()
        mean, gradient = influence.mean_and_gradient(vector)
        tangent = projected(gradient - (gradient @ vector) * vector)
        free.grad = -tangent / (length * unit)
        return free.new_tensor(-mean / unit)

    search.step(negative)
    return direction(), search.state[free]["n_iter"]
