"""docs/domains.md runs as it stands."""

from doctest import DocTestParser, DocTestRunner

from tests.domain_tables import DOCUMENT


def test_every_example_shows_what_happens() -> None:
    text = DOCUMENT.read_text("utf-8")
    output: list[str] = []
    test = DocTestParser().get_doctest(text, {}, DOCUMENT.name, str(DOCUMENT), 0)
    results = DocTestRunner(verbose=False).run(test, out=output.append)
    assert results.failed == 0, "".join(output)
    assert results.attempted > 60
