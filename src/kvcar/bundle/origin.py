"""Where a bundle comes from: which model it was fitted for, on which text, with which versions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from transformers import PreTrainedModel

from ..geometry import StrictModel
from ..models.fingerprint import Fingerprint, fingerprint
from ..models.settings import MOST_SETTINGS, settings_of

_Name = Annotated[str, Field(max_length=200)]


class ModelIdentity(StrictModel):
    """Which model a bundle was fitted for; the sampled weights themselves lie in the codecs file."""

    name: str
    architecture: str
    dtype: str
    fingerprint: str
    settings: dict[_Name, bool | int | Annotated[float, Field(allow_inf_nan=False)] | _Name] = Field(
        default_factory=dict, max_length=MOST_SETTINGS
    )
    """What its configuration says beside weights and shapes; see ``models.settings``."""


class FitProvenance(StrictModel):
    """How a bundle came to be."""

    kvcar_version: str
    torch_version: str
    transformers_version: str
    date: str
    text: str
    text_sha256: str
    tokens: int
    context: int
    seed: int
    options: dict[str, str | int | float | bool | None]


def identify(model: PreTrainedModel, name: str) -> tuple[Fingerprint, ModelIdentity]:
    """Sample a model's weights, and note its name, kind and settings: what ties a bundle to it."""
    print_ = fingerprint(model)
    return print_, ModelIdentity(
        name=name, architecture=type(model).__name__, dtype=print_.dtype, fingerprint=print_.digest,
        settings=settings_of(model.config),
    )  # fmt: skip
