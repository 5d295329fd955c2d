"""sae-plan as a process of its own."""

from sae_jax.cli import process


def main() -> None:
  """Entry point of the console script."""
  process.run('plan')


if __name__ == '__main__':
  main()
