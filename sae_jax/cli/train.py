"""sae-train as a process of its own."""

from sae_jax.cli import process
from sae_jax.training import preemption


def main() -> None:
  """Entry point of the console script."""
  process.run('train', preemption.listen)


if __name__ == '__main__':
  main()
