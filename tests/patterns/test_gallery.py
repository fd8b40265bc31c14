"""The gallery: whole, and what its command makes."""

from pathlib import Path

import regard.patterns as rp
from regard.patterns import Pattern
from regard.patterns.gallery import CATALOGUE, main, pages

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_command_makes():
    made = pages()
    for name, text in made.items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, f"{name}: run python -m regard.patterns.gallery docs"
    assert {f"patterns/{p.name}" for p in (DOCS / "patterns").iterdir()} == set(made) - {"patterns.md"}


def test_every_class_is_there():
    shown = {type(example.pattern) for examples in CATALOGUE.values() for example in examples}
    public = {x for x in vars(rp).values() if isinstance(x, type) and issubclass(x, Pattern)}
    assert public - {Pattern, rp.Routed, rp.StaticPattern} <= shown  # a route decides what it shows


def test_the_command(tmp_path, capsys):
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "patterns.md").read_text(encoding="utf-8").startswith("# Patterns")
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().err


def test_what_is_written_is_what_is_drawn():
    for examples in CATALOGUE.values():
        for example in examples:
            assert eval(example.code, dict(vars(rp))) == example.pattern, example.code
