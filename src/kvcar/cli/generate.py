"""``kvcar generate``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .app import app
from .arguments import BundleSource, Device, Dtype, Json, Model, Window
from .console import check_writable, errors, progress_bars

if TYPE_CHECKING:
    from ..models.load import LoadedModel

_EXAMPLES = """Continue a prompt with MODEL over a compressed cache, printing as it goes.

[bold]Examples[/]

  kvcar generate demo --bundle demo-5x --prompt "The memory wall is"

  kvcar generate demo --bundle demo-5x --chat --prompt "What is a KV cache?" --max-new-tokens 200

  kvcar generate demo --bundle demo-5x --prompt-file book.txt --temperature 0.7 --seed 1

  kvcar generate demo --bundle demo-5x --context manual.ctx --prompt "In short, the manual says"
"""


@app.command(help=_EXAMPLES)
def generate(
    model: Model,
    bundle: BundleSource,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A UTF-8 file with what to continue.")
    ] = None,
    context: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Go on from a context that 'kvcar save' stored.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at the utmost.")] = 128,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    window: Window = None,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Generate; the examples in the help text say the rest."""
    import torch
    from transformers import TextStreamer

    from ..bundle import Bundle
    from ..cache.attach import attach
    from ..cache.cache import KVCarCache
    from ..models.load import load_model
    from ..models.structure import cache_argument
    from ..record import Record
    from ..sizes import size_in_words

    given = _prompt(prompt, prompt_file)
    if context is not None and chat:
        raise InputError("a chat template begins a text, so it cannot follow a stored context; leave out --chat")
    padding, tokens_before = (0, 0) if context is None else _context_tokens(context)
    loaded_bundle = Bundle.from_pretrained(bundle)
    check_writable(json)
    with progress_bars() as tell:
        loaded = load_model(model, dtype, device, tell)
    inputs = _encode(loaded, given, chat, padding, tokens_before)
    tokens = inputs["input_ids"].shape[1]
    _check_length(tokens_before + tokens, max_new_tokens, loaded_bundle.plan.geometry.max_positions)
    torch.manual_seed(seed)
    with attach(loaded.model, loaded_bundle, window) as attachment:
        cache = attachment.new_cache()
        if context is not None:
            cache = KVCarCache.load(context, loaded.model, window=window)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        )
        began = time.perf_counter()
        result = loaded.model.generate(
            **inputs, **cache_argument(loaded.model, cache), max_new_tokens=max_new_tokens,
            streamer=TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True), **sampling,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        cached, stored = cache.get_seq_length(), cache.stored_bytes(in_bfloat16=True)
    full = loaded_bundle.plan.geometry.full_bytes(cached)
    size = size_in_words(cache.plan, cached, stored)
    new = result.shape[1] - tokens
    before = f"{tokens_before} stored + " if tokens_before else ""
    errors.print(
        f"{before}{tokens} prompt + {new} new tokens in {seconds:.1f} s; cache of {cached} tokens: {stored:,} bytes, "
        f"{size}; codecs {loaded_bundle.codec_bytes:,} bytes, once",
        highlight=False,
    )
    if json is not None:
        text = loaded.tokenizer.decode(result[0, tokens:], skip_special_tokens=True)
        figures = {
            "text": text, "context_tokens": tokens_before, "prompt_tokens": tokens, "new_tokens": new, "seconds": seconds,
            "cache_tokens": cached, "stored_bytes": stored, "full_bytes": full, "times_smaller": full / stored,
            "codec_bytes": loaded_bundle.codec_bytes,
        }  # fmt: skip
        config = {"model": model, "bundle": Path(bundle).name, "prompt": given, "seed": seed}
        Record("generation", figures, config).write(json)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise InputError("give either --prompt or --prompt-file")
    if file is not None:
        try:
            prompt = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the prompt {file}: {error}") from None
    assert prompt is not None
    if not prompt:
        raise InputError("the prompt is empty, so there are no tokens to continue; give some text")
    return prompt


def _context_tokens(context: Path) -> tuple[int, int]:
    """Read padding and tokens of a stored context; refuse, before the model is loaded, one that no single prompt can continue."""
    from ..context import read_context

    header = read_context(context).header
    if len(header.padding) != 1:
        raise InputError(f"{context} holds {len(header.padding)} sequences; only a single one can be continued here")
    return header.padding[0], header.tokens


def _encode(loaded: LoadedModel, prompt: str, chat: bool, padding: int, before: int) -> Any:
    """Make the inputs of ``generate``; after ``before`` tokens of a stored context, the mask covers those too."""
    tokenizer = loaded.tokenizer
    if chat:
        if not tokenizer.chat_template:
            raise InputError(f"{loaded.name} has no chat template; leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        # What begins a text stands at the beginning of the context already.
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not before)
    if not inputs["input_ids"].shape[1]:
        raise InputError("the prompt has no tokens to continue; give some text")
    if before:
        import torch

        inputs["attention_mask"] = (torch.arange(before + inputs["input_ids"].shape[1]) >= padding).long()[None]
    return inputs.to(loaded.model.device)


def _check_length(tokens: int, new: int, positions: int) -> None:
    if tokens + new > positions:
        raise InputError(
            f"a prompt of {tokens} tokens and {new} new ones go beyond the model's {positions} positions; shorten the "
            "prompt or ask for fewer new tokens"
        )
