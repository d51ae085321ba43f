"""What the documents say is there: links, paths and commands."""

import re
from pathlib import Path

import pytest
import typer.main

from heliostat.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "tests" / "benchmarks" / "README.md",
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:^|\s|`)(?:\.venv/bin/)?heliostat ((?:[a-z]+(?:\||$|\s|`))[^`\n]*)", re.MULTILINE)
PATH = re.compile(
    r"`((?:platform|core|tracking|training|compression|runtime|stages|report|tests|cluster|pipelines)/[\w./-]*)`"
)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), f"{target} is not there"
        if heading:
            assert heading in {anchor(h) for h in HEADING.findall(linked.read_text(encoding="utf-8"))}, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_that_are_named_exist(document: Path) -> None:
    for path in PATH.findall(document.read_text(encoding="utf-8")):
        roots = (ROOT, ROOT / "platform" / "heliostat")
        assert any((root / path).exists() for root in roots), f"{path} is not there"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_and_their_options_exist(document: Path) -> None:
    command_line = typer.main.get_command(app)
    for said in COMMAND.findall(document.read_text(encoding="utf-8")):
        words = said.split("  ")[0].split()
        for name in words[0].strip("`").split("|"):
            assert name in command_line.commands, f"heliostat {name}: no such command"
            options = {option for parameter in command_line.commands[name].params for option in parameter.opts}
            for option in re.findall(r"--[a-z-]+", said.partition("&&")[0]):
                assert option in options or name == "cluster", f"heliostat {name} {option}: no such option"
