"""Which requests to a fake bucket fail, and how."""

import dataclasses
import hashlib

# 503, 429: the error, at once. 429-after: with a Retry-After header.
# drop: hangs up instead of doing anything. drop-after: does what was asked,
#   then hangs up, so the client does not know; of writes and deletes alone.
# cut: a download ends half way. slow: the answer waits, then pauses half way.
# stale: 412 to a conditional media upload or delete that would succeed. Only
#   a client that reads, changes and writes again can be expected to go on.
KINDS = ('503', '429', '429-after', 'drop', 'drop-after', 'cut', 'slow')
ALL_KINDS = (*KINDS, 'stale')


@dataclasses.dataclass(frozen=True)
class Faults:
  """Which requests fail and how: a pure function of the seed and the request.

  A request is drawn for by its method, class, object, range and how often it
  was sent before. So what other threads ask meanwhile changes nothing, and a
  request that is sent again may succeed.

  Attributes:
    seed: another one fails other requests.
    rate: share of the requests that fail.
    kinds: the faults to choose from, all alike; see `KINDS`.
    retry_after: seconds that a 429-after asks for.
    delay: seconds a slow answer waits, twice.
  """

  seed: int
  rate: float
  kinds: tuple[str, ...] = KINDS
  retry_after: int = 1
  delay: float = 0.02

  def __post_init__(self):
    if unknown := set(self.kinds) - set(ALL_KINDS):
      raise ValueError(f'no such faults: {sorted(unknown)}')

  def draw(self, request: tuple, possible: set[str]) -> str | None:
    """The fault of a request, or None.

    Args:
      request: what it is and its number; any tuple of strings and numbers.
      possible: kinds that it can meet.
    """
    key = repr((self.seed, *request)).encode()
    digest = hashlib.blake2b(key, digest_size=16).digest()
    kinds = [kind for kind in self.kinds if kind in possible]
    if not kinds or int.from_bytes(digest[:8]) >= self.rate * 2**64:
      return None
    return kinds[int.from_bytes(digest[8:]) % len(kinds)]
