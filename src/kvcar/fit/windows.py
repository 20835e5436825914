"""What a fit reads: windows of texts, mixed with what the model itself writes, and windows held out to check on, by kind.

A codec costs several times as much on kinds of text that it has not seen, so a fit reads many: the texts given, or English and
code that ship with Python, and samples of the model, which know its other languages and habits.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from ..progress import OnProgress, silent
from ..text import Texts, TextSource, fit_texts, interleaved, joined, split_text, windows_of_all
from .checks import CONTEXT, asked_windows
from .options import DEFAULT_PROFILE, PROFILES, FitOptions
from .samples import sample_windows

CHECK_WINDOWS = 2
SAMPLES = "samples of the model"
# Of what is fitted on, how much the model writes itself: beside a text that was given, and without one, when its own words count for more.
SAMPLED_SHARE, SAMPLED_SHARE_WITHOUT_TEXT = 1 / 2, 2 / 3
# Modules of many styles that every Python has.
_MODULES = ("statistics", "tarfile", "http.client", "json.decoder", "html.entities", "turtle", "ast", "calendar")

log = logging.getLogger("kvcar.fit")


@dataclass(frozen=True)
class FitText:
    """What a fit reads.

    Attributes:
        windows: token ids int64 ``[N, T]`` to fit on.
        source: where they come from.
        held_out: windows int64 ``[M, T]`` to check on; None where nothing is held out, or too little.
        kinds: what each of those is of.
    """

    windows: Tensor
    source: TextSource
    held_out: Tensor | None = None
    kinds: tuple[str, ...] = ()


def given_windows(token_ids: Tensor, source: TextSource, check: bool) -> FitText:
    """Windows that were given as token ids, the last tenth of them held out."""
    count = len(token_ids) // 10 if check else 0
    if not count:
        return FitText(token_ids, source)
    return FitText(token_ids[:-count], source, token_ids[-count:], (source.name,) * count)


def text_windows(
    model: PreTrainedModel,
    tokenizer: Any,
    text: Texts,
    tokens: int | None,
    options: FitOptions,
    check: bool,
    samples: bool = True,
    on_progress: OnProgress = silent,
) -> FitText:
    """Windows of texts and, where the structure is searched, of as many samples of the model; twice as many where no text is given.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        text: see ``fit``.
        tokens: how many to fit on; None for as many as the profile asks for, or the text has.
        options: of the fit.
        check: whether to hold any out.
        samples: whether to mix in samples; never done for a given structure.
        on_progress: called with what is going on.

    Raises:
        InputError: text that cannot be read, or too little of it.
    """
    sources, held_out = fit_texts(text, check)
    if text is None and options.structure is None:
        kept, rest = split_text(python_library(), 0.1)
        sources, held_out = [*sources, kept], [*held_out, rest] if check else held_out
    positions = model.config.get_text_config().max_position_embeddings
    if tokens is None:
        limits, context = options.limits or PROFILES[DEFAULT_PROFILE], min(CONTEXT, positions)
        count = limits.fit_tokens // context
    else:
        count, context = asked_windows(positions, tokens, len(sources))
    drawn = int(count * (SAMPLED_SHARE_WITHOUT_TEXT if text is None else SAMPLED_SHARE))
    drawn = drawn if samples and options.structure is None else 0
    read = windows_of_all(tokenizer, sources, context, max(count - drawn, len(sources)), exactly=tokens is not None)
    checked, kinds = _held_out(tokenizer, held_out, context)
    if not drawn:
        return FitText(read, joined(sources), checked, kinds)
    # One more to check on, drawn with the others, as a few rows take as long as many.
    written = sample_windows(model, tokenizer, drawn + 1, context, options.seed, on_progress)
    if checked is not None:
        checked, kinds = torch.cat([checked, written[drawn:]]), (*kinds, SAMPLES)
    written = written[:drawn]
    source = joined([*sources, _as_source(written)])
    return FitText(interleaved([read, written]), source, checked, kinds)


def python_library() -> TextSource:
    """Read some modules of Python's standard library as text."""
    code = "\n\n".join(inspect.getsource(__import__(name, fromlist=["_"])) for name in _MODULES)
    return TextSource("modules of Python's library", code, hashlib.sha256(code.encode()).hexdigest())


def held_out_windows(model: PreTrainedModel, tokenizer: Any, sources: Sequence[TextSource]) -> Tensor | None:
    """Windows int64 ``[N, T]`` of held-out texts to check a bundle on; None where there is no text, or too little of it."""
    return _held_out(tokenizer, sources, min(CONTEXT, model.config.get_text_config().max_position_embeddings))[0]


def _held_out(tokenizer: Any, sources: Sequence[TextSource], context: int) -> tuple[Tensor | None, tuple[str, ...]]:
    if not sources:
        return None, ()
    each = max(1, CHECK_WINDOWS // len(sources))
    try:
        windows = [windows_of_all(tokenizer, [source], context, each) for source in sources]
    except InputError:
        log.info("the held-out tenth of the text is shorter than a window: nothing is measured on it")
        return None, ()
    kinds = [name for own, source in zip(windows, sources, strict=True) for name in [source.name] * len(own)]
    return torch.cat(windows), tuple(kinds)


def _as_source(windows: Tensor) -> TextSource:
    return TextSource(SAMPLES, "", hashlib.sha256(windows.numpy().tobytes()).hexdigest())
