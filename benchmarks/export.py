"""How long an export takes, and how fast the exported model generates beside the search model and beside transformers.

    python benchmarks/export.py

Prints seconds of an export of a 12-block hybrid at proxy scale (everything, the comparison with the search model
included), seconds that importing the exported file adds to torch and transformers, and tokens per second of greedy
decoding, batch 1, one thread, interleaved repeats, median.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from archsearch.architecture import Block, ModelSpec, parse_ffn, parse_mixer
from archsearch.export import export_model
from archsearch.export.hf.parity import loaded_folder
from archsearch.model import HybridLM, build_model

REPEATS, NEW, PROMPT = 7, 128, 32
IMPORT = """
import sys, time
sys.dont_write_bytecode = True
import torch, transformers
from transformers import AutoConfig, GenerationMixin, PreTrainedModel
import transformers.modeling_layers, transformers.modeling_outputs, transformers.utils.output_capturing
import types
package = types.ModuleType("folder")
package.__path__ = [sys.argv[1]]
sys.modules["folder"] = package
began = time.perf_counter()
import folder.modeling_bench
print(time.perf_counter() - began)
"""


def spec(n_blocks: int, d_model: int) -> ModelSpec:
    """Short convolutions, Gated DeltaNet and full attention, 2 : 1 : 1."""
    dense = parse_ffn({"kind": "swiglu", "expand": 2})
    conv = parse_mixer({"kind": "short_conv"})
    gdn = parse_mixer({"kind": "gated_deltanet", "head_dim": 32})
    full = parse_mixer({"kind": "attention", "head_dim": 32, "kv_groups": 2})
    blocks = [Block(mixer, dense) for mixer in (conv, gdn, conv, full)]
    return ModelSpec(d_model, 512, 257, tuple(blocks[i % 4] for i in range(n_blocks)))


def lfm2(n_blocks: int, d_model: int) -> tuple[ModelSpec, Any]:
    """A layout that transformers has too: short convolutions and full attention in turn, QK-norm."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    dense = parse_ffn({"kind": "swiglu", "expand": 2})
    conv = parse_mixer({"kind": "short_conv"})
    full = parse_mixer({"kind": "attention", "head_dim": 32, "kv_groups": 2, "qk_norm": True})
    blocks = tuple(Block((conv, full)[i % 2], dense) for i in range(n_blocks))
    config = Lfm2Config(
        vocab_size=257,
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=n_blocks,
        num_attention_heads=d_model // 32,
        num_key_value_heads=d_model // 64,
        layer_types=["conv", "full_attention"] * (n_blocks // 2),
        pad_token_id=0,
        eos_token_id=None,
    )
    return ModelSpec(d_model, 512, 257, blocks), Lfm2ForCausalLM(config).eval()


def by_hand(model: HybridLM, prompt: torch.Tensor) -> float:
    """Seconds of NEW greedy tokens by the search model's own loop."""
    state, new = model.init_state(1, PROMPT + NEW), prompt
    began = time.perf_counter()
    for _ in range(NEW):
        new = model.extend(new, state, last_only=True)[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - began


def by_forward(model: Any, prompt: torch.Tensor) -> float:
    """The same loop around an exported model's forward."""
    cache, new = None, prompt
    began = time.perf_counter()
    for _ in range(NEW):
        out = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, new = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - began


def by_generate(model: Any, prompt: torch.Tensor) -> float:
    """Seconds of transformers' generate."""
    ways = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    began = time.perf_counter()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), **ways)
    return time.perf_counter() - began


def compare(ways: dict[str, tuple[Any, Any]], prompt: torch.Tensor) -> None:
    """Print tokens per second of each way, and the ratio to the first: median over interleaved repeats."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):
        for name, (run, model) in ways.items():
            took = run(model, prompt)
            if repeat:
                seconds[name].append(took)
    first = seconds[next(iter(ways))]
    for name, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(first, found, strict=True))
        print(f"  {name:34s} {NEW / statistics.median(found):8.0f} tokens/s   {ratio:.2f}x")


@torch.no_grad()
def main() -> None:
    """All figures."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {REPEATS} repeats")
    prompt = torch.randint(257, (1, PROMPT))
    with tempfile.TemporaryDirectory() as place:
        import transformers  # counted apart: it is imported once

        for kind in ("torch", "hf"):
            began = time.perf_counter()
            out = Path(place) / kind
            export_model(spec(12, 256), out, weights="init", name="bench", format=kind)  # type: ignore[arg-type]
            print(f"export of 12 blocks, --format {kind}: {time.perf_counter() - began:.1f} s")
        lines = len((Path(place) / "hf" / "modeling_bench.py").read_text().splitlines())
        command = [sys.executable, "-c", IMPORT, str(Path(place) / "hf")]
        took = [float(subprocess.check_output(command, text=True)) for _ in range(3)]
        print(f"import beyond torch and transformers {transformers.__version__}: {min(took):.3f} s, {lines} lines")
        for title, made, stock in (
            ("12-block hybrid, width 256", spec(12, 256), None),
            ("LFM2, 4 blocks, width 128", *lfm2(4, 128)),
        ):
            print(title)
            out = Path(place) / f"{made.n_blocks}-{made.d_model}"
            export_model(made, out, weights="init", name="bench", format="hf")
            with loaded_folder(out, "bench") as module:
                exported = module.HybridForCausalLM.from_pretrained(out).eval()
                search = build_model(made).eval()
                compare({"search model": (by_hand, search), "exported, forward": (by_forward, exported)}, prompt)
                if stock is not None:
                    ways = {"transformers' Lfm2ForCausalLM": (by_generate, stock)}
                    compare({**ways, "exported, generate": (by_generate, exported)}, prompt)


if __name__ == "__main__":
    main()
