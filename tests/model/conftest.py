"""What several tests of the light family need."""

import pytest

from model.light.segmenter import LightSegmenter
from model.segmenter import BUNDLED_ADAPTER, Segmenter
from model.types import Prompt


@pytest.fixture(scope="session")
def ladder(segmenter: Segmenter) -> Segmenter:
    """The bundled weights with the bundled adapter."""
    return segmenter.with_adapter(BUNDLED_ADAPTER)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Prompt]:
    """What is asked with every pass of the ladder."""
    prompts: list[Prompt] = []
    original = LightSegmenter._pass

    def noted(self, adapter, encoded, prompt, *rest, **chosen):
        prompts.append(prompt)
        return original(self, adapter, encoded, prompt, *rest, **chosen)

    monkeypatch.setattr(LightSegmenter, "_pass", noted)
    return prompts
