"""Files that appear whole or not at all, whether a process is killed or the power fails.

A rename is atomic for other processes, not for the disk: a file system may write the new name
before the content, and after a power cut the name leads to an empty file. So the content is on the
disk before it gets its name, and the name is there before the caller goes on (T. S. Pillai et al.,
*All file systems are not created equal*, OSDI 2014).
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the hidden name of a file that replaces `path` once it is complete.

    Parameters
    ----------
    path
        Several processes may write it at once: the last one stays. Its folder exists.

    Yields
    ------
    Path
        Beside `path`, to be written in the block; its name ends on ``.tmp``.
    """
    target = Path(path)
    temporary = target.with_name(f'.{target.name}.{uuid.uuid4().hex}.tmp')
    try:
        yield temporary
        _to_disk(temporary)
        temporary.replace(target)
        _to_disk(target.parent)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk does not say which file
            error.filename = str(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file and, where they are missing, its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


def _to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what some network file systems say of any folder
            raise
    finally:
        os.close(number)
