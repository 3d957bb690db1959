"""`diffdistill encode`: the same bytes whatever happens on the way, and one clear line for what cannot be used."""

import hashlib
import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffdistill import distill, export
from diffdistill.data import encoded as encoding
from diffdistill.data import shards
from diffdistill.data.encoded import encode, open_encoded
from diffdistill.data.prompts import all_prompts, read_prompts
from diffdistill.errors import UserError
from diffdistill.families import family_of, load_teacher
from diffdistill.training import assemble
from tests import tiny_a
from tests.data.encoding import PROMPTS, contents, options, png
from tests.methods.short_runs import same_when_resumed


def training(teacher: Path, prompts: Path, out: Path, **more: Any) -> dict[str, Any]:
    shared = {"method": "dmd2", "resolution": 16, "batch_size": 2, "steps": 2, "sample_every": 0, "device": "cpu"}
    return {"teacher": str(teacher), "prompts": str(prompts), "out": str(out)} | shared | more


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
    with pytest.raises(UserError, match="is not finished, 1 of 3 shards are there; run `diffdistill encode` again"):
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
    same_when_resumed(tmp_path, stop=1, end=3, **training(teacher, folder, tmp_path))


def test_a_moved_run_whose_prompts_are_gone_still_exports(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    student = distill(**training(teacher, prompts, tmp_path / "run")).student
    before = load_file(student / "unet/diffusion_pytorch_model.safetensors")
    prompts.unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    again = export(tmp_path / "moved", out=tmp_path / "again")
    after = load_file(again / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not (tmp_path / "run").exists()


def test_jsonl(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"caption": "two"}\n')
    assert len(open_encoded(encode(**options(teacher, path, tmp_path / "out")))) == 2
    path.write_text('{"prompt": "one"}\n{"other": "two"}\n')
    with pytest.raises(UserError, match=r"prompts: line 2 of .* is no text, nor an object with a text called 'prompt'"):
        encode(**options(teacher, path, tmp_path / "other"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n\n", "prompts: .*holds no prompt; write one on each line"),
        ("latin.txt", "caf\xe9".encode("latin-1"), r"prompts: .*is not UTF-8 \(byte 3\)"),
        ("gone.txt", None, r"prompts: .*cannot be read \(No such file"),
        ("other.doc", b"x", "prompts: .*"),
    ],
)
def test_prompts_that_cannot_be_used(
    name: str, content: bytes | None, message: str, teacher: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if name == "other.doc":
        path = tmp_path / "no-such-thing"
    with pytest.raises(UserError, match=message):
        encode(**options(teacher, path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_mark_at_the_start_is_no_text_and_a_line_ends_at_its_end_alone(tmp_path: Path) -> None:
    texts, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    texts.write_bytes("\ufeffone\r\ntwo\u2028parts\x0bof it\x85\r\n\r\n".encode())
    assert read_prompts(texts) == ["one", "two\u2028parts\x0bof it"]
    lines.write_bytes('\ufeff{"prompt": "one"}\r\n{"prompt": "two\u2028parts"}\n'.encode())
    assert read_prompts(lines) == ["one", "two\u2028parts"]
    texts.write_bytes(b"\xef\xbb\xbfcaf\xe9")
    with pytest.raises(UserError, match=r"not UTF-8 \(byte 6\)"):
        read_prompts(texts)


def test_prompts_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("one\ntwo")
    assert all_prompts("~/mine.txt") == ["one", "two"]


def test_copies_of_the_weights_that_are_not_loaded_do_not_count(teacher: Path, tmp_path: Path) -> None:
    """A snapshot of the hub is without them."""
    family, _ = family_of(teacher)
    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    for copy in ("text_encoder/model.fp16.safetensors", "vae/diffusion_pytorch_model.non_ema.safetensors"):
        (other / copy).write_bytes(b"a copy")
    assert encoding.fingerprint(other, family) == encoding.fingerprint(teacher, family)
    (other / "text_encoder/model.safetensors").write_bytes(b"others")
    assert encoding.fingerprint(other, family) != encoding.fingerprint(teacher, family)


def column_types(folder: Path) -> dict[str, torch.dtype]:
    return {key: value.dtype for key, value in load_file(folder / "00000.safetensors").items()}


def test_encoders_in_half_precision(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "0.png").write_bytes(png(3))
    (images / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "one"}))
    source = {"prompts": None, "data": str(images)}
    folders, loaded = {}, {}
    load = encoding.load_pipeline

    def noting(*args: Any, **how: Any) -> Any:
        pipeline = load(*args, **how)
        loaded[how["dtype"]] = pipeline
        return pipeline

    monkeypatch.setattr(encoding, "load_pipeline", noting)
    for name, stored in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float32)):
        out = encode(**options(teacher, Path("none"), tmp_path / name, teacher_dtype=name) | source)
        assert set(column_types(out).values()) == {stored}
        assert {value.dtype for value in load_file(out / "null.safetensors").values()} == {stored}
        folders[name] = open_encoded(out)
        assert loaded[getattr(torch, name)].text_encoder.dtype == getattr(torch, name)
    # The autoencoder's config says force_upcast, as most do: in float16 the real ones overflow.
    assert [loaded[kind].vae.dtype for kind in loaded] == [torch.float32, torch.bfloat16, torch.float32]
    exact = folders["float32"].get(torch.arange(1))
    assert exact.x0 is not None
    for name, limit in (("bfloat16", 0.05), ("float16", 0.005)):
        rounded = folders[name].get(torch.arange(1))
        assert rounded.x0 is not None and rounded.x0.dtype == torch.float32
        pairs = [(rounded.x0, exact.x0), *((rounded.cond[key], exact.cond[key]) for key in exact.cond)]
        assert {a.dtype for a, _ in pairs} == {torch.float32}
        assert 0 < max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs) < limit
        assert {value.dtype for value in folders[name].null.values()} == {torch.float32}
    with pytest.raises(UserError, match="made with teacher_dtype bfloat16"):
        encode(**options(teacher, Path("none"), tmp_path / "bfloat16") | source)
    monkeypatch.setattr(encoding, "load_pipeline", lambda *a, **k: pytest.fail("a model was loaded"))
    index = json.loads((tmp_path / "float32" / "encode.json").read_text())
    index["settings"].pop("teacher_dtype")  # as folders were before there was a choice
    (tmp_path / "float32" / "encode.json").write_text(json.dumps(index))
    encode(**options(teacher, Path("none"), tmp_path / "float32") | source)


def test_training_reads_what_bfloat16_encoders_gave(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    folder = encode(**options(teacher, prompts, tmp_path / "out", teacher_dtype="bfloat16"))
    for kind in ("float32", "bfloat16"):
        student = distill(**training(teacher, folder, tmp_path / kind, teacher_dtype=kind, guidance_scale=2.0)).student
        weights = load_file(student / "unet/diffusion_pytorch_model.safetensors")
        assert all(bool(value.isfinite().all()) for value in weights.values())


def test_float16_that_overflows(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    wide = Path(shutil.copytree(teacher, tmp_path / "wide"))
    weights = load_file(wide / "text_encoder/model.safetensors")
    name = next(n for n in weights if n.endswith("final_layer_norm.weight"))
    save_file({**weights, name: weights[name] * 1e5}, wide / "text_encoder/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="teacher_dtype: stable_diffusion overflows in float16; use bfloat16"):
        encode(**options(wide, prompts, tmp_path / "out", teacher_dtype="float16"))
    encode(**options(wide, prompts, tmp_path / "out-b", teacher_dtype="bfloat16"))


def broken(teacher: Path, tmp_path: Path, damage: Callable[[Path], None]) -> Path:
    folder = Path(shutil.copytree(teacher, tmp_path / "broken"))
    damage(folder)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "vae"), r"teacher: .*vae/config.json is missing"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "teacher: .* has no tokenizer/, which stable_diffusion needs"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "teacher: .* has no text_encoder/, which stable_diffusion needs"),
        (
            lambda f: cut(f / "text_encoder/model.safetensors"),
            "teacher: .*model.safetensors is not a whole safetensors",
        ),
    ],
)
def test_a_pipeline_that_is_not_whole(
    damage: Callable[[Path], None], message: str, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
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
    monkeypatch.setattr(assemble, "check_encoded", lambda *a: None)
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
    for more, message in (
        (
            {"lora": "student", "lora_targets": "foo"},
            "lora: the teacher's UNet2DConditionModel has no layer called foo to adapt; there are .*to_out.0, to_q",
        ),
        ({"lora": "student", "lora_targets": "to_q,to_kk"}, "no layer called to_kk to adapt; did you mean 'to_k'"),
        ({"method": "consistency", "mode": "training"}, "needs images too"),
        ({"frames": 5}, "frames: 5 was given, and stable_diffusion makes images"),
    ):
        with pytest.raises(UserError, match=message):
            distill(**training(teacher, folder, run, **more))
    pixels = {"teacher": "digits", "out": str(tmp_path / "none"), "device": "cpu"}
    with pytest.raises(UserError, match="teacher: 'digits' works on pixels"):
        encode(**pixels, prompts=str(prompts))
    with pytest.raises(UserError, match="encode: give either --prompts"):
        encode(teacher=str(teacher), out=str(tmp_path / "none"))


def test_images_without_captions(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "0.png")
    config = options(teacher, tmp_path / "none", tmp_path / "out") | {"prompts": None, "data": str(tmp_path / "images")}
    with pytest.raises(UserError, match=r"data: .* has no captions, which stable_diffusion is conditioned on"):
        encode(**config)


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
    several = tmp_path / "sev[e]ral"
    several.mkdir()
    for name, held in (("a[1]", ["one"]), ("b", ["two", "three"])):
        parquet.write_table(pyarrow.table({"caption": held}), several / f"{name}.parquet")
    assert all_prompts(f"{several}/a[1].parquet") == ["one"]
    assert all_prompts(f"{tmp_path}/sev*/*.parquet") == ["one", "two", "three"]
    other = tmp_path / "other.parquet"
    parquet.write_table(pyarrow.table({"other": ["one", "two"]}), other)
    with pytest.raises(UserError, match="give at least one row, with a 'prompt', 'caption' or 'text'"):
        encode(**options(teacher, other, tmp_path / "other"))


def test_images_of_webdataset_shards(teacher: Path, tmp_path: Path) -> None:
    import tarfile

    picture = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 200)).save(picture, "png")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in (("a.png", picture.getvalue()), ("a.txt", b"a blue square")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    config = options(teacher, tmp_path, tmp_path / "out") | {"prompts": None, "data": str(tmp_path / "0.tar")}
    example = open_encoded(encode(**config)).get(torch.arange(1))
    assert example.x0 is not None and example.x0.shape == (1, 4, 8, 8)
    assert example.cond["encoder_hidden_states"].shape[1] == 77


def test_large_latents_are_decoded_in_tiles(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    load = encoding.load_pipeline

    def noting(*args: Any, **how: Any) -> Any:
        loaded.append(load(*args, **how))
        return loaded[-1]

    monkeypatch.setattr(encoding, "load_pipeline", noting)
    decode = encoding.decoder(load_teacher(teacher))
    for side, saves in ((16, False), (72, True)):
        images = decode(torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(0)))
        assert images.shape == (2, 3, 2 * side, 2 * side) and images.isfinite().all()
        assert (loaded[-1].vae.use_tiling, loaded[-1].vae.use_slicing) == (saves, saves)
        assert loaded[-1].text_encoder is None  # the VAE alone
