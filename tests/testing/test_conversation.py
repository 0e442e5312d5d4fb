"""Text to chat about."""

import pytest

from sglang_kvcodec.testing.conversation import first_difference, source_slices


def test_slices_are_consecutive_and_as_long_as_asked():
    whole = source_slices([1000])[0]
    assert "".join(source_slices([1, 700, 299])) == whole
    assert whole.startswith(("class ", "def "))


def test_two_modules_differ():
    assert source_slices([500], "json.decoder") != source_slices([500], "json.encoder")


def test_more_text_than_there_is_is_refused():
    with pytest.raises(ValueError, match="characters of text"):
        source_slices([10**8])


@pytest.mark.parametrize(
    ("left", "right", "told"),
    [
        ("same", "same", ""),
        ("abc", "abd", "at character 2: 'abc' against 'abd'"),
        ("abc", "ab", "at character 2: 'abc' against 'ab'"),
        ("", "x", "at character 0: '' against 'x'"),
    ],
)
def test_the_first_difference_is_told(left, right, told):
    assert first_difference(left, right) == told
