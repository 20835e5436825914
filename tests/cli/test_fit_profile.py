"""``kvcar fit`` by profile, from the command line."""

import json

from commands import error_of, run, words

from kvcar.bundle import Bundle


def test_a_fit_without_structure_is_by_profile_and_tells_its_curve(model_folder, text_file, tmp_path):
    path, record = tmp_path / "b", tmp_path / "fit.json"
    printed = run(
        "fit", model_folder, "-o", path, "--text", text_file, "--times-smaller", 4, "--tune-steps", 2, "--effect-tokens", 512,
        "--json", record,
    )  # fmt: skip
    assert "expected KL divergence by size" in printed
    bundle, data = Bundle.from_pretrained(path), json.loads(record.read_text())
    assert bundle.fit.options["profile"] == "balanced"
    assert bundle.fit.options["times_smaller"] == 4
    assert data["tuned_kl"] <= data["held_back_kl"]
    taken = len([e for e in data["tuning"] if "loss" in e])
    # It goes on only as long as held-back text says that it helps.
    assert taken == (2 if data["tuned_kl"] < data["held_back_kl"] else 1)
    assert data["kl_divergence"] > 0
    assert [size for size, _ in data["curve"]][:2] == [3.0, 4.0]


def test_several_texts_take_turns(model_folder, text_file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": words(120, seed)}) + "\n" for seed in range(100, 160)))
    run(
        "fit", model_folder, "-o", tmp_path / "b", "--text", text_file, "--text", f"{other}[:40]", "--profile", "small",
        "--tune-steps", 0, "--effect-tokens", 512, "--no-check",
    )  # fmt: skip
    fit = Bundle.from_pretrained(tmp_path / "b").fit
    assert fit.text == "words.txt + other.jsonl[:40]"


def test_a_divergence_instead_of_a_size(model_folder, text_file, tmp_path):
    run(
        "fit", model_folder, "-o", tmp_path / "b", "--text", text_file, "--max-kl", 0.05, "--tune-steps", 0,
        "--effect-tokens", 512, "--no-check",
    )  # fmt: skip
    assert Bundle.from_pretrained(tmp_path / "b").fit.options["max_kl"] == 0.05


def test_structure_and_search_exclude_each_other(model_folder, tmp_path):
    message = error_of("fit", model_folder, "-o", tmp_path / "b", "--profile", "small", "--bits", 3)
    assert "--profile" in message
    assert "--bits" in message
    assert "profile must be" in error_of("fit", model_folder, "-o", tmp_path / "b", "--profile", "huge")
    assert not (tmp_path / "b").exists()
