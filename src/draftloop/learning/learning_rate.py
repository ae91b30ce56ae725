"""How fast the draft learns at each step: linear warm-up, then half a cosine down to zero.

Contract: a pure function of the step. Must not know what is learnt.

Source of the cosine: Loshchilov and Hutter 2017, "SGDR", eq. 5, without restarts.
"""

from __future__ import annotations

import math


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 1.

    Step i of the warm-up has i / warmup_steps of the peak, so the first step moves and the last one of the
    warm-up is at the peak. The cosine would be zero in the step after the last, so that one moves as well.
    A warm-up that would not end before the run does is cut to the first half of the run: a run that stopped
    while it was still warming up would never see its own learning rate.

    Args:
        step: 1 to `total_steps`.
        peak: the highest rate.
        warmup_steps: 0 begins at the peak.
        total_steps: of the whole run, a resumed one's earlier steps included.

    Raises:
        ValueError: `step` is outside the run.
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step {step} of a run of {total_steps} steps")
    warmup = warmup_steps if warmup_steps < total_steps else total_steps // 2
    peak_step = max(1, warmup)
    if step < peak_step:
        return peak * step / peak_step
    progress = (step - peak_step) / (total_steps + 1 - peak_step)
    return peak * (1 + math.cos(math.pi * progress)) / 2
