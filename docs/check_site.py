"""Opens every page of the built site in headless Chromium, takes screenshots and reports what is cut off.

    make docs
    python docs/check_site.py [site] [--output DIR]

Each page is shown at the widths of a desktop and of a phone. The script reports code blocks wider than the page, tables
that scroll on a desktop, pages that scroll sideways and pictures that do not load, and exits with status 1 if there are
any. On a phone, tables and blocks of output may scroll; commands and code may not. The only requirement is Chromium
(apt-get install chromium).
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

WIDTHS = (1280, 390)
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=60000"),
)
_MAX_HEIGHT = 16_000  # pixels of a screenshot

# One page in a frame of a given width: Chromium's own window cannot be as narrow as a phone.
_FRAME = """<!doctype html><body style="margin:0"><iframe src="{page}" onload="this.style.height =
this.contentDocument.documentElement.scrollHeight + 'px'" style="border:0;width:{width}px;height:800px"></iframe>"""

# Opens the pages one after the other in a frame and writes the findings as JSON into the document.
_MEASURE = """<!doctype html><body style="margin:0"><pre id="findings"></pre><script>
const pages = %s, widths = %s, findings = [];
function measure(page, width, doc) {
  const found = {page, width, height: doc.documentElement.scrollHeight, problems: []};
  const add = (kind, element, text) =>
    found.problems.push({kind, excess: element.scrollWidth - element.clientWidth, text});
  if (doc.documentElement.scrollWidth > width + 1) add("page", doc.documentElement, "");
  for (const code of doc.querySelectorAll("pre > code")) {
    const box = code.closest("div.highlight");
    const language = box ? [...box.classList].filter(c => c.startsWith("language-")).join() : "";
    const wide = [code, code.parentElement].find(e => e.scrollWidth > e.clientWidth + 1);
    if (wide) add("code " + language, wide, code.textContent.slice(0, 60));
  }
  for (const table of doc.querySelectorAll(".md-typeset__scrollwrap"))
    if (table.scrollWidth > table.clientWidth + 1) add("table", table, table.textContent.trim().slice(0, 60));
  for (const image of doc.querySelectorAll("article img"))
    if (!image.naturalWidth) add("image", image, image.getAttribute("src"));
  findings.push(found);
}
async function run() {
  for (const width of widths) for (const page of pages) {
    const frame = document.createElement("iframe");
    frame.style = "border:0;width:" + width + "px;height:800px";
    const loaded = new Promise(done => frame.onload = done);
    frame.src = page;
    document.body.append(frame);
    await loaded;
    await new Promise(done => setTimeout(done, 200));
    measure(page, width, frame.contentDocument);
    frame.remove();
  }
  document.getElementById("findings").textContent = JSON.stringify(findings);
}
run();
</script>"""


class _Site(SimpleHTTPRequestHandler):
    """Serves the site, and the two pages above."""

    pages: tuple[str, ...] = ()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == "/_frame":
            self._send(_FRAME.format(**query))
        elif url.path == "/_measure":
            self._send(_MEASURE % (json.dumps(self.pages), json.dumps(WIDTHS)))
        else:
            super().do_GET()

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main() -> int:
    options = argparse.ArgumentParser(description="Checks the built site in headless Chromium.")
    options.add_argument("site", nargs="?", type=Path, default=Path("site"), help="what mkdocs built")
    options.add_argument("--output", type=Path, metavar="DIR", help="write a screenshot of each page and width")
    chosen = options.parse_args()
    folders = sorted(path.parent.relative_to(chosen.site) for path in chosen.site.rglob("index.html"))
    _Site.pages = tuple("/" if folder == Path() else f"/{folder}/" for folder in folders)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Site, directory=str(chosen.site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    dom = chromium("--dump-dom", f"{root}/_measure")
    text = re.search(r'<pre id="findings">(.*?)</pre>', dom, re.DOTALL)
    if text is None or not text[1]:
        sys.stderr.write("Chromium did not finish the pages\n")
        return 1
    findings = json.loads(html.unescape(text[1]))
    failures = 0
    for finding in findings:
        for problem in finding["problems"]:
            accepted = finding["width"] < WIDTHS[0] and problem["kind"] in ("table", "code language-text")
            failures += not accepted
            if not accepted:
                sys.stdout.write("{page} at {width} px: ".format(**finding))
                fault = "does not load" if problem["kind"] == "image" else "{excess} px too wide".format(**problem)
                sys.stdout.write("{kind} {fault}: {text!r}\n".format(fault=fault, **problem))
    if chosen.output:
        chosen.output.mkdir(parents=True, exist_ok=True)
        for finding in findings:
            name = f"{finding['page'].strip('/').replace('/', '-') or 'index'}-{finding['width']}.png"
            size = f"--window-size={max(finding['width'], 500)},{min(finding['height'], _MAX_HEIGHT)}"
            frame = f"{root}/_frame?page={finding['page']}&width={finding['width']}"
            chromium(f"--screenshot={chosen.output / name}", size, frame)
    sys.stdout.write(f"{len(findings)} pages and widths, {failures} problems\n")
    return int(failures > 0)


def chromium(*arguments: str) -> str:
    """Runs Chromium with a profile of its own; its standard output."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or "chromium"
    with tempfile.TemporaryDirectory() as profile:
        command = [program, *_FLAGS, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


if __name__ == "__main__":
    raise SystemExit(main())
