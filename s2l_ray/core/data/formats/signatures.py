"""Files that are something else than their name says, known by their first bytes."""

from s2l_ray.core.data.formats.names import TEXT_SUFFIXES, bare_name, codec_of, has_suffix
from s2l_ray.core.data.formats.source import Source
from s2l_ray.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"
# Of text files that are not compressed: the first bytes, what they say, and the remedy.
OTHERS = (
    (b"PAR1", "a Parquet file", "Name it .parquet."),
    (b"ARROW1", "an Arrow file", "Name it .arrow."),
    (b"\x1f\x8b", "compressed with gzip", "Add .gz to its name."),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "Add .zst to its name."),
    (b"\xfd7zXZ\x00", "compressed with xz", "Add .xz to its name."),
    (b"BZh", "compressed with bzip2", "Add .bz2 to its name."),
    (b"PK\x03\x04", "a zip archive", "Unpack it."),
    (b"\xff\xfe", "text in UTF-16", "Convert it to UTF-8."),
    (b"\xfe\xff", "text in UTF-16", "Convert it to UTF-8."),
    (b"<!doctype html", "a web page", "Download the file itself."),
    (b"<html", "a web page", "Download the file itself."),
)


def check_signature(source: Source) -> None:
    """Refuse a file whose first bytes say that it holds no rows of the format of its name.

    Raises:
        UserError: naming what it is, and what to do.
    """
    begin = source.file.read_at(len(POINTER), 0)
    source.file.seek(0)
    if begin == POINTER:
        raise UserError(
            f"reading {source.uri}: this is a pointer of Git LFS, not the file that it stands for. "
            "Run git lfs pull in its repository, or download the file."
        )
    if codec_of(source.name) is not None or not has_suffix(bare_name(source.name), TEXT_SUFFIXES):
        return
    for signature, what, remedy in OTHERS:
        if begin.lower().startswith(signature.lower()):
            raise UserError(
                f"reading {source.uri}: expected text, as its name says, but it is {what}. {remedy}"
            )
