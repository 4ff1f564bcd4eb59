"""What the pages say can be done: links lead somewhere, flags exist, code compiles, commands of make are there."""

import re
from pathlib import Path

import pytest

from fourscore import cli
from fourscore.flags import _build_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
NAMED = re.compile(r"\b((?:docs|examples|tests|benchmarks|scripts|src)/[\w./-]+\.(?:md|py|yaml|txt))\b")


def fenced(page: Path, *languages: str) -> list[str]:
    """The blocks of code of a page in some languages."""
    blocks = re.findall(r"^( *)```(\w*)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for _, language, text in blocks if language in languages]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not link.startswith("http")]
    assert not [link for link in links if not (page.parent / link).exists()]
    assert not [name for name in NAMED.findall(text) if not (ROOT / name).exists()]


def test_files_that_the_code_names() -> None:
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "src").rglob("*.py")
        for name in NAMED.findall(path.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    }
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_compiles(page: Path) -> None:
    for block in fenced(page, "python"):
        compile(block, str(page), "exec")


def test_flags_of_commands() -> None:
    ppo = {flag for action in _build_parser()._actions for flag in action.option_strings}
    own = {"plan": cli._PLAN_HELP, "eval": cli._EVAL_HELP, "demo": "--seeds --output_dir", "ppo": "--help-all"}
    unknown = []
    for page in PAGES:
        for block in fenced(page, "sh", "bash", ""):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.search(r"(?:-m )?\bfourscore (ppo|plan|eval|demo)\b([^#|]*)", line)
                for flag in re.findall(r"(--[A-Za-z_]\w*)", command[2] if command else ""):
                    if flag not in ppo and flag not in own[command[1]] and flag != "--help":
                        unknown.append(f"{page.name}: fourscore {command[1]} {flag}")
    assert not unknown


def test_targets_of_make() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b", "\n".join(fenced(page, "sh", "bash")))
        named += re.findall(r"`make ([a-z]+(?:-[a-z]+)*)", page.read_text(encoding="utf-8"))
        assert set(named) <= targets, page.name
