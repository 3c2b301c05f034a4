"""Checks of accessibility by axe-core, which npm fetches once."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from browser import Page

VERSION = "4.14.1"
SHA512 = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="


def axe_script(directory: Path) -> str:
    """The text of axe.min.js; skips the test without npm or its registry, and fails on another checksum."""
    archive = directory / f"axe-core-{VERSION}.tgz"
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm is not installed")
        directory.mkdir(parents=True, exist_ok=True)
        ended = subprocess.run(
            [npm, "pack", f"axe-core@{VERSION}", "--silent"], cwd=directory, capture_output=True, timeout=120
        )
        if ended.returncode != 0:
            pytest.skip(f"axe-core cannot be fetched: {ended.stderr.decode()[-200:]}")
    assert base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() == SHA512
    with tarfile.open(archive) as files:
        member = files.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def violations(page: Page, script: str, impacts: tuple[str, ...] = ("serious", "critical")) -> list[str]:
    """A line for each violated rule of such an impact: rule, help, and the first elements."""
    if not page.evaluate("typeof axe !== 'undefined'"):
        page.evaluate(f"{script}; true")
    found: list[dict[str, Any]] = page.evaluate(
        "axe.run(document, {resultTypes: ['violations']}).then(result => result.violations.map(v => ({id: v.id, "
        "impact: v.impact, help: v.help, nodes: v.nodes.slice(0, 4).map(n => n.html.slice(0, 160) + ' ' + "
        "(n.any[0]?.message ?? ''))})))"
    )
    return [
        f"{each['id']} ({each['impact']}): {each['help']}: {each['nodes']}"
        for each in found
        if each["impact"] in impacts
    ]
