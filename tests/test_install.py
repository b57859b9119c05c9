"""The package: what pyproject.toml promises, and a wheel that works outside of the repository."""
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from test_style import PACKAGES, TREES

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = {"PIL": "pillow"}  # where the name of the import differs


def project_table():
    """pyproject.toml; tomllib came with Python 3.11."""
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def lower_bounds():
    """Package -> lowest supported version, from requirements of the form "torch>=2.6"."""
    requirements = project_table()["project"]["dependencies"]
    return dict(requirement.split(">=") for requirement in requirements)


def release(version):
    """"2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def pinned_versions():
    """(package, version) of every pin in requirements.txt."""
    return re.findall(r"^(\w+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M)


def installed_version(package):
    """Without an import, since setuptools changes distutils; "0" for none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "0"


def run(*command, cwd):
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# ---------------------------------------------------------------------------------- pyproject.toml
def test_every_module_is_in_the_package():
    assert set(project_table()["tool"]["setuptools"]["py-modules"]) == set(TREES)


def test_every_imported_package_is_a_dependency():
    imported = PACKAGES - sys.stdlib_module_names
    assert {DISTRIBUTIONS.get(name, name) for name in imported} == set(lower_bounds())


def test_the_tested_versions_are_supported():
    bounds = lower_bounds()
    for package, version in pinned_versions():
        if package in bounds:
            assert release(version) >= release(bounds[package]), package


def test_every_dependency_is_tested():
    assert set(lower_bounds()) <= {package for package, _ in pinned_versions()}


def test_readme_names_the_lowest_torch():
    assert f"torch from {lower_bounds()['torch']}" in (ROOT / "README.md").read_text()


# ------------------------------------------------------------------------------------- installation
@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the project in which a run has left its folder."""
    pytest.importorskip("pip")
    if release(installed_version("setuptools")) < (77, 0, 3):
        pytest.skip("the package needs setuptools from 77.0.3, for its SPDX licence")
    folder = tmp_path_factory.mktemp("install")
    project = folder / "project"
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *(f"{stem}.py" for stem in TREES)):
        shutil.copy(ROOT / name, project)
    (project / "runs" / "linglo_b0").mkdir(parents=True)
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", *offline, "-w", folder, project, cwd=folder)
    built, = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_modules_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == {f"{stem}.py" for stem in TREES}


def test_the_wheel_installs_into_another_environment(wheel, tmp_path):
    """Without network; torch and the like are those of this environment."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", query, cwd=tmp_path).strip())
    ours = run(sys.executable, "-c", query, cwd=tmp_path)
    (site / "torch_of_the_tests.pth").write_text(ours)
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    installed = run(python, "-c", "import secvit; print(secvit.__file__)", cwd=tmp_path)
    assert Path(installed.strip()) == site / "secvit.py"
