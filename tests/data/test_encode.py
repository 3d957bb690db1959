"""`diffdistill encode`: the same bytes whatever happens on the way, and one clear line for what cannot be used."""

import glob
import hashlib
import importlib.util
import io
import json
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffdistill.commands.distill import distill, export_run
from diffdistill.data import encoded as encoding
from diffdistill.data import shards
from diffdistill.data.encoded import encode, open_encoded
from diffdistill.data.hub import Ended
from diffdistill.data.images import stream_data
from diffdistill.errors import UserError
from diffdistill.families import family_of, load_teacher
from diffdistill.training import assemble
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
    again = export_run(tmp_path / "moved", out=tmp_path / "again")
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


def test_a_mark_at_the_start_is_no_text_and_a_line_ends_at_its_end_alone(tmp_path: Path) -> None:
    texts, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    texts.write_bytes("\ufeffone\r\ntwo\u2028parts\x0bof it\x85\r\n\r\n".encode())
    assert encoding.read_prompts(texts) == ["one", "two\u2028parts\x0bof it"]
    lines.write_bytes('\ufeff{"prompt": "one"}\r\n{"prompt": "two\u2028parts"}\n'.encode())
    assert encoding.read_prompts(lines) == ["one", "two\u2028parts"]
    texts.write_bytes(b"\xef\xbb\xbfcaf\xe9")
    with pytest.raises(UserError, match=r"not UTF-8 \(byte 6\)"):
        encoding.read_prompts(texts)


def test_prompts_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("one\ntwo")
    assert encoding.all_prompts("~/mine.txt") == ["one", "two"]


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
    given = {"prompts": None, "data": str(images)}
    folders, loaded = {}, {}
    load = encoding.load_pipeline

    def noting(*args: Any, **how: Any) -> Any:
        pipeline = load(*args, **how)
        loaded[how["dtype"]] = pipeline
        return pipeline

    monkeypatch.setattr(encoding, "load_pipeline", noting)
    for name, stored in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float32)):
        out = encode(**options(teacher, Path("none"), tmp_path / name, teacher_dtype=name) | given)
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
        encode(**options(teacher, Path("none"), tmp_path / "bfloat16") | given)
    monkeypatch.setattr(encoding, "load_pipeline", lambda *a, **k: pytest.fail("a model was loaded"))
    index = json.loads((tmp_path / "float32" / "encode.json").read_text())
    index["settings"].pop("teacher_dtype")  # as folders were before there was a choice
    (tmp_path / "float32" / "encode.json").write_text(json.dumps(index))
    encode(**options(teacher, Path("none"), tmp_path / "float32") | given)


def test_training_reads_what_bfloat16_encoders_gave(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    folder = encode(**options(teacher, prompts, tmp_path / "out", teacher_dtype="bfloat16"))
    for kind in ("float32", "bfloat16"):
        student = distill(**training(teacher, folder, tmp_path / kind, teacher_dtype=kind, guidance_scale=2.0))
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
    for more, told in (
        (
            {"lora": "student", "lora_targets": "foo"},
            "lora: the teacher's UNet2DConditionModel has no layer called foo to adapt; there are .*to_out.0, to_q",
        ),
        ({"lora": "student", "lora_targets": "to_q,to_kk"}, "no layer called to_kk to adapt; did you mean 'to_k'"),
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
    several = tmp_path / "sev[e]ral"
    several.mkdir()
    for name, held in (("a[1]", ["one"]), ("b", ["two", "three"])):
        parquet.write_table(pyarrow.table({"caption": held}), several / f"{name}.parquet")
    assert encoding.all_prompts(f"{several}/a[1].parquet") == ["one"]
    assert encoding.all_prompts(f"{tmp_path}/sev*/*.parquet") == ["one", "two", "three"]
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
    given = options(teacher, tmp_path, tmp_path / "out") | {"prompts": None, "data": str(tmp_path / "0.tar")}
    example = open_encoded(encode(**given)).get(torch.arange(1))
    assert example.x0 is not None and example.x0.shape == (1, 4, 8, 8)
    assert example.cond["encoder_hidden_states"].shape[1] == 77


# ---- streaming: a stand-in for what `datasets` gives with streaming=True, as in its versions 4 and 5


@dataclass
class FakeImage:
    decode: bool = True


@dataclass
class FakeValue:
    dtype: str


@dataclass
class FakeClassLabel:
    names: list[str]
    dtype: str = "int64"


@dataclass
class FakeStream:
    """Rows to go through once; `log` says where each reading began and `read` which rows were given."""

    table: list[dict[str, Any]]
    features: Any
    told: int | None = None
    first: int = 0
    log: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    breaks_at: list[int] = field(default_factory=list)

    def with_(self, **changes: Any) -> "FakeStream":
        return FakeStream(**{**self.__dict__, **changes})  # the lists are shared

    @property
    def info(self) -> Any:
        splits = None if self.told is None else {"train": types.SimpleNamespace(num_examples=self.told)}
        return types.SimpleNamespace(splits=splits)

    def select_columns(self, names: list[str]) -> "FakeStream":
        features = self.features and {name: self.features[name] for name in names}
        return self.with_(table=[{name: row[name] for name in names} for row in self.table], features=features)

    def cast_column(self, name: str, feature: FakeImage) -> "FakeStream":
        assert self.features[name] == FakeImage() and not feature.decode
        return self.with_(features={**self.features, name: feature})

    def skip(self, n: int) -> "FakeStream":
        self.log.append(n)
        return self.with_(first=n)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(self.first, len(self.table)):
            if i in self.breaks_at:
                raise ConnectionError("the line\nis down")
            self.read.append(i)
            yield self.table[i]


def png(i: int) -> bytes:
    file = io.BytesIO()
    picture = Image.new("RGB", (20, 16), (40 * i, 250 - 30 * i, 99))
    picture.putpixel((10, 8), (i, i, i))
    picture.save(file, "png")
    return file.getvalue()


@dataclass
class Hub:
    stream: FakeStream
    commit: str = "first"
    asked: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Seven prompts with images, as the set user/name."""
    features = {"image": FakeImage(), "caption": FakeValue("string"), "label": FakeClassLabel(["a", "b", "c"])}
    held = [
        {"image": {"bytes": png(i), "path": None}, "caption": prompt, "label": i % 2}
        for i, prompt in enumerate(PROMPTS)
    ]
    hub = Hub(FakeStream(held, features))

    def load_dataset(name: str, **how: Any) -> FakeStream:
        hub.asked.append({"name": name, **how})
        assert how["streaming"], "nothing may be downloaded"
        return hub.stream

    module = types.ModuleType("datasets")
    module.__dict__.update(load_dataset=load_dataset, Image=FakeImage, Value=FakeValue, ClassLabel=FakeClassLabel)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name: types.SimpleNamespace(sha=hub.commit))
    return hub


def streamed(teacher: Path, out: Path, **more: Any) -> dict[str, Any]:
    given = {"streaming": True, "prompts": "user/name", "count": 7} | more
    return options(teacher, Path("none"), out) | given


def test_streamed_prompts_are_read_once_in_order_and_give_the_same_bytes(
    teacher: Path, prompts: Path, tmp_path: Path, hub: Hub
) -> None:
    whole = encode(**options(teacher, prompts, tmp_path / "whole"))
    out = encode(**streamed(teacher, tmp_path / "out"))
    assert contents(out) == contents(whole) and len(open_encoded(out)) == 7
    assert hub.asked == [{"name": "user/name", "split": "train", "streaming": True, "revision": "first"}]
    assert hub.stream.log == [0] and hub.stream.read == 2 * list(range(7))  # the first rows for the fingerprint
    first = encode(**options(teacher, prompts, tmp_path / "first", count=5))
    assert contents(encode(**streamed(teacher, tmp_path / "five", count=5))) == contents(first)
    assert len(open_encoded(first)) == 5


def test_a_stopped_stream_goes_on_where_it_was_and_skips_what_is_there(teacher: Path, tmp_path: Path, hub: Hub) -> None:
    whole = encode(**streamed(teacher, tmp_path / "whole"))
    hub.stream = hub.stream.with_(table=hub.stream.table, log=[], read=[], breaks_at=[])
    out = tmp_path / "out"

    def breaking(*given: Any) -> None:
        hub.stream.breaks_at.append(5)
        shards.make(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "make", breaking)
        told = (
            r"prompts: the rows of 'user/name' from 5 on cannot be read \(the line is down\); the same command goes on"
        )
        with pytest.raises(UserError, match=told):
            encode(**streamed(teacher, out))
    assert sorted(contents(out)) == ["00000.safetensors", "null.safetensors"]
    hub.stream.breaks_at.clear()
    hub.stream.log.clear()
    hub.stream.read.clear()
    assert contents(encode(**streamed(teacher, out))) == contents(whole)
    assert hub.stream.log == [3] and hub.stream.read == [*range(7), *range(3, 7)]


@pytest.mark.parametrize("rows", [7, 6])  # in the middle of a shard, and between two
def test_a_stream_may_end_before_its_count(
    rows: int, teacher: Path, prompts: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.stream.table = hub.stream.table[:rows]
    prompts.write_text("\n".join(PROMPTS[:rows]))
    whole = encode(**options(teacher, prompts, tmp_path / "whole"))
    for told in (f"user/name has {rows} rows", "is done"):
        out = encode(**streamed(teacher, tmp_path / "out", count=100))
        assert told in capsys.readouterr().out
        assert contents(out) == contents(whole) and len(open_encoded(out)) == rows
    with pytest.raises(UserError, match=rf"out: .* made with count {rows}, and 3 is asked for"):
        encode(**streamed(teacher, tmp_path / "out", count=3))


def test_the_length_of_a_stream(teacher: Path, tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(UserError, match="count: 'user/name' does not tell its length; give --count N"):
        encode(**streamed(teacher, tmp_path / "out", count=None))
    hub.stream.told = 7
    assert len(open_encoded(encode(**streamed(teacher, tmp_path / "out", count=None)))) == 7


def test_a_set_that_has_changed_is_not_gone_on_with(teacher: Path, tmp_path: Path, hub: Hub) -> None:
    encode(**streamed(teacher, tmp_path / "out"))
    hub.commit = "second"
    with pytest.raises(UserError, match=r"out: .* holds encoded prompts made with source"):
        encode(**streamed(teacher, tmp_path / "out"))


def test_a_file_that_has_changed_is_not_gone_on_with(
    teacher: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = types.SimpleNamespace(ParquetFile=lambda file: types.SimpleNamespace(metadata=fake))
    fake = types.SimpleNamespace(num_rows=7)
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=counted))
    file = tmp_path / "set[1].parquet"
    file.write_bytes(b"one")
    given = streamed(teacher, tmp_path / "out", prompts=str(file), count=None)
    assert len(open_encoded(encode(**given))) == 7
    assert [Path(glob.glob(name)[0]) for name in hub.asked[0]["data_files"]] == [file]  # `datasets` takes patterns
    file.touch()
    encode(**given)
    file.write_bytes(b"two")  # of the same size, and the first rows are the same
    with pytest.raises(UserError, match=r"out: .* holds encoded prompts made with source"):
        encode(**given)


def test_a_stream_whose_count_exceeds_the_disk_is_read(
    teacher: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert len(open_encoded(encode(**streamed(teacher, tmp_path / "out", count=10**6)))) == 7
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"out: .* has 0 MiB free and the next file needs"):
        encode(**streamed(teacher, tmp_path / "other"))


def test_streamed_images_give_the_same_bytes_as_a_folder_of_them(teacher: Path, tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        (folder / f"{i}.png").write_bytes(png(i))
    told = [json.dumps({"file_name": f"{i}.png", "text": prompt}) for i, prompt in enumerate(PROMPTS)]
    (folder / "metadata.jsonl").write_text("\n".join(told))
    data = {"prompts": None, "data": str(folder)}
    whole = encode(**options(teacher, Path("none"), tmp_path / "whole") | data)
    # One lies elsewhere, as those of sets that are no parquet files do.
    with fsspec.open("memory://somewhere/4.png", "wb") as file:
        file.write(png(4))
    hub.stream.table[4]["image"] = {"bytes": None, "path": "memory://somewhere/4.png"}
    out = encode(**streamed(teacher, tmp_path / "out", prompts=None, data="user/name"))
    assert contents(out) == contents(whole) and open_encoded(out).has_images
    hub.stream.table[4]["image"] = {"bytes": None, "path": "memory://somewhere/5.png"}
    with pytest.raises(UserError, match=r"the image memory://somewhere/5.png cannot be read"):
        encode(**streamed(teacher, tmp_path / "other", prompts=None, data="user/name"))


def test_a_stream_is_read_anew_for_rows_that_do_not_follow(hub: Hub) -> None:
    data = stream_data("user/name", count=9, resolution=8, channels=3)
    assert (data.shape, data.num_classes, len(data)) == ((3, 8, 8), 3, 9)
    for rows in ([2, 3], [4, 5], [0, 1], [6]):
        got = data.get(torch.tensor(rows))
        assert got.captions == [PROMPTS[i] for i in rows]
        assert got.labels is not None and got.labels.tolist() == [i % 2 for i in rows]
        corner = (got.images[:, 0, 0, 0] + 1) * 127.5
        assert torch.allclose(corner, torch.tensor([40.0 * i for i in rows]), atol=2)
    assert hub.stream.log == [2, 0, 6]
    with pytest.raises(Ended) as end:
        data.get(torch.tensor([5, 6, 7]))
    assert end.value.rows == 7


def test_streams_that_cannot_be_used(teacher: Path, prompts: Path, tmp_path: Path, hub: Hub) -> None:
    def refused(told: str, **more: Any) -> None:
        with pytest.raises(UserError, match=told) as error:
            encode(**streamed(teacher, tmp_path / "out", **more))
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    for other in (str(prompts), str(tmp_path), str(tmp_path / "none.parquet"), "nothing"):
        refused("streaming: .* is no Hugging Face dataset .* leave --streaming out", prompts=other)
    images = {"prompts": None, "data": "user/name"}
    table, features = hub.stream.table, hub.stream.features
    hub.stream.table = []
    refused("prompts: 'user/name' has no row; give at least one")
    hub.stream.table = [{**row, "label": -1} for row in table]
    refused("data: user/name, row 0 has the label -1; a stream's labels are whole numbers", **images)
    hub.stream.table = [{**row, "image": {"bytes": b"junk", "path": None}} for row in table]
    refused("data: cannot read the image user/name, row 0", **images)
    hub.stream.table, hub.stream.features = [{"other": "x"}], None
    refused(r"prompts: 'user/name' has the columns \['other'\]; give rows with a 'prompt'")
    refused(r"data: 'user/name' has the columns \['other'\]; give rows with an 'image'", **images)
    hub.stream.table, hub.stream.features = table, {k: v for k, v in features.items() if k != "caption"}
    refused("data: 'user/name' has no captions, which stable_diffusion is conditioned on", **images)
    hub.stream.breaks_at.append(0)
    hub.stream.features = features
    refused(r"prompts: the rows of 'user/name' from 0 on cannot be read \(the line is down\)")


def test_parquet_files_are_streamed_to_the_same_bytes_as_read(teacher: Path, tmp_path: Path) -> None:
    """With the library itself, where it is installed."""
    pytest.importorskip("datasets")
    import datasets
    import pyarrow
    from pyarrow import parquet

    files = tmp_path / "files"
    files.mkdir()
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    for part, indices in enumerate((range(4), range(4, 7))):
        held = [{"image": {"bytes": png(i), "path": None}, "caption": PROMPTS[i]} for i in indices]
        parquet.write_table(pyarrow.Table.from_pylist(held, schema=kinds.arrow_schema), files / f"{part}.parquet")
    for what in ("prompts", "data"):
        rest = {"prompts": None, what: f"{files}/0.parquet"}
        whole = encode(**options(teacher, Path("none"), tmp_path / f"whole-{what}") | rest)
        again = encode(**streamed(teacher, tmp_path / f"streamed-{what}", count=None, **rest))
        assert contents(again) == contents(whole) and len(open_encoded(again)) == 4
    both = {"prompts": f"{files}/*.parquet", "count": None}
    assert len(open_encoded(encode(**streamed(teacher, tmp_path / "both", **both)))) == 7
    folder = {"prompts": str(files), "count": 100}
    assert contents(encode(**streamed(teacher, tmp_path / "folder", **folder))) == contents(tmp_path / "both")
    shutil.rmtree(tmp_path / "folder")
    with pytest.raises(UserError, match=r"prompts: .*Bad split"):
        encode(**streamed(teacher, tmp_path / "folder", prompts=f"{files}/0.parquet#test"))


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
