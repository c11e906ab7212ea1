"""Peak memory of a function, as the allocator counts it: resident memory also holds what loading left behind."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_gib(work: Callable[[], object]) -> float:
    """Most memory that tensors held at once while `work` ran, above what they held before, in GiB."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**30
