"""What holds for the repository as a whole: floors, imports, documents that do not lie."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run(code, **env):
    """A fresh interpreter, so that what this suite imported does not count."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, check=False
    )


def test_importing_regard_imports_no_torch():
    code = "import sys, regard; print([m for m in ('torch', 'transformers', 'xarray', 'numpy') if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"


def test_help_and_papers_import_no_torch():
    code = (
        "import sys\nfrom regard import cli\n"
        "for a in (['--help'], ['papers']):\n"
        "    try: cli.main(a)\n"
        "    except SystemExit as e: assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_every_public_name_resolves():
    code = (
        "import regard\n"
        "for n in regard.__all__: getattr(regard, n)\n"
        "assert callable(regard.watch) and callable(regard.report)\n"
        "import regard.watch.seam; assert callable(regard.watch)\n"
        "import inspect; assert 'model' in inspect.signature(regard.watch).parameters\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_an_unknown_name_says_what_there_is():
    import regard

    with pytest.raises(AttributeError, match=r"'gaze'.*watch"):
        _ = regard.gaze


def test_import_floors_hold():
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_module_imports_pickle_or_runs_text():
    """pickle and its kin execute what they read; so do eval, exec and torch.load."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                names = [called] if called in ("eval", "exec", "torch.load", "np.load", "numpy.load") else []
            banned = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "eval", "exec"}
            found += [
                f"{path.relative_to(ROOT)}:{node.lineno} {n}"
                for n in names
                if n.split(".")[0] in banned or n.endswith(".load")
            ]
    assert not found


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


BLOCKS = [(page, i) for page in PAGES for i in range(len(python_blocks(page)))]


@pytest.mark.parametrize(("page", "index"), BLOCKS, ids=[f"{p.name}-{i}" for p, i in BLOCKS])
def test_python_in_the_documents_runs(page, index, tmp_path):
    code = python_blocks(page)[index]
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr


def test_the_readme_has_ten_lines_of_python():
    (block,) = python_blocks(ROOT / "README.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_pictures_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.is_file(), f"{page.name} links to {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{page.name} links to {target}"


def test_the_site_lists_every_page():
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))

    def listed(entries):
        for entry in entries:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else listed(value)

    assert sorted(listed(config["project"]["nav"])) == sorted(
        p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")
    )


def test_every_dependency_is_justified_and_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[<>=\[]", requirement)[0] for group in groups for requirement in group}
    told = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    for name in sorted(names):
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", told), (
            f"docs/dependencies.md does not speak of {name}"
        )
        pinned = re.search(rf"^{re.escape(name.lower())}==", pins, flags=re.M)
        assert pinned, f"constraints.txt does not pin {name}"


def test_the_page_of_studies_lists_every_study():
    from regard.studies import protocol

    told = re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs" / "studies.md").read_text(), re.MULTILINE)
    assert sorted(told) == protocol.names()


def test_the_command_page_lists_every_command():
    from regard.cli import app

    page = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert f"`regard {command.callback.__name__}" in page


@pytest.mark.parametrize("kept", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_the_performance_page_shows_the_tables_that_are_kept(kept):
    """The figures of docs/performance.md are those that `benchmarks/NAME.py --show` prints of what NAME kept."""
    script = ROOT / "benchmarks" / f"{kept.stem.split('-')[0]}.py"
    shown = subprocess.run(
        [sys.executable, script, "--show", "--out", kept], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert shown.stdout.strip()
    assert shown.stdout.strip() in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
