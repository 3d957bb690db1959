"""Sizes, buckets and videos: which rows, frames and crops reach the encoder, and what shape noise has."""

_B = "tests/data/test_buckets.py"
_C = "tests/data/test_conditions.py"
_V = "tests/data/test_videos.py"
_F = "tests/families/test_families.py"
_W = "tests/families/test_wan_i2v.py"

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
    f"diffdistill/data/folder.py | {_C}": [
        ("the condition image of another row", "[places[i] for i in rows]", "[places[0] for _ in rows]"),
        ("condition images that are the images", "fetch=lambda rows: sources, ", ""),
    ],
    f"diffdistill/data/webdataset.py | {_C}": [
        (
            "the condition image of another sample",
            "[conditions[i].read() for i in rows]",
            "[conditions[0].read() for _ in rows]",
        ),
    ],
    "eval/judge.py | tests/eval/test_edits.py": [
        ("pictures of other rows", "[i % len(changed) for i in indices]", "[0 for _ in indices]"),
        ("measures read the prompt", "texts = self.said or self.captions", "texts = self.captions"),
    ],
}
