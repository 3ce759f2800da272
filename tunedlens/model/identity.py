"""The properties of a model that decide whether a lens fits it."""

from collections.abc import Mapping
from dataclasses import dataclass

from tunedlens.errors import InputError


@dataclass(frozen=True)
class ModelIdentity:
    """The properties in which a lens and its model must agree."""

    name: str
    """Hub name or folder; `embedded` for the one that ships with the package."""
    revision: str | None
    """The commit on the hub, if the model comes from there."""
    n_layers: int
    d_model: int
    vocab_size: int
    fingerprint: str
    """Covers all values of the final norm and the unembedding; see `Unembedding.fingerprint`."""


def require_same_model(saved: Mapping[str, object], model: Mapping[str, object], what: str) -> None:
    """Compare two identities, in the form of `dataclasses.asdict`.

    Args:
        what: the name of the lens in the message.

    Raises:
        InputError: they differ in more than the name; the message lists the differences.
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
