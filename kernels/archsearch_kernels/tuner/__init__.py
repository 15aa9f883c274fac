"""The autotuner: what was measured, where it is kept, and how a configuration wins."""
