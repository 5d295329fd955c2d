"""sae-convert as a process of its own."""

from sae_jax.cli import process


def main() -> None:
  """Entry point of the console script."""
  process.run('convert')


if __name__ == '__main__':
  main()
