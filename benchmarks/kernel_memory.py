"""Peak memory of an implementation's passes: on CUDA in the caller's process, on the CPU in a fresh one.

`python -m benchmarks.kernel_memory PEER N,d,V DTYPE SEED PASS...` prints {pass: MiB} as JSON; Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


def resident(key: str) -> int:
    """Bytes of this process's resident set: VmRSS now, VmHWM the largest since its start or the last `forget_peak`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Freed memory goes back to the system, and VmHWM starts anew at VmRSS."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def on_cpu(peer: str, shape: str, dtype: str, seed: int, passes: Sequence[str]) -> dict[str, float]:
    """MiB of each pass, inputs included, above what the process held after its imports and a call on two tokens.

    A pass is left out where the implementation or the system cannot tell.
    """
    if not Path("/proc/self/clear_refs").exists():
        return {}
    command = [sys.executable, "-m", "benchmarks.kernel_memory", peer, shape, dtype, str(seed), *passes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {peer} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def on_cuda(work: Callable[[], object]) -> float:
    """MiB that `work` allocates at its peak above what was allocated before, so without its inputs."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def child(name: str, shape: str, dtype: str, seed: int, passes: Sequence[str]) -> dict[str, float]:
    from benchmarks.kernel_peers import PEERS, Cannot, load_peer
    from benchmarks.kernel_problem import DTYPES, Shape, make_problem

    peer, logp = PEERS[name], load_peer(name, "cpu")
    found: dict[str, float] = {}

    def run(shape: Shape, measured: bool) -> None:
        problem = make_problem(shape, DTYPES[dtype], "cpu", seed)
        for what in passes:
            forget_peak()  # what making the inputs took is not counted
            try:
                peer.run(logp, problem, what)
            except Cannot:
                continue
            if measured:
                found[what] = (resident("VmHWM") - baseline) / MIB

    baseline = 0
    run(Shape(2, 16, 64), measured=False)  # libraries that load at the first call
    forget_peak()
    baseline = resident("VmRSS")
    run(Shape.parse(shape), measured=True)
    return found


if __name__ == "__main__":
    peer_name, shape_text, dtype_name, seed_text, *wanted = sys.argv[1:]
    print(json.dumps(child(peer_name, shape_text, dtype_name, int(seed_text), wanted)))
