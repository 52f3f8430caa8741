"""The rules that every public name and every file keeps."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from public_names import EXAMPLES, Case, kind, public_functions, public_names

import conadv_optax as conadv

PACKAGE = Path(conadv.__file__).parent
FILES = sorted(PACKAGE.glob('**/*.py'))
FUNCTIONS = public_functions()
# The order of optax: a line, the maths, and then these.
SECTIONS = ('Args:', 'Returns:', 'Raises:', 'Examples:', 'References:')

functions = pytest.mark.parametrize('name', FUNCTIONS)
files = pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)


def calls_of(name):
  """A public function and the functions that it returns."""
  yield name, FUNCTIONS[name]
  if kind(FUNCTIONS[name]) in ('gradient', 'attack', 'targets', 'augmentation'):
    made = Case(FUNCTIONS[name], next(iter(EXAMPLES[name].values()))).make()
    parts = made._asdict() if isinstance(made, tuple) else {'call': made}
    for part, value in parts.items():
      if inspect.isroutine(value):
        yield f'{name}.{part}', value


@functions
def test_arguments_with_a_default_are_keyword_only(name):
  for called, function in calls_of(name):
    for argument in inspect.signature(function).parameters.values():
      if (called, argument.name) == ('wrap', 'staleness'):
        continue
      assert (
        argument.default is argument.empty
        or argument.kind is argument.KEYWORD_ONLY
      ), f'{called}({argument})'


@functions
def test_random_functions_name_their_argument_key(name):
  named = {}
  for called, function in calls_of(name):
    for argument in inspect.signature(function).parameters.values():
      assert argument.name not in ('rng', 'rngs', 'prng', 'seed', 'rng_key')
      if 'PRNGKey' in str(argument.annotation) or argument.name == 'key':
        named[called] = argument.name
  assert set(named.values()) <= {'key'}, named
  if len(list(calls_of(name))) > 1:
    assert named, f'{name} makes random functions, and none has a key.'


@files
def test_random_numbers_are_drawn_from_a_key(path):
  for node in ast.walk(ast.parse(path.read_text())):
    is_annotated = isinstance(node, ast.arg) and node.annotation is not None
    if is_annotated and ast.unparse(node.annotation) in (
      'chex.PRNGKey',
      'chex.PRNGKey | None',
    ):
      assert node.arg == 'key', f'{path.name}:{node.lineno}'
    if isinstance(node, ast.Call):
      function = ast.unparse(node.func)
      if function.startswith('jax.random.') and function != 'jax.random.key':
        source = ast.unparse(node.args[0])
        assert source.split('_')[-1] == 'key', f'{path.name}:{node.lineno}'


@functions
def test_docstring_has_every_section_in_order(name):
  doc = inspect.getdoc(FUNCTIONS[name])
  assert doc, f'{name} has no docstring.'
  found = [line for line in doc.splitlines() if line in SECTIONS]
  assert found == [section for section in SECTIONS if section in found]
  wanted = {'Args:', 'Returns:', 'Examples:', 'References:'}
  if name in ('dual_bn.main', 'dual_bn.replace', 'dual_bn.select'):
    # Access to a tree; the paper stands with `split`.
    wanted -= {'References:'}
  assert wanted <= set(found), f'{name} lacks {wanted - set(found)}'


@functions
def test_docstring_names_every_argument(name):
  doc = inspect.getdoc(FUNCTIONS[name])
  described = doc.split('\nArgs:\n')[1].split('\nReturns:\n')[0].splitlines()
  for argument in inspect.signature(FUNCTIONS[name]).parameters:
    assert any(line.startswith(f'  {argument}: ') for line in described), (
      f'{name}: {argument} is not in Args.'
    )


@functions
def test_docstring_example_checks_its_claim(name):
  example = inspect.getdoc(FUNCTIONS[name]).split('\nExamples:\n')[1]
  example = example.split('\nReferences:\n')[0]
  assert '>>> ' in example
  assert 'chex.assert' in example
  assert 'import conadv_optax as conadv' in example
  assert f'conadv.{name}(' in example, f'The example does not call {name}.'


def test_every_public_class_has_a_docstring():
  for name, value in public_names().items():
    if inspect.isclass(value):
      # NamedTuple writes a docstring of its own where there is none.
      assert not value.__doc__.startswith(f'{value.__name__}('), name


@pytest.mark.slow
def test_import_needs_neither_flax_nor_haiku():
  code = (
    'import sys, conadv_optax\n'
    'found = {"flax", "haiku", "orbax", "reference"} & set(sys.modules)\n'
    'assert not found, found'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


@files
def test_library_imports_jax_optax_and_chex_alone(path):
  allowed = {'jax', 'optax', 'chex', 'numpy', 'conadv_optax'}
  if path.name == 'flax.py':
    # Nothing imports it but who asks for it, as the test before this shows.
    allowed.add('flax')
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      imported = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      imported = [node.module]
    else:
      continue
    for module in imported:
      top = module.split('.')[0]
      assert top in allowed | sys.stdlib_module_names, f'{path.name}: {module}'


@files
def test_files_can_be_read_top_to_bottom(path):
  lines = len(path.read_text().splitlines())
  assert lines <= 450
