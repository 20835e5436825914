"""The run on a GPU, rehearsed: its fastest part up to the page, how parts end, what a search and a log of tests come to."""

import json
import os

import gpu
import gpu_tables
import pages
import pytest
import torch
from gpu_parts import SECONDS, find
from gpu_parts.codes import codes_for
from gpu_parts.tests import read
from speed.synthetic import RandomPast, Shape, coded_plan, layer_geometry, random_bundle

from kvcar.cache.coder import PageCoder
from kvcar.kernels.attend import attend, naive


def test_everything_takes_less_than_eight_minutes():
    assert sum(SECONDS.values()) < 480


@pytest.mark.parametrize("part", list(SECONDS))
def test_sizes_of_every_part_can_be_recorded(part):
    pytest.importorskip("triton")
    for rehearse in (False, True):
        assert json.loads(json.dumps(find(part).sizes(rehearse)))


def test_the_fastest_part_is_rehearsed_up_to_the_page(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a rehearsal needs the interpreter")
    gpu.run_part("basics", "toy", True, tmp_path)
    record = json.loads((tmp_path / "gpu-toy-basics.json").read_text())
    assert record["complete"]
    assert record["multiplies_subnormals"] is True
    assert [each["right"] for each in record["small_products"]] == [True]
    assert record["config"]["rehearsal"] is True
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    run = {"config": {"name": "toy"}, "parts": {}, "provenance": record["provenance"]}
    assert "### Basics" in gpu_tables.run_sections(run)


def test_parts_that_fail_or_hang_are_recorded_and_the_next_goes_on(tmp_path, monkeypatch):
    ended = gpu.run_all({"nothing": 60.0, "basics": 0.01, "batch": 0.0}, "toy", 100, True, tmp_path)
    assert [own["ended"] for own in ended.values()] == ["failed", "stopped", "left out"]
    assert "gpu_parts.nothing" in ended["nothing"]["reason"]
    record = json.loads((tmp_path / "gpu-toy-run.json").read_text())
    assert record["parts"] == ended
    assert record["provenance"]["torch"] == torch.__version__
    assert os.listdir(tmp_path) == ["gpu-toy-run.json"]
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert gpu_tables.gpu_pages() == {}  # a rehearsal is no record of a GPU


def test_the_largest_batch_is_looked_for_from_the_reckoned_one():
    from gpu_parts.batch import search

    for limit, found in ((100, 100), (93, 92), (200, 126), (10, None)):
        tried, best = search(100, lambda n, limit=limit: {"held": n} if n <= limit else None)
        assert best == (None if found is None else {"batch": found, "held": found})
        assert len(tried) <= 4


def test_outcomes_are_read_from_pytest_as_they_come():
    lines = [
        "[gw0] [ 10%] PASSED tests/kernels/a.py::test_x[blocks over layers] ",
        "[gw1] [ 20%] FAILED tests/kernels/a.py::test_y ",
        "tests/kernels/a.py::test_z SKIPPED (no) [ 30%]",
        "FAILED tests/kernels/a.py::test_y - AssertionError: far apart",
    ]
    found = list(read(lines))[-1]
    assert found["outcomes"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["failed"] == {"tests/kernels/a.py::test_y": "AssertionError: far apart"}


@pytest.mark.parametrize("profile", ["fast", "balanced"])
def test_random_codecs_in_8_bits_can_be_read_and_written(profile):
    shape = Shape(4, 2, 16)
    geometry = layer_geometry(shape, 1000)
    plan = coded_plan(geometry, codes_for(profile, geometry))
    bundle = random_bundle(plan)
    past = RandomPast(bundle, 300, 1, torch.float32, torch.device("cpu"))
    query, (exact, paged) = past.query(), past.past()
    expected = naive.attend(query, exact, paged, 0.25)
    assert 0.01 < float(expected.std()) < 10
    torch.testing.assert_close(attend(query, exact, paged, 0.25), expected, atol=2e-2, rtol=2e-2)
    unit = PageCoder(bundle, torch.device("cpu"), torch.float32).units[0]
    x = torch.randn(1, 64, len(unit.unit.slots) * 16)
    stored = unit.coded.quantizer.codes(unit.coded.codec.encode(x))
    assert float(stored.std()) > 0
