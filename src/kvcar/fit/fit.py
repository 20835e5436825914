"""``kvcar.fit``: from a model and a text to a bundle, and what it costs on text that it was not fitted on."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..bundle import Bundle, CodedBlock, FitProvenance, identify
from ..cache.attach import attach, attachment_of
from ..cache.cache import KVCarCache
from ..errors import AttachError, InputError, require
from ..evaluate.fidelity import fidelity_figures, measure_fidelity
from ..geometry import BFLOAT16_BYTES, KVGeometry
from ..models.geometry import geometry_of
from ..models.structure import model_of
from ..plan import CacheConfig, Plan
from ..progress import OnProgress, counter, silent
from ..sizes import REFERENCE_TOKENS, codec_figures, size_in_words, stored_bytes
from ..text import Texts, TextSource, checked_token_ids, text_count
from ..version import __version__
from .checks import HELD_OUT_WINDOWS, check_ids, check_request, check_size, check_windows
from .codecs import Solved
from .options import DEFAULT_CACHE, FitOptions, Structure
from .page_costs import with_page_cost_limit
from .partition import given_partition, searched_bands
from .search import Found, best_plan, empty_plan, fits_float16, given_plan, searched_plans
from .statistics import SAMPLE_TOKENS, Effect, Statistics, bands_of, collect_statistics, sample_stride
from .windows import given_windows, text_windows

_TRAINING_TOKENS = 8192
_TOKENS = TextSource("token ids", "", "")

log = logging.getLogger("kvcar.fit")


def fit(
    model: PreTrainedModel,
    tokenizer: Any = None,
    text: Texts = None,
    *,
    token_ids: Tensor | None = None,
    times_smaller: float | None = None,
    max_kl: float | None = None,
    profile: str | None = None,
    structure: Structure | None = None,
    tokens: int | None = None,
    window: int | None = None,
    cache: CacheConfig = DEFAULT_CACHE,
    effect_tokens: int = FitOptions.effect_tokens,
    memory_tokens: int | None = None,
    seed: int = 0,
    check: bool = True,
    samples: bool = True,
    name: str | None = None,
    on_progress: OnProgress = silent,
) -> Bundle:
    """Fit a bundle: what ``kvcar.attach`` needs to compress the cache of ``model``.

    Args:
        model: a causal language model with sdpa attention; it is only run, never changed.
        tokenizer: its tokenizer; not needed with ``token_ids``.
        text: what to fit on: a text, a path to a ``.txt`` or ``.jsonl`` file, or a list of them. Default: English text and
            code that ship with Python.
        token_ids: windows of tokens int64 ``[N, T]`` to fit on, instead of a tokenizer and a text.
        times_smaller: total bytes of the full bfloat16 cache over those of the compressed one at 4,096 tokens. Default: 5.
        max_kl: fit the smallest cache within this KL divergence (nats per token) on held-out text, instead of to a size.
        profile: how wide blocks may be: fast, balanced (the default), small or stored.
        structure: blocks and codecs as given, instead of searched within a profile.
        tokens: tokens of the text to fit on, two windows of 1,024 of which a search compares its plans on. Default: the
            profile's, or what the text has.
        window: recent tokens kept exact; default: those of ``cache``.
        cache: sinks, window and pages.
        effect_tokens: tokens on which the effect of errors is measured.
        memory_tokens: tokens in memory, of all sequences together, among which the search shares the bytes of codecs; default: the
            profile's.
        seed: of everything random.
        check: hold out a tenth of the text and measure the bundle on it, stepped through the cache. Nothing is measured
            where that is less than a window.
        samples: fit on as much that the model writes itself, of many kinds, as on the text (twice as much without one): a codec that has seen one kind of text costs
            several times as much on others. Only where the structure is searched; off where your text is all that matters.
        name: what to call the model in the bundle. Default: the name that it was loaded by.
        on_progress: called with what is going on.

    Returns:
        The bundle; ``bundle.figures`` is what was measured.

    Raises:
        FitError: NaN in the model, too little text, or a target out of reach.
        InputError: options that exclude each other or do not fit the model.
        AttachError: the model is attached.
    """
    model = model_of(model, "fit")
    require(CacheConfig, cache=cache)
    require(Callable, on_progress=on_progress)
    require(str, optional=True, name=name)
    options = FitOptions(
        times_smaller, max_kl, profile, structure, cache.with_window(window), effect_tokens, seed, memory_tokens
    )
    if attachment_of(model) is not None:
        raise AttachError("this model is attached, and a fit needs it as it is; detach it first")
    check_request(geometry_of(model), options, tokens, text_count(text), BFLOAT16_BYTES)
    if token_ids is not None:
        if tokenizer is not None or text is not None:
            raise InputError("give a tokenizer and a text, or token_ids, not both")
        token_ids = checked_token_ids(token_ids, model.config.get_text_config().vocab_size)
        read = given_windows(token_ids, _TOKENS, check)
    elif tokenizer is None:
        raise InputError("a fit needs the model's tokenizer to read a text, or token_ids in place of both")
    elif not callable(tokenizer):
        raise InputError(f"a tokenizer is what the model's text goes through, got {tokenizer!r}")
    else:
        read = text_windows(model, tokenizer, text, tokens, options, check, samples, on_progress)
    bundle = next(fit_bundles(model, read.windows, [options], read.source, name, on_progress))
    return check_bundle(model, bundle, read.held_out, on_progress, read.kinds) if check else bundle


def lossless(
    model: PreTrainedModel, *, window: int | None = None, cache: CacheConfig = DEFAULT_CACHE, name: str | None = None
) -> Bundle:
    """Make the bundle that keeps every key and value exactly, by the same cache: the noise floor of every measurement.

    Nothing is fitted; the model is run on a few tokens, once, to see how it uses its cache.

    Args:
        model: a causal language model.
        window: recent tokens kept apart from pages; default: those of ``cache``.
        cache: sinks, window and pages.
        name: what to call the model in the bundle. Default: the name that it was loaded by.
    """
    model = model_of(model, "lossless")
    require(CacheConfig, cache=cache)
    require(str, optional=True, name=name)
    options = FitOptions(structure=Structure(codec="identity"), cache=cache.with_window(window))
    nothing = torch.zeros(0, 0, dtype=torch.int64)
    return next(fit_bundles(model, nothing, [options], TextSource("", "", ""), name))


def fit_bundles(
    model: PreTrainedModel,
    windows: Tensor,
    options: Sequence[FitOptions],
    source: TextSource = _TOKENS,
    name: str | None = None,
    on_progress: OnProgress = silent,
) -> Iterator[Bundle]:
    """Fit several bundles, one after the other, from the same statistics.

    Args:
        model: a causal language model, with sdpa attention where the effect of errors is measured; only run, never changed.
        windows: token ids int64 ``[N, T]``. Where a structure is searched, the last two are held out to compare on.
        options: one for each bundle; those that are not lossless share cache, ``effect_tokens`` and seed.
        source: where the windows come from, for provenance.
        name: what to call the model in the bundles.
        on_progress: called with what is going on.

    Raises:
        FitError: NaN in the model, too little text, or a target out of reach.
        InputError: options that do not fit the model or each other.
    """
    model = model_of(model, "fit_bundles")
    require(Tensor, windows=windows)
    require(Callable, on_progress=on_progress)
    require(list, tuple, options=options)
    for each in options:
        require(FitOptions, options=each)
    geometry = geometry_of(model)
    lossy = [each for each in options if not each.lossless]
    searched = any(each.limits is not None for each in lossy)
    fitted, held_out = (windows[:-HELD_OUT_WINDOWS], windows[-HELD_OUT_WINDOWS:]) if searched else (windows, windows)
    for each in lossy:
        check_size(geometry, each, BFLOAT16_BYTES)
        check_ids(windows)
        check_windows(len(windows), windows.shape[1], geometry, each)
    if lossy:
        _try_out(model)
    statistics = _statistics(model, geometry, fitted, lossy, on_progress)
    maker = _Maker(model, geometry, fitted, held_out, source, name, statistics, on_progress)
    return (maker.bundle(each) for each in options)


def _try_out(model: PreTrainedModel) -> None:
    """Attach the model once, over lossless pages: what cannot be right is refused before anything is captured."""
    with attach(model, lossless(model)):
        pass


class _Maker:
    """Makes bundles from the same statistics; partitions that only differ in what follows are searched once."""

    def __init__(
        self,
        model: PreTrainedModel,
        geometry: KVGeometry,
        windows: Tensor,
        held_out: Tensor,
        source: TextSource,
        name: str | None,
        statistics: Statistics | None,
        on_progress: OnProgress,
    ) -> None:
        self._model, self._geometry, self._statistics = model, geometry, statistics
        self._windows, self._held_out, self._source = windows, held_out, source
        self._on_progress = on_progress
        self._fingerprint, self._identity = identify(model, name or name_of(model))
        self._plans: dict[tuple[str | None, float], list[Plan]] = {}

    def bundle(self, options: FitOptions) -> Bundle:
        """Bundle of one set of options."""
        found = self._found(options)
        given = options.as_dict() | ({"times_smaller": found.size} if options.limits is not None else {})
        provenance = fit_provenance(self._windows, self._source, options.seed, given)
        solved = found.solved
        plan = solved.plan
        if not options.lossless and (self._statistics is None or fits_float16(plan, self._statistics)):
            plan = plan.model_copy(update={"exact_dtype": "float16"})
        bundle = Bundle(plan, solved.blocks, self._fingerprint, self._identity, provenance)
        bundle = with_page_cost_limit(self._model, bundle, self._held_out[:HELD_OUT_WINDOWS], self._on_progress)
        figures = size_figures(bundle, BFLOAT16_BYTES)
        if found.two_pass_kl is not None:
            figures |= {"two_pass_kl": found.two_pass_kl, "curve": [list(point) for point in found.curve]}
        log.info(
            "at %d tokens %s; %d bytes of codecs",
            figures["tokens"],
            size_in_words(bundle.plan, figures["tokens"], figures["stored_bytes"]),
            figures["codec_bytes"],
        )
        pays, positions = figures["pays_from_tokens"], bundle.plan.geometry.max_positions
        if bundle.codec_bytes and (pays is None or pays > positions):
            log.warning(
                "the codecs of this bundle take %d bytes, which one sequence of the model's %d positions does not win back: it "
                "pays %s",
                bundle.codec_bytes,
                positions,
                "never" if pays is None else f"from {pays:,} tokens on, all sequences together",
            )
        return bundle.with_figures(figures)

    def _found(self, options: FitOptions) -> Found:
        if options.lossless:
            assert options.structure is not None
            plan = empty_plan(self._geometry, given_partition(self._geometry, options.structure), options)
            return Found(Solved(plan, (CodedBlock(None, None),) * len(plan.blocks), 0.0), 1.0)
        # Sizes are those of a model in bfloat16, both of its own cache and of what stays exact here.
        model_bytes = BFLOAT16_BYTES
        if self._statistics is None:  # there is nothing to code, only slots that read others
            return Found(Solved(empty_plan(self._geometry, [], options), (), 0.0), options.target)
        if options.limits is None:
            return given_plan(self._statistics, options, model_bytes, self._on_progress)
        key = (options.profile, options.target)
        if key not in self._plans:
            self._plans[key] = searched_plans(self._statistics, options, model_bytes, self._on_progress)
        return best_plan(self._model, self._held_out, self._plans[key], self._statistics, options, self._on_progress)


def _statistics(
    model: PreTrainedModel,
    geometry: KVGeometry,
    windows: Tensor,
    options: Sequence[FitOptions],
    on_progress: OnProgress,
) -> Statistics | None:
    """Statistics that all of the options can be fitted from; None where there is nothing to code."""
    if len({(o.cache, o.window_read, o.effect_tokens, o.seed) for o in options}) > 1:
        raise InputError(
            "bundles fitted from the same statistics must share cache, effect_tokens and seed, and all be for stored "
            "contexts or none"
        )
    needs = [_bands(geometry, each) for each in options]
    bands = [each for each in needs if each is not None]
    if not bands:
        return None
    first = options[0]
    training = any(each.codec == "autoencoder" for each in options)
    stride = sample_stride(windows, first.cache.sinks, _TRAINING_TOKENS if training else SAMPLE_TOKENS)
    effect = None
    if any(each.metric == "effect" for each in options):
        effect = Effect(_spread(windows, first.effect_tokens), first.cache, first.window_read, first.seed)
    band, shared_band = (max(each) for each in zip(*bands, strict=True))
    log.info("statistics of %d tokens of %d layers", windows.numel(), len(geometry.codable_layers))
    return collect_statistics(
        model, geometry, windows, (band, shared_band), first.cache.sinks, stride, effect, on_progress
    )


def _bands(geometry: KVGeometry, options: FitOptions) -> tuple[int, int] | None:
    """See ``bands_of``; None for a structure without blocks."""
    if options.limits is not None:
        return searched_bands(geometry, options.limits)
    assert options.structure is not None
    blocks = given_partition(geometry, options.structure)
    return bands_of(geometry, blocks) if blocks else None


def _spread(windows: Tensor, tokens: int) -> Tensor:
    """About ``tokens`` tokens' worth of windows, evenly spread."""
    count = min(len(windows), max(1, round(tokens / windows.shape[1])))
    places = torch.linspace(0, len(windows) - 1, count).round().long()
    return windows[places]


def check_bundle(
    model: PreTrainedModel,
    bundle: Bundle,
    held_out: Tensor | None,
    on_progress: OnProgress = silent,
    kinds: Sequence[str] = (),
) -> Bundle:
    """The bundle with its quality on held-out windows int64 ``[N, T]`` among its figures, and by kind where those are named.

    It is as it was without any.
    """
    if held_out is None:
        return bundle
    on_chunk = counter(on_progress, "check on held-out text", held_out.numel())
    with attach(model, bundle):
        caches = {"check": lambda: KVCarCache(bundle)}
        measured = measure_fidelity(model, held_out, caches, on_chunk)["check"]
    by_kind: dict[str, list[float]] = {}
    for kind, kl in zip(kinds, measured.window_kl_divergences, strict=False):
        by_kind.setdefault(kind, []).append(kl)
    means = {kind: sum(kls) / len(kls) for kind, kls in by_kind.items()}
    return bundle.with_figures({"held_out": fidelity_figures(measured), "kl_divergence_by_kind": means})


def size_figures(bundle: Bundle, model_bytes: int) -> dict[str, Any]:
    """Bytes of one sequence at 4,096 tokens, or as many as the model has positions, everything counted."""
    geometry = bundle.plan.geometry
    tokens = min(REFERENCE_TOKENS, geometry.max_positions)
    full, stored = geometry.full_bytes(tokens), stored_bytes(bundle.plan, tokens, model_bytes)
    return {
        "tokens": tokens,
        "times_smaller": full / stored,
        "stored_bytes": stored,
        "full_bytes": full,
        **codec_figures(bundle.plan, bundle.codec_bytes),
    }


def name_of(model: PreTrainedModel) -> str:
    """The name that a model was loaded by, or its class where it was not loaded."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).is_absolute() else name


def fit_provenance(
    windows: Tensor, source: TextSource, seed: int, options: dict[str, str | int | float | bool | None]
) -> FitProvenance:
    """What a bundle says of how it was fitted."""
    return FitProvenance(
        kvcar_version=__version__,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        text=source.name,
        text_sha256=source.sha256,
        tokens=windows.numel(),
        context=windows.shape[1],
        seed=seed,
        options=options,
    )
