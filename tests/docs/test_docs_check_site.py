"""The check of the built site finds each kind of broken link, and no other."""

import runpy
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / 'docs' / 'check_site.py'
find_problems = runpy.run_path(str(CHECK))['find_problems']


def make_site(folder, body):
  (folder / 'api').mkdir()
  (folder / 'index.html').write_text(f'<h1 id="top">Top</h1>{body}')
  (folder / 'api' / 'page one.html').write_text(
    '<p id="here"><a href="../index.html#top"></a></p>'
  )
  (folder / 'site.css').write_text('a { background: url("image.png") }')
  return folder


@pytest.mark.parametrize(
  'body',
  [
    '<a href="#top"></a><a href="#"></a><a href=""></a>',
    '<a href="api/page%20one.html#here"></a>',
    '<link href="site.css?v=1" rel="stylesheet">',
    '<a href="https://arxiv.org/abs/2106.00221"></a>',
    '<link rel="canonical" href="https://example.org/">',
    '<img src="data:image/png;base64,AAAA">',
  ],
)
def test_links_that_work(tmp_path, body):
  assert find_problems(make_site(tmp_path, body)) == []


@pytest.mark.parametrize(
  ('body', 'problem'),
  [
    ('<a href="#bottom"></a>', 'no anchor'),
    ('<a href="api/page%20one.html#top"></a>', 'no anchor'),
    ('<a href="missing.html"></a>', 'no file'),
    ('<img src="missing.png">', 'no file'),
    ('<a href="api"></a>', 'no file'),
    ('<a href="/index.html"></a>', 'another address'),
    ('<script src="https://example.org/a.js"></script>', 'elsewhere'),
    ('<script src="//example.org/a.js"></script>', 'elsewhere'),
    ('<link href="https://example.org/a.css" rel="stylesheet">', 'elsewhere'),
  ],
)
def test_links_that_do_not(tmp_path, body, problem):
  (found,) = find_problems(make_site(tmp_path, body))
  assert found.startswith('index.html: ')
  assert problem in found


def test_a_style_sheet_that_loads_a_font_from_elsewhere(tmp_path):
  site = make_site(tmp_path, '')
  (site / 'site.css').write_text('@import "https://example.org/font.css";')
  assert find_problems(site) == [
    'site.css: https://example.org/font.css is loaded from elsewhere'
  ]
