"""What the name of a raw file says: its format, and how it is compressed as a whole."""

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
ARROW_SUFFIXES = (".arrow", ".feather")
SUFFIXES = (
    *TEXT_SUFFIXES,
    *(suffix + codec for suffix in TEXT_SUFFIXES for codec in CODECS),
    ".parquet",
    *ARROW_SUFFIXES,
)


def codec_of(name: str) -> str | None:
    """How a file is compressed as a whole; None where it is not."""
    return next((codec for suffix, codec in CODECS.items() if name.endswith(suffix)), None)


def bare_name(name: str) -> str:
    """A file's name without the suffix that says how it is compressed."""
    return name if codec_of(name) is None else name.rpartition(".")[0]


def described() -> str:
    """The suffixes of all files that can be read, for messages."""
    return (
        f"{', '.join(TEXT_SUFFIXES)} (each also with {', '.join(CODECS)}), "
        f".parquet, {', '.join(ARROW_SUFFIXES)}"
    )
