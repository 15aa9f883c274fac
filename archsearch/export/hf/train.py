"""Train the model in this folder on text or token files: on one device, or on many through torchrun.

    python train.py --data 'corpus/*.txt' --tokens 1e9 --out trained
    torchrun --nproc-per-node 8 train.py --data tokens.bin --tokens 20e9 --fsdp --out trained

Run it again to go on after a stop. A .bin file holds bare little-endian uint16 token ids; rows of a .jsonl file
are objects whose `--field` is a document, any other file is one document of UTF-8 text. The schedule is
warm-up, stay, decay (WSD, 2405.18392). Learning rates are written for a width of 256: those of the matrices inside
the blocks follow the width of this model as 256 / width (2203.03466), which is how the search trained it.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

HERE = Path(__file__).resolve().parent
BASE_WIDTH = 256
WIDTH = 256
HIDDEN: tuple[str, ...] = ()  # parameters of a block whose fan-in grows with the width
CONTEXT = 256
LR = 2e-3
WARMUP, DECAY = 0.05, 0.2  # fractions of all steps
WEIGHT_DECAY, BETAS, GRAD_CLIP = 0.1, (0.9, 0.95), 1.0
BATCH_TOKENS = 8192


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="text, .jsonl, or .bin files of uint16 tokens; globs")
    parser.add_argument("--field", default="text", help="of the rows of .jsonl files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained model and of the checkpoint")
    parser.add_argument("--tokens", type=float, required=True, help="tokens to train on in all")
    parser.add_argument("--batch-tokens", type=float, default=BATCH_TOKENS, help="tokens of a step, all processes")
    parser.add_argument("--micro-batch", type=int, default=0, help="rows of a forward (0: all of a process's)")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--lr", type=float, default=LR, help="at width 256")
    parser.add_argument("--fresh", action="store_true", help="begin with initial weights, not those in this folder")
    parser.add_argument("--fsdp", action="store_true", help="shard parameters and optimizer (FSDP2), not only batches")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=None, help="default: bf16 on GPUs")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations instead of keeping them")
    parser.add_argument("--isolate", action="store_true", help="nothing crosses from one document to the next")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--save-every", type=int, default=1000, help="steps")
    parser.add_argument("--stop-after", type=int, default=None, help="stop after this many steps, to go on later")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def documents(path: Path, field: str) -> Iterator[str]:
    """The documents of a file of text, or of .jsonl rows; rows without text (null) are left out."""
    try:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                row = json.loads(line) if line.strip() else {field: None}
                text = row.get(field, 0) if isinstance(row, dict) else 0
                if not isinstance(text, str | None):
                    raise SystemExit(f"error: {path}:{number} has no text in {field!r}; name another --field")
                if text:
                    yield text
    except UnicodeDecodeError as error:
        raise SystemExit(f"error: {path} is no UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise SystemExit(f"error: {path}:{number} is not JSON: {error}") from None


def token_files(patterns: list[str], field: str, out: Path, is_first: bool) -> list[np.ndarray[Any, Any]]:
    """The tokens of all files. Text is tokenised into `out`, and again when files, sizes or times are others."""
    paths = [Path(p) for pattern in patterns for p in sorted(glob.glob(pattern, recursive=True)) or [pattern]]
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"error: there is no {path}")
        if path.suffix == ".parquet":
            raise SystemExit(f"error: {path}: write its rows as .jsonl; .parquet is not read here")
    texts = [p for p in paths if p.suffix != ".bin"]
    arrays: list[np.ndarray[Any, Any]] = [np.memmap(p, np.dtype("<u2"), "r") for p in paths if p.suffix == ".bin"]
    packed, noted = out / "tokens.u32", out / "data.json"
    if is_first:
        rows = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
        now, before = {"field": field, "files": rows}, json.loads(noted.read_text()) if noted.exists() else None
        if before not in (now, None) and (out / "checkpoint.pt").exists():
            print(f"note: {out} goes on with other data than it was trained on", file=sys.stderr, flush=True)
        if before != now or (texts and not packed.exists()):
            noted.unlink(missing_ok=True)
            if texts:
                write_tokens(texts, field, packed)
            noted.write_text(json.dumps(now))
    if dist.is_initialized():
        dist.barrier()
    if texts:
        arrays.append(np.memmap(packed, np.dtype("<u4"), "r"))
    return arrays


def write_tokens(texts: list[Path], field: str, packed: Path) -> None:
    """Tokenise files, an end behind every document."""
    if not (HERE / "tokenizer.json").exists():
        raise SystemExit(f"error: {HERE} has no tokenizer.json; --data may name .bin files only")
    tokenizer = AutoTokenizer.from_pretrained(HERE, trust_remote_code=True)
    with open(packed.with_suffix(".tmp"), "wb") as file:
        for path in texts:
            for text in documents(path, field):
                ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
                np.array([*ids, tokenizer.eos_token_id], dtype="<u4").tofile(file)
    packed.with_suffix(".tmp").rename(packed)


class Rows:
    """Windows of context + 1 tokens in an order that depends on the seed alone, so that a stop changes nothing."""

    def __init__(self, arrays: list[np.ndarray[Any, Any]], context: int, seed: int) -> None:
        self.arrays, self.context, self.seed = arrays, context, seed
        counts = [max(0, (len(a) - 1) // context) for a in arrays]
        self.ends = np.cumsum(counts)
        self.n = int(self.ends[-1])
        if self.n == 0:
            raise SystemExit(f"error: the data is shorter than one context of {context} tokens")
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def row(self, number: int) -> np.ndarray[Any, Any]:
        """[context + 1] tokens of row `number`, counted through all epochs."""
        epoch, at = divmod(number, self.n)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.n)
        window = int(self._order[at])
        part = int(np.searchsorted(self.ends, window, side="right"))
        start = (window - (int(self.ends[part - 1]) if part else 0)) * self.context
        return np.asarray(self.arrays[part][start : start + self.context + 1], dtype=np.int64)

    def batch(self, first: int, n_rows: int) -> Tensor:
        """[n_rows, context + 1]."""
        return torch.from_numpy(np.stack([self.row(first + i) for i in range(n_rows)]))


def schedule(step: int, total: int) -> float:
    """Share of the learning rate at `step` (from 0): linear warm-up, stay, then 1 - sqrt."""
    warmup, falling, left = round(WARMUP * total), round(DECAY * total), total - step
    if step < warmup:
        return (step + 1) / warmup
    return 1 - math.sqrt(1 - left / falling) if left < falling else 1.0


def optimizers(model: Any, lr: float, kind: str, fused: bool) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

    Matrices decay by lr x weight decay whatever their width (2405.13698); embeddings, norms, convolutions do not.
    """
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_hidden = name.startswith("model.layers.") and name.endswith(HIDDEN)
        decays = is_hidden or (name in linear and parameter is not model.get_input_embeddings().weight)
        by_muon = kind == "muon" and is_hidden and parameter.dim() == 2
        scale = BASE_WIDTH / WIDTH if is_hidden else 1.0
        groups.setdefault((by_muon, scale, decays), []).append(parameter)
    made: list[torch.optim.Optimizer] = []
    for muon in (False, True):
        found = [
            {"params": params, "lr_scale": scale, "weight_decay": WEIGHT_DECAY / scale if decays else 0.0}
            for (by_muon, scale, decays), params in groups.items()
            if by_muon == muon
        ]
        if found and muon:  # its updates are as large as AdamW's, so that the same rule serves both
            made.append(torch.optim.Muon(found, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        elif found:
            made.append(torch.optim.AdamW(found, lr=lr, betas=BETAS, fused=fused))
    return made


def balance_routers(model: nn.Module) -> None:
    """Experts that got few tokens, on all processes together, are favoured from now on."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "update_bias"):
            if dist.is_initialized():
                dist.all_reduce(module.load)
            module.update_bias()


def save(out: Path, model: nn.Module, made: list[torch.optim.Optimizer], step: int, is_first: bool) -> None:
    """The checkpoint, whole on the first process; the old one stays until the new one is there."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state, optimizer = get_state_dict(model, made, options=options)
    if is_first:
        torch.save({"model": state, "optimizer": optimizer, "step": step}, out / "checkpoint.tmp")
        (out / "checkpoint.tmp").rename(out / "checkpoint.pt")
    if dist.is_initialized():
        dist.barrier()


def restore(out: Path, model: nn.Module, made: list[torch.optim.Optimizer]) -> int:
    """Load the checkpoint if there is one; the step to go on with."""
    if not (out / "checkpoint.pt").exists():
        return 0
    found = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, made, model_state_dict=found["model"], optim_state_dict=found["optimizer"], options=options)
    return int(found["step"])


def main() -> None:
    """Train."""
    args = arguments()
    is_distributed = "WORLD_SIZE" in os.environ
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if is_distributed:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    if args.fsdp and (not is_distributed or args.optimizer == "muon"):
        raise SystemExit("error: --fsdp needs torchrun, and AdamW: Muon works on whole matrices")
    is_first, is_first_here = rank == 0, local_rank == 0
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(token_files(args.data, args.field, args.out, is_first), args.context, args.seed)
    n_rows = max(1, int(args.batch_tokens) // args.context)
    if n_rows % world:
        raise SystemExit(f"error: {n_rows} rows of {args.context} tokens do not divide among {world} processes")
    mine = n_rows // world
    micro = args.micro_batch or mine
    if mine % micro:
        raise SystemExit(f"error: --micro-batch {micro} does not divide the {mine} rows of a process")
    total = math.ceil(args.tokens / (n_rows * args.context))

    torch.manual_seed(args.seed)
    if is_distributed and not is_first_here:
        dist.barrier()  # one process of a machine at a time copies the code of this folder to transformers' cache
    config = AutoConfig.from_pretrained(HERE, trust_remote_code=True)
    if args.isolate and config.eos_token_id is None:
        raise SystemExit("error: --isolate needs the token that ends documents: set eos_token_id in config.json")
    get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], HERE)
    if is_distributed and is_first_here:
        dist.barrier()
    if args.fresh or not (HERE / "model.safetensors").exists():
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(HERE, trust_remote_code=True, dtype=torch.float32)
    plain = model.to(device)
    plain.train()
    if args.checkpointing:
        plain.gradient_checkpointing_enable()
    if args.fsdp:
        from torch.distributed.fsdp import fully_shard

        shares_weights = plain._no_split_modules != ["Block"]
        for block in () if shares_weights else plain.model.layers:
            fully_shard(block)
        fully_shard(plain)
    elif is_distributed:
        model = nn.parallel.DistributedDataParallel(plain, broadcast_buffers=False)
    made = optimizers(plain, args.lr, args.optimizer, fused=not args.fsdp)
    start = restore(args.out, plain, made)
    if args.compile:
        model = torch.compile(model)
    use_bf16 = args.precision == "bf16" or (args.precision is None and on_gpu)
    lower = torch.autocast(device.type, torch.bfloat16) if use_bf16 else nullcontext()
    stop = total if args.stop_after is None else min(total, args.stop_after)

    for step in range(start, stop):
        began = time.perf_counter()
        losses = []
        for at in range(0, mine, micro):
            tokens = rows.batch(step * n_rows + rank * mine + at, micro).to(device)
            inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
            seq_idx = None
            if args.isolate:
                seq_idx = (inputs == config.eos_token_id).roll(1, dims=1)
                seq_idx[:, 0] = False
                seq_idx = seq_idx.cumsum(-1)
            is_last = at + micro == mine
            later = nullcontext() if is_last or not hasattr(model, "no_sync") else model.no_sync()
            with later:
                with lower:
                    out = model(inputs, labels=inputs, shift_labels=targets, seq_idx=seq_idx, use_cache=False)
                loss = out.loss * (micro / mine)
                loss.backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(plain.parameters(), GRAD_CLIP)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        for optimizer in made:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, total) * group["lr_scale"]
            optimizer.step()
            optimizer.zero_grad()
        balance_routers(plain)
        loss = torch.stack(losses).sum()
        if is_distributed:
            dist.all_reduce(loss)
        value = float(loss) / world
        if not math.isfinite(value) or not math.isfinite(float(norm)):
            raise SystemExit(f"error: loss {value}, gradient norm {float(norm)} at step {step + 1}; try a lower --lr")
        if is_first:
            speed = n_rows * args.context / (time.perf_counter() - began)
            line = {"step": step + 1, "of": total, "loss": round(value, 4), "tokens_per_s": round(speed)}
            print(json.dumps(line), flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == stop:
            save(args.out, plain, made, step + 1, is_first)

    if stop == total:
        state, _ = get_state_dict(plain, [], options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if is_first:
            if plain.config.tie_word_embeddings:
                state.pop("lm_head.weight", None)
            plain.save_pretrained(args.out / "model", state_dict=state)
            if (HERE / "tokenizer.json").exists():
                AutoTokenizer.from_pretrained(HERE, trust_remote_code=True).save_pretrained(args.out / "model")
            print(f"{args.out / 'model'}: trained on {total * n_rows * args.context:,} tokens", flush=True)
    if is_distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
