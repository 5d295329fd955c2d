"""URLs and kinds of storage, of which each is an entry of `BACKENDS`.

A URL without a scheme is a local path. Only this file looks at schemes.
"""

from collections.abc import Callable
import dataclasses
import glob
import importlib.util
import os
from typing import Any

from etils import epath
import fsspec.config

from sae_jax import errors


def _local_spec(path: str) -> dict[str, Any]:
  return {'driver': 'file', 'path': _as_folder(path)}


def _gcs_spec(place: str) -> dict[str, Any]:
  bucket, _, path = place.partition('/')
  return {'driver': 'gcs', 'bucket': bucket, 'path': _as_folder(path)}


def _s3_spec(place: str) -> dict[str, Any]:
  bucket, _, path = place.partition('/')
  spec = {
    'driver': 's3',
    'bucket': bucket,
    'path': _as_folder(path),
    # Otherwise TensorStore checks and then writes, if the server is not
    # Amazon's, and of two writers the second one wins.
    'use_conditional_write': True,
  }
  environment = os.environ.get
  # Variables that botocore reads and TensorStore does not.
  endpoint = environment('AWS_ENDPOINT_URL_S3') or environment(
    'AWS_ENDPOINT_URL'
  )
  if endpoint:
    # Only Amazon's servers say which region a bucket is in.
    region = environment('AWS_REGION') or environment('AWS_DEFAULT_REGION')
    spec |= {'endpoint': endpoint, 'aws_region': region or 'us-east-1'}
  if environment('AWS_ACCESS_KEY_ID'):
    # The environment comes first anyway; so TensorStore does not warn of
    # missing credential files.
    spec['aws_credentials'] = {'type': 'environment'}
  return spec


def _as_folder(path: str) -> str:
  return path.rstrip('/') + '/' if path else ''


@dataclasses.dataclass(frozen=True)
class Backend:
  """A kind of storage.

  Attributes:
    scheme: the part of its URLs before '://'; '' for local paths.
    spec: function from the rest of the URL, or from an absolute local path, to
      TensorStore's kvstore spec of the folder.
    orbax_knows: whether Orbax can open it by itself, see `storage.orbax`.
    makes_buckets: whether making a folder there makes its bucket too.
    package: package that must be installed to use it; '' if this package
      requires it anyway.
    extra: extra of this package that installs `package`.
  """

  scheme: str
  spec: Callable[[str], dict[str, Any]]
  orbax_knows: bool = True
  makes_buckets: bool = False
  package: str = ''
  extra: str = ''

  @property
  def is_remote(self) -> bool:
    """Whether it is a bucket: objects appear whole, and nothing is renamed."""
    return bool(self.scheme)


BACKENDS = (
  Backend('', _local_spec),
  Backend('gs', _gcs_spec),
  Backend(
    's3',
    _s3_spec,
    orbax_knows=False,
    makes_buckets=True,
    package='s3fs',
    extra='s3',
  ),
)


def _split(url: str) -> tuple[str, str]:
  """The scheme, '' if there is none, and what follows it."""
  scheme, mark, rest = url.partition('://')
  return (scheme, rest) if scheme and mark else ('', url)


def kinds() -> str:
  """The kinds of URL there are, in words."""
  schemes = ' or '.join(f'{b.scheme}://' for b in BACKENDS if b.is_remote)
  return f'a local path or a {schemes} URL'


def has_scheme(url: str | os.PathLike[str]) -> bool:
  """Whether a URL begins with a scheme, one of `BACKENDS` or another."""
  return bool(_split(os.fspath(url))[0])


def is_known(url: str | os.PathLike[str]) -> bool:
  """Whether a URL is of one of `BACKENDS`."""
  scheme = _split(os.fspath(url))[0]
  return any(b.scheme == scheme for b in BACKENDS)


def backend(url: str | os.PathLike[str]) -> Backend:
  """The kind of storage of a URL.

  Raises:
    UserError: if its kind is not known, or needs a package that is not
      installed.
  """
  url = os.fspath(url)
  scheme = _split(url)[0]
  match = next((b for b in BACKENDS if b.scheme == scheme), None)
  if match is None:
    raise errors.UserError(f'{url} is no URL that is known: use {kinds()}')
  if match.package and importlib.util.find_spec(match.package) is None:
    raise errors.UserError(
      f'{url} needs {match.package}, which is not installed: '
      f'pip install "sae_jax[{match.extra}]"'
    )
  return match


def is_remote(url: str | os.PathLike[str]) -> bool:
  """Whether a URL is that of a bucket or in one.

  Raises:
    UserError: see `backend`.
  """
  return backend(url).is_remote


def remote_schemes() -> list[str]:
  """The schemes of buckets."""
  return [b.scheme for b in BACKENDS if b.is_remote]


def bucket(url: str) -> str:
  """The URL of the bucket that a URL is in.

  Raises:
    UserError: see `backend`.
  """
  return f'{backend(url).scheme}://{_split(url)[1].partition("/")[0]}'


def absolute(url: str | os.PathLike[str]) -> str:
  """A local path made absolute; the URL of a bucket as it is.

  Raises:
    UserError: if a bucket's clients take it for a pattern; see also `backend`.
  """
  url = os.fspath(url)
  if not is_remote(url):
    return os.path.abspath(url)
  if glob.escape(url) != url:
    # A deletion of `run[1]/10` would delete `run1/10`.
    raise errors.UserError(
      f'{url} is a pattern to clients of buckets: use a name without *, ? and ['
    )
  return url


def kvstore(url: str | os.PathLike[str]) -> dict[str, Any]:
  """TensorStore's spec of the folder a URL names; ~ is expanded.

  Raises:
    UserError: see `backend`.
  """
  url = absolute(os.path.expanduser(url))
  return backend(url).spec(_split(url)[1])


def is_web(url: str) -> bool:
  """Whether a URL is of a web server, which serves files but has no folders."""
  return _split(url)[0] in ('http', 'https')


def without_query(url: str) -> str:
  """A web server's URL without its query; other URLs as they are."""
  return url.partition('?')[0] if is_web(url) else url


# Otherwise etils' file systems keep their first listing of a folder, while
# TensorStore and other processes write to it.
for _scheme in remote_schemes():
  fsspec.config.conf.setdefault(_scheme, {}).setdefault(
    'use_listings_cache', False
  )

# Otherwise etils takes a folder for a part of the pattern, and in one that is
# named `run[1]` neither we nor Orbax would find what is there.
_Path = type(epath.Path())
_glob_of_a_pattern = _Path.glob


def _glob(self, pattern):
  return _glob_of_a_pattern(_Path(glob.escape(os.fspath(self))), pattern)


_Path.glob = _glob
