"""The five core dependencies alone fit, attach, generate and measure; what comes with extras is not even looked for."""

import subprocess
import sys
from pathlib import Path

SCRIPT = '''
import sys

EXTRAS = {
    "accelerate", "constriction", "gguf", "hqq", "jinja2", "lm_eval", "matplotlib", "optimum", "quanto", "triton",
    "yaml", "zstandard",
}
# transformers brings these along and imports them where it likes; kvcar itself must not.
TRANSFORMERS_OWN = {"typer", "rich"}


class Absent:
    """Finds nothing of the extras for kvcar, whether they are installed or not."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.split(".")[0]
        frame = sys._getframe(1)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        by_kvcar = frame is not None and "kvcar" in frame.f_globals.get("__name__", "").split(".")[0]
        if by_kvcar and top in EXTRAS | TRANSFORMERS_OWN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


sys.meta_path.insert(0, Absent)
import torch

import kvcar

assert not {"transformers"} & set(sys.modules), "import kvcar brought in transformers"
from tiny import tiny_model, token_ids

model = tiny_model("llama")
bundle = kvcar.fit(model, token_ids=token_ids(256, batch=12, seed=7), times_smaller=3)
assert bundle.figures
bundle.save_pretrained(sys.argv[1])
bundle = kvcar.Bundle.from_pretrained(sys.argv[1])
with kvcar.attach(model, bundle) as attached:
    cache = attached.new_cache()
    out = model.generate(token_ids(200), past_key_values=cache, max_new_tokens=8, do_sample=False)
assert out.shape == (1, 208) and cache.stored_bytes() > 0
with kvcar.attach(model, kvcar.lossless(model)):
    exact = model.generate(token_ids(200), max_new_tokens=8, do_sample=False)
assert torch.equal(exact, model.generate(token_ids(200), max_new_tokens=8, do_sample=False))
print("ok")
'''


def test_core_dependencies_alone_fit_attach_and_generate(tmp_path):
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "bundle")],
        capture_output=True, text=True, check=False, cwd=here, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("ok")
