"""A harvest of the toy subject in a process of its own, that may be killed.

python -m tests.support.harvest_child TEXTS STORE INDEX COUNT
"""

import sys

from sae_jax.harvesting import harvest
from tests.support import toy


def main(texts, url, index, count):
  """Harvests, and says when it begins."""
  subject = toy.subject()
  print('ready', flush=True)
  found = harvest.harvest(
    toy.config(texts), url, subject, (int(index), int(count))
  )
  print('sealed' if found else 'done', flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
