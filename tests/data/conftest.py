"""A tiny Stable Diffusion pipeline and prompts to encode with it."""

from pathlib import Path

import pytest

from tests import tiny_a
from tests.data.encoding import PROMPTS


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "sd"
    tiny_a.stable_diffusion(prediction_type="v_prediction", zero_snr=True).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n")
    return path
