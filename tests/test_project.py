"""The files beside the code: they parse, agree with each other, and point at what exists."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")])
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def read_yaml(name: str):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_local_link_of_a_page_leads_to_something(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: there is no {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {path or page.name} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_of_a_page_starts_a_file_that_exists(page):
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        text = text.partition("## [0.1.0]")[0]
    for module in re.findall(r"python -m (vpo_jax[\w.]*)", text):
        path = ROOT.joinpath(*module.rstrip(".").split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name}: python -m {module}"
    for script in re.findall(r"(?:python|bash) ((?:launch|benchmarks|tools)/[\w./]+\.(?:py|sh|sbatch))", text):
        assert (ROOT / script).exists(), f"{page.name}: there is no {script}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_path_of_the_repository_that_a_page_names_exists(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("a changelog names what was")
    rooms = "vpo_jax|configs|launch|benchmarks|tools|docs|tests"
    for path in re.findall(rf"`((?:{rooms})/[\w./]+)`", page.read_text(encoding="utf-8")):
        if "NAME" not in path:
            assert (ROOT / path).exists(), f"{page.name}: there is no {path}"


def test_every_preset_that_a_page_names_is_in_the_config():
    config = (ROOT / "configs" / "vpo.py").read_text(encoding="utf-8")
    for page in PAGES:
        for preset in re.findall(r"configs/vpo\.py:([a-z]\w*)", page.read_text(encoding="utf-8")):
            assert f'"{preset}":' in config, f"{page.name}: configs/vpo.py has no preset {preset}"


def test_the_citation_and_the_changelog_have_the_versions_of_the_project():
    version = project()["project"]["version"]
    releases = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert read_yaml("CITATION.cff")["version"] == version
    assert releases[0] == "Unreleased" and version in releases


def test_the_citation_has_what_its_format_asks_for():
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation["license"] == project()["project"]["license"]
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2412.15159"


def test_hooks_run_what_the_test_script_runs():
    hooks = [hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    script = (ROOT / "launch" / "test.sh").read_text(encoding="utf-8")
    assert all(repo["repo"] == "local" for repo in read_yaml(".pre-commit-config.yaml")["repos"])
    for hook in hooks:
        assert hook["language"] == "system"
        assert f"{hook['entry'].removeprefix('python ').removesuffix(' --no-error-summary')} " in script


def test_the_workflow_runs_quick_tests_on_a_push_and_everything_at_night_on_every_python():
    workflow = read_yaml(".github/workflows/tests.yml")
    on = workflow[True]  # YAML 1.1 reads the key `on` as a boolean
    assert "push" in on and on["schedule"][0]["cron"]
    commands = {name: [step.get("run", "") for step in job["steps"]] for name, job in workflow["jobs"].items()}
    assert commands["quick"][-1] == "bash launch/test.sh -m quick"
    assert commands["everything"][-1] == "bash launch/test.sh"
    for job in workflow["jobs"].values():
        assert job["strategy"]["matrix"]["python"] == PYTHONS
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "actions/none@v1"))


def test_the_launch_scripts_look_for_the_pythons_that_the_workflow_tests():
    script = (ROOT / "launch" / "environment.sh").read_text(encoding="utf-8")
    assert " | ".join(PYTHONS) + ")" in script
    assert all(f"python{version}" in script for version in PYTHONS)
    assert project()["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert "python_version" not in (ROOT / "requirements-test.txt").read_text(encoding="utf-8")


def test_a_test_without_a_tier_is_quick(request):
    assert request.node.get_closest_marker("quick") is not None


@pytest.mark.parametrize("case", ["first", "second"])
def test_the_first_case_alone_is_quick(request, case):
    assert (request.node.get_closest_marker("quick") is not None) == (case == "first")


@pytest.mark.slow
def test_a_test_that_is_marked_slow_is_not_quick(request):
    assert request.node.get_closest_marker("quick") is None


def test_no_file_of_the_package_is_left_out_of_git_by_mistake():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "status", "--porcelain", "--ignored", "--", "vpo_jax", "configs", "docs"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ignored = [line[3:] for line in shown.splitlines() if line.startswith("!!")]
    assert [path for path in ignored if path.endswith((".py", ".md", ".json", ".safetensors"))] == []
