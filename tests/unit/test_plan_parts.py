"""Parts of a step are read from the names of scopes."""

import re

import pytest

from sae_jax.ops import scopes
from sae_jax.plan.program import parts
from sae_jax.plan.program import text as text_lib

SCOPES = [v for name, v in vars(scopes).items() if name.isupper()]
GRADIENTS = 'jit(step)/shard_map/transpose(jvp(encoder and decoder))'


def instruction(op_name, opcode='add'):
  metadata = f', metadata={{op_name="{op_name}" stack_frame_id=3}}'
  return text_lib._instruction(f'  %a = f32[8]{{0}} {opcode}(%x){metadata}')


@pytest.mark.parametrize(
  ('op_name', 'part'),
  [
    ('jit(step)/preprocessing/jit(norm)/sqrt', 'preprocessing'),
    ('jit(step)/shard_map/jvp(encoder and decoder)/gt', 'encoder and decoder'),
    (f'{GRADIENTS}/mul', 'gradients'),
    (f'{GRADIENTS}/encoder/dot_general', 'encoder gradients'),
    (f'{GRADIENTS}/decoder/while/body/mul', 'decoder gradients'),
    (f'{GRADIENTS}/decoder/weight gradients/mul', 'weight gradients'),
    ('jit(step)/jvp(encoder)/pallas_call', 'encoder and top-k'),
    ('jit(step)/jvp(encoder)/top-k over shards/add', 'top-k over shards'),
    ('jit(step)/decoder/transpose', 'decoder'),
    # Whatever these call is theirs.
    ('jit(step)/AuxK/cond/branch_1_fun/jvp(encoder)/gather', parts.AUXK),
    ('jit(step)/optimizer/preprocessing/div', parts.OPTIMIZER),
    ('jit(step)/shard_map/metrics/cond/branch_1_fun/mul', 'metrics'),
    ('jit(step)/shard_map/metrics/cond/branch_1_fun/decoder/mul', 'decoder'),
    ('jit(step)/shard_map/top examples/while/body/sort', 'top examples'),
    # Of what XLA has merged the first counts.
    ('jit(step)/encoder/lt;decoder/broadcast_in_dim', 'encoder and top-k'),
    # Functions are no scopes.
    ('jit(step)/jit(encoder)/add', parts.REST),
    ('jit(encoder)/transpose(jvp())/add', parts.REST),
    # Names of the compiler's and of parameters.
    ('broadcast.57', None),
    ("state.optimizer.adam.mu['w_enc_ND']", None),
    ('', None),
  ],
)
def test_the_innermost_scope_names_the_part(op_name, part):
  assert parts.part(instruction(op_name)) == part


@pytest.mark.parametrize(
  ('op_name', 'choice'),
  [
    ('jit(step)/shard_map/AuxK/cond', 'AuxK'),
    ('jit(step)/shard_map/AuxK/cond/branch_1_fun/cond', ''),
    ('jit(step)/shard_map/AuxK/cond/branch_1_fun/encoder/cond', ''),
    ('jit(step)/shard_map/metrics/cond', 'metrics'),
    ('jit(step)/shard_map/encoder/cond', ''),
    ('jit(step)/shard_map/cond', ''),
    ('AuxK', ''),
  ],
)
def test_a_choice_is_that_of_the_scope_right_around_it(op_name, choice):
  assert parts.choice(instruction(op_name, 'conditional')) == choice


def test_names_are_all_of_parts_and_fit_a_path():
  assert set(SCOPES) == {*parts._WHOLE, *parts._PARTS}
  assert not any(re.search(r'[/();"]', name) for name in SCOPES)
