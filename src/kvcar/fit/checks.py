"""What arithmetic alone can refuse: sizes out of reach, too few tokens, blocks too wide for them. No model is run for it."""

from __future__ import annotations

from torch import Tensor

from ..errors import FitError, InputError, require
from ..geometry import BFLOAT16_BYTES, KVGeometry
from .codecs import budget_for
from .options import FitOptions
from .partition import given_partition, longest_run, widest_blocks
from .search import empty_plan

CONTEXT = 1024
HELD_OUT_WINDOWS = 2
"""Windows that a search compares its plans on, of those it is given."""


def check_request(
    geometry: KVGeometry,
    options: FitOptions,
    tokens: int | None = None,
    texts: int = 1,
    model_bytes: int = BFLOAT16_BYTES,
) -> None:
    """Refuse a fit that cannot succeed, before a model is loaded or run.

    Args:
        geometry: of the model.
        options: what is asked for.
        tokens: tokens of the texts to fit on, None where their number is not chosen.
        texts: how many texts there are.
        model_bytes: bytes of an element that the model computes.

    Raises:
        FitError: a size that nothing reaches, or too few tokens for the blocks.
        InputError: too few tokens, or a structure that the model does not have.
    """
    check_size(geometry, options, model_bytes)
    if tokens is not None and not options.lossless:
        check_windows(*asked_windows(geometry.max_positions, tokens, texts), geometry, options)


def check_size(geometry: KVGeometry, options: FitOptions, model_bytes: int) -> None:
    """Refuse a size that what stays exact alone exceeds; raises FitError."""
    if options.lossless:
        return
    if options.structure is None:
        blocks = widest_blocks(geometry)
    else:
        blocks = given_partition(geometry, options.structure)
    if blocks and options.max_kl is None:
        budget_for(empty_plan(geometry, blocks, options), options, options.target, model_bytes)


def asked_windows(positions: int, tokens: int, texts: int) -> tuple[int, int]:
    """Count the windows that a number of tokens makes, of all texts, and the tokens of one.

    Raises:
        InputError: less than a window for each text.
    """
    require(int, tokens=tokens)
    context = min(CONTEXT, positions, tokens)
    each = tokens // context // texts if context > 1 else 0
    if not each:
        raise InputError(
            f"{tokens} tokens are less than a window of {max(context, 2)} for each of {texts} texts; give more tokens"
        )
    return each * texts, context


def check_windows(count: int, length: int, geometry: KVGeometry, options: FitOptions) -> None:
    """Refuse ``count`` windows of ``length`` tokens where they are too few, too short or too long for the blocks.

    Raises:
        FitError: too few tokens for the widest block.
        InputError: windows that the model or the cache cannot have, or too few of them.
    """
    cache, fitted = options.cache, count
    if length > geometry.max_positions:
        raise InputError(f"windows of {length} tokens are longer than the model's {geometry.max_positions} positions")
    if options.limits is not None:
        fitted = count - HELD_OUT_WINDOWS
        if fitted < 1:
            usual = min(CONTEXT, geometry.max_positions)
            raise InputError(
                f"a fit takes more than {HELD_OUT_WINDOWS} windows, as plans are compared on {HELD_OUT_WINDOWS} of them; got "
                f"{count} of {length} tokens; give more text, or more than {HELD_OUT_WINDOWS * usual:,} tokens"
            )
        if length <= cache.sinks + 2 * cache.window:
            raise InputError(
                f"windows of {length} tokens are too short for {cache.sinks} sinks and a window of {cache.window}; fit on "
                "longer ones"
            )
    usable, widest = fitted * max(0, length - cache.sinks), _widest(geometry, options)
    if usable < 2 * widest:
        raise FitError(
            f"{usable:,} tokens are too few to fit blocks of {widest:,} elements (needed: at least {2 * widest:,}); give "
            "more text or tokens, or narrower blocks: another profile, or fewer layers per block"
        )


def check_ids(windows: Tensor) -> None:
    """Refuse what is no table of token ids ``[windows, tokens]``; raises InputError."""
    if windows.ndim != 2 or windows.numel() == 0:
        raise InputError(f"fitting needs windows of token ids, got shape {tuple(windows.shape)}; give it some text")


def _widest(geometry: KVGeometry, options: FitOptions) -> int:
    """Elements of the widest block that may be asked for."""
    if options.limits is not None:
        longest = longest_run(geometry, options.limits) * geometry.kv_heads * geometry.head_dim
        return min(options.limits.widest_elements, longest)
    assert options.structure is not None
    return max((len(b) for b in given_partition(geometry, options.structure)), default=0) * geometry.head_dim
