"""JSON from files, names from data, and messages: whatever bytes they hold."""

import json
import random

import pytest

from sae_jax import errors
from sae_jax.storage import names, records


def test_a_mapping_is_read_with_or_without_a_byte_order_mark():
  data = json.dumps({'a': [1, {'b': None}], 'é': '\\"[['}).encode()
  want = {'a': [1, {'b': None}], 'é': '\\"[['}
  assert records.parse(data, 'x') == want
  assert records.parse(b'\xef\xbb\xbf' + data, 'x') == want


@pytest.mark.parametrize(
  ('data', 'words'),
  [
    (b'', 'Expecting value'),
    (b'{"a": ', 'Expecting value'),
    (b'[]', 'it holds a list, not a mapping'),
    (b'{"a": "\xff"}', "can't decode byte 0xff in position 7"),
    (b'\xff\xfe{\x00}\x00', "can't decode byte 0xff in position 0"),
    (b'[' * 200_000, 'it is nested 200,000 deep, more than 100'),
    (b'{"a":' * 101 + b'1' + b'}' * 101, 'nested 101 deep'),
    (b'{"a": ' + b'1' * 5_000 + b'}', 'Exceeds the limit'),
    (b'{"a": "\\ud83d"}', 'surrogates not allowed'),
    (b'{"a": [{"\\uDFFF": 1}]}', 'surrogates not allowed'),
    (b'{}' + b' ' * 64 * 2**20, 'it has more than 67,108,864 bytes'),
  ],
)
def test_what_is_no_mapping_is_one_line_that_names_the_file(data, words):
  with pytest.raises(errors.UserError, match=words) as caught:
    records.parse(data, 'store/plan.json', 'fetch it again')
  message = str(caught.value)
  assert message.startswith('store/plan.json is not JSON as it should be (')
  assert message.endswith('): fetch it again')


def test_depth_is_that_of_brackets_outside_of_strings():
  many = [{'a': '[[{"\\'}] * 300
  records.check(json.dumps({'many': many}).encode())
  assert records.parse(b'{"a": "\\ud83d\\ude42"}', 'x') == {'a': '🙂'}


def test_a_file_that_is_absent_is_named(tmp_path):
  with pytest.raises(errors.UserError, match=r'none\.json is not there'):
    records.read(tmp_path / 'none.json')
  with pytest.raises(errors.UserError, match='more than 10 bytes'):
    (tmp_path / 'long.json').write_text('{"a": 12345}')
    records.read(tmp_path / 'long.json', longest=10)


def test_no_damage_of_a_record_ends_otherwise_than_in_one_line():
  rng = random.Random(0)
  good = json.dumps({'a': [1.5, None, 'ü\\u1234'], 'b': {'c': [[], {}]}})
  outcomes = set()
  for _ in range(2_000):
    data = bytearray(good.encode())
    for _ in range(rng.choice([1, 1, 2, 8])):
      data[rng.randrange(len(data))] = rng.randrange(256)
    try:
      records.parse(bytes(data), 'x')
      outcomes.add('read')
    except errors.UserError as error:
      assert str(error).isprintable()
      outcomes.add('refused')
  assert outcomes == {'read', 'refused'}


def test_damaged_lines_are_left_out_and_counted():
  lines = b'{"a": 1}\n\n{"a": \n[2]\n\xff\xfe\n{"a": 3}'
  assert records.parse_lines(lines) == ([{'a': 1}, {'a': 3}], 3)
  assert records.parse_lines(b'') == ([], 0)


@pytest.mark.parametrize('name', ['model-1.safetensors', 'a b', '模型', '...'])
def test_plain_names_are_kept(name):
  assert names.plain(name, 'the index') == name


@pytest.mark.parametrize(
  'name',
  [
    '', '.', '..', '../x', '/etc/passwd', 'a/b', 'a\\b', 'gs:x', 'a\0b',
    '\x1b[31m', 'a' * 256, '\ud800', None, 3, ['a'],
  ],
)  # fmt: skip
def test_other_names_are_refused_in_one_line(name):
  with pytest.raises(errors.UserError, match='no plain file name') as caught:
    names.plain(name, 'the index')
  assert str(caught.value).isprintable()


def test_messages_are_printable_and_of_bounded_length():
  error = errors.UserError('a\x1b[31m\0b\nc\u202e\ud800' + 'é' * 10_000)
  message = str(error)
  assert message.startswith('a\\x1b[31m\\x00b c\\u202e\\ud800é')
  assert message.isprintable()
  assert len(message) < 1_100
  assert '...(9,0' in message
  plain = f'{"x" * 900} é 模型'
  assert str(errors.UserError(plain)) == plain


def test_a_key_that_is_there_twice_is_refused_where_that_matters():
  data = b'{"a": {"b": 1, "c": 2, "b": 3}}'
  assert records.parse(data, 'it') == {'a': {'b': 3, 'c': 2}}
  with pytest.raises(errors.UserError, match="has the key 'b' twice"):
    records.parse(data, 'it', is_unique=True)
