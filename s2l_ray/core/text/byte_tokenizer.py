"""A tokenizer of bytes, which needs no files."""

from typing import Any

# Its name in a job file.
BYTES = "bytes"
BYTE_END, BYTE_PAD = 256, 257


def byte_tokenizer() -> Any:
    """A fast tokenizer with ids 0-255 for the bytes, then the end token and the padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # GPT-2's byte alphabet: printable bytes stand for themselves, the others follow from code point
    # 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }
    tokenizer = Tokenizer(models.BPE({symbols[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    if (fast.eos_token_id, fast.pad_token_id) != (BYTE_END, BYTE_PAD):
        raise RuntimeError(
            f"byte tokenizer: expected end and pad at {BYTE_END, BYTE_PAD}, got "
            f"{fast.eos_token_id, fast.pad_token_id}"
        )
    return fast
