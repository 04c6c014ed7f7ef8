"""The repository around the code: environment, commands, workflows, licences, and which way imports point."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lib" / "midstream"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))


def pins() -> dict[str, str]:
    """Package name to pinned version, as constraints.txt has it."""
    lines = [line.partition(";")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def tracked(*patterns: str) -> list[Path]:
    """The repository's files that match the patterns: those in git and new ones git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


# Environment ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["Linux", "Darwin"])
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_package_of_an_environment_is_pinned(python: str, system: str) -> None:
    pinned = pins()
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.7",
        "platform_system": system,
        "sys_platform": system.lower(),
        "platform_machine": {"Linux": "x86_64", "Darwin": "arm64"}[system],
    }
    wanted = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if re.match(r"nvidia-|cuda-|triton$", name):  # come with torch's CUDA build, which chooses them itself
            continue
        assert name in pinned, f"{requirement} has no pin on Python {python}, {system}: `make pins`"
        assert requirement.specifier.contains(pinned[name]), f"{requirement}, but pinned to {pinned[name]}"
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                wanted += _requirements(name, environment | {"extra": extra})


def _requirements(name: str, environment: dict[str, str]) -> list[Requirement]:
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:  # needed on another Python or system only
        return []
    requirements = (Requirement(line) for line in lines)
    return [each for each in requirements if each.marker is None or each.marker.evaluate(environment)]


def test_pins_name_no_build_that_only_one_machine_has() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert not [line for line in lines if not line.startswith("#") and re.search(r"\+|@|^nvidia|^triton", line)]
    assert f"torch=={pins()['torch']}" in PROJECT["dependencies"]


def test_conda_environment_points_at_pyproject() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, from_pip = environment["dependencies"]
    assert pip == "pip"
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    assert from_pip["pip"][-2:] == ["--constraint constraints.txt", "--editable ."]
    assert [line for line in from_pip["pip"] if not line.startswith("--")] == []


def test_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    versions = {citation["version"], PROJECT["version"], importlib.import_module("midstream").__version__}
    assert len(versions) == 1


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["help", "env", "assets", "book", "test", "lint", "test-slow", "browser", "clean"])
def test_make_knows_the_target(target: str) -> None:
    assert target in TARGETS
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)


def test_make_without_a_target_lists_them_all() -> None:
    listing = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in listing.splitlines() if line.startswith("  make ")} == TARGETS


@pytest.mark.parametrize("python", ["false", None])
def test_a_missing_interpreter_is_told_in_one_sentence(python: str | None, tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(ROOT / ".ci" / "env", tmp_path / ".ci")
    for name in ("bash", "dirname"):  # a PATH with no Python on it
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    environment = {"PATH": str(tmp_path)} | ({"PYTHON": python} if python else {})
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "Python 3.11 or 3.12" in done.stderr


def test_scripts_stop_at_the_first_failure() -> None:
    for script in (ROOT / ".ci").iterdir():
        assert "set -euo pipefail" in script.read_text(), script.name


# Workflows and templates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("custom.github-workflows-require-timeout", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("vendor.dependabot", ".github/dependabot.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_files_follow_their_published_schema(schema: str, pattern: str) -> None:
    files = sorted(ROOT.glob(pattern))
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_unless_a_job_says_otherwise(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert "concurrency" in workflow


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_the_version_of_every_action(path: Path) -> None:
    uses = re.findall(r"uses: *(\S+)", path.read_text())
    assert all(re.search(r"@(v\d+|[0-9a-f]{40})$", action) for action in uses)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_keeps_pipefail(path: Path) -> None:
    shells = re.findall(r"shell: *([^#\n]+)", path.read_text())
    assert all(shell.strip() == "bash" for shell in shells)


def test_gpu_shards_look_for_the_gpu_before_anything_else() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "full.yml").read_text())
    steps = workflow["jobs"]["run"]["steps"]
    assert "nvidia-smi" in steps[0]["run"]
    assert any("torch.cuda.is_available()" in step.get("run", "") for step in steps)


def test_workflows_call_make_targets_that_exist() -> None:
    text = "\n".join(path.read_text() for path in [*WORKFLOWS, ROOT / ".ci" / "run"])
    assert set(re.findall(r"^[ -]*(?:run: )?make ([a-z-]+)", text, re.MULTILINE)) <= TARGETS


# Text ----------------------------------------------------------------------------------------------------------------


def test_the_readme_fits_two_screens_and_names_what_exists() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    assert set(re.findall(r"make ([a-z-]+)", text)) <= TARGETS
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert [target for target in linked if not (ROOT / target).exists()] == []


def test_licences_are_whole() -> None:
    assert "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE").read_text()
    text = (ROOT / "LICENSE-text").read_text()
    assert "SPDX-License-Identifier: CC-BY-4.0" in text
    assert "Section 8" in text


def test_no_file_holds_a_mark_of_unfinished_work_or_a_path_of_one_machine() -> None:
    marks = re.compile(
        "|".join(["TO" + "DO", "FIX" + "ME", "raise Not" + "ImplementedError", "/ro" + "ot/", "/wo" + "rk/"])
    )
    suffixes = {".py", ".md", ".yml", ".toml", ".ipynb", ".cff", ".txt", ""}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked()
        if path.suffix in suffixes
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1)
        if marks.search(line)
    ]
    assert found == []


def test_notebooks_hold_no_outputs() -> None:
    for path in tracked("notebooks/*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs"), path.name
            assert cell.get("execution_count") is None, path.name


# Imports point one way -----------------------------------------------------------------------------------------------

LIBRARY = {
    *("errors", "assets", "hub", "fingerprint", "syntax", "paper", "claims", "arena", "figures"),
    *("measure", "hooks", "zoo", "data", "train"),
}
"""What papers are made of. It knows no paper and nothing of the house (records, running, command line, book)."""


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """The midstream modules a file imports, anywhere in it, as paths below the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (tuple(name.split(".")[1:]) for name in names if name.split(".")[0] == "midstream")


def files(*names: str) -> list[Path]:
    """The source files of some of the package's modules and folders."""
    return [path for name in names for path in [*(PACKAGE / name).rglob("*.py"), *PACKAGE.glob(f"{name}.py")]]


def test_hooks_know_nothing_of_midstream_but_its_errors() -> None:
    for path in files("hooks"):
        for module in imported(path):
            assert module[0] in {"hooks", "errors"}, f"{path.name} imports {'.'.join(module)}"


def test_the_library_knows_no_paper_and_nothing_of_the_house() -> None:
    for path in files(*LIBRARY):
        for module in imported(path):
            assert module[0] in LIBRARY, f"{path.name} imports {'.'.join(module)}"


def test_a_paper_imports_the_library_and_no_other_paper() -> None:
    for path in (PACKAGE / "papers").glob("*/*.py"):
        for module in imported(path):
            assert module[0] in LIBRARY, f"{path.name} imports {'.'.join(module)}"


def test_the_checks_on_imports_can_fail(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("def late():\n    from midstream.papers.flow import label_words\n")
    assert list(imported(module)) == [("papers", "flow", "label_words")]
