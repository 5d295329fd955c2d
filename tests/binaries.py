"""The flags of our binaries, defined and parsed in the tests' own process."""

import contextlib

from absl import flags as absl_flags
import pytest

from sae_jax.cli import flags


@contextlib.contextmanager
def defined(define):
  """absl's flags with those that a function defines, which go again after."""
  values = absl_flags.FLAGS
  before = set(values)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flags, '_urls', [])
    try:
      define()
      yield values
    finally:
      for name in set(values) - before:
        delattr(values, name)
      values.unparse_flags()
