"""What documents say that can be checked without running it.

Each check returns its complaints, one line each: none if all is well.
"""

import ast
import contextlib
import importlib
import inspect
import json
import pathlib
import re
import shlex
import typing

from absl import flags as absl_flags
import pytest

from sae_jax.cli import flags
from tests.support import binaries

ROOT = next(
  folder
  for folder in pathlib.Path(__file__).resolve().parents
  if (folder / 'setup.cfg').exists()
)
_FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r'`([^`]+)`')
_LINK = re.compile(r'\[[^\]]*\]\(([^)\s]+)\)')
# Folders whose files are named in running text.
_PATH = re.compile(r'(?:sae_jax|experiments|docs|tests|tpu_scripts)/[\w./-]*')
_OPERATORS = {'|', '||', '&&', ';', '&'}


def blocks(text, language):
  """The fenced blocks of a language."""
  return [body for kind, body in _FENCE.findall(text) if kind == language]


def prose(text):
  """A document without its fenced blocks."""
  return _FENCE.sub('', text)


def spans(text):
  """The code in running text, each on one line."""
  return [' '.join(span.split()) for span in _SPAN.findall(prose(text))]


def cells(path, kind):
  """The sources of a notebook's cells of one kind."""
  notebook = json.loads(path.read_text())
  return [
    ''.join(cell['source'])
    for cell in notebook['cells']
    if cell['cell_type'] == kind
  ]


def words(block):
  """The commands of a shell block, each a list of words."""
  found = []
  for line in block.replace('\\\n', ' ').splitlines():
    lexer = shlex.shlex(line, posix=True, punctuation_chars=';|&')
    lexer.whitespace_split = True
    command = []
    for word in [*lexer, ';']:
      if word not in _OPERATORS:
        command.append(word)
      elif command:
        found.append(command)
        command = []
  return found


def command_complaints(text):
  """Of the commands in blocks, and of those in running text."""
  complaints = []
  for block in blocks(text, 'sh'):
    for command in words(block):
      complaints += _command(command, whole=True)
  for span in spans(text):
    # Not a command that leaves something out, and no single word.
    if ' ' in span and '...' not in span and span.count("'") % 2 == 0:
      for command in words(span):
        complaints += _command(command, whole=False)
  return complaints


def _command(command, whole):
  """Of one command; one that is not whole may lack required flags."""
  program, *arguments = command
  name = pathlib.Path(program).name
  if f'{name} {"".join(arguments[:1])}' in binaries.COMMANDS:
    name, arguments = f'{name} {arguments[0]}', arguments[1:]
  if name in binaries.COMMANDS:
    return _flags(binaries.COMMANDS[name].define, command, arguments, whole)
  if re.fullmatch(r'python[\d.]*', name):
    return _python(command, arguments, whole)
  if name == 'make':
    return _make(command, arguments)
  if program.startswith('tpu_scripts/'):
    return _script(command, program, arguments)
  if name == 'pip':
    return _pip(command, arguments)
  if name == 'export':
    return _assignments(command, arguments)
  return []


def _flags(define_all, command, arguments, whole):
  """What the parser of a program and its configs say of the arguments."""
  kinds = []
  define = flags.define

  def recording(kind):
    kinds.append(kind)
    define(kind)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flags, 'define', recording)
    patch.setattr(flags, 'run', lambda *_: None)
    with binaries.defined(define_all) as values:
      if not whole:
        given = {argument.partition('=')[0] for argument in arguments}
        arguments = arguments + [
          f'--{name}=x' for name in flags._urls if f'--{name}' not in given
        ]
      try:
        rest = values(['program', *arguments])[1:]
        for kind in kinds:
          flags.read(kind)
      except (absl_flags.Error, ValueError) as error:
        return [f'{shlex.join(command)}: {error}']
  return [f'{shlex.join(command)}: {word} is not a flag' for word in rest]


def _python(command, arguments, whole):
  """Of a script or module of ours that Python runs."""
  if arguments[:1] == ['-m']:
    module, arguments = arguments[1], arguments[2:]
  elif arguments and arguments[0].endswith('.py'):
    module = arguments[0].removesuffix('.py').replace('/', '.')
    arguments = arguments[1:]
  else:
    return []
  if not module.startswith(('experiments', 'sae_jax')):
    return []
  path = ROOT / (module.replace('.', '/') + '.py')
  if not path.exists():
    return [f'{shlex.join(command)}: there is no module {module}']
  if 'flags.run' not in path.read_text() and '.run_experiment(' not in (
    path.read_text()
  ):
    return [f'{shlex.join(command)}: its flags cannot be read by a test']
  module = importlib.import_module(module)
  return _flags(module.main, command, arguments, whole)


def _make(command, arguments):
  """Of a target and of variables that the Makefile reads."""
  makefile = (ROOT / 'Makefile').read_text()
  complaints = []
  for argument in arguments:
    name, equals, value = argument.partition('=')
    if equals and f'$({name})' not in makefile:
      complaints.append(f'{shlex.join(command)}: no variable {name}')
    elif not equals and not re.search(rf'^{name}:', makefile, re.MULTILINE):
      complaints.append(f'{shlex.join(command)}: no target {name}')
    if name == 'FLAGS' and 'demo' in arguments:
      demo = ['python', 'experiments/quickstart.py', *shlex.split(value)]
      complaints += _command(demo, whole=False)
  return complaints


def _script(command, program, arguments):
  """Of a script's file and its action."""
  if not (ROOT / program).is_file():
    return [f'{shlex.join(command)}: there is no {program}']
  known = ''.join(path.read_text() for path in ROOT.glob('tpu_scripts/*.sh'))
  return [
    f'{shlex.join(command)}: no action {argument}'
    for argument in arguments
    if not argument.startswith('-') and f'action_{argument}()' not in known
  ]


def _pip(command, arguments):
  """Of the extras of this package."""
  setup = (ROOT / 'setup.cfg').read_text()
  return [
    f'{shlex.join(command)}: no extra {extra}'
    for argument in arguments
    for extra in re.findall(r'^(?:\.|sae_jax)\[(\w+)\]', argument)
    if not re.search(rf'^{extra} =$', setup, re.MULTILINE)
  ]


def _assignments(command, arguments):
  """Of settings that hold flags of sae-train."""
  complaints = []
  for argument in arguments:
    name, _, value = argument.partition('=')
    if name == 'TRAIN_FLAGS':
      train = ['sae-train', *shlex.split(value)]
      complaints += _command(train, whole=False)
  return complaints


def flag_complaints(text, known):
  """Of flags in running text that no program of ours has.

  Args:
    text: the document.
    known: the names of all flags.
  """
  return [
    f'{span}: no program has it'
    for span in spans(text)
    for name in re.findall(r'(?:^| )--(\w[\w-]*)', span)
    if span.startswith('--') and name not in known
  ]


def link_complaints(path, text=None):
  """Of links and paths in a document that lead nowhere.

  Args:
    path: the document, which links are relative to.
    text: what it holds, if not what the file does.
  """
  text = prose(path.read_text() if text is None else text)
  complaints = []
  for link in _LINK.findall(text):
    if re.match(r'\w+:', link):
      continue
    file, _, anchor = link.partition('#')
    target = (path.parent / file).resolve() if file else path
    if not target.exists():
      complaints.append(f'{path.name}: {link} is not there')
    elif anchor and anchor not in anchors(target.read_text()):
      complaints.append(f'{path.name}: {link} has no such heading')
  for span in spans(text):
    if _PATH.fullmatch(span) and not (ROOT / span).exists():
      complaints.append(f'{path.name}: `{span}` is not there')
  return complaints


def anchors(text):
  """The anchors that GitHub gives a document's headings."""
  found = []
  for heading in re.findall(r'^#+ (.+)$', prose(text), re.MULTILINE):
    kept = re.sub(r'[^\w\- ]', '', heading.lower())
    found.append(kept.strip().replace(' ', '-'))
  return found


def code_complaints(code):
  """Of Python code: its grammar, and what it takes from our packages."""
  # What a notebook hands to the shell or to IPython.
  code = re.sub(r'^[!%].*$', 'pass', code, flags=re.MULTILINE)
  try:
    tree = ast.parse(code)
  except SyntaxError as error:
    return [f'{error}: {code.splitlines()[0]}']
  names, complaints = {}, []
  for node in ast.walk(tree):
    with contextlib.suppress(ImportError):
      if isinstance(node, ast.Import):
        for item in node.names:
          if item.name.startswith(('sae_jax', 'experiments')):
            names[item.asname or item.name] = importlib.import_module(item.name)
        continue
    if isinstance(node, ast.ImportFrom):
      complaints += _imported(node, names)
  for node in tree.body:
    complaints += _attributes(node, names)
    _bind(node, names)
  return complaints


def _imported(node, names):
  """Binds what is imported from our packages, or complains that it is not."""
  if not node.module.startswith(('sae_jax', 'experiments')):
    return []
  complaints = []
  for item in node.names:
    try:
      module = importlib.import_module(node.module)
      if not hasattr(module, item.name):
        importlib.import_module(f'{node.module}.{item.name}')
      names[item.asname or item.name] = getattr(module, item.name)
    except ImportError as error:
      complaints.append(f'from {node.module} import {item.name}: {error}')
  return complaints


def _attributes(statement, names):
  """Of attributes that are not there, and of arguments that are not taken."""
  complaints = []
  for node in ast.walk(statement):
    if isinstance(node, ast.Attribute):
      with contextlib.suppress(KeyError):
        owner = _value(node.value, names)
        if not hasattr(owner, node.attr) and node.attr not in getattr(
          owner, '__dataclass_fields__', ()
        ):
          complaints.append(f'{ast.unparse(node)} is not there')
    elif isinstance(node, ast.Call):
      with contextlib.suppress(KeyError):
        called = _value(node.func, names)
        given = {keyword.arg: None for keyword in node.keywords}
        # A method is looked up on its class, and lacks its first argument.
        bound = inspect.isfunction(called) and isinstance(
          _value(node.func.value, names)
          if isinstance(node.func, ast.Attribute)
          else None,
          type,
        )
        try:
          inspect.signature(called).bind(*[None] * bound, *node.args, **given)
        except TypeError as error:
          complaints.append(f'{ast.unparse(node)}: {error}')
  return complaints


def _value(node, names):
  """What a name or attribute is; KeyError if that is not known here."""
  if isinstance(node, ast.Name):
    return names[node.id]
  if isinstance(node, ast.Attribute):
    owner = _value(node.value, names)
    if hasattr(owner, node.attr):
      return getattr(owner, node.attr)
  raise KeyError(ast.unparse(node))


def _bind(node, names):
  """Binds `name = function(...)` to the class that the function returns."""
  if (
    isinstance(node, ast.Assign)
    and isinstance(node.value, ast.Call)
    and isinstance(node.targets[0], ast.Name)
  ):
    names.pop(node.targets[0].id, None)
    with contextlib.suppress(KeyError):
      called = _value(node.value.func, names)
      kind = (
        called
        if isinstance(called, type)
        else typing.get_type_hints(called).get('return')
      )
      if isinstance(kind, type) and kind.__module__.startswith('sae_jax'):
        names[node.targets[0].id] = kind
