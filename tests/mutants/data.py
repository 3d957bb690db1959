"""Sizes, buckets and videos: which rows, frames and crops reach the encoder, and what shape noise has."""

_B = "tests/data/test_buckets.py"
_C = "tests/data/test_conditions.py"
_L = "tests/data/test_image_lists.py"
_LISTS = "tests/families/test_image_lists.py"
_V = "tests/data/test_videos.py"
_F = "tests/families/test_families.py"
_W = "tests/families/test_wan_i2v.py"
_X = "tests/families/test_ltx2.py"
_M = "tests/eval/test_moving.py"
_MD = "tests/data/test_moving.py"

MUTANTS = {
    f"diffdistill/data/buckets.py | {_B}": [
        ("every process sees the same rows", "k * whole + rank * batch_size", "k * whole"),
        (
            "every epoch is alike",
            "_order(counts[bucket], seed, epoch, bucket)",
            "_order(counts[bucket], seed, 0, bucket)",
        ),
        ("rows of the first bucket", " + sum(counts[:bucket])", ""),
        (
            "ratios upside down",
            "size[0] * other[1] / (size[1] * other[0])",
            "size[0] * other[0] / (size[1] * other[1])",
        ),
        ("a batch of one process", "batches = [count // whole", "batches = [count // batch_size"),
    ],
    f"diffdistill/data/batches.py | {_B}": [
        ("noise of the teacher's own size", "pair=pair, shape=shape,", "pair=pair,"),
    ],
    f"diffdistill/data/encoded.py | {_B}": [
        (
            "a bucket is told the size of another",
            "encoder.family, described[size], encoder)",
            "encoder.family, described[encoder.size], encoder)",
        ),
        ("the images of another bucket", "open_source(own, one, images)", "open_source(own, one, images[::-1])"),
    ],
    f"diffdistill/data/videos.py | {_V}": [
        ("frames in the order of names", '(int(re.findall(r"\\d+", path.stem)[-1]), path.name)', "path.name"),
        ("captions of other videos", "[captions[i] for i in indices]", "[captions[0] for _ in indices]"),
        ("channels and frames swapped", "permute(3, 0, 1, 2)", "permute(0, 3, 1, 2)"),
    ],
    f"diffdistill/data/videos.py | {_W}": [
        ("the last frame is the condition", "conditions=samples[:, :, 0]", "conditions=samples[:, :, -1]"),
    ],
    f"diffdistill/families/wan_i2v.py | {_W}": [
        ("every frame is marked", "(torch.arange(x.shape[2], device=x.device) == 0)", "torch.ones(x.shape[2])"),
        ("the first frame has the others' time", "torch.zeros_like(time), *[time]", "time, *[time]"),
        ("the network reads the noise of the first frame", "held = torch.cat([image, x[:, :, 1:]], 2)", "held = x"),
        ("the first frame is what the network makes", "(x[:, :, :1] - image) / sigma", "output[:, :, :1]"),
        ("all see the first image", "for picture in prompt.pictures]", "for picture in prompt.pictures[:1] * 2]"),
    ],
    f"diffdistill/families/ltx2.py | {_X}": [
        ("a token more of the sound", "return round(frames / _RATE * _TOKENS)", "return 1 + int(frames / 24 * 25)"),
        ("the sound reads the video's tokens", "rest[:, :tokens],", "_rows(x)[:, :tokens],"),
        ("places without a token are what they were", "rest[:, tokens:].float() / ", "rest[:, tokens:].float() * "),
        ("the sound's own time is none", "sigma=time,", "sigma=0 * time,"),
        ("the shift is that of both", "length * height * width)", "2 * length * height * width)"),
        ("the sound's noise first", "_rows(video), sound", "sound.transpose(1, 2).flatten(2), sound"),
        ("rows of the spectrogram for channels", "channels, tokens, c // channels", "c // channels, tokens, channels"),
        ("decoded with the sound's frames", "latents[:, :, :frames] * std", "latents[:, :, -frames:] * std"),
        ("the sound is not guided", 'f"audio_{name}": None for', 'f"audio_{name}": 1.0 for'),
    ],
    f"eval/videos.py | {_X}": [
        ("channels after each other", "(sound.T * 32767)", "(sound * 32767)"),
        ("another rate", "setframerate(rate)", "setframerate(24000)"),
    ],
    f"diffdistill/families/_schedules.py | {_X}": [
        ("a copy's steps are the scheduler's", "kind.step(self, *args", "kind.step(scheduler, *args"),
    ],
    "diffdistill/data/batches.py | tests/data/test_examples.py": [
        ("labels are not looked at", "if low not in known or high not in known:", "if False:"),
        ("the lowest label is not", "if low not in known or high", "if high"),
    ],
    "diffdistill/data/folder.py | tests/data/test_data.py": [
        ("the middle of another ratio", "width * size[0] > height * size[1]", "width * size[1] > height * size[0]"),
    ],
    f"diffdistill/families/_family.py | {_F}": [
        (
            "height and width swapped",
            "return pixels[0] // factor, pixels[1] // factor",
            "return pixels[1] // factor, pixels[0] // factor",
        ),
    ],
    f"diffdistill/families/flux.py | {_F}": [
        ("a shift of another number of tokens", "size[0] * size[1] // 4", "size[0] ** 2 // 4"),
        (
            "a condition image in the sample's place",
            "image.shape[3] // 2, x.device, 1)",
            "image.shape[3] // 2, x.device)",
        ),
    ],
    f"diffdistill/data/folder.py | {_L}": [
        (
            "each has the images of the row before",
            "each * i + k for i in rows",
            "each * max(i - 1, 0) + k for i in rows",
        ),
        ("a list in another order", "for k in range(each)]", "for k in reversed(range(each))]"),
        (
            "one prompt's images are spread over two",
            "unflatten(0, (-1, each))",
            "unflatten(0, (each, -1)).transpose(0, 1)",
        ),
    ],
    f"diffdistill/families/flux2.py | {_LISTS}": [
        ("images at one time", "_APART * i) for i", "_APART * min(i, 1)) for i"),
        ("images at the sample's time", "x.device, _APART * i)", "x.device)"),
        (
            "images of other prompts",
            "unflatten(0, (len(prompt.images), -1))",
            "unflatten(0, (-1, len(prompt.images))).transpose(0, 1)",
        ),
        ("features of the images", "tokens[:, : tokens.shape[1] - behind]", "tokens"),
    ],
    f"diffdistill/families/qwen_image_edit_plus.py | {_LISTS}": [
        ("the text encoder's size for the autoencoder", "*larger[1::-1])", "*smaller[1::-1])"),
        ("height and width swapped", "reader.resize(picture, *smaller[1::-1])", "reader.resize(picture, *smaller[:2])"),
        ("the first image alone is shown", "for picture in row] for row", "for picture in row[:1]] for row"),
        (
            "images of other prompts",
            "unflatten(0, (len(prompts), -1))",
            "unflatten(0, (-1, len(prompts))).transpose(0, 1)",
        ),
    ],
    f"eval/models.py | {_L}": [
        ("every prompt is drawn from the first's images", "pictures[k : k + 1]) for k", "pictures[:1]) for k"),
        ("of another seed", "images([i], seed, None, text, seen)", "images([0], seed, None, text, seen)"),
    ],
    f"eval/sample.py | {_L}": [
        ("lists that overlap", "range(0, len(pictures), each)", "range(0, len(pictures) - each + 1)"),
    ],
    f"diffdistill/data/folder.py | {_C}": [
        ("the condition image of another row", "[places[j] for j in of_each(rows", "[places[0] for _ in of_each(rows"),
        ("condition images that are the images", "fetch=lambda rows: sources, ", ""),
    ],
    f"diffdistill/data/webdataset.py | {_C}": [
        (
            "the condition image of another sample",
            "[conditions[i].read() for i in rows]",
            "[conditions[0].read() for _ in rows]",
        ),
    ],
    f"diffdistill/data/moving.py | {_MD}": [
        ("begins with the last frame", "rows[:, :, 0] if conditioned", "rows[:, :, -1] if conditioned"),
        ("the first frame says where to", "x + gone *", "x + (gone - 8) *"),
        ("frames and channels mixed", "videos.transpose(1, 2).flatten(0, 1)", "videos.reshape(-1, 3, SIDE, SIDE)"),
        ("one frame is looked at", "torch.where((each == each[:, :1]).all(1), each[:, 0], NONE)", "each[:, 0]"),
        ("any step is a direction", ">= TRAVEL / 2", ">= 0"),
        ("captions of other videos", "captions[i] for i in indices", "captions[0] for i in indices"),
    ],
    f"diffdistill/commands/video_teacher.py | {_M}": [
        ("padding is words", "* words.unsqueeze(-1)", ""),
        ("words beyond the mask are seen", "self.text_encoder(input_ids, words)", "self.text_encoder(input_ids)"),
        ("latents are not standardized", ".div_(latents.new_tensor(std).view(view))", ""),
        ("their mean is not kept", "register_to_config(latents_mean=mean, latents_std=std)", "register_to_config()"),
        ("images without grey frames", "self.data.shape[1] - 1)", "0).repeat(1, 1, 2, 1, 1)"),
    ],
    f"diffdistill/families/_loading.py | {_M}": [
        (
            "a teacher's own size is not read",
            "resolution or record.resolution, frames or record.frames",
            "resolution, frames",
        ),
    ],
    f"pipelines/record.py | {_M}": [
        ("nor told its students", "resolution or own.resolution, frames or own.frames", "resolution, frames"),
    ],
    f"eval/judge.py | {_M}": [
        ("pictures that are not held out", "protocol.pixels, True, HELD_OUT)", "protocol.pixels, True, 0)"),
        ("text to video is given pictures", 'protocol.prompts == "moving-i2v":', "True:"),
    ],
    f"eval/features/pixels.py | {_M}": [
        ("the first frame alone", "images = images.flatten(1, 2)", "images = images[:, :, 0]"),
    ],
    f"eval/features/transformers_networks.py | {_M}": [
        ("the first frames", "torch.linspace(0, videos.shape[2] - 1, frames).round().long()", "torch.arange(frames)"),
    ],
    "eval/judge.py | tests/eval/test_edits.py": [
        ("pictures of other rows", "[i % len(changed) for i in indices]", "[0 for _ in indices]"),
        ("measures read the prompt", "texts = self.said or self.captions", "texts = self.captions"),
    ],
}
