"""Every family against transformers: logits and sites of random models.

Builds small models with transformers (which this package does not need),
saves them, loads them here and compares in float32 on the CPU:

    pip install torch transformers
    python -m experiments.family_parity

Prints the largest absolute difference of the logits and of the sites of each
model, and exits 1 if one is above the bound.
"""

import dataclasses
import pathlib
import sys
import tempfile
from typing import Any

from absl import app, flags
import jax
import numpy as np
import tokenizers

from sae_jax import config as config_lib
from sae_jax.subject import capture, folder, transformer

try:
  import torch
  import transformers
except ImportError:
  torch = transformers = None

_BOUND = flags.DEFINE_float('bound', 1e-4, 'largest absolute difference')
_ONLY = flags.DEFINE_string('only', '', 'names of models that contain this')

# Weights drawn with this deviation make logits and attention far from flat.
_DEVIATION = 0.2
_TOKENS = (2, 40)


@dataclasses.dataclass(frozen=True)
class Model:
  """One random model.

  Attributes:
    name: what is odd about it.
    kind: its config class and model class in transformers.
    settings: arguments of the config.
    shards: files its weights are split over.
  """

  name: str
  kind: tuple[str, str]
  settings: dict[str, Any]
  shards: int = 1


_LLAMA = {
  'vocab_size': 97,
  'hidden_size': 48,
  'intermediate_size': 80,
  'num_hidden_layers': 4,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
}
_NEOX = {
  'vocab_size': 97,
  'hidden_size': 48,
  'intermediate_size': 80,
  'num_hidden_layers': 4,
  'num_attention_heads': 3,
}
_GPT2 = {
  'vocab_size': 97,
  'n_embd': 48,
  'n_layer': 4,
  'n_head': 4,
  'n_positions': 64,
}
_ROPE_3 = {
  'rope_type': 'llama3',
  'rope_theta': 500.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
_GEMMA = _LLAMA | {'head_dim': 16, 'query_pre_attn_scalar': 24}


def _kind(family: str) -> tuple[str, str]:
  return f'{family}Config', f'{family}ForCausalLM'


def models() -> list[Model]:
  """The models that are compared."""
  llama, neox = _kind('Llama'), _kind('GPTNeoX')
  gpt2 = ('GPT2Config', 'GPT2LMHeadModel')
  qwen2, qwen3 = _kind('Qwen2'), _kind('Qwen3')
  gemma2 = _kind('Gemma2')
  gemma3 = ('Gemma3TextConfig', 'Gemma3ForCausalLM')
  return [
    Model('gpt2', gpt2, _GPT2),
    Model(
      'gpt2 untied, scores by block, relu, inner width',
      gpt2,
      _GPT2
      | {
        'tie_word_embeddings': False,
        'scale_attn_by_inverse_layer_idx': True,
        'activation_function': 'relu',
        'n_inner': 60,
      },
    ),
    Model('neox, a quarter rotary (Pythia)', neox, _NEOX),
    Model(
      'neox sequential, half rotary, tanh gelu',
      neox,
      _NEOX
      | {
        'use_parallel_residual': False,
        'rotary_pct': 0.5,
        'hidden_act': 'gelu_new',
      },
    ),
    Model(
      'neox tied, no attention bias',
      neox,
      _NEOX | {'attention_bias': False, 'tie_word_embeddings': True},
    ),
    Model(
      'llama, one head a group',
      llama,
      _LLAMA | {'num_key_value_heads': 6},
    ),
    Model(
      'llama grouped, tied (SmolLM2), 3 files',
      llama,
      _LLAMA | {'tie_word_embeddings': True},
      shards=3,
    ),
    Model(
      'llama 3 stretched positions',
      llama,
      _LLAMA | {'rope_parameters': _ROPE_3},
    ),
    Model(
      'llama biases, wide heads, linear stretch',
      llama,
      _LLAMA
      | {
        'attention_bias': True,
        'mlp_bias': True,
        'head_dim': 10,
        'num_key_value_heads': 1,
        'rope_parameters': {
          'rope_type': 'linear',
          'factor': 3.0,
          'rope_theta': 1000.0,
        },
      },
    ),
    Model(
      'mistral, a window', _kind('Mistral'), _LLAMA | {'sliding_window': 7}
    ),
    Model(
      'mistral, no window', _kind('Mistral'), _LLAMA | {'sliding_window': None}
    ),
    Model('qwen2', qwen2, _LLAMA | {'tie_word_embeddings': True}),
    Model(
      'qwen2, windows from block 2',
      qwen2,
      _LLAMA
      | {
        'use_sliding_window': True,
        'sliding_window': 5,
        'max_window_layers': 2,
      },
    ),
    Model('qwen3, wide heads', qwen3, _LLAMA | {'head_dim': 16}),
    Model(
      'qwen3 biases, tied, windows',
      qwen3,
      _LLAMA
      | {
        'head_dim': 8,
        'attention_bias': True,
        'tie_word_embeddings': True,
        'use_sliding_window': True,
        'sliding_window': 9,
        'max_window_layers': 1,
      },
    ),
    Model('gemma', _kind('Gemma'), _LLAMA | {'head_dim': 16}),
    Model(
      'gemma 2, caps and windows',
      gemma2,
      _GEMMA
      | {
        'sliding_window': 6,
        'attn_logit_softcapping': 3.0,
        'final_logit_softcapping': 5.0,
      },
    ),
    Model(
      'gemma 2, no caps, 2 files',
      gemma2,
      _GEMMA
      | {
        'sliding_window': 6,
        'attn_logit_softcapping': None,
        'final_logit_softcapping': None,
      },
      shards=2,
    ),
    Model(
      'gemma 3, window of 5 in 6 blocks',
      gemma3,
      _GEMMA | {'num_hidden_layers': 7, 'sliding_window': 6},
    ),
    Model(
      'gemma 3, stretched, other layers, cap',
      gemma3,
      _GEMMA
      | {
        'sliding_window': 5,
        'layer_types': [
          'full_attention',
          'sliding_attention',
          'sliding_attention',
          'full_attention',
        ],
        'final_logit_softcapping': 4.0,
        'rope_parameters': {
          'full_attention': {
            'rope_type': 'linear',
            'factor': 8.0,
            'rope_theta': 2000.0,
          },
          'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
        },
      },
    ),
  ]


def build(model: Model, seed: int = 0):
  """The model in transformers, all its parameters random."""
  config_class, model_class = (getattr(transformers, n) for n in model.kind)
  config = config_class(**model.settings)
  config._attn_implementation = 'eager'
  torch.manual_seed(seed)
  built = model_class(config).eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in built.parameters():
      # Norms' weights and biases too, which transformers starts at 1 and 0.
      parameter.add_(
        _DEVIATION * torch.randn(parameter.shape, generator=generator)
      )
  return built


def save(model: Model, built, url: str) -> None:
  """Writes it as transformers does, with a small tokenizer."""
  n_bytes = sum(4 * p.numel() for p in built.parameters())
  size = n_bytes if model.shards == 1 else n_bytes // (model.shards - 1)
  built.save_pretrained(
    url, max_shard_size=max(size, 1) if model.shards > 1 else '1GB'
  )
  words = {f'w{i}': i for i in range(model.settings['vocab_size'])}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(words, unk_token='w0')
  )
  tokenizer.save(str(pathlib.Path(url) / 'tokenizer.json'))


def expected(built, tokens_BT: np.ndarray) -> tuple[np.ndarray, dict]:
  """Logits, and what goes in and out of modules, by site."""
  recorded = {}

  def keep(name, array):
    array = array[0] if isinstance(array, tuple) else array
    recorded[name] = array.detach().numpy()

  handles = []
  norms_after = type(built).__name__.startswith(('Gemma2', 'Gemma3'))
  for name, module in built.named_modules():
    parts = name.split('.')
    in_block = len(parts) > 2 and parts[-2] in ('layers', 'h')
    # Outputs by the very name of the module.
    if _is_site(name):
      handles.append(
        module.register_forward_hook(
          lambda _, __, out, name=name: keep(name, out)
        )
      )
    # Inputs by the scheme's.
    block = next((p for p in parts if p.isdigit()), None)
    kind = None
    if in_block:
      kind = 'resid_pre'
    elif parts[-1] in ('o_proj', 'dense') or name.endswith('attn.c_proj'):
      kind = 'z'
    elif parts[-1] in ('down_proj', 'dense_4h_to_h') or name.endswith(
      'mlp.c_proj'
    ):
      kind = 'mlp_act'
    elif parts[-1] in ('ln_2', 'pre_feedforward_layernorm') or (
      parts[-1] == 'post_attention_layernorm' and not norms_after
    ):
      neox = type(built).__name__.startswith('GPTNeoX')
      if not (neox and built.config.use_parallel_residual):
        kind = 'resid_mid'
    if kind:
      handles.append(
        module.register_forward_pre_hook(
          lambda _, args, kw, site=f'blocks.{block}.hook_{kind}': keep(
            _own(site), args[0] if args else kw['hidden_states']
          ),
          with_kwargs=True,
        )
      )
  with torch.no_grad():
    logits = built(torch.tensor(tokens_BT)).logits.numpy()
  for handle in handles:
    handle.remove()
  return logits, recorded


def _is_site(module: str) -> bool:
  try:
    capture.parse_site(module)
  except config_lib.UserError:
    # Its meaning hangs on the family.
    return module.endswith('post_attention_layernorm')
  return True


def _own(name: str) -> str:
  """Hooks' names as TransformerLens writes them."""
  return name.replace('hook_z', 'attn.hook_z').replace(
    'hook_mlp_act', 'mlp.hook_post'
  )


def compare(model: Model, url: str) -> dict[str, Any]:
  """Loads the model from its folder and compares it."""
  built = build(model)
  save(model, built, url)
  rng = np.random.default_rng(1)
  tokens_BT = rng.integers(0, model.settings['vocab_size'], _TOKENS)
  logits, sites = expected(built, tokens_BT)
  config, params, _ = folder.load_params(url)
  # The programs must be as exact as they can be, whatever the device.
  with jax.default_matmul_precision('highest'):
    run = jax.jit(transformer.forward, static_argnums=0)
    got = np.asarray(run(config, params, tokens_BT))
    many = jax.jit(capture.capture_many, static_argnums=(0, 3))
    found = many(config, params, tokens_BT, tuple(sites))
  errors = {
    name: float(np.abs(np.asarray(found[name]) - value).max())
    for name, value in sites.items()
  }
  worst = max(errors, key=errors.get)
  return {
    'logits': float(np.abs(got - logits).max()),
    'largest_logit': float(np.abs(logits).max()),
    'sites': len(errors),
    'worst_site': worst,
    'site_error': errors[worst],
    'files': len(list(pathlib.Path(url).glob('*.safetensors'))),
  }


def main(argv):
  del argv
  if torch is None:
    sys.exit('pip install torch transformers')
  print(f'torch {torch.__version__}, transformers {transformers.__version__}')
  print(
    f'{"model":<48} {"files":>5} {"|logit|":>8} {"logits":>8} '
    f'{"sites":>5} {"worst":>8}  at'
  )
  missed = 0
  for model in models():
    if _ONLY.value not in model.name:
      continue
    with tempfile.TemporaryDirectory() as url:
      row = compare(model, url)
    bad = max(row['logits'], row['site_error']) > _BOUND.value
    missed += bad
    print(
      f'{model.name:<48} {row["files"]:>5} {row["largest_logit"]:>8.2f} '
      f'{row["logits"]:>8.1e} {row["sites"]:>5} {row["site_error"]:>8.1e}  '
      f'{row["worst_site"]}{"  MISSED" if bad else ""}',
      flush=True,
    )
  print(f'{missed} above {_BOUND.value}')
  sys.exit(bool(missed))


if __name__ == '__main__':
  app.run(main)
