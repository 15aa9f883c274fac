"""Search hybrid LLM layouts for quality against latency on your hardware."""

__version__ = "0.1.0"
