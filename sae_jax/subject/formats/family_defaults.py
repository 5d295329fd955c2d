"""transformers' defaults of the keys of each family's config.json.

Source: release 5.24; `python -m experiments.parity.defaults` prints what the
installed release has, and `tests/` compares. Only sizes that every file has
are left out.
"""

_QWEN = {
  'hidden_act': 'silu',
  'num_key_value_heads': 32,
  'max_position_embeddings': 32_768,
  'rms_norm_eps': 1e-6,
  'use_sliding_window': False,
  'sliding_window': 4096,
  'max_window_layers': 28,
  'tie_word_embeddings': False,
  'vocab_size': 151_936,
}

DEFAULTS = {
  'gpt2': {
    'n_positions': 1024,
    'layer_norm_epsilon': 1e-5,
    'activation_function': 'gelu_new',
    'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False,
    'tie_word_embeddings': True,
  },
  'gpt_neox': {
    'hidden_act': 'gelu',
    'layer_norm_eps': 1e-5,
    'rotary_pct': 0.25,
    'max_position_embeddings': 2048,
    'use_parallel_residual': True,
    'attention_bias': True,
    'tie_word_embeddings': False,
  },
  'llama': {
    'hidden_act': 'silu',
    'max_position_embeddings': 2048,
    'rms_norm_eps': 1e-6,
    'tie_word_embeddings': False,
  },
  'mistral': {
    'hidden_act': 'silu',
    'rms_norm_eps': 1e-6,
    'max_position_embeddings': 131_072,
    'num_key_value_heads': 8,
    'sliding_window': 4096,
    'tie_word_embeddings': False,
  },
  'qwen2': _QWEN,
  'qwen3': _QWEN | {'head_dim': 128},
  'gemma': {
    'vocab_size': 256_000,
    'max_position_embeddings': 8192,
    'rms_norm_eps': 1e-6,
    'attention_bias': False,
    'tie_word_embeddings': True,
    'head_dim': 256,
    'num_attention_heads': 16,
    'num_key_value_heads': 16,
    'hidden_act': 'gelu_pytorch_tanh',
    # Of older releases.
    'hidden_activation': 'gelu_pytorch_tanh',
  },
  'gemma2': {
    'vocab_size': 256_000,
    'max_position_embeddings': 8192,
    'rms_norm_eps': 1e-6,
    'attention_bias': False,
    'tie_word_embeddings': True,
    'query_pre_attn_scalar': 256,
    'head_dim': 256,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'hidden_activation': 'gelu_pytorch_tanh',
    'sliding_window': 4096,
    'sliding_window_pattern': 2,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
  },
  'gemma3_text': {
    'vocab_size': 262_208,
    'max_position_embeddings': 131_072,
    'rms_norm_eps': 1e-6,
    'attention_bias': False,
    'tie_word_embeddings': True,
    'query_pre_attn_scalar': 256,
    'head_dim': 256,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'hidden_activation': 'gelu_pytorch_tanh',
    'sliding_window': 4096,
    'sliding_window_pattern': 6,
  },
}
