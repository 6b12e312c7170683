"""How `bench` measures: seconds of a call, of contenders in turns, of the parts of a prefill.

Nothing here knows what is compared. Everything waits for the device, so that what a GPU has only
been asked for is not taken for done.
"""

import contextlib
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

PARTS = ("encoders", "stage 1", "projectors", "stage 2", "stage 3", "LLM")  # of a prefill


# ------------------------------------------------------------------------------------- of one call


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked for; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def median_of(work: Callable[[], object], device: torch.device, runs: int = 3) -> float:
    """Median seconds of `runs` calls, after one to warm up."""
    work()
    return statistics.median(seconds_of(work, device) for _ in range(runs))


class Clock:
    """The moments at which `generate` gives tokens, the prompt's own first; it calls this a
    streamer.
    """

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def put(self, ids: torch.Tensor) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds(self, start: float) -> dict[str, float]:
        """Of a run that began at `start`.

        Returns: {"prefill": to the first new token, "decode": for each of the others, nan where
            there are none}.
        """
        first, *others = self.times[1:]
        decode = (others[-1] - first) / len(others) if others else float("nan")
        return {"prefill": first - start, "decode": decode}


# ------------------------------------------------------------------------------- of several, fairly


def turns(
    work: dict[str, Callable[[], dict]], runs: int, seconds: float, warm: bool = False
) -> dict[str, list[dict]]:
    """Run every contender once a round, so that a busy moment of the machine meets all of them.

    Args:
        work: contender -> what to run, which returns its figures.
        runs: rounds that count, at most; there is always one.
        seconds: no round starts that would, going by the first, end later than this.
        warm: leave out the round before, which warms up.
    Returns: contender -> its figures of each round.
    """
    if not warm:
        for once in work.values():
            once()
    figures = {name: [] for name in work}
    start, first_round, rounds = time.perf_counter(), 0.0, 0
    while rounds < max(runs, 1):
        elapsed = time.perf_counter() - start
        if rounds == 1:
            first_round = elapsed
        if rounds > 0 and elapsed + first_round > seconds:
            break
        for name, once in work.items():
            figures[name].append(once())
        rounds += 1
    return figures


def median(figures: list[dict], key: str) -> float:
    """Median over the rounds of one figure."""
    return statistics.median(figure[key] for figure in figures)


def least_and_most(figures: list[dict], key: str) -> tuple[float, float]:
    """The lowest and highest over the rounds of one figure."""
    values = [figure[key] for figure in figures]
    return min(values), max(values)


# ----------------------------------------------------------------------------------------- memory


def peak(device: torch.device, work: Callable[[], object]) -> int:
    """Most bytes of tensors that `work` holds at a time, above those there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with silent_stderr():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=when)
    held = most = 0
    for change in changes:
        held += change.nbytes()  # below 0 where memory is given back
        most = max(most, held)
    return most


def when(event) -> int:
    """Of an event of PyTorch's profiler: its start in nanoseconds."""
    return event.start_ns()


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Without what PyTorch's profiler writes to file 2, past Python, at every start."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


# ------------------------------------------------------------------------ of the parts of a prefill

FILES = {"stage1_encode.py": "stage 1", "stage2_fuse.py": "stage 2", "stage3_decode.py": "stage 3"}
METHODS = {"pixels": "encoders", "fuse": "projectors", "generate": "LLM"}  # of `Meteor`
LIBRARIES = ("transformers", "timm", "open_clip", "torch/nn/modules/module.py")
CALLED_BY = {"stage 1": "encoders", "stage 3": "LLM"}  # what a stage file calls of a library


@contextlib.contextmanager
def stopwatch(device: torch.device) -> Iterator[Counter]:
    """Inside the block, seconds spent in each of `PARTS`, by which file's code is running.

    Python tells of every call and return. What a stage file does counts for the stage, but for the
    library's model that it calls, or whose attention it hands on to.
    """
    spent, running = Counter(), [None]
    since = time.perf_counter()

    def switch(frame, event, arg) -> None:
        nonlocal since
        if event not in ("call", "return"):
            return
        before = running[-1]
        if event == "call":
            running.append(part_of(frame, before))
        elif len(running) > 1:
            running.pop()
        if running[-1] != before:
            synchronize(device)
            now = time.perf_counter()
            if before is not None:
                spent[before] += now - since
            since = now

    sys.setprofile(switch)
    try:
        yield spent
    finally:
        sys.setprofile(None)


def part_of(frame, part: str | None) -> str | None:
    """The part of a prefill to which a function that is called belongs; part: its caller's."""
    path = Path(frame.f_code.co_filename)
    if frame.f_code.co_name == "__torch_function__":
        return part  # stage 1's spy, through which the library's own calls go
    if path.name in FILES:
        return FILES[path.name]
    if path.match("meteor_mini/model.py"):
        return METHODS.get(frame.f_code.co_name, part)
    of_library = any(f"/{library}" in path.as_posix() for library in LIBRARIES)
    return CALLED_BY.get(part, part) if of_library else part
