"""What an installation holds."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import spinlock_fast

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    where = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(where), str(ROOT)]
    # A build directory of its own: an editable installation keeps using build/.
    command += [f"-Cbuild-dir={where}/build"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(where.glob("*.whl"))) as wheel:
        return wheel.namelist()


def test_the_wheel_holds_every_module_once(wheel_files: list[str]) -> None:
    package = ROOT / "spinlock_fast"
    sources = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    sources |= {path.relative_to(ROOT).as_posix() for path in (package / "kernels").rglob("*.py")}  # behind a link
    shipped = [name for name in wheel_files if name.endswith(".py")]
    assert sorted(shipped) == sorted(sources)
    assert {"spinlock_fast/py.typed", "spinlock_fast/_native.pyi"} <= set(wheel_files)
    assert any(name.startswith("spinlock_fast/_native.") and name.endswith(".so") for name in wheel_files)
    assert not [name for name in wheel_files if name.startswith("kernels/")]


def test_public_names_exist() -> None:
    for name in spinlock_fast.__all__:
        assert getattr(spinlock_fast, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = spinlock_fast.no_such_name


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, spinlock_fast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
