"""Training makes bundles better in the real cache, goes on where it was killed, and is the same in two processes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bundles import SOURCE, fitted
from tiny import tiny_model, token_ids

from kvcar.cache.attach import attach
from kvcar.cache.cache import KVCarCache
from kvcar.errors import InputError
from kvcar.evaluate.fidelity import measure_fidelity
from kvcar.fit.losses import kl_divergence
from kvcar.paper.algorithm1 import train_bundle
from kvcar.paper.options import TrainOptions
from kvcar.paper.simulate import Simulator, units_of

WINDOWS = token_ids(64, batch=10, seed=3)
# A random model is chaotic: what helps it is small, and needs a good many windows.
MANY = token_ids(64, batch=66, seed=3)
QUICK = TrainOptions(layer_steps=4, joint_steps=12, validate_every=4, layer_learning_rate=3e-3, learning_rate=3e-3)


def start(model, **options):
    given = {"codec": "autoencoder", "key_latents": 20, "value_latents": 24, "latent_bits": 16, "window": 0, "steps": 0}
    return fitted(model, **(given | options))


def assert_alike(first, second):
    """Two histories that differ by rounding alone."""
    for a, b in zip(first, second, strict=True):
        assert {k: v for k, v in a.items() if "loss" not in k} == {k: v for k, v in b.items() if "loss" not in k}
        for name in a.keys() & {"loss", "validation_loss"}:
            # A random model amplifies rounding from step to step.
            assert a[name] == pytest.approx(b[name], rel=1e-4 if a["stage"] == "layer 0" else 1e-2)


def divergence(model, bundle):
    """From the full cache, token by token, in the simulated cache; ``test_simulate`` compares that with the real one."""
    ids = token_ids(96, batch=3, seed=5)
    with torch.no_grad(), Simulator(model, bundle.plan, units_of(bundle, ids.device)) as simulator:
        with simulator.compressing(()):
            full = simulator.logits(ids)
        with simulator.compressing():
            return float(kl_divergence(simulator.logits(ids), full))


def stepped_divergence(model, bundle):
    with attach(model, bundle):
        windows = token_ids(96, batch=3, seed=5)
        cache = {"x": lambda: KVCarCache(bundle, 0)}
        return measure_fidelity(model, windows, cache, chunk=1)["x"].kl_divergence.value


@pytest.mark.parametrize(
    "given", [{}, {"codec": "linear"}, {"latent_bits": 8, "scales": "dynamic"}, {"latent_bits": 4}]
)
def test_training_on_kl_lowers_it(given):
    model = tiny_model("llama")
    before = start(model, **given)
    options = TrainOptions(joint_steps=40, learning_rate=1e-3, windows_per_step=8)
    after = train_bundle(model, before, MANY, SOURCE, options).bundle
    assert after.plan == before.plan
    assert divergence(model, after) < 0.97 * divergence(model, before)
    if given == {"latent_bits": 4}:
        assert stepped_divergence(model, after) < 0.97 * stepped_divergence(model, before)


@pytest.mark.parametrize("trains", ["encoders", "decoders"])
def test_only_what_was_asked_for_changes(trains):
    model = tiny_model("gpt2")
    before = start(model)
    options = replace(QUICK, layer_steps=0, joint_trains=trains)
    after = train_bundle(model, before, WINDOWS, SOURCE, options).bundle
    for old, new in zip(before.blocks, after.blocks, strict=True):
        changed = {n.split(".")[0] for n, t in new.tensors().items() if not torch.equal(t, old.tensors()[n])}
        assert changed == {trains.removesuffix("s")}


def test_the_paper_s_recipe_learns_from_nothing():
    model = tiny_model("llama")
    options = TrainOptions.paper(layer_steps=6, joint_steps=6, layer_learning_rate=1e-2, l1_weight=1.0)
    result = train_bundle(model, start(model), WINDOWS, SOURCE, options)
    first = [e["loss"] for e in result.history if e.get("step") == 1 and "loss" in e and e["stage"] == "layer 0"]
    last = [e["loss"] for e in result.history if e.get("step") == 6 and "loss" in e and e["stage"] == "layer 0"]
    assert last < first
    stages = dict.fromkeys(entry["stage"] for entry in result.history)
    assert list(stages) == ["layer 0", "layer 1", "layer 2", "layer 3", "all layers"]


def test_it_never_ends_worse_than_it_began():
    model = tiny_model("llama")
    before = start(model)
    wild = replace(QUICK, layer_steps=0, learning_rate=3.0)
    after = train_bundle(model, before, WINDOWS, SOURCE, wild)
    losses = [e["validation_loss"] for e in after.history if "validation_loss" in e]
    assert max(losses[1:]) > losses[0]
    assert divergence(model, after.bundle) <= divergence(model, before) * 1.01


def test_patience_ends_early():
    options = replace(QUICK, layer_steps=0, learning_rate=3.0, joint_steps=200, validate_every=1, patience=3)
    model = tiny_model("llama")
    history = train_bundle(model, start(model), WINDOWS, SOURCE, options).history
    assert history[-1]["step"] < 50


@pytest.mark.parametrize("killed_at", [("layer 2", 4), ("all layers", 9)])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path, killed_at):
    model = tiny_model("llama")
    whole = train_bundle(model, start(model), WINDOWS, SOURCE, QUICK)

    class Killed(Exception):
        pass

    def kill(entry):
        if (entry["stage"], entry["step"]) == killed_at and "loss" in entry:
            raise Killed

    with pytest.raises(Killed):
        train_bundle(model, start(model), WINDOWS, SOURCE, QUICK, tmp_path / "c", on_step=kill)
    resumed = train_bundle(model, start(model), WINDOWS, SOURCE, QUICK, tmp_path / "c", resume=True)
    assert resumed.history == whole.history
    for a, b in zip(whole.bundle.blocks, resumed.bundle.blocks, strict=True):
        for name, tensor in a.tensors().items():
            assert torch.equal(tensor, b.tensors()[name])
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    model = tiny_model("llama")

    def kill(entry):
        if entry["stage"] == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_bundle(model, start(model), WINDOWS, SOURCE, QUICK, tmp_path / "c", on_step=kill)
    with pytest.raises(InputError, match="options differ"):
        train_bundle(model, start(model), WINDOWS, SOURCE, replace(QUICK, seed=1), tmp_path / "c", resume=True)
    (tmp_path / "c" / "training.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="no readable checkpoint"):
        train_bundle(model, start(model), WINDOWS, SOURCE, QUICK, tmp_path / "c", resume=True)


def test_accumulation_gives_the_same_gradients():
    model = tiny_model("llama")
    options = replace(QUICK, windows_per_step=4)
    whole = train_bundle(model, start(model), WINDOWS, SOURCE, options).history
    parts = train_bundle(model, start(model), WINDOWS, SOURCE, replace(options, accumulation=4)).history
    assert_alike(whole, parts)


_SCRIPT = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from test_algorithm1 import QUICK, SOURCE, WINDOWS, start, tiny_model, train_bundle
from dataclasses import replace
from kvcar.fit.processes import is_main_process, process_count
torch.set_num_threads(1)
model = tiny_model("llama")
result = train_bundle(model, start(model), WINDOWS, SOURCE, replace(QUICK, windows_per_step=4))
if is_main_process():
    print(json.dumps([process_count(), result.history]))
"""


def test_two_processes_give_the_result_of_one(tmp_path):
    script = tmp_path / "run.py"
    here = __file__.rsplit("/", 1)[0]
    script.write_text(
        _SCRIPT.format(tests=here).replace(
            "sys.path.insert(0", f"sys.path.insert(0, {here + '/..'!r}); sys.path.insert(0"
        )
    )
    # What `accelerate launch` starts on a machine with GPUs; on CPUs it would ask for MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    printed = subprocess.run(launch, capture_output=True, text=True, check=False, timeout=300)
    assert printed.returncode == 0, printed.stderr[-2000:]
    processes, history = json.loads(printed.stdout.strip().splitlines()[-1])
    assert processes == 2
    model = tiny_model("llama")
    alone = train_bundle(model, start(model), WINDOWS, SOURCE, replace(QUICK, windows_per_step=4)).history
    assert_alike(alone, history)


def test_what_cannot_be_trained_is_refused():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="more windows"):
        train_bundle(model, start(model), WINDOWS[:2], SOURCE, QUICK)
    with pytest.raises(InputError, match="no block that can be trained"):
        train_bundle(model, fitted(model, codec="identity"), WINDOWS, SOURCE, QUICK)
    with pytest.raises(InputError, match="nothing to train"):
        train_bundle(model, fitted(model, codec="identity", bits=4), WINDOWS, SOURCE, QUICK)
    with pytest.raises(InputError, match="random start"):
        train_bundle(model, fitted(model, bits=4), WINDOWS, SOURCE, TrainOptions.paper())
