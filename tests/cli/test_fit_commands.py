"""``kvcar fit`` and ``kvcar fit-structure``, from the command line."""

import json

import pytest
import typer
from commands import error_of, run, words

from kvcar.bundle import Bundle
from kvcar.cli import app
from kvcar.models import load


def test_a_fit_searches_and_says_what_it_found(model_folder, text_file, tmp_path):
    path, record = tmp_path / "b", tmp_path / "fit.json"
    printed = run(
        "fit", model_folder, "-o", path, "--text", text_file, "--times-smaller", 4, "--tokens", 6000, "--json", record
    )  # fmt: skip
    assert "expected KL divergence by size" in printed
    assert "held-out text: KL divergence" in printed
    bundle, data = Bundle.from_pretrained(path), json.loads(record.read_text())
    assert bundle.fit.options["profile"] == "balanced"
    assert bundle.fit.options["times_smaller"] == 4
    assert data["held_out"]["kl_divergence"] > 0
    assert data["held_out"] == bundle.figures["held_out"]
    assert [size for size, _ in data["curve"]][:2] == [3.0, 4.0]


def test_a_fit_says_how_much_of_held_out_text_is_kept_exactly(model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("kvcar.fit.page_costs.TIMES_A_TYPICAL_PAGE", 0.5)
    monkeypatch.setattr("kvcar.fit.page_costs.MARGIN", 0.5)
    monkeypatch.setattr("kvcar.fit.page_costs.LEAST_LIMIT", 0)
    given = ("--text", text_file, "--times-smaller", 4, "--tokens", 6000)
    printed = " ".join(run("fit", model_folder, "-o", tmp_path / "b", *given).split())
    found = Bundle.from_pretrained(tmp_path / "b").figures["held_out"]
    share = found["finer_page_share"]
    assert share > 0.1
    assert f"{100 * share:.1f} % of the coded tokens of this text are kept exactly" in printed
    assert (
        f"kept exactly, as their pages would cost too much | {100 * share:.1f} % |"
        in (tmp_path / "b/README.md").read_text()
    )


def test_several_texts_take_turns(model_folder, text_file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": words(120, seed)}) + "\n" for seed in range(100, 160)))
    run(
        "fit", model_folder, "-o", tmp_path / "b", "--text", text_file, "--text", f"{other}[:40]", "--profile", "small",
        "--tokens", 6000,
    )  # fmt: skip
    bundle = Bundle.from_pretrained(tmp_path / "b")
    assert bundle.fit.text == "words.txt (first part) + other.jsonl[:40] (first part) + samples of the model"


def test_a_divergence_instead_of_a_size(model_folder, text_file, tmp_path):
    run("fit", model_folder, "-o", tmp_path / "b", "--text", text_file, "--max-kl", 0.05, "--tokens", 6000)
    assert Bundle.from_pretrained(tmp_path / "b").fit.options["max_kl"] == 0.05


def test_what_makes_no_sense_is_refused_before_any_work(model_folder, tmp_path):
    fit, fit_structure = ((name, model_folder, "-o", tmp_path / "b") for name in ("fit", "fit-structure"))
    assert "profile must be" in error_of(*fit, "--profile", "huge")
    assert "not both" in error_of(*fit, "--times-smaller", 4, "--max-kl", 0.1)
    assert "not both" in error_of(*fit_structure, "--times-smaller", 4, "--bits", 3)
    assert "no list of layers" in error_of(*fit_structure, "--layers", "a-b")
    assert not (tmp_path / "b").exists()


def test_fit_shows_a_user_ten_options():
    command = typer.main.get_command(app).commands["fit"]
    options = [each for each in command.params if each.param_type_name == "option" and not each.hidden]
    assert len(options) == 10, [each.name for each in options]


def test_what_arithmetic_refuses_is_refused_before_the_model_is_loaded(model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "load_model", lambda *given: pytest.fail("the model was loaded"))
    fit = ("fit", model_folder, "-o", tmp_path / "b", "--text", text_file)
    assert "above 1" in error_of(*fit, "--times-smaller", 0.5)
    assert "above 1" in error_of(*fit, "--times-smaller", 1)
    assert "out of reach" in error_of(*fit, "--times-smaller", 500)
    assert "out of reach" in error_of(*fit, "--times-smaller", 5000, "--profile", "stored")
    few = error_of(*fit, "--tokens", 100)
    assert "got 1 of 100 tokens" in few
    assert "more than 1,024 tokens" in few
    assert "layers to compress" in error_of(
        "fit-structure", model_folder, "-o", tmp_path / "b", "--text", text_file, "--layers", "7-9"
    )


def test_a_fit_says_what_it_was_fitted_on_and_what_comes_next(model_folder, text_file, tmp_path):
    printed = run("fit", model_folder, "-o", tmp_path / "b", "--text", text_file, "--tokens", 6000)
    assert (
        "fitted on 4,608 tokens of words.txt (first part) + samples of the model; plans compared on 1,024 more"
        in printed
    )
    assert f"next: kvcar eval {model_folder} --bundle {tmp_path / 'b'}" in printed
    assert f"kvcar generate {model_folder} --bundle" in printed
