"""`diffdistill encode`: the same bytes whatever happens on the way, and one clear line for what cannot be used."""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffdistill import encode as encoding
from diffdistill import run as running
from diffdistill import shards
from diffdistill.encode import encode, open_encoded
from diffdistill.errors import UserError
from diffdistill.run import distill
from tests import tiny_a

PROMPTS = [f"prompt number {i}" for i in range(7)]


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


def options(teacher: Path, prompts: Path, out: Path, **more: Any) -> dict[str, Any]:
    shared = {"resolution": 16, "shard_size": 3, "batch_size": 2, "device": "cpu"}
    return {"teacher": str(teacher), "prompts": str(prompts), "out": str(out)} | shared | more


def training(teacher: Path, prompts: Path, out: Path, **more: Any) -> dict[str, Any]:
    shared = {"method": "dmd2", "resolution": 16, "batch_size": 2, "steps": 2, "sample_every": 0, "device": "cpu"}
    return {"teacher": str(teacher), "prompts": str(prompts), "out": str(out)} | shared | more


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_a_stopped_run_goes_on_to_the_same_bytes(
    teacher: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode(**options(teacher, prompts, tmp_path / "whole"))
    assert sorted(contents(whole)) == [
        "00000.safetensors",
        "00001.safetensors",
        "00002.safetensors",
        "null.safetensors",
    ]
    made: list[str] = []
    write = shards.atomic_write

    def stopping(path: Any, data: Any) -> Any:
        if Path(path).name == "00001.safetensors":
            raise KeyboardInterrupt
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "atomic_write", stopping)
        with pytest.raises(KeyboardInterrupt):
            encode(**options(teacher, prompts, tmp_path / "parts"))
    with pytest.raises(UserError, match="is not finished, 1 of 3 shards are there; run its `diffdistill encode`"):
        open_encoded(tmp_path / "parts")

    def noting(path: Any, data: Any) -> Any:
        made.append(Path(path).name)
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "atomic_write", noting)
        parts = encode(**options(teacher, prompts, tmp_path / "parts"))
    assert [name for name in made if name.endswith(".safetensors")] == ["00001.safetensors", "00002.safetensors"]
    assert contents(parts) == contents(whole)
    assert len(open_encoded(parts)) == len(PROMPTS)


def test_a_done_folder_loads_no_model(
    teacher: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(**options(teacher, prompts, tmp_path / "out"))
    monkeypatch.setattr(encoding, "load_pipeline", lambda *a, **k: pytest.fail("a model was loaded"))
    encode(**options(teacher, prompts, tmp_path / "out"))
    assert "is done" in capsys.readouterr().out


def test_training_loads_neither_vae_nor_text_encoder_and_resumes_to_the_same_bits(
    teacher: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = encode(**options(teacher, prompts, tmp_path / "out"))
    monkeypatch.setattr(encoding, "load_pipeline", lambda *a, **k: pytest.fail("a model was loaded"))
    whole = distill(**training(teacher, folder, tmp_path / "whole", steps=3))
    distill(**training(teacher, folder, tmp_path / "run", steps=1))
    resumed = distill(resume=tmp_path / "run", steps=3)
    a, b = (load_file(student / "unet/diffusion_pytorch_model.safetensors") for student in (whole, resumed))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_moved_run_whose_prompts_are_gone_still_exports(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    student = distill(**training(teacher, prompts, tmp_path / "run"))
    before = load_file(student / "unet/diffusion_pytorch_model.safetensors")
    prompts.unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    again = running.export_run(tmp_path / "moved", out=tmp_path / "again")
    after = load_file(again / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not (tmp_path / "run").exists()


def test_jsonl(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"caption": "two"}\n')
    assert len(open_encoded(encode(**options(teacher, path, tmp_path / "out")))) == 2
    path.write_text('{"prompt": "one"}\n{"other": "two"}\n')
    with pytest.raises(UserError, match=r"prompts: line 2 of .* is no object with a text called 'prompt'"):
        encode(**options(teacher, path, tmp_path / "other"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.txt", b"\n\n", "prompts: .*holds no prompt; write one on each line"),
        ("latin.txt", "caf\xe9".encode("latin-1"), r"prompts: .*is not UTF-8 \(byte 3\)"),
        ("gone.txt", None, r"prompts: .*cannot be read \(No such file"),
        ("other.doc", b"x", "prompts: .*"),
    ],
)
def test_prompts_that_cannot_be_used(
    name: str, content: bytes | None, told: str, teacher: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if name == "other.doc":
        path = tmp_path / "no-such-thing"
    with pytest.raises(UserError, match=told):
        encode(**options(teacher, path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def broken(teacher: Path, tmp_path: Path, damage: Callable[[Path], None]) -> Path:
    folder = Path(shutil.copytree(teacher, tmp_path / "broken"))
    damage(folder)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: shutil.rmtree(f / "vae"), r"teacher: .*vae/config.json is missing"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "teacher: .* has no tokenizer/, which stable_diffusion needs"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "teacher: .* has no text_encoder/, which stable_diffusion needs"),
        (lambda f: cut(f / "text_encoder/model.safetensors"), "teacher: the pipeline in .* does not load"),
    ],
)
def test_a_pipeline_that_is_not_whole(
    damage: Callable[[Path], None], told: str, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told) as error:
        encode(**options(broken(teacher, tmp_path, damage), prompts, tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_the_parts_of_the_export_are_looked_for_before_the_training(
    teacher: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = encode(**options(teacher, prompts, tmp_path / "out"))

    def bare(f: Path) -> None:
        weights = next((f / "vae").glob("*.safetensors"))
        shutil.copy(weights, f / "vae" / "diffusion_pytorch_model.bin")
        weights.unlink()

    without = broken(teacher, tmp_path, bare)
    monkeypatch.setattr(running, "check_encoded", lambda *a: None)
    with pytest.raises(UserError, match=r"teacher: .*vae has no .safetensors weights"):
        distill(**training(without, folder, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_of_another_model_or_size(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    folder = encode(**options(teacher, prompts, tmp_path / "out"))
    other = tmp_path / "other"
    tiny_a.stable_diffusion(seed=1, prediction_type="v_prediction", zero_snr=True).save_pretrained(other)
    with pytest.raises(UserError, match=r"prompts: .* was made by another model"):
        distill(**training(other, folder, tmp_path / "run"))
    with pytest.raises(UserError, match=r"prompts: .* was made for samples of shape .*give the same --resolution"):
        distill(**training(teacher, folder, tmp_path / "run", resolution=32))
    with pytest.raises(UserError, match=r"out: .* holds encoded prompts made with fingerprint"):
        encode(**options(other, prompts, folder))
    with pytest.raises(UserError, match="resolution: 17 is not a multiple of 8, which stable_diffusion needs; use 16"):
        encode(**options(teacher, prompts, tmp_path / "wrong", resolution=17))


def test_shards_that_do_not_belong_together(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    folder = encode(**options(teacher, prompts, tmp_path / "out"))
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    shutil.copy(damaged / "00000.safetensors", damaged / "00001.safetensors")
    with pytest.raises(UserError, match=r"encode: .*00001.safetensors is missing or damaged"):
        open_encoded(damaged)
    mixed = Path(shutil.copytree(folder, tmp_path / "mixed"))
    columns = load_file(mixed / "00002.safetensors")
    save_file({**columns, "more": torch.zeros(1)}, mixed / "00002.safetensors")
    index = json.loads((mixed / "encode.json").read_text())
    index["shards"]["00002.safetensors"] = hashlib.sha256((mixed / "00002.safetensors").read_bytes()).hexdigest()
    (mixed / "encode.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"encode: the shards of .* differ in columns or shapes"):
        open_encoded(mixed)


def test_not_enough_disk(teacher: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"out: .* has 0 MiB free and what is missing needs"):
        encode(**options(teacher, prompts, tmp_path / "out"))


def test_options_that_do_not_fit(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    folder = encode(**options(teacher, prompts, tmp_path / "out"))
    run = tmp_path / "run"
    for more, told in (
        (
            {"student": "lora", "adapter_targets": "foo"},
            "lora: the teacher's UNet2DConditionModel has no layer called foo",
        ),
        ({"method": "consistency", "mode": "training"}, "needs images too"),
        ({"frames": 5}, "frames: 5 was given, and stable_diffusion makes images"),
    ):
        with pytest.raises(UserError, match=told):
            distill(**training(teacher, folder, run, **more))
    pixels = {"teacher": "digits", "out": str(tmp_path / "none"), "device": "cpu"}
    with pytest.raises(UserError, match="teacher: 'digits' works on pixels"):
        encode(**pixels, prompts=str(prompts))
    with pytest.raises(UserError, match="encode: give either --prompts"):
        encode(teacher=str(teacher), out=str(tmp_path / "none"))


def test_images_without_captions(teacher: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "0.png")
    given = options(teacher, tmp_path / "none", tmp_path / "out") | {"prompts": None, "data": str(tmp_path / "images")}
    with pytest.raises(UserError, match=r"data: .* has no captions, which stable_diffusion is conditioned on"):
        encode(**given)


def test_prompts_of_a_hugging_face_dataset(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    if importlib.util.find_spec("datasets") is None:
        path.write_bytes(b"")
        with pytest.raises(UserError, match=r"pip install 'diffdistill\[datasets\]'"):
            encode(**options(teacher, path, tmp_path / "out"))
        return
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"caption": ["one", "two"]}), path)
    assert len(open_encoded(encode(**options(teacher, path, tmp_path / "out")))) == 2
    other = tmp_path / "other.parquet"
    parquet.write_table(pyarrow.table({"other": ["one", "two"]}), other)
    with pytest.raises(UserError, match="give at least one row, with a 'prompt', 'caption' or 'text'"):
        encode(**options(teacher, other, tmp_path / "other"))


def test_images_of_webdataset_shards(teacher: Path, tmp_path: Path) -> None:
    import io
    import tarfile

    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 200)).save(picture, "png")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in (("a.png", picture.getvalue()), ("a.txt", b"a blue square")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    given = options(teacher, tmp_path, tmp_path / "out") | {"prompts": None, "data": str(tmp_path / "0.tar")}
    latents, cond = open_encoded(encode(**given)).get(torch.arange(1))
    assert latents is not None and latents.shape == (1, 4, 8, 8) and cond["encoder_hidden_states"].shape[1] == 77
