"""Tasks through the cache: the harness' own numbers with the full cache, others with a compressed one."""

import json

import pytest
import torch
from bundles import fitted
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvcar.errors import InputError
from kvcar.evaluate.tasks import KVCarLM, local_task, run_tasks

WORDS = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(125))]


def words(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(0, 125, (count,), generator=generator).tolist())


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    choice = [
        {"query": words(12 + i, i) + "\n", "choices": [words(6, 100 + i), words(9, 200 + i)], "gold": i % 2}
        for i in range(12)
    ]
    partial = [
        {"context_options": [words(9, 300 + i), words(11, 400 + i)], "continuation": words(5, 500 + i), "gold": i % 2}
        for i in range(12)
    ]
    paths = []
    for name, lines in (("choice", choice), ("partial", partial)):
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def responses(lm, files):
    """Log-likelihoods of every request, by task and item."""
    found = simple_evaluate(
        model=lm,
        tasks=[local_task(path) for path in files],
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
        task_manager=TaskManager(include_defaults=False),
    )
    return {
        (name, sample["doc_id"]): [float(answer[0]) for answer in sample["filtered_resps"]]
        for name, samples in found["samples"].items()
        for sample in samples
    }


@pytest.mark.parametrize("step_tokens", [1, 5])
def test_the_full_cache_gives_the_numbers_of_hf(tokenizer, files, step_tokens):
    model = tiny_model("llama")
    own = KVCarLM(model, tokenizer, None, step_tokens=step_tokens, batch_size=5)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5)
    expected, found = responses(theirs, files), responses(own, files)
    assert len(expected) == 24
    for item, values in expected.items():
        assert found[item] == pytest.approx(values, abs=1e-3), item
    results = run_tasks(own, files)
    direct = simple_evaluate(
        model=theirs,
        tasks=[local_task(p) for p in files],
        bootstrap_iters=1000,
        verbosity="ERROR",
        task_manager=TaskManager(include_defaults=False),
    )
    for name, figures in results.items():
        assert figures["acc"] == direct["results"][name]["acc,none"]
        assert figures["acc_stderr"] == pytest.approx(direct["results"][name]["acc_stderr,none"])
        assert figures["items"] == len(figures["correct"]) == 12
        assert sum(figures["correct"]) / 12 == figures["acc"]


def test_a_compressed_cache_is_really_read(tokenizer, files):
    model = tiny_model("llama")
    full = responses(KVCarLM(model, tokenizer, None), files)
    differences = {}
    for bits in (8, 2):
        lm = KVCarLM(model, tokenizer, fitted(model, bits=bits))
        found = responses(lm, files)
        lm.close()
        differences[bits] = sum(abs(a - b) for item in full for a, b in zip(full[item], found[item], strict=True))
    assert differences[2] > 4 * differences[8] > 0
    assert model.config._attn_implementation == "sdpa"


def test_generation_goes_through_the_cache(tokenizer, monkeypatch):
    model = tiny_model("llama")
    lm = KVCarLM(model, tokenizer, fitted(model, bits=2))
    made = []
    original = lm._attachment.new_cache
    monkeypatch.setattr(lm._attachment, "new_cache", lambda: made.append(original()) or made[-1])
    context = torch.tensor([tokenizer(words(40, 7))["input_ids"]])
    lm._model_generate(context, max_length=60, stop=["<eos>"], attention_mask=torch.ones_like(context))
    lm.close()
    assert len(made) == 1
    assert made[0].stored_bytes_by_part()["pages"] > 0


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        local_task(tmp_path / "missing.jsonl")
    path = tmp_path / "other.jsonl"
    path.write_text('{"text": "x"}\n')
    with pytest.raises(InputError, match="the first has text"):
        local_task(path)
