"""Running until memory or the model's positions end it, in a child process."""

import pytest
from bundles import fitted
from tiny import POSITIONS, tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kvcar.errors import InputError
from kvcar.evaluate.memory import fill_memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fill")
    model = tiny_model("llama")
    model.save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / "model")
    fitted(model, bits=4, window=0).save_pretrained(folder / "bundle")
    return folder


@pytest.mark.parametrize(
    ("compressed", "dtype"), [(False, "bfloat16"), (True, "bfloat16"), (False, "float32"), (True, "float32")]
)
def test_positions_end_a_run_with_much_memory(folder, compressed, dtype):
    bundle = folder / "bundle" if compressed else None
    run = fill_memory(str(folder / "model"), bundle, 2**30, batch=3, window=0, dtype=dtype)
    assert run["tokens"] == POSITIONS
    assert run["limited_by_positions"] == 1
    full = 3 * POSITIONS * 4 * 2 * 2 * 16 * 2
    assert run["cache_bytes"] == full if not compressed else run["cache_bytes"] < full / 2


def test_a_child_that_fails_says_why(folder):
    with pytest.raises(InputError, match="memory measurement failed"):
        fill_memory(str(folder / "nothing"), None, 2**20, batch=1)
