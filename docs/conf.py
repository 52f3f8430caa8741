"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build`."""

import inspect
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import check_site

import conadv_optax.flax

project = 'conadv_optax'
author = 'The conadv_optax authors'
release = version = conadv_optax.__version__
copyright = author

extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
  'sphinx_copybutton',
  'sphinx_design',
]
exclude_patterns = ['_build']
# Single backticks in docstrings are names.
default_role = 'literal'
# Quotes as they are: the FAQ is searched for the text of errors.
smartquotes = False
nitpicky = True
nitpick_ignore = [('py:class', 'collections.abc.Callable')]  # Not of this site.

myst_enable_extensions = ['colon_fence', 'dollarmath', 'deflist']
myst_heading_anchors = 3

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # The Args section gives shapes, dtypes and units.
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

html_theme = 'furo'
html_title = 'conadv_optax'
html_static_path = ['_static']
html_css_files = ['site.css']
html_theme_options = {'source_view_link': None}
html_show_copyright = False
html_copy_source = False
html_math_renderer = 'mathml'
copybutton_prompt_text = r'>>> |\.\.\. |\$ '
copybutton_prompt_is_regexp = True


def _render_math(display: str) -> Any:
  """Math as MathML: browsers draw it without a script from elsewhere."""

  def visit(self: Any, node: Any) -> None:
    mathml = latex2mathml.converter.convert(node.astext(), display=display)
    tag = 'div' if display == 'block' else 'span'
    self.body.append(f'<{tag} class="math">{mathml}</{tag}>')
    raise nodes.SkipNode

  return visit


def _check_api(app: Sphinx, env: Any) -> None:
  """Fails the build where a public name has no entry in the API pages."""
  documented = set(env.domaindata['py']['objects'])
  public = []
  for module in (
    conadv_optax,
    *(x for x in vars(conadv_optax).values() if inspect.ismodule(x)),
  ):
    for name in getattr(module, '__all__', ()):
      if not inspect.ismodule(getattr(module, name)):
        public.append(f'{module.__name__}.{name}')
  missing = sorted(set(public) - documented)
  if missing:
    raise ExtensionError(
      f'The API pages lack {missing}. Add `.. autofunction:: NAME` or '
      '`.. autoclass:: NAME` to a page in docs/api.'
    )


def _check_links(app: Sphinx, exception: Exception | None) -> None:
  """Fails the build where a link of the finished pages does not work."""
  if exception is None and app.builder.format == 'html':
    problems = check_site.find_problems(Path(app.outdir).resolve())
    if problems:
      raise ExtensionError('\n'.join(['Links do not work:', *problems]))


def setup(app: Sphinx) -> None:
  """Registers the math renderer, and the checks of API pages and links."""
  app.add_html_math_renderer(
    'mathml',
    inline_renderers=(_render_math('inline'), None),
    block_renderers=(_render_math('block'), None),
  )
  app.connect('env-check-consistency', _check_api)
  # After the theme, which writes its style sheets at the end of the build.
  app.connect('build-finished', _check_links, priority=900)
