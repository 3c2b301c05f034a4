import mutations
import pytest


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_pattern_matches_once_and_tests_exist(mutation):
    path, text = mutations.place_of(mutation)
    assert text != path.read_text(encoding="utf-8")
    files = [part for part in mutations.expand(mutation.tests) if part.startswith(("tests/", str(mutations.ROOT)))]
    assert files
    assert all((mutations.ROOT / file).exists() for file in files)
