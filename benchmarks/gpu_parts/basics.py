"""First of all: subnormal operands, products with few rows, and what the compiled kernels take of a multiprocessor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from speed.compiled import compiled_kernels
from speed.synthetic import Codes, RandomPast, Shape, coded_plan, layer_geometry, random_bundle

from kvcar.kernels.attend import naive
from kvcar.kernels.attend import triton as backend
from kvcar.kernels.triton_unpack import multiplies_subnormals
from kvcar.models.load import DTYPES

from . import Figures, Sizes, reason

# As in the kernels' own tests.
_TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 2e-2}


def sizes(rehearse: bool) -> Sizes:
    """Latents by bits, and query rows of a KV head by dtype, on either side of what matrix units take at once."""
    if rehearse:
        return {"head_dim": 16, "tokens": 140, "keys": {8: 3, 5: 9}, "values": {6: 7}, "rows": {"bfloat16": [1]}}
    rows = {"bfloat16": [1, 3, 4, 5, 8, 16, 17, 64], "float32": [1, 4, 8], "float16": [4]}
    return {"head_dim": 128, "tokens": 500, "keys": {8: 3, 6: 20, 5: 17, 3: 8}, "values": {7: 20, 4: 21}, "rows": rows}


def figures(device: torch.device, sizes: Sizes) -> Iterator[Figures]:
    """See the package."""
    found: Figures = {"multiplies_subnormals": multiplies_subnormals(device), "small_products": []}
    yield found
    for dtype, each in sizes["rows"].items():
        for rows in each:
            found["small_products"].append(_product(device, sizes, dtype, rows))
            yield found
    found["kernels"] = compiled_kernels()
    yield found


@torch.no_grad()
def _product(device: torch.device, sizes: Sizes, dtype: str, rows: int) -> dict[str, Any]:
    """Attention of ``rows`` query heads that share a KV head, against the specification in float64."""
    torch.manual_seed(rows)
    own: dict[str, Any] = {"dtype": dtype, "rows": rows}
    plan = coded_plan(
        layer_geometry(Shape(rows, 1, sizes["head_dim"]), sizes["tokens"]),
        Codes.of("linear8", 1, sizes["keys"], sizes["values"]),
    )
    past = RandomPast(random_bundle(plan), sizes["tokens"], 2, DTYPES[dtype], device)
    query, (exact, paged), scaling = past.query(), past.past(), sizes["head_dim"] ** -0.5
    expected = naive.attend(query, exact, paged, scaling).double()
    try:
        got = backend.attend(query, exact, paged, scaling).double()
    except Exception as error:  # what the compiler or the device says is what we are here for
        return own | {"error": reason(error)}
    apart = (got - expected).abs() / (1 + expected.abs())
    worst = float(apart.max())
    return own | {"worst": worst, "right": bool(worst <= _TOLERANCE[dtype])}  # NaN is not right
