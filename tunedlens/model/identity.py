"""What tells one model from another, as far as a lens is concerned."""

from dataclasses import dataclass
from typing import Any

from tunedlens.errors import InputError


@dataclass(frozen=True)
class ModelIdentity:
    """What a lens must agree on with the model that it is used on."""

    name: str
    """Hub name or folder; `embedded` for the one that ships with the package."""
    revision: str | None
    """The hub's commit, where there is one."""
    n_layers: int
    d_model: int
    vocab_size: int
    fingerprint: str
    """Of all values of the final norm and the unembedding; see `Unembedding.fingerprint`."""


def require_same_model(saved: dict[str, Any], model: dict[str, Any], what: str) -> None:
    """Compare two identities, as `dataclasses.asdict` gives them.

    Raises:
        InputError: a lens made for the one does not fit the other; says what differs.
    """
    differences = [
        f"{name} {saved.get(name)}, not {model[name]}"
        for name in ("n_layers", "d_model", "vocab_size")
        if saved.get(name) != model[name]
    ]
    if not differences and saved.get("fingerprint") != model["fingerprint"]:
        differences = ["a final norm or an unembedding with other values"]
    if differences:
        raise InputError(
            f"{what} was made for {saved.get('name')} and does not fit "
            f"{model['name']}: it has {'; '.join(differences)}"
        )
