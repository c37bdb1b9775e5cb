"""Calibrated runs in processes that may be killed: imports once, then forks a child for each request.

Reads requests from the standard input, a JSON object a line, and answers each with one. See :func:`work`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import tiny_jobs
from lowbit.algorithms import RoundToNearest

ROUNDING = RoundToNearest()

# What a kill may be restricted to, by the ends of the paths of source files.
PLACES = {
    "anywhere": ("",),
    "filing": ("calibration/job.py", "safetensors/torch.py"),
    "learning": ("calibration/tune.py", "calibration/rounding.py"),
    "writing": ("transformers/assemble.py", "wire/shards.py", "transformers/saving.py"),
}


class Countdown:
    """Counts the calls that lowbit makes and that are made in it, down to torch's own, and kills at one of them."""

    def __init__(self, place: str, kill_at: int | None) -> None:
        self.ends, self.kill_at, self.count = PLACES[place], kill_at, 0
        self._counted: dict[str, bool] = {}

    def __call__(self, frame: Any, event: str, argument: object) -> None:
        if event not in ("call", "c_call"):
            return
        path = frame.f_code.co_filename
        counted = self._counted.get(path)
        if counted is None:
            inside = "/lowbit/" in path or "/safetensors/" in path
            counted = self._counted[path] = inside and path.endswith(self.ends)
        if counted:
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def anonymous_memory() -> int:
    """Bytes of this process that no file stands behind."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@contextlib.contextmanager
def peak_memory(answer: dict[str, Any], limit: int | None) -> Iterator[None]:
    """Measures by how much the anonymous memory grows, and kills the process where it is more than `limit` bytes."""
    before, peak, done = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_memory() - before)
            if limit is not None and peak > limit:
                os.kill(os.getpid(), signal.SIGKILL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        answer["peak"] = max(peak, anonymous_memory() - before)


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request says.

    Its fields: the folders `source`, `job` and `out`; `learn`, whether to learn afterwards; `round`, whether to round
    to nearest; `place` and `kill`, the call at which the process is killed; `file_bytes`, more of which no file may
    have; `memory_bytes`, more of which may not be taken; `cgroup`, the folder of one to go into; `samples` and `length`
    of the data.
    """
    answer: dict[str, Any] = {}
    if "cgroup" in request:
        (Path(request["cgroup"]) / "cgroup.procs").write_text(str(os.getpid()))
    method = tiny_jobs.gptq(distill=tiny_jobs.LEARNING if request.get("learn") else None)
    if request.get("round"):
        method = replace(method, algorithm_of=lambda name: ROUNDING)
    data = tiny_jobs.samples(request.get("samples", 8), request.get("length", 32))
    countdown = Countdown(request.get("place", "anywhere"), request.get("kill"))
    if "file_bytes" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], resource.RLIM_INFINITY))
    with peak_memory(answer, request.get("memory_bytes")):
        sys.setprofile(countdown if "kill" in request else None)
        try:
            run = tiny_jobs.open_run(Path(request["source"]), Path(request["job"]), method, data)
            tiny_jobs.finish(run, Path(request["out"]))
        except (OSError, MemoryError, RuntimeError, ValueError) as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        finally:
            sys.setprofile(None)
    return answer | {"count": countdown.count}


def in_a_child(task: Callable[[dict[str, Any]], dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    """Fork, let the child do it, and say how it ended (`status` is negative where a signal ended it)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # makes torch's pool anew, which two threads must not do at once
        with contextlib.suppress(BaseException), os.fdopen(writing, "w") as pipe:
            json.dump(task(request), pipe)
            pipe.flush()
            os._exit(0)
        os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"status": status, **(json.loads(text) if text else {})}


def warm_up() -> None:
    """Run once, so that children find everything loaded and set up."""
    with tempfile.TemporaryDirectory() as folder:
        source = tiny_jobs.save_llama(Path(folder) / "source", num_hidden_layers=1)
        method = tiny_jobs.gptq(distill=tiny_jobs.LEARNING)
        tiny_jobs.finish(tiny_jobs.open_run(source, Path(folder) / "job", method), Path(folder) / "out")


def main() -> None:
    """Serve until the input ends."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        answer = in_a_child(work, request)
        print(json.dumps({**answer, "seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
