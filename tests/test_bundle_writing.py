"""Bundles are written whole or not at all: killed and interrupted writers, several at once, full disks, links, modes."""

import errno
import os
import random
import shutil
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
from bundles import fitted
from tiny import tiny_model

from kvcar import files
from kvcar.bundle import PLAN_FILE, Bundle
from kvcar.bundle.files import FILES
from kvcar.errors import BundleError
from kvcar.paper.checkpoint import TrainState, save_checkpoint

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes of POSIX")
STEPS = ("open", "mkdir", "rename", "replace", "fsync", "unlink")
"""What the writer asks of the system."""


@pytest.fixture(scope="module")
def pair():
    """Two bundles that differ in plan and codecs, and their digests."""
    model = tiny_model("llama")
    made = [fitted(model, bits=bits, layers_per_block=2) for bits in (3, 4)]
    return made, [bundle.digest for bundle in made]


def in_child(work):
    """Run ``work`` in a forked process, which ends with 0 if it gets through; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def killed_at(step, work):
    """Run ``work`` in a process that dies before its ``step``-th call to the system; returns whether it got through."""

    def dying():
        left = [step]
        for name in STEPS:
            real = getattr(os, name)

            def call(*args, real=real, **kwargs):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return real(*args, **kwargs)

            setattr(os, name, call)
        work()

    return os.waitstatus_to_exitcode(os.waitpid(in_child(dying), 0)[1]) == 0


def only_a_bundle(folder):
    return sorted(path.name for path in folder.iterdir()) == sorted(FILES)


@needs_fork
def test_a_writer_may_die_at_any_step(pair, tmp_path):
    (old, new), digests = pair
    steps, seen = 0, set()
    while True:
        folder = tmp_path / str(steps) / "bundle"
        old.save_pretrained(folder)
        done = killed_at(steps, lambda folder=folder: new.save_pretrained(folder, overwrite=True))
        found = Bundle.from_pretrained(folder).digest
        assert found in digests
        seen.add(found)
        if done:
            break
        # The next writer cleans up, whatever was left.
        old.save_pretrained(folder, overwrite=True)
        assert Bundle.from_pretrained(folder).digest == digests[0]
        assert only_a_bundle(folder)
        steps += 1
    assert steps > 10
    assert seen == set(digests)
    assert found == digests[1]
    assert only_a_bundle(folder)


@needs_fork
def test_the_first_writer_may_die_at_any_step(pair, tmp_path):
    (bundle, _), digests = pair
    for empty in (False, True):
        for step in range(100):
            folder = tmp_path / f"{empty} {step}" / "bundle"
            folder.parent.mkdir()
            if empty:
                folder.mkdir()
            done = killed_at(step, lambda folder=folder: bundle.save_pretrained(folder))
            if (folder / PLAN_FILE).exists():
                assert Bundle.from_pretrained(folder).digest == digests[0]
            else:
                assert bundle.save_pretrained(folder) == folder, "as if nothing had been there"
                assert only_a_bundle(folder)
                assert [path.name for path in folder.parent.iterdir()] == ["bundle"]
            if done:
                break
        assert 5 < step < 99


@needs_fork
def test_50_writers_are_killed(pair, tmp_path):
    bundles, digests = pair
    folder, rng = bundles[0].save_pretrained(tmp_path / "bundle"), random.Random(0)

    def write():
        while True:
            for bundle in bundles:
                bundle.save_pretrained(folder, overwrite=True)

    for _ in range(50):
        child = in_child(write)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert Bundle.from_pretrained(folder).digest in digests
    bundles[0].save_pretrained(folder, overwrite=True)
    assert only_a_bundle(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_several_write_and_read_at_once(pair, tmp_path):
    bundles, digests = pair
    folder, problems, stop = bundles[0].save_pretrained(tmp_path / "bundle"), [], threading.Event()

    def repeat(action):
        try:
            while not stop.is_set():
                action()
        except BaseException as error:
            problems.append(error)
            raise

    def read():
        assert Bundle.from_pretrained(folder).digest in digests

    writers = [lambda bundle=bundle: bundle.save_pretrained(folder, overwrite=True) for bundle in (*bundles, *bundles)]
    threads = [threading.Thread(target=repeat, args=(action,)) for action in (*writers, read, read)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert only_a_bundle(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_of_two_first_writers_one_is_refused(pair, tmp_path, monkeypatch):
    (first, second), digests = pair
    real = os.rename

    def slow(source, target):
        monkeypatch.setattr(os, "rename", real)
        second.save_pretrained(target)
        real(source, target)

    monkeypatch.setattr(os, "rename", slow)
    with pytest.raises(BundleError, match="already holds a bundle"):
        first.save_pretrained(tmp_path / "bundle")
    assert Bundle.from_pretrained(tmp_path / "bundle").digest == digests[1]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def failing(error, after):
    """What a writer asks of the system, failing from the ``after``-th write on."""
    real, left = os.fsync, [after]

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise error
        real(descriptor)

    return fsync


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_or_an_interrupt_leaves_the_old_and_no_litter(pair, tmp_path, monkeypatch, error, after, old):
    bundles, digests = pair
    folder = tmp_path / "bundle"
    if old:
        bundles[0].save_pretrained(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(error, after))
        with pytest.raises((BundleError, KeyboardInterrupt)):
            bundles[1].save_pretrained(folder, overwrite=True)
    if old:
        assert Bundle.from_pretrained(folder).digest == digests[0]
        assert only_a_bundle(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"] * old


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_overwriting_through_a_link(pair, tmp_path):
    bundles, digests = pair
    real = bundles[0].save_pretrained(tmp_path / "real" / "bundle")
    (tmp_path / "link").symlink_to(real)
    bundles[1].save_pretrained(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert Bundle.from_pretrained(real).digest == digests[1]
    assert only_a_bundle(real)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert [path.name for path in real.parent.iterdir()] == ["bundle"]


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_modes_follow_the_umask(pair, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        for _ in range(2):
            folder = pair[0][0].save_pretrained(tmp_path / "bundle", overwrite=True)
            assert stat.S_IMODE(folder.stat().st_mode) == mode | (mode & 0o444) >> 2
            assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {mode}
    finally:
        os.umask(before)


def test_files_of_others_stay(pair, tmp_path):
    folder = pair[0][0].save_pretrained(tmp_path / "bundle")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"more than a bundle \(notes.txt\)"):
        pair[0][1].save_pretrained(folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert Bundle.from_pretrained(folder).digest == pair[1][0]


def test_without_locks_it_works_too(pair, tmp_path, monkeypatch):
    """As on Windows, or a file system that has none: nothing is taken for left over there."""
    monkeypatch.setattr(files, "fcntl", None)
    other = tmp_path / ".kvcar-0123456789abcdef"
    other.mkdir()
    for bundle in pair[0]:
        bundle.save_pretrained(tmp_path / "bundle", overwrite=True)
    assert Bundle.from_pretrained(tmp_path / "bundle").digest == pair[1][1]
    assert other.exists()


@needs_fork
def test_files_that_are_killed_leave_the_old_one(tmp_path):
    """Contexts, checkpoints and records are written so."""
    path = tmp_path / "file"
    for step in range(100):
        path.write_bytes(b"old" * 1000)
        done = killed_at(step, lambda: files.write_whole(path, [b"new" * 500, b"new" * 500]))
        assert path.read_bytes() in (b"old" * 1000, b"new" * 1000)
        if done:
            break
    assert path.read_bytes() == b"new" * 1000
    assert 2 < step < 99
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_devices_are_not_replaced(tmp_path):
    with pytest.raises(OSError, match="not a regular file"):
        files.write_whole(Path("/dev/full"), [b"x"])


def test_a_checkpoint_on_a_full_disk_leaves_no_litter(tmp_path, monkeypatch):
    import torch

    from kvcar.errors import InputError

    unit = torch.nn.Linear(2, 2)
    save_checkpoint(tmp_path, {}, TrainState(), unit, None)
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device"), 0))
    with pytest.raises(InputError, match="No space left"):
        save_checkpoint(tmp_path, {}, TrainState(step=1), unit, None)
    assert [path.name for path in tmp_path.iterdir()] == ["training.safetensors"]


def test_nothing_but_what_is_ours_is_cleaned(tmp_path):
    for name in (".kvcar-notes", ".kvcar-0123456789ABCDEF", "kvcar-0123456789abcdef"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".kvcar-0123456789abcdef").mkdir()
    (tmp_path / ".kvcar-0123456789abcdef" / "file").write_text("left")
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".kvcar-0123456789ABCDEF", ".kvcar-notes", "kvcar-0123456789abcdef",
    ]  # fmt: skip
    shutil.rmtree(tmp_path)
