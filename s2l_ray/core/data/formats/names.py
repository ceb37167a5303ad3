"""What the name of a raw file says, in small letters or capitals: its format, and how it is
compressed as a whole."""

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
LINE_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson")
TEXT_SUFFIXES = (*LINE_SUFFIXES, ".json", ".csv", ".tsv")
PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIXES = (".arrow", ".feather")
SUFFIXES = (
    *TEXT_SUFFIXES,
    *(suffix + codec for suffix in TEXT_SUFFIXES for codec in CODECS),
    *PARQUET_SUFFIXES,
    *ARROW_SUFFIXES,
)


def has_suffix(name: str, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """Whether a name ends with one of these suffixes; without them, whether the file can be
    read."""
    return name.lower().endswith(suffixes)


def codec_of(name: str) -> str | None:
    """How a file is compressed as a whole; None where it is not."""
    return next((codec for suffix, codec in CODECS.items() if has_suffix(name, (suffix,))), None)


def bare_name(name: str) -> str:
    """A file's name without the suffix that says how it is compressed."""
    return name if codec_of(name) is None else name.rpartition(".")[0]


def described() -> str:
    """The suffixes of all files that can be read, for messages."""
    return (
        f"{', '.join(TEXT_SUFFIXES)} (each also with {', '.join(CODECS)}), "
        f"{', '.join((*PARQUET_SUFFIXES, *ARROW_SUFFIXES))}"
    )
