"""Records name the commit that made them, where there is one."""

import json
import subprocess
from pathlib import Path

import kvcar
from kvcar.record import Record, provenance, source_state


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_commit_and_tree_of_a_checkout(tmp_path):
    package = tmp_path / "src" / "kvcar"
    package.mkdir(parents=True)
    (package / "a.py").write_text("1")
    assert source_state.__wrapped__(package) == (None, None), "no checkout"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit, clean = source_state.__wrapped__(package)
    assert len(commit) == 40
    assert clean is True
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "x.json").write_text("{}")
    assert source_state.__wrapped__(package) == (commit, True), "a run's own records are no change of the code"
    (package / "a.py").write_text("2")
    assert source_state.__wrapped__(package) == (commit, False)


def test_an_environment_inside_another_checkout_names_no_commit(tmp_path):
    package = tmp_path / ".venv" / "kvcar"
    package.mkdir(parents=True)
    git(tmp_path, "init", "-q")
    assert source_state.__wrapped__(package) == (None, None)


def test_a_record_carries_it(tmp_path):
    Record("kind", {"x": 1}).write(tmp_path / "r.json")
    written = json.loads((tmp_path / "r.json").read_text())["provenance"]
    assert (written["commit"], written["tree_clean"]) == source_state(Path(kvcar.__file__).parent)
    assert provenance()["commit"] == written["commit"]
