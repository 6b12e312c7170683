"""How `bench` measures: seconds of a call, of contenders in turns, of the parts of a prefill.

Nothing here knows what is compared. Everything waits for the device, so that what a GPU has only
been asked for is not taken for done.
"""

import contextlib
import functools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

import stage1_encode
import stage2_fuse
from stage1_encode import EncoderPruner
from stage3_decode import AdaptivePruner

from ..model import Meteor

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


@contextlib.contextmanager
def stopwatch(device: torch.device) -> Iterator[Counter]:
    """Inside the block, seconds spent in each of `PARTS`.

    Each function of `timed_functions` counts its own time, without that of those it calls. After
    the block they are as they were, also where it raises.
    """
    spent, kept = Counter(), []
    try:
        for owner, name, part in timed_functions():
            function = vars(owner)[name]
            kept.append((owner, name, function))
            setattr(owner, name, timed(function, part, spent, device))
        yield spent
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def timed_functions() -> list[tuple[object, str, str]]:
    """Where the stopwatch looks: owner (a module or class), name of its function, part.

    Stage 1 inside a ViT is what its pruner does around the blocks, but for the final norm; behind a
    ConvNeXt it is the two functions that choose. What is left of `encode` is the library's forward.
    """
    return [
        (Meteor, "pixels", "encoders"),
        (stage1_encode, "encode", "encoders"),
        (EncoderPruner, "_final_norm", "encoders"),
        (stage1_encode, "encode_all", "stage 1"),
        (stage1_encode, "mean_similarity", "stage 1"),
        (stage1_encode, "highest", "stage 1"),
        *((EncoderPruner, name, "stage 1") for name in pruner_methods(EncoderPruner)),
        (Meteor, "fuse", "projectors"),
        (stage2_fuse, "fuse", "stage 2"),
        *((AdaptivePruner, name, "stage 3") for name in pruner_methods(AdaptivePruner)),
        (Meteor, "generate", "LLM"),
    ]


def pruner_methods(pruner: type) -> list[str]:
    """What a pruner runs by itself: when it is made and entered, and its hooks."""
    hooks = [name for name in vars(pruner) if name.startswith(("_before", "_after"))]
    return ["__init__", "__enter__", *hooks]


def timed(function: Callable, part: str, spent: Counter, device: torch.device) -> Callable:
    """The same function; each call adds its own seconds to spent[part]."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        synchronize(device)
        start, counted_before = time.perf_counter(), sum(spent.values())
        try:
            return function(*args, **kwargs)
        finally:
            synchronize(device)
            elapsed = time.perf_counter() - start
            of_those_it_called = sum(spent.values()) - counted_before
            spent[part] += elapsed - of_those_it_called

    return call
