"""Nearly every class of the Auto mappings builds from a tiny config."""

from __future__ import annotations

import pytest
import torch

from tests.families.tiny import DOES_NOT_BUILD, config_of, mapped, tiny_models

MAPPINGS = [
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_CTC_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
]
MAX_PARAMETERS = 500_000


@pytest.mark.slow
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_classes_of_a_mapping_are_tiny(mapping: str) -> None:
    """On the meta device, where nothing is initialised; what is left out is left out by name."""
    every, tiny = list(mapped(mapping)), list(tiny_models(mapping))
    assert len(dict(tiny)) >= 0.9 * len(dict(every))
    for model_type, model_class in tiny:
        with torch.device("meta"):
            model = model_class(config_of(model_class, model_type))
        size = sum(p.numel() for p in model.parameters())
        assert size < MAX_PARAMETERS, f"{model_type}: {size} parameters"


def test_what_is_left_out_exists() -> None:
    every = {model_type for mapping in MAPPINGS for model_type, _ in mapped(mapping)}
    assert set(DOES_NOT_BUILD) <= every
