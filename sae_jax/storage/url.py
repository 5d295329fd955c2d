"""What a URL is: where data lies, on a disk or in a bucket."""

import os


def kvstore(url: str | os.PathLike[str]) -> dict[str, str]:
  """TensorStore's spec of the folder a URL names, local or gs://."""
  url = os.fspath(url)
  if url.startswith('gs://'):
    bucket, _, path = url.removeprefix('gs://').partition('/')
    path = path.rstrip('/') + '/' if path else ''
    return {'driver': 'gcs', 'bucket': bucket, 'path': path}
  path = os.path.abspath(os.path.expanduser(url))
  return {'driver': 'file', 'path': path.rstrip('/') + '/'}


def absolute(path: str) -> str:
  """A local path from the root; a URL as it is."""
  return path if '://' in path else os.path.abspath(path)
