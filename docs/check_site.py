"""Checks the built site: `python docs/check_site.py docs/_build`.

Every local link leads to a file, and to an anchor in it, by a relative path, so
that the site works from a folder and under any address. Nothing that a page
needs comes from another server. The build ends with this check.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Where each kind of element says what it links to.
_LINKS = {
  'a': 'href',
  'link': 'href',
  'script': 'src',
  'img': 'src',
  'source': 'src',
  'iframe': 'src',
  'object': 'data',
}
_ELSEWHERE = re.compile(r'(?:@import|url\()\s*["\']?((?:https?:)?//[^"\')]*)')


class _Page(HTMLParser):
  """What a page links to, and the anchors that it has."""

  def __init__(self, path: Path) -> None:
    super().__init__()
    self.anchors: set[str] = set()
    self.links: list[tuple[str, str]] = []
    self.feed(path.read_text())

  def handle_starttag(
    self, tag: str, attrs: list[tuple[str, str | None]]
  ) -> None:
    """Keeps anchors and links."""
    values = dict(attrs)
    self.anchors |= {values.get('id') or '', values.get('name') or ''}
    link = values.get(_LINKS.get(tag, ''))
    if link and values.get('rel') != 'canonical':
      self.links.append((tag, link))


def find_problems(site: Path) -> list[str]:
  """A line for each link that does not work, sorted by page.

  Args:
    site: the folder of the built pages.
  """
  pages = {path: _Page(path) for path in sorted(site.rglob('*.html'))}
  problems = []
  for path, page in pages.items():
    for tag, link in page.links:
      parts = urlsplit(link)
      target = path
      if parts.scheme == 'data' or (tag == 'a' and parts.scheme):
        continue
      if parts.path:
        target = (path.parent / unquote(parts.path)).resolve()
      if parts.scheme or parts.netloc:
        problem = 'is loaded from elsewhere'
      elif parts.path.startswith('/'):
        problem = 'does not work under another address'
      elif not target.is_file():
        problem = 'leads to no file'
      elif target in pages and unquote(parts.fragment) not in (
        pages[target].anchors | {''}
      ):
        problem = 'leads to no anchor'
      else:
        continue
      problems.append(f'{path.relative_to(site)}: {link} {problem}')
  for path in sorted(site.rglob('*.css')):
    for link in _ELSEWHERE.findall(path.read_text()):
      problems.append(
        f'{path.relative_to(site)}: {link} is loaded from elsewhere'
      )
  return problems


if __name__ == '__main__':
  sys.exit('\n'.join(find_problems(Path(sys.argv[1]).resolve())))
