"""Teachers of moving shapes, made from nothing, and what is judged of them and of their students."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from diffdistill import distill, evaluate, load_student
from diffdistill.commands.teacher import train_teacher
from diffdistill.commands.video_teacher import TextAndTransformer, VideoTeacher, open_training_videos
from diffdistill.config import TeacherConfig
from diffdistill.data.encoded import encode, open_encoded
from diffdistill.data.moving import draw_moving
from diffdistill.data.shapes import HELD_OUT
from diffdistill.errors import UserError
from diffdistill.eval.choice import Wishes, choose, facts_of
from diffdistill.eval.features.measure import measure
from diffdistill.eval.judge import Judge, JudgeOptions
from diffdistill.eval.measurements import measured
from diffdistill.eval.models import SamplingOptions, open_model
from diffdistill.eval.protocol import load
from diffdistill.families import load_teacher
from diffdistill.options import build
from diffdistill.pictures import as_bytes, image_grid, save_png
from diffdistill.training.folder import resumed_options
from diffdistill.training.trainer import accelerator_for

TINY: dict[str, Any] = {
    **{"parameterization": "flow", "data": "moving:8", "frames": 5, "widths": "32", "layers": 1, "batch_size": 2},
    **{"vae_widths": "8,8,8", "text_width": 16, "vae_batch_size": 2, "device": "cpu", "sample_every": 1},
}


@pytest.fixture(scope="module", params=["wan", "wan-i2v"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    return train_teacher(**TINY, architecture=request.param, steps=1, vae_steps=1, out=out)


@pytest.fixture(scope="module")
def prompts(teacher: Path) -> Path:
    return encode(teacher=str(teacher), data="moving:8", device="cpu", out=str(teacher.parent / "prompts"))


def test_it_is_trained_as_its_pipeline_draws(teacher: Path, prompts: Path) -> None:
    """Latents, words and images that the training sees are those that `encode` makes by the pipeline's own means."""
    described = load_teacher(teacher)
    encoded = open_encoded(prompts)
    rows = encoded.get(torch.arange(8))
    assert rows.x0 is not None and rows.x0.shape == (8, 16, 2, 8, 8) and described.shape == rows.x0.shape[1:]
    assert float(rows.x0.mean((0, 2, 3, 4)).abs().max()) < 1e-3
    assert float((rows.x0.std((0, 2, 3, 4)) - 1).abs().max()) < 1e-3
    config = build(TeacherConfig, resumed_options(teacher.parent, {}))
    own = VideoTeacher(config, open_training_videos(config), (32,), (), (8, 8, 8))
    own.prepare(teacher.parent / "vae", accelerator_for(config, teacher.parent), False, 0.0)  # which is trained already
    seen = own.get(torch.arange(8))
    assert seen.x0 is not None and torch.allclose(seen.x0, rows.x0, atol=1e-4)
    for name in {"image_latents"} & set(rows.cond):
        assert torch.allclose(seen.cond[name], rows.cond[name], atol=1e-4)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(teacher)
    network = TextAndTransformer(pipeline.transformer, pipeline.text_encoder).eval()
    captions = draw_moving(0, 8, 5)[1]
    ids = pipeline.tokenizer([*captions[:7], ""], return_tensors="pt", padding="longest").input_ids
    assert ids.shape == (8, 6)  # a token a word, and one for the end
    words = torch.cat([rows.cond["encoder_hidden_states"][:7], encoded.null["encoder_hidden_states"]])
    image = {name: value for name, value in rows.cond.items() if name == "image_latents"}
    time = torch.full((8,), 400.0)
    with torch.no_grad():
        ours = network(rows.x0, time, ids, **image)
        cond = {"encoder_hidden_states": words, **image}
        theirs = described.denoiser.call(described.denoiser.network, rows.x0, time, cond)
    assert torch.allclose(ours, theirs, atol=1e-5) and float((ours[7] - ours[6]).abs().max()) > 1e-3


def test_students_are_judged_by_the_way_they_go(teacher: Path, prompts: Path) -> None:
    shared = {"teacher": str(teacher), "prompts": str(prompts), "batch_size": 2, "steps": 1, "sample_every": 0}
    run = teacher.parent / "run"
    distill("sid", **shared, device="cpu", out=run)
    from_image = "i2v" in teacher.parent.name
    choice = choose(facts_of(run), Wishes(count=4))
    assert (choice.protocol.name, choice.protocol.frames) == ("moving-i2v" if from_image else "moving", 5)
    _, captions, pictures = Judge(choice.options()).conditions(None, [3, 1])
    videos, drawn = draw_moving(HELD_OUT, 4, 5)
    assert captions == [drawn[3], drawn[1]]
    assert pictures is None if not from_image else torch.equal(pictures, videos[[3, 1], :, 0])
    model = open_model(run, SamplingOptions(eight_bit=False))
    stock = model.draw([3, 1], 0, None, captions, pictures)
    assert stock.shape == (2, 3, 5, 32, 32)
    table = evaluate(run, count=4, teacher_steps=(1,), bootstrap=0, device="cpu")
    assert [score.model for score in table.scores] == ["drawn, through the autoencoder", "teacher", "student"]
    assert [len(score.shown) for score in table.scores if score.shown is not None] == [20, 20, 20]
    # What is judged is the stock pipeline's own video, from the same noise; a picture goes to that in 8 bits.
    student = table.scores[2].shown
    assert student is not None
    first = model.draw([0], 0, None, [drawn[0]], videos[:1, :, 0] if from_image else None)[0]
    assert torch.allclose(student[:5], first.transpose(0, 1), atol=2e-3 if from_image else 1e-4)
    assert load_student(run / "student")[1].shape == (16, 2, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameterization": "vp"}, "parameterization: vp is not for wan; give flow"),
        ({"widths": "32,64"}, "widths: '32,64' are of a UNet; wan has one, a multiple of 32"),
        ({"vae_widths": "8,16"}, "vae_widths: '8,16' do not go with videos; give three multiples of the first"),
        ({"frames": 6}, "frames: 6 is not one more than a multiple of 4, such as 9"),
        ({"attention": "0"}, "attention: '0' is of a UNet, and wan has none; leave it out"),
        ({"channels": 1}, "channels: 1 is for images; videos are of 3"),
        ({"architecture": "unet2d", "data": "digits"}, "frames: 5 is of videos, and unet2d makes none; leave it out"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train_teacher(**{**TINY, "architecture": "wan", **options}, steps=1, vae_steps=1, out=str(tmp_path / "run"))


def test_a_protocol_of_images_judges_no_videos(teacher: Path) -> None:
    with pytest.raises(UserError, match=r"the protocol shapes (is of images|has none to be changed)"):
        evaluate(teacher, protocol="shapes", count=2, bootstrap=0, device="cpu", out=str(teacher.parent / "no"))


def folder_of(videos: torch.Tensor, captions: list[str], folder: Path) -> Path:
    for i, (video, text) in enumerate(zip(videos, captions, strict=True)):
        for f in range(video.shape[1]):
            save_png(image_grid(video[None, :, f], 1), folder / f"{i:03}" / f"{f}.png")
        (folder / f"{i:03}.txt").write_text(text)
    return folder


def test_any_videos_are_compared_with_real_ones_in_pixels(teacher: Path, tmp_path: Path) -> None:
    videos, captions = draw_moving(0, 20, 5)
    real = folder_of(videos, captions, tmp_path / "real")
    choice = choose(facts_of(teacher), Wishes(data=str(real), count=10))
    assert (choice.protocol.name, choice.protocol.shape) == ("pixels", (3, 5, 32, 32))
    assert choice.captions == captions[:10]
    judge = Judge(choice.options())
    pictures = judge.conditions(None, [3])[2]
    if "i2v" in teacher.parent.name:
        assert pictures is not None and float((pictures - videos[[3], :, 0]).abs().max()) < 0.01
    else:
        assert pictures is None
    # What is compared is the whole video: the same frames in another order are another video.
    same, backwards = (measured(as_bytes(v), judge.measures, None, None) for v in (videos, videos.flip(2)))
    assert not torch.allclose(same["pixels.features"], backwards["pixels.features"], atol=0.1)
    table = evaluate(teacher, data=str(real), count=10, bootstrap=0, device="cpu", out=str(tmp_path / "out"))
    distance = table.scores[0].values["frechet distance"]
    assert distance is not None and distance > 0


def test_a_video_network_of_ones_own_gives_the_frechet_video_distance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {"image_size": 16, "patch_size": 8, "num_frames": 4, "hidden_size": 16}
    size |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    VideoMAEForVideoClassification(VideoMAEConfig(**size)).save_pretrained(tmp_path / "network")
    protocol = load(
        "videos",
        count=12,
        resolution=32,
        channels=3,
        frames=5,
        reference="moving:16",
        prompts="moving",
        conditions=["prompts"],
    )
    judge = Judge(JudgeOptions(protocol, reference="moving:16", weights={"videomae": str(tmp_path / "network")}))
    videos = as_bytes(draw_moving(1, 12, 5)[0])
    features = judge.measures[0](videos, None, None)["features"]
    assert features.shape == (12, 16)
    network = VideoMAEForVideoClassification.from_pretrained(tmp_path / "network").eval()
    stills = F.interpolate(videos[0, :, [0, 1, 3, 4]].transpose(0, 1).float(), (16, 16), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        tokens = network.videomae(((stills / 255 - mean) / std)[None]).last_hidden_state
        assert torch.allclose(features[0], network.fc_norm(tokens.mean(1))[0], atol=1e-4)
    with pytest.raises(UserError, match="measures videos, and these are images"):
        judge.measures[0](videos[:, :, 0], None, None)
    with pytest.raises(UserError, match="'lite0' measures images, and these are videos"):
        measure("lite0")(videos, None, None)
