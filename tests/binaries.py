"""The flags of our binaries, defined and parsed in the tests' own process."""

import contextlib
import re

from absl import flags as absl_flags
import pytest

from sae_jax.cli import browse, flags, harvest, plan, probe, train

MODULES = {
  'sae-harvest': harvest,
  'sae-train': train,
  'sae-probe': probe,
  'sae-browse': browse,
  'sae-plan': plan,
}


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


def flags_of(name):
  """The flags that a binary of ours has, with their help."""
  with defined(MODULES[name].define) as values:
    return {
      flag: values[flag].help
      for flag in values
      if values.find_module_defining_flag(flag).startswith('sae_jax.')
    }


def missing_in_help(text, expected):
  """The flags of `expected` that, or whose help, a text of --help lacks."""
  listed = set(re.findall(r'^ +--(?:\[no\])?(\w+):', text, re.MULTILINE))
  words = ' '.join(text.split())
  return {
    flag
    for flag, said in expected.items()
    if flag not in listed or ' '.join(said.split()) not in words
  }
