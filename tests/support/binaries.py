"""The flags of our binaries, defined and parsed in the tests' own process."""

import contextlib
import io
import json
import re
import subprocess
import sys
import traceback

from absl import flags as absl_flags
import jax
import pytest

from sae_jax.cli import flags
from sae_jax.cli.stages import (
  browse,
  convert,
  explain,
  harvest,
  plan,
  probe,
  sweep,
  sweep_fit,
  train,
)
from tests.support import gguf_models

MODULES = {
  'sae-harvest': harvest,
  'sae-train': train,
  'sae-probe': probe,
  'sae-browse': browse,
  'sae-convert': convert,
  'sae-explain': explain,
  'sae-plan': plan,
  'sae-sweep': sweep,
}
# With what is a word after a program.
COMMANDS = MODULES | {'sae-sweep fit': sweep_fit}


@contextlib.contextmanager
def defined(define):
  """absl's flags with those that a function defines, which go again after.

  Flags that modules define when they are imported, as some experiments do, are
  put aside meanwhile: programs have flags of the same name.
  """
  values = absl_flags.FLAGS
  # absl keeps all of its state there, some of it in dictionaries of lists.
  kept = dict(values.__dict__)
  for name, value in kept.items():
    if isinstance(value, dict):
      kept[name] = {
        key: list(inner) if isinstance(inner, list) else inner
        for key, inner in value.items()
      }
  for name in list(values):
    module = values.find_module_defining_flag(name, '')
    if not module.startswith('absl.') and module != flags.__name__:
      delattr(values, name)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flags, '_urls', [])
    try:
      define()
      yield values
    finally:
      values.unparse_flags()
      values.__dict__.clear()
      values.__dict__.update(kept)


def flags_of(name):
  """The flags that a binary of ours has, with their help."""
  with defined(COMMANDS[name].define) as values:
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


def run(name, *arguments):
  """Runs a binary in this process: its exit code, output and errors."""
  module, err = COMMANDS[name], io.StringIO()
  # As a program's own, it can be told what to do with odd signs.
  out = io.TextIOWrapper(io.BytesIO(), 'utf-8')
  with (
    defined(module.define),
    pytest.MonkeyPatch.context() as patch,
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    patch.setattr(sys, 'argv', [name, *arguments])
    try:
      flags.run(module.work, module.__doc__)
    except SystemExit as ended:
      code = ended.code or 0
    except Exception:
      # As an interpreter ends with what nobody has caught.
      code = 1
      traceback.print_exc()
    finally:
      jax.config.update('jax_debug_nans', False)
  out.flush()
  return subprocess.CompletedProcess(
    arguments, code, out.buffer.getvalue().decode(), err.getvalue()
  )


def small_harvest(root):
  """Writes a text and a subject; the flags of a harvest of them in a second."""
  text = root / 'texts.jsonl'
  text.write_text(
    ''.join(
      json.dumps({'text': f'In chapter {i} the {word} was left at sea. ' * 4})
      + '\n'
      for i, word in enumerate(('ship', 'captain', 'whale', 'harpoon') * 8)
    )
  )
  return {
    'store': root / 'store',
    'sources': text,
    'n_tokens': 900,
    'subject': gguf_models.write(root / 'm.gguf', gguf_models.of_bytes()),
    'sites': 'blocks.1.resid_post',
    'context_length': 32,
  }
