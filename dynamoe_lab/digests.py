"""Digests of files: what is read back is compared with what was written.

xxh3_128 is as good against accidents as SHA-256 and ten times as fast on checkpoints; what comes from elsewhere is pinned by SHA-256
(`assets`). Whoever can change a file of the cache can change the digest beside it, too: this is no protection against them.
"""

import time
from pathlib import Path

__all__ = ["file_digest"]

_CHUNK = 1 << 22  # bytes read at a time
_REMEMBERED = 1 << 20  # bytes: digests of larger files are remembered by this process
_SETTLED = 2.0  # seconds: a file that was written later than this before it was read may change without a new time stamp
_digests: dict[tuple, str] = {}


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's content, hexadecimal.

    A large file that this process has read before and that has the same inode, size and times since is not read again.
    """
    import xxhash

    stat = path.stat()
    known = (str(path.absolute()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if known in _digests:
        return _digests[known]
    settled = stat.st_size >= _REMEMBERED and time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    if settled:
        _digests[known] = digest.hexdigest()
    return digest.hexdigest()
