"""Small files under a URL: whole or absent."""

import os

from etils import epath


def write_bytes(path: epath.PathLike, data: bytes) -> None:
  """Writes a file so that a reader sees the old or the new one, never a part.

  Args:
    path: local path or gs:// URL; missing folders are made.
    data: the file's content.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if '://' in os.fspath(path):
    # An object appears in the bucket when its upload is complete.
    path.write_bytes(data)
    return
  partial = path.parent / f'.{path.name}.{os.getpid()}.partial'
  partial.write_bytes(data)
  partial.replace(path)


def write_text(path: epath.PathLike, text: str) -> None:
  """`write_bytes` of UTF-8 text."""
  write_bytes(path, text.encode())
