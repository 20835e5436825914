"""Read a long text once into a cache of your own, save it, and go on from the file without reading again.

python examples/own_cache.py demo          (needs the extra `store`)
"""

import argparse
import tempfile
from pathlib import Path

import torch

import kvcar

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="'demo', a folder, a .gguf file or a hub id")
parser.add_argument("--text", help="what to read, a .txt or .jsonl file; default: this file")
parser.add_argument("--bundle", help="a fitted one; default: one that loses nothing and saves nothing, made at once")
parser.add_argument("--output", help="file to keep the cache in; default: a temporary one")
options = parser.parse_args()

loaded = kvcar.load_model(options.model)
bundle = kvcar.Bundle.from_pretrained(options.bundle) if options.bundle else kvcar.lossless(loaded.model)
text = Path(options.text or __file__).read_text(encoding="utf-8")
ids = loaded.tokenizer(text, return_tensors="pt").input_ids[:, :300].to(loaded.model.device)

with tempfile.TemporaryDirectory() as temporary, kvcar.attach(loaded.model, bundle) as attached:
    file = options.output or f"{temporary}/text.ctx"
    cache = attached.new_cache()
    with torch.no_grad():
        loaded.model(input_ids=ids, past_key_values=cache)  # generate(past_key_values=cache) works as well
    full = bundle.plan.geometry.full_bytes(cache.tokens)
    stored = cache.stored_bytes(in_bfloat16=True)  # as `full` is; without it, bytes as they are
    print(f"{cache.tokens} tokens in {stored:,} bytes, {full:,} in the model's own cache (both in bfloat16)")
    print("of which", cache.stored_bytes_by_part())
    cache.save(file, token_ids=ids)  # entropy-coded, checksummed, tied to bundle and model
    print(f"{Path(file).stat().st_size:,} bytes in the file")

    again = kvcar.KVCarCache.load(file, loaded.model)
    # Only what is new is computed.
    question = torch.cat([ids, loaded.tokenizer(" In short,", return_tensors="pt").input_ids.to(ids.device)], dim=1)
    everything = torch.ones_like(question)  # no token is padding
    answer = loaded.model.generate(question, attention_mask=everything, past_key_values=again, max_new_tokens=20)
    print(loaded.tokenizer.decode(answer[0, ids.shape[1] :]))
