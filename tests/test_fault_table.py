"""Holds the table of faults in docs/operations.md to the tests that it names."""

import ast
import pathlib
import re

TESTS = pathlib.Path(__file__).parent
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows():
    """Cells of each row of the table."""
    text = (TESTS.parent / "docs" / "operations.md").read_text()
    section = text.partition("### Faults of a peer")[2].partition("\n#")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_every_fault_names_a_test_that_there_is():
    assert len(rows()) > 10
    for fault, *_, shown_by in rows():
        named = NAMED.findall(shown_by)
        assert named, f"nothing shows what is said of: {fault}"
        for file, name in named:
            functions = {node.name for node in ast.parse((TESTS / file).read_text()).body if hasattr(node, "name")}
            assert name in functions, f"{fault}: there is no {file}::{name}"
