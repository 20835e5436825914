"""A small reproduction from a YAML file to records, stopped and gone on with."""

import json
from pathlib import Path

import pytest
from commands import run, words

from kvcar.bundle import Bundle
from kvcar.errors import InputError
from kvcar.paper.config import read_config
from kvcar.paper.reproduce import Reproducer

CONFIG = """
name: tiny
model: {model}
fit_context: 64
fit_texts:
  - {{text: {text}, windows: 40}}
texts:
  words: {{text: {text}, windows: 2, context: 96, step_tokens: 16}}
settings:
  - name: all-a
    table: autoencoder
    fit: {{codec: autoencoder, key_latents: 20, value_latents: 24, page_tokens: 32}}
    train: {{layer_steps: 1, joint_steps: 0, windows_per_step: 2}}
  - name: two-layers
    table: autoencoder
    base: all-a
    keep_layers: [1, 2]
    train: {{joint_steps: 2, validate_every: 1}}
  - name: shared
    table: reuse
    reuse: {{measure: kl, count: 3}}
    texts: []
  - name: shared-tuned
    table: reuse
    base: shared
    finetune: {{joint_steps: 2, learning_rate: 1.0e-4}}
  - name: both-int8
    table: headline
    base: all-a
    quantize: {{bits: 8, scales: {scales}}}
    tasks: true
tasks: {{tasks: [{task}], limit: 4, batch_size: 4}}
system: {{memory: 1MiB, batches: [1, 4], lengths: [64, 128], settings: [both-int8]}}
"""


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduction")
    (folder / "model").symlink_to(model_folder)
    (folder / "words.txt").write_text(words(4000))
    item = {"query": "w1 w2 w3 w4 w5 w6\n", "choices": ["w7 w8", "w9"], "gold": 1}
    (folder / "task.jsonl").write_text((json.dumps(item) + "\n") * 6)
    return folder


def write(folder, scales="dynamic", **changes):
    text = CONFIG.format(model=folder / "model", text=folder / "words.txt", task=folder / "task.jsonl", scales=scales)
    for old, new in changes.items():
        text = text.replace(old, new)
    path = folder / f"config-{scales}-{len(changes)}.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("scales", ["dynamic", "static"])
def test_everything_is_made_once_and_recorded(folder, tmp_path, scales):
    path = write(folder, scales)
    arguments = ["paper", "reproduce", path, "--folder", tmp_path / "work", "--records", tmp_path / "records"]
    run(*arguments, "--only", "all-a")
    first = tmp_path / "work" / "tiny" / "all-a" / "plan.json"
    made = first.stat().st_mtime_ns
    assert not (tmp_path / "work" / "tiny" / "shared").exists()
    run(*arguments)
    assert first.stat().st_mtime_ns == made

    records = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "records").glob("*.json")}
    fidelity = {
        n.removeprefix("paper-tiny-fidelity-words-") for n, r in records.items() if r["kind"] == "paper-fidelity"
    }
    assert fidelity == {"all-a", "two-layers", "shared-tuned", "both-int8"}
    two = records["paper-tiny-fidelity-words-two-layers"]
    assert (two["config"]["compressed_layers"], two["config"]["layers"]) == (2, 4)
    assert two["provenance"]["command"]
    half = records["paper-tiny-fidelity-words-all-a"]
    assert half["kl_divergence"] > two["kl_divergence"] > 0
    assert 25 < half["saved_percent"] < 32
    int8 = records["paper-tiny-fidelity-words-both-int8"]
    assert int8["saved_percent"] > half["saved_percent"] + 20
    # Eight bits cost little next to what the cut of rank costs.
    assert int8["kl_divergence"] == pytest.approx(half["kl_divergence"], rel=0.1)
    assert records["paper-tiny-fidelity-words-shared-tuned"]["config"]["tuned_model"]
    assert records["paper-tiny-tasks-full"]["tasks"]["task"]["items"] == 4
    assert records["paper-tiny-tasks-both-int8"]["config"]["compressed_layers"] == 4
    system = records["paper-tiny-system-full"]
    assert system["longest_tokens"]["both-int8"]["4"] > 1.5 * system["longest_tokens"]["full"]["4"]
    bundle = Bundle.from_pretrained(tmp_path / "work" / "tiny" / "both-int8")
    assert {block.scales for block in bundle.plan.blocks} == {scales}
    assert "training-tiny-two-layers" in records
    # Settings that share by the same measure read the record of the first.
    assert len(records["similarity-tiny-kl"]["candidates"]) == 12


def test_bad_configurations_say_what_is_wrong(folder, tmp_path):
    for wrong, message in (
        ({"name: two-layers": "name: all-a"}, "two settings"),
        ({"base: all-a": "base: nothing"}, "does not come before"),
        ({"keep_layers: [1, 2]": "keep_layer: [1]"}, "keep_layer"),
        ({"settings: [both-int8]": "settings: [nothing]"}, "not there"),
    ):
        with pytest.raises(InputError, match=message):
            read_config(write(folder, **wrong))
    with pytest.raises(InputError, match="cannot read"):
        read_config(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(InputError, match="not valid YAML"):
        read_config(broken)
    given = read_config(write(folder, **{"codec: autoencoder": "codek: autoencoder"}))
    with pytest.raises(InputError, match=r"setting all-a: .*codek"):
        Reproducer(given, tmp_path / "w", tmp_path / "r", lambda *a: None).run()
    with pytest.raises(InputError, match="no setting is called x"):
        Reproducer(given, tmp_path / "w", tmp_path / "r", lambda *a: None).run(["x"])


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "benchmarks").glob("paper-*.yaml")), ids=lambda p: p.stem
)
def test_shipped_configurations_are_valid(path):
    assert len(read_config(path).settings) > 10
