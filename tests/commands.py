"""Running commands in tests: a tiny model in a folder, a text, a bundle, and what a command prints or refuses."""

import pytest
import torch
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from kvcar.cli import app
from kvcar.errors import KVCarError

WORDS = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(125))]


def words(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(0, 125, (count,), generator=generator).tolist())


def words_tokenizer():
    """A tokenizer whose tokens are words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>", eos_token="<pad>")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(words(100, seed) for seed in range(80)))
    return path


@pytest.fixture(scope="session")
def bundle(model_folder, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "tiny-4x"
    run("fit-structure", model_folder, "-o", folder, "--text", text_file, "--bits", 4, "--layers-per-block", 2)
    return folder


def run(*args):
    """Run a command in this process; returns what it printed."""
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def error_of(*args):
    """Run a command that must fail with a message of kvcar's."""
    with pytest.raises(KVCarError) as caught:
        CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    return str(caught.value)
