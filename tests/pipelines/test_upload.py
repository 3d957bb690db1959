"""Uploading: what is sent to the hub, and that a refusal is one line and loses nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from diffdistill import UserError, distill, export
from diffdistill.commands.cli import main

Teachers = Callable[[str], Path]


class Hub:
    """What the hub was asked for, and how it fails."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}
        self.sent: dict[str, Any] = {}
        self.files: set[str] = set()
        self.error: Exception | None = None

    def create_repo(self, name: str, **options: Any) -> Any:
        self.made = {"name": name, **options}
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.sent = options
        folder = Path(options["folder_path"])
        self.files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub


def test_train_and_export_upload_a_private_repository(tiny_teacher: Teachers, hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {"steps": 1, "batch_size": 4, "sample_every": 0, "device": "cpu"}
    student = distill(teacher=tiny_teacher("vp"), **options, push_to_hub="me/mine", out=run).student
    assert hub.made == {"name": "me/mine", "private": True, "exist_ok": True}
    assert hub.sent["repo_id"] == "me/mine" and hub.sent["folder_path"] == student
    assert {"README.md", "model_index.json", "diffdistill.json", "unet/config.json"} <= hub.files
    assert 'from_pretrained("me/mine")' in (student / "README.md").read_text()
    out = ["--out", str(tmp_path / "again")]
    assert main(["export", str(run), *out, "--push-to-hub", "me/other", "--hub-private", "false"]) == 0
    assert hub.made["name"] == "me/other" and hub.made["private"] is False
    export(run, out=tmp_path / "third")
    assert hub.sent["repo_id"] == "me/other"  # nothing was sent


@pytest.mark.parametrize("error", [OSError("Connection refused\nand more"), ValueError("no"), RuntimeError("x" * 2000)])
def test_a_failed_upload_loses_nothing(
    error: Exception, tiny_teacher: Teachers, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.error = error
    command = [
        "train",
        "--teacher",
        str(tiny_teacher("vp")),
        "--steps",
        "1",
        "--batch-size",
        "4",
        "--sample-every",
        "0",
    ]
    assert main([*command, "--push-to-hub", "me/mine", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "push_to_hub: the student is whole in" in said and len(said) < 300
    assert said.endswith("--private") or "..." in said
    assert (tmp_path / "run" / "student" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_what_can_be_known_is_said_before_the_training(
    tiny_teacher: Teachers, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, says: str, **options: Any) -> None:
        with pytest.raises(UserError, match=says):
            distill(teacher=tiny_teacher("vp"), push_to_hub=name, device="cpu", out=tmp_path / "run", **options)
        assert not (tmp_path / "run" / "config.yaml").exists()

    for name in ("mine", "a/b/c", "me/with space", "/x", ""):
        refused(name, "is no OWNER/NAME of the hub")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused("me/mine", "no token of the hub here; run `hf auth login`")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("me/mine", "HF_HUB_OFFLINE is set")
