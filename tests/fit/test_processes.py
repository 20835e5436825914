"""Statistics of several processes are those of one."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from tiny import tiny_model, token_ids

from kvcar.fit.statistics import Effect, collect_statistics
from kvcar.models.geometry import read_geometry
from kvcar.plan import CacheConfig

_SCRIPT = """
import json, sys, torch
sys.path[:0] = [{tests!r}, {here!r}]
from test_processes import figures
from kvcar.fit.processes import is_main_process, process_count
torch.set_num_threads(1)
found = figures()
if is_main_process():
    print(json.dumps([process_count(), found]))
"""


def figures():
    """Some of everything that statistics hold."""
    model = tiny_model("llama")
    geometry = read_geometry(model.config)
    windows = token_ids(128, batch=6, seed=3)
    found = collect_statistics(
        model, geometry, windows, (3, 2), effect=Effect(windows[:4], CacheConfig(32, 4, 32), 32, 0)
    )
    keys, moments = [(layer, "key") for layer in range(3)], found.sides
    both = [(layer, kind) for layer in (1, 2) for kind in ("key", "value")]
    return {
        "mean": moments.mean(keys).tolist(),
        "covariance": moments.covariance(keys)[::7, ::5].flatten().tolist(),
        "shared covariance": moments.covariance(both)[::7, ::5].flatten().tolist(),
        "metric": found.metrics[2, "value"][::7, ::5].flatten().tolist(),
        "variances": found.variances(tuple(s for s in geometry.slots("value") if s.layer < 3)).tolist(),
        "samples": sorted(moments.sample(keys[1:2]).sum(1).tolist()),
    }


def test_two_processes_find_what_one_finds(tmp_path):
    here = Path(__file__).parent
    script = tmp_path / "run.py"
    script.write_text(_SCRIPT.format(tests=str(here.parent), here=str(here)))
    # What `accelerate launch` starts on a machine with GPUs; on CPUs it would ask for MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    printed = subprocess.run(launch, capture_output=True, text=True, check=False, timeout=300)
    assert printed.returncode == 0, printed.stderr[-2000:]
    processes, found = json.loads(printed.stdout.strip().splitlines()[-1])
    assert processes == 2
    alone = figures()
    for name in ("mean", "covariance", "shared covariance", "metric", "variances"):
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(alone[name]), atol=1e-5, rtol=1e-3)
    assert abs(len(found["samples"]) - len(alone["samples"])) <= 2
