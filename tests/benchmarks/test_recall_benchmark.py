"""The benchmarks of recall and of how codecs carry over: which items they ask, and what their pages say of records."""

import json

import matrix_tables
import pages
import recall
import recall_tables
from contenders import Contender

from kvcar.evaluate.recall import Recall, RecallItem


class Letters:
    """A tokenizer of a token for each letter."""

    bos_token_id = None
    all_special_ids = ()
    chat_template = None

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) % 128 for letter in text]}

    def __len__(self):
        return 128

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_run_that_is_broken_off_has_its_share_of_every_task():
    passages = recall.mixed_passages(Letters(), 600, 2048, 0)
    asked = {}
    for passage in passages:
        asked[passage.task] = asked.get(passage.task, 0) + len(passage.questions)
    for task, share in recall.SHARES.items():
        assert asked[task] >= int(600 * share)
    half = [passage.task for passage in passages[: len(passages) // 2]]
    for task in ("pairs", "repeated", "turns"):
        all_of_it = sum(passage.task == task for passage in passages)
        assert abs(half.count(task) - all_of_it / 2) <= 1


def test_items_are_told_apart_by_how_hard_they_are():
    items = [RecallItem("copy", size, 0, size < 5000, size < 1500, 0.1) for size in (300, 400, 600, 1100, 2100, 5000)]
    assert recall.sizes_of(Recall(tuple(items))) == [
        {"size": 128, "asked": 2, "counted": 2, "exact_match": 1.0},
        {"size": 512, "asked": 1, "counted": 1, "exact_match": 1.0},
        {"size": 1024, "asked": 1, "counted": 1, "exact_match": 1.0},
        {"size": 2048, "asked": 1, "counted": 1, "exact_match": 0.0},
        {
            "size": 4096,
            "asked": 1,
            "counted": 0,
            "exact_match": recall.sizes_of(Recall(tuple(items)))[-1]["exact_match"],
        },
    ]
    pairs = [RecallItem("pairs", count, 0, True, True, 0.1) for count in (20, 140, 20)]
    assert [row["size"] for row in recall.sizes_of(Recall(tuple(pairs)))] == [20, 140]


def test_the_page_of_recall_is_what_its_records_say(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert recall_tables.recall_pages() == {}
    rows = {}
    for name, right, size in (("ours", 9, 8.0), ("kivi-4bit", 5, None)):
        items = [RecallItem("pairs", 20, p, p < 10, p < right, 0.01, 1.5 if p in (8, 9) else 0.5) for p in range(12)]
        rows[name] = recall._row(Contender(name, name, lambda: None, {"fit": {}}), items, size)
    config = {"model": "demo", "name": "test", "longest": 2048, "passages": 3, "passages_planned": 4}
    record = {"kind": "recall", "caches": rows, "config": config, "provenance": {}}
    (tmp_path / "recall-test.json").write_text(json.dumps(record))
    (tmp_path / "compare-x.json").write_text(
        json.dumps({"kind": "compare", "times_smaller": 3.09, "config": {"row": "kivi-4bit"}})
    )
    made = recall_tables.recall_pages()
    assert set(made) == {"recall.md", "recall.svg"}
    rows["unsure"] = recall._row(
        Contender("unsure", "unsure", lambda: None, {"fit": {}}),
        [RecallItem("pairs", 20, 0, True, True, 0.0, 0.1)],
        8.0,
    )
    (tmp_path / "recall-test.json").write_text(json.dumps(record))
    assert "| 0 |  | 100.00 %, 100.00 % |" in recall_tables.recall_pages()["recall.md"], "sure of none"
    assert (
        "| `ours` | 8.00 | 12 | 10 | 10.00 ± 10.00 | 0 | 2 | 50.00 ± 50.00 | 83.33 %, 75.00 % | 0.0100 ± 0.0000 |"
        in made["recall.md"]
    )
    assert "| `kivi-4bit` | 3.09 | 12 | 10 | 50.00" in made["recall.md"], "as large as it is beside all others"
    assert "| `ours` | 10.0 (10 of 12) |" in made["recall.md"]
    assert "| pairs | 20 |" in made["recall.md"]
    assert "| `ours` | 90.0 (10) |" in made["recall.md"]
    assert "ours" in made["recall.svg"]


def test_the_page_of_the_matrix_has_a_column_for_each_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert matrix_tables.matrix_pages() == {}
    figures = {"kl_divergence_stderr": 0.0001, "kl_divergence_worst_1_percent": 0.05, "finer_page_share": 0.01}
    kinds = {
        kind: {
            name: figures | {"kl_divergence": value, "same_top": 0.98}
            for name, value in (("default", 0.002), ("Python", dear))
        }
        for kind, dear in (("C4", 0.02), ("Python", 0.001))
    }
    fit = {"tokens": 1000, "text": "some text"}
    config = {
        "model": "demo",
        "times_smaller": 8.0,
        "context": 2048,
        "windows": 1,
        "fits": {"default": fit, "Python": fit},
    }
    record = {"kind": "matrix", "kinds": kinds, "config": config, "provenance": {}}
    (tmp_path / "matrix-8x.json").write_text(json.dumps(record))
    page = matrix_tables.matrix_pages()["matrix.md"]
    assert "| text | default | Python |" in page
    assert "| C4 | 0.0020 ± 0.0001 | 0.0200 ± 0.0001 |" in page
    assert "1,000 tokens of some text" in page
