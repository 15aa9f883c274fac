"""What is left to do after a CUDA graph could not be captured."""

from __future__ import annotations

import torch


def renew_generator() -> None:
    """A capture that failed leaves the current device's random generator waiting for its end; give it another state."""
    fresh = torch.Generator("cuda")
    torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh.graphsafe_get_state())
