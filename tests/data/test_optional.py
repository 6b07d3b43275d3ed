"""What is said where an optional package is missing."""

import sys

import pytest

from fms.datasets import get_dataset
from fms.utils.tokenizers import CharTokenizer


@pytest.mark.parametrize(("name", "package"), [("arrow", "pyarrow"), ("huggingface", "datasets")])
def test_a_missing_package_is_named_with_the_extra_that_has_it(name, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'foundation-model-stack\[data\]'"):
        get_dataset(name, CharTokenizer(), tmp_path)
