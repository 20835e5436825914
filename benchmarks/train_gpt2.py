"""Train a small GPT-2 from scratch, as a stand-in where the real one cannot be fetched: learned positions, one KV head a
query head, tokenizer included.

python benchmarks/train_gpt2.py gpt2-small --text wikitext-2/valid.txt --text "c4/validation-1k.jsonl[:500]"
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from kvcar.record import Record
from kvcar.text import read_text

RESULTS = Path(__file__).parent / "results"
END = "<|endoftext|>"


def main(
    output: Path,
    text: Annotated[list[str], typer.Option()],
    steps: int = 300,
    batch: int = 8,
    context: int = 512,
    layers: int = 6,
    width: int = 256,
    heads: int = 8,
    vocabulary: int = 4096,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> None:
    """Train and save the model to ``output``; a record goes into ``results/``."""
    torch.manual_seed(seed)
    sources = [read_text(each) for each in text]
    tokenizer = _tokenizer([source.text for source in sources], vocabulary)
    ids = torch.tensor([i for s in sources for i in tokenizer(s.text, verbose=False)["input_ids"]])
    train, held = ids[: -32 * context], ids[-32 * context :].view(32, context)
    end = int(tokenizer.convert_tokens_to_ids(END))  # pyright: ignore[reportArgumentType]  # one token, one id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=context, n_embd=width, n_layer=layers, n_head=heads,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.0, bos_token_id=end,
        eos_token_id=end,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses, began = [], time.monotonic()
    for step in range(steps):
        rise = min(1.0, (step + 1) / (0.05 * steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        starts = torch.randint(len(train) - context, (batch,))
        rows = torch.stack([train[start : start + context] for start in starts])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {sum(losses[-20:]) / 20:.3f}, {time.monotonic() - began:.0f} s", flush=True)
    model.eval()
    with torch.no_grad():
        held_loss = sum(model(input_ids=row[None], labels=row[None]).loss.item() for row in held) / len(held)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    figures = {
        "held_out_perplexity": math.exp(held_loss),
        "training_losses": losses[::20],
        "seconds": time.monotonic() - began,
    }
    setting = {"texts": text, "tokens": len(train), "steps": steps, "batch": batch, "context": context, "layers": layers,
               "width": width, "heads": heads, "vocabulary": len(tokenizer), "learning_rate": learning_rate, "seed": seed,
               "parameters": model.num_parameters()}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    Record("pretraining", figures, setting).write(RESULTS / f"pretraining-{output.name}.json")
    print(f"held-out perplexity {math.exp(held_loss):.1f}")


def _tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2 has it, learned from the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


if __name__ == "__main__":
    typer.run(main)
