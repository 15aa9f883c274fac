"""Small spaces that several tests use."""

TINY = """
archsearch: 1
name: tiny
scales:
  proxy:  {n_blocks: 4, d_model: 32, context: 64}
  target: {n_blocks: 8, d_model: 64, context: 256, vocab_size: 512, dtype: float32}
mixers:
  full: {kind: attention, head_dim: 16, kv_groups: {choice: [1, 2]}}
  swa:  {kind: attention, head_dim: 16, window: 1/4 context}
ffns:
  dense: {kind: swiglu, expand: 2}
layout:
  mixer: {ratio: {swa: {choice: [1, 3]}, full: 1}, place: {full: {choice: [even, first]}}}
  ffn: dense
objectives: [{name: val_bpb}, {name: state_bytes}]
train: {tokens: 4096, batch_tokens: 256, val_tokens: 1024, lr: 3e-3}
search: {trials: 4}
"""

WIDE = """
archsearch: 1
name: wide
description: Every construct of the language in one file.
task: {kind: causal_lm, corpus: builtin, tokenizer: bytes}
scales:
  proxy:  {n_blocks: 12, d_model: 256, context: 512}
  target: {n_blocks: 48, d_model: 2048, context: 32768, vocab_size: 128000, dtype: bfloat16}
mixers:
  full: {kind: attention, head_dim: 64, kv_groups: {choice: [1, 4]}, position: {choice: [rope, none]}}
  swa:  {kind: attention, head_dim: 64, window: {choice: [64, 1/4 context], per: block}}
  gqa:  {kind: attention, head_dim: 64, kv_groups: 2, rope_theta: {log_range: [1e4, 1e6]}}
  both: {kind: parallel, of: [gqa, swa], fuse: mean_norm}
ffns:
  dense: {kind: swiglu, expand: 8/3}
  wide:  {kind: swiglu, expand: {range: [3, 5]}}
trunk: {norm: rmsnorm, norm_place: {choice: [pre, sandwich]}, tie_embeddings: true, residual: plain}
layout:
  mixer:
    choice:
      - pattern: [swa, swa, swa, full]
      - ratio: {swa: {choice: [3, 5, 7]}, full: 1}
        place: {full: {choice: [even, first, middle, last, ends]}}
      - each: [gqa, swa, both, full]
        grow: {choice: [stretch, stack]}
      - blocks: [swa, full, gqa]
      - stages:
          - {of: 1/2, pattern: [swa]}
          - {of: 1/2, each: [gqa, full], last: full}
  ffn: {pattern: {choice: [[dense], [dense, wide], [wide]]}, first: dense}
share:
  kv: {choice: [none, {span: 2}, {from: middle}]}
  weights: {choice: [none, {mixer: full}, {span: 2}]}
rules:
  - count(full) >= 1
  - mixer[0] != full
  - params(target) <= 6e9
  - state_bytes(target, context=131072) <= 512 GiB
objectives:
  - {name: val_bpb, goal: min}
  - {name: decode_ms, goal: min, at: {scale: target, context: 32768, batch: 1}}
  - {name: decode_ms, goal: min, at: {scale: target, context: 32768, batch: 64}, limit: 50}
train:  {tokens: 4M, batch_tokens: 8192, optimizer: adamw, lr: {choice: [1e-3, 3e-3]}, schedule: wsd}
search: {sampler: auto, trials: 64, rungs: [1/16, 1/4, 1], keep: 1/3, seed: 0}
runtime: {trial_timeout: 10 min}
"""
