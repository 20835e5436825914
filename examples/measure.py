"""Measure what bundles of several sizes cost, stepped through the cache, beside one that loses nothing.

python examples/measure.py demo
"""

import argparse
import time

import kvcar

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="'demo', a folder, a .gguf file or a hub id")
parser.add_argument(
    "--text", help="what to fit on, a .txt or .jsonl file; default: text and code of Python's, and samples"
)
parser.add_argument("--test-text", help="what to measure on; default: a part of Python's text that no fit reads")
parser.add_argument("--sizes", type=float, nargs="+", default=[4, 8], help="times smaller")
parser.add_argument("--context", type=int, help="tokens of a window; default: 2,048, or what the model has")
options = parser.parse_args()

shown = 0.0


def show(what: str, done: int, total: int) -> None:
    """Print where things stand, every ten seconds."""
    global shown
    if time.monotonic() - shown > 10:
        shown = time.monotonic()
        print(f"  {what}: {done:,} of {total:,}", flush=True)


loaded = kvcar.load_model(options.model)
model, tokenizer = loaded.model, loaded.tokenizer
for size in (None, *options.sizes):
    if size is None:
        name, bundle = "lossless", kvcar.lossless(model)  # the noise floor: what rounding alone does
    else:
        name = f"{size:g}x"
        bundle = kvcar.fit(model, tokenizer, options.text, times_smaller=size, check=False, on_progress=show)
    found = kvcar.evaluate(model, bundle, tokenizer, options.test_text, context=options.context, on_progress=show)
    print(name, found)
