"""What a URL is: each kind of storage, and that one file knows them."""

import ast
import importlib.util
import pathlib
import re

from etils import epath
import fsspec
import pytest
from tensorboardX import record_writer
import tensorstore as ts

import sae_jax
from sae_jax import errors
from sae_jax.storage import url as url_lib
from sae_jax.training import log

AWS = {
  'AWS_ENDPOINT_URL': 'http://127.0.0.1:9',
  'AWS_REGION': 'eu-west-1',
  'AWS_ACCESS_KEY_ID': 'key',
  'AWS_SECRET_ACCESS_KEY': 'secret',
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  """No variable of this machine's."""
  for name in (*AWS, 'AWS_ENDPOINT_URL_S3', 'AWS_DEFAULT_REGION'):
    monkeypatch.delenv(name, raising=False)


def without(scheme, monkeypatch):
  rest = tuple(found for found in url_lib.BACKENDS if found.scheme != scheme)
  assert len(rest) == len(url_lib.BACKENDS) - 1
  monkeypatch.setattr(url_lib, 'BACKENDS', rest)


@pytest.mark.parametrize(
  ('url', 'spec'),
  [
    ('/a/b', {'driver': 'file', 'path': '/a/b/'}),
    ('/a/b/', {'driver': 'file', 'path': '/a/b/'}),
    ('gs://abc', {'driver': 'gcs', 'bucket': 'abc', 'path': ''}),
    ('gs://abc/', {'driver': 'gcs', 'bucket': 'abc', 'path': ''}),
    (
      'gs://abc/a b/c',
      {'driver': 'gcs', 'bucket': 'abc', 'path': 'a b/c/'},
    ),
    ('s3://abc', {'driver': 's3', 'bucket': 'abc', 'path': ''}),
    (
      's3://abc/a//c/',
      {'driver': 's3', 'bucket': 'abc', 'path': 'a//c/'},
    ),
  ],
)
def test_each_kind_has_a_spec_that_tensorstore_takes(url, spec):
  found = url_lib.kvstore(url)
  if spec['driver'] == 's3':
    spec = spec | {'use_conditional_write': True}
  assert found == spec
  assert ts.KvStore.Spec(found).path == spec['path']
  assert url_lib.kvstore(pathlib.PurePosixPath('/x')) == url_lib.kvstore('/x')


def test_a_server_that_is_not_amazon_s_comes_from_the_environment(monkeypatch):
  for name, value in AWS.items():
    monkeypatch.setenv(name, value)
  found = url_lib.kvstore('s3://abc/x')
  assert ts.KvStore.Spec(found)
  assert found['endpoint'] == AWS['AWS_ENDPOINT_URL']
  assert found['aws_region'] == 'eu-west-1'
  assert found['aws_credentials'] == {'type': 'environment'}
  # As botocore has it, which s3fs asks.
  monkeypatch.setenv('AWS_ENDPOINT_URL_S3', 'http://127.0.0.1:8')
  monkeypatch.delenv('AWS_REGION')
  found = url_lib.kvstore('s3://abc/x')
  assert found['endpoint'] == 'http://127.0.0.1:8'
  assert found['aws_region'] == 'us-east-1'
  monkeypatch.setenv('AWS_DEFAULT_REGION', 'eu-north-1')
  assert url_lib.kvstore('s3://abc/x')['aws_region'] == 'eu-north-1'


def test_a_folder_is_no_pattern(tmp_path):
  folder = epath.Path(tmp_path) / 'k=[1,2] *?'
  folder.mkdir()
  (folder / 'a.json').touch()
  assert [path.name for path in folder.glob('*.json')] == ['a.json']
  for url in ('gs://b/run[1]', 's3://b/a*'):
    with pytest.raises(errors.UserError, match='is a pattern to clients of'):
      url_lib.absolute(url)


def test_paths_are_made_absolute_and_urls_are_not(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', f'{tmp_path}/user')
  assert url_lib.absolute('a') == f'{tmp_path}/a'
  assert url_lib.kvstore('a')['path'] == f'{tmp_path}/a/'
  assert url_lib.kvstore('~/a')['path'] == f'{tmp_path}/user/a/'
  for url in ('gs://b/a', 's3://b/a'):
    assert url_lib.absolute(url) == url
    assert url_lib.is_remote(url) and url_lib.is_known(url)
    assert url_lib.bucket(url) == url[:-2]
  for path in ('a', '/a', '~/a', '', 'gs:/b', 's3'):
    assert not url_lib.is_remote(path) and url_lib.is_known(path)
  assert url_lib.remote_schemes() == ['gs', 's3']


@pytest.mark.parametrize(
  'ask', [url_lib.kvstore, url_lib.is_remote, url_lib.absolute, url_lib.bucket]
)
def test_another_kind_is_refused_in_one_line(ask, monkeypatch):
  assert not url_lib.is_known('az://b/x')
  with pytest.raises(errors.UserError) as error:
    ask('az://b/x')
  assert str(error.value) == (
    'az://b/x is no URL that is known: use a local path or a gs:// or s3:// URL'
  )
  # Control: the table is all that knows.
  ask('s3://b/x')
  without('s3', monkeypatch)
  with pytest.raises(errors.UserError) as error:
    ask('s3://b/x')
  assert str(error.value) == (
    's3://b/x is no URL that is known: use a local path or a gs:// URL'
  )
  ask('gs://b/x')


def test_another_backend_is_an_entry(monkeypatch):
  memory = url_lib.Backend('az', lambda place: {'driver': 'memory'})
  monkeypatch.setattr(url_lib, 'BACKENDS', (*url_lib.BACKENDS, memory))
  files = ts.KvStore.open(url_lib.kvstore('az://b/x')).result()
  files.write('a', b'1').result()
  assert url_lib.is_remote('az://b/x')
  assert url_lib.kinds() == 'a local path or a gs:// or s3:// or az:// URL'


def test_a_package_that_is_not_installed_is_named(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name: None if name == 's3fs' else find(name),
  )
  with pytest.raises(errors.UserError) as error:
    url_lib.kvstore('s3://b/x')
  assert str(error.value) == (
    's3://b/x needs s3fs, which is not installed: pip install "sae_jax[s3]"'
  )
  url_lib.kvstore('gs://b/x')


def test_what_a_web_server_is_asked_is_no_name():
  assert url_lib.is_web('https://h/a?b') and url_lib.is_web('http://h/a')
  assert url_lib.without_query('https://h/a.txt?b=c?d') == 'https://h/a.txt'
  for path in ('httpd/a?.txt', 'gs://b/a?.txt', 'what?'):
    assert not url_lib.is_web(path)
    assert url_lib.without_query(path) == path


def test_file_systems_keep_no_listings():
  for scheme in url_lib.remote_schemes():
    assert fsspec.config.conf[scheme]['use_listings_cache'] is False


# Whatever a URL is compared with or cut at.
SCHEME = re.compile('://|^(gs|s3|gcs)$')


def schemes_in(code):
  """Lines of strings that look at schemes; neither docstrings nor messages."""
  tree = ast.parse(code)
  documentation = {
    node.body[0].value
    for node in ast.walk(tree)
    if isinstance(
      node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    )
    and ast.get_docstring(node) is not None
  }
  # A text that is read by people has words around it.
  return [
    node.lineno
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant)
    and isinstance(node.value, str)
    and node not in documentation
    and SCHEME.search(node.value)
    and ' ' not in node.value.strip()
  ]


def test_one_file_knows_schemes():
  root = pathlib.Path(sae_jax.__file__).parent
  found = {
    str(path.relative_to(root)): lines
    for path in sorted(root.rglob('*.py'))
    if (lines := schemes_in(path.read_text()))
  }
  assert found.keys() == {'storage/url.py'}


@pytest.mark.parametrize(
  'line',
  [
    "remote = '://' in url",
    "bucket = url.startswith('gs://')",
    "bucket = url.removeprefix(f's3://{name}')",
    "register('gs', factory)",
    "if spec['driver'] == 'gcs': pass",
    "name = re.sub('^(https?://[^?]*)', '', url)",
  ],
)
def test_control_a_line_that_looks_at_a_scheme_is_found(line):
  code = f'"""Local or gs://."""\ndef f(url):\n  """Of s3://b."""\n  {line}\n'
  assert schemes_in(code) == [4]
  told = "raise ValueError('give a gs:// URL')"
  assert not schemes_in(code.replace(line, told))


def test_tensorboard_s_file_goes_to_a_bucket_as_all_files_do():
  for scheme in url_lib.remote_schemes():
    factory = record_writer.REGISTERED_FACTORIES[scheme]
    assert factory.open is log._BucketEvents
