"""The page's own files, as they lie in `page/` and as a build writes them."""

import hashlib
import re

from etils import epath

PAGE = epath.Path(__file__).parent / 'page'


def digest() -> str:
  """A hex digest of the page's own files: their version."""
  total = hashlib.sha256()
  for source in _sources():
    total.update(source.name.encode() + source.read_bytes())
  return total.hexdigest()[:16]


def contents() -> dict[str, bytes]:
  """Name -> bytes of each file of the page.

  Where one names another, the digest is added to the address. So a browser
  never runs old scripts out of its cache beside new ones: theirs is another
  address.
  """
  names = '|'.join(re.escape(source.name) for source in _sources())
  address = re.compile(rf"""(["']|'\./)({names})(["'])""")
  version = digest()
  return {
    source.name: address.sub(
      rf'\g<1>\g<2>?{version}\g<3>', source.read_text()
    ).encode()
    for source in _sources()
  }


def _sources() -> list[epath.Path]:
  return sorted(path for path in PAGE.iterdir() if path.is_file())
