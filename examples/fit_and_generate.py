"""Fit a bundle for a model, write it, and generate over a compressed cache.

python examples/fit_and_generate.py demo
"""

import argparse

import kvcar

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="'demo', a folder, a .gguf file or a hub id")
parser.add_argument(
    "--text", help="what to fit on, a .txt or .jsonl file; default: English text that ships with Python"
)
parser.add_argument("--times-smaller", type=float, default=6)
parser.add_argument("--prompt", default="The memory wall is")
options = parser.parse_args()

loaded = kvcar.load_model(options.model)
bundle = kvcar.fit(loaded.model, loaded.tokenizer, options.text, times_smaller=options.times_smaller)
print(f"{bundle.figures['times_smaller']:.2f} times smaller, codecs of {bundle.codec_bytes / 1e6:.1f} MB")
bundle.save_pretrained("bundle", overwrite=True)  # a folder; bundle.push_to_hub("me/my-bundle") puts it on the hub

with kvcar.attach(loaded.model, "bundle"):
    ids = loaded.tokenizer(options.prompt, return_tensors="pt").to(loaded.model.device)
    print(loaded.tokenizer.decode(loaded.model.generate(**ids, max_new_tokens=100)[0]))
