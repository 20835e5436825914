"""Measure what bundles of several sizes cost, stepped through the cache, beside one that loses nothing.

python examples/measure.py demo
"""

import argparse

import kvcar

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="'demo', a folder, a .gguf file or a hub id")
parser.add_argument("--text", help="what to fit and to measure on; better two texts. Default: English text of Python's")
parser.add_argument("--sizes", type=float, nargs="+", default=[4, 8], help="times smaller")
parser.add_argument("--context", type=int, help="tokens of a window; default: 2,048, or what the model has")
options = parser.parse_args()

loaded = kvcar.load_model(options.model)
model, tokenizer = loaded.model, loaded.tokenizer
bundles = {"lossless": kvcar.lossless(model)}  # the noise floor: what rounding alone does
for size in options.sizes:
    bundles[f"{size:g}x"] = kvcar.fit(model, tokenizer, options.text, times_smaller=size, check=False)

for name, bundle in bundles.items():
    found = kvcar.evaluate(model, bundle, tokenizer, options.text, context=options.context)
    print(
        f"{name}: {found.full_bytes / found.stored_bytes:.2f} times smaller, KL divergence {found.kl_divergence.value:.5f} "
        f"nats per token, same top token {100 * found.same_top.value:.1f} %, perplexity x {found.perplexity_ratio.value:.4f}"
    )
