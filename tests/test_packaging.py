"""Contents of wheels, public names, and the commands of the workflows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers import write_dataset

import spinlock_fast

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github").rglob("*.yml"))


def checked_run(*command: str | Path, **options: object) -> str:
    """Runs a command that must succeed, and returns its output."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return str(done.stdout)


def test_wheel_holds_every_python_module_once(tmp_path: Path) -> None:
    """Built without the C++ module, which takes a minute; `test_wheel_installs_and_trains` checks that one."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    checked_run(*build, f"-Cbuild-dir={tmp_path}/build", "-Cwheel.cmake=false", ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    package = ROOT / "spinlock_fast"
    sources = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    sources |= {path.relative_to(ROOT).as_posix() for path in (package / "kernels").rglob("*.py")}  # a symbolic link
    assert sorted(name for name in files if name.endswith(".py")) == sorted(sources)
    assert {"spinlock_fast/py.typed", "spinlock_fast/_native.pyi"} <= set(files)
    assets = {path.relative_to(ROOT).as_posix() for path in (package / "report" / "explorer" / "assets").iterdir()}
    assert assets <= set(files)
    assert not [name for name in files if name.startswith("kernels/")]


@pytest.mark.slow
def test_wheel_installs_and_trains(tmp_path: Path) -> None:
    """`make wheel`, installed into an empty virtual environment that sees the dependencies of this one alone."""
    make = ["make", "--directory", ROOT, f"VENV={sys.prefix}", "--assume-old", f"{sys.prefix}/.ready"]
    checked_run(*make, "wheel", f"DIST={tmp_path}")
    (wheel,) = tmp_path.glob("*-manylinux_*.whl")
    natives = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert len(natives) == 1, "no library is copied into the wheel"

    checked_run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    checked_run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    # Directories that a .pth file names are searched, but their own .pth files, editable installations, are not read.
    (site / "dependencies.pth").write_text("\n".join(part for part in sys.path if part.endswith("site-packages")))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"cwd": tmp_path, "env": environment}
    home = checked_run(python, "-c", "import spinlock_fast; print(spinlock_fast.__file__)", **options)
    assert Path(home.strip()).is_relative_to(site)
    command = tmp_path / "venv/bin/spinlock-fast"
    write_dataset(tmp_path / "data.h5", 200, seed=0)
    settings = ["--set", "dataset_path=data.h5", "--set", "training.num_epochs=2"]
    checked_run(command, "train", ROOT / "configs/quickstart.yaml", *settings, "--output", "model", **options)
    assert (tmp_path / "model/best_model.pt").exists()


def test_public_names_exist() -> None:
    for name in spinlock_fast.__all__:
        assert getattr(spinlock_fast, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = spinlock_fast.no_such_name


def test_importing_the_package_does_not_import_torch() -> None:
    checked_run(sys.executable, "-c", "import sys, spinlock_fast; sys.exit('torch' in sys.modules)")


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.name for path in WORKFLOWS])
def test_github_files_parse_and_workflows_call_targets_of_the_makefile(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    steps = [step for job in content.get("jobs", {}).values() for step in job["steps"]]
    for run in (step["run"] for step in steps if "run" in step):
        assert re.fullmatch(r"make ([a-z-]+)( [A-Z_]+=\S+| [A-Z_]+=\"[^\"]*\")*", run), run
        assert run.split()[1] in targets, run
