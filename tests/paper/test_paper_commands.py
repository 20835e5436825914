"""``kvcar paper`` and ``kvcar tasks`` from end to end on a tiny model in a folder."""

import json

import pytest
from commands import error_of, run, words

from kvcar.bundle import Bundle
from kvcar.cli.paper import paper

QUICK = ("--context", 64, "--tokens", 2048, "--validate-every", 2, "--windows-per-step", 2)


def test_every_command_has_help_with_examples():
    names = [command.name or command.callback.__name__ for command in paper.registered_commands]
    assert {"similarity", "train", "quantize", "finetune", "reproduce"} <= set(names)
    for name in names:
        output = run("paper", name, "--help")
        assert "Examples" in output
        assert f"kvcar paper {name}" in output


@pytest.fixture(scope="module")
def start(model_folder, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "start"
    run(
        "fit-structure", model_folder, "-o", folder, "--text", text_file, "--codec", "autoencoder", "--key-latents", 20, "--value-latents",
        24, "--latent-bits", 16, "--window", 0, "--steps", 0, "--layers", "0-1,3", "--no-check",
    )  # fmt: skip
    return folder


def test_fit_with_latents_on_some_layers(start):
    plan = Bundle.from_pretrained(start).plan
    assert plan.coded_layers == (0, 1, 3)
    assert {(b.kind, b.latents, b.groups[0].bits) for b in plan.blocks} == {("key", 20, 16), ("value", 24, 16)}


def test_train_writes_a_bundle_and_its_history(start, model_folder, text_file, tmp_path):
    record = tmp_path / "record.json"
    output = run(
        "paper", "train", model_folder, "-b", start, "-o", tmp_path / "trained", "--text", text_file, "--joint-steps", 4,
        "--layer-steps", 1, *QUICK, "--json", record,
    )  # fmt: skip
    assert "validation loss" in output
    assert "KL divergence on held-out text" in output
    data = json.loads(record.read_text())
    assert [e["stage"] for e in data["history"] if e.get("step") == 0] == [
        "layer 0",
        "layer 1",
        "layer 3",
        "all layers",
    ]
    trained = Bundle.from_pretrained(tmp_path / "trained")
    assert trained.fit.options["train_joint_steps"] == 4
    assert not (tmp_path / "trained.training").exists()
    message = error_of("paper", "train", model_folder, "-b", start, "-o", tmp_path / "trained", "--text", text_file)
    assert "already holds a bundle" in message
    message = error_of("paper", "train", model_folder, "-b", start, "-o", tmp_path / "x", "--objective", "l2")
    assert "objective must be one of kl, ce" in message
    message = error_of(
        "paper", "train", model_folder, "-b", start, "-o", tmp_path / "x", "--resume", "--text", text_file, *QUICK
    )
    assert "no readable checkpoint" in message


def test_the_paper_s_recipe(start, model_folder, text_file, tmp_path):
    run(
        "paper", "train", model_folder, "-b", start, "-o", tmp_path / "paper", "--text", text_file, "--paper", "--layer-steps", 1,
        "--joint-steps", 1, *QUICK, "--no-check",
    )  # fmt: skip
    told = Bundle.from_pretrained(tmp_path / "paper").fit.options
    assert (told["train_objective"], told["train_start"], told["train_joint_trains"]) == ("ce", "random", "encoders")


@pytest.mark.parametrize("measure", ["l1", "kl"])
def test_similarity_shares_slots_and_fit_builds_on_them(measure, model_folder, text_file, tmp_path):
    shared, plot, record = tmp_path / "shared", tmp_path / "heads.svg", tmp_path / "r.json"
    output = run(
        "paper", "similarity", model_folder, "--text", text_file, "--tokens", 512, "--measure", measure, "--count", 3, "-o", shared,
        "--plot", plot, "--json", record,
    )  # fmt: skip
    assert "3 of 12 slots chosen" in output
    assert plot.read_text().startswith("<svg")
    data = json.loads(record.read_text())
    assert len(data["candidates"]) == 12
    reuses = Bundle.from_pretrained(shared).plan.reuses
    assert len(reuses) == len(data["chosen"]) == 3
    both = tmp_path / "both"
    run(
        "fit-structure", model_folder, "-o", both, "--text", text_file, "--reuse", shared, "--codec", "linear", "--key-latents", 16,
        "--value-latents", 16, "--scales", "dynamic", "--no-check",
    )  # fmt: skip
    plan = Bundle.from_pretrained(both).plan
    assert plan.reuses == reuses
    assert sum(len(block.slots) for block in plan.blocks) == 16 - 3
    assert {block.scales for block in plan.blocks} == {"dynamic"}


def test_similarity_says_what_is_missing(model_folder, tmp_path):
    assert "--count or --threshold" in error_of("paper", "similarity", model_folder, "-o", tmp_path / "x")
    assert "one of them" in error_of("paper", "similarity", model_folder, "--count", 1, "--threshold", 0.5)
    assert "unknown measure" in error_of("paper", "similarity", model_folder, "--measure", "l3")


def test_finetune_writes_a_model_that_its_bundle_fits(model_folder, text_file, tmp_path):
    shared, tuned, output = tmp_path / "shared", tmp_path / "tuned-model", tmp_path / "tuned"
    run("paper", "similarity", model_folder, "--text", text_file, "--tokens", 512, "--count", 6, "-o", shared)
    run(
        "paper", "finetune", model_folder, "-b", shared, "-o", output, "--model-output", tuned, "--text", text_file, "--joint-steps", 16,
        "--learning-rate", 1e-3, *QUICK,
    )  # fmt: skip
    assert "ratio to full" in run("eval", tuned, "-b", output, "--text", text_file, "--context", 96, "--windows", 1)
    assert "sampled weights differ" in error_of(
        "eval", model_folder, "-b", output, "--text", text_file, "--context", 96
    )
    message = error_of("paper", "finetune", model_folder, "-b", shared, "-o", tmp_path / "y", "--model-output", tuned)
    assert "exists" in message


@pytest.mark.parametrize("scales", ["static", "dynamic"])
def test_quantize(start, model_folder, text_file, tmp_path, scales):
    run(
        "paper", "quantize", model_folder, "-b", start, "-o", tmp_path / "int8", "--scales", scales, "--text", text_file
    )
    blocks = Bundle.from_pretrained(tmp_path / "int8").plan.blocks
    assert {(block.groups[0].bits, block.scales) for block in blocks} == {(8, scales)}


def test_tasks_through_the_cache(start, model_folder, tmp_path):
    path, record = tmp_path / "choices.jsonl", tmp_path / "r.json"
    lines = [
        {"query": words(20, i) + "\n", "choices": [words(4, 50 + i), words(6, 90 + i)], "gold": i % 2} for i in range(4)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "choices" in run("tasks", model_folder, path, "-b", start, "--limit", 3, "--json", record)
    assert json.loads(record.read_text())["tasks"]["choices"]["items"] == 3
    assert "cannot read the task" in error_of("tasks", model_folder, tmp_path / "missing.jsonl")
