"""The tokenizer files of a Hugging Face folder: bytes as a vocabulary without merges, or a tokenizer.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archsearch.errors import DataError, ExportError

BYTES = "bytes"
END = "<|endoftext|>"
PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<PAD>", "<|finetune_right_pad_id|>")  # the first that is there


@dataclass(frozen=True)
class TokenizerFiles:
    """tokenizer.json and tokenizer_config.json as plain data, and the ids that end documents and pad."""

    content: dict[str, Any]
    config: dict[str, Any]
    end_id: int
    pad_id: int

    def write(self, folder: Path) -> None:
        """Write both files."""
        self.write_content(folder)
        _write(folder / "tokenizer_config.json", self.config)

    def write_content(self, folder: Path) -> None:
        """Write tokenizer.json alone."""
        _write(folder / "tokenizer.json", self.content)


def tokenizer_files(name: str, vocab_size: int, context: int, base_dir: Path | None = None) -> TokenizerFiles | None:
    """The files of `bytes` or of a tokenizer.json; None where the model's vocabulary is too small to be this one.

    name: as in the task's settings, relative to `base_dir`. Raises ExportError if there is no such tokenizer.
    """
    if name == BYTES:
        content, end, end_id = byte_tokenizer(), END, 256
    else:
        content, end, end_id = _from_file(name, base_dir)
    words = _words(content)
    if max(words.values()) >= vocab_size:
        return None
    pad = next((word for word in PADS if word in words), end)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "bos_token": end,
        "eos_token": end,
        "pad_token": pad,
    }
    return TokenizerFiles(content, config, end_id, words[pad])


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _words(content: dict[str, Any]) -> dict[str, int]:
    """Every token's id."""
    vocabulary = content["model"].get("vocab") or {}
    words = vocabulary if isinstance(vocabulary, dict) else {word[0]: i for i, word in enumerate(vocabulary)}
    return {**words, **{token["content"]: token["id"] for token in content.get("added_tokens") or ()}}


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json whose ids 0 to 255 are the bytes of UTF-8 text and whose id 256 ends documents."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(END, 256)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {letter: byte for byte, letter in enumerate(byte_letters())},
            "merges": [],
        },
    }


def byte_letters() -> list[str]:
    """The letter that byte-level vocabularies write for each byte (GPT-2): itself where it can be seen."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def _special(content: str, token_id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": True}


def _from_file(name: str, base_dir: Path | None) -> tuple[dict[str, Any], str, int]:
    from archsearch.data.tokenizers import load_tokenizer

    try:
        made = load_tokenizer(name, base_dir)
    except DataError as error:
        raise ExportError(f"the tokenizer goes into the folder, but {error}") from error
    end_id = made.end_id
    assert made.content is not None
    assert end_id is not None
    content = {**made.content, "truncation": None, "padding": None}
    end = next((word for word, token_id in _words(content).items() if token_id == end_id), None)
    if end is None:  # the search added one
        end = END
        content["added_tokens"] = [*(content.get("added_tokens") or ()), _special(END, end_id)]
    return content, end, end_id
