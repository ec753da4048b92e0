"""What the ticks of a hook's loop are, and how they are counted."""

from __future__ import annotations

from fnrun.state import LoopState


def in_training(state: LoopState) -> bool:
    """Whether the loop at work takes training steps; elsewhere its ticks are rounds. Outside every loop a call is like a training step."""
    frames = state.position.frames
    return not frames or frames[-1].loop.startswith(("epoch_loop", "step_loop"))


def counted(state: LoopState) -> int:
    """The number of the tick that has just ended: `state.step` in a loop of training steps, finished rounds elsewhere."""
    return state.step if in_training(state) else state.position.frames[-1].ticks
