"""Fit a bundle for a model, write it, and generate over a compressed cache.

python examples/fit_and_generate.py demo
"""

import argparse
import logging
import tempfile

import kvcar

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="'demo', a folder, a .gguf file or a hub id")
parser.add_argument(
    "--text",
    help="what to fit on, a .txt or .jsonl file; default: English text and code of Python's, and samples of the model",
)
parser.add_argument("--times-smaller", type=float, default=6)
parser.add_argument("--prompt", default="The memory wall is")
parser.add_argument("--output", help="folder to keep the bundle in, which must not exist; default: a temporary one")
options = parser.parse_args()
logging.basicConfig(level=logging.WARNING, format="%(message)s")
logging.getLogger("kvcar").setLevel(logging.INFO)  # what a fit makes and what is attached, in a line each

loaded = kvcar.load_model(options.model)
print("fitting, which takes minutes for a model of 135 million parameters on two cores")
bundle = kvcar.fit(loaded.model, loaded.tokenizer, options.text, times_smaller=options.times_smaller)
print(bundle)

with tempfile.TemporaryDirectory() as temporary:
    folder = options.output or f"{temporary}/bundle"
    bundle.save_pretrained(folder)  # a folder; bundle.push_to_hub("me/my-bundle") puts it on the hub
    with kvcar.attach(loaded.model, folder):
        ids = loaded.tokenizer(options.prompt, return_tensors="pt").to(loaded.model.device)
        print(loaded.tokenizer.decode(loaded.model.generate(**ids, max_new_tokens=100)[0]))
