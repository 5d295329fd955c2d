"""Every family against transformers: logits and sites of random models.

Builds small models with transformers (which this package does not need),
saves them, loads them here and compares in float32 on the CPU:

    pip install torch transformers
    python -m experiments.parity.compare

Prints for each model the largest absolute difference of logits and of sites,
the least difference that one wrong switch makes (the control: far above the
bound), and how many of the tokens drawn greedily agree. Exits 1 on a miss.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
from typing import Any

from absl import app, flags
import jax
import numpy as np
import tokenizers

from experiments.parity import models
from sae_jax import errors as errors_lib
from sae_jax.subject import capture, generate, transformer
from sae_jax.subject.formats import folder

try:
  import torch
  import transformers
except ImportError:
  torch = transformers = None

_BOUND = flags.DEFINE_float(
  'bound', 1e-4, 'largest absolute difference that passes'
)
_ONLY = flags.DEFINE_string(
  'only', '', 'compare only models whose names contain this; empty for all'
)
_GOLDEN = flags.DEFINE_string(
  'golden',
  '',
  'file for the numbers that tests compare with, as JSON; empty for none',
)
# A wrong switch must make a difference of at least this many bounds.
_CONTROL = 100
_NEW = 8

forward = jax.jit(transformer.forward, static_argnums=0)
capture_many = jax.jit(capture.capture_many, static_argnums=(0, 3))


def build(model: models.Model):
  """The model in transformers, with the tensors of `models.draw`."""
  config_class, model_class = (getattr(transformers, n) for n in model.kind)
  config = config_class(**model.settings)
  config._attn_implementation = 'eager'
  built = model_class(config).eval()
  with torch.no_grad():
    for name, parameter in built.named_parameters():
      values = models.draw(
        _saved_name(name, config.model_type),
        tuple(parameter.shape),
        config.model_type,
      )
      parameter.copy_(torch.tensor(values))
  return built


def _saved_name(name: str, model_type: str) -> str:
  """GPT-NeoX's head has another name in files than in release 5's classes."""
  head = model_type == 'gpt_neox' and name == 'lm_head.weight'
  return 'embed_out.weight' if head else name


def save(model: models.Model, built, url: str) -> None:
  """Writes it as transformers does, with a small tokenizer."""
  n_bytes = sum(4 * p.numel() for p in built.parameters())
  limit = 2 * n_bytes // (2 * model.shards - 1) if model.shards > 1 else '1GB'
  built.save_pretrained(url, max_shard_size=limit)
  words = {f'w{i}': i for i in range(model.settings['vocab_size'])}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(words, unk_token='w0')
  )
  tokenizer.save(str(pathlib.Path(url) / 'tokenizer.json'))


def expected(built, tokens_BT: np.ndarray) -> tuple[np.ndarray, dict]:
  """Logits, and the inputs and outputs of modules by site."""
  recorded, handles = {}, []

  def keep(name, array):
    array = array[0] if isinstance(array, tuple) else array
    recorded[name] = array.detach().numpy()

  def keep_output(name):
    return lambda _, __, out: keep(name, out)

  def keep_input(name):
    return lambda _, args, kw: keep(
      name, args[0] if args else kw['hidden_states']
    )

  for name, module in built.named_modules():
    # Outputs go by the name of the module, inputs by that of TransformerLens.
    if _is_site(name):
      handles.append(module.register_forward_hook(keep_output(name)))
    hook = _input_site(built, name)
    if hook:
      handles.append(
        module.register_forward_pre_hook(keep_input(hook), with_kwargs=True)
      )
  with torch.no_grad():
    logits = built(torch.tensor(tokens_BT)).logits.numpy()
  for handle in handles:
    handle.remove()
  return logits, recorded


def _is_site(module: str) -> bool:
  try:
    capture.parse_site(module)
  except errors_lib.UserError:
    # What this module is depends on the family.
    return module.endswith('post_attention_layernorm')
  return True


def _input_site(built, module: str) -> str | None:
  """TransformerLens' name of a module's input, None if it has none."""
  parts = module.split('.')
  block = next((p for p in parts if p.isdigit()), None)
  family = built.config.model_type
  last = parts[-1]
  before_mlp = last in ('ln_2', 'pre_feedforward_layernorm') or (
    last == 'post_attention_layernorm'
    and family not in ('gemma2', 'gemma3_text')
    and not getattr(built.config, 'use_parallel_residual', False)
  )
  if len(parts) > 1 and parts[-2] in ('layers', 'h'):
    hook = 'hook_resid_pre'
  elif last in ('o_proj', 'dense') or module.endswith('attn.c_proj'):
    hook = 'attn.hook_z'
  elif last in ('down_proj', 'dense_4h_to_h') or module.endswith('mlp.c_proj'):
    hook = 'mlp.hook_post'
  elif before_mlp:
    hook = 'hook_resid_mid'
  else:
    return None
  return f'blocks.{block}.{hook}'


def compare(model: models.Model, url: str) -> dict[str, Any]:
  """Loads the model from its folder and compares it."""
  built = build(model)
  save(model, built, url)
  tokens_BT = models.tokens(model)
  logits, sites = expected(built, tokens_BT)
  config, params, _ = folder.load_params(url)
  ours = np.asarray(forward(config, params, tokens_BT))
  captured = capture_many(config, params, tokens_BT, tuple(sites))
  errors = {
    name: float(np.abs(np.asarray(captured[name]) - value).max())
    for name, value in sites.items()
  }
  controls = {}
  for name, change in models.defects(config).items():
    wrong = forward(dataclasses.replace(config, **change), params, tokens_BT)
    controls[name] = float(np.abs(np.asarray(wrong) - logits).max())
  worst = max(errors, key=errors.get)
  control = min(controls, key=controls.get)
  new = np.asarray(generate.generate(config, params, tokens_BT, _NEW))
  theirs = built.generate(
    torch.tensor(tokens_BT),
    attention_mask=torch.ones(tokens_BT.shape, dtype=torch.long),
    max_new_tokens=_NEW,
    min_new_tokens=_NEW,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
  ).numpy()[:, tokens_BT.shape[1] :]
  return {
    'logits': float(np.abs(ours - logits).max()),
    'largest_logit': float(np.abs(logits).max()),
    'sites': len(errors),
    'worst_site': worst,
    'site_error': errors[worst],
    'control': controls[control],
    'control_name': control,
    'new': int((new == theirs).sum()),
    'files': len(list(pathlib.Path(url).glob('*.safetensors'))),
    'golden': golden(built, url, logits, sites),
  }


# Keys of config.json that do not describe the model.
_BESIDE = {
  *('architectures', 'attention_dropout', 'attn_pdrop', 'bos_token_id'),
  *('classifier_dropout', 'dtype', 'embd_pdrop', 'eos_token_id'),
  *('hidden_dropout', 'initializer_range', 'is_decoder', 'pad_token_id'),
  *('pretraining_tp', 'reorder_and_upcast_attn', 'resid_pdrop', 'torch_dtype'),
  *('transformers_version', 'use_cache'),
}


def golden(built, url: str, logits, sites) -> dict[str, Any]:
  """What a test needs to write the model, and a sample of its numbers."""
  settings = json.loads((pathlib.Path(url) / 'config.json').read_text())
  tensors = {}
  for name, parameter in built.named_parameters():
    name = _saved_name(name, built.config.model_type)
    # Blocks are alike: {} stands for the number.
    pattern = '.'.join('{}' if p.isdigit() else p for p in name.split('.'))
    tensors[pattern] = list(parameter.shape)
  return {
    'config': {
      name: value
      for name, value in settings.items()
      if value is not None
      and name not in _BESIDE
      and not name.startswith(('_', 'summary_'))
    },
    'tensors': tensors,
    'logits': models.sample(logits),
    'sites': {
      # Learned positions come without the sequences.
      name: models.sample(
        np.broadcast_to(value, (len(logits), *value.shape[1:]))
      )
      for name, value in sites.items()
      if _is_kept(name)
    },
  }


def _is_kept(site: str) -> bool:
  blocks = [part for part in site.split('.') if part.isdigit()]
  return not blocks or blocks == ['1'] or site.endswith('.3')


def main(argv):
  del argv
  if torch is None:
    sys.exit('pip install torch transformers')
  print(f'torch {torch.__version__}, transformers {transformers.__version__}')
  print(
    f'{"model":<42}{"files":>5}{"|logit|":>8}{"logits":>9}{"sites":>6}'
    f'{"worst":>9}{"control":>9}{"drawn":>7}  worst site, least control'
  )
  missed, golden_numbers = 0, {}
  for model in models.models():
    if _ONLY.value not in model.name:
      continue
    with tempfile.TemporaryDirectory() as url:
      row = compare(model, url)
    if model.golden:
      golden_numbers[model.name] = row['golden']
    bad = (
      max(row['logits'], row['site_error']) > _BOUND.value
      or row['control'] < _CONTROL * _BOUND.value
      or row['new'] < 2 * _NEW
    )
    missed += bad
    print(
      f'{model.name:<42}{row["files"]:>5}{row["largest_logit"]:>8.2f}'
      f'{row["logits"]:>9.1e}{row["sites"]:>6}{row["site_error"]:>9.1e}'
      f'{row["control"]:>9.1e}{row["new"]:>4}/{2 * _NEW}  '
      f'{row["worst_site"]}, {row["control_name"]}'
      f'{"  MISSED" if bad else ""}',
      flush=True,
    )
  print(f'{missed} missed, bound {_BOUND.value}')
  if _GOLDEN.value:
    made_with = {
      'torch': torch.__version__,
      'transformers': transformers.__version__,
      'numpy': np.__version__,
    }
    record = {'made_with': made_with, 'models': golden_numbers}
    pathlib.Path(_GOLDEN.value).write_text(
      json.dumps(record, separators=(',', ':')) + '\n'
    )
  sys.exit(bool(missed))


if __name__ == '__main__':
  app.run(main)
