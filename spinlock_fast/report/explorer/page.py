"""The HTML page: template, style and script with the data inside, and nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from importlib.resources import files
from string import Template

from spinlock_fast.report.explorer.data import ExplorerData

SCRIPTS = (
    *("data.js", "dom.js", "terms.js", "state.js", "codes.js", "profile.js", "fields.js"),
    *("examples.js", "series.js", "overview.js", "map.js", "main.js"),
)


def build_page(data: ExplorerData, title: str) -> str:
    """The page as text; the same data give the same text.

    The content security policy allows the style and the script by their hashes, and no request. All texts of the user
    are in the compressed data, except for the title, which is escaped.
    """
    style = _asset("explorer.css")
    script = '"use strict";\n(() => {\n' + "\n".join(_asset(name) for name in SCRIPTS) + "\n})();\n"
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_asset("template.html")).substitute(
        policy=policy,
        title=html.escape(title),
        style=style,
        script=script,
        data=base64.b64encode(pack(data)).decode("ascii"),
    )


def pack(data: ExplorerData) -> bytes:
    """The data in gzip: length of the header (uint32, little-endian), header as JSON, columns at multiples of 4 bytes.

    The header's `columns` give kind (u1, u2, u4, f4), offset after the header in bytes, and length of each column.
    """
    directory, blocks, offset = {}, [], 0
    for name, column in data.columns.items():
        kind = f"{column.dtype.kind}{column.dtype.itemsize}"
        block = column.astype(column.dtype.newbyteorder("<")).tobytes()
        block += bytes(-len(block) % 4)
        directory[name] = [kind, offset, len(column)]
        blocks.append(block)
        offset += len(block)
    header = json.dumps({**data.header, "columns": directory}, allow_nan=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 4)
    contents = len(header).to_bytes(4, "little") + header + b"".join(blocks)
    return gzip.compress(contents, compresslevel=6, mtime=0)  # level 9 takes up to 8 times as long for 3 % less


def _asset(name: str) -> str:
    return (files("spinlock_fast.report.explorer") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
