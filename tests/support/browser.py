"""Open a page in headless Chromium and ask it what it shows."""

import html
import json
import re
import shutil
import subprocess

import pytest

# The page stands in a frame of the width of the screen: a window of Chromium cannot be as narrow as a phone's.
_OUTER = """<body><iframe id="page" style="width:{width}px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const inner = document.getElementById("page").contentDocument, root = inner.documentElement;
  const boxed = element => element.closest(".wide") && !element.matches(".wide");
  const outside = [...inner.querySelectorAll("body *")].filter(
    element => !boxed(element) && element.getBoundingClientRect().right > {width} + 0.5);
  const found = {{
    scroll_width: root.scrollWidth,
    outside: outside.map(element => element.tagName + " " + element.textContent.slice(0, 40)),
    images: [...inner.images].map(image => [image.naturalWidth, image.naturalHeight, image.clientHeight]),
    charts: [...inner.querySelectorAll("svg")].map(chart => chart.clientWidth),
    background: inner.defaultView.getComputedStyle(inner.body).backgroundColor,
    ink: inner.defaultView.getComputedStyle(inner.body).color,
  }};
  document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
}};
</script>"""


def look(page, width, dark=False, folder=None):
    """Return what Chromium shows of the HTML `page` on a screen of `width` pixels, as a dict; skips without Chromium.

    Args:
        folder: for its profile and the page.
    """
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not program:
        pytest.skip("needs Chromium (apt-get install chromium)")
    outer = folder / f"outer_{width}_{dark}.html"
    outer.write_text(_OUTER.format(width=width, page=html.escape(page)))
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([*command, *scheme, "--dump-dom", outer.as_uri()], capture_output=True, text=True)
    found = re.search(r"<pre>(\{.*\})</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))
