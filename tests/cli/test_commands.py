"""The command line from end to end on a tiny model in a folder, and its messages for everything that is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import fitted
from commands import error_of, run, words
from tiny import tiny_model
from typer.testing import CliRunner

from kvcar.bundle import Bundle
from kvcar.cli import app
from kvcar.cli.app import PANELS
from kvcar.cli.recall import recall_in_words
from kvcar.errors import KVCarError
from kvcar.evaluate.recall import Recall, RecallItem
from kvcar.record import write_text


def test_fit_writes_a_bundle_with_a_card_that_holds_its_measurement(bundle, model_folder):
    loaded = Bundle.from_pretrained(bundle)
    assert sum(block.bits_per_token for block in loaded.plan.blocks) == 4 * 4 * 64
    assert loaded.fit.text == "words.txt (first part)"
    card = (bundle / "README.md").read_text()
    assert re.search(r"KL divergence \(nats per token\) \| 0\.\d+", card)
    assert re.search(r"\| 0 \| linear \| key \| 0-1 \| 0-1 \| 64 \| 64 \| 4\.\d\d \|", card)


def test_eval_writes_every_figure_and_its_provenance(bundle, model_folder, text_file, tmp_path):
    figures = tmp_path / "figures.json"
    run(
        "eval",
        model_folder,
        "--bundle",
        bundle,
        "--text",
        text_file,
        "--context",
        300,
        "--windows",
        2,
        "--json",
        figures,
    )
    data = json.loads(figures.read_text())
    wanted = {
        "perplexity", "perplexity_full", "perplexity_stderr", "kl_divergence", "same_top", "stored_bytes_per_token",
        "full_bytes_per_token", "times_smaller", "tokens", "context",
    }  # fmt: skip
    assert wanted <= set(data)
    assert data["context"] == 300
    assert data["tokens"] == 2 * 299
    assert data["full_bytes_per_token"] == 4 * 2 * 2 * 16 * 2
    assert data["times_smaller"] == pytest.approx(data["full_bytes_per_token"] / data["stored_bytes_per_token"])
    assert data["config"]["fitted_on_this_text"] is True
    assert {"torch", "transformers", "kvcar", "date", "command"} <= set(data["provenance"])


@pytest.mark.parametrize(("promised", "said"), [(1e9, "fits this text well"), (1e-9, "costs more on this text")])
def test_eval_says_whether_the_text_fits(promised, said, bundle, model_folder, text_file, tmp_path):
    made = Bundle.from_pretrained(bundle)
    made.with_figures({"held_out": made.figures["held_out"] | {"kl_divergence": promised}}).save_pretrained(
        tmp_path / "b"
    )
    printed = run("eval", model_folder, "--bundle", tmp_path / "b", "--text", text_file, "--context", 300)
    assert said in " ".join(printed.split())


def test_eval_names_the_layers_that_cost_most_where_a_text_costs_more(bundle, model_folder, text_file, tmp_path):
    made = fitted(tiny_model("llama"), codec="linear8", metric="effect", bits=2, layers_per_block=2)
    promised = Bundle.from_pretrained(bundle).figures["held_out"] | {"kl_divergence": 1e-9}
    made.with_figures({"held_out": promised}).save_pretrained(tmp_path / "b")
    printed = " ".join(run("eval", model_folder, "-b", tmp_path / "b", "--text", text_file, "--context", 300).split())
    named = re.search(r"its codes are expected to cost: (layers \d to \d.*?), (layers .*?), (layers .*?%)", printed)
    shares = [int(re.search(r"(\d+) %", each)[1]) for each in named.groups()]
    assert shares == sorted(shares, reverse=True)
    assert 50 < sum(shares) <= 100


def test_a_smaller_window_stores_less(bundle, model_folder, text_file, tmp_path):
    sizes = []
    for window in (0, 128):
        path = tmp_path / f"{window}.json"
        run(
            "eval",
            model_folder,
            "-b",
            bundle,
            "--text",
            text_file,
            "--context",
            320,
            "--windows",
            1,
            "--window",
            window,
            "--json",
            path,
        )
        sizes.append(json.loads(path.read_text())["stored_bytes"])
    assert sizes[0] < sizes[1]


def test_eval_reads_jsonl(bundle, model_folder, tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": words(150, seed)}) for seed in range(4)))
    assert "1 windows of 200 tokens" in run(
        "eval", model_folder, "-b", bundle, "--text", path, "--context", 200, "--windows", 1
    )


def test_generate_streams_and_records(bundle, model_folder, tmp_path, capsys):
    path = tmp_path / "out.json"
    output = run("generate", model_folder, "-b", bundle, "--prompt", words(90), "--max-new-tokens", 12, "--json", path)
    data = json.loads(path.read_text())
    assert data["prompt_tokens"] == 90
    assert data["new_tokens"] == 12
    assert data["cache_tokens"] == 101
    assert data["text"].split()[0] in output
    sampled = [
        json.loads(path.read_text())["text"]
        for seed in (1, 1, 2)
        if run("generate", model_folder, "-b", bundle, "--prompt", words(90), "--max-new-tokens", 12, "--temperature", 2.0,
               "--seed", seed, "--json", path)
    ]  # fmt: skip
    assert sampled[0] == sampled[1] != sampled[2]


def test_inspect_shows_the_plan_and_draws_it(bundle, tmp_path):
    plot, figures = tmp_path / "bits.svg", tmp_path / "plan.json"
    output = run("inspect", bundle, "--plot", plot, "--json", figures)
    assert "0-1" in output
    assert output.count("█") > 8
    assert plot.read_text().startswith("<svg")
    layers = json.loads(figures.read_text())["bits_by_layer"]
    assert [layer["key"] for layer in layers] == pytest.approx([4.0] * 4, abs=1.0)


def test_size_with_and_without(bundle, model_folder, tmp_path):
    path = tmp_path / "size.json"
    run("size", model_folder, "--bundle", bundle, "--memory", "1MiB", "--tokens", 400, "--batch", 2, "--json", path)
    data = json.loads(path.read_text())
    assert data["full"]["bytes"] == 2 * 400 * 512
    assert data["full"]["largest_batch"] == 2**20 // (400 * 512)
    assert data["compressed"]["largest_batch"] > data["full"]["largest_batch"]
    assert "full (bfloat16)" in run("size", model_folder, "--memory", "1MiB", "--tokens", 400)


@pytest.mark.parametrize("codec", ["identity", "autoencoder"])
def test_other_codecs_fit(codec, model_folder, text_file, tmp_path):
    output = run(
        "fit-structure",
        model_folder,
        "-o",
        tmp_path / "b",
        "--text",
        text_file,
        "--codec",
        codec,
        "--steps",
        5,
        "--tokens",
        2048,
    )
    assert "at 512 tokens " in output
    assert Bundle.from_pretrained(tmp_path / "b").plan.blocks[0].codec == codec


def test_fit_does_not_touch_what_is_there(bundle, model_folder, text_file, tmp_path):
    before = (bundle / "plan.json").read_bytes()
    assert "already holds a bundle" in error_of("fit", model_folder, "-o", bundle, "--text", text_file)
    assert (bundle / "plan.json").read_bytes() == before
    (tmp_path / "file").write_text("")
    assert "cannot write to" in error_of("fit", model_folder, "-o", tmp_path / "file" / "b", "--text", text_file)


def test_an_interrupted_fit_leaves_nothing(model_folder, text_file, tmp_path, monkeypatch):
    import kvcar.fit.statistics as fitting

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "principal_basis", interrupted)
    result = CliRunner().invoke(app, ["fit", str(model_folder), "-o", str(tmp_path / "b"), "--text", str(text_file)])
    assert result.exit_code != 0
    assert list(tmp_path.iterdir()) == []


def test_texts_and_prompts_that_do_not_fit(bundle, model_folder, text_file, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(words(50))
    assert "context of at most 50" in error_of("eval", model_folder, "-b", bundle, "--text", short, "--context", 100)
    assert "longer than the model's 512" in error_of(
        "eval", model_folder, "-b", bundle, "--text", text_file, "--context", 600
    )
    assert "at least 2 tokens" in error_of("eval", model_folder, "-b", bundle, "--text", text_file, "--context", 0)
    assert "the text has" in error_of("fit", model_folder, "-o", tmp_path / "b", "--text", short)
    assert "512 positions" in error_of(
        "generate", model_folder, "-b", bundle, "--prompt", words(500), "--max-new-tokens", 20
    )
    assert "no tokens to continue" in error_of("generate", model_folder, "-b", bundle, "--prompt", "")
    assert "no tokens to continue" in error_of("generate", model_folder, "-b", bundle, "--prompt", "  ")
    assert "either --prompt or --prompt-file" in error_of("generate", model_folder, "-b", bundle)
    assert "no chat template" in error_of("generate", model_folder, "-b", bundle, "--prompt", "w1", "--chat")
    assert not (tmp_path / "b").exists()


def test_models_and_bundles_that_are_not_there(bundle, model_folder, tmp_path):
    assert "no bundle at" in error_of("inspect", tmp_path / "nowhere")
    assert "there is no folder" in error_of("eval", tmp_path / "nowhere", "-b", bundle)
    assert "without a config.json" in error_of("eval", tmp_path, "-b", bundle)
    assert "there is no file" in error_of("size", "nothing.gguf")
    assert "cannot load the model 'no-such/model'" in error_of("eval", "no-such/model", "-b", bundle)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF nonsense")
    assert "cannot load" in error_of("eval", broken, "-b", bundle)
    assert "dtype must be" in error_of("eval", model_folder, "-b", bundle, "--dtype", "int4")
    assert "cannot be used" in error_of("eval", model_folder, "-b", bundle, "--device", "cuda:9")


def test_a_bundle_of_another_model_is_refused(bundle, tmp_path, model_folder, text_file):
    other = tmp_path / "other"
    tiny_model("llama", seed=5).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((model_folder / name).read_bytes())
    message = error_of("eval", other, "-b", bundle, "--text", text_file, "--context", 100, "--windows", 1)
    assert "sampled weights differ" in message


def test_figures_that_cannot_be_written_are_told_before_the_work(bundle, model_folder, tmp_path):
    where = tmp_path / "no" / "such" / "folder.json"
    assert "choose a folder that exists" in error_of("eval", model_folder, "-b", bundle, "--json", where)
    assert "is a folder" in error_of("inspect", bundle, "--json", tmp_path)
    with pytest.raises(KVCarError, match="choose a folder"):
        write_text(where, "text")


@pytest.mark.parametrize("command", [name for names in PANELS.values() for name in names if name != "paper"])
def test_every_command_has_help_with_examples(command):
    output = run(command, "--help")
    assert "Examples" in output
    assert f"kvcar {command}" in output


def test_errors_are_messages_not_tracebacks(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "kvcar", "inspect", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "error:" in result.stderr
    assert "Traceback" not in result.stderr
    assert "plan.json" in result.stderr
    usage = subprocess.run([sys.executable, "-m", "kvcar", "fit"], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    version = subprocess.run([sys.executable, "-m", "kvcar", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"kvcar \d+\.\d+\.\d+\S*\n", version.stdout)
    assert Path(sys.executable).exists()


def test_eval_runs_a_suite_of_generated_items(bundle, model_folder, tmp_path):
    path = tmp_path / "recall.json"
    given = ("-b", bundle, "--suite", "recall", "--items", 3, "--context", 300, "--task", "copy", "--task", "turns")
    printed = " ".join(run("eval", model_folder, *given, "--json", path).split())
    data = json.loads(path.read_text())
    assert set(data["tasks"]) == {"copy", "turns"}
    assert data["asked"] == len(data["items"]) >= 6
    assert data["counted"] == sum(item["full_right"] for item in data["items"])
    assert data["config"]["suite"] == "recall"
    said = "the full cache fails all" if not data["counted"] else f"of {data['counted']} items lost"
    assert said in printed
    assert "points lost" in printed


def test_what_a_suite_cannot_do_is_refused_before_the_model_is_loaded(bundle, text_file, tmp_path):
    for given, message in (
        (("--suite", "sums"), "no suite 'sums'; known are: recall"),
        (("--suite", "recall", "--text", text_file), "leave out --text or --suite"),
        (("--suite", "recall", "--context", 9999), "the model has 512 positions"),
        (("--suite", "recall", "--context", 150), "too short for recall"),
        (("--suite", "recall", "--task", "sums"), "unknown recall task 'sums'"),
        (("--suite", "recall", "--items", 0), "at least 1 item"),
    ):
        assert message in error_of("eval", tmp_path / "no-model", "-b", bundle, *given)


def test_recall_is_said_in_words():
    items = [RecallItem("copy", 1, p, True, p > 0, 0.1) for p in range(4)] + [
        RecallItem("copy", 1, 9, False, True, 1.0)
    ]
    assert recall_in_words(Recall(tuple(items))) == (
        "1 of 4 items lost, 25.00 ± 25.00 points below the full cache; 1 that the full cache fails are left out, 1 of which this "
        "cache gets right. The full cache is sure of none of them."
    )
    sure = (*items, RecallItem("copy", 1, 10, True, True, 0.0, 1.5), RecallItem("copy", 1, 11, True, False, 2.0, 3.0))
    assert recall_in_words(Recall(sure)).endswith("Of the 2 that the full cache is sure of, 1 are lost")
    assert "fails all 1 items" in recall_in_words(Recall(tuple(items[4:])))
