"""Running a model without gradients for its parameters, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of ``model`` asks for a gradient inside; afterwards each does as it did before."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)
