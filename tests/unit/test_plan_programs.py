"""The text of compiled programs is read rightly."""

import json

import pytest

from sae_jax.plan.program import exchange
from sae_jax.plan.program import text as text_lib


@pytest.mark.parametrize(
  ('groups', 'first'),
  [
    ('{{0,2},{1,3}}', (0, 2)),
    ('[2,4]<=[8]', (0, 1, 2, 3)),
    ('[4,2]<=[2,4]T(1,0)', (0, 4)),
    ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
    ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
    ("mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
    ('{}', ()),
  ],
)
def test_groups_are_read_in_every_notation(groups, first):
  text = (
    f'  %a = f32[8]{{0}} all-reduce(%x), replica_groups={groups}, '
    'use_global_device_ids=true, to_apply=%add'
  )
  read = exchange.read(text_lib._instruction(text), 'part')
  assert read == exchange.Collective('all-reduce', first, 'part')


@pytest.mark.parametrize(
  ('text', 'nbytes', 'space'),
  [
    ('f32[100,3]{1,0:T(8,128)}', 104 * 128 * 4, 0),
    ('f32[100,3]{0,1:T(8,128)S(1)}', 8 * 128 * 4, 1),
    ('bf16[100,256]{1,0:T(8,128)(2,1)}', 104 * 256 * 2, 0),
    ('s32[1000]{0:T(1024)}', 4096, 0),
    ('pred[5]{0}', 5, 0),
    ('s4[10]{0}', 5, 0),
    ('c64[3]{0}', 24, 0),
  ],
)
def test_shapes_have_the_bytes_of_their_tiles(text, nbytes, space):
  (shape,) = text_lib.shapes(text)
  assert (shape.nbytes, shape.space) == (nbytes, space)
  assert shape.hbm_bytes == (0 if space else nbytes)


def test_an_instruction_with_all_there_is():
  body = 'a(b"c\\"d,e='
  read = text_lib._instruction(
    '  ROOT %c.1 = (f32[2,3]{1,0:T(8,128)}, /*index=1*/s32[]{:T(128)S(6)}) '
    'custom-call(%a, %b.2), custom_call_target="tpu_custom_call", '
    'metadata={op_name="jit(f)/g" stack_frame_id=3}, backend_config='
    + json.dumps({'body': body, 'x': {'y': '7'}})
  )
  assert read.name == 'c.1' and read.root and read.opcode == 'custom-call'
  assert list(map(str, read.shapes)) == ['f32[2,3]', 's32[]']
  assert read.operands == ('a', 'b.2')
  assert read.attribute('custom_call_target') == '"tpu_custom_call"'
  assert read.backend_config == {'body': body, 'x': {'y': '7'}}
  assert read.attribute('calls') == ''


def test_no_program_is_an_error():
  with pytest.raises(ValueError, match='no program'):
    text_lib.parse('HloModule nothing\n')
