"""The README's quickstart of PDD+MTT, run as it stands there; about two minutes."""

import pytest

from tests.support import quickstart


@pytest.mark.long
def test_distilled_digits_teach_more_than_random_ones(tmp_path):
    quickstart.check("quickstart.sh", "ConvNetW32", tmp_path)
