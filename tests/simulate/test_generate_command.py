"""Output and exit status of the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from spinlock_fast.errors import ConfigError
from spinlock_fast.generate import main
from spinlock_fast.simulate.config import GeneratorConfig, load_generator_config

SMALL = "grid_size: 32\nnum_timesteps: 64\nnum_realizations: 1\n"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out = capsys.readouterr()
    return int(end.value.code or 0), out.out, out.err


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_a_small_set(capsys: pytest.CaptureFixture[str], tmp_path: Path, small: Path) -> None:
    output = tmp_path / "deeper" / "data.h5"
    arguments = ["--operators", "2", "--output", str(output), "--config", str(small), "--device", "cpu", "--seed", "9"]
    status, out, errors = run(capsys, *arguments, "--compression", "none", "--operator-sensitivity")
    assert (status, out) == (0, f"data set: {output}\n"), errors
    assert "2 of 2 operators" in errors
    with h5py.File(output) as file:
        assert file.attrs["seed"] == 9
        assert (file["features/summary/per_trajectory/features"][:, :, 110:] > -1e9).all()
        assert file["inputs/fields"].compression is None
    status, out, errors = run(capsys, *arguments)
    assert (status, out) == (4, "")
    assert errors == f"error: {output}: exists; --overwrite replaces it\n"
    assert run(capsys, *arguments, "--overwrite", "--quiet") == (0, f"data set: {output}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operators", "0"], "operators: input should be greater than or equal to 1, got 0"),
        (["--operators", "many"], "argument --operators: invalid int value: 'many'"),
        ([], "operators: required, not given"),
        (["--operators", "4", "--shard", "4/4"], "--shard: expected I/N with I from 0 to N - 1"),
        (["--operators", "4", "--shard", "x"], "--shard: expected I/N"),
        (["--operators", "4", "--seed", "-1"], "random_seed: input should be greater than or equal to 0"),
        (["--operators", "4", "--device", "gpu"], "device: "),
        (["--operators", "4", "--device", "cuda:99"], "device: cuda:99 is not available"),
        (["--operators", "4", "--config", "missing.yaml"], "missing.yaml: no such configuration file"),
        (["--operators", "4", "--overwrite", "--resume"], "--overwrite and --resume exclude each other"),
    ],
)
def test_invalid_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    status, out, errors = run(capsys, "--output", str(tmp_path / "data.h5"), *arguments)
    assert (status, out) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_realisations: 3", "num_realisations: unknown key; did you mean 'num_realizations'?"),
        ("parameters: {kernel_sizes: [3]}", "parameters.kernel_sizes: unknown key; did you mean 'kernel_size'?"),
        ("zzz: 3", "zzz: unknown key; allowed: operators, random_seed"),
        ("grid_size: 48", "grid_size: input should be 32, 64, 128 or 256, got 48"),
        ("num_timesteps: 10", "num_timesteps: input should be greater than or equal to 64, got 10"),
        ("num_realizations: 2.5", "num_realizations: "),
        ("parameters: {num_layers: [4, 2]}", "parameters.num_layers: expected two increasing numbers"),
        ("parameters: {base_channels: [0, 4]}", "parameters.base_channels: expected two increasing numbers"),
        ("parameters: {activation: [swish]}", "parameters.activation.0: "),
        ("parameters: {activation: []}", "parameters.activation: "),
        ("parameters: {activation: [relu, relu]}", "parameters.activation: expected each choice once"),
        ("parameters: {noise_scale: [0.0, 1.0]}", "parameters.noise_scale: expected two increasing numbers"),
        ("grid_size: 32\nparameters: {noise_correlation: [0, 20]}", "noise_correlation must stay below half"),
        ("- a list", "expected sections and keys"),
        ("a: [", "not valid YAML"),
    ],
)
def test_invalid_settings_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_generator_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_setting_is_described() -> None:
    for section in (GeneratorConfig, GeneratorConfig.model_fields["parameters"].annotation):
        assert all(field.description for field in section.model_fields.values())  # type: ignore[union-attr]


def test_an_empty_file_gives_the_defaults_and_arguments_win(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("")
    assert load_generator_config(path) == GeneratorConfig()
    path.write_text("operators: 5\nrandom_seed: 1")
    assert load_generator_config(path, {"operators": 7}).operators == 7


@pytest.mark.parametrize(("name", "operators"), [("quickstart", 512), ("10k", 10_000), ("100k", 100_000)])
def test_the_configurations_load(name: str, operators: int) -> None:
    config = load_generator_config(Path(__file__).parents[2] / "configs" / "data" / f"{name}.yaml")
    assert config.operators == operators
    assert (config.grid_size, config.num_timesteps) == (64, 256)
    assert config.num_realizations >= 2


def test_errors_come_before_torch() -> None:
    code = (
        "import sys\n"
        "from spinlock_fast.generate import main\n"
        "try:\n    main(['--output', 'x.h5', '--operators', '0'])\n"
        "except SystemExit as end:\n    assert end.code == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
