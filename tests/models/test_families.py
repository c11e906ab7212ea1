"""Every family in the table is read as its own forward pass computes it, or refused by name."""

import pytest
from families_tiny import FAMILIES, make_model

from conftest import MODELS
from oprd.errors import ModelError
from oprd.models.language_model import LanguageModel
from oprd.models.loading import load_tokenizer
from oprd.models.probe import check_family

REFUSED = {"gemma3n_text", "modernbert_decoder"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "t5"])
def test_a_family_is_right_or_refused_by_name(family):
    lm = LanguageModel(model=make_model(family), tokenizer=load_tokenizer(str(MODELS / "base")), name=family)
    if family in REFUSED:
        with pytest.raises(ModelError, match="this family is not supported"):
            check_family(lm)
    else:
        check_family(lm)
