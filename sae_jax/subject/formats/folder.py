"""Models in transformers' folders: config.json, safetensors, tokenizer.json."""

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import tempfile
from typing import Any

from etils import epath
import numpy as np

from sae_jax import errors
from sae_jax.storage import records, safetensors
from sae_jax.storage import tensors as tensors_lib
from sae_jax.storage import url as url_lib
from sae_jax.subject import transformer
from sae_jax.subject.formats import assembly, families

_AGAIN = 'download it again'
_INDEX = 'model.safetensors.index.json'
_SINGLE = 'model.safetensors'
_PREFIX = re.compile(r'(?:(?:model|language_model|transformer|gpt_neox)\.)+')
# Masks and tables that older releases stored, and the vision parts of Gemma 3.
_UNUSED = re.compile(
  r'.*\.(attn\.bias|(attn|attention)\.masked_bias|attention\.bias|inv_freq)'
  r'|(vision_tower|multi_modal_projector)\..*'
)


@dataclasses.dataclass(frozen=True)
class SafetensorsFiles:
  """The opened safetensors files of a model.

  Attributes:
    url: the folder.
    tensors: name without the prefix of the model's class -> tensor.
    sha256: hex digest of the file. For several files it is the digest of the
      lines '<digest>  <name>' in the order of the names, as sha256sum prints.
  """

  url: str
  tensors: dict[str, tensors_lib.Tensor]
  sha256: str

  def read(self, name: str) -> np.ndarray:
    """A tensor's values.

    Raises:
      UserError: if there is no such tensor, or its file ends too early.
    """
    if name not in self.tensors:
      raise errors.UserError(
        f'{self.url} has no tensor {name} among its {len(self.tensors)}: '
        'download or convert the model again'
      )
    return self.tensors[name].read()


def read_settings(url: str) -> dict[str, Any]:
  """The parsed config.json of a folder.

  Raises:
    UserError: if it is missing, or not JSON.
  """
  path = epath.Path(url) / 'config.json'
  if not path.is_file():
    raise errors.UserError(
      f'{url} has no config.json: give a folder with config.json, '
      '*.safetensors and tokenizer.json'
    )
  return records.read(path, _AGAIN)


@contextlib.contextmanager
def open_files(url: str) -> Iterator[SafetensorsFiles]:
  """Opens the safetensors files of a folder.

  Remote files are copied to a temporary folder for as long as they are open.

  Raises:
    UserError: if a file is missing or incomplete.
  """
  with contextlib.ExitStack() as stack:
    copies = None
    if url_lib.is_remote(url):
      copies = stack.enter_context(tempfile.TemporaryDirectory())
    files = _filenames(url)
    tensors, digests, stored_as = {}, [], {}
    for number, name in enumerate(files):
      path = _local(url, name, copies and f'{copies}/{number}')
      content, _ = safetensors.read(path, f'{url}/{name}')
      with open(path, 'rb') as data:
        digests.append(hashlib.file_digest(data, 'sha256').hexdigest())
      for stored, tensor in content.items():
        plain = _PREFIX.sub('', stored, count=1)
        if plain in tensors:
          raise errors.UserError(
            f'{url} has the tensor {plain} twice, as {stored} and '
            f'{stored_as[plain]}: download the model again'
          )
        tensors[plain], stored_as[plain] = tensor, stored
    digest = digests[0]
    if len(digests) > 1:
      lines = ''.join(f'{d}  {n}\n' for d, n in zip(digests, files))
      digest = hashlib.sha256(lines.encode()).hexdigest()
    tensors = {k: v for k, v in tensors.items() if not _UNUSED.fullmatch(k)}
    yield SafetensorsFiles(url, tensors, digest)


def _local(url: str, name: str, copy: str | None) -> str:
  """The path of a file, copied to `copy` if that is not None."""
  path = epath.Path(url) / name
  if not path.is_file():
    raise errors.UserError(
      f'{url} has no {name}, which its index names: download it again'
    )
  if copy is None:
    return os.fspath(path)
  with path.open('rb') as source, open(copy, 'wb') as target:
    shutil.copyfileobj(source, target, 1 << 24)
  return copy


def _filenames(url: str) -> list[str]:
  """Names of the files with the weights: the index's, or the only one."""
  folder = epath.Path(url)
  index = folder / _INDEX
  if index.is_file():
    return sorted(set(safetensors.weight_map(index).values()))
  if (folder / _SINGLE).is_file():
    return [_SINGLE]
  files = sorted(path.name for path in folder.glob('*.safetensors'))
  if len(files) != 1:
    raise errors.UserError(
      f'{url} has {len(files)} .safetensors files and no {_INDEX}: download '
      'the whole model'
    )
  return files


def load_params(
  url: str, dtype: str = 'float32', shardings=None
) -> tuple[transformer.TransformerConfig, transformer.Params, str]:
  """Reads a model from a folder.

  Args:
    url: the folder, local or in a bucket.
    dtype: type of the parameters.
    shardings: config -> shardings of the parameters; None for one device.

  Returns:
    The transformer's shape, its parameters and the digest of their files.

  Raises:
    UserError: if the family is not supported, or a file or tensor is missing,
      misshapen or not used by the family.
  """
  config, sources = families.transformer_config(
    read_settings(url), f'{url}/config.json'
  )
  with open_files(url) as files:
    # A tied model may store the embedding under both names.
    stored = set(files.tensors)
    if config.tied:
      stored -= {'lm_head.weight', 'embed_out.weight'}
    assembly.check_names(config, sources, stored, url)
    params = assembly.assemble(
      config,
      sources,
      files.read,
      url,
      dtype,
      shardings(config) if shardings else None,
    )
    return config, params, files.sha256
