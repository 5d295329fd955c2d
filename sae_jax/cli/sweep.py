"""sae-sweep as a process of its own."""

import sys

from sae_jax.cli import process
from sae_jax.training import preemption


def main() -> None:
  """Entry point of the console script; `fit` comes before its flags."""
  if sys.argv[1:2] == ['fit']:
    del sys.argv[1]
    process.run('sweep_fit', binary='sweep')
  else:
    process.run('sweep', preemption.listen)


if __name__ == '__main__':
  main()
